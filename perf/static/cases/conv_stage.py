"""conv_stage at the shapes of the CIFAR network: batch 256, 3x3 windows with padding 1, 2x2 pooling, NHWC."""

from __future__ import annotations

import torch

from perf.static.aot import Case
from perf.static.cases import DTYPES, case, empty, image, label, whole, window
from perf.static.cases.conv import LAYERS, weight_of
from tkernels.core import mode, targets
from tkernels.core.geometry import Geometry, Pooling, no_pooling
from tkernels.core.records import Norm, WeightSums
from tkernels.ops.conv import kernels as conv
from tkernels.ops.conv import kernels_backward as conv_backward
from tkernels.ops.conv_stage import config as tuning
from tkernels.ops.conv_stage import kernels, kernels_backward, kernels_pointwise, kernels_weights

# (channels, rows and columns) of the maps that end a stage
ENDS = ((32, 32), (64, 16), (128, 8))
# (input channels, output channels, rows and columns) of 1x1 layers
POINTWISE = ((64, 256, 56), (256, 64, 56), (24, 144, 56))


def norm_of_batch(channels: int) -> Norm:
    vector = empty(channels)
    return Norm(empty(4, channels), None, vector, vector, 1e-5)


def norm_given(channels: int) -> Norm:
    vector = empty(channels)
    return Norm(vector, vector, vector, vector, 1e-5)


def pooled(size: int, kernel: int = 2, stride: int = 2, pad: int = 0) -> Pooling:
    """Max pooling of a square map."""
    out = (size + 2 * pad - kernel) // stride + 1
    return Pooling(size, size, kernel, kernel, stride, stride, pad, pad, out, out)


def forward(g: Geometry, dtype: torch.dtype, training: bool, channels_last: bool = True, activation: str = "relu",
            adds: bool = False) -> None:  # fmt: skip
    """``adds``: a residual."""
    packed = conv.launch_pack(weight_of(g), g, dtype)
    norm, counter = (None, whole()) if training else (norm_given(g.out_channels), None)
    x, residual = image(g.in_channels, g.height, dtype), image(g.out_channels, g.out_h, dtype) if adds else None
    kernels.launch_conv(x, packed, empty(g.out_channels), g, norm, counter, channels_last, activation, residual)


def dgrad(g: Geometry, dtype: torch.dtype, activation: str = "relu") -> None:
    transposed = dtype == torch.float32
    packed = conv.launch_pack(weight_of(g), g, dtype, transposed)
    raw, dy = image(g.in_channels, g.height, dtype), image(g.out_channels, g.out_h, dtype)
    kernels_backward.launch_dgrad(dy, packed, g, raw, norm_of_batch(g.in_channels), transposed, activation)


def wgrad(g: Geometry, dtype: torch.dtype) -> None:
    """The stem's weight gradient, which goes through batch norm's backward in its loop."""
    dz, raw = image(g.out_channels, g.out_h, dtype), image(g.out_channels, g.out_h, dtype)
    norm = norm_of_batch(g.out_channels)
    through = (norm.mean, norm.weight, empty(2, g.out_channels))
    config = tuning.wgrad(g, dtype, mode.dot_precision(dtype, "conv"), targets.current())
    x = image(g.in_channels, g.height, dtype)
    conv_backward.launch_wgrad(x, dz, g, True, False, raw, config=config, through=through)


def pointwise_forward(g: Geometry, dtype: torch.dtype, activation: str = "relu") -> None:
    """A 1x1 layer that normalises its input as it loads it."""
    x, norm = image(g.in_channels, g.height, dtype), norm_of_batch(g.in_channels)
    packed = conv.launch_pack(weight_of(g), g, dtype)
    kernels_pointwise.launch_forward(x, norm, packed, None, g, whole(), activation)


def pointwise_wgrad(g: Geometry, dtype: torch.dtype, activation: str = "relu") -> None:
    """Its weight gradient, which does so again."""
    x, norm = image(g.in_channels, g.height, dtype), norm_of_batch(g.in_channels)
    kernels_pointwise.launch_wgrad(x, norm, image(g.out_channels, g.out_h, dtype), g, activation)


def pointwise(g: Geometry, dtype: torch.dtype, activation: str = "relu") -> None:
    pointwise_forward(g, dtype, activation)
    pointwise_wgrad(g, dtype, activation)


