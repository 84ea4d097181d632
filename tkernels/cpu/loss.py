"""Cross entropy with class indices on the CPU in two passes over dense logits [N, C]: one forward, one backward.

torch keeps the logarithm of the softmax, fills a gradient of the logits' size with zeros and passes over both again.
``ops.cross_entropy`` takes this where logits are large and the call is of the everyday kind.

A row's softmax is exp(x - top - log_sum), with ``top`` its largest logit and ``log_sum`` the logarithm of the sum of
exp(x - top): float32 [N], all that is kept of a row. Arithmetic is float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tkernels.core.autograd import composed_where_differentiated, gradients_of, save, saved
from tkernels.core.records import LossOptions
from tkernels.cpu import buffers, compiler, guard
from tkernels.cpu.compiler import Pass

# Bytes of logits from which on the passes pay for the calls around them. (Measured: 0.9 of torch's speed at 8 MB, 1.1
# to 6 times it from 64 MB on, where torch's memory is mapped anew at each step.)
WORTH_IT = 1 << 24
# Logits from which on they do where a row is shorter than a vector register: torch then takes value by value, and the
# passes are 3 to 6 times as fast.
SHORT_WORTH_IT = 1 << 15
VECTOR = {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 16)


def cross_entropy(x: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> Tensor | None:
    """The loss, in float32 under autocast, else in the logits' dtype; None where that is PyTorch's, as is what torch
    refuses."""
    if not (
        weight is None
        and guard.supports(x, 2 * SHORT_WORTH_IT)
        and (x.nbytes >= WORTH_IT or (_short(x) and x.numel() >= SHORT_WORTH_IT))
        and x.dim() == 2
        and x.is_contiguous()
        and not x.is_inference()
        and x.shape[1] < 2**31
        and type(target) is Tensor
        and guard.are_plain((target,), torch.int64)
        and target.shape == x.shape[:1]
        and type(options.ignore_index) is int
        and options.reduction in ("none", "mean", "sum")
        and type(options.smoothing) is float
        and 0.0 <= options.smoothing <= 1.0
        and compiler.enabled()
    ):
        return None
    dtype = torch.float32 if torch.is_autocast_enabled("cpu") else x.dtype
    try:
        with torch.autocast("cpu", enabled=False):
            if guard.recorded(x):
                return _CrossEntropyCPU.apply(x, target, options, dtype)
            return _forward(x, target, options, dtype)[0]
    except RuntimeError:  # an index out of range: torch has the words and the class for it
        return None


def _short(x: Tensor) -> bool:
    return x.dim() > 1 and x.shape[1] * x.itemsize < VECTOR


def _softmax_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.float()
    top = x.amax(1)
    return top, torch.exp(x - top[:, None]).sum(1).log()


def _softmax_statistics_and_sum(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Also each row's sum of x - top."""
    x = x.float()
    top = x.amax(1)
    d = x - top[:, None]
    return top, torch.exp(d).sum(1).log(), d.sum(1)


def _cross_entropy_gradient(
    x: Tensor, top: Tensor, log_sum: Tensor, target: Tensor, whole: Tensor, hot: Tensor, flat: Tensor, out: Tensor
) -> tuple[()]:
    """softmax * ``whole``, less ``hot`` at the row's ``target`` (int32), less ``flat`` everywhere; all three [N]."""
    p = torch.exp(x.float() - top[:, None] - log_sum[:, None])
    here = torch.arange(x.shape[1], dtype=torch.int32, device="cpu") == target[:, None]
    out.copy_(p * whole[:, None] - torch.where(here, hot[:, None], 0.0) - flat[:, None])
    return ()


statistics = Pass(_softmax_statistics, channels=False)
statistics_and_sum = Pass(_softmax_statistics_and_sum, channels=False)
gradient = Pass(_cross_entropy_gradient, channels=False)


def _forward(x: Tensor, target: Tensor, options: LossOptions, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The loss; each row's largest logit, log of the sum, index as int32, share in the loss."""
    ignore_index, reduction, smoothing = options
    counts = target != ignore_index
    index = torch.where(counts, target, 0)
    picked = x.gather(1, index[:, None]).squeeze(1)  # refuses an index out of range
    # (Inductor takes short rows of bfloat16 value by value: 0.9 ms where a copy and its pass take 0.2)
    logits = x.float() if _short(x) else x
    if smoothing > 0:
        top, log_sum, total = statistics_and_sum(logits)
        even = log_sum - total / x.shape[1]
    else:
        top, log_sum = statistics(logits)
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
            return F.cross_entropy(x, target, None, None, ignore_index, None, reduction, smoothing)

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
            gradient(x, top, log_sum, index, whole, whole * (1.0 - smoothing), whole * (smoothing / x.shape[1]), dx)
        return dx, None, None, None
