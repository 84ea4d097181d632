"""Who computes a convolution's products under backend 'auto', each pass for itself: where arithmetic, not memory, takes
the time, cuDNN is ahead of an implicit GEMM fed by asynchronous copies. Under 'triton' all are ours."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from tkernels.core.geometry import Geometry
from tkernels.core.records import OURS, Route
from tkernels.core.targets import Target

PASSES = Route._fields


class Shares(NamedTuple):
    """What large layers reach of the peak rates of 16-bit arithmetic and of memory."""

    arithmetic: float
    bandwidth: float


class Speeds(NamedTuple):
    """One target's, by pass: our kernels; ours in a conv stage that trains, where they sum what they store; PyTorch's,
    without a bias. ``source``: where the figures are from."""

    source: str
    own: dict[str, Shares]
    own_stage: dict[str, Shares]
    pytorch: dict[str, Shares]


def _all(arithmetic: float, bandwidth: float) -> dict[str, Shares]:
    return dict.fromkeys(PASSES, Shares(arithmetic, bandwidth))


_HOPPER = Speeds(
    # layers of ResNet-50 at batch 256 in bfloat16: each alone on an H100, the stages within fuse(resnet50) on an H200
    "measured: perf/results/h100-2026-11-27, h200-2026-11-27",
    own={"forward": Shares(0.3, 0.6), "dgrad": Shares(0.3, 0.6), "wgrad": Shares(0.2, 0.75)},
    own_stage={"forward": Shares(0.18, 0.35), "dgrad": Shares(0.2, 0.5), "wgrad": Shares(0.2, 0.75)},
    pytorch={"forward": Shares(0.65, 0.85), "dgrad": Shares(0.65, 0.85), "wgrad": Shares(0.6, 0.8)},
)
# Stages on other GPUs are taken to be as far behind as on Hopper.
_BLACKWELL = Speeds("estimated", _all(0.4, 1.0), _HOPPER.own_stage, _all(0.75, 1.0))
_OTHERS = Speeds("estimated", _all(0.65, 1.0), _HOPPER.own_stage, _all(0.75, 1.0))
SPEEDS = {"sm_90": _HOPPER, "sm_100": _BLACKWELL}

# PyTorch adds a bias in a pass of its own, at this share of the bandwidth (sm_90, measured)
BIAS_SHARE = 0.4
# Milliseconds below which launches and the last wave decide, and ours were as fast in every layer measured
SHORT = 0.03
# The longest reduction of a 3x3 layer (32 channels) whose forward and gradients together were faster than cuDNN's in a
# stage that trains
OWN_REDUCTION = 288


def speeds(target: Target) -> Speeds:
    """A target's row of the table."""
    return SPEEDS.get(target.name, _OTHERS)


@functools.lru_cache(maxsize=4096)
def of_conv(
    g: Geometry, images: int, dtype: torch.dtype, precision: str, activation: bool, bias: bool, differentiated: bool,
    target: Target,
) -> Route:  # fmt: skip
    """Of conv2d: with an activation or a bias PyTorch has passes of its own over what ours does to a result as it
    stores it."""
    if not cudnn_competes(g, dtype, precision, target):
        return OURS
    output = _outputs(g, images) * dtype.itemsize
    more = 2 * output / _rate(target)
    extra = more * activation + more / BIAS_SHARE * bias
    forward = _theirs("forward", speeds(target).own, g, images, dtype, target, extra)
    if not differentiated:
        return Route(forward)
    # the derivative of an activation that PyTorch's products follow is a pass too, which each of ours may leave out
    gradients = [_theirs(name, speeds(target).own, g, images, dtype, target, 0.0) for name in PASSES[1:]]
    return Route(forward, *gradients)


@functools.lru_cache(maxsize=4096)
def of_stage(g: Geometry, images: int, dtype: torch.dtype, precision: str, measured: bool, target: Target) -> Route:
    """Of a conv stage's layer. ``measured``: the batch's statistics normalise it; else the running ones, which our
    forward applies as it stores, where PyTorch's is followed by a pass.

    What our epilogues save (a read of the output for the statistics, one of the gradient for their sums) is in
    ``own_stage`` and in the passes beside PyTorch's products.
    """
    if not cudnn_competes(g, dtype, precision, target):
        return OURS
    if measured and g.taps == 9 and g.reduction <= OWN_REDUCTION:
        return OURS
    output, input = _outputs(g, images) * dtype.itemsize, _inputs(g, images) * dtype.itemsize
    rate = _rate(target)
    own = speeds(target).own_stage if measured else speeds(target).own
    extra = (1 if measured else 2) * output / rate
    return Route(
        # (for images cuDNN pads three channels to eight in a pass of its own)
        not g.flattened and _theirs("forward", own, g, images, dtype, target, extra),
        _theirs("dgrad", own, g, images, dtype, target, input / rate),
        _theirs("wgrad", own, g, images, dtype, target, 0.0),
    )


def _theirs(
    name: str, own: dict[str, Shares], g: Geometry, images: int, dtype: torch.dtype, target: Target, extra: float
) -> bool:
    """Whether PyTorch's kernels are estimated faster, with ``extra`` milliseconds of passes beside them."""
    ours = estimate(own[name], g, images, dtype, target)
    return ours > SHORT and estimate(speeds(target).pytorch[name], g, images, dtype, target) + extra < ours


def estimate(shares: Shares, g: Geometry, images: int, dtype: torch.dtype, target: Target) -> float:
    """Milliseconds of one product: the larger of arithmetic and traffic."""
    peak = target.tflops / (2 if dtype == torch.float32 else 1)
    outputs, inputs = _outputs(g, images), _inputs(g, images)
    arithmetic = 2 * outputs * g.reduction / peak / 1e9
    traffic = (inputs + outputs + g.out_channels * g.reduction) * dtype.itemsize / _rate(target)
    return max(arithmetic / shares.arithmetic, traffic / shares.bandwidth)


def _rate(target: Target) -> float:
    """Bytes a millisecond at the memory's peak."""
    return target.gbps * 1e6


def _outputs(g: Geometry, images: int) -> int:
    return images * g.out_channels * g.out_h * g.out_w


def _inputs(g: Geometry, images: int) -> int:
    return images * g.in_channels * g.height * g.width


MANY = 256


def large(
    in_channels: int, out_channels: int, groups: int, kernel_h: int, kernel_w: int, stride_h: int, stride_w: int
) -> Geometry:
    """Of many large maps (with MANY images): in a trace their sizes may be symbols, and one graph serves them all."""
    side = 64
    height, width = (side - 1) * stride_h + kernel_h, (side - 1) * stride_w + kernel_w
    return Geometry(in_channels, out_channels, groups, height, width, kernel_h, kernel_w, stride_h, stride_w, 0, 0, 1,
                    1, side, side)  # fmt: skip


def cudnn_competes(g: Geometry, dtype: torch.dtype, precision: str, target: Target) -> bool:
    """At what tensor cores multiply; in float32 without them the arithmetic is the same. Padding of one side is a copy
    of PyTorch's."""
    exact = precision == "ieee" and dtype == torch.float32
    return not g.depthwise and g.symmetric and target.is_nvidia and not exact
