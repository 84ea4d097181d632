"""What a stranger reads on standard error: our own lines and nothing of torch's or Triton's that is nobody's to mend.

The machine has CUDA's compiler and no GPU, as one on which people build and do not run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tkernels
import tkernels.functional as F
import tkernels.nn as tnn

pytestmark = pytest.mark.gate("torch")

TINY = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 5))
"""
# "tkernels compiles its passes": those who run the tests first have no cache yet
OURS = ("tkernels compiles its passes",)


def said(folder: Path, *command: str, **environment: str) -> str:
    """What a command prints, after a look at its standard error: nothing but lines of ours."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    root = Path(__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=600, cwd=folder,
        env={**inherited, "CUDA_HOME": str(folder), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{root}:{folder}",
             **environment},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert [line for line in ran.stderr.splitlines() if not line.startswith(OURS)] == []
    return ran.stdout


@pytest.mark.parametrize("environment", [
    {}, {"TKERNELS_BACKEND": "triton"}, {"TKERNELS_BACKEND": "triton", "TRITON_INTERPRET": "1"},
], ids=lambda given: "+".join(given) or "default")  # fmt: skip
def test_report(environment: dict[str, str], tmp_path: Path) -> None:
    assert "CUDA available" in said(tmp_path, "-m", "tkernels", **environment)


def test_training_prediction_export(tmp_path: Path) -> None:
    few = ("--data", "digits", "--width", "4", "--epochs", "1", "--out", "run")
    assert "wrote checkpoint.pt" in said(tmp_path, "-m", "models.train", *few)
    answer = said(tmp_path, "-m", "models.predict", "run/checkpoint.pt", "run/curves.png", "--export", "net.pt2")
    assert answer.startswith("wrote net.pt2\nrun/curves.png: ")
    assert said(tmp_path, "-m", "models.train", "--help")


@pytest.mark.extended("torch")
def test_training_by_torch_compile(tmp_path: Path) -> None:
    few = ("--data", "digits", "--width", "4", "--epochs", "1", "--model", "plain", "--compile")
    assert "wrote checkpoint.pt" in said(tmp_path, "-m", "models.train", *few)


def test_measuring(tmp_path: Path) -> None:
    """torch.compile first, in the process that measures; the profiler."""
    (tmp_path / "own.py").write_text(TINY)
    few = ("--size", "16", "--batch", "2", "--rounds", "2", "--seconds", "1", "--mode", "infer")
    assert "chains fused" in said(tmp_path, "-m", "perf", "model", "own:build", *few)
    few = ("--op", "linear", "--shapes", "N=64 C=32 K=64", "--dtype", "fp32", "--mode", "fwd", "--quick")
    providers = ("--provider", "torch.compile", "tkernels")
    assert "linear" in said(tmp_path, "-m", "perf", "sweep", *few, "--device", "cpu", *providers)


def test_fuzzing(tmp_path: Path) -> None:
    assert "0 failures" in said(tmp_path, "-m", "tests.fuzz", "--draws", "3", "--op", "batch_norm,linear")


def test_lightning_is_quiet(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="install the ecosystem group")
    said(tmp_path, "-c", "from models.examples import lightning; lightning.main(1)")


X, IMAGES, WEIGHT = torch.ones(4, 8), torch.ones(2, 3, 8, 8), torch.ones(5, 3, 3, 3)
LABELS = torch.tensor([0, 1, 2, 3])
# what people do most, and what each message names: the argument, what was given, what is allowed
MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "features": (lambda: tnn.Linear(7, 5)(X), RuntimeError, "input must be in_features = 7, got input [4, 8]"),
    "channels": (lambda: F.conv2d(IMAGES, WEIGHT[:, :2]), RuntimeError, "[2, 3, 8, 8] to have 2 channels, but got 3"),
    "dtypes": (lambda: F.linear(X, X.double()), RuntimeError, "input is torch.float32, weight is torch.float64"),
    "labels out of range": (lambda: F.cross_entropy(X[:, :3], LABELS), IndexError, "must hold classes from 0 to 2"),
    "labels of floats": (
        lambda: F.cross_entropy(X, LABELS.float()), RuntimeError, "target must have dtype int64 for class indices",
    ),
    "fuse() of a function": (
        lambda: tkernels.fuse(torch.relu), TypeError, "model must be a torch.nn.Module, got builtin_function",
    ),
    "fuse() of a class": (
        lambda: tkernels.fuse(tnn.Linear), TypeError, "model must be a torch.nn.Module, got type",
    ),
    "activation": (
        lambda: tnn.Linear(8, 5, activation="swish"), ValueError, "activation must be one of .*, got 'swish'",
    ),
    "backend": (lambda: tkernels.backend("cuda"), ValueError, "backend must be one of 'auto', .*, got 'cuda'"),
    "channels of a stage": (lambda: tnn.ConvStage(3), TypeError, "channels must be a sequence of ints, got int"),
    "no batch": (lambda: F.batch_norm(X[:1], None, None, training=True), ValueError, "more than 1 value per channel"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str) -> None:
    call, kind, says = MISTAKES[mistake]
    with pytest.raises(kind) as raised:
        call()
    assert type(raised.value) is kind
    assert re.search(says if ".*" in says else re.escape(says), str(raised.value))
