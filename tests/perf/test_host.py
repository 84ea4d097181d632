"""python -m perf host: what it prints and what it refuses."""

from __future__ import annotations

import cProfile

import pytest
import torch

from perf.static import host, traffic
from tests.perf.command import refused, run

pytestmark = pytest.mark.gate("torch")


def test_it_prints_a_row_for_each_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("host", "--batch", "2", "--steps", "1") == 0
    printed = capsys.readouterr().out
    for name in ("tkernels ", "JITFunction.run", "torch.nn"):
        assert name in printed


def test_every_launch_of_the_step_is_counted() -> None:
    frame = host.measure(256, 1)
    assert frame.calls["tkernels"] == 55
    assert (frame["us a call"] > 0).all()


def test_calls_between_launches_stay_few() -> None:
    """Python and C functions called in a step of 52 launches, in place of the time they take: 31 a launch. (Three of
    them look at strides of what is saved, before and after: hooks may give it back laid out otherwise.)"""
    with host.stubbed_driver(lambda *given: None):
        step = host.step(*traffic.fused(), 8)
        for _ in range(host.WARM_UP):
            step()
        profile = cProfile.Profile()
        profile.runcall(step)
    calls = sum(entry.callcount for entry in profile.getstats())
    # before torch 2.14 each autograd function runs through Python of torch's own; Triton 3.6's stub has a call more
    most = 1_625 if tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 14) else 1_850
    assert calls < most


def test_no_step_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--batch must be at least 2" in refused(capsys, "host", "--batch", "1")
