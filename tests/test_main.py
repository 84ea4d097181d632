"""python -m tkernels: the environment report."""

from __future__ import annotations

import pytest
import torch

import tkernels
from tkernels.__main__ import main
from tkernels.core import settings

pytestmark = pytest.mark.gate("torch")


def test_report_says_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert tkernels.__version__ in text
    for name in ("linear", "conv2d", "batch_norm", "conv_stage", "cross_entropy"):
        line = next(line for line in text.splitlines() if line.split()[:1] == [name])
        assert "PyTorch: a tensor is on cpu, not on a GPU" in line


def test_report_names_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with tkernels.backend("torch"):
        main(["--dtype", "bfloat16"])
    assert "backend 'torch' was asked for" in capsys.readouterr().out
    with tkernels.backend("triton"):
        main([])
    assert "a call fails: RuntimeError: backend 'triton' was asked for" in capsys.readouterr().out
    main(["--dtype", "float64", "--device", "cpu"])
    assert "float64 is left to PyTorch" in capsys.readouterr().out


def test_report_shows_the_settings(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TKERNELS_COMPILE", "off")
    monkeypatch.setenv("TKERNELS_AUTOTUNE", "")
    monkeypatch.setenv("TKERNELS_BACKND", "torch")
    main([])
    lines = capsys.readouterr().out.splitlines()
    for setting in settings.SETTINGS:
        assert any(line.split()[:1] == [setting.name] and line.endswith(setting.meaning) for line in lines)
    said = {line.split()[0]: line.split(None, 1)[1] for line in lines if line.startswith("  T")}
    assert said["TKERNELS_COMPILE"].startswith("off: ")
    assert said["TKERNELS_AUTOTUNE"].startswith("0 (default): "), "empty is not set"
    assert said["TKERNELS_BACKND"] == "torch", "a misspelt one is seen"
