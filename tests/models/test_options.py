"""The command line: defaults, and what is refused, with status 2 and one line that names the option."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import tkernels
from models import options

pytestmark = pytest.mark.gate("torch")

REFUSED = [
    ("--batch-size 0", "--batch-size", "'0'"),
    ("--batch-size -3", "--batch-size", "'-3'"),
    ("--batch-size 2.5", "--batch-size", "'2.5'"),
    ("--batch-size 99999999999999999999", "--batch-size", "'99999999999999999999'"),
    ("--epochs -1", "--epochs", "'-1'"),
    ("--epochs many", "--epochs", "'many'"),
    ("--lr 0", "--lr", "'0'"),
    ("--lr -1e-3", "--lr", ""),
    ("--lr nan", "--lr", "'nan'"),
    ("--lr inf", "--lr", "'inf'"),
    ("--lr fast", "--lr", "'fast'"),
    ("--weight-decay=-0.1", "--weight-decay", "'-0.1'"),
    ("--weight-decay nan", "--weight-decay", "'nan'"),
    ("--seed -1", "--seed", "'-1'"),
    ("--seed 4294967296", "--seed", "'4294967296'"),
    ("--data mnist", "--data", "digits"),
    ("--model big", "--model", "plain"),
    ("--backend cuda", "--backend", "triton"),
    ("--device nonsense", "--device", "'nonsense'"),
    ("--device meta", "--device", "'meta'"),
    ("--device cuda:99", "--device", "'cuda:99'"),
    ("--backend triton --device cpu", "--backend", "cpu"),
    ("--backend triton --model plain", "--backend", "--model fused"),
    ("--epoch 3", "--epoch", ""),
    ("--batch_size 3", "--batch_size", ""),
    ("--unknown", "--unknown", ""),
    ("something", "something", ""),
    ("--lr", "--lr", "expected one argument"),
]


@pytest.mark.parametrize("line, option, detail", REFUSED, ids=[line for line, *_ in REFUSED])
def test_refused(line: str, option: str, detail: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        options.parse(line.split())
    out, err = capsys.readouterr()
    assert exit.value.code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("python -m models.train: error: ")
    assert option in err
    assert detail in err


def test_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(SystemExit):
        options.parse(["--out", str(path)])
    assert "--out" in capsys.readouterr().err


def test_defaults() -> None:
    chosen = options.parse([])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert dataclasses.asdict(chosen) == {
        "data": "digits",
        "data_dir": Path("data"),
        "model": "fused",
        "backend": tkernels.get_backend(),
        "device": torch.device(device),
        "epochs": 10,
        "batch_size": 32,
        "lr": 1e-3,
        "weight_decay": 1e-4,
        "cuda_graph": device == "cuda",
        "seed": 0,
        "out": Path("runs/digits"),
    }


def test_everything_given() -> None:
    line = (
        "--data cifar10 --data-dir d --model plain --backend torch --device cpu --epochs 0 --batch-size 7 --lr 0.5"
        " --weight-decay 0 --no-cuda-graph --seed 9 --out o"
    )
    chosen = options.parse(line.split())
    assert dataclasses.astuple(chosen) == (
        *("cifar10", Path("d"), "plain", "torch", torch.device("cpu"), 0, 7, 0.5, 0.0, False, 9, Path("o")),
    )


def test_defaults_that_depend_on_the_data() -> None:
    chosen = options.parse(["--data", "cifar10"])
    assert (chosen.epochs, chosen.batch_size, chosen.out) == (50, 128, Path("runs/cifar10"))


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        options.parse(["--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0
    for field in dataclasses.fields(options.Options):
        assert f"--{field.name.replace('_', '-')}" in text
    assert text.count("default: ") == len(dataclasses.fields(options.Options))
