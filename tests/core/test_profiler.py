"""Launches in a profiler's trace."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import tkernels.functional as F

pytestmark = pytest.mark.gate("interp", "cuda")


def test_launches_carry_the_operators_name(device: str, launches: list[str]) -> None:
    x, w = torch.randn(4, 8, device=device), torch.randn(6, 8, device=device, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        F.cross_entropy(F.linear(x, w, None, "relu"), torch.zeros(4, dtype=torch.int64, device=device)).backward()
    names = {event.key for event in trace.key_averages() if event.key.startswith("tkernels::")}
    assert {name.partition(".")[2] for name in names} == {*launches}
    assert {name.partition(".")[0] for name in names} == {"tkernels::linear", "tkernels::cross_entropy"}
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        pass
    assert not any(event.key.startswith("tkernels::") for event in trace.key_averages())
