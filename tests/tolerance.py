"""Tolerances from the dtype and the reduction length, and the comparison with float64 every test uses."""

from __future__ import annotations

import torch
from torch import Tensor


def bound(dtype: torch.dtype, reduction: int = 1, accumulate: torch.dtype = torch.float32) -> float:
    """Error allowed relative to the largest magnitude: 4 roundings to ``dtype`` plus a random walk of
    ``reduction`` roundings in the accumulator (10 eps sqrt(K), twice what a standard deviation gives)."""
    accumulator = torch.float64 if dtype == torch.float64 else accumulate
    return 4 * torch.finfo(dtype).eps + 10 * torch.finfo(accumulator).eps * max(reduction, 1) ** 0.5


def assert_close(
    actual: Tensor,
    reference: Tensor,
    reduction: int = 1,
    *,
    dtype: torch.dtype | None = None,
    accumulate: torch.dtype = torch.float32,
    scale: float | None = None,
    name: str = "value",
) -> None:
    """Assert that ``actual`` equals the float64 ``reference`` to the bound of its dtype and reduction length.

    ``reduction``: how many terms were summed into an element. ``dtype``: the precision that bounds the error where it
    is not that of ``actual`` (a float32 gradient of a bf16 product). ``scale``: the magnitude errors are relative to,
    where the result itself may cancel (default: its largest absolute value). NaN and Inf must stand in the same places.
    """
    assert actual.shape == reference.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    if actual.numel() == 0:
        return
    a, r = actual.detach().cpu().double(), reference.detach().cpu().double()
    finite = torch.isfinite(r)
    assert torch.equal(torch.isnan(a), torch.isnan(r)), f"{name}: NaN in other places than the reference"
    assert torch.equal(a[torch.isinf(r)], r[torch.isinf(r)]), f"{name}: Inf in other places than the reference"
    if not finite.any():
        return
    error = (a - r)[finite].abs()
    magnitude = max(r[finite].abs().max().item(), scale or 0.0)
    allowed = bound(dtype or actual.dtype, reduction, accumulate) * magnitude
    worst = error.max().item()
    assert worst <= allowed, f"{name}: error {worst:.3e} over the bound {allowed:.3e} (magnitude {magnitude:.3e})"
