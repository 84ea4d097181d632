"""Run ``python -m perf`` inside the test's process, and sweep rows to test with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from perf import __main__ as perf
from perf import schema
from perf.schema import Measurement

ROOT = Path(__file__).parent.parent.parent


def run(*arguments: object) -> int:
    """The exit status of a command."""
    try:
        return perf.main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        return int(stopped.code or 0)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command refuses its input."""
    capsys.readouterr()
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    lines = shown.err.strip().splitlines()
    assert len(lines) == 1, shown.err
    assert not shown.out
    assert lines[0].startswith("python -m perf")
    return lines[0]


def environment() -> dict[str, str]:
    """For commands in processes of their own: one thread, and this checkout's modules."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def module(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> str:
    """A module that this process and those it starts can import."""
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    for variable, value in environment().items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
    return name


def row(**given: Any) -> Measurement:
    """A complete row of a sweep."""
    shape = dict(N=256, C=32, H=32, W=32, K=32, R=3, S=3, stride=1, padding=1, groups=1)  # noqa: C408
    names = dict(device="GPU", operator="conv2d", mode="fwd", dtype="bf16", layout="nhwc", provider="tkernels")  # noqa: C408
    times = dict(timing="wall", ms_p20=0.99, ms_p50=1.0, ms_p80=1.01, tflops=1.0, gbps=100.0, bytes=1e8, flops=1e9)  # noqa: C408
    peaks = {"roofline_pct": 50.0, "peak_tflops": 2.0, "peak_gbps": 200.0, "speedup_vs_torch": 1.0}
    errors = {"status": "ok", "err_fp64": 1e-3, "torch_err_fp64": 1e-3}
    return Measurement(**{**shape, **names, **times, **peaks, **errors, **given})


def write(path: Path, *rows: Measurement) -> Path:
    """A sweep's CSV of these rows."""
    writer = schema.Writer(path)
    for given in rows:
        writer.append(given)
    writer.close()
    return path
