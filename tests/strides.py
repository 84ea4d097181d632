"""The same values in other strides, for operators' own tests. (tests/conformance/layouts.py: for all of them alike.)"""

from __future__ import annotations

import torch
from torch import Tensor

OUTSIDE = 1e4  # what lies around a view in its memory: a read outside the view must show


def arrange(t: Tensor, layout: str) -> Tensor:
    """The same values (the first row's, if expanded) laid out otherwise. Raises ValueError for a layout that there is
    not."""
    if layout == "contiguous":
        return t
    if layout == "transposed":
        return t.mT.contiguous().mT
    if layout == "heads":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "permuted":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "packed":
        return torch.cat([t, torch.full_like(t, OUTSIDE)], -1)[..., : t.shape[-1]]
    if layout == "sliced":
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + 3), OUTSIDE)
        wide[..., 1:-2] = t
        return wide[..., 1:-2]
    if layout == "strided":
        return torch.stack([t, torch.full_like(t, OUTSIDE)], -1)[..., 0]
    if layout == "expanded":
        return t[:1].expand(t.shape)
    if layout == "offset":
        return torch.cat([torch.full_like(t, OUTSIDE)[:1], t])[1:]
    raise ValueError(f"there is no layout {layout!r}")
