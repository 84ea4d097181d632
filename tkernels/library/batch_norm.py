"""torch.ops.tkernels.batch_norm and batch_norm_backward. Functional: the caller moves the running
statistics (tkernels.ops.batch_norm.op.track), in arithmetic a compiler fuses into one small kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tkernels.core import activation as activations
from tkernels.core import autograd
from tkernels.core import mode as runtime
from tkernels.core.geometry import matrix
from tkernels.core.records import BatchNorm, Norm
from tkernels.library import common
from tkernels.ops.batch_norm import op as ops

if runtime.HAS_TRITON:
    from tkernels.ops.batch_norm import kernels

__all__ = ["batch_norm", "batch_norm_backward"]


@torch.library.custom_op("tkernels::batch_norm", mutates_args=())
def batch_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """(y, stats): activation(batch norm + residual), and without running statistics the batch's, float32 [4, C]: mean,
    1 / std, and what rounding to float32 took from each. ``residual``: of the input's shape and dtype."""
    layout = ops.memory_format(input)
    x = input.contiguous(memory_format=layout)
    if residual is not None:
        residual = residual.contiguous(memory_format=layout)
    if runtime.use_triton(input, residual, weight, bias, running_mean, running_var):
        m = matrix(x.shape, layout != torch.contiguous_format)
        bn = BatchNorm(running_mean, running_var, weight, bias, running_mean is None, 0.0, eps)
        measured = ops.triton_statistics(x, m, bn) if bn.training else None
        y = kernels.launch_normalize(x, m, ops.norm_of(bn, measured), activation, residual)
        return y, common.nothing(x) if measured is None else measured
    y = _torch_body(x, residual, weight, bias, running_mean, running_var, eps, activation)
    stats = common.nothing(x) if running_mean is not None else torch_statistics(x, eps)
    return y.contiguous(memory_format=layout), stats


def _torch_body(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, eps: float, activation: str | None,
) -> Tensor:  # fmt: skip
    y = torch.nn.functional.batch_norm(x, running_mean, running_var, weight, bias, running_mean is None, 0.0, eps)
    return activations.apply(y if residual is None else y + residual, activation)


def torch_statistics(x: Tensor, eps: float) -> Tensor:
    """What the kernels' finalize writes: float32 [4, C]."""
    axes = [0, *range(2, x.dim())]
    exact = torch.stack([x.double().mean(axes), (x.double().var(axes, correction=0) + eps).rsqrt()])
    rounded = exact.float()
    return torch.cat([rounded, (exact - rounded.double()).float()])


@batch_norm.register_fake
def _(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, eps: float, activation: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = common.empty(input.shape, input, input.dtype, ops.memory_format(input))
    if running_mean is not None:
        return y, common.nothing(y)
    return y, input.new_empty((4, input.shape[1]), dtype=torch.float32)


@torch.library.custom_op("tkernels::batch_norm_backward", mutates_args=())
def batch_norm_backward(
    dy: Tensor,
    input: Tensor | None,
    saved: Tensor | None,
    saved_is: str | None,
    mean: Tensor,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    channels_last: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, residual (only where an activation stands between it and ``dy``), weight and bias, each where
    ``needs`` says so. ``mean``, ``var``: running statistics, or the batch's [4, C] and None. ``saved``: what the
    activation's gradient needs beside the input, by ``saved_is``: 'output', 'residual' or None."""
    layout = _format(dy, channels_last)
    dy = dy.contiguous(memory_format=layout)
    flags = (needs[0], needs[1] and activation is not None, needs[2], needs[3])
    if runtime.use_triton(dy, input, weight, bias):
        m = matrix(dy.shape, channels_last)
        norm = Norm(ops.dense(mean), ops.dense(var), ops.dense(weight), ops.dense(bias), eps)
        found = ops.triton_backward(dy, input, saved, saved_is, norm, m, activation, flags)
        return cast(Any, common.results(found, dy))
    return cast(Any, common.results(
        _torch_backward(dy, input, saved, saved_is, mean, var, weight, bias, eps, activation, flags), dy
    ))  # fmt: skip


def _torch_backward(
    dy: Tensor, x: Tensor | None, saved: Tensor | None, saved_is: str | None, mean: Tensor, var: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, eps: float, activation: str | None, needs: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    if saved_is == "output":
        dy = activations.gradient(dy, saved, activation)
    dresidual = dy.clone() if needs[1] and saved_is == "output" else None
    residual = saved if saved_is == "residual" else None
    still = None if saved_is == "output" else activation
    running: Any = (None, None) if var is None else (mean, var)

    def body(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return _torch_body(x, residual, weight, bias, running[0], running[1], eps, still)

    x = dy if x is None else x  # only its shape counts then
    found = common.gradients(body, (x, residual, weight, bias), (needs[0], needs[1] and residual is not None,
                                                                 *needs[2:]), dy)  # fmt: skip
    if dresidual is not None:
        found[1] = dresidual
    return [t if t is None or i > 1 else t.contiguous(memory_format=_like(dy)) for i, t in enumerate(found)]


def _like(t: Tensor) -> torch.memory_format:
    return _format(t, not t.is_contiguous())


def _format(t: Tensor, channels_last: bool) -> torch.memory_format:
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if t.dim() == 4 else torch.channels_last_3d


@batch_norm_backward.register_fake
def _(
    dy: Tensor, input: Tensor | None, saved: Tensor | None, saved_is: str | None, mean: Tensor, var: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, eps: float, activation: str | None, channels_last: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    layout = _format(dy, channels_last)
    dx = common.empty(dy.shape, dy, dy.dtype, layout) if needs[0] else None
    dresidual = common.empty(dy.shape, dy, dy.dtype, layout) if needs[1] and activation is not None else None
    dweight = torch.empty_like(weight) if needs[2] and weight is not None else None
    dbias = torch.empty_like(bias) if needs[3] and bias is not None else None
    return cast(Any, common.results((dx, dresidual, dweight, dbias), dy))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, residual, weight, bias, running_mean, running_var, eps, activation = inputs
    y, stats = output
    ctx.mark_non_differentiable(stats)
    layout = ops.memory_format(input)
    ctx.channels_last = layout != torch.contiguous_format
    given = running_mean is not None
    needs = ctx.needs_input_grad[:4]
    ctx.saved_is, needs_x = ops.kept_for_backward(residual is not None, activation, not given, needs)
    saved = y if ctx.saved_is == "output" else residual if ctx.saved_is == "residual" else None
    autograd.save(
        ctx,
        input.contiguous(memory_format=layout) if needs_x else None,
        saved if saved is y or saved is None else saved.contiguous(memory_format=layout),
        running_mean if given else stats, running_var if given else None, weight, bias,
    )  # fmt: skip
    ctx.eps, ctx.activation = eps, activation


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, saved, mean, var, weight, bias = autograd.saved(ctx)
    needs = list(ctx.needs_input_grad[:4])
    found = torch.ops.tkernels.batch_norm_backward(
        dy, x, saved, ctx.saved_is, mean, var, weight, bias, ctx.eps, ctx.activation, ctx.channels_last, needs
    )  # fmt: skip
    gradients = [t if need else None for t, need in zip(found, needs)]
    if needs[1] and ctx.activation is None:
        gradients[1] = dy
    return *gradients, None, None, None, None


batch_norm.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula([torch.ops.tkernels.batch_norm, torch.ops.tkernels.batch_norm_backward])
def _flops(*_: Any, out_shape: Any = None, **__: Any) -> int:
    return 0  # as for torch's own: FlopCounterMode counts products
