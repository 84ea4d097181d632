"""Who computes the products of linear layers and of matrices under backend 'auto', each pass for itself: large ones are
cuBLAS's. Under 'triton' all are ours."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from tkernels.core.records import OURS, Route
from tkernels.core.targets import Target


class Shares(NamedTuple):
    """Of the peak rate of 16-bit arithmetic, what large products reach. ``source``: where the figures are from."""

    source: str
    forward: float
    dgrad: float
    wgrad: float
    matmul: float
    pytorch: float


SHARES = {
    # 4096 x 4096 x 4096 in bfloat16
    "sm_90": Shares("measured: perf/results/h100-2026-11-27", 0.58, 0.38, 0.52, 0.55, 0.78),
    "sm_100": Shares("estimated", 0.4, 0.3, 0.4, 0.4, 0.75),
}
OTHERS = Shares("estimated", 0.65, 0.55, 0.6, 0.65, 0.75)
# Milliseconds below which launches and the last wave decide
SHORT = 0.03
# Rows where a trace has a symbol for them
MANY = 4096
# The gradient behind an activation or dropout is formed in a pass of its own where it has so many elements, and each
# would be formed so many times by tiles along the product's other side.
LARGE_GRADIENT = 1 << 21
MANY_TIMES = 8


def shares(target: Target) -> Shares:
    """A target's row of the table."""
    return SHARES.get(target.name, OTHERS)


@functools.lru_cache(maxsize=4096)
def of_linear(m: int, n: int, k: int, dtype: torch.dtype, precision: str, fused: bool, target: Target) -> Route:
    """Of y[m, n] = x[m, k] @ w[n, k]^T. ``fused``: an activation or dropout, a pass over PyTorch's result."""
    if not cublas_competes(dtype, precision, target):
        return OURS
    found, rate = shares(target), target.gbps * 1e6
    extra = 2 * m * n * dtype.itemsize / rate if fused else 0.0
    own = (found.forward, found.dgrad, found.wgrad)
    theirs = _milliseconds(found.pytorch, m, n, k, dtype, target)
    return Route(*[
        (ours := _milliseconds(share, m, n, k, dtype, target)) > SHORT and theirs + (extra if first else 0.0) < ours
        for share, first in zip(own, (True, False, False))
    ])  # fmt: skip


@functools.lru_cache(maxsize=4096)
def of_matmul(m: int, n: int, k: int, dtype: torch.dtype, precision: str, target: Target) -> bool:
    """Whether PyTorch computes a[m, k] @ b[k, n]. ``m``: of all products of a batch together."""
    if not cublas_competes(dtype, precision, target):
        return False
    found = shares(target)
    ours, theirs = (_milliseconds(share, m, n, k, dtype, target) for share in (found.matmul, found.pytorch))
    return ours > SHORT and theirs < ours


def forms_gradient(m: int, n: int, k: int) -> bool:
    """Whether dz, the gradient [m, n] behind what is fused, is formed once, before products with k on their other
    side."""
    return m * n >= LARGE_GRADIENT and k >= MANY_TIMES * 128


def cublas_competes(dtype: torch.dtype, precision: str, target: Target) -> bool:
    """At what tensor cores multiply, on NVIDIA."""
    return target.is_nvidia and not (precision == "ieee" and dtype == torch.float32)


def _milliseconds(share: float, m: int, n: int, k: int, dtype: torch.dtype, target: Target) -> float:
    peak = target.tflops / (2 if dtype == torch.float32 else 1)
    traffic = (m * k + n * k + m * n) * dtype.itemsize / (target.gbps * 1e6)
    return max(2 * m * n * k / peak / 1e9 / share, traffic)
