"""linear at the shapes of the CIFAR network's head, batch 256, and of a transformer's wide layers."""

from __future__ import annotations

import functools

import torch

from perf.static.aot import Case
from tkernels.core import activation as activations
from tkernels.ops.linear import kernels as linear

BATCH = 256
# (in features, out features, activation, dropout)
LAYERS = ((2048, 256, "relu", 0.5), (256, 128, "relu", 0.5), (128, 10, None, 0.0))
WIDE = (
    (1024, 4096, "gelu", 0.1), (1024, 8192, "relu", 0.0),
    *((1000, 24, name, 0.0) for name in activations.ACTIVATIONS[2:]),
)  # fmt: skip


def _seed(activation: str | None, p: float, backward: bool) -> torch.Tensor | None:
    """Dropout's seed where the pass draws: after a ReLU backward reads the mask off the output."""
    if p == 0 or (backward and activation == "relu"):
        return None
    return torch.empty((), dtype=torch.int64, device="cuda")


def forward(k: int, n: int, activation: str | None, p: float, dtype: torch.dtype, batch: int = BATCH) -> None:
    make = functools.partial(torch.empty, device="cuda", dtype=dtype)
    save_z = activations.needs_input(activation, p)
    linear.launch_forward(make(batch, k), make(n, k), make(n), activation, p, _seed(activation, p, False), save_z)


def dgrad(k: int, n: int, activation: str | None, p: float, dtype: torch.dtype, batch: int = BATCH) -> None:
    make = functools.partial(torch.empty, device="cuda", dtype=dtype)
    saved = make(batch, n) if activation else None
    linear.launch_dgrad(make(batch, n), make(n, k), saved, activation, p, _seed(activation, p, True))


def wgrad(
    k: int, n: int, activation: str | None, p: float, dtype: torch.dtype, weight: bool = True, batch: int = BATCH
) -> None:
    make = functools.partial(torch.empty, device="cuda", dtype=dtype)
    saved = make(batch, n) if activation else None
    x = make(batch, k) if weight else None
    linear.launch_wgrad(make(batch, n), x, saved, activation, p, _seed(activation, p, True), with_bias=True)


def tf32(run: functools.partial[None]) -> None:
    """The same with torch's switch for TF32 products on."""
    switch = torch.backends.cuda.matmul
    before, switch.fp32_precision = switch.fp32_precision, "tf32"
    try:
        run()
    finally:
        switch.fp32_precision = before


def cases() -> list[Case]:
    found = []
    for dtype, name, layers in ((torch.bfloat16, "bf16", LAYERS + WIDE), (torch.float32, "fp32", LAYERS[::2])):
        for k, n, activation, p in layers:
            what = f"{k}->{n} {activation or 'plain'} {name}"
            # rows of 10 columns start anywhere: their loads are narrow
            product = dtype is torch.bfloat16 and n % 8 == 0
            for kernel in (forward, dgrad, wgrad):
                run = functools.partial(kernel, k, n, activation, p, dtype)
                found.append(Case(f"{kernel.__name__} {what}", run, product))
                if dtype is torch.float32 and k == 2048:
                    found.append(Case(f"{kernel.__name__} {what} tf32", functools.partial(tf32, run)))
    bias_only = functools.partial(wgrad, *LAYERS[0], torch.bfloat16, weight=False)
    return [*found, Case("bias gradient 2048->256 relu bf16", bias_only)]
