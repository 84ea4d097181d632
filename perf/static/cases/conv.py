"""conv2d at the shapes of the CIFAR network: batch 256, 3x3 windows with padding 1, NHWC."""

from __future__ import annotations

import functools

import torch

from perf.static.aot import Case
from tkernels.core.geometry import Geometry
from tkernels.ops.conv import kernels as conv
from tkernels.ops.conv import kernels_backward as conv_backward
from tkernels.ops.conv import kernels_depthwise as conv_depthwise

BATCH = 256
# (input channels, output channels, rows and columns)
LAYERS = ((3, 32, 32), (32, 32, 32), (32, 64, 16), (64, 64, 16), (64, 128, 8))


def window3x3(c_in: int, c_out: int, size: int, stride: int = 1, groups: int = 1) -> Geometry:
    """A 3x3 convolution with padding 1 of a square image."""
    out = (size - 1) // stride + 1
    return Geometry(c_in, c_out, groups, size, size, 3, 3, stride, stride, 1, 1, 1, 1, out, out)


def window1x1(c_in: int, c_out: int, size: int) -> Geometry:
    """A 1x1 convolution of a square image."""
    return Geometry(c_in, c_out, 1, size, size, 1, 1, 1, 1, 0, 0, 1, 1, size, size)


def image(channels: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(BATCH, size, size, channels, device="cuda", dtype=dtype).permute(0, 3, 1, 2)


def forward(g: Geometry, dtype: torch.dtype, activation: str | None, keep_input: bool, channels_last: bool,
            cast: bool = False) -> None:  # fmt: skip
    """``cast``: from an image in float32, as autocast gets it."""
    weight = torch.empty(g.out_channels, g.group_in, g.kernel_h, g.kernel_w, device="cuda")
    bias = torch.empty(g.out_channels, device="cuda")
    packed = conv.launch_pack(weight, g, dtype)
    x = image(g.in_channels, g.height, torch.float32 if cast else dtype)
    conv.launch_forward(x, packed, bias, g, activation, keep_input, channels_last)


def dgrad(g: Geometry, dtype: torch.dtype, transposed: bool, channels_last: bool,
          activation: str | None = None) -> None:  # fmt: skip
    weight = torch.empty(g.out_channels, g.group_in, g.kernel_h, g.kernel_w, device="cuda")
    packed = conv.launch_pack(weight, g, dtype, transposed)
    dy = image(g.out_channels, g.out_h, dtype)
    saved = dy if activation else None
    conv_backward.launch_dgrad(dy, packed, g, dtype, channels_last, transposed, saved, activation)


def wgrad(g: Geometry, dtype: torch.dtype, activation: str | None, cast: bool = False) -> None:
    weight = torch.empty(g.out_channels, g.group_in, g.kernel_h, g.kernel_w, device="cuda")
    bias = torch.empty(g.out_channels, device="cuda")
    dy = image(g.out_channels, g.out_h, dtype)
    saved = dy if activation else None
    x = image(g.in_channels, g.height, torch.float32 if cast else dtype)
    workspace = conv_backward.launch_wgrad(x, dy, g, True, True, saved, activation)
    conv_backward.launch_merge(workspace, g, weight, bias)


def mask(g: Geometry, dtype: torch.dtype, nchw: bool) -> None:
    dy = torch.empty(BATCH, g.out_channels, g.out_h, g.out_w, device="cuda", dtype=dtype) if nchw else None
    y = image(g.out_channels, g.out_h, dtype)
    conv_backward.launch_mask(y if dy is None else dy, y if dy is None else dy, "relu", nchw)


def depthwise(g: Geometry, dtype: torch.dtype) -> None:
    weight = torch.empty(g.out_channels, 1, g.kernel_h, g.kernel_w, device="cuda")
    bias = torch.empty(g.out_channels, device="cuda")
    x, dy = image(g.in_channels, g.height, dtype), image(g.out_channels, g.out_h, dtype)
    conv_depthwise.launch_forward(x, weight, bias, g, "relu")
    conv_depthwise.launch_dgrad(dy, weight, g, dtype)
    conv_backward.launch_merge(conv_depthwise.launch_wgrad(x, dy, g), g, weight, bias)


def computed_operands() -> list[Case]:
    """Products one of whose operands, or both, are computed as they are loaded: by an activation's derivative, or by a
    cast of the image."""
    dtype, run = torch.bfloat16, functools.partial
    # a 1x1 window's gradients apply the derivative themselves: see ops/conv.py
    wider, narrower = (window1x1(c_in, c_out, 56) for c_in, c_out in ((64, 256), (256, 64)))
    # the images of CIFAR, and of ImageNet
    small, large = window3x3(3, 32, 32), Geometry(3, 64, 1, 224, 224, 7, 7, 2, 2, 3, 3, 1, 1, 112, 112)
    found = []
    for g in (wider, narrower):
        label = f"{g.in_channels}-{g.out_channels}@{g.height} bf16"
        found += [
            Case(f"conv dgrad in prologue {label}", run(dgrad, g, dtype, False, True, "relu"), True),
            Case(f"conv wgrad in prologue {label}", run(wgrad, g, dtype, "relu"), True),
        ]
    for g in (small, large):
        label = f"{g.in_channels}-{g.out_channels}@{g.height} bf16"
        found += [
            Case(f"conv forward cast {label}", run(forward, g, dtype, "relu", False, True, True)),
            Case(f"conv wgrad cast {label}", run(wgrad, g, dtype, None, True)),
            Case(f"conv wgrad cast in prologue {label}", run(wgrad, g, dtype, "relu", True)),
        ]
    return found


def cases() -> list[Case]:
    found = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for c_in, c_out, size in LAYERS:
            g = window3x3(c_in, c_out, size)
            product = dtype != torch.float32 and not g.flattened
            label = f"{c_in}-{c_out}@{size} {name}"
            found += [
                Case(f"conv forward {label}", functools.partial(forward, g, dtype, "relu", False, True), product),
                Case(f"conv wgrad {label}", functools.partial(wgrad, g, dtype, None), product),
            ]
            if not g.flattened:  # nobody asks for the image's gradient
                dx = functools.partial(dgrad, g, dtype, dtype == torch.float32, True)
                found.append(Case(f"conv dgrad {label}", dx, product))
        g = window3x3(64, 64, 16)
        strided = window3x3(64, 64, 16, stride=2)
        label = f"64-64@16 {name}"
        product = dtype != torch.float32
        found += [
            Case(f"conv forward gelu {label}", functools.partial(forward, g, dtype, "gelu", True, True), product),
            Case(f"conv forward NCHW {label}", functools.partial(forward, g, dtype, None, False, False), product),
            Case(f"conv dgrad stride 2 {label}", functools.partial(dgrad, strided, dtype, False, True), product),
            Case(f"conv dgrad NCHW {label}", functools.partial(dgrad, g, dtype, False, False), product),
            Case(f"conv wgrad relu {label}", functools.partial(wgrad, g, dtype, "relu")),
            Case(f"conv depthwise {label}", functools.partial(depthwise, window3x3(64, 64, 16, groups=64), dtype)),
            Case(f"conv depthwise stride 2 {label}", functools.partial(depthwise, window3x3(64, 64, 16, 2, 64), dtype)),
            Case(f"conv mask {label}", functools.partial(mask, g, dtype, False)),
            Case(f"conv mask NCHW {label}", functools.partial(mask, g, dtype, True)),
        ]
    return found + computed_operands()
