"""A conv stage on Triton: its forward and its backward, as sequences of launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from tkernels.core import activation as activations
from tkernels.core import mode, targets
from tkernels.core.geometry import Geometry, Matrix, Pooling, as_nhwc, matrix, no_pooling
from tkernels.core.records import BatchNorm, ConvBNLayer, Norm, Partials, Route, StageCall, WeightSums
from tkernels.ops.batch_norm import kernels as batch_norm
from tkernels.ops.batch_norm import launches as batch_norm_launches
from tkernels.ops.batch_norm import op as bn_ops
from tkernels.ops.conv import aten
from tkernels.ops.conv import kernels as conv
from tkernels.ops.conv import kernels_backward as conv_backward
from tkernels.ops.conv import kernels_depthwise as conv_depthwise
from tkernels.ops.conv_stage import config as tuning
from tkernels.ops.conv_stage import kernels
from tkernels.ops.conv_stage import kernels_backward as conv_stage_backward
from tkernels.ops.conv_stage import kernels_pointwise as pointwise
from tkernels.ops.conv_stage import kernels_weights as weight_kernels

__all__ = ["SavedLayer", "backward", "behind_residual", "conv_input", "forward", "kept_maps", "wanted"]


# the norm and the activation that a raw map has yet to go through, None where it is no raw map
Before = tuple[Norm, str | None] | None


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

    @property
    def input(self) -> Tensor:
        """``x`` of a layer that has it."""
        return cast(Tensor, self.x)

    @property
    def output(self) -> Tensor:
        """``raw``, of a layer whose backward reads it."""
        return cast(Tensor, self.raw)

    def norm(self, eps: float) -> Norm:
        return Norm(self.mean, self.var, self.bn_weight, self.bn_bias, eps)


def forward(
    x: Tensor, layers: Sequence[ConvBNLayer], stage: StageCall, nhwc: bool, keep: bool, seed: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, list[SavedLayer], Tensor | None]:  # fmt: skip
    """(y, what backward needs of each layer, what it needs of the last activation behind a residual or of where the
    windows' maxima are, both if ``keep``).

    ``x``: conv_input's; ``nhwc``: whether y is channels_last; ``seed``: dropout's; ``residual``: in the maps' dtype,
    or, with a shortcut, the input of that.
    """
    saved: list[SavedLayer] = []
    tells: Tensor | None = None
    packed = _pack(layers, stage)
    last = stage.depth - 1
    before: Before = None
    own: list[SavedLayer] = []
    of_residual: Norm | None = None
    if stage.shortcut:
        residual, of_residual, own = _shortcut(cast(Tensor, residual), layers, packed, stage, keep)
    for i, (layer, g) in enumerate(zip(layers[: last + 1], stage.geometries)):
        end, activation, route = i == last, stage.activations[i], stage.route(i)
        bn = layer.batch_norm(stage.training)
        if not (bn.training or keep):
            in_nhwc = nhwc or not (end and stage.plain_end)
            x = _folded(
                x, packed[i], layer, bn_ops.norm_of(bn), g, in_nhwc, activation, residual if end else None, route
            )
            if end and not stage.plain_end:
                x = kernels.launch_end(x, stage.pool, None, stage.p, seed, nhwc)
            continue
        if bn.training:
            raw, norm = _measured(x, before, packed[i], layer, bn, g, route)
        else:
            raw, norm = _given(x, packed[i], layer, g, route), bn_ops.norm_of(bn)
        if keep:
            read = x if before is None else None
            saved.append(SavedLayer(read, layer.weight, layer.bias, packed[i], raw, *norm[:4]))
        before = (norm, activation) if not end and _normalizes_in_next(layers[i + 1], stage, i + 1) else None
        if before is not None:
            x = raw
        elif end and not stage.plain_end:
            tells = kernels.taps_like(raw, stage.pool) if keep else None
            x = kernels.launch_end(raw, stage.pool, norm, stage.p, seed, nhwc, activation, tells)
        else:
            if end and keep and residual is not None and activation == "relu":
                tells = batch_norm.signs_like(raw, _matrix(raw))
            added = (residual, of_residual) if end else (None, None)
            x = _normalized(raw, norm, activation, added[0], nhwc or not end, tells, added[1])
    behind = behind_residual(x, residual, stage.activations[last]) if tells is None else tells
    return x, [*saved, *own], behind


def _shortcut(
    x: Tensor, layers: Sequence[ConvBNLayer], packed: Sequence[Tensor], stage: StageCall, keep: bool
) -> tuple[Tensor, Norm | None, list[SavedLayer]]:
    """(the residual, the norm it is yet to go through, what backward needs): the last layer's, of the input ``x``."""
    i, layer = stage.depth, layers[-1]
    g, route, bn = stage.geometries[i], stage.route(i), layer.batch_norm(stage.training)
    x = conv_input(x, g, stage.dtype, route)
    if not (bn.training or keep):
        return _folded(x, packed[i], layer, bn_ops.norm_of(bn), g, True, None, None, route), None, []
    if bn.training:
        raw, norm = _measured(x, None, packed[i], layer, bn, g, route)
    else:
        raw, norm = _given(x, packed[i], layer, g, route), bn_ops.norm_of(bn)
    own = [SavedLayer(x, layer.weight, layer.bias, packed[i], raw, *norm[:4])] if keep else []
    if keep or layers[i - 1].batch_norm(stage.training).training:
        return raw, norm, own
    return _normalized(raw, norm, None, None, True), None, own


def _normalized(
    raw: Tensor, norm: Norm, activation: str | None, residual: Tensor | None, channels_last: bool,
    signs: Tensor | None = None, of_residual: Norm | None = None,
) -> Tensor:  # fmt: skip
    """activation(batch_norm(raw) + residual) of an NHWC map, in either layout; writes its ``signs`` where given.
    ``of_residual``: a norm that the residual is yet to go through."""
    if residual is None and not channels_last:
        return kernels.launch_end(raw, _unpooled(raw), norm, channels_last=False, activation=activation)
    added = None if residual is None else as_nhwc(residual)
    y = batch_norm.launch_normalize(raw, _matrix(raw), norm, activation, added, signs=signs, of_residual=of_residual)
    return y if channels_last else kernels.launch_end(y, _unpooled(y), None, channels_last=False)


def _unpooled(x: Tensor) -> Pooling:
    return no_pooling(x.shape[2], x.shape[3])


def _normalizes_in_next(layer: ConvBNLayer, stage: StageCall, i: int) -> bool:
    """Whether layer ``i`` normalises and activates its input itself."""
    ours = layer.measures(stage.training) and not (stage.route(i).forward or stage.route(i).wgrad) and i < stage.depth
    return ours and tuning.applies_in_prologue(stage.geometries[i], stage.dtype, targets.current())


def _pack(layers: Sequence[ConvBNLayer], stage: StageCall) -> list[Tensor]:
    """The weights as forward's products read them; depthwise layers read them as they are."""
    packed = [layer.weight for layer in layers]
    for i, weight in enumerate(packed):
        if stage.route(i).forward:
            packed[i] = aten.weight_of(weight, stage.dtype)
    chosen = [i for i, g in enumerate(stage.geometries) if not (g.depthwise or stage.route(i).forward)]
    geometries = [stage.geometries[i] for i in chosen]
    for i, t in zip(chosen, weight_kernels.launch_packs([packed[i] for i in chosen], geometries, stage.dtype)):
        packed[i] = t
    return packed


def conv_input(x: Tensor, g: Geometry, dtype: torch.dtype, route: Route) -> Tensor:
    """The input as the convolution's kernels read it: with few channels any, else (and as PyTorch's do) NHWC in
    ``dtype``."""
    if g.flattened and not (g.depthwise or route.forward or route.wgrad):
        return x
    return as_nhwc(x.to(dtype))


def _matrix(raw: Tensor) -> Matrix:
    return matrix(raw.shape, True)


def _folded(
    x: Tensor, packed: Tensor, layer: ConvBNLayer, norm: Norm, g: Geometry, channels_last: bool,
    activation: str | None, residual: Tensor | None, route: Route,
) -> Tensor:  # fmt: skip
    """activation(batch_norm(conv(x)) + residual) by running statistics, in one kernel unless depthwise or PyTorch's."""
    if g.depthwise or route.forward:
        return _normalized(_given(x, packed, layer, g, route), norm, activation, residual, channels_last)
    if residual is not None:
        residual = as_nhwc(residual) if channels_last else residual.contiguous()
    return kernels.launch_conv(
        x, packed, bn_ops.dense(layer.bias), g, norm, channels_last=channels_last, activation=activation,
        residual=residual,
    )[0]  # fmt: skip


def _given(x: Tensor, packed: Tensor, layer: ConvBNLayer, g: Geometry, route: Route) -> Tensor:
    """The raw output where its statistics are not asked for."""
    bias = bn_ops.dense(layer.bias)
    if route.forward:
        return aten.forward(x, packed, bias, g)
    if g.depthwise:
        return conv_depthwise.launch_forward(x, layer.weight, bias, g)[0]
    return conv.launch_forward(x, packed, bias, g)[0]


def _measured(
    x: Tensor, before: Before, packed: Tensor, layer: ConvBNLayer, bn: BatchNorm, g: Geometry, route: Route
) -> tuple[Tensor, Norm]:
    """(raw output, Norm) by the batch's statistics; in training moves the running ones."""
    counter, bias = bn.num_batches_tracked, bn_ops.dense(layer.bias)
    partials: Partials | None
    if g.depthwise or route.forward:
        raw = _given(x, packed, layer, g, route)
        partials = batch_norm.launch_statistics(raw, _matrix(raw), counter)
    elif before is not None:
        raw, partials = pointwise.launch_forward(x, before[0], packed, bias, g, counter, before[1])
    else:
        raw, partials = kernels.launch_conv(x, packed, bias, g, None, counter)
    return raw, bn_ops.norm_of(bn, batch_norm_launches.merge_statistics(cast(Partials, partials), _matrix(raw), bn))


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


def wanted(needs: Sequence[bool], measured: Sequence[bool], depth: int) -> list[Wanted]:
    """What each layer's backward has to do for the gradients ``needs`` asks for, as backward's. ``measured``: whether
    the batch's statistics normalised it; ``depth``: how many layers follow one another, before a shortcut."""
    if depth < len(measured):
        of_shortcut = needs[-1], *needs[1 + 4 * depth : 5 + 4 * depth]
        return wanted(needs, measured[:depth], depth) + wanted(of_shortcut, measured[depth:], 1)
    found: list[Wanted] = []
    below = needs[0]
    for i, from_batch in enumerate(measured):
        weight, bias, bn_weight, bn_bias = needs[1 + 4 * i : 5 + 4 * i]
        # batch statistics take a bias away again: its gradient is zero, nothing has to be computed for it
        bias = bias and not from_batch
        raw = weight or below or bias
        sums = bn_weight or bn_bias or (from_batch and raw)
        found.append(Wanted(weight, bias, bn_weight, bn_bias, raw, sums, below))
        below = below or weight or bias or bn_weight or bn_bias
    return found


def kept_maps(
    layers: Sequence[ConvBNLayer], stage: StageCall, tasks: Sequence[Wanted], reads_last: bool
) -> list[tuple[bool, bool]]:
    """Of each layer, whether backward reads its input and its raw output. ``reads_last``: whether what is behind the
    residual makes it read the last raw output whatever its task is (not with a shortcut)."""
    formed = [i > 0 and _normalizes_in_next(layer, stage, i) for i, layer in enumerate(layers)]
    # an input that was formed from the raw output before it is formed from that again
    above = [formed[i] and tasks[i].weight for i in range(1, len(layers))]
    return [
        (task.weight and not own, task.raw or task.sums or next_reads)
        for task, own, next_reads in zip(tasks, formed, (*above, reads_last))
    ]


def behind_residual(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor | None:
    """What the last activation's gradient needs where a residual hides its input and no signs were written: the output
    or the residual, both alive anyway; None where there is no residual or no activation."""
    if residual is None or activation is None:
        return None
    return residual if activations.needs_input(activation) else y


def backward(
    dy: Tensor, more: Tensor | None, saved: Sequence[SavedLayer], behind: Tensor | None, seed: Tensor | None,
    stage: StageCall, eps: Sequence[float], needs: Sequence[bool], input_format: tuple[torch.dtype, bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the input (in ``input_format``: its dtype, whether it is channels_last), then of weight, bias,
    bn_weight and bn_bias of each layer, then of the residual or a shortcut's input, each where ``needs`` says so.
    ``more``: a second gradient of the output, to be added to dy; ``behind``: forward's."""
    gradients: list[Tensor | None] = [None] * len(needs)
    last = stage.depth - 1
    tasks = wanted(needs, [layer.var is None for layer in saved], stage.depth)
    # layers whose weight's gradient waits for its runs to be merged
    waiting: list[tuple[int, Tensor]] = []
    # the gradient of a layer's activation, or, if masked, of its batch norm's output
    if more is not None and (behind is None or not stage.plain_end):
        dy, more = dy + more, None
    d = as_nhwc(dy) if stage.plain_end else dy
    partials: Partials | None = None
    masked = False
    if behind is not None and stage.plain_end:
        more = None if more is None else as_nhwc(more)
        layer, activation, sums = saved[last], stage.activations[last], tasks[last].sums
        d, partials = _behind_activation(d, more, behind, layer, eps[last], activation, sums)
        masked = True
    if stage.shortcut:
        found, workspace = _shortcut_gradients(d, saved[-1], stage, eps[-1], tasks[-1])
        gradients[5 + 4 * last : 9 + 4 * last], gradients[-1] = found[1:], found[0]
        waiting += [] if workspace is None else [(stage.depth, workspace)]
    elif needs[-1]:
        gradients[-1] = d
    for i in reversed(range(stage.depth)):
        task, layer, g, route = tasks[i], saved[i], stage.geometries[i], stage.route(i)
        if not (task.raw or task.sums):
            break
        norm = layer.norm(eps[i])
        end = _End(stage, seed, behind) if i == last and not stage.plain_end else None
        activation = None if masked else stage.activations[i]
        coefficients, gradients[3 + 4 * i], gradients[4 + 4 * i] = _norm_gradients(
            d, layer, norm, task, end, partials, activation
        )
        if not task.raw:
            break
        recomputes = task.weight and layer.x is None
        of_norm = activation is None and end is None  # d is the gradient of batch norm's output as it stands
        alone = not (task.below or task.bias or recomputes or route.wgrad)  # the weight's gradient, by our kernel
        if of_norm and alone and _normalizes_in_wgrad(g, coefficients, d):
            through = (layer.mean, layer.bn_weight, coefficients)
            config = tuning.wgrad(g, d.dtype, mode.dot_precision(d.dtype, "conv"), targets.current())
            workspace = conv_backward.launch_wgrad(
                layer.input, d, g, True, False, layer.raw, config=config, through=through
            )  # fmt: skip
            waiting.append((i, workspace))
            break
        draw = _raw_gradient(d, layer, norm, coefficients, end, activation)
        d, partials, masked = draw, None, False
        if recomputes:
            before = saved[i - 1]
            workspace = pointwise.launch_wgrad(
                before.output, before.norm(eps[i - 1]), draw, g, stage.activations[i - 1]
            )
            waiting.append((i, workspace))
        elif task.weight and route.wgrad:
            gradients[1 + 4 * i] = aten.weight_gradient(
                draw, layer.input, _weight_of(draw, layer, route), layer.weight, g
            )
        elif task.weight:
            waiting.append((i, _weight_sums(draw, layer, g, task)))
        if task.bias and (route.wgrad or not task.weight):
            workspace = conv_backward.launch_wgrad(draw, draw, g, False, True)
            gradients[2 + 4 * i] = conv_backward.launch_merge(workspace, g, None, layer.bias)[1]
        if not task.below:
            break
        if i == 0:
            gradients[0] = _input_gradient(draw, layer, g, route, *input_format)
        elif tasks[i - 1].sums and not (g.depthwise or route.dgrad):
            raw, norm = saved[i - 1].output, saved[i - 1].norm(eps[i - 1])
            packed, transposed = _packed(draw, layer, g, route)
            d, partials = conv_stage_backward.launch_dgrad(
                draw, packed, g, raw, norm, transposed, stage.activations[i - 1]
            )
            masked = True
        else:
            d = _input_gradient(draw, layer, g, route, draw.dtype, True)
    merges = [_to_merge(each, saved[i], stage.geometries[i], tasks[i], needs[2 + 4 * i]) for i, each in waiting]
    for (i, _workspace), merged in zip(waiting, weight_kernels.launch_merges(merges)):
        gradients[1 + 4 * i], gradients[2 + 4 * i] = merged
    for i, layer in enumerate(saved):
        # batch statistics take a bias away again
        if needs[2 + 4 * i] and gradients[2 + 4 * i] is None and layer.bias is not None:
            gradients[2 + 4 * i] = torch.zeros_like(layer.bias)
    return gradients


def _shortcut_gradients(
    d: Tensor, layer: SavedLayer, stage: StageCall, eps: float, task: Wanted
) -> tuple[list[Tensor | None], Tensor | None]:
    """(gradients of a shortcut's input, its weight, bias, bn_weight and bn_bias; the workspace of the weight's, where
    that waits to be merged) of the residual's gradient."""
    found: list[Tensor | None] = [None] * 5
    workspace: Tensor | None = None
    if not (task.raw or task.sums):
        return found, workspace
    g, route, norm = stage.geometries[stage.depth], stage.route(stage.depth), layer.norm(eps)
    coefficients, found[3], found[4] = _norm_gradients(d, layer, norm, task, None, None, None)
    if not task.raw:
        return found, workspace
    draw = _raw_gradient(d, layer, norm, coefficients, None, None)
    if task.weight and route.wgrad:
        found[1] = aten.weight_gradient(draw, layer.input, _weight_of(draw, layer, route), layer.weight, g)
    elif task.weight:
        workspace = _weight_sums(draw, layer, g, task)
    if task.bias and workspace is None:
        sums = conv_backward.launch_wgrad(draw, draw, g, False, True)
        found[2] = conv_backward.launch_merge(sums, g, None, layer.bias)[1]
    if task.below:
        found[0] = _input_gradient(draw, layer, g, route, draw.dtype, True)
    return found, workspace


def _behind_activation(
    d: Tensor, more: Tensor | None, behind: Tensor, layer: SavedLayer, eps: float, activation: str | None, sums: bool
) -> tuple[Tensor, Partials | None]:
    """(the gradient of batch norm's output and of the residual, its partial sums if ``sums``) of d + ``more``."""
    norm, m = layer.norm(eps), _matrix(d)
    partials: Partials | None = None
    raw = d if layer.raw is None else layer.raw  # where it is not kept it is not read
    if behind.dtype == torch.uint8:
        saved, saved_is = behind, "signs"
    else:
        saved, saved_is = as_nhwc(behind), "residual" if activations.needs_input(activation) else "output"
    if sums:
        partials, dz = batch_norm.launch_gradient_sums(
            d, raw, m, norm, activation, saved, saved_is, write_dz=True, more=more
        )
    else:
        _, dz = batch_norm.launch_input_gradient(
            d, raw, m, norm, None, activation, saved, saved_is, needs_input=False, write_dz=True, more=more
        )
    return cast(Tensor, dz), partials


class _End(NamedTuple):
    """The stage's end, to be made again."""

    stage: StageCall
    seed: Tensor | None
    taps: Tensor | None


def _norm_gradients(
    d: Tensor,
    layer: SavedLayer,
    norm: Norm,
    task: Wanted,
    end: _End | None,
    partials: Partials | None,
    activation: str | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """batch_norm's coefficients of its input gradient, and the gradients of bn_weight and bn_bias, where wanted.

    ``d``: the stage's incoming gradient where ``end`` is given, else the activation's. ``activation``: None also where
    ``d`` went through its derivative already, then with its ``partials``.
    """
    if not task.sums:
        return None, None, None
    raw, m = layer.output, _matrix(layer.output)
    if end is not None:
        pool, p = end.stage.pool, end.stage.p
        partials = conv_stage_backward.launch_end_sums(d, raw, pool, norm, p, end.seed, activation, end.taps)
    elif partials is None:
        partials, _ = batch_norm.launch_gradient_sums(d, raw, m, norm, activation)
    dweight, dbias, coefficients = batch_norm.launch_finalize_gradients(
        partials, m, norm, task.bn_weight, task.bn_bias, norm.var is None and task.raw
    )
    return coefficients, dweight, dbias


def _raw_gradient(
    d: Tensor, layer: SavedLayer, norm: Norm, coefficients: Tensor | None, end: _End | None, activation: str | None
) -> Tensor:
    """The gradient of the convolution's output; ``d`` as for _norm_gradients."""
    raw = layer.output
    if end is not None:
        pool, p = end.stage.pool, end.stage.p
        return conv_stage_backward.launch_end_gradient(
            d, raw, pool, norm, coefficients, p, end.seed, activation, end.taps
        )
    return cast(Tensor, batch_norm.launch_input_gradient(d, raw, _matrix(raw), norm, coefficients, activation)[0])


def _normalizes_in_wgrad(g: Geometry, coefficients: Tensor | None, d: Tensor) -> bool:
    """Whether the weight's gradient alone is left to compute and takes batch norm's into its own loop."""
    if coefficients is None or g.depthwise:
        return False
    return tuning.normalizes_in_wgrad(g, d.dtype, mode.dot_precision(d.dtype, "conv"), targets.current())


def _weight_sums(draw: Tensor, layer: SavedLayer, g: Geometry, task: Wanted) -> Tensor:
    """The workspace of the gradients of weight and, where it is to be computed, bias."""
    if g.depthwise:
        return conv_depthwise.launch_wgrad(layer.input, draw, g, task.bias)
    return conv_backward.launch_wgrad(layer.input, draw, g, True, task.bias)


def _to_merge(workspace: Tensor, layer: SavedLayer, g: Geometry, task: Wanted, needs_bias: bool) -> WeightSums:
    unmoved = layer.bias if needs_bias and not task.bias else None
    return WeightSums(workspace, g, layer.weight, layer.bias if task.bias else None, unmoved)


def _weight_of(dy: Tensor, layer: SavedLayer, route: Route) -> Tensor:
    """The weight as PyTorch's products take it."""
    if route.forward and layer.packed is not None:
        return layer.packed
    return aten.weight_of(layer.weight, dy.dtype)


def _packed(dy: Tensor, layer: SavedLayer, g: Geometry, route: Route) -> tuple[Tensor, bool]:
    """The weight as the input gradient's product reads it, and whether that is transposed."""
    # tf32 products on tensor cores want both operands contiguous along the reduction
    transposed = mode.dot_precision(dy.dtype, "conv") == "tf32"
    if transposed or layer.packed is None or route.forward:
        return conv.launch_pack(layer.weight, g, dy.dtype, transposed), transposed
    return layer.packed, False


def _input_gradient(
    draw: Tensor, layer: SavedLayer, g: Geometry, route: Route, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """The gradient of a convolution's input."""
    if route.dgrad:
        shape = draw.shape[0], g.in_channels, g.height, g.width
        # only its sizes are asked for, and the image of a stem may have been kept as it lay, in another dtype
        kept = layer.x is not None and not g.flattened
        x = layer.input if kept else conv.empty_pixels(draw, shape, draw.dtype, True)
        dx = aten.input_gradient(draw, x, _weight_of(draw, layer, route), g).to(dtype)
        return dx if channels_last else dx.contiguous()
    if g.depthwise:
        return conv_depthwise.launch_dgrad(draw, layer.weight, g, dtype, channels_last)
    packed, transposed = _packed(draw, layer, g, route)
    return conv_backward.launch_dgrad(draw, packed, g, dtype, channels_last, transposed)
