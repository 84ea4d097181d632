"""Whether a convolution goes to PyTorch under backend 'auto': where arithmetic, not memory, takes its time, cuDNN is
ahead of an implicit GEMM fed by asynchronous copies. Under 'triton' nothing does."""

from __future__ import annotations

import functools

import torch

from tkernels.core.geometry import Geometry
from tkernels.core.targets import Target

# Shares of the peak rate that a large layer reaches in 16 bits, forward, ours and cuDNN's. sm_90: measured on an H100
# (perf/results: 3x3 layers of ResNet-50 at batch 256, 0.22 to 0.39 and 0.4 to 0.7). The others are estimates.
OWN_SHARE = {"sm_90": 0.3, "sm_100": 0.4}
CUDNN_SHARE = {"sm_90": 0.6}
OTHER_OWN_SHARE, OTHER_CUDNN_SHARE = 0.65, 0.75
# milliseconds below which launches and the last wave decide, and ours were as fast in every layer measured
SHORT = 0.03
# the longest reduction of a 3x3 layer (32 channels) whose forward and gradients together were faster than cuDNN's
OWN_REDUCTION = 288


@functools.lru_cache(maxsize=4096)
def compute_bound(g: Geometry, images: int, dtype: torch.dtype, precision: str, passes: bool, target: Target) -> bool:
    """Whether PyTorch's kernels are estimated faster: the larger of arithmetic and traffic for each, PyTorch's with a
    pass of its own for what ours does to the result as it stores it, if ``passes``. Depthwise layers and AMD stay."""
    if not _cudnn_is_ahead(g, dtype, precision, target):
        return False
    peak = target.tflops / (2 if dtype == torch.float32 else 1)
    outputs = images * g.out_channels * g.out_h * g.out_w
    milliseconds = 2 * outputs * g.reduction / peak / 1e9
    inputs = images * g.in_channels * g.height * g.width
    traffic = (inputs + outputs + g.out_channels * g.reduction) * dtype.itemsize / target.gbps / 1e6
    extra = 2 * outputs * dtype.itemsize / target.gbps / 1e6 if passes else 0.0
    own = max(milliseconds / OWN_SHARE.get(target.name, OTHER_OWN_SHARE), traffic)
    theirs = max(milliseconds / CUDNN_SHARE.get(target.name, OTHER_CUDNN_SHARE), traffic) + extra
    return own > SHORT and theirs < own


def before_batch_norm(
    g: Geometry, images: int, dtype: torch.dtype, precision: str, differentiated: bool, target: Target
) -> bool:
    """Whether PyTorch computes a convolution that a batch norm follows, and ours is what comes after it.

    To train, both gradients count, where cuDNN is further ahead: no group of ResNet-50's layers (batch 256, bfloat16)
    was faster as ours on an H200, with all that its epilogue saves. Otherwise ours leaves out a pass over the result.
    """
    if not differentiated:
        return compute_bound(g, images, dtype, precision, True, target)
    if g.taps == 9 and g.reduction <= OWN_REDUCTION:
        return False
    return _cudnn_is_ahead(g, dtype, precision, target)


def _cudnn_is_ahead(g: Geometry, dtype: torch.dtype, precision: str, target: Target) -> bool:
    """At what tensor cores multiply; in float32 without them the arithmetic is the same."""
    return not g.depthwise and target.is_nvidia and not (precision == "ieee" and dtype == torch.float32)
