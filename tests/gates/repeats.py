"""A plan runs twice: for the call that made it, and once more as it runs for later calls, on the same tensors.

The second time gives the same bits, in results and in what is written to, so that what a test says of the first call's
values holds of later ones. On a GPU the first call's launches go through Triton, which compiles, and later ones do not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tkernels.core import plan

Tensors = tuple[Tensor | None, ...]


def run_plans_twice(
    patch: pytest.MonkeyPatch, launched: list[str], wanted: Callable[[Any], bool] = lambda body: True
) -> None:
    """Those that are made from here on of passes that are ``wanted``. Of ``launched`` only the first run counts."""
    original = plan.make

    def make(body: Callable[..., Tensors], tensors: Tensors, static: tuple[Any, ...]) -> plan.Plan:
        made = original(body, tensors, static)
        if wanted(body):
            made.run = functools.partial(_twice, made, launched)  # type: ignore[method-assign]
        return made

    patch.setattr(plan, "make", make)


def _twice(made: plan.Plan, launched: list[str], tensors: Tensors) -> Tensors:
    del made.run  # later calls are the plan's own
    given = _copies(tensors)
    results = made.run(tensors)
    first, count = _copies((*results, *tensors)), len(launched)
    for t, before, after in zip(tensors, given, first[len(results) :]):
        if t is not None and not _same(before, after):
            with torch.no_grad(), _disable_current_modes():
                t.data.copy_(before)
    second = _copies((*made.run(tensors), *tensors))
    del launched[count:]
    alike = [_same(a, b) for a, b in zip(first, second)]
    assert all(alike), f"a plan's second run gives other bits; alike are of its results, then its inputs: {alike}"
    return results


def _copies(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    with torch.no_grad(), _disable_current_modes():
        return [None if t is None else t.data.clone() for t in tensors]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """The same bits, NaN's too."""
    if a is None or b is None or not a.numel():
        return a is b or (a is not None and b is not None and a.shape == b.shape)
    with torch.no_grad(), _disable_current_modes():
        return torch.equal(*(t.cpu().reshape(-1).contiguous().view(torch.uint8) for t in (a, b)))
