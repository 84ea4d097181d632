"""Batch norm at the shapes of the CIFAR network (batch 256), NHWC, contiguous, and with a residual."""

from __future__ import annotations

import functools

import torch

from perf.static.aot import Case
from tkernels.core.geometry import matrix
from tkernels.core.records import BatchNorm, Norm
from tkernels.ops.batch_norm import kernels

BATCH = 256
# (channels, rows and columns)
MAPS = ((32, 32), (64, 16), (128, 8))


def image(channels: int, size: int, dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
    if channels_last:
        return torch.empty(BATCH, size, size, channels, device="cuda", dtype=dtype).permute(0, 3, 1, 2)
    return torch.empty(BATCH, channels, size, size, device="cuda", dtype=dtype)


def vector(channels: int) -> torch.Tensor:
    return torch.empty(channels, device="cuda")


def training(channels: int, size: int, dtype: torch.dtype, channels_last: bool, activation: str, add: bool) -> None:
    """Forward and backward with batch statistics: every kernel."""
    x, dy = (image(channels, size, dtype, channels_last) for _ in range(2))
    m = matrix(x.shape, channels_last)
    counter = torch.empty((), device="cuda", dtype=torch.int64)
    mean, var, weight, bias = (vector(channels) for _ in range(4))
    bn = BatchNorm(mean, var, weight, bias, True, 0.1, 1e-5, counter)
    stats = kernels.launch_finalize_statistics(kernels.launch_statistics(x, m, counter), m, bn)
    norm = Norm(stats, None, bn.weight, bn.bias, 1e-5)
    residual = torch.empty_like(x) if add else None
    y = kernels.launch_normalize(x, m, norm, activation, residual)
    saved, saved_is = (y, "output") if add and activation == "relu" else (residual, "residual" if add else None)
    sums, dz = kernels.launch_gradient_sums(dy, x, m, norm, activation, saved, saved_is, write_dz=add)
    _, _, coefficients = kernels.launch_finalize_gradients(sums, m, norm)
    if dz is None:
        kernels.launch_input_gradient(dy, x, m, norm, coefficients, activation)
    else:
        kernels.launch_input_gradient(dz, x, m, norm, coefficients)


def evaluation(channels: int, size: int, dtype: torch.dtype, channels_last: bool, activation: str, add: bool) -> None:
    """Forward and input gradient with running statistics."""
    x, dy = (image(channels, size, dtype, channels_last) for _ in range(2))
    m = matrix(x.shape, channels_last)
    norm = Norm(vector(channels), vector(channels), vector(channels), vector(channels), 1e-5)
    y = kernels.launch_normalize(x, m, norm, activation, torch.empty_like(x) if add else None)
    kernels.launch_input_gradient(dy, x, m, norm, None, activation, y, "output", write_dz=add)


def cases() -> list[Case]:
    found = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for channels, size in MAPS:
            label = f"{channels}x{size}x{size} {name}"
            run = functools.partial(training, channels, size, dtype, True, "relu", False)
            found.append(Case(f"batch_norm {label}", run))
        channels, size = MAPS[1]
        for channels_last, layout in ((True, "NHWC"), (False, "NCHW")):
            for activation in ("relu", "gelu"):
                label = f"{channels}x{size}x{size} {name} {layout} {activation} residual"
                found.append(
                    Case(
                        f"batch_norm {label}",
                        functools.partial(training, channels, size, dtype, channels_last, activation, True),
                    )
                )
            run = functools.partial(evaluation, channels, size, dtype, channels_last, "relu", True)
            found.append(Case(f"batch_norm evaluation {channels}x{size}x{size} {name} {layout}", run))
        # odd sizes: three channels, 7x7 planes, 2x2 planes
        for channels, size, channels_last in ((3, 32, True), (48, 7, False), (40, 2, False)):
            label = f"{channels}x{size}x{size} {name} {'NHWC' if channels_last else 'NCHW'}"
            run = functools.partial(training, channels, size, dtype, channels_last, "relu", False)
            found.append(Case(f"batch_norm {label}", run))
    return found
