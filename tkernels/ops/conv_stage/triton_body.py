"""A conv stage on Triton: its forward, its backward, and the autograd function of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from tkernels.core import activation as activations
from tkernels.core import autograd
from tkernels.core import mode as runtime
from tkernels.core import plan as plans
from tkernels.ops.batch_norm import config as bn_tuning
from tkernels.ops.batch_norm import op as bn_ops
from tkernels.ops.conv import op as conv_ops
from tkernels.ops.conv.config import Geometry
from tkernels.ops.conv_stage import config as tuning
from tkernels.ops.conv_stage.call import TENSORS, ConvBNLayer, Plan, channels_last

if runtime.HAS_TRITON:
    from tkernels.ops.batch_norm import kernels as batch_norm
    from tkernels.ops.conv import kernels as conv
    from tkernels.ops.conv import kernels_backward as conv_backward
    from tkernels.ops.conv import kernels_depthwise as conv_depthwise
    from tkernels.ops.conv_stage import kernels
    from tkernels.ops.conv_stage import kernels_backward as conv_stage_backward
    from tkernels.ops.conv_stage import kernels_pointwise as pointwise
    from tkernels.ops.conv_stage import kernels_weights as weight_kernels

__all__ = ["SavedLayer", "backward", "behind_residual", "conv_input", "dense", "forward", "normalizes_in_next", "run"]


class SavedLayer(NamedTuple):
    """What a layer's backward needs. ``x``: its input, None where it formed that from the layer before's ``raw`` as it
    loaded it; ``raw``: its convolution's output; ``mean``: of the batch [4, C] (then ``var`` is None) or the running
    one; ``packed``: the weight as forward laid it out."""

    x: Tensor | None
    weight: Tensor
    bias: Tensor | None
    packed: Tensor | None
    raw: Tensor | None
    mean: Tensor
    var: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None


def forward(
    x: Tensor, layers: Sequence[ConvBNLayer], plan: Plan, keep: bool, seed: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, list[SavedLayer]]:
    """(y, what backward needs of each layer if ``keep``). ``seed``: dropout's; ``residual``: in the maps' dtype."""
    nhwc = channels_last(x, [layer.weight for layer in layers], plan.geometries)[-1]
    saved: list[SavedLayer] = []
    packed = _pack(layers, plan)
    last = len(layers) - 1
    before: Any = None  # the norm and the activation that x, a raw map, has yet to go through
    for i, (layer, g) in enumerate(zip(layers, plan.geometries)):
        end, activation = i == last, plan.activations[i]
        given = not layer.measures(plan.training)
        if before is None:
            x = conv_input(x, g, plan.dtype)
        if given and not keep:
            in_nhwc = nhwc or not (end and plan.plain_end)
            x = _folded(x, packed[i], layer, g, in_nhwc, activation, residual if end else None)
            if end and not plan.plain_end:
                x = kernels.launch_end(x, plan.pool, None, plan.p, seed, nhwc)
            continue
        raw, norm = _given(x, packed[i], layer, g) if given else _measured(x, before, packed[i], layer, g, plan)
        if keep:
            saved.append(SavedLayer(x if before is None else None, layer.weight, layer.bias, packed[i], raw, norm.mean,
                                    norm.var, norm.weight, norm.bias))  # fmt: skip
        before = (norm, activation) if not end and normalizes_in_next(layers[i + 1], plan, i + 1) else None
        if before is not None:
            x = raw
        elif end and not plan.plain_end:
            x = kernels.launch_end(raw, plan.pool, norm, plan.p, seed, nhwc, activation)
        else:
            x = _normalized(raw, norm, activation, residual if end else None, nhwc or not end)
    return x, saved


def _normalized(raw: Tensor, norm: Any, activation: str | None, residual: Tensor | None, channels_last: bool) -> Tensor:
    """activation(batch_norm(raw) + residual) of an NHWC map, in either layout."""
    if residual is None and not channels_last:
        return kernels.launch_end(raw, _unpooled(raw), norm, channels_last=False, activation=activation)
    added = None if residual is None else conv_ops.as_nhwc(residual)
    y = batch_norm.launch_normalize(raw, _matrix(raw), norm, activation, added)
    return y if channels_last else kernels.launch_end(y, _unpooled(y), None, channels_last=False)


def _unpooled(x: Tensor) -> tuning.Pooling:
    return tuning.no_pooling(x.shape[2], x.shape[3])


def normalizes_in_next(layer: ConvBNLayer, plan: Plan, i: int) -> bool:
    """Whether layer ``i`` normalises and activates its input itself."""
    return layer.measures(plan.training) and tuning.applies_in_prologue(plan.geometries[i], plan.dtype)


def _pack(layers: Sequence[ConvBNLayer], plan: Plan) -> list[Any]:
    """The weights as the products read them, None for depthwise layers."""
    chosen = [i for i, g in enumerate(plan.geometries) if not g.depthwise]
    packed: list[Tensor | None] = [None] * len(layers)
    weights = [layers[i].weight for i in chosen]
    for i, t in zip(chosen, weight_kernels.launch_packs(weights, [plan.geometries[i] for i in chosen], plan.dtype)):
        packed[i] = t
    return packed


def conv_input(x: Tensor, g: Geometry, dtype: torch.dtype) -> Tensor:
    """The input as the convolution's kernels read it: with few channels any, else NHWC in ``dtype``."""
    if g.flattened and not g.depthwise:
        return x
    return conv_ops.as_nhwc(x.to(dtype))


