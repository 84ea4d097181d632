"""conv_stage at the shapes of the CIFAR network: batch 256, 3x3 windows with padding 1, 2x2 pooling, NHWC."""

from __future__ import annotations

import functools

import torch

from perf.static.aot import Case
from perf.static.cases.conv import BATCH, LAYERS, image, window3x3
from tkernels.core import mode, targets
from tkernels.core.geometry import Geometry, Pooling, no_pooling
from tkernels.core.records import Norm, WeightSums
from tkernels.ops.conv import kernels as conv
from tkernels.ops.conv import kernels_backward as conv_backward
from tkernels.ops.conv_stage import config as tuning
from tkernels.ops.conv_stage import kernels as conv_stage
from tkernels.ops.conv_stage import kernels_backward as conv_stage_backward
from tkernels.ops.conv_stage import kernels_pointwise as conv_stage_pointwise
from tkernels.ops.conv_stage import kernels_weights as conv_stage_weights

# (channels, rows and columns) of the maps that end a stage
ENDS = ((32, 32), (64, 16), (128, 8))


def norm_of_batch(channels: int) -> Norm:
    vector = torch.empty(channels, device="cuda")
    return Norm(torch.empty(4, channels, device="cuda"), None, vector, vector, 1e-5)


def norm_given(channels: int) -> Norm:
    vector = torch.empty(channels, device="cuda")
    return Norm(vector, vector, vector, vector, 1e-5)


def pooled(size: int, kernel: int = 2, stride: int = 2, pad: int = 0) -> Pooling:
    """Max pooling of a square map."""
    out = (size + 2 * pad - kernel) // stride + 1
    return Pooling(size, size, kernel, kernel, stride, stride, pad, pad, out, out)


def forward(
    g: Geometry, dtype: torch.dtype, training: bool, channels_last: bool = True, activation: str = "relu",
    adds: bool = False,
) -> None:  # fmt: skip
    """``adds``: a residual."""
    weight = torch.empty(g.out_channels, g.group_in, g.kernel_h, g.kernel_w, device="cuda")
    packed = conv.launch_pack(weight, g, dtype)
    bias = torch.empty(g.out_channels, device="cuda")
    norm = None if training else norm_given(g.out_channels)
    counter = torch.empty((), device="cuda", dtype=torch.int64) if training else None
    x, residual = image(g.in_channels, g.height, dtype), image(g.out_channels, g.out_h, dtype) if adds else None
    conv_stage.launch_conv(x, packed, bias, g, norm, counter, channels_last, activation, residual)


def dgrad(g: Geometry, dtype: torch.dtype, activation: str = "relu") -> None:
    weight = torch.empty(g.out_channels, g.group_in, g.kernel_h, g.kernel_w, device="cuda")
    transposed = dtype == torch.float32
    packed = conv.launch_pack(weight, g, dtype, transposed)
    raw = image(g.in_channels, g.height, dtype)
    dy = image(g.out_channels, g.out_h, dtype)
    conv_stage_backward.launch_dgrad(dy, packed, g, raw, norm_of_batch(g.in_channels), transposed, activation)


def wgrad(g: Geometry, dtype: torch.dtype) -> None:
    """The stem's weight gradient, which goes through batch norm's backward in its loop."""
    dz, raw = image(g.out_channels, g.out_h, dtype), image(g.out_channels, g.out_h, dtype)
    norm = norm_of_batch(g.out_channels)
    through = (norm.mean, norm.weight, torch.empty(2, g.out_channels, device="cuda"))
    x = image(g.in_channels, g.height, dtype)
    config = tuning.wgrad(g, dtype, mode.dot_precision(dtype, "conv"), targets.current())
    conv_backward.launch_wgrad(x, dz, g, True, False, raw, config=config, through=through)


def pointwise(c_in: int, c_out: int, size: int, dtype: torch.dtype, activation: str = "relu") -> None:
    """A 1x1 layer that normalises its input as it loads it, forward and weight gradient."""
    g = Geometry(c_in, c_out, 1, size, size, 1, 1, 1, 1, 0, 0, 1, 1, size, size)
    x, norm = image(c_in, size, dtype), norm_of_batch(c_in)
    packed = conv.launch_pack(torch.empty(c_out, c_in, 1, 1, device="cuda"), g, dtype)
    counter = torch.empty((), device="cuda", dtype=torch.int64)
    conv_stage_pointwise.launch_forward(x, norm, packed, None, g, counter, activation)
    conv_stage_pointwise.launch_wgrad(x, norm, image(c_out, size, dtype), g, activation)


def weights(dtype: torch.dtype) -> None:
    """Both layers of the first stage: packing, and merging their gradients."""
    geometries = [window3x3(*layer) for layer in LAYERS[:2]]
    own = [torch.empty(g.out_channels, g.group_in, 3, 3, device="cuda") for g in geometries]
    conv_stage_weights.launch_packs(own, geometries, dtype)
    sums = [
        WeightSums(torch.empty(100, w.numel(), device="cuda"), g, w, None, torch.empty(g.out_channels, device="cuda"))
        for w, g in zip(own, geometries)
    ]
    conv_stage_weights.launch_merges(sums)


