"""The same values in every layout a user's tensor may have."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "offset", "sliced", "stepped", "transposed", "channels_last", "expanded")
# What surrounds a view in its storage: a read outside the view must show.
OUTSIDE = float("nan")


def laid_out(values: Tensor, layout: str) -> Tensor:
    """``values`` (any rank) as a view of ``layout``; 'expanded' keeps the first slice of a dimension, with stride 0.

    A rank that cannot have the layout gives the contiguous tensor.
    """
    rank = values.dim()
    if layout == "expanded" and rank:
        return expanded(values, dim=0)
    if layout == "channels_last" and rank == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "channels_last" and rank == 5:
        return values.contiguous(memory_format=torch.channels_last_3d)
    if layout in ("transposed", "channels_last") and rank > 1:
        return values.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "offset":
        return _inside(values, [(0, 0)] * rank, lead=3)
    if layout == "sliced" and rank:
        return _inside(values, [(1, 2)] * rank)
    if layout == "stepped" and rank:
        room = torch.full((*values.shape[:-1], 2 * values.shape[-1]), _outside(values.dtype), dtype=values.dtype)
        view = room[..., ::2]
        view.copy_(values)
        return view
    return values.contiguous()


def expanded(values: Tensor, dim: int) -> Tensor:
    """The first slice along ``dim``, repeated with stride 0."""
    if not values.numel():
        return values.contiguous()
    return values.narrow(dim, 0, 1).contiguous().expand(values.shape)


def _outside(dtype: torch.dtype) -> float | int:
    return OUTSIDE if dtype.is_floating_point else 99


def _inside(values: Tensor, margins: list[tuple[int, int]], lead: int = 0) -> Tensor:
    """A copy of ``values`` as a window of a larger tensor, ``lead`` elements into its storage."""
    shape = [before + size + after for size, (before, after) in zip(values.shape, margins)]
    room = torch.full((lead + int(torch.Size(shape).numel()),), _outside(values.dtype), dtype=values.dtype)
    view = room[lead:].view(shape)
    for dim, (size, (before, _)) in enumerate(zip(values.shape, margins)):
        view = view.narrow(dim, before, size)
    view.copy_(values)
    return view
