"""torch.ops.tkernels.linear and linear_backward."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tkernels.core import activation as activations
from tkernels.core import autograd
from tkernels.core import mode as runtime
from tkernels.library import common

if runtime.HAS_TRITON:
    from tkernels.ops.linear import kernels

__all__ = ["linear", "linear_backward"]


@torch.library.custom_op("tkernels::linear", mutates_args=())
def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(y, z): dropout(activation(input @ weight.T + bias)) and the activation's input where its gradient needs it.

    input: (\\*, in_features); weight: (out_features, in_features); bias: (out_features) or one element; all of one
    dtype. ``seed``: int64 (), dropout's, None for none.
    """
    keep = activations.needs_input(activation, p)
    if runtime.use_triton(input, weight, bias):
        x, w = kernels.dense_rows(input), kernels.dense_weight(weight)
        y, z = kernels.launch_forward(x, w, bias, activation, p, seed, save_z=keep)
        return y, common.nothing(y) if z is None else z
    with common.without_autocast(input.device):
        z = torch.nn.functional.linear(input, weight, bias)
        y = _epilogue(z, activation, p, seed)
    return y, z if keep else common.nothing(y)


def _epilogue(z: Tensor, activation: str | None, p: float, seed: Tensor | None) -> Tensor:
    y = activations.apply(z, activation)
    return y if seed is None else y * common.dropout_factors(y, p, seed)


@linear.register_fake
def _(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    y = input.new_empty((*input.shape[:-1], weight.shape[0]))
    return y, torch.empty_like(y) if activations.needs_input(activation, p) else common.nothing(y)


@torch.library.custom_op("tkernels::linear_backward", mutates_args=())
def linear_backward(
    dy: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    saved: Tensor | None,
    activation: str | None,
    p: float,
    seed: Tensor | None,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias: the input's where ``weight`` is given, the weight's where ``input`` is.

    ``saved``: linear's z where that is kept, else its y. ``seed`` None with p > 0 (after a
    ReLU): what is 0 in y was dropped or cut off, and passes nothing.
    """
    dx = dw = db = None
    if runtime.use_triton(dy, input, weight):
        dy = kernels.dense_rows(dy)
        if weight is not None:
            dx = kernels.launch_dgrad(dy, kernels.dense_weight(weight), saved, activation, p, seed)
        if input is not None or needs_bias:
            x = None if input is None else kernels.dense_rows(input)
            dw, db = kernels.launch_wgrad(dy, x, saved, activation, p, seed, needs_bias)
    else:
        with common.without_autocast(dy.device):
            dx, dw, db = _torch_backward(dy, input, weight, saved, activation, p, seed, needs_bias)
    return cast(Any, common.results((dx, dw, db), dy))


def _torch_backward(
    dy: Tensor, input: Tensor | None, weight: Tensor | None, saved: Tensor | None, activation: str | None, p: float,
    seed: Tensor | None, needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    if seed is not None:
        dy = dy * common.dropout_factors(dy.contiguous(), p, seed)
    elif p > 0:
        dy = dy / (1.0 - p) if p < 1.0 else dy
    dz = activations.gradient(dy, saved, activation)
    rows = dz.reshape(-1, dz.shape[-1])
    dx = None if weight is None else dz.matmul(weight)
    dw = None if input is None else rows.t().mm(input.reshape(-1, input.shape[-1]))
    return dx, dw, rows.sum(0) if needs_bias else None


@linear_backward.register_fake
def _(
    dy: Tensor, input: Tensor | None, weight: Tensor | None, saved: Tensor | None, activation: str | None, p: float,
    seed: Tensor | None, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n = dy.shape[-1]
    dx = None if weight is None else dy.new_empty((*dy.shape[:-1], weight.shape[1]))
    dw = None if input is None else dy.new_empty((n, input.shape[-1]))
    return cast(Any, common.results((dx, dw, dy.new_empty(n) if needs_bias else None), dy))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, weight, bias, activation, p, seed = inputs
    y, z = output
    needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    saved = None if activation is None else z if activations.needs_input(activation, p) else y
    ctx.mark_non_differentiable(z)
    autograd.save(
        ctx,
        input if needs_weight else None,
        weight if needs_input else None,
        saved,
        seed if activation != "relu" else None,
    )
    ctx.activation, ctx.p = activation, p
    ctx.bias_elements = bias.numel() if needs_bias else 0


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needs_bias = ctx.bias_elements > 0
    *tensors, seed = autograd.saved(ctx)
    found = torch.ops.tkernels.linear_backward(dy, *tensors, ctx.activation, ctx.p, seed,
                                               needs_bias)  # fmt: skip
    dx, dw, db = (t if need else None for t, need in zip(found, ctx.needs_input_grad))
    if db is not None and ctx.bias_elements != db.shape[0]:
        db = db.sum(0, keepdim=True)
    return dx, dw, db, None, None, None


linear.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.tkernels.linear)
def _flops(input_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    rows = 1
    for size in input_shape[:-1]:
        rows *= size
    return 2 * rows * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.tkernels.linear_backward)
def _backward_flops(
    dy_shape: Any, input_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    rows = 1
    for size in dy_shape[:-1]:
        rows *= size
    products = 0
    for other in (input_shape, weight_shape):
        products += 0 if other is None else 2 * rows * dy_shape[-1] * other[-1]
    return products
