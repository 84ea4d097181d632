"""conv2d at the shapes of the CIFAR network: batch 256, 3x3 windows with padding 1, NHWC."""

from __future__ import annotations

import torch
from torch import Tensor

from perf.static.aot import Case
from perf.static.cases import DTYPES, case, empty, image, label, window
from tkernels.core.geometry import Geometry
from tkernels.ops.conv import kernels, kernels_backward, kernels_depthwise

# (input channels, output channels, rows and columns)
LAYERS = ((3, 32, 32), (32, 32, 32), (32, 64, 16), (64, 64, 16), (64, 128, 8))


def weight_of(g: Geometry) -> Tensor:
    return empty(g.out_channels, g.group_in, g.kernel_h, g.kernel_w)


def forward(g: Geometry, dtype: torch.dtype, activation: str | None = "relu", keep_input: bool = False,
            channels_last: bool = True, cast: bool = False) -> None:  # fmt: skip
    """``cast``: from an image in float32, as autocast gets it."""
    packed = kernels.launch_pack(weight_of(g), g, dtype)
    x = image(g.in_channels, g.height, torch.float32 if cast else dtype)
    kernels.launch_forward(x, packed, empty(g.out_channels), g, activation, keep_input, channels_last)


def dgrad(g: Geometry, dtype: torch.dtype, transposed: bool = False, channels_last: bool = True,
          activation: str | None = None) -> None:  # fmt: skip
    packed = kernels.launch_pack(weight_of(g), g, dtype, transposed)
    dy = image(g.out_channels, g.out_h, dtype)
    saved = dy if activation else None
    kernels_backward.launch_dgrad(dy, packed, g, dtype, channels_last, transposed, saved, activation)


def wgrad(g: Geometry, dtype: torch.dtype, activation: str | None = None, cast: bool = False,
          bias: bool = True) -> None:  # fmt: skip
    dy = image(g.out_channels, g.out_h, dtype)
    x = image(g.in_channels, g.height, torch.float32 if cast else dtype)
    saved = dy if activation else None
    workspace = kernels_backward.launch_wgrad(x, dy, g, True, bias, saved, activation)
    kernels_backward.launch_merge(workspace, g, weight_of(g), empty(g.out_channels) if bias else None)


def mask(g: Geometry, dtype: torch.dtype, nchw: bool) -> None:
    y = image(g.out_channels, g.out_h, dtype, channels_last=not nchw)
    kernels_backward.launch_mask(y, y, "relu")


def depthwise(g: Geometry, dtype: torch.dtype) -> None:
    x, dy = image(g.in_channels, g.height, dtype), image(g.out_channels, g.out_h, dtype)
    weight, bias = weight_of(g), empty(g.out_channels)
    kernels_depthwise.launch_forward(x, weight, bias, g, "relu")
    kernels_depthwise.launch_dgrad(dy, weight, g, dtype)
    kernels_backward.launch_merge(kernels_depthwise.launch_wgrad(x, dy, g), g, weight, bias)


def computed_operands() -> list[Case]:
    """Products one of whose operands, or both, are computed as they are loaded: by an activation's derivative, or by a
    cast of the image."""
    found, dtype = [], torch.bfloat16
    # a 1x1 window's gradients apply the derivative themselves: see ops/conv/op.py
    for g in (window(64, 256, 56, 1), window(256, 64, 56, 1)):
        what = label(g, "bf16")
        found += [
            case(f"conv dgrad in prologue {what}", dgrad, g, dtype, activation="relu", product=True),
            case(f"conv wgrad in prologue {what}", wgrad, g, dtype, "relu", product=True),
        ]
    # the images of CIFAR, and of ImageNet
    for g in (window(3, 32, 32), window(3, 64, 224, 7, 2)):
        what = label(g, "bf16")
        found += [
            case(f"conv forward cast {what}", forward, g, dtype, cast=True),
            case(f"conv wgrad cast {what}", wgrad, g, dtype, cast=True),
            case(f"conv wgrad cast in prologue {what}", wgrad, g, dtype, "relu", cast=True),
        ]
    return found


def cases() -> list[Case]:
    found = []
    for name, dtype in DTYPES.items():
        half = name == "bf16"
        for g in (window(*layer) for layer in LAYERS):
            what, product = label(g, name), half and not g.flattened
            found += [
                case(f"conv forward {what}", forward, g, dtype, product=product),
                case(f"conv wgrad {what}", wgrad, g, dtype, product=product),
            ]
            if not g.flattened:  # nobody asks for the image's gradient
                found.append(case(f"conv dgrad {what}", dgrad, g, dtype, not half, product=product))
        g, strided = window(64, 64, 16), window(64, 64, 16, stride=2)
        alone, strided_alone = window(64, 64, 16, groups=64), window(64, 64, 16, stride=2, groups=64)
        what = label(g, name)
        found += [
            case(f"conv forward gelu {what}", forward, g, dtype, "gelu", True, product=half),
            case(f"conv forward NCHW {what}", forward, g, dtype, None, channels_last=False, product=half),
            case(f"conv dgrad stride 2 {what}", dgrad, strided, dtype, product=half),
            case(f"conv dgrad NCHW {what}", dgrad, g, dtype, channels_last=False, product=half),
            case(f"conv wgrad relu {what}", wgrad, g, dtype, "relu"),
            case(f"conv depthwise {what}", depthwise, alone, dtype),
            case(f"conv depthwise stride 2 {what}", depthwise, strided_alone, dtype),
            case(f"conv mask {what}", mask, g, dtype, False),
            case(f"conv mask NCHW {what}", mask, g, dtype, True),
        ]
    return found + computed_operands()
