"""The training program from end to end: what it writes, that it repeats itself, and how it fails."""

from __future__ import annotations

import csv
import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from models import checkpoint, data, train
from models.cifar_cnn import CNNClassifier, FusedCNNClassifier

pytestmark = pytest.mark.gate("torch")

FILES = ["checkpoint.pt", "curves.png", "history.csv"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def digits() -> Callable[[Path, int], data.Images]:
    """The digits data set of which only 40 images are trained on and 16 validated, made once a seed."""

    @functools.cache
    def few(data_dir: Path, seed: int) -> data.Images:
        images = data.digits(data_dir, seed)
        return images._replace(train=Subset(images.train, range(40)), val=Subset(images.val, range(16)))

    return few


@pytest.fixture
def run(
    digits: Callable[[Path, int], data.Images], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Runs the command on few digits and returns where it wrote."""
    monkeypatch.setitem(data._LOADERS, "digits", digits)

    def go(*arguments: str, name: str = "out", status: int = 0) -> Path:
        out = tmp_path / "not" / "there" / name
        assert train.main(["--device", "cpu", "--batch-size", "16", "--out", str(out), *arguments]) == status
        return out

    return go


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of an eighth of the width, and no picture: for tests that run the command several times."""
    for network in (CNNClassifier, FusedCNNClassifier):
        monkeypatch.setattr(train, network.__name__, functools.partial(network, width=4))
    monkeypatch.setattr(train, "draw_curves", lambda rows, path, title: None)


def _history(out: Path) -> list[dict[str, str]]:
    with (out / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("model", ["fused", "plain"])
def test_one_epoch(run: Callable[..., Path], model: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("--epochs", "1", "--model", model)
    assert sorted(os.listdir(out)) == FILES

    (row,) = _history(out)
    assert list(row) == ["epoch", "train_loss", "val_loss", "train_acc", "val_acc"]
    assert row["epoch"] == "1"
    assert all(math.isfinite(float(value)) for value in row.values())
    assert 0 <= float(row["train_acc"]) <= 1
    assert float(row["val_acc"]) * 16 % 1 == 0

    with Image.open(out / "curves.png") as picture:
        picture.verify()

    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert set(state) == {"epoch", "model_state_dict", "optimizer_state_dict", "val_acc"}
    assert state["epoch"] == 1
    assert state["val_acc"] == float(row["val_acc"])
    for network in (CNNClassifier(), FusedCNNClassifier()):
        network.load_state_dict(state["model_state_dict"])
        optimizer = torch.optim.Adam(network.parameters())
        optimizer.load_state_dict(state["optimizer_state_dict"])
        assert optimizer.param_groups[0]["weight_decay"] == 1e-4

    printed, errors = capsys.readouterr()
    assert errors == "", "no progress bar where there is no terminal"
    lines = printed.splitlines()
    assert f"{model} CNN of 698,794 parameters on cpu" in lines[0]
    assert "40 images to train on, 16 to validate" in lines[0]
    assert lines[1].startswith("epoch 1/1  train loss ")
    assert lines[2].startswith(f"validation accuracy {float(row['val_acc']):.2%} (")
    assert str(out) in lines[3]


@pytest.mark.usefixtures("narrow")
def test_checkpoint_holds_the_weights_that_were_validated(run: Callable[..., Path]) -> None:
    out = run("--epochs", "2")
    state = checkpoint.load(out / "checkpoint.pt")
    model, criterion = train.build("plain", 10, torch.device("cpu"))
    model.load_state_dict(state["model_state_dict"])
    _, val_loader = data.loaders(data.load("digits", Path(), 0), 16, 0)
    result = train.validate(model, val_loader, criterion, "cpu")
    last = _history(out)[-1]
    assert result.accuracy == float(last["val_acc"])
    assert result.loss == pytest.approx(float(last["val_loss"]), rel=1e-4)


@pytest.mark.usefixtures("narrow")
def test_learning_rate_falls_along_a_cosine(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    original = train.train_epoch

    def spy(model: Any, loader: Any, criterion: Any, optimizer: torch.optim.Optimizer, *rest: Any, **kw: Any) -> Any:
        rates.append(optimizer.param_groups[0]["lr"])
        return original(model, loader, criterion, optimizer, *rest, **kw)

    monkeypatch.setattr(train, "train_epoch", spy)
    run("--epochs", "3", "--lr", "0.002")
    assert rates == pytest.approx([0.001 * (1 + math.cos(math.pi * i / 3)) for i in range(3)])


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("model", ["fused", "plain"])
def test_same_seed_same_bits(run: Callable[..., Path], model: str) -> None:
    arguments = ("--epochs", "2", "--model", model)
    first = run(*arguments, name="first")
    torch.rand(7)  # what was drawn before does not matter
    again = run(*arguments, name="again")
    other = run(*arguments, "--seed", "1", name="other")
    assert (first / "history.csv").read_bytes() == (again / "history.csv").read_bytes()
    weights = [checkpoint.load(out / "checkpoint.pt")["model_state_dict"] for out in (first, again, other)]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    assert not torch.equal(weights[2]["stage1.conv1.weight"], weights[0]["stage1.conv1.weight"])


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    "option", [("--lr", "0.01"), ("--weight-decay", "0.5"), ("--batch-size", "20"), ("--epochs", "2")]
)
def test_options_matter(run: Callable[..., Path], option: tuple[str, str]) -> None:
    usual = run("--epochs", "1", name="usual")
    other = run("--epochs", "1", *option, name="other")
    assert (usual / "history.csv").read_text() != (other / "history.csv").read_text()


@pytest.mark.usefixtures("narrow")
def test_zero_epochs_validates_only(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = run("--epochs", "0")
    assert _history(out) == []
    state = checkpoint.load(out / "checkpoint.pt")
    torch.manual_seed(0)
    assert state["epoch"] == 0
    assert torch.equal(state["model_state_dict"]["classifier.fc3.weight"], CNNClassifier(width=4).classifier.fc3.weight)
    assert "validation accuracy" in capsys.readouterr().out


@pytest.mark.usefixtures("narrow")
def test_divergence_keeps_the_last_good_checkpoint(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, results = train.train_epoch, []

    def diverges(*args: Any, **kwargs: Any) -> Any:
        results.append(original(*args, **kwargs))
        return results[-1]._replace(loss=math.nan) if len(results) == 2 else results[-1]

    monkeypatch.setattr(train, "train_epoch", diverges)
    out = run("--epochs", "3", status=1)
    error = capsys.readouterr().err
    assert error.startswith("python -m models.train: error: the loss is no longer finite after epoch 2: try a --lr")
    assert len(error.splitlines()) == 1
    assert [row["epoch"] for row in _history(out)] == ["1", "2"]
    assert checkpoint.load(out / "checkpoint.pt")["epoch"] == 1


def test_interrupted(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_epoch", interrupt)
    run("--epochs", "1", status=130)
    assert capsys.readouterr().err.splitlines() == ["python -m models.train: error: interrupted"]


def test_output_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert train.main(["--epochs", "1", "--out", str(tmp_path / "file" / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.usefixtures("narrow")
def test_full_disk(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    run("--epochs", "1", status=1)
    assert "No space left on device" in capsys.readouterr().err


def _command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "models.train", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_cifar10_that_cannot_be_fetched(tmp_path: Path) -> None:
    """A process of its own, behind a proxy that is not there."""
    nowhere = "http://127.0.0.1:9"
    done = _command(
        *("--data", "cifar10", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")),
        https_proxy=nowhere,
        HTTPS_PROXY=nowhere,
        no_proxy="",
        NO_PROXY="",
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"CIFAR-10 is not in {tmp_path} and could not be downloaded" in line
    assert data.CIFAR10_URL in line


def test_the_command(tmp_path: Path) -> None:
    done = _command("--batch-size", "0", "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "python -m models.train: error: argument --batch-size: must be a whole number, from 1 to 2147483647, got '0'"
    ]
    assert not (tmp_path / "out").exists()
