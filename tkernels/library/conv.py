"""torch.ops.tkernels.conv2d and conv2d_backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from tkernels.core import activation as activations
from tkernels.core import autograd
from tkernels.core import mode as runtime
from tkernels.core.geometry import Geometry, suggests_channels_last
from tkernels.library import common
from tkernels.ops.conv import op as ops

__all__ = ["conv2d", "conv2d_backward"]


def _geometry(input_size: Any, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Geometry:
    arguments = tuple(input_size), tuple(weight.shape), tuple(stride), tuple(padding), tuple(dilation), groups
    return ops.described(*arguments)  # sizes may be symbolic, which no cache can hold


def _torch_body(
    x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry, dtype: torch.dtype, activation: str | None
) -> tuple[Tensor, Tensor]:
    """(y, the activation's input)."""
    bias = None if bias is None else bias.to(dtype)
    z = torch.nn.functional.conv2d(x.to(dtype), weight.to(dtype), bias, (g.stride_h, g.stride_w), (g.pad_h, g.pad_w),
                                   (g.dilation_h, g.dilation_w), g.groups)  # fmt: skip
    return activations.apply(z, activation), z


@torch.library.custom_op("tkernels::conv2d", mutates_args=())
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(y, z): activation(conv2d(input, weight) + bias) in ``dtype`` and the activation's input where its gradient needs
    it. input: (N, C, H, W); channels_last out where the input or the weight is; parameters may have another dtype."""
    g = _geometry(input.shape, weight, stride, padding, dilation, groups)
    keep = activations.needs_input(activation)
    if _takes_triton(input, weight, bias, g, activation, dtype):
        y, z, _ = ops.forward(input.to(dtype), weight, bias, g, dtype, activation, keep)
        return y, common.nothing(y) if z is None else z
    with common.without_autocast(input.device):
        y, z = _torch_body(input, weight, bias, g, dtype, activation)
    layout = common.layout(suggests_channels_last(input) or suggests_channels_last(weight))
    return y.contiguous(memory_format=layout), z.contiguous(memory_format=layout) if keep else common.nothing(y)


def _takes_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry, activation: str | None, dtype: torch.dtype
) -> bool:
    return runtime.use_triton(x, weight, bias) and not (
        runtime.get_backend() == "auto" and ops.torch_is_faster(x, weight, bias, g, activation, dtype)
    )


@conv2d.register_fake
def _(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, activation: str | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    g = _geometry(input.shape, weight, stride, padding, dilation, groups)
    layout = common.layout(suggests_channels_last(input) or suggests_channels_last(weight))
    y = common.empty((input.shape[0], g.out_channels, g.out_h, g.out_w), input, dtype, layout)
    return y, torch.empty_like(y) if activations.needs_input(activation) else common.nothing(y)


@torch.library.custom_op("tkernels::conv2d_backward", mutates_args=())
def conv2d_backward(
    dy: Tensor,
    input: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    saved: Tensor | None,
    input_size: Sequence[int],
    channels_last: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    needs_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input (if ``needs_input``, in ``dy``'s dtype, laid out as ``channels_last`` says), the weight
    (where ``input`` is given) and the bias (where it is). ``saved``: conv2d's z where that is kept, else its y."""
    g = _geometry(input_size, weight, stride, padding, dilation, groups)
    if runtime.use_triton(dy, weight):
        if input is not None and not g.flattened:
            input = input.to(dy.dtype)
        found = ops.backward(dy, input, weight, bias, None, saved, g, activation, channels_last, needs_input)
        return cast(Any, common.results(found, dy))
    with common.without_autocast(dy.device):
        dz = activations.gradient(dy, saved, activation)
        wanted = [needs_input, input is not None, bias is not None]
        x = dy.new_zeros(()).expand(tuple(input_size)) if input is None else input.to(dy.dtype)
        dx, dw, db = torch.ops.aten.convolution_backward(
            dz, x, weight.to(dy.dtype), [g.out_channels], list(stride), list(padding), list(dilation), False, [0, 0],
            groups, wanted,
        )  # fmt: skip
    dx = dx.contiguous(memory_format=common.layout(channels_last)) if needs_input else None
    dw = torch.empty_like(weight).copy_(dw) if input is not None else None
    return cast(Any, common.results((dx, dw, None if bias is None else db.to(bias.dtype)), dy))


@conv2d_backward.register_fake
def _(
    dy: Tensor, input: Tensor | None, weight: Tensor, bias: Tensor | None, saved: Tensor | None,
    input_size: Sequence[int], channels_last: bool, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, activation: str | None, needs_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx = common.empty(tuple(input_size), dy, dy.dtype, common.layout(channels_last)) if needs_input else None
    dw = None if input is None else torch.empty_like(weight)
    return cast(Any, common.results((dx, dw, None if bias is None else torch.empty_like(bias)), dy))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, weight, bias, *geometry, activation, _dtype = inputs
    y, z = output
    _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    ctx.mark_non_differentiable(z)
    saved = None if activation is None else z if activations.needs_input(activation) else y
    autograd.save(ctx, input if needs_weight else None, weight, bias if needs_bias else None, saved)
    ctx.geometry, ctx.activation, ctx.input_size = geometry, activation, input.shape
    ctx.input_dtype, ctx.channels_last = input.dtype, suggests_channels_last(input)


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.tkernels.conv2d_backward(
        dy, *autograd.saved(ctx), ctx.input_size, ctx.channels_last, *ctx.geometry, ctx.activation,
        ctx.needs_input_grad[0],
    )  # fmt: skip
    dx, dw, db = (t if need else None for t, need in zip(found, ctx.needs_input_grad))
    return None if dx is None else dx.to(ctx.input_dtype), dw, db, *[None] * 6


conv2d.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.tkernels.conv2d)
def _flops(input_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return conv_flop_count(input_shape, weight_shape, out_shape[0])


@register_flop_formula(torch.ops.tkernels.conv2d_backward)
def _backward_flops(
    dy_shape: Any, input_shape: Any, weight_shape: Any, bias_shape: Any, saved_shape: Any, input_size: Any,
    channels_last: bool, stride: Any, padding: Any, dilation: Any, groups: int, activation: str | None,
    needs_input: bool, *_: Any, out_shape: Any = None, **__: Any,
) -> int:  # fmt: skip
    product: int = conv_flop_count(list(input_size), weight_shape, dy_shape)
    return product * ((input_shape is not None) + needs_input)
