"""python -m perf host: what it prints and what it refuses."""

from __future__ import annotations

import pytest

from perf import host
from tests.perf.command import refused, run

pytestmark = pytest.mark.gate("torch")


def test_it_prints_a_row_for_each_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("host", "--batch", "2", "--steps", "1") == 0
    printed = capsys.readouterr().out
    for name in ("JITFunction.run", "TKERNELS_FAST_LAUNCH=1", "torch.nn"):
        assert name in printed


def test_every_launch_of_the_step_is_counted() -> None:
    frame = host.measure(256, 1)
    assert (frame.calls.iloc[:2] == 59).all()
    assert (frame["us a call"] > 0).all()


def test_no_step_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--batch must be at least 2" in refused(capsys, "host", "--batch", "1")
