"""Cross entropy with class indices on the CPU in two passes: one over the logits forward, one backward.

torch keeps the logarithm of the softmax, fills a gradient of the logits' size with zeros and passes over both again.
``ops.cross_entropy`` takes this where logits are large and the call is of the everyday kind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn.functional import cross_entropy as cross_entropy_loss

from tkernels.core import _torch
from tkernels.core.autograd import composed_where_differentiated, gradients_of, save, saved
from tkernels.core.records import LossOptions
from tkernels.cpu import buffers, compiler, rows

PLAIN = (Tensor, torch.nn.Parameter)
DTYPES = (torch.float32, torch.bfloat16)
# Bytes of logits from which on the passes pay for the calls around them. (Measured: 0.9 of torch's speed at 8 MB, 1.1
# to 6 times it from 64 MB on, where torch's memory is mapped anew at each step.)
WORTH_IT = 1 << 24
# Logits from which on they do where a row is shorter than a vector register: torch then takes value by value, and the
# passes are 3 to 6 times as fast.
SHORT_WORTH_IT = 1 << 15
VECTOR = {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 16)


def takes(x: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> bool:
    """Whether this call goes the fast way; one that torch refuses does not. Nothing depends on what ran before."""
    # a trace must not learn of sizes: Dynamo is gone after the first line, fake tensors after the second
    return (
        not is_dynamo_compiling()
        and not _torch.is_jit_tracing()
        and type(x) in PLAIN
        and x.numel() >= SHORT_WORTH_IT
        and weight is None
        and type(target) is Tensor
        and x.dim() == 2
        and x.dtype in DTYPES
        and (x.nbytes >= WORTH_IT or _short(x))
        and target.dtype is torch.int64
        and target.shape == x.shape[:1]
        and x.shape[1] < 2**31
        and x.device.type == target.device.type == "cpu"
        and not x.is_cuda
        and x.layout is torch.strided
        and x.is_contiguous()
        and not (x.is_neg() or x.is_inference())
        and type(options.ignore_index) is int
        and type(options.smoothing) is float
        and 0.0 <= options.smoothing <= 1.0
        and compiler.enabled()
        and compiler.plain_eager()
    )


def _short(x: Tensor) -> bool:
    return x.shape[1] * x.itemsize < VECTOR


def cross_entropy(x: Tensor, target: Tensor, options: LossOptions) -> Tensor:
    """The loss of a call that ``takes`` agreed to, in float32 under autocast, else in the logits' dtype."""
    dtype = torch.float32 if torch.is_autocast_enabled("cpu") else x.dtype
    with torch.autocast("cpu", enabled=False):
        if x.requires_grad and torch.is_grad_enabled():
            return _CrossEntropyCPU.apply(x, target, options, dtype)
        return _forward(x, target, options, dtype)[0]


def _forward(x: Tensor, target: Tensor, options: LossOptions, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The loss; each row's largest logit, log of the sum, index as int32, share in the loss."""
    ignore_index, reduction, smoothing = options
    counts = target != ignore_index
    index = torch.where(counts, target, 0)
    picked = x.gather(1, index[:, None]).squeeze(1)  # refuses an index out of range
    # (Inductor takes short rows of bfloat16 value by value: 0.9 ms where a copy and its pass take 0.2)
    logits = x.float() if _short(x) else x
    if smoothing > 0:
        top, log_sum, total = rows.softmax_statistics_and_sum(logits)
        even = log_sum - total / x.shape[1]
    else:
        top, log_sum = rows.softmax_statistics(logits)
    loss = log_sum - (picked - top)
    if smoothing > 0:
        loss = loss * (1.0 - smoothing) + even * smoothing
    loss = torch.where(counts, loss, 0.0)
    share = counts.float()
    if reduction == "mean":
        number = share.sum()
        # (of 0 rows the mean is NaN, and the gradient of each is 0)
        loss, share = loss.sum() / number, torch.where(counts, share / number, 0.0)
    elif reduction == "sum":
        loss = loss.sum()
    return loss.to(dtype), [top, log_sum, index.int(), share]


class _CrossEntropyCPU(torch.autograd.Function):
    """Saved are the logits and four vectors with a value for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, options: LossOptions, dtype: torch.dtype) -> Tensor:
        loss, kept = _forward(x, target, options, dtype)
        save(ctx, x, target, *kept)
        ctx.options = options
        return loss

    @staticmethod
    def backward_composed(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The same in torch's own calls."""
        x, target = ctx.saved_tensors[:2]
        ignore_index, reduction, smoothing = ctx.options

        def loss(x: Tensor) -> Tensor:
            x = x.to(dy.dtype)
            return cross_entropy_loss(x, target, None, None, ignore_index, None, reduction, smoothing)

        with torch.autocast("cpu", enabled=False):
            (dx,) = gradients_of(loss, [x], [True], dy)
        return dx, None, None, None

    @staticmethod
    @composed_where_differentiated(backward_composed)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, _, top, log_sum, index, share = saved(ctx)
        smoothing = ctx.options.smoothing
        with torch.autocast("cpu", enabled=False):
            whole = torch.where(share > 0, share * dy.float(), 0.0)
            dx = buffers.empty(x)
            rows.cross_entropy_gradient(
                x, top, log_sum, index, whole, whole * (1.0 - smoothing), whole * (smoothing / x.shape[1]), dx
            )
        return dx, None, None, None
