"""A conv stage's passes on Triton, planned in eager calls; to whoever traces each is one registered operator, since
their workspaces depend on the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from tkernels.core import activation as activations
from tkernels.core import geometry, library, mode, plan
from tkernels.core.geometry import Geometry, Pooling
from tkernels.core.late import late
from tkernels.core.records import TENSORS, ConvBNLayer, Route, StageCall
from tkernels.ops.batch_norm import op as bn_ops

if TYPE_CHECKING:
    from tkernels.ops.conv import kernels as conv
    from tkernels.ops.conv_stage import triton_body as body
else:
    conv = late("..conv.kernels", __package__)
    body = late(".triton_body", __package__)

__all__ = ["Options", "backward", "call_tensors", "forward", "keep"]

# of each layer: momentum, eps, whether the batch moves the running statistics
Options = tuple[tuple[float | None, float, bool], ...]
InputFormat = tuple[torch.dtype, bool]


def call_tensors(x: Tensor, layers: Sequence[ConvBNLayer], residual: Tensor | None) -> tuple[Tensor | None, ...]:
    """All that a call is given: what may want a gradient first."""
    parameters: list[Any] = [t for layer in layers for t in layer[:4]]
    statistics: list[Any] = [t for layer in layers for t in layer[4:TENSORS]]
    return (x, *parameters, residual, *statistics)


def leaves(count: int) -> int:
    """How many of call_tensors, so many with a seed or without, may want a gradient; the residual is the last."""
    return 2 + 4 * ((count - 2) // TENSORS)


def layer_tensors(tensors: Sequence[Tensor | None]) -> list[tuple[Tensor | None, ...]]:
    """Each layer's, of call_tensors."""
    first = leaves(len(tensors))
    layers = range((first - 2) // 4)
    return [(*tensors[1 + 4 * i : 5 + 4 * i], *tensors[first + 3 * i : first + 3 * i + 3]) for i in layers]


def residual_of(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The residual, of call_tensors."""
    return tensors[leaves(len(tensors)) - 1]


@plan.Planned
def forward(
    tensors: plan.Tensors, stage: StageCall, options: Options, needs: tuple[bool, ...] | None
) -> plan.Tensors:  # fmt: skip
    """y and, for the gradients ``needs`` asks for, the seed, what is behind a residual and the SavedLayer of each
    layer; y alone for None. ``tensors``: call_tensors', and dropout's seed."""
    if mode.traced():
        return _traced_forward(tensors, stage, options, needs)
    (x, *_, seed), residual = cast(Any, tensors), residual_of(tensors)
    layers = _layers(tensors, options)
    x = body.conv_input(x, stage.geometries[0], stage.dtype, stage.route(0))
    nhwc = _channels_last(tensors[0], layers, stage)
    y, saved, behind = body.forward(x, layers, stage, nhwc, needs is not None, seed, residual)
    if needs is None:
        return (y,)
    tasks = body.wanted(needs, [layer.var is None for layer in saved], stage.depth)
    kept: list[Tensor | None] = [seed, behind]
    maps = body.kept_maps(layers, stage, tasks, _reads_last(residual, stage))
    for layer, task, needs_bias, (reads_x, reads_raw) in zip(saved, tasks, needs[2::4], maps):
        kept += layer._replace(
            x=layer.x if reads_x else None,
            bias=layer.bias if needs_bias else None,
            packed=layer.packed if task.below and layer.packed is not layer.weight else None,
            raw=layer.raw if reads_raw else None,
        )
    return (y, *kept)


def keep(tensors: plan.Tensors, static: tuple[Any, ...]) -> tuple[Any, ...]:
    """backward's static arguments of a call's."""
    x: Any = tensors[0]
    stage, options = static
    return stage, tuple([eps for _, eps, _ in options]), (x.dtype, geometry.suggests_channels_last(x))


def _layers(tensors: Sequence[Tensor | None], options: Options) -> list[ConvBNLayer]:
    layers = []
    for own, (momentum, eps, counts) in zip(layer_tensors(tensors), options):
        layers.append(ConvBNLayer(*cast(Any, own))._replace(momentum=momentum, eps=eps, training=counts))
    return layers


def _channels_last(x: Any, layers: Sequence[ConvBNLayer], stage: StageCall) -> bool:
    return geometry.stage_channels_last(x, [layer.weight for layer in layers[: stage.depth]], stage.geometries)[-1]


def _reads_last(residual: Tensor | None, stage: StageCall) -> bool:
    """Whether the last activation's gradient needs the residual added to what the raw map comes to."""
    return residual is not None and activations.needs_input(stage.activations[-1])


@plan.Planned
def backward(
    tensors: plan.Tensors, stage: StageCall, eps: tuple[float, ...], input_format: InputFormat, needs: tuple[bool, ...]
) -> plan.Tensors:
    """body.backward's gradients, of dy, where ``stage.twice`` of the output's second gradient, and of what forward
    kept."""
    if mode.traced():
        return _traced_backward(tensors, stage, eps, needs, input_format)
    dy, *rest = cast(Any, tensors)
    more = rest.pop(0) if stage.twice else None
    seed, behind, *kept = rest
    return tuple(body.backward(dy, more, _saved(kept), behind, seed, stage, eps, needs, input_format))


def _saved(kept: Sequence[Tensor | None]) -> list[body.SavedLayer]:
    width = len(body.SavedLayer._fields)
    return [body.SavedLayer._make(kept[i : i + width]) for i in range(0, len(kept), width)]


# --- What traces see


def _numbers(stage: StageCall) -> tuple[Any, ...]:
    """The stage as arguments of an operator."""
    names = [activations.ACTIVATIONS.index(name) for name in stage.activations]
    routes = [by_pytorch for route in stage.routes for by_pytorch in route]
    return [size for g in stage.geometries for size in g], list(stage.pool), names, routes, stage.dtype, stage.p


def _stage(
    geometries: Sequence[int], pool: Sequence[int], names: Sequence[int], routes: Sequence[bool], dtype: torch.dtype,
    p: float,
) -> StageCall:  # fmt: skip
    called = tuple([activations.ACTIVATIONS[i] for i in names])
    by_layer = tuple([Route(*routes[i : i + 3]) for i in range(0, len(routes), 3)])
    return StageCall(_geometries(geometries), Pooling._make(pool), dtype, p, False, called, by_layer)


def _geometries(numbers: Sequence[int]) -> tuple[Geometry, ...]:
    width = len(Geometry._fields)
    return tuple([Geometry._make(numbers[i : i + width]) for i in range(0, len(numbers), width)])


def _traced_forward(
    tensors: plan.Tensors, stage: StageCall, options: Options, needs: tuple[bool, ...] | None
) -> plan.Tensors:
    """The operator is functional: running statistics are moved here."""
    (x, *_, seed), residual = cast(Any, tensors), residual_of(tensors)
    layers = _layers(tensors, options)
    unmoved = [
        layer._replace(running_mean=None, running_var=None, num_batches_tracked=None) if layer.training else layer
        for layer in layers
    ]
    # without a gradient statistics are all that is to be kept
    asked = needs or ([False] * (2 + 4 * len(layers)) if any(layer.training for layer in layers) else [])
    y, *found = _forward_operator(
        [*call_tensors(x, unmoved, residual), seed], *_numbers(stage), [float(eps) for _, eps, _ in options], asked
    )
    kept: list[Tensor | None] = [seed, body.behind_residual(y, residual, stage.activations[-1])]
    for i, (layer, g) in enumerate(zip(layers, stage.geometries)):
        if not asked:
            break
        own_x, raw, stats = [None if t.dim() == 1 else t for t in found[3 * i : 3 * i + 3]]
        bn = layer.batch_norm(False)
        if layer.training and stats is not None:
            bn_ops.move_running(bn, *bn_ops.unpacked(stats, bn.eps), x.shape[0] * g.out_h * g.out_w)
        if i == 0 and own_x is None and asked[1]:
            own_x = x
        kept += body.SavedLayer(own_x, layer.weight, layer.bias if asked[2 + 4 * i] else None, None, raw,
                           *bn_ops.norm_of(bn, stats)[:4])  # fmt: skip
    return (y,) if needs is None else (y, *kept)


def _call(
    tensors: Sequence[Tensor | None], geometries: Sequence[int], pool: Sequence[int], names: Sequence[int],
    routes: Sequence[bool], dtype: torch.dtype, p: float, eps: Sequence[float], needs: Sequence[bool],
) -> tuple[plan.Tensors, StageCall, Options, tuple[bool, ...] | None]:  # fmt: skip
    """forward's arguments of the operator's."""
    stage = _stage(geometries, pool, names, routes, dtype, p)
    return tuple(tensors), stage, tuple([(0.0, e, False) for e in eps]), tuple(needs) or None


def _forward_results(*arguments: Any) -> list[Tensor]:
    """Empty results of the operator below."""
    tensors, stage, options, needs = _call(*arguments)
    x: Any = tensors[0]
    layers, end, dtype = _layers(tensors, options), stage.pool, stage.dtype
    n, channels = x.shape[0], stage.geometries[-1].out_channels
    results = [conv.empty_pixels(x, (n, channels, end.out_h, end.out_w), dtype, _channels_last(x, layers, stage))]
    if needs is None:
        return results
    measured = [layer.measures(False) for layer in layers]
    tasks = body.wanted(needs, measured, stage.depth)
    maps = body.kept_maps(layers, stage, tasks, _reads_last(residual_of(tensors), stage))
    for i, (g, from_batch, (reads_x, reads_raw)) in enumerate(zip(stage.geometries, measured, maps)):
        stored = reads_x and (i > 0 or body.conv_input(x, g, dtype, stage.route(0)) is not x)
        results.append(
            conv.empty_pixels(x, (n, g.in_channels, g.height, g.width), dtype, True) if stored else _nothing(x)
        )
        out = n, g.out_channels, g.out_h, g.out_w
        results.append(conv.empty_pixels(x, out, dtype, True) if reads_raw else _nothing(x))
        results.append(x.new_empty((4, g.out_channels), dtype=torch.float32) if from_batch else _nothing(x))
    return results


def _nothing(like: Tensor) -> Tensor:
    """What an operator returns in place of None: operators return tensors only."""
    return like.new_empty(0)


def _products(geometries: Sequence[int], images: int) -> list[int]:
    """Of each layer, in FLOPs."""
    return [2 * images * g.out_channels * g.out_h * g.out_w * g.reduction for g in _geometries(geometries)]


def _forward_flops(tensors: Any, geometries: Sequence[int], *_: Any) -> int:
    return sum(_products(geometries, tensors[0][0]))


@library.whole_pass("conv_stage_forward", fake=_forward_results, flops=_forward_flops)
def _forward_operator(
    tensors: Sequence[Tensor | None], geometries: Sequence[int], pool: Sequence[int], names: Sequence[int],
    routes: Sequence[bool], dtype: torch.dtype, p: float, eps: Sequence[float], needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """forward's, of the same tensors: y and, where ``needs`` is not empty, of each layer its input, its raw output and
    the batch's statistics [4, C], each empty where backward reads none, or, of the input, where it is x itself."""
    given, stage, options, asked = _call(tensors, geometries, pool, names, routes, dtype, p, eps, needs)
    y, *kept = cast(Any, forward(given, stage, options, asked))
    results = [y]
    for i, layer in enumerate(_saved(kept[2:])):
        x = None if i == 0 and layer.x is tensors[0] else layer.x
        stats = layer.mean if layer.var is None else None
        results += [_nothing(y) if t is None else t for t in (x, layer.raw, stats)]
    return results


def _traced_backward(
    tensors: plan.Tensors, stage: StageCall, eps: tuple[float, ...], needs: tuple[bool, ...], input_format: InputFormat
) -> plan.Tensors:
    dy, _, behind, *_ = cast(Any, tensors)
    # without an activation before it the residual's gradient is dy, and no result of an operator
    *needed, of_residual = needs
    needed.append(of_residual and behind is not None)
    found = iter(_backward_operator(tensors, *_numbers(stage), eps, needed, *input_format))
    gradients = [next(found) if need else None for need in needed]
    if of_residual and behind is None:
        gradients[-1] = dy.contiguous(memory_format=torch.channels_last)
    return tuple(gradients)


def _gradients(
    tensors: Sequence[Tensor | None], geometries: Sequence[int], pool: Any, names: Any, routes: Any, dtype: torch.dtype,
    p: Any, eps: Any, needs: Sequence[bool], input_dtype: torch.dtype, channels_last: bool,
) -> list[Tensor]:  # fmt: skip
    """Empty results of the operator below."""
    dy, _, _, *kept = cast(Any, tensors)
    g = _geometries(geometries)[0]
    found = []
    if needs[0]:
        shape = dy.shape[0], g.in_channels, g.height, g.width
        found.append(conv.empty_pixels(dy, shape, input_dtype, channels_last))
    leaves = [t for s in _saved(kept) for t in (s.weight, s.bias, s.bn_weight, s.bn_bias)]
    found += [torch.empty_like(t) for t, need in zip(leaves, needs[1:]) if need and t is not None]
    if needs[-1]:
        found.append(conv.empty_pixels(dy, tuple(dy.shape), dtype, True))
    return found


def _backward_flops(
    tensors: Any, geometries: Sequence[int], pool: Any, names: Any, routes: Any, dtype: Any, p: Any, eps: Any,
    needs: Sequence[bool], *_: Any,
) -> int:  # fmt: skip
    products = _products(geometries, tensors[0][0])
    return sum(product * (needs[1 + 4 * i] + any(needs[: 1 + 4 * i])) for i, product in enumerate(products))


@library.whole_pass("conv_stage_backward", fake=_gradients, flops=_backward_flops)
def _backward_operator(
    tensors: Sequence[Tensor | None], geometries: Sequence[int], pool: Sequence[int], names: Sequence[int],
    routes: Sequence[bool], dtype: torch.dtype, p: float, eps: Sequence[float], needs: Sequence[bool],
    input_dtype: torch.dtype, channels_last: bool,
) -> list[Tensor]:  # fmt: skip
    """backward's gradients, those that are needed."""
    stage, input_format = _stage(geometries, pool, names, routes, dtype, p), (input_dtype, channels_last)
    found = backward(tuple(tensors), stage, tuple(eps), input_format, tuple(needs))
    return [t for t in found if t is not None]
