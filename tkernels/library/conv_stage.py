"""torch.ops.tkernels.conv_stage and conv_stage_backward. Functional: the caller moves the running statistics
(tkernels.ops.batch_norm.op.track) by the batch's, which the operator returns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from tkernels.core import activation as activation_ops
from tkernels.core import autograd
from tkernels.core import mode as runtime
from tkernels.core.geometry import Geometry, stage_channels_last, suggests_channels_last
from tkernels.core.records import ConvBNLayer, StageCall
from tkernels.library import common
from tkernels.ops.batch_norm import op as bn_ops
from tkernels.ops.conv import op as conv_ops
from tkernels.ops.conv_stage import op as ops
from tkernels.ops.conv_stage import triton_body as triton

__all__ = ["conv_stage", "conv_stage_backward"]

_VECTORS = 5  # bias, bn_weight, bn_bias, running_mean, running_var of each layer
_WINDOW = 7  # stride, padding (-1 for 'same'), dilation, groups


class _Call(NamedTuple):
    """The layers of a call and what its shapes come to."""

    layers: list[ConvBNLayer]
    stage: StageCall
    channels_last: bool


def _call(
    input: Tensor, weights: Sequence[Tensor], vectors: Sequence[Tensor], windows: Sequence[int],
    eps: Sequence[float], activations: Sequence[int], pool: Sequence[int], p: float, dtype: torch.dtype,
) -> _Call:  # fmt: skip
    layers, geometries = [], []
    shape: tuple[Any, ...] = tuple(input.shape)
    for i, weight in enumerate(weights):
        own: Any = [common.something(t) for t in vectors[_VECTORS * i : _VECTORS * (i + 1)]]
        sh, sw, ph, pw, dh, dw, groups = windows[_WINDOW * i : _WINDOW * (i + 1)]
        padding: Any = "same" if ph < 0 else (ph, pw)
        vector: dict[str, Any] = dict(zip(ConvBNLayer._fields[1 : 1 + _VECTORS], own))
        layer = ConvBNLayer(
            weight, **vector, stride=(sh, sw), padding=padding, dilation=(dh, dw), groups=groups, eps=eps[i],
            activation=activation_ops.ACTIVATIONS[activations[i]],
        )  # fmt: skip
        g = conv_ops.described(shape, tuple(weight.shape), (sh, sw), padding, (dh, dw), groups)
        layers.append(layer)
        geometries.append(g)
        shape = shape[0], g.out_channels, g.out_h, g.out_w
    last = geometries[-1]
    pooling = ops.described_pooling(last.out_h, last.out_w, *_pairs(pool))
    nhwc = stage_channels_last(input, weights, geometries)[-1]
    names = tuple(layer.activation for layer in layers)
    return _Call(layers, StageCall(tuple(geometries), pooling, dtype, p, False, names), nhwc)


def _pairs(pool: Sequence[int]) -> list[Any]:
    return [tuple(pool[i : i + 2]) for i in (0, 2, 4)]


def _tensors(call: _Call) -> list[Tensor | None]:
    return [t for layer in call.layers for t in layer[:6]]


@torch.library.custom_op("tkernels::conv_stage", mutates_args=())
def conv_stage(
    input: Tensor,
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor],
    windows: Sequence[int],
    eps: Sequence[float],
    activations: Sequence[int],
    residual: Tensor | None,
    pool: Sequence[int],
    p: float,
    seed: Tensor | None,
    dtype: torch.dtype,
    keep: bool,
) -> list[Tensor]:
    """n x (conv -> batch_norm -> activation), max pooling (``pool``: size, stride, padding, a pair each) and Dropout2d;
    ``residual`` (in ``dtype``; without pooling and dropout) is added before the last activation.

    Per layer: ``vectors`` bias, bn_weight, bn_bias, running_mean, running_var (none: the batch's statistics normalise),
    each empty where there is none, since autograd does not see into lists with None; ``windows`` stride, padding (-1
    for 'same'), dilation, groups; ``activations`` a place in activation.ACTIVATIONS. Returns y, then of each layer the
    batch's statistics (float32 [4, C], as batch_norm_statistics; empty where given ones normalise), and of each
    layer its input and the raw output of its convolution, each empty where not stored. Without ``keep`` all but y are
    empty, and the latter two left out.
    """
    call = _call(input, weights, vectors, windows, eps, activations, pool, p, dtype)
    if not runtime.use_triton(input, *_tensors(call), residual):
        return _torch_forward(input, call, residual, pool, seed, keep)
    y, saved = triton.forward(input, call.layers, call.stage, keep, seed, residual)
    if not keep:
        return [y, *(common.nothing(y) for _ in weights)]
    none = common.nothing(y)
    stats = [s.mean if s.var is None else none.clone() for s in saved]
    maps = [t for i, s in enumerate(saved) for t in (s.x if i else None, s.raw)]
    return [y, *stats, *(none.clone() if t is None else t for t in maps)]


def _torch_body(
    x: Tensor, call: _Call, residual: Tensor | None, pool: Sequence[int], seed: Tensor | None
) -> tuple[Tensor, list[Any]]:
    """(y, (input, raw output) of each layer)."""
    stage = call.stage
    maps = []
    for i, (layer, g) in enumerate(zip(call.layers, stage.geometries)):
        raw = _convolved(x, layer, g, stage.dtype)
        maps.append((x if i else None, raw))
        given = layer.running_mean is not None
        x = torch.nn.functional.batch_norm(
            raw, layer.running_mean, layer.running_var, layer.bn_weight, layer.bn_bias, not given, 0.0, layer.eps
        )
        if residual is not None and i == len(call.layers) - 1:
            x = x + residual
        x = activation_ops.apply(x, layer.activation)
    if any(size != 1 for size in pool[:4]):
        x = torch.nn.functional.max_pool2d(x, *_pairs(pool))
    if seed is not None:
        x = x * common.dropout_factors(x.new_empty((*x.shape[:2], 1, 1)), stage.p, seed)
    return x, maps


def _convolved(x: Tensor, layer: ConvBNLayer, g: Geometry, dtype: torch.dtype) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(dtype)
    options: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return torch.nn.functional.conv2d(x.to(dtype), layer.weight.to(dtype), bias, *options)


def _torch_forward(
    x: Tensor, call: _Call, residual: Tensor | None, pool: Sequence[int], seed: Tensor | None, keep: bool
) -> list[Tensor]:
    with common.without_autocast(x.device):
        y, maps = _torch_body(x, call, residual, pool, seed)
    y = y.contiguous(memory_format=common.layout(call.channels_last))
    if not keep:
        return [y, *(common.nothing(y) for _ in maps)]
    stats = [
        common.torch_statistics(raw, layer.eps) if layer.running_mean is None else common.nothing(y)
        for layer, (_, raw) in zip(call.layers, maps)
    ]
    stored = [
        common.nothing(y) if t is None or (skipped and j == 0) else t.contiguous(memory_format=torch.channels_last)
        for pair, skipped in zip(maps, _not_stored(call))
        for j, t in enumerate(pair)
    ]
    return [y, *stats, *stored]


def _not_stored(call: _Call) -> list[bool]:
    """Of each layer, whether its input is formed as it is loaded, from the raw output before."""
    stage = call.stage
    return [i > 0 and triton.normalizes_in_next(layer, stage, i) and call.layers[i - 1].running_mean is None
            for i, layer in enumerate(call.layers)]  # fmt: skip


@conv_stage.register_fake
def _(
    input: Tensor, weights: Sequence[Tensor], vectors: Sequence[Tensor], windows: Sequence[int],
    eps: Sequence[float], activations: Sequence[int], residual: Tensor | None, pool: Sequence[int], p: float,
    seed: Tensor | None, dtype: torch.dtype, keep: bool,
) -> list[Tensor]:  # fmt: skip
    call = _call(input, weights, vectors, windows, eps, activations, pool, p, dtype)
    n, end = input.shape[0], call.stage.pool
    geometries = call.stage.geometries
    y = common.empty((n, geometries[-1].out_channels, end.out_h, end.out_w), input, dtype,
                     common.layout(call.channels_last))  # fmt: skip
    if not keep:
        return [y, *(common.nothing(y) for _ in weights)]
    stats = [
        input.new_empty((4, g.out_channels), dtype=torch.float32) if layer.running_mean is None else common.nothing(y)
        for layer, g in zip(call.layers, geometries)
    ]
    maps = []
    for i, (g, skipped) in enumerate(zip(geometries, _not_stored(call))):
        shape = n, g.in_channels, g.height, g.width
        maps.append(common.nothing(y) if i == 0 or skipped else common.empty(shape, y, dtype, torch.channels_last))
        maps.append(common.empty((n, g.out_channels, g.out_h, g.out_w), y, dtype, torch.channels_last))
    return [y, *stats, *maps]


@torch.library.custom_op("tkernels::conv_stage_backward", mutates_args=())
def conv_stage_backward(
    dy: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor],
    kept: Sequence[Tensor],
    behind: Tensor | None,
    windows: Sequence[int],
    eps: Sequence[float],
    activations: Sequence[int],
    pool: Sequence[int],
    p: float,
    seed: Tensor | None,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the input, then of weight, bias, bn_weight and bn_bias of each layer, then of the residual where
    an activation stands between it and ``dy``, empty where ``needs`` does not say so. ``kept``: conv_stage's results
    but y; ``behind``: conv_stage_triton.behind_residual's."""
    call = _call(input, weights, vectors, windows, eps, activations, pool, p, dtype)
    if runtime.use_triton(input, *_tensors(call)):
        input_format = input.dtype, suggests_channels_last(input)
        found = triton.backward(dy, _saved(input, call, kept), behind, seed, call.stage, eps, needs, input_format)
        return list(common.results(found, dy))
    last = call.layers[-1]
    dz = None
    if behind is not None and not activation_ops.needs_input(last.activation):
        # the output tells the derivative: what is left to differentiate ends at batch norm
        dz = dy = activation_ops.gradient(dy, behind, last.activation)
        call, behind = call._replace(layers=[*call.layers[:-1], last._replace(activation=None)]), None
    leaves = [input, *(t for layer in call.layers for t in layer[:4]), behind]

    def body(x: Tensor, *others: Tensor) -> Tensor:
        *parameters, residual = others
        fields = ConvBNLayer._fields[:4]
        layers = [
            layer._replace(**cast(Any, dict(zip(fields, parameters[4 * i :])))) for i, layer in enumerate(call.layers)
        ]
        return _torch_body(x, call._replace(layers=layers), residual, pool, seed)[0]

    dx, *of_parameters, dresidual = common.gradients(body, leaves, needs, dy)
    if dx is not None:
        dx = dx.contiguous(memory_format=common.layout(suggests_channels_last(input)))
    if needs[-1]:
        dresidual = cast(Tensor, dresidual if dz is None else dz).contiguous(memory_format=torch.channels_last)
    # laid out as the parameters are
    laid = [g if g is None else torch.empty_like(cast(Tensor, t)).copy_(g) for g, t in zip(of_parameters, leaves[1:])]
    return list(common.results([dx, *laid, dresidual], dy))


def _saved(input: Tensor, call: _Call, kept: Sequence[Tensor]) -> list[triton.SavedLayer]:
    """What triton.forward saved, of the operator's results."""
    stats, maps = kept[: len(call.layers)], kept[len(call.layers) :]
    saved = []
    for i, (layer, g) in enumerate(zip(call.layers, call.stage.geometries)):
        x = common.something(maps[2 * i]) if i else triton.conv_input(input, g, call.stage.dtype)
        given = layer.running_mean is not None
        norm = bn_ops.norm_of(layer.batch_norm(False), None if given else stats[i])
        saved.append(triton.SavedLayer(x, layer.weight, layer.bias, None, maps[2 * i + 1], *norm[:4]))
    return saved


@conv_stage_backward.register_fake
def _(
    dy: Tensor, input: Tensor, weights: Sequence[Tensor], vectors: Sequence[Tensor], kept: Sequence[Tensor],
    behind: Tensor | None, windows: Sequence[int], eps: Sequence[float], activations: Sequence[int],
    pool: Sequence[int], p: float, seed: Tensor | None, dtype: torch.dtype, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    layout = common.layout(suggests_channels_last(input))
    leaves: list[Tensor] = []
    for i, weight in enumerate(weights):
        leaves += [weight, *vectors[_VECTORS * i : _VECTORS * i + 3]]
    found = [torch.empty_like(t) if need else None for t, need in zip(leaves, needs[1:])]
    dx = common.empty(input.shape, input, input.dtype, layout) if needs[0] else None
    dresidual = common.empty(dy.shape, dy, dtype, torch.channels_last) if needs[-1] else None
    return list(common.results([dx, *found, dresidual], dy))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    input, weights, vectors, windows, eps, activations, residual, pool, p, seed, dtype, keep = inputs
    if not keep:
        raise RuntimeError("torch.ops.tkernels.conv_stage must be called with keep=True where gradients are needed")
    ctx.mark_non_differentiable(*output[1:])
    behind = triton.behind_residual(output[0], residual, activation_ops.ACTIVATIONS[activations[-1]])
    autograd.save(ctx, input, seed, behind, *weights, *vectors, *output[1:])
    ctx.arguments = list(windows), list(eps), list(activations), list(pool), p
    ctx.dtype, ctx.layers = dtype, len(weights)
    parameters = [[weight, *vectors[_VECTORS * i : _VECTORS * i + 3]] for i, weight in enumerate(weights)]
    ctx.needs = [t is not None and t.requires_grad for t in (input, *itertools.chain(*parameters), residual)]


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    n = ctx.layers
    input, seed, behind, *others = autograd.saved(ctx)
    weights, vectors, kept = others[:n], others[n : n + _VECTORS * n], others[n + _VECTORS * n :]
    *needs, of_residual = ctx.needs
    found = torch.ops.tkernels.conv_stage_backward(
        grads[0], input, weights, vectors, kept, behind, *ctx.arguments, seed, ctx.dtype,
        [*needs, of_residual and behind is not None],
    )  # fmt: skip
    gradients = [t if need else None for t, need in zip(found, needs)]
    dresidual = None
    if of_residual:
        dresidual = grads[0] if behind is None else found[-1]
    of_weights = gradients[1::4]
    of_vectors: list[Tensor | None] = []
    for i in range(n):
        of_vectors += [*gradients[4 * i + 2 : 4 * i + 5], None, None]
    return gradients[0], of_weights, of_vectors, None, None, None, dresidual, *[None] * 5


conv_stage.register_autograd(_backward, setup_context=_setup_context)


def _products(input_shape: Any, weights: Any, windows: Any) -> list[int]:
    """Each layer's, in FLOPs."""
    shape = tuple(input_shape)
    found = []
    for i, weight in enumerate(weights):
        sh, sw, ph, pw, dh, dw, groups = windows[_WINDOW * i : _WINDOW * (i + 1)]
        padding: Any = "same" if ph < 0 else (ph, pw)
        g = conv_ops.described(shape, tuple(weight), (sh, sw), padding, (dh, dw), groups)
        out = shape[0], g.out_channels, g.out_h, g.out_w
        found.append(conv_flop_count(list(shape), list(weight), list(out)))
        shape = out
    return found


@register_flop_formula(torch.ops.tkernels.conv_stage)
def _flops(input_shape: Any, weights: Any, vectors: Any, windows: Any, *_: Any, **__: Any) -> int:
    return sum(_products(input_shape, weights, windows))


@register_flop_formula(torch.ops.tkernels.conv_stage_backward)
def _backward_flops(
    dy_shape: Any, input_shape: Any, weights: Any, vectors: Any, kept: Any, behind: Any, windows: Any, eps: Any,
    activations: Any, pool: Any, p: Any, seed: Any, dtype: Any, needs: Any, *_: Any, **__: Any,
) -> int:  # fmt: skip
    products = _products(input_shape, weights, windows)
    below = [any(needs[: 1 + 4 * i]) for i in range(len(products))]
    return sum(product * (needs[1 + 4 * i] + below[i]) for i, product in enumerate(products))
