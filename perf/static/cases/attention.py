"""Attention forward and its gradients: the CNN's small maps, a transformer's heads, masks, dropout, grouped heads."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from perf.static.aot import Case
from perf.static.cases import DTYPES, empty, tf32, whole
from tkernels.core import targets
from tkernels.ops.attention import config as tuning
from tkernels.ops.attention import kernels, kernels_backward

# name, batch, heads, heads of keys, queries, keys, head, options
SHAPES = (
    ("256x4x64x32", 256, 4, 4, 64, 64, 32, ""),
    ("4x16x2048x64", 4, 16, 16, 2048, 2048, 64, ""),
    ("4x16x2048x64 causal", 4, 16, 16, 2048, 2048, 64, "causal"),
    ("4x16x2048x64 causal dropout", 4, 16, 16, 2048, 2048, 64, "causal dropout"),
    ("4x16x2048x64 boolean mask", 4, 16, 16, 2048, 2048, 64, "boolean"),
    ("4x16x500x700x80 added mask dropout", 4, 16, 16, 500, 700, 80, "added dropout"),
    ("4x16x2048x40", 4, 16, 16, 2048, 2048, 40, ""),
    ("2x32x4096x128 causal, 8 heads of keys", 2, 32, 8, 4096, 4096, 128, "causal"),
    ("2x16x1024x192", 2, 16, 16, 1024, 1024, 192, ""),
    ("2x16x1024x192 boolean mask dropout", 2, 16, 16, 1024, 1024, 192, "boolean dropout"),
    ("2x16x1024x256 causal", 2, 16, 16, 1024, 1024, 256, "causal"),
)
PASSES = ("forward", "delta", "dq", "dkv")


def _heads(batch: int, heads: int, length: int, head: int, dtype: torch.dtype) -> Tensor:
    """As a projection gives them: the heads of one position side by side."""
    return empty(batch, length, heads, head, dtype=dtype).transpose(1, 2)


def call(name: str, shape: tuple[int, ...], options: str, dtype: torch.dtype) -> None:
    """Launch one of PASSES. shape: batch, heads, heads of keys, queries, keys, head."""
    batch, heads, kv_heads, n_q, n_k, head = shape
    q, o = (_heads(batch, heads, n_q, head, dtype) for _ in range(2))
    k, v = (_heads(batch, kv_heads, n_k, head, dtype) for _ in range(2))
    mask = None
    if "boolean" in options:
        mask = empty(batch, 1, n_q, n_k, dtype=torch.bool)
    if "added" in options:
        mask = empty(n_q, n_k, dtype=dtype)
    p, seed = (0.1, whole()) if "dropout" in options else (0.0, None)
    common = (mask, p, "causal" in options, head**-0.5, seed)
    if name == "forward":
        kernels.launch_forward(q, k, v, *common)
    elif name == "delta":
        kernels_backward.launch_delta(o, o)
    else:
        launch: Any = kernels_backward.launch_dq if name == "dq" else kernels_backward.launch_dkv
        lse, delta = empty(*tuning.lse_shape(q.shape, "added" in options)), empty(batch, heads, n_q)
        launch(q, k, v, o, lse, delta, *common)


def _left_to_torch(head: int, dtype: torch.dtype, extras: bool) -> str | None:
    return tuning.why_not(head, head, dtype.itemsize, extras, targets.current())


def cases() -> list[Case]:
    found = []
    for what, *shape, options in SHAPES:
        for short, dtype in DTYPES.items():
            if short == "fp32" and shape[-1] > 128:  # left to PyTorch
                continue
            left_out = functools.partial(_left_to_torch, shape[-1], dtype, "mask" in what or "dropout" in what)
            for name in PASSES:
                run = functools.partial(call, name, tuple(shape), options, dtype)
                # a mask's elements, and in dkv's loop those of lse and delta, are loaded as they lie
                product = short == "bf16" and name in ("forward", "dq") and "mask" not in what
                found.append(Case(f"attention {name} {what} {short}", run, product, left_out))
                if short == "fp32" and name != "delta" and options in ("", "causal"):
                    tensor_cores = functools.partial(tf32, run)
                    found.append(Case(f"attention {name} {what} fp32 tf32", tensor_cores, left_to_torch=left_out))
    return found
