"""Products and convolutions of which nobody wants a gradient, with ReLU in oneDNN's own last step: one pass over the
result less. torch's Python functions have no such call; torch.compile makes it in evaluation."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from tkernels.cpu import compiler

mkldnn = torch.ops.mkldnn
PLAIN = (Tensor, torch.nn.Parameter)
# Elements of input and of output from which on a pass over the output is worth what the call takes more than torch's
# own, some 20 microseconds.
SMALLEST_INPUT, WORTH_IT = 1 << 16, 1 << 20


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """relu(x @ weight.T + bias) of dense x [M, C] and weight [K, C], float32 or bfloat16; None where the call is of
    another kind, or one that torch refuses."""
    # (what most calls fail on first: they are small)
    if _recorded() or type(x) not in PLAIN or x.numel() < SMALLEST_INPUT or type(weight) not in PLAIN:
        return None
    if x.dim() != 2 or weight.dim() != 2 or x.shape[0] * weight.shape[0] < WORTH_IT or not _ours(x, weight, bias):
        return None
    if x.shape[1] != weight.shape[1] or not (x.is_contiguous() and weight.is_contiguous()):
        return None
    if not _fits(bias, weight.shape[0]):
        return None
    y: Tensor = mkldnn._linear_pointwise(x, weight, bias, "relu", [], "")
    return y


def conv2d_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: object, padding: object, dilation: object, groups: int
) -> Tensor | None:
    """relu(conv2d(x, weight) + bias) of channels_last images, float32 or bfloat16; None as above."""
    if _recorded() or type(x) not in PLAIN or x.numel() < SMALLEST_INPUT or type(weight) not in PLAIN:
        return None
    numbers = _pair(stride), _pair(padding), _pair(dilation)
    if x.dim() != 4 or weight.dim() != 4 or None in numbers or type(groups) is not int or groups < 1:
        return None
    (out, group_in, height, width), (_, channels, h, w) = weight.shape, x.shape
    (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w) = numbers  # type: ignore[misc]
    if channels != group_in * groups or out == 0 or out % groups:
        return None
    if min(stride_h, stride_w, dilation_h, dilation_w, height, width) < 1 or min(pad_h, pad_w) < 0:
        return None
    out_h = (h + 2 * pad_h - dilation_h * (height - 1) - 1) // stride_h + 1
    out_w = (w + 2 * pad_w - dilation_w * (width - 1) - 1) // stride_w + 1
    if min(out_h, out_w) < 1 or x.shape[0] * out * out_h * out_w < WORTH_IT or not _ours(x, weight, bias):
        return None
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last) or not _fits(bias, out):
        return None
    y: Tensor = mkldnn._convolution_pointwise(
        x, weight.contiguous(memory_format=torch.channels_last), bias, (pad_h, pad_w), (stride_h, stride_w),
        (dilation_h, dilation_w), groups, "relu", [], "",
    )  # fmt: skip
    return y


def _recorded() -> bool:
    """Whether a trace would learn of sizes that are none of its business."""
    return is_dynamo_compiling() or torch._C._is_tracing()


def _ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN may take these tensors here, whatever their shapes."""
    dtype = x.dtype
    return (
        (dtype is torch.float32 or (dtype is torch.bfloat16 and _takes_bf16()))
        and all(
            t is None or (type(t) in PLAIN and t.dtype is dtype and t.device.type == "cpu" and not t.is_cuda
                          and t.layout is torch.strided and not t.is_neg())
            for t in (x, weight, bias)
        )
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and compiler.plain_eager()
    )  # fmt: skip


@functools.cache
def _takes_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and bool(mkldnn._is_mkldnn_bf16_supported())


def _fits(bias: Tensor | None, out: int) -> bool:
    return bias is None or (bias.dim() == 1 and bias.shape[0] == out and bias.is_contiguous())


def _pair(value: object) -> tuple[int, int] | None:
    """An int or a pair of ints as a pair; None for anything else."""
    if type(value) is int:
        return value, value
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return value[0], value[1]
    return None
