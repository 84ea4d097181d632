"""models.seeds: every way is trained from every seed, and a way that differs by more than seeds do is said."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from models import checkpoint, seeds
from models.seeds import Way

pytestmark = pytest.mark.gate("torch")


def test_every_way_from_every_seed(
    few_digits: None, no_pictures: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--width", "4", "--image-size", "8", "--epochs", "1", "--device", "cpu"]
    assert seeds.main(["--seeds", "2", "--out", str(tmp_path), *small]) in (0, 1)
    with (tmp_path / "seeds.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["dtype"], row["seed"]) for row in rows] == [
        (model, dtype, seed) for model in ("fused", "plain") for dtype in ("fp32", "bf16") for seed in "01"
    ]
    weights = []
    for row in rows:
        state = checkpoint.load(tmp_path / f"{row['model']}-{row['dtype']}-{row['seed']}" / "checkpoint.pt")
        assert state["val_acc"] == float(row["val_acc"])
        assert state["settings"]["amp"] == {"fp32": "None", "bf16": "torch.bfloat16"}[row["dtype"]]
        weights.append(state["model_state_dict"]["classifier.fc3.weight"].numpy().tobytes())
    # layers as small as these run as PyTorch's own on a CPU: fused or plain, the bits may be the same
    assert len(set(weights[:4])) == len(set(weights[4:])) == 4, "each seed and dtype is a run of its own"
    out = capsys.readouterr().out
    assert out.count("fused CNN of") == out.count("plain CNN of") == 4
    assert "| network | seed 0 | seed 1 | mean | deviation |" in out


def test_a_way_that_differs(tmp_path: Path) -> None:
    ways = [Way("fused", "fp32", [0.98, 0.99]), Way("plain", "fp32", [0.975, 0.985])]
    assert seeds.difference(ways) == pytest.approx(0.005)
    assert "| fused fp32 | 98.00% | 99.00% | 98.50% | 0.71% |" in seeds.table(ways)


@pytest.mark.parametrize("accuracies, status", [([0.9, 0.92, 0.91], 0), ([0.9, 0.92, 0.96], 1)])
def test_status(accuracies: list[float], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By way: the third, plain in float32, is what differs."""
    found = {"fused-fp32": accuracies[0], "fused-bf16": accuracies[1], "plain-fp32": accuracies[2], "plain-bf16": 0.91}
    monkeypatch.setattr(seeds.train, "main", lambda line: 0)
    monkeypatch.setattr(
        seeds.checkpoint, "load",
        lambda path: {"val_acc": found[path.parent.name[:-2]] + 0.01 * int(path.parent.name[-1])},
    )  # fmt: skip
    assert seeds.main(["--out", str(tmp_path), "--seeds", "3"]) == status


def test_a_run_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert seeds.main(["--out", str(tmp_path), "--data", "csv:nowhere.csv"]) == 2
    assert "nowhere.csv" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--amp bf16", "--model plain", "--seed 7", "--seed=7"])
def test_what_is_compared_is_no_option(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        seeds.main(["--out", str(tmp_path), *option.split()])
    name = option.replace("=", " ").split()[0]
    assert f"argument {name}: this is what is compared" in capsys.readouterr().err