def weights(dtype: torch.dtype) -> None:
    """Both layers of the first stage: packing, and merging their gradients."""
    geometries = [window(*layer) for layer in LAYERS[:2]]
    own = [weight_of(g) for g in geometries]
    kernels_weights.launch_packs(own, geometries, dtype)
    sums = [WeightSums(empty(100, w.numel()), g, w, None, empty(g.out_channels)) for w, g in zip(own, geometries)]
    kernels_weights.launch_merges(sums)


def end(channels: int, pool: Pooling, dtype: torch.dtype, training: bool = True, channels_last: bool = True,
        activation: str = "relu") -> None:  # fmt: skip
    raw = image(channels, pool.height, dtype)
    norm, p, seed = (norm_of_batch(channels), 0.25, whole()) if training else (None, 0.0, None)
    taps = kernels.taps_like(raw, pool) if training else None
    kernels.launch_end(raw, pool, norm, p, seed, channels_last, activation, taps)


def end_backward(channels: int, pool: Pooling, dtype: torch.dtype, nchw: bool = False,
                 activation: str = "relu") -> None:  # fmt: skip
    raw, dy = image(channels, pool.height, dtype), image(channels, pool.out_h, dtype, channels_last=not nchw)
    norm, seed = norm_of_batch(channels), whole()
    # without a byte a window as traces have it, too
    for taps in dict.fromkeys((kernels.taps_like(raw, pool), None)):
        kernels_backward.launch_end_sums(dy, raw, pool, norm, 0.25, seed, activation, taps)
        kernels_backward.launch_end_gradient(dy, raw, pool, norm, empty(2, channels), 0.25, seed, activation, taps)


def cases() -> list[Case]:
    found = []
    for name, dtype in DTYPES.items():
        half = name == "bf16"
        for g in (window(*layer) for layer in LAYERS):
            what, product = label(g, name), half and not g.flattened
            found.append(case(f"conv_stage forward {what}", forward, g, dtype, True, product=product))
            found.append(case(f"conv_stage evaluation {what}", forward, g, dtype, False, product=product))
            if not g.flattened:
                found.append(case(f"conv_stage dgrad {what}", dgrad, g, dtype, product=product))
        found += [
            case(f"conv_stage stem's wgrad {name}", wgrad, window(*LAYERS[0]), dtype),
            case(f"conv_stage weights {name}", weights, dtype),
        ]
        for channels, size in ENDS:
            what, ends = f"{channels}@{size} {name}", (channels, pooled(size), dtype)
            found += [
                case(f"conv_stage end {what}", end, *ends),
                case(f"conv_stage pool {what}", end, *ends, training=False),
                case(f"conv_stage end backward {what}", end_backward, *ends),
            ]
        for g in (window(*layer, 1) for layer in POINTWISE):
            found.append(case(f"conv_stage pointwise {label(g, name)}", pointwise, g, dtype))
        what, g = f"64@16 {name}", window(64, 64, 16)
        ends, drops, overlaps = ((64, p, dtype) for p in (pooled(16), no_pooling(16, 16), pooled(16, 3, 2, 1)))
        found += [
            case(f"conv_stage end NCHW {what}", end, *ends, channels_last=False),
            case(f"conv_stage dropout {what}", end, *drops),
            case(f"conv_stage dropout backward NCHW {what}", end_backward, *drops, nchw=True),
            case(f"conv_stage overlap {what}", end, *overlaps),
            case(f"conv_stage overlap backward {what}", end_backward, *overlaps),
            case(f"conv_stage evaluation NCHW {what}", forward, g, dtype, False, False, product=half),
            # the activation with the most arithmetic
            case(f"conv_stage evaluation gelu residual {what}", forward, g, dtype, False, True, "gelu", True),
            case(f"conv_stage dgrad gelu {what}", dgrad, g, dtype, "gelu"),
            case(f"conv_stage end gelu {what}", end, *ends, activation="gelu"),
            case(f"conv_stage end backward gelu {what}", end_backward, *ends, activation="gelu"),
            case(f"conv_stage overlap backward gelu {what}", end_backward, *overlaps, activation="gelu"),
            case(f"conv_stage pointwise gelu {what}", pointwise, window(64, 256, 56, 1), dtype, "gelu"),
        ]
    return found
