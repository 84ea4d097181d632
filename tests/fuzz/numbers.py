"""Whether one tensor is as near to the truth as torch's, with room for what no rounding decides: kinks and ties."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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

# Draws of one call that must tell errors, and how many times torch's the median and the upper quartile may be.
ENOUGH = 10
AS_DISTRIBUTED = ((0.5, 1.5), (0.75, 2.0))

Exact = Callable[[], "tuple[Tensor, Tensor] | None"]


class Ways(NamedTuple):
    """What else is known of a result. ``others``: the same by other ways of torch's own. ``sizes``: what the magnitudes
    of each element's terms come to, None where that is not known."""

    others: Callable[[], list[Tensor]] = list
    sizes: Callable[[], Tensor | None] = lambda: None


ALONE = Ways()


def far(
    mine: Tensor, theirs: Tensor, exact: Exact, coarse: torch.dtype, flips: float = 0.0, terms: float = 0.0,
    ways: Ways = ALONE,
) -> str | None:  # fmt: skip
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
    differ = _kind(a) != _kind(t)
    if bool(differ.any()) and bool((differ & ~_accounted(a, t, exact, mine.dtype, coarse, ways)).any()):
        return _places(a, t)
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


def _kind(t: Tensor) -> Tensor:
    """0: finite, 1 and -1: infinite, 2: NaN."""
    return torch.where(t.isnan(), 2.0, torch.where(t.isinf(), t.sign(), 0.0))


def _places(a: Tensor, t: Tensor) -> str:
    """NaN or infinities that are not where torch has them."""
    name, of = ("NaN", torch.isnan) if not torch.equal(a.isnan(), t.isnan()) else ("Inf", torch.isinf)
    return f"{name} in {int(of(a).sum())} places, torch in {int(of(t).sum())}, of {a.numel()}"


def _accounted(a: Tensor, t: Tensor, exact: Exact, dtype: torch.dtype, coarse: torch.dtype, ways: Ways) -> Tensor:
    """Where ``a`` is finite, infinite or NaN for a reason, though torch is not the same.

    As the truth rounded to ``dtype`` is. (torch's own may not be: on a CPU it sums float16 in float16, and oneDNN's
    GELU of infinity is NaN.) Where the truth is at the end of the range of ``coarse``, and one side past it. As another
    way of torch's. Where parts of a sum pass the range, so that its order decides.
    """
    found = torch.zeros_like(a, dtype=torch.bool)
    for other in ways.others():
        found |= _kind(a) == _kind(other.double())
    end = min(torch.finfo(coarse).max, torch.finfo(torch.float32).max) * NEAR_THE_END
    sizes = ways.sizes()
    if sizes is not None and sizes.shape == a.shape:
        found |= sizes.double() >= end
    truth = exact()
    if truth is None or truth[0].shape != a.shape:
        return found
    x = truth[0].double()
    rounded, own_end = x.to(dtype).double(), torch.finfo(dtype).max * NEAR_THE_END
    found |= (_kind(a) == _kind(rounded)) | ((a.isinf() ^ rounded.isinf()) & ~a.isnan() & (x.abs() >= own_end))
    return found | ((a.isinf() ^ t.isinf()) & ~a.isnan() & ~t.isnan() & (x.abs() >= end))


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


def errors(mine: Tensor, theirs: Tensor, exact: Exact, ways: Ways = ALONE) -> tuple[float, float, float, float] | None:
    """Our error and torch's (the largest of its ways) in the norm, and the same of the largest element; None where no
    float64 tells them."""
    truth = exact()
    if truth is None or truth[0].shape != mine.shape or not mine.is_floating_point() or not mine.numel():
        return None
    x, sides = truth[0].detach().double(), [t.detach().double() for t in (mine, theirs, *ways.others())]
    known = x.isfinite()
    for t in sides:
        known = known & t.isfinite()
    off = [torch.where(known, t - x, 0.0) for t in sides]
    norms, largest = ([f(t) for t in off] for f in (lambda t: t.norm().item(), lambda t: t.abs().max().item()))
    return norms[0], max(norms[1:]), largest[0], max(largest[1:])


def by_chance(found: list[tuple[float, float, float, float]]) -> bool:
    """Whether errors of many draws of one call (see ``errors``) are distributed as torch's are, up to what so few draws
    tell: then one that is larger is so by chance."""
    if len(found) < ENOUGH:
        return False
    table = torch.tensor(found, dtype=torch.float64)
    for share, times in AS_DISTRIBUTED:
        ours, torchs, ours_largest, torchs_largest = table.quantile(share, 0).tolist()
        if ours > times * torchs or ours_largest > times * torchs_largest:
            return False
    return True
