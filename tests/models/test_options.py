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
    ("--data minst", "--data", "mnist"),
    ("--data folder:", "--data", "folder:DIR"),
    ("--data tests", "--data", "did you mean folder:tests?"),
    ("--data README.md", "--data", "did you mean csv:README.md?"),
    ("--strict", "--strict", "folder:DIR"),
    ("--resize 16 --image-size 32", "--resize", "--image-size 32"),
    ("--random-crop 1.5", "--random-crop", "'1.5'"),
    ("--random-crop 0.5 --loader device", "--loader", "workers"),
    ("--augment trivial --loader device", "--loader", "workers"),
    ("--augment some", "--augment", "trivial"),
    ("--mixup -1", "--mixup", ""),
    ("--mixup 0.2 --data synthetic", "--mixup", "images"),
    ("--random-crop 0.5 --data csv:x", "--random-crop", "images"),
    ("--model resnet18 --data csv:x", "--model", "images"),
    ("--model resnet19", "--model", "resnet18"),
    ("--no-fuse", "--fuse", "plain"),
    ("--fuse --model plain", "--fuse", "torchvision"),
    ("--pretrained", "--pretrained", "torchvision"),
    ("--classes 1", "--classes", "'1'"),
    ("--model resnet18 --compile", "--compile", "--no-fuse"),
    ("--model resnet18 --no-fuse --backend triton", "--backend", "fused"),
    ("--model big", "--model", "plain"),
    ("--backend cuda", "--backend", "triton"),
    ("--device nonsense", "--device", "'nonsense'"),
    ("--device meta", "--device", "'meta'"),
    ("--device cuda:99", "--device", "'cuda:99'"),
    ("--backend triton --device cpu", "--backend", "cpu"),
    ("--backend triton --model plain", "--backend", "--model fused"),
    ("--model attention --data synthetic", "--model", "images"),
    ("--data csv:", "--data", "csv:FILE"),
    ("--target x", "--target", "csv:FILE"),
    ("--categorical x y", "--categorical", "csv:FILE"),
    ("--val-fraction 1", "--val-fraction", "'1'"),
    ("--val-fraction 0", "--val-fraction", "'0'"),
    ("--image-size 7", "--image-size", "'7'"),
    ("--rotate -1", "--rotate", ""),
    ("--rotate 181", "--rotate", "'181'"),
    ("--width 0", "--width", "'0'"),
    ("--amp fp8", "--amp", "bf16"),
    ("--recipe slow", "--recipe", "fast"),
    ("--optimizer lion", "--optimizer", "adamw"),
    ("--schedule step", "--schedule", "cosine"),
    ("--warmup 1", "--warmup", "'1'"),
    ("--momentum 1", "--momentum", "'1'"),
    ("--label-smoothing 1", "--label-smoothing", "'1'"),
    ("--clip -1", "--clip", ""),
    ("--accumulate 0", "--accumulate", "'0'"),
    ("--workers -1", "--workers", ""),
    ("--loader fast", "--loader", "workers"),
    ("--cuda-graph --device cpu", "--cuda-graph", "needs a GPU"),
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
        "strict": False,
        "target": None,
        "categorical": (),
        "val_fraction": None,
        "loader": "auto",
        "workers": 2,
        "pin_memory": device == "cuda",
        "drop_last": False,
        "image_size": 32,
        "resize": 0,
        "random_crop": 0.0,
        "flip": False,
        "rotate": 0.0,
        "augment": "none",
        "mixup": 0.0,
        "cutmix": 0.0,
        "model": "fused",
        "pretrained": False,
        "classes": None,
        "fuse": True,
        "width": 32,
        "backend": tkernels.get_backend(),
        "device": torch.device(device),
        "amp": None,
        "compile": False,
        "cuda_graph": device == "cuda",
        "sync_bn": True,
        "recipe": "default",
        "epochs": 10,
        "batch_size": 32,
        "accumulate": 1,
        "optimizer": "adam",
        "lr": 1e-3,
        "schedule": "cosine",
        "warmup": 0.0,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "label_smoothing": 0.0,
        "clip": 0.0,
        "seed": 0,
        "out": Path("runs/digits"),
        "resume": False,
        "plot_gradients": False,
        "tensorboard": False,
    }


def test_everything_given() -> None:
    line = (
        "--data csv:d.csv --data-dir d --target t --categorical a b --val-fraction 0.3 --loader workers --workers 1"
        " --pin-memory --drop-last --image-size 9 --flip --rotate 5 --model plain --width 7 --backend torch"
        " --device cpu --amp bf16 --compile --no-cuda-graph --no-sync-bn --recipe fast --epochs 0 --batch-size 7"
        " --accumulate 2 --optimizer adamw --lr 0.5 --schedule constant --warmup 0.1 --momentum 0.2 --weight-decay 0"
        " --label-smoothing 0.3 --clip 4 --seed 9 --out o --resume --plot-gradients"
    )
    chosen = options.parse(line.split())
    assert dataclasses.astuple(chosen) == (
        *("csv:d.csv", Path("d"), False, "t", ("a", "b"), 0.3, "workers", 1, True, True, 9, 0, 0.0, True, 5.0, "none"),
        *(0.0, 0.0, "plain", False, None, False, 7, "torch"),
        *(torch.device("cpu"), torch.bfloat16, True, False, False, "fast", 0, 7, 2, "adamw", 0.5, "constant", 0.1, 0.2),
        *(0.0, 0.3, 4.0, 9, Path("o"), True, True, False),
    )


def test_everything_given_of_images() -> None:
    line = (
        "--data folder:d --strict --image-size 9 --resize 12 --random-crop 0.5 --augment rand --mixup 0.1 --cutmix 0.2"
        " --model resnet18 --no-fuse"
    )
    chosen = dataclasses.asdict(options.parse(line.split()))
    expected = {"data": "folder:d", "strict": True, "image_size": 9, "resize": 12, "random_crop": 0.5,
                "augment": "rand", "mixup": 0.1, "cutmix": 0.2, "model": "resnet18", "fuse": False}  # fmt: skip
    assert expected.items() <= chosen.items()


def test_settings_are_what_decides_the_result() -> None:
    first, other = options.parse([]), options.parse(["--lr", "0.01", "--out", "elsewhere", "--resume"])
    assert other.changed(first.settings()) == [("--lr", "0.001", "0.01")]


def test_defaults_that_depend_on_the_data() -> None:
    for name in ("cifar10", "cifar100"):
        chosen = options.parse(["--data", name])
        assert (chosen.epochs, chosen.batch_size, chosen.out) == (50, 128, Path("runs") / name)
        assert (chosen.flip, chosen.rotate) == (True, 10.0)
    for model, size in (("fused", 32), ("resnet18", 224)):
        chosen = options.parse(["--data", "folder:my/pictures/", "--model", model])
        assert (chosen.image_size, chosen.resize, chosen.out) == (size, size, Path("runs/pictures"))
        assert options.parse(["--model", model]).image_size == 32
    assert options.parse(["--data", "csv:some/rows.csv"]).out == Path("runs/rows")


def test_batches_that_processes_cannot_share(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = {"WORLD_SIZE": "3", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        options.parse(["--batch-size", "32"])
    assert "--batch-size: 32 examples cannot be shared by 3 processes" in capsys.readouterr().err
    assert options.parse(["--batch-size", "33"]).batch_size == 33


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        options.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    for field in dataclasses.fields(options.Options):
        assert f"--{field.name.replace('_', '-')}" in text
    assert text.count("default: ") == len(dataclasses.fields(options.Options))
