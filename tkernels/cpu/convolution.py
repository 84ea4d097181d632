"""Convolutions whose gradients PyTorch finds slowly on a CPU, as autograd functions that find them another way.

Measured over the layers of twelve networks at 16 images, on a CPU with bfloat16 instructions for products:
- a strided depthwise convolution's gradients in bfloat16 take 30 to 500 times as long as in float32;
- a depthwise weight's gradient has fast code in oneDNN up to windows of 3 x 3, in float32 alone; a compiled pass over
  the windows' places is 3 to 6 times as fast from 5 x 5 on, 6 to 20 times in bfloat16;
- both gradients of a 1 x 1 convolution are products of matrices, which in bfloat16 take 1.0 to 3 times less time as
  such, the fewer pixels there are; not so much beyond MOST_PIXELS, nor in float32;
- the weight's gradient of a strided 1 x 1 convolution of few channels, as of an image, writes past its memory in
  oneDNN (torch 2.14, float32: timm's repvgg_a0 dies of it in PyTorch itself); as a product it does not;
- the weight's gradient of a dilated convolution in bfloat16 with fewer than 16 channels a group is, channels last,
  memory that oneDNN never wrote (torch 2.14); in float32 it is right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tkernels.core.autograd import composed_where_differentiated, gradients_of, save, saved
from tkernels.cpu import buffers
from tkernels.cpu.compiler import Pass

CL = torch.channels_last
MOST_PIXELS = 1 << 14
# float32 values in a vector register
VECTOR = 16


class Ways(NamedTuple):
    """How to find the gradients of input and weight: 'torch', in 'float32', as a 'product', or by 'places'."""

    input: str
    weight: str


class Call(NamedTuple):
    """torch.conv2d's arguments, the dtype it runs in, and how its gradients are found."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    dtype: torch.dtype
    ways: Ways


def ways(
    pixels: int, weight: tuple[int, ...], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int],
    groups: int, dtype: torch.dtype,
) -> Ways | None:  # fmt: skip
    """What is faster than PyTorch for a convolution to so many pixels; None where nothing is."""
    out, group_in, height, width = weight
    low, small = dtype is torch.bfloat16, height <= 3 and width <= 3
    if group_in == 1 and groups == out > 1 and dilation == (1, 1):
        strided = stride != (1, 1)
        if small and not (low and strided):
            return None
        return Ways("float32" if low and strided else "torch", "float32" if small else "places")
    if low and groups > 1 and dilation != (1, 1) and group_in < VECTOR:
        return Ways("torch", "float32")
    if weight[2:] != (1, 1) or padding != (0, 0) or groups != 1:
        return None
    if stride != (1, 1):
        return Ways("torch", "product") if group_in < VECTOR else None
    return Ways("product", "product") if low and pixels <= MOST_PIXELS else None


def conv2d(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = _Convolution.apply(call, x, weight, bias)
    return y


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # (casts of our own: autocast would keep these, made without a gradient, for others that use the weight)
        low = weight.to(call.dtype)
        y = _composed(call, x.to(call.dtype), low, bias)
        save(ctx, x, weight, low if "torch" in call.ways or "product" in call.ways else None, bias)
        ctx.call = call
        return y

    @staticmethod
    def backward_composed(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        """The same in torch's own calls."""
        call: Call = ctx.call
        x, weight, _, bias = ctx.saved_tensors

        def composed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return _composed(call, x.to(call.dtype), weight.to(call.dtype), bias)

        with torch.autocast("cpu", enabled=False):
            return None, *gradients_of(composed, (x, weight, bias), ctx.needs_input_grad[1:], d)

    @staticmethod
    @composed_where_differentiated(backward_composed)
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        x, weight, low, _ = saved(ctx)
        needs = ctx.needs_input_grad[1:]
        with torch.autocast("cpu", enabled=False):
            dx = dw = None
            d = d.contiguous(memory_format=CL)
            if needs[0]:
                dx = _INPUT[call.ways.input](call, d, x, low if low is not None else weight).to(x.dtype)
            if needs[1]:
                dw = _WEIGHT[call.ways.weight](call, d, x.to(call.dtype), weight).to(weight.dtype)
            return None, dx, dw, d.sum((0, 2, 3)) if needs[2] else None


def _composed(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(call.dtype)
    return torch.conv2d(x, weight, bias, call.stride, call.padding, call.dilation, call.groups)


def _native(call: Call, d: Tensor, x: Tensor, weight: Tensor, of_input: bool) -> Tensor:
    found = torch.ops.aten.convolution_backward(
        d, x, weight, None, call.stride, call.padding, call.dilation, False, (0, 0), call.groups,
        (of_input, not of_input, False),
    )  # fmt: skip
    gradient: Tensor = found[0 if of_input else 1]
    return gradient


def _rows(x: Tensor) -> Tensor:
    """The pixels as a matrix [N * H * W, C], in their memory where they stand together."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _input_product(call: Call, d: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    out = buffers.channels_last(d.dtype, *x.shape)
    torch.mm(_rows(d), weight.flatten(1), out=_rows(out))
    return out


def _weight_product(call: Call, d: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    seen = x[:, :, :: call.stride[0], :: call.stride[1]]
    return torch.mm(_rows(d).t(), _rows(seen)).view(weight.shape)


@functools.cache
def _places(height: int, width: int, stride_h: int, stride_w: int) -> Pass:
    """The pass that finds, of each image, the gradient of a depthwise weight at each place of its window."""

    def places(d: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Of d [N, out_h, out_w, C] and the padded x [N, H, W, C]: for each place [N, C]."""
        down, right = (d.shape[1] - 1) * stride_h + 1, (d.shape[2] - 1) * stride_w + 1
        g = d.float()
        return tuple(
            (g * x[:, i : i + down : stride_h, j : j + right : stride_w].float()).sum((1, 2))
            for i in range(height)
            for j in range(width)
        )

    return Pass(places, f"depthwise weight gradient {height}x{width} stride {stride_h}x{stride_w}")


def _weight_by_places(call: Call, d: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    if 1 in d.shape[2:]:  # compiled for such a map, the pass would take its sizes for others than the window's
        return _WEIGHT["float32"](call, d, x, weight)
    (n, channels, h, w), (pad_h, pad_w) = x.shape, call.padding
    padded = buffers.dense(torch.float32, n, h + 2 * pad_h, w + 2 * pad_w, channels)
    padded.zero_()[:, pad_h : pad_h + h, pad_w : pad_w + w].copy_(x.permute(0, 2, 3, 1))
    run = _places(weight.shape[2], weight.shape[3], *call.stride)
    return torch.stack(run(d.permute(0, 2, 3, 1), padded), 2).sum(0).view(weight.shape)


_INPUT: dict[str, Callable[[Call, Tensor, Tensor, Tensor], Tensor]] = {
    "torch": lambda call, d, x, weight: _native(call, d, x.to(d.dtype), weight, True),
    "float32": lambda call, d, x, weight: _native(call, d.float(), x.float(), weight.float(), True),
    "product": _input_product,
}
_WEIGHT: dict[str, Callable[[Call, Tensor, Tensor, Tensor], Tensor]] = {
    "float32": lambda call, d, x, weight: _native(call, d.float(), x.float(), weight.float(), False),
    "product": _weight_product,
    "places": _weight_by_places,
}
