"""torch.ops.tkernels.cross_entropy and cross_entropy_backward."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tkernels.core import autograd
from tkernels.core import mode as runtime
from tkernels.core.records import LossOptions
from tkernels.library import common
from tkernels.ops.cross_entropy import op as ops

if runtime.HAS_TRITON:
    from tkernels.ops.cross_entropy import kernels
    from tkernels.ops.cross_entropy import layout as class_layout

__all__ = ["cross_entropy", "cross_entropy_backward"]


def _torch_body(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, smoothing: float,
    loss_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    weight = None if weight is None else weight.to(loss_dtype)
    target = target.to(loss_dtype) if target.is_floating_point() else target
    return torch.nn.functional.cross_entropy(input.to(loss_dtype), target, weight, None, ignore_index, None, reduction,
                                             smoothing)  # fmt: skip


def _stats_shape(input: Tensor, target: Tensor, smoothing: float) -> tuple[Any, Any]:
    n_classes = input.shape[1] if input.dim() > 1 else input.shape[0]
    return 3 if target.is_floating_point() or smoothing > 0 else 2, input.numel() // n_classes


@torch.library.custom_op("tkernels::cross_entropy", mutates_args=())
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    loss_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, rows' statistics, what the mean was divided by). The latter two are what the kernels' backward reads;
    PyTorch's body, which does not, leaves them zero. input: not empty; loss_dtype: float32 under autocast."""
    if runtime.use_triton(input, target, weight):
        loss, saved = ops.forward(input, target, weight, LossOptions(ignore_index, reduction, smoothing), loss_dtype)
        stats, count = saved[3:]
        return loss, stats, common.nothing(stats) if count is None else count
    stats = input.new_zeros(_stats_shape(input, target, smoothing), dtype=torch.float32)
    with common.without_autocast(input.device):
        loss = _torch_body(input, target, weight, ignore_index, reduction, smoothing, loss_dtype)
    return loss.contiguous(), stats, stats.new_zeros(()) if reduction == "mean" else common.nothing(stats)


@cross_entropy.register_fake
def _(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, smoothing: float,
    loss_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = input.shape[:1] + input.shape[2:] if reduction == "none" and input.dim() > 1 else ()
    stats = input.new_empty(_stats_shape(input, target, smoothing), dtype=torch.float32)
    count = stats.new_empty(()) if reduction == "mean" else common.nothing(stats)
    return input.new_empty(shape, dtype=loss_dtype), stats, count


@torch.library.custom_op("tkernels::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    count: Tensor,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    needs_input: bool,
    needs_target: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the logits and of target probabilities, each where needed, contiguous."""
    dx = dp = None
    if runtime.use_triton(input, target, weight):
        x = class_layout.readable(input)
        p = class_layout.readable(target) if target.is_floating_point() else target.contiguous()
        w, divisor = None if weight is None else weight.contiguous(), common.something(count)
        options = LossOptions(ignore_index, reduction, smoothing)
        if needs_input:
            dx = kernels.launch_backward(grad, x, p, w, stats, divisor, options)
        if needs_target:
            dp = kernels.launch_target_backward(grad, x, p, w, stats, divisor, options)
    else:

        def body(input: Tensor, target: Tensor) -> Tensor:
            return _torch_body(input, target, weight, ignore_index, reduction, smoothing, grad.dtype)

        dx, dp = common.gradients(body, (input, target), (needs_input, needs_target), grad)
    return cast(Any, common.results([None if t is None else t.contiguous() for t in (dx, dp)], input))


@cross_entropy_backward.register_fake
def _(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, stats: Tensor, count: Tensor,
    ignore_index: int, reduction: str, smoothing: float, needs_input: bool, needs_target: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dx = input.new_empty(input.shape) if needs_input else None
    dp = target.new_empty(target.shape) if needs_target else None
    return cast(Any, common.results((dx, dp), input))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, target, weight, *options, _loss_dtype = inputs
    _, stats, count = output
    ctx.mark_non_differentiable(stats, count)
    autograd.save(ctx, input, target, weight, stats, count)
    ctx.options = options


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:2]
    found = torch.ops.tkernels.cross_entropy_backward(grad, *autograd.saved(ctx), *ctx.options, *needs)
    dx, dp = (t if need else None for t, need in zip(found, needs))
    return dx, dp, None, None, None, None, None


cross_entropy.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula([torch.ops.tkernels.cross_entropy, torch.ops.tkernels.cross_entropy_backward])
def _flops(*_: Any, out_shape: Any = None, **__: Any) -> int:
    return 0  # as for torch's own: FlopCounterMode counts products
