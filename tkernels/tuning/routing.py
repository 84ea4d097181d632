"""Whether a lone convolution goes to PyTorch under backend 'auto': where arithmetic, not memory, takes its time, cuDNN
is ahead of an implicit GEMM fed by asynchronous copies. Under 'triton' nothing does."""

from __future__ import annotations

import functools

import torch

from tkernels import targets
from tkernels.tuning.conv import Geometry

# Estimates, of the share of the peak rate that a large 3x3 layer reaches in 16 bits; none was measured by us. Tensor
# cores of sm_90 and sm_100 want operands brought by the TMA, which our gathers do not use.
OWN_SHARE = {"sm_90": 0.5, "sm_100": 0.4}
OTHER_OWN_SHARE = 0.65
CUDNN_SHARE = 0.75


def compute_bound(g: Geometry, images: int, dtype: torch.dtype, precision: str, activation: str | None) -> bool:
    """Whether PyTorch's kernels are estimated faster: the larger of arithmetic and traffic for each, PyTorch's with a
    pass of its own for the activation. Depthwise layers and AMD stay."""
    return _compute_bound(g, images, dtype, precision, activation, targets.current())


@functools.lru_cache(maxsize=4096)
def _compute_bound(
    g: Geometry, images: int, dtype: torch.dtype, precision: str, activation: str | None, target: targets.Target
) -> bool:
    if g.depthwise or not target.is_nvidia:
        return False
    if precision == "ieee" and dtype == torch.float32:
        return False  # neither has tensor cores, and the arithmetic is the same
    peak = target.tflops / (2 if dtype == torch.float32 else 1)
    outputs = images * g.out_channels * g.out_h * g.out_w
    milliseconds = 2 * outputs * g.reduction / peak / 1e9
    inputs = images * g.in_channels * g.height * g.width
    traffic = (inputs + outputs + g.out_channels * g.reduction) * dtype.itemsize / target.gbps / 1e6
    extra = 2 * outputs * dtype.itemsize / target.gbps / 1e6 if activation else 0.0
    own = max(milliseconds / OWN_SHARE.get(target.name, OTHER_OWN_SHARE), traffic)
    return max(milliseconds / CUDNN_SHARE, traffic) + extra < own
