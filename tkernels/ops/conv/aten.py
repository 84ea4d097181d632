"""PyTorch's own products of a convolution, as steps of our passes: what routing.py leaves to cuDNN.

Maps are NHWC and dense, the weight in their dtype. Each function takes slots too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tkernels.core import plan
from tkernels.core.geometry import Geometry, as_nhwc, empty_pixels


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    """conv(x, weight) + bias."""
    bias = bias if bias is None or bias.dtype == weight.dtype else bias.to(weight.dtype)
    return plan.call(_forward, x, weight, bias, g)


def input_gradient(dy: Tensor, x: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    """Of ``x`` only its sizes are read."""
    return plan.call(_input_gradient, dy, x, weight, g)


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, like: Tensor, g: Geometry) -> Tensor:
    """In the dtype and layout of ``like``, the parameter."""
    return plan.call(_weight_gradient, dy, x, weight, like, g)


def weight_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as the products take it."""
    return weight.to(dtype, memory_format=torch.channels_last)


# (meta tensors stand for slots: there each says itself how its result is laid out)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    if x.is_meta:
        return empty_pixels(x, (x.shape[0], g.out_channels, g.out_h, g.out_w), x.dtype, True)
    y = torch.ops.aten.convolution(x, weight, bias, *_window(g), False, (0, 0), g.groups)
    return as_nhwc(y)


def _input_gradient(dy: Tensor, x: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    if dy.is_meta:
        return empty_pixels(dy, (dy.shape[0], g.in_channels, g.height, g.width), dy.dtype, True)
    return as_nhwc(_gradients(dy, x, weight, g, (True, False, False))[0])


def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, like: Tensor, g: Geometry) -> Tensor:
    if dy.is_meta:
        return torch.empty_like(like)
    dw: Tensor = _gradients(dy, x, weight, g, (False, True, False))[1]
    if dw.dtype == like.dtype and dw.stride() == like.stride():
        return dw
    return torch.empty_like(like).copy_(dw)


def _gradients(dy: Tensor, x: Tensor, weight: Tensor, g: Geometry, wanted: tuple[bool, bool, bool]) -> Any:
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *_window(g), False, (0, 0), g.groups, wanted)


def _window(g: Geometry) -> tuple[tuple[int, int], ...]:
    """Stride, padding, dilation."""
    return (g.stride_h, g.stride_w), (g.pad_h, g.pad_w), (g.dilation_h, g.dilation_w)