def _matrix(raw: Tensor) -> bn_tuning.Matrix:
    return bn_tuning.matrix(raw.shape, True)


def dense(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.contiguous()


def _given_norm(layer: ConvBNLayer) -> Any:
    """Batch norm by running statistics."""
    mean, var = dense(layer.running_mean), dense(layer.running_var)
    return batch_norm.Norm(cast(Tensor, mean), var, dense(layer.bn_weight), dense(layer.bn_bias), layer.eps)


def _folded(
    x: Tensor, packed: Any, layer: ConvBNLayer, g: Geometry, channels_last: bool, activation: str | None,
    residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """activation(batch_norm(conv(x)) + residual) by running statistics, in one kernel unless depthwise."""
    norm, bias = _given_norm(layer), dense(layer.bias)
    if g.depthwise:
        raw, _ = conv_depthwise.launch_forward(x, layer.weight, bias, g)
        return _normalized(raw, norm, activation, residual, channels_last)
    if residual is not None:
        residual = conv_ops.as_nhwc(residual) if channels_last else residual.contiguous()
    return kernels.launch_conv(
        x, packed, bias, g, norm, channels_last=channels_last, activation=activation, residual=residual
    )[0]


def _given(x: Tensor, packed: Any, layer: ConvBNLayer, g: Geometry) -> tuple[Tensor, Any]:
    """(raw output, Norm) where running statistics normalise and backward will ask for the raw map."""
    bias = dense(layer.bias)
    if g.depthwise:
        return conv_depthwise.launch_forward(x, layer.weight, bias, g)[0], _given_norm(layer)
    return conv.launch_forward(x, packed, bias, g)[0], _given_norm(layer)


def _measured(x: Tensor, before: Any, packed: Any, layer: ConvBNLayer, g: Geometry, plan: Plan) -> tuple[Tensor, Any]:
    """(raw output, Norm) by the batch's statistics; in training moves the running ones. ``before``: the Norm and the
    activation that x has yet to go through, or None."""
    counter = layer.num_batches_tracked if layer.counts(plan.training) else None
    bias = dense(layer.bias)
    partials: Any
    if g.depthwise:
        raw, _ = conv_depthwise.launch_forward(x, layer.weight, bias, g)
        partials = batch_norm.launch_statistics(raw, _matrix(raw), counter)
    elif before is not None:
        raw, partials = pointwise.launch_forward(x, before[0], packed, bias, g, counter, before[1])
    else:
        raw, partials = kernels.launch_conv(x, packed, bias, g, None, counter)
    stats = bn_ops.merge_statistics(
        partials, _matrix(raw), layer.running_mean, layer.running_var, layer.momentum, counter, layer.eps
    )
    return raw, batch_norm.Norm(stats, None, dense(layer.bn_weight), dense(layer.bn_bias), layer.eps)


class Wanted(NamedTuple):
    """Which gradients one layer has to compute. ``raw``: the convolution's output's, from which others follow;
    ``sums``: batch norm's sums over the gradient; ``below``: the layer's input's."""

    weight: bool
    bias: bool
    bn_weight: bool
    bn_bias: bool
    raw: bool
    sums: bool
    below: bool


def wanted(needs: Sequence[bool], saved: Sequence[SavedLayer]) -> list[Wanted]:
    """What each layer's backward has to do for the gradients ``needs`` asks for, as backward's."""
    found: list[Wanted] = []
    below = needs[0]
    for i, layer in enumerate(saved):
        weight, bias, bn_weight, bn_bias = needs[1 + 4 * i : 5 + 4 * i]
        measured = layer.var is None
        # batch statistics take a bias away again: its gradient is zero, nothing has to be computed for it
        bias = bias and not measured
        raw = weight or below or bias
        sums = bn_weight or bn_bias or (measured and raw)
        found.append(Wanted(weight, bias, bn_weight, bn_bias, raw, sums, below))
        below = below or weight or bias or bn_weight or bn_bias
    return found


def behind_residual(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor | None:
    """What the last activation's gradient needs where a residual hides its input: the output or the residual, both
    alive anyway; None where there is no residual or no activation."""
    if residual is None or activation is None:
        return None
    return residual if activations.needs_input(activation) else y


def backward(
    dy: Tensor, saved: Sequence[SavedLayer], behind: Tensor | None, seed: Tensor | None, plan: Plan,
    eps: Sequence[float], needs: Sequence[bool], input_format: tuple[torch.dtype, bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the input (in ``input_format``: its dtype, whether it is channels_last), then of weight, bias,
    bn_weight and bn_bias of each layer, then of the residual, each where ``needs`` says so. ``behind``:
    behind_residual's."""
    gradients: list[Tensor | None] = [None] * len(needs)
    tasks = wanted(needs, saved)
    # layers whose weight's gradient waits for its runs to be merged
    waiting: list[tuple[int, Any]] = []
    # the gradient of a layer's activation, or, if masked, of its batch norm's output
    d: Any = conv_ops.as_nhwc(dy) if plan.plain_end else dy
    partials: Any = None
    masked = False
    if behind is not None:
        d, partials = _behind_activation(d, behind, saved[-1], eps[-1], plan.activations[-1], tasks[-1].sums)
        masked = True
    if needs[-1]:
        gradients[-1] = d
    for i in reversed(range(len(saved))):
        task, layer, g = tasks[i], saved[i], plan.geometries[i]
        if not (task.raw or task.sums):
            break
        norm = _norm_of(layer, eps[i])
        end = _End(plan, seed) if i == len(saved) - 1 and not plan.plain_end else None
        activation = None if masked else plan.activations[i]
        coefficients, gradients[3 + 4 * i], gradients[4 + 4 * i] = _norm_gradients(
            d, layer, norm, task, end, partials, activation
        )
        if not task.raw:
            break
        recomputes = task.weight and layer.x is None
        of_norm = activation is None and end is None  # d is the gradient of batch norm's output as it stands
        if of_norm and not (task.below or task.bias or recomputes) and _normalizes_in_wgrad(g, coefficients, d):
            through = (layer.mean, layer.bn_weight, coefficients)
            x: Any = layer.x
            config = tuning.wgrad(g, d.dtype, runtime.dot_precision(d.dtype, "conv"))
            workspace = conv_backward.launch_wgrad(
                x, d, g, True, False, layer.raw, config=config, through=through
            )  # fmt: skip
            waiting.append((i, workspace))
            break
        draw = _raw_gradient(d, layer, norm, coefficients, end, activation)
        d, partials, masked = draw, None, False
        if recomputes:
            before = saved[i - 1]
            raw: Any = before.raw
            norm = _norm_of(before, eps[i - 1])
            waiting.append((i, pointwise.launch_wgrad(raw, norm, draw, g, plan.activations[i - 1])))
        elif task.weight:
            waiting.append((i, _weight_sums(draw, layer, g, task)))
        elif task.bias:
            workspace = conv_backward.launch_wgrad(draw, draw, g, False, True)
            gradients[2 + 4 * i] = conv_backward.launch_merge(workspace, g, None, layer.bias)[1]
        if not task.below:
            break
        if i == 0:
            gradients[0] = _input_gradient(draw, layer, g, *input_format)
        elif tasks[i - 1].sums and not g.depthwise:
            before = saved[i - 1]
            raw = before.raw
            norm = _norm_of(before, eps[i - 1])
            packed, transposed = _packed(draw, layer, g)
            d, partials = conv_stage_backward.launch_dgrad(
                draw, packed, g, raw, norm, transposed, plan.activations[i - 1]
            )
            masked = True
        else:
            d = _input_gradient(draw, layer, g, draw.dtype, True)
    sums = [_to_merge(workspace, saved[i], plan.geometries[i], tasks[i], needs[2 + 4 * i]) for i, workspace in waiting]
    for (i, _workspace), merged in zip(waiting, weight_kernels.launch_merges(sums)):
        gradients[1 + 4 * i], gradients[2 + 4 * i] = merged
    for i, layer in enumerate(saved):
        # batch statistics take a bias away again
        if needs[2 + 4 * i] and gradients[2 + 4 * i] is None and layer.bias is not None:
            gradients[2 + 4 * i] = torch.zeros_like(layer.bias)
    return gradients


def _norm_of(layer: SavedLayer, eps: float) -> Any:
    return batch_norm.Norm(layer.mean, layer.var, layer.bn_weight, layer.bn_bias, eps)


def _behind_activation(
    d: Any, behind: Tensor, layer: SavedLayer, eps: float, activation: str | None, sums: bool
) -> tuple[Any, Any]:
    """(the gradient of batch norm's output and of the residual, its partial sums if ``sums``)."""
    norm, m = _norm_of(layer, eps), _matrix(d)
    raw = d if layer.raw is None else layer.raw  # where it is not kept it is not read
    saved, saved_is = conv_ops.as_nhwc(behind), "residual" if activations.needs_input(activation) else "output"
    if sums:
        partials, dz = batch_norm.launch_gradient_sums(d, raw, m, norm, activation, saved, saved_is, write_dz=True)
        return dz, partials
    return batch_norm.launch_input_gradient(
        d, raw, m, norm, None, activation, saved, saved_is, needs_input=False, write_dz=True
    )[1], None


class _End(NamedTuple):
    """The stage's end, to be made again."""

    plan: Plan
    seed: Tensor | None


def _norm_gradients(
    d: Tensor, layer: SavedLayer, norm: Any, task: Wanted, end: _End | None, partials: Any, activation: str | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """batch_norm's coefficients of its input gradient, and the gradients of bn_weight and bn_bias, where wanted.

    ``d``: the stage's incoming gradient where ``end`` is given, else the activation's. ``activation``: None also where
    ``d`` went through its derivative already, then with its ``partials``.
    """
    if not task.sums:
        return None, None, None
    raw: Any = layer.raw
    m = _matrix(raw)
    if end is not None:
        partials = conv_stage_backward.launch_end_sums(d, raw, end.plan.pool, norm, end.plan.p, end.seed, activation)
    elif partials is None:
        partials, _ = batch_norm.launch_gradient_sums(d, raw, m, norm, activation)
    dweight, dbias, coefficients = batch_norm.launch_finalize_gradients(
        partials, m, norm, task.bn_weight, task.bn_bias, norm.var is None and task.raw
    )
    return coefficients, dweight, dbias


def _raw_gradient(
    d: Tensor, layer: SavedLayer, norm: Any, coefficients: Tensor | None, end: _End | None, activation: str | None
) -> Any:
    """The gradient of the convolution's output; ``d`` as for _norm_gradients."""
    raw: Any = layer.raw
    if end is not None:
        pool, p = end.plan.pool, end.plan.p
        return conv_stage_backward.launch_end_gradient(d, raw, pool, norm, coefficients, p, end.seed, activation)
    return batch_norm.launch_input_gradient(d, raw, _matrix(raw), norm, coefficients, activation)[0]


def _normalizes_in_wgrad(g: Geometry, coefficients: Tensor | None, d: Tensor) -> bool:
    """Whether the weight's gradient alone is left to compute and takes batch norm's into its own loop."""
    if coefficients is None or g.depthwise:
        return False
    return tuning.normalizes_in_wgrad(g, d.dtype, runtime.dot_precision(d.dtype, "conv"))


def _weight_sums(draw: Any, layer: SavedLayer, g: Geometry, task: Wanted) -> Tensor:
    """The workspace of the gradients of weight and, where it is to be computed, bias."""
    x: Any = layer.x
    if g.depthwise:
        return conv_depthwise.launch_wgrad(x, draw, g, task.bias)
    return conv_backward.launch_wgrad(x, draw, g, True, task.bias)


def _to_merge(workspace: Tensor, layer: SavedLayer, g: Geometry, task: Wanted, needs_bias: bool) -> Any:
    unmoved = layer.bias if needs_bias and not task.bias else None
    return weight_kernels.WeightSums(workspace, g, layer.weight, layer.bias if task.bias else None, unmoved)


def _packed(dy: Tensor, layer: SavedLayer, g: Geometry) -> tuple[Tensor, bool]:
    """The weight as the input gradient's product reads it, and whether that is transposed."""
    # tf32 products on tensor cores want both operands contiguous along the reduction
    transposed = runtime.dot_precision(dy.dtype, "conv") == "tf32"
    if transposed or layer.packed is None:
        return conv.launch_pack(layer.weight, g, dy.dtype, transposed), transposed
    return layer.packed, False


def _input_gradient(draw: Tensor, layer: SavedLayer, g: Geometry, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """The gradient of a convolution's input."""
    if g.depthwise:
        return conv_depthwise.launch_dgrad(draw, layer.weight, g, dtype, channels_last)
    packed, transposed = _packed(draw, layer, g)
    return conv_backward.launch_dgrad(draw, packed, g, dtype, channels_last, transposed)


class _ConvStage(torch.autograd.Function):
    """Saved are, of each layer, the raw output, vectors, and the input (the activation of the layer before) unless the
    layer formed it from the raw output before as it loaded it; and what behind_residual says."""

    @staticmethod
    def forward(
        ctx: Any, call: plans.Call | None, plan: Plan, layers: Sequence[ConvBNLayer], x: Tensor, *others: Tensor | None
    ) -> Tensor:
        """``others``: the layers' parameters, and the residual."""
        seed = runtime.dropout_seed(x) if plan.p > 0 else None
        y, *kept = _planned_forward(call, x, layers, plan, seed, others[-1], ctx.needs_input_grad[3:])
        autograd.save(ctx, seed, *kept)
        ctx.plan, ctx.eps = plan, tuple(layer.eps for layer in layers)
        ctx.input_format = x.dtype, conv_ops.suggests_channels_last(x)
        return cast(Tensor, y)

    @staticmethod
    @autograd.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.plan, ctx.eps, ctx.needs_input_grad[3:], ctx.input_format
        return None, None, None, *_backward((dy, *autograd.saved(ctx)), *given)


_Options = tuple[tuple[float | None, float, bool], ...]


def tensors(x: Tensor, layers: Sequence[ConvBNLayer], residual: Tensor | None) -> tuple[Tensor | None, ...]:
    """All that a call is given."""
    found: list[Any] = [x]
    for layer in layers:
        found += layer[:TENSORS]
    found.append(residual)
    return tuple(found)


def _planned_forward(
    call: plans.Call | None, x: Tensor, layers: Sequence[ConvBNLayer], plan: Plan, seed: Tensor | None,
    residual: Tensor | None, needs: tuple[bool, ...] | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    given = (*tensors(x, layers, residual), seed)
    options = tuple([(layer.momentum, layer.eps, layer.counts(plan.training)) for layer in layers])
    return _forward.of_call(call, given, plan, options, needs)


@plans.Planned
def _forward(
    tensors: tuple[Tensor | None, ...], plan: Plan, options: _Options, needs: tuple[bool, ...] | None
) -> tuple[Tensor | None, ...]:
    """y and, of each layer, what backward needs for the gradients ``needs`` asks for; y alone for None."""
    x, *rest, residual, seed = tensors
    layers = []
    for i, (momentum, eps, counts) in enumerate(options):
        own: Any = dict(zip(ConvBNLayer._fields, rest[TENSORS * i : TENSORS * (i + 1)]))
        layers.append(ConvBNLayer(**own, momentum=momentum, eps=eps, training=counts))
    y, saved = forward(cast(Tensor, x), layers, plan, needs is not None, seed, residual)
    if needs is None:
        return (y,)
    tasks = wanted(needs, saved)
    behind = behind_residual(y, residual, plan.activations[-1])
    reads_last = behind is not None and behind is residual  # added to what the raw map comes to
    kept: list[Tensor | None] = [behind]
    for i, (layer, task, needs_bias) in enumerate(zip(saved, tasks, needs[2::4])):
        above = reads_last if i + 1 == len(saved) else saved[i + 1].x is None and tasks[i + 1].weight
        kept += layer._replace(
            x=layer.x if task.weight else None,
            bias=layer.bias if needs_bias else None,
            packed=layer.packed if task.below and layer.packed is not layer.weight else None,
            raw=layer.raw if task.raw or task.sums or above else None,
        )
    return (y, *kept)


@plans.Planned
def _backward(
    tensors: tuple[Tensor | None, ...], plan: Plan, eps: tuple[float, ...], needs: tuple[bool, ...],
    input_format: tuple[torch.dtype, bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients, of dy, dropout's seed and what _forward kept."""
    dy, seed, behind, *kept = tensors
    width = len(SavedLayer._fields)
    saved = [SavedLayer(*cast(Any, kept[i : i + width])) for i in range(0, len(kept), width)]
    return tuple(backward(cast(Tensor, dy), saved, behind, seed, plan, eps, needs, input_format))


def run(
    x: Tensor, layers: Sequence[ConvBNLayer], plan: Plan, residual: Tensor | None, call: plans.Call | None
) -> Tensor:
    """The stage, differentiable where that is asked for."""
    if residual is not None:
        residual = residual.to(plan.dtype)
    if torch.is_grad_enabled():
        others = [t for layer in layers for t in layer[:4]]
        others.append(residual)
        if x.requires_grad or any(t is not None and t.requires_grad for t in others):
            return cast(Tensor, _ConvStage.apply(call, plan, layers, x, *others))
    seed = runtime.dropout_seed(x) if plan.p > 0 else None
    return cast(Tensor, _planned_forward(call, x, layers, plan, seed, residual, None)[0])
