"""Who computes the products of a conv stage's layers under backend 'auto'."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from tkernels.core import _torch, autotune, mode, plan, targets
from tkernels.core.geometry import Geometry, matrix
from tkernels.core.records import OURS, Norm, Route, StageCall
from tkernels.ops.batch_norm import kernels as batch_norm
from tkernels.ops.conv import aten, routing
from tkernels.ops.conv import kernels as conv
from tkernels.ops.conv import kernels_backward as conv_backward
from tkernels.ops.conv_stage import kernels, kernels_backward

__all__ = ["of"]


def of(x: Tensor, stage: StageCall, measured: list[bool]) -> tuple[Route, ...]:
    """Of each layer; empty where all are ours. ``measured``: of each whether the batch's statistics normalise it."""
    if not mode.asks_choosers(cudnn=True):
        return ()
    if mode.traced():
        sizes = [(*g[:3], *g[5:9]) for g in stage.geometries]
        found = [
            Route(*_in_traces(*[operator.index(size) for size in layer], stage.dtype, each)) if g.symmetric else OURS
            for layer, g, each in zip(sizes, stage.geometries, measured)
        ]
    else:
        found = [_of_layer(x, g, stage.dtype, each) for g, each in zip(stage.geometries, measured)]
    return tuple(found) if any(by_pytorch for each in found for by_pytorch in each) else ()


@_torch.constant_in_traces  # which has no business with facts of GPUs
def _in_traces(
    in_channels: int, out_channels: int, groups: int, kernel_h: int, kernel_w: int, stride_h: int, stride_w: int,
    dtype: torch.dtype, measured: bool,
) -> tuple[bool, ...]:  # fmt: skip
    g = routing.large(in_channels, out_channels, groups, kernel_h, kernel_w, stride_h, stride_w)
    precision = mode.dot_precision(dtype, "conv")
    return tuple(routing.of_stage(g, routing.MANY, dtype, precision, measured, targets.current()))


def _of_layer(x: Tensor, g: Geometry, dtype: torch.dtype, measured: bool) -> Route:
    """By estimate, or by the clock where autotuning is on."""
    images, precision, target = x.shape[0], mode.dot_precision(dtype, "conv"), targets.current()
    if not (autotune.enabled and measured and routing.cudnn_competes(g, dtype, precision, target)):
        return routing.of_stage(g, images, dtype, precision, measured, target)
    return autotune.measured_route("conv_stage", images, (g, dtype, precision), _calls(x, g, dtype))


def _calls(x: Tensor, g: Geometry, dtype: torch.dtype) -> autotune.Bodies:
    """Of each pass (ours, PyTorch's with what ours does beside it), on maps without values."""
    images = x.shape[0]
    maps = conv.empty_pixels(x.detach(), (images, g.in_channels, g.height, g.width), dtype, True)
    dy = conv.empty_pixels(maps, (images, g.out_channels, g.out_h, g.out_w), dtype, True)
    weight = conv.empty_pixels(maps, (g.out_channels, g.group_in, g.kernel_h, g.kernel_w), dtype, True)
    stats = maps.new_zeros((4, g.in_channels), dtype=torch.float32)
    given = maps, dy, weight, stats

    def call(body: Callable[..., Tensor]) -> Callable[[], object]:
        def run(tensors: plan.Tensors, g: Geometry) -> plan.Tensors:
            return (body(*tensors, g),)  # (a plan leaves out what nobody takes)

        planned = plan.Planned(run)
        return lambda: planned(given, g)

    ours = call(_forward), call(_dgrad), call(_wgrad)
    return list(zip(ours, (call(_aten_forward), call(_aten_dgrad), call(_aten_wgrad))))


def _forward(x: Tensor, dy: Tensor, weight: Tensor, stats: Tensor, g: Geometry) -> Tensor:
    return kernels.launch_conv(x, conv.launch_pack(weight, g, x.dtype), None, g)[0]


def _aten_forward(x: Tensor, dy: Tensor, weight: Tensor, stats: Tensor, g: Geometry) -> Tensor:
    y = aten.forward(x, weight, None, g)
    batch_norm.launch_statistics(y, matrix(y.shape, True))
    return y


def _dgrad(x: Tensor, dy: Tensor, weight: Tensor, stats: Tensor, g: Geometry) -> Tensor:
    transposed = mode.dot_precision(dy.dtype, "conv") == "tf32"
    packed = conv.launch_pack(weight, g, dy.dtype, transposed)
    return kernels_backward.launch_dgrad(dy, packed, g, x, Norm(stats, None, None, None, 1e-5), transposed)[0]


def _aten_dgrad(x: Tensor, dy: Tensor, weight: Tensor, stats: Tensor, g: Geometry) -> Tensor:
    d = aten.input_gradient(dy, x, weight, g)
    batch_norm.launch_gradient_sums(d, x, matrix(x.shape, True), Norm(stats, None, None, None, 1e-5), "relu")
    return d


def _wgrad(x: Tensor, dy: Tensor, weight: Tensor, stats: Tensor, g: Geometry) -> Tensor:
    workspace = conv_backward.launch_wgrad(x, dy, g, True, False)
    return cast(Tensor, conv_backward.launch_merge(workspace, g, weight, None)[0])


def _aten_wgrad(x: Tensor, dy: Tensor, weight: Tensor, stats: Tensor, g: Geometry) -> Tensor:
    return aten.weight_gradient(dy, x, weight, weight, g)
