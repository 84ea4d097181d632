"""A pass whose second run is another than its first is found, and one that writes to its input is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gates import repeats
from tkernels.core import plan

pytestmark = pytest.mark.gate("torch")


def passed(step: Any, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """What a pass of this one step gives for [NaN, 0, 1] and writes."""
    repeats.run_plans_twice(monkeypatch, [])
    x = torch.tensor([float("nan"), 0, 1])
    (y,) = plan.Planned(lambda tensors: (tensors[0].planner.call(step, tensors[0]),))((x,))
    return torch.stack((y, x))


def test_other_bits_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter(range(9))
    with pytest.raises(AssertionError, match=r"other bits.*\[False, True\]"):
        passed(lambda x: x + next(runs), monkeypatch)


def test_written_inputs_are_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return x.add_(1).clone()

    assert torch.equal(passed(step, monkeypatch)[:, 1:], torch.tensor([[1.0, 2], [1, 2]]))


def test_later_calls_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def step(x: torch.Tensor) -> torch.Tensor:
        runs.append(0)
        return x + 1

    repeats.run_plans_twice(monkeypatch, [])
    body = plan.Planned(lambda tensors: (tensors[0].planner.call(step, tensors[0]),))
    x = torch.zeros(3)
    counts = [len(runs) for _ in range(3) if body((x,))]
    assert counts == [3, 4, 5]  # one of them on slots
