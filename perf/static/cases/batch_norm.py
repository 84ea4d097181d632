"""Batch norm at the shapes of the CIFAR network (batch 256), NHWC, contiguous, and with a residual."""

from __future__ import annotations

import torch

from perf.static.aot import Case
from perf.static.cases import DTYPES, case, empty, image, whole
from tkernels.core.geometry import matrix
from tkernels.core.records import BatchNorm, Norm
from tkernels.ops.batch_norm import kernels

# (channels, rows and columns)
MAPS = ((32, 32), (64, 16), (128, 8))
LAYOUTS = ("NHWC", "NCHW")
# three channels, 7x7 planes, 2x2 planes
ODD = ((3, 32, "NHWC"), (48, 7, "NCHW"), (40, 2, "NCHW"))


def training(channels: int, size: int, dtype: torch.dtype, channels_last: bool = True, activation: str = "relu",
             add: bool = False) -> None:  # fmt: skip
    """Forward and backward with batch statistics: every kernel."""
    x, dy = (image(channels, size, dtype, channels_last) for _ in range(2))
    m, counter = matrix(x.shape, channels_last), whole()
    mean, var, weight, bias = (empty(channels) for _ in range(4))
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


def evaluation(channels: int, size: int, dtype: torch.dtype, channels_last: bool) -> None:
    """Forward and input gradient with running statistics, ReLU and a residual."""
    x, dy = (image(channels, size, dtype, channels_last) for _ in range(2))
    m = matrix(x.shape, channels_last)
    norm = Norm(empty(channels), empty(channels), empty(channels), empty(channels), 1e-5)
    y = kernels.launch_normalize(x, m, norm, "relu", torch.empty_like(x))
    kernels.launch_input_gradient(dy, x, m, norm, None, "relu", y, "output", write_dz=True)


def cases() -> list[Case]:
    found = []
    for name, dtype in DTYPES.items():
        found += [case(f"batch_norm {c}x{size}x{size} {name}", training, c, size, dtype) for c, size in MAPS]
        for layout in LAYOUTS:
            nhwc, what = layout == "NHWC", f"64x16x16 {name} {layout}"
            for activation in ("relu", "gelu"):
                run = training, 64, 16, dtype, nhwc, activation, True
                found.append(case(f"batch_norm {what} {activation} residual", *run))
            found.append(case(f"batch_norm evaluation {what}", evaluation, 64, 16, dtype, nhwc))
        for c, size, layout in ODD:
            what = f"{c}x{size}x{size} {name} {layout}"
            found.append(case(f"batch_norm {what}", training, c, size, dtype, layout == "NHWC"))
    return found
