"""Attention forward and its gradients: the CNN's small maps, a transformer's heads, masks, dropout, grouped heads."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from perf.static.aot import Case
from perf.static.cases.linear import tf32
from tkernels.core import targets
from tkernels.ops.attention import config as tuning
from tkernels.ops.attention import kernels as attention
from tkernels.ops.attention import kernels_backward as attention_backward

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


def _heads(batch: int, heads: int, length: int, head: int, dtype: torch.dtype) -> Tensor:
    """As a projection gives them: the heads of one position side by side."""
    return torch.empty(batch, length, heads, head, device="cuda", dtype=dtype).transpose(1, 2)


def call(name: str, shape: tuple[int, ...], options: str, dtype: torch.dtype) -> None:
    """Launch one pass: forward, delta, dq or dkv. shape: batch, heads, heads of keys, queries, keys, head."""
    batch, heads, kv_heads, n_q, n_k, head = shape
    q = _heads(batch, heads, n_q, head, dtype)
    k, v = (_heads(batch, kv_heads, n_k, head, dtype) for _ in range(2))
    mask, seed, p = None, None, 0.0
    if "boolean" in options:
        mask = torch.empty(batch, 1, n_q, n_k, device="cuda", dtype=torch.bool)
    if "added" in options:
        mask = torch.empty(n_q, n_k, device="cuda", dtype=dtype)
    if "dropout" in options:
        seed, p = torch.empty((), device="cuda", dtype=torch.int64), 0.1
    common = (mask, p, "causal" in options, head**-0.5, seed)
    if name == "forward":
        attention.launch_forward(q, k, v, *common)
        return
    o = _heads(batch, heads, n_q, head, dtype)
    lse = torch.empty(tuning.lse_shape(q.shape, "added" in options), device="cuda")
    delta = torch.empty(batch, heads, n_q, device="cuda")
    if name == "delta":
        attention_backward.launch_delta(o, o)
    elif name == "dq":
        attention_backward.launch_dq(q, k, v, o, lse, delta, *common)
    else:
        attention_backward.launch_dkv(q, k, v, o, lse, delta, *common)


def _left_to_torch(head: int, dtype: torch.dtype, extras: bool) -> str | None:
    return tuning.why_not(head, head, dtype.itemsize, extras, targets.current())


def cases() -> list[Case]:
    found = []
    for what, *shape, options in SHAPES:
        for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            if dtype is torch.float32 and shape[-1] > 128:  # left to PyTorch
                continue
            for name in ("forward", "delta", "dq", "dkv"):
                run = functools.partial(call, name, tuple(shape), options, dtype)
                # a mask's elements, and in dkv's loop those of lse and delta, are loaded as they lie
                product = dtype is torch.bfloat16 and name in ("forward", "dq") and "mask" not in what
                left_out = functools.partial(_left_to_torch, shape[-1], dtype, "mask" in what or "dropout" in what)
                found.append(Case(f"attention {name} {what} {short}", run, product, left_out))
                if dtype is torch.float32 and name != "delta" and options in ("", "causal"):
                    tensor_cores = functools.partial(tf32, run)
                    found.append(Case(f"attention {name} {what} fp32 tf32", tensor_cores, left_to_torch=left_out))
    return found
