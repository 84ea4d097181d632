"""What the static reports compile: one file an operator, each with cases() at the shapes of real networks. Here is what
they are made of: tensors on a GPU that is not there, of batch 256 and NHWC where nothing else is said."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perf.static.aot import Case
from tkernels.core.geometry import Geometry

BATCH = 256
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def case(name: str, run: Callable[..., object], *args: Any, product: bool = False, **options: Any) -> Case:
    """A case that calls ``run`` with these arguments."""
    return Case(name, functools.partial(run, *args, **options), product)


def tf32(run: Callable[..., object], *args: Any) -> None:
    """Call ``run`` with torch's switch for TF32 products on."""
    switch = torch.backends.cuda.matmul
    before, switch.fp32_precision = switch.fp32_precision, "tf32"
    try:
        run(*args)
    finally:
        switch.fp32_precision = before


def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, device="cuda", dtype=dtype)


def whole() -> Tensor:
    """A number on the GPU: dropout's seed, a counter of batches."""
    return empty(dtype=torch.int64)


def image(channels: int, size: int, dtype: torch.dtype, channels_last: bool = True) -> Tensor:
    if channels_last:
        return empty(BATCH, size, size, channels, dtype=dtype).permute(0, 3, 1, 2)
    return empty(BATCH, channels, size, size, dtype=dtype)


def window(c_in: int, c_out: int, size: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> Geometry:
    """A convolution of a square image, padded by half a window."""
    pad = kernel // 2
    out = (size + 2 * pad - kernel) // stride + 1
    return Geometry(c_in, c_out, groups, size, size, kernel, kernel, stride, stride, pad, pad, 1, 1, out, out)


def label(g: Geometry, dtype: str) -> str:
    """How a convolution is called in the names of cases."""
    return f"{g.in_channels}-{g.out_channels}@{g.height} {dtype}"