def end(
    channels: int, pool: Pooling, dtype: torch.dtype, training: bool, channels_last: bool = True,
    activation: str = "relu",
) -> None:  # fmt: skip
    raw = image(channels, pool.height, dtype)
    seed = torch.empty((), device="cuda", dtype=torch.int64) if training else None
    norm = norm_of_batch(channels) if training else None
    conv_stage.launch_end(raw, pool, norm, 0.25 if training else 0.0, seed, channels_last, activation)


def end_backward(channels: int, pool: Pooling, dtype: torch.dtype, nchw: bool, activation: str = "relu") -> None:
    raw = image(channels, pool.height, dtype)
    seed = torch.empty((), device="cuda", dtype=torch.int64)
    coefficients = torch.empty(2, channels, device="cuda")
    norm = norm_of_batch(channels)
    dy = image(channels, pool.out_h, dtype)
    if nchw:
        dy = torch.empty(BATCH, channels, pool.out_h, pool.out_w, device="cuda", dtype=dtype)
    conv_stage_backward.launch_end_sums(dy, raw, pool, norm, 0.25, seed, activation)
    conv_stage_backward.launch_end_gradient(dy, raw, pool, norm, coefficients, 0.25, seed, activation)


def cases() -> list[Case]:
    found = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for c_in, c_out, size in LAYERS:
            g = window3x3(c_in, c_out, size)
            product = dtype != torch.float32 and not g.flattened
            label = f"{c_in}-{c_out}@{size} {name}"
            run = functools.partial
            found.append(Case(f"conv_stage forward {label}", run(forward, g, dtype, True), product))
            found.append(Case(f"conv_stage evaluation {label}", run(forward, g, dtype, False), product))
            if not g.flattened:
                found.append(Case(f"conv_stage dgrad {label}", run(dgrad, g, dtype), product))
        found += [
            Case(f"conv_stage stem's wgrad {name}", functools.partial(wgrad, window3x3(*LAYERS[0]), dtype)),
            Case(f"conv_stage weights {name}", functools.partial(weights, dtype)),
        ]
        for channels, size in ENDS:
            label = f"{channels}@{size} {name}"
            pool = pooled(size)
            found += [
                Case(f"conv_stage end {label}", functools.partial(end, channels, pool, dtype, True)),
                Case(f"conv_stage pool {label}", functools.partial(end, channels, pool, dtype, False)),
                Case(f"conv_stage end backward {label}", functools.partial(end_backward, channels, pool, dtype, False)),
            ]
        for c_in, c_out, size in ((64, 256, 56), (256, 64, 56), (24, 144, 56)):
            label = f"{c_in}-{c_out}@{size} {name}"
            run_it = functools.partial(pointwise, c_in, c_out, size, dtype)
            found.append(Case(f"conv_stage pointwise {label}", run_it))
        label = f"64@16 {name}"
        overlapping = pooled(16, 3, 2, 1)
        found += [
            Case(f"conv_stage end NCHW {label}", functools.partial(end, 64, pooled(16), dtype, True, False)),
            Case(f"conv_stage dropout {label}", functools.partial(end, 64, no_pooling(16, 16), dtype, True)),
            Case(f"conv_stage dropout backward NCHW {label}",
                 functools.partial(end_backward, 64, no_pooling(16, 16), dtype, True)),
            Case(f"conv_stage overlap {label}", functools.partial(end, 64, overlapping, dtype, True)),
            Case(f"conv_stage overlap backward {label}",
                 functools.partial(end_backward, 64, overlapping, dtype, False)),
            Case(f"conv_stage evaluation NCHW {label}",
                 functools.partial(forward, window3x3(64, 64, 16), dtype, False, False), dtype != torch.float32),
            # the activation with the most arithmetic
            Case(f"conv_stage evaluation gelu residual {label}",
                 functools.partial(forward, window3x3(64, 64, 16), dtype, False, True, "gelu", True)),
            Case(f"conv_stage dgrad gelu {label}", functools.partial(dgrad, window3x3(64, 64, 16), dtype, "gelu")),
            Case(f"conv_stage end gelu {label}", functools.partial(end, 64, pooled(16), dtype, True, True, "gelu")),
            Case(f"conv_stage end backward gelu {label}",
                 functools.partial(end_backward, 64, pooled(16), dtype, False, "gelu")),
            Case(f"conv_stage overlap backward gelu {label}",
                 functools.partial(end_backward, 64, overlapping, dtype, False, "gelu")),
            Case(f"conv_stage pointwise gelu {label}", functools.partial(pointwise, 64, 256, 56, dtype, "gelu")),
        ]  # fmt: skip
    return found
