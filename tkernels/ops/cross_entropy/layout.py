"""Logits and what has their shape, seen as [outer, inner, classes] without a copy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tkernels.core.config import Config, cdiv
from tkernels.core.targets import Target
from tkernels.ops.cross_entropy import config as tuning


class Layout(NamedTuple):
    """Tensors of one shape seen as [outer, inner, classes]: sizes, and for each tensor its three strides."""

    outer: int
    inner: int
    n_classes: int
    strides: list[tuple[int, int, int]]

    @property
    def n_rows(self) -> int:
        return self.outer * self.inner

    @property
    def classes_contiguous(self) -> bool:
        """Whether a row's classes, rather than neighbouring rows, are close together in the first tensor."""
        _, inner, classes = self.strides[0]
        return inner == 0 or classes <= inner

    @property
    def inner_unit(self) -> int:
        """8 where the compiler may know that the inner size is a multiple of it, for wide loads along the rows."""
        return 8 if not self.classes_contiguous and self.inner % 8 == 0 else 1

    def config(self, target: Target) -> Config:
        inner = self.inner if self.outer > 1 else 0  # else it is the batch's
        return tuning.rows(self.n_classes, inner, self.classes_contiguous, target)

    def tiles(self, config: Config) -> int:
        return self.outer * cdiv(self.inner, config["BLOCK_ROWS"])

    def ends(self, itemsize: int) -> int:
        """Elements of a 16-byte word where rows start off its boundaries but all tensors do so alike, else 0."""
        first = self.strides[0]
        alike = first[2] == 1 and all(strides == first for strides in self.strides)
        if (
            not alike
            or self.n_classes < tuning.ENDS_FROM
            or not (self.n_classes % 16 or first[0] % 16 or first[1] % 16)
        ):
            return 0
        return 16 // itemsize


def strides_of(t: Tensor) -> tuple[int, int, int] | None:
    """Strides of the batch, of the dimensions after the classes taken as one, and of the classes; None where these
    do not merge into one."""
    strides = t.stride()
    if t.dim() <= 2:
        return (strides[0], 0, strides[1]) if t.dim() == 2 else (0, 0, strides[0])
    inner, extent = 0, 1
    for size, stride in zip(reversed(t.shape[2:]), reversed(strides[2:])):
        if size == 1:
            continue
        if extent == 1:
            inner = stride
        elif stride != inner * extent:
            return None
        extent *= size
    return strides[0], inner, strides[1]


def readable(t: Tensor) -> Tensor:
    """``t`` where the kernels can read it in place, else a contiguous copy (a picture cut in height and width)."""
    return t if strides_of(t) is not None else t.contiguous()


def like(t: Tensor) -> Tensor:
    """An output in the layout of ``t`` where that is dense, else one the kernels can write."""
    out = torch.empty_like(t)
    return out if strides_of(out) is not None else t.new_empty(t.shape)


def layout_of(*tensors: Tensor) -> Layout:
    shape = tensors[0].shape
    outer, n_classes = (shape[0], shape[1]) if len(shape) > 1 else (1, shape[0])
    inner = math.prod(shape[2:])
    strides = []
    for t in tensors:
        found = strides_of(t)
        if found is None:
            raise RuntimeError(f"strides {t.stride()} cannot be read in place")
        strides.append(found)
    if inner == 1:
        outer, inner, strides = 1, outer, [(0, o, c) for o, _, c in strides]
    elif outer == 1 or all(o == inner * i for o, i, _ in strides):
        outer, inner, strides = 1, outer * inner, [(0, i, c) for _, i, c in strides]
    if n_classes == 1:
        strides = [(o, i, 1) for o, i, _ in strides]
    return Layout(outer, inner, n_classes, strides)
