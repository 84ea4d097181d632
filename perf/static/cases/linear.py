"""linear at the shapes of the CIFAR network's head, batch 256, and of a transformer's wide layers."""

from __future__ import annotations

import torch
from torch import Tensor

from perf.static.aot import Case
from perf.static.cases import BATCH, DTYPES, case, empty, tf32, whole
from tkernels.core import activation as activations
from tkernels.ops.linear import kernels

# (in features, out features, activation, dropout)
LAYERS = ((2048, 256, "relu", 0.5), (256, 128, "relu", 0.5), (128, 10, None, 0.0))
WIDE = (
    (1024, 4096, "gelu", 0.1), (1024, 8192, "relu", 0.0),
    *((1000, 24, name, 0.0) for name in activations.ACTIVATIONS[2:]),
)  # fmt: skip


def forward(k: int, n: int, activation: str | None, p: float, dtype: torch.dtype, batch: int = BATCH) -> None:
    x, weight, bias = empty(batch, k, dtype=dtype), empty(n, k, dtype=dtype), empty(n, dtype=dtype)
    save_z = activations.needs_input(activation, p)
    kernels.launch_forward(x, weight, bias, activation, p, whole() if p else None, save_z)


def dgrad(k: int, n: int, activation: str | None, p: float, dtype: torch.dtype, batch: int = BATCH) -> None:
    dy, weight = empty(batch, n, dtype=dtype), empty(n, k, dtype=dtype)
    kernels.launch_dgrad(dy, weight, *_saved(dy, activation, p))


def wgrad(
    k: int, n: int, activation: str | None, p: float, dtype: torch.dtype, weight: bool = True, batch: int = BATCH
) -> None:
    dy, x = empty(batch, n, dtype=dtype), empty(batch, k, dtype=dtype) if weight else None
    kernels.launch_wgrad(dy, x, *_saved(dy, activation, p), with_bias=True)


def _saved(dy: Tensor, activation: str | None, p: float) -> tuple[Tensor | None, str | None, float, Tensor | None]:
    """What forward left for backward: after a ReLU it reads the mask off the output, and needs no seed."""
    seed = whole() if p and activation != "relu" else None
    return torch.empty_like(dy) if activation else None, activation, p, seed


def cases() -> list[Case]:
    found = []
    for name, layers in (("bf16", LAYERS + WIDE), ("fp32", LAYERS[::2])):
        for k, n, activation, p in layers:
            what, layer = f"{k}->{n} {activation or 'plain'} {name}", (k, n, activation, p, DTYPES[name])
            # rows of 10 columns start anywhere: their loads are narrow
            product = name == "bf16" and n % 8 == 0
            for run in (forward, dgrad, wgrad):
                found.append(case(f"{run.__name__} {what}", run, *layer, product=product))
                if name == "fp32" and k == 2048:
                    found.append(case(f"{run.__name__} {what} tf32", tf32, run, *layer))
    return [*found, case("bias gradient 2048->256 relu bf16", wgrad, *LAYERS[0], torch.bfloat16, weight=False)]
