"""Whether one tensor is as near to the truth as torch's, with room for what no rounding decides: kinks and ties."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# what torch's own error is multiplied by, and how many roundings are always allowed
TIMES, ROUNDINGS = 2.0, 8.0
# of changed inputs: how much more than they move the truth an error may be
NOISES = 3.0
# of torch's own error, where the truth is nothing beside it: a gradient of a bias that batch norm takes away again
OF_NOISE = 30.0
# Within so much of the largest number of a dtype, rounding decides what is infinite.
NEAR_THE_END = 0.9

Exact = Callable[[], "tuple[Tensor, Tensor] | None"]


def far(
    mine: Tensor, theirs: Tensor, exact: Exact, coarse: torch.dtype, flips: float = 0.0, terms: float = 0.0
) -> str | None:
    """What is wrong with ``mine``, None where nothing is.

    ``exact``: asked where the two differ by more than roundings: the float64 truth, and the truth of inputs changed by
    a rounding of ``coarse``, the coarsest dtype in the call. ``flips``: the relative norm of what a few values on the
    other side of a kink may come to. ``terms``: the size of what an element is a sum of, where that may cancel
    to nothing.
    """
    if mine.shape != theirs.shape:
        return f"shape {tuple(mine.shape)}, torch's {tuple(theirs.shape)}"
    mine, theirs = mine.detach(), theirs.detach()
    if mine.numel() == 0:
        return None
    if not (mine.is_floating_point() and theirs.is_floating_point()):
        equal = mine.dtype == theirs.dtype and torch.equal(mine, theirs)
        return None if equal or mine.is_complex() else "other values"
    a, t = mine.double(), theirs.double()
    wrong = _places(a, t)
    if wrong is not None:
        truth = exact()
        if truth is None or not (_at_the_end(a, t, truth[0], coarse) or _as_the_truth(a, truth[0], mine.dtype)):
            return wrong
    a, t = (torch.where(a.isfinite() & t.isfinite(), x, 0.0) for x in (a, t))
    eps = torch.finfo(coarse).eps
    gap, scale = (a - t).norm().item(), t.norm().item()
    # (a single wrong value hides among many)
    if gap <= ROUNDINGS * eps * scale and (a - t).abs().max().item() <= ROUNDINGS * eps * t.abs().max().item():
        return None
    truth = exact()
    if truth is None:
        return None if gap <= max(flips, 1e3 * eps) * scale else f"{gap / (scale or 1.0):.2e} from torch's, no float64"
    return _beyond(a, t, *truth, eps, flips, terms)


def _places(a: Tensor, t: Tensor) -> str | None:
    """NaN and infinities that are not where torch has them."""
    if not torch.equal(a.isnan(), t.isnan()):
        return f"NaN in {int(a.isnan().sum())} places, torch in {int(t.isnan().sum())}, of {a.numel()}"
    if not torch.equal(a.isinf() * a.sign().nan_to_num(), t.isinf() * t.sign().nan_to_num()):
        return f"Inf in {int(a.isinf().sum())} places, torch in {int(t.isinf().sum())}, of {a.numel()}"
    return None


def _at_the_end(a: Tensor, t: Tensor, truth: Tensor, coarse: torch.dtype) -> bool:
    """Whether both are only undecided about values at the end of a dtype's range."""
    if truth.shape != a.shape or not torch.equal(a.isnan(), t.isnan()):
        return False
    end = min(torch.finfo(coarse).max, torch.finfo(torch.float32).max) * NEAR_THE_END
    return bool((truth.double().abs()[a.isinf() != t.isinf()] >= end).all())


def _as_the_truth(a: Tensor, truth: Tensor, dtype: torch.dtype) -> bool:
    """Whether NaN and infinities are where float64's, rounded to ``dtype``, are. (torch's own may not be: on a CPU it
    sums float16 in float16, and oneDNN's GELU of infinity is NaN.)"""
    if truth.shape != a.shape:
        return False
    rounded = truth.to(dtype).double()
    end = torch.finfo(dtype).max * NEAR_THE_END
    undecided = a.isinf() ^ rounded.isinf()
    return torch.equal(a.isnan(), rounded.isnan()) and bool((truth.double().abs()[undecided] >= end).all())


def _beyond(a: Tensor, t: Tensor, x: Tensor, changed: Tensor, eps: float, flips: float, terms: float) -> str | None:
    if x.shape != a.shape:
        return None
    known = x.isfinite() & changed.isfinite() & a.isfinite() & t.isfinite()
    a, t, x, changed = (torch.where(known, v.detach().double(), 0.0) for v in (a, t, x, changed))
    ours, torchs, moved, scale = (v.norm().item() for v in (a - x, t - x, changed - x, x))
    scale += terms * a.numel() ** 0.5
    noise = scale < 1e-3 * torchs
    allowed = (OF_NOISE if noise else TIMES) * torchs + ROUNDINGS * eps * scale + NOISES * moved + flips * scale
    if ours > allowed + 1e-300:
        return f"error {ours:.2e}, torch's {torchs:.2e}, of {scale:.2e} (relative norms allow {allowed:.2e})"
    if flips or noise:
        return None
    ours, torchs, moved, scale = (v.abs().max().item() for v in (a - x, t - x, changed - x, x))
    scale += terms
    allowed = TIMES * torchs + ROUNDINGS * eps * scale + 2 * NOISES * moved
    if ours > allowed + 1e-300:
        return f"largest error {ours:.2e}, torch's {torchs:.2e}, of {scale:.2e} (allowed {allowed:.2e})"
    return None
