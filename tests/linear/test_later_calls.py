"""In an operator's folder a pass's first plan runs once more, as later calls run it (tests/gates/repeats.py)."""

from __future__ import annotations

import pytest
import torch

from tkernels.core import plan
from tkernels.functional import linear

pytestmark = pytest.mark.gate("ttsem", "cuda")


def test_the_first_plan_of_a_pass_runs_twice(device: str, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[plan.Plan] = []
    original = plan.Plan.run_on

    def run_on(self: plan.Plan, values: list[object]) -> None:
        runs.append(self)
        original(self, values)

    monkeypatch.setattr(plan.Plan, "run_on", run_on)
    counts = []
    for _ in range(3):
        linear(torch.randn(5, 7, device=device), torch.randn(6, 7, device=device))
        counts.append(len(runs))
    assert counts == [2, 3, 4]
    assert launches == ["linear_forward_kernel"] * 3
