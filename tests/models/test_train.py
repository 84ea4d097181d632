"""The training program from end to end: what it writes, that it repeats itself, that options count, how it fails."""

from __future__ import annotations

import csv
import functools
import math
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from models import checkpoint, data, options, train, trainer
from models.cifar_cnn import CNNClassifier, FusedCNNClassifier
from models.networks import Network

pytestmark = pytest.mark.gate("torch")

FILES = ["checkpoint.pt", "confusion.png", "curves.png", "history.csv"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(few_digits: None, tmp_path: Path) -> Callable[..., Path]:
    """Runs the command on few digits and returns where it wrote."""

    def go(*arguments: str, name: str = "out", status: int = 0) -> Path:
        out = tmp_path / "not" / "there" / name
        assert train.main(["--device", "cpu", "--batch-size", "16", "--out", str(out), *arguments]) == status
        return out

    return go


@pytest.fixture
def small(run: Callable[..., Path], no_pictures: None) -> Callable[..., Path]:
    """The same with a small network and without pictures: for tests that run the command several times."""
    return functools.partial(run, "--width", "4", "--image-size", "8")


def _history(out: Path) -> list[dict[str, str]]:
    with (out / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("model", ["fused", "plain"])
def test_one_epoch(run: Callable[..., Path], model: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("--epochs", "1", "--model", model, "--plot-gradients")
    assert sorted(os.listdir(out)) == sorted([*FILES, "gradients.png"])

    (row,) = _history(out)
    assert list(row) == ["epoch", "train_loss", "val_loss", "train_acc", "val_acc"]
    assert row["epoch"] == "1"
    assert all(math.isfinite(float(value)) for value in row.values())
    assert 0 <= float(row["train_acc"]) <= 1
    assert float(row["val_acc"]) * 16 % 1 == 0

    for name in ("curves", "confusion", "gradients"):
        with Image.open(out / f"{name}.png") as picture:
            picture.verify()

    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 1
    assert state["val_acc"] == float(row["val_acc"])
    for network in (CNNClassifier(), FusedCNNClassifier()):
        network.load_state_dict(state["model_state_dict"])
        optimizer = torch.optim.Adam(network.parameters())
        optimizer.load_state_dict(state["optimizer_state_dict"])
        assert optimizer.param_groups[0]["weight_decay"] == 1e-4

    printed, errors = capsys.readouterr()
    # torch tells of a CUDA toolkit without a GPU when it first compiles
    told = [line for line in errors.splitlines() if "No CUDA runtime is found" not in line]
    assert told == [], "no progress bar where there is no terminal"
    lines = printed.splitlines()
    assert f"{model} CNN of 698,794 parameters on cpu" in lines[0]
    assert "40 images to train on, 16 to validate" in lines[0]
    assert lines[1].startswith("epoch 1/1  train loss ")
    assert lines[1].endswith(" examples/s")
    assert lines[2].startswith(f"validation accuracy {float(row['val_acc']):.2%} (")
    assert lines[3].startswith("peak memory ")
    assert str(out) in lines[4]


def test_checkpoint_holds_the_weights_that_were_validated(small: Callable[..., Path]) -> None:
    out = small("--epochs", "2")
    state = checkpoint.load(out / "checkpoint.pt")
    chosen = options.parse(["--device", "cpu", "--batch-size", "16", "--image-size", "8"])
    parts = train.load(chosen)
    model = Network.from_dict(state["network"]).build(fused=False)
    model.load_state_dict(state["model_state_dict"])
    result = trainer.engine.validate(model, train.loaders(chosen, parts).val, torch.nn.CrossEntropyLoss(), "cpu")
    last = _history(out)[-1]
    assert result.accuracy == float(last["val_acc"])
    assert result.loss == pytest.approx(float(last["val_loss"]), rel=1e-4)


def test_learning_rate_of_each_step(small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps an epoch; the rate falls from step to step along a cosine."""
    rates = []
    original = trainer.engine.TrainingStep.__call__

    def spy(self: Any, *args: Any) -> Any:
        rates.append(self._optimizer.param_groups[0]["lr"])
        return original(self, *args)

    monkeypatch.setattr(trainer.engine.TrainingStep, "__call__", spy)
    small("--epochs", "2", "--lr", "0.002")
    assert rates == pytest.approx([0.001 * (1 + math.cos(math.pi * i / 6)) for i in range(6)])


@pytest.mark.parametrize("model", ["fused", "plain"])
def test_same_seed_same_bits(small: Callable[..., Path], model: str) -> None:
    arguments = ("--epochs", "2", "--model", model, "--flip", "--rotate", "10")
    first = small(*arguments, name="first")
    torch.rand(7)  # what was drawn before does not matter
    again = small(*arguments, name="again")
    other = small(*arguments, "--seed", "1", name="other")
    assert (first / "history.csv").read_bytes() == (again / "history.csv").read_bytes()
    weights = [checkpoint.load(out / "checkpoint.pt")["model_state_dict"] for out in (first, again, other)]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    assert not torch.equal(weights[2]["stage1.conv1.weight"], weights[0]["stage1.conv1.weight"])


COUNTS = [
    "--lr 0.01", "--weight-decay 0.5", "--batch-size 20", "--epochs 2", "--flip", "--rotate 20", "--image-size 16",
    "--drop-last", "--width 5", "--amp bf16", "--amp fp16", "--accumulate 2", "--optimizer adamw", "--optimizer sgd",
    "--schedule linear", "--schedule constant", "--warmup 0.5", "--label-smoothing 0.2", "--clip 0.01",
    "--recipe fast --epochs 1", "--seed 3", "--resize 12", "--mixup 0.5", "--cutmix 1", "--mixup 1 --cutmix 1",
    "--random-crop 0.3 --workers 0", "--augment trivial --workers 0", "--augment rand --workers 0",
    "--augment auto --workers 0",
]  # fmt: skip


def test_options_count(small: Callable[..., Path]) -> None:
    """Each option leaves other weights behind."""
    seen = {}
    for option in ["", *COUNTS, "--optimizer sgd --momentum 0.5", "--optimizer sgd --weight-decay 0.5"]:
        out = small("--epochs", "1", *option.split(), name=option.replace(" ", "_") or "usual")
        weights = checkpoint.load(out / "checkpoint.pt")["model_state_dict"]["classifier.fc1.weight"]
        seen[option] = weights.contiguous().numpy().tobytes()
    assert len(set(seen.values())) == len(seen), "two of them came to the same"


def test_loading_does_not_count(small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Data on the device or brought by a DataLoader: the same bits."""
    made = []
    original = torch.utils.data.DataLoader.__init__

    def spy(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(kwargs["num_workers"])
        original(self, *args, **kwargs)

    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", spy)
    weights = []
    for i, option in enumerate((["--loader", "device"], ["--loader", "workers", "--workers", "0"])):
        out = small("--epochs", "2", "--flip", *option, name=str(i))
        weights.append(checkpoint.load(out / "checkpoint.pt")["model_state_dict"]["classifier.fc1.weight"])
    assert torch.equal(*weights)
    assert made == [0, 0]


def test_compile(small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is compiled (here by the backend that compiles nothing) and its state_dict does not show it."""
    compiled = []
    original = torch.nn.Module.compile

    def spy(self: Any, *args: Any, **kwargs: Any) -> None:
        compiled.append(type(self).__name__)
        original(self, *args, **kwargs, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", spy)
    usual = small("--epochs", "1", "--model", "plain", name="usual")
    out = small("--epochs", "1", "--model", "plain", "--compile")
    assert compiled == ["CNNClassifier"]
    states = [checkpoint.load(path / "checkpoint.pt")["model_state_dict"] for path in (out, usual)]
    assert states[0].keys() == states[1].keys()


def test_backend_reaches_the_modules(small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import tkernels

    seen = set()
    original = FusedCNNClassifier.forward

    def spy(self: Any, images: torch.Tensor) -> torch.Tensor:
        seen.add(tkernels.get_backend())
        return original(self, images)

    monkeypatch.setattr(FusedCNNClassifier, "forward", spy)
    small("--epochs", "0", "--backend", "torch")
    assert seen == {"torch"}


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Synthetic rows and those of a CSV file are learnt, by either network."""
    rows, label = data.tensors(data.load("synthetic", Path(), 0).train)
    path = tmp_path / "some rows.csv"
    lines = [",".join([*(f"{v:.4f}" for v in row), "yes" if y else "no"]) for row, y in zip(rows.tolist(), label)]
    path.write_text("\n".join([",".join([*(f"x{i}" for i in range(10)), "positive"]), *lines]))
    for name, model in (("synthetic", "plain"), (f"csv:{path}", "fused")):
        out = tmp_path / model
        arguments = ["--data", name, "--model", model, "--epochs", "8", "--lr", "0.01", "--out", str(out)]
        assert train.main(["--device", "cpu", *arguments]) == 0
        assert float(_history(out)[-1]["val_acc"]) > 0.9
        assert f"{model} MLP of 2,850 parameters" in capsys.readouterr().out
    assert checkpoint.load(out / "checkpoint.pt")["network"]["classes"] == ["no", "yes"]
    assert train.main(["--data", f"csv:{path}", "--target", "y", "--out", str(out)]) == 2
    assert "has no column 'y'" in capsys.readouterr().err


def test_tensorboard(small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the writer, whether or not TensorBoard is there."""
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, directory: str) -> None:
            self.directory = directory

        def __enter__(self) -> Any:
            return self

        def add_scalar(self, name: str, value: float, epoch: int) -> None:
            written.append((name, value, epoch))

        def flush(self) -> None: ...

        def __exit__(self, *exc: object) -> None:
            written.append((self.directory, 0.0, 0))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(torch.utils, "tensorboard", module, raising=False)
    out = small("--epochs", "2", "--tensorboard")
    rows = _history(out)
    assert written[:-1] == [
        (f"{kind}/{split}", float(row[f"{split}_{kind[:4] if kind == 'loss' else 'acc'}"]), int(row["epoch"]))
        for row in rows
        for split in ("train", "val")
        for kind in ("loss", "accuracy")
    ]
    assert written[-1][0] == str(out / "tensorboard")


def test_tensorboard_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit):
        train.main(["--tensorboard", "--out", str(tmp_path)])
    assert "argument --tensorboard: TensorBoard is not installed: pip install tensorboard" in capsys.readouterr().err


def test_gradient_flow() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    model[0].weight.grad = torch.tensor([[1.0, -3.0, 2.0], [0.0, 0.0, 0.0]])
    assert trainer._gradient_flow(model) == {"0": (1.0, 3.0)}


def test_zero_epochs_validates_only(small: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = small("--epochs", "0")
    assert _history(out) == []
    state = checkpoint.load(out / "checkpoint.pt")
    torch.manual_seed(0)
    assert state["epoch"] == 0
    expected = CNNClassifier(width=4, image_size=8).classifier.fc3.weight
    assert torch.equal(state["model_state_dict"]["classifier.fc3.weight"], expected)
    assert "validation accuracy" in capsys.readouterr().out


def test_divergence_keeps_the_last_good_checkpoint(
    small: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, results = trainer.engine.Totals.result, []

    def diverges(self: Any) -> Any:
        results.append(original(self))  # of training and validation in turn
        return results[-1]._replace(loss=math.nan) if len(results) == 3 else results[-1]

    monkeypatch.setattr(trainer.engine.Totals, "result", diverges)
    out = small("--epochs", "3", status=1)
    error = capsys.readouterr().err
    assert error.startswith("python -m models.train: error: the loss is no longer finite after epoch 2: try a --lr")
    assert len(error.splitlines()) == 1
    assert [row["epoch"] for row in _history(out)] == ["1", "2"]
    assert checkpoint.load(out / "checkpoint.pt")["epoch"] == 1


def test_interrupted(
    small: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.engine, "train_epoch", interrupt)
    small("--epochs", "1", status=130)
    assert capsys.readouterr().err.splitlines() == ["python -m models.train: error: interrupted"]


def test_output_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert train.main(["--epochs", "1", "--out", str(tmp_path / "file" / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_full_disk(
    small: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    small("--epochs", "1", status=1)
    assert "No space left on device" in capsys.readouterr().err


def test_no_full_batch(small: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    small("--epochs", "1", "--batch-size", "64", "--drop-last", status=2)
    assert "no full batch of 64" in capsys.readouterr().err


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
    assert f"CIFAR10 is not in {tmp_path}, or damaged, and could not be downloaded" in line
    assert data.CIFAR10_URL in line


def test_the_command(tmp_path: Path) -> None:
    done = _command("--batch-size", "0", "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "python -m models.train: error: argument --batch-size: must be a whole number, from 1 to 2147483647, got '0'"
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("amp", ["fp16", "bf16"])
def test_a_dtype_the_device_is_slow_in(
    small: Callable[..., Path], amp: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line before training begins: fp16 without instructions for it takes many times as long as float32."""
    monkeypatch.setattr(train.hardware, "why_slow", lambda dtype, device: f"slow in {dtype} on {device}")
    small("--epochs", "0", "--amp", amp)
    dtype = {"fp16": "torch.float16", "bf16": "torch.bfloat16"}[amp]
    assert f"note: --amp: slow in {dtype} on cpu" in capsys.readouterr().out.splitlines()
    small("--epochs", "0")
    assert "note" not in capsys.readouterr().out
