"""A conv stage on the CPU as one autograd function: oneDNN's convolutions, compiled passes, memory used again.

Against torch's own calls in a row it leaves out what they spend between convolutions: passes over maps, int64 indices
of the pooling, zero fills and page faults. ``ops.conv_stage`` takes it where it pays and where it is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from tkernels.core import _torch, autograd
from tkernels.core.geometry import Geometry, Pooling, stage_channels_last
from tkernels.core.records import BatchNorm, ConvBNLayer, StageCall
from tkernels.cpu import buffers, compiler, guard, norm, packed, passes

aten = torch.ops.aten
# Elements of a stage's largest map from which on a call is worth compiled passes.
WORTH_IT = 1 << 18
# Bytes a thread of a chunk's largest map in evaluation: it and the next layer's then stay in cache. (Measured on an AMD
# EPYC with 1 MB of second-level cache a core: 1 to 2.5 MB are within 3%, 0.5 and 16 MB 7% slower.)
CHUNK = 2 << 20


def conv_stage(x: Tensor, layers: Sequence[ConvBNLayer], stage: StageCall) -> Tensor | None:
    """The stage without a residual, in training and in evaluation that nobody differentiates; None where it is
    PyTorch's."""
    # (a trace must not learn of sizes; for small stages the guard's other questions would cost too much)
    if is_dynamo_compiling() or type(x) not in guard.PLAIN or not _is_large(x, stage):
        return None
    if not (guard.supports(x) and _is_right(x, layers, stage)):
        return None
    nhwc = stage_channels_last(x, [layer.weight for layer in layers], stage.geometries)
    from_batch = [layer.measures(stage.training) for layer in layers]
    if all(from_batch):
        return train(x, layers, stage, nhwc)
    if any(from_batch) or stage.p > 0 or guard.recorded(x, *_parameters(layers)):
        return None
    return evaluate(x, layers, stage, nhwc)


def _is_large(x: Tensor, stage: StageCall) -> bool:
    return x.shape[0] * max([g.out_h * g.out_w * g.out_channels for g in stage.geometries]) >= WORTH_IT


def _is_right(x: Tensor, layers: Sequence[ConvBNLayer], stage: StageCall) -> bool:
    """Whether the passes and oneDNN do what the call asks for."""
    pool, dtype = stage.pool, stage.dtype
    return (
        dtype in guard.DTYPES
        and not (pool.pad_h or pool.pad_w or pool.border or pool.height % pool.kernel_h or pool.width % pool.kernel_w)
        and (pool.kernel_h, pool.kernel_w) == (pool.stride_h, pool.stride_w)
        and pool.taps <= 16
        and all(layer.activation == "relu" for layer in layers)
        and packed.enabled(dtype)
        and all(_is_symmetric(g) and packed.is_safe(g.in_channels, *_window(g)[1:3]) for g in stage.geometries)
        and guard.are_plain([x, *(t for layer in layers for t in layer[:6])], torch.float32, dtype)
        and compiler.enabled()
    )


def _window(g: Geometry) -> Any:
    """A convolution's arguments as oneDNN has them: padding, stride, dilation, groups."""
    return (g.pad_h, g.pad_w), (g.stride_h, g.stride_w), (g.dilation_h, g.dilation_w), g.groups


def _out(size: int, window: int, pad: int, stride: int, dilation: int) -> int:
    return (size + 2 * pad - dilation * (window - 1) - 1) // stride + 1


def _is_symmetric(g: Geometry) -> bool:
    """Whether torch's own padding argument says all there is to say of the convolution's."""
    return g.out_h == _out(g.height, g.kernel_h, g.pad_h, g.stride_h, g.dilation_h) and g.out_w == _out(
        g.width, g.kernel_w, g.pad_w, g.stride_w, g.dilation_w
    )


class SavedLayer(NamedTuple):
    """What a layer's backward needs. ``x``: its input, NHWC; ``w``: the weight in the maps' dtype; ``raw``: its
    convolution's output without the bias, which batch norm takes away again."""

    x: Tensor
    w: Tensor
    raw: Tensor
    mean: Tensor
    scale: Tensor
    inverse: Tensor
    bias: Tensor


def _nhwc(t: Tensor) -> Tensor:
    """A map as a dense tensor (N, H, W, C); the same memory where it is channels_last."""
    return t.permute(0, 2, 3, 1).contiguous()


def _map(nhwc: Tensor) -> Tensor:
    return nhwc.permute(0, 3, 1, 2)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` itself, or a channels_last copy in ``dtype``."""
    return x if x.dtype == dtype else buffers.channels_last(dtype, *x.shape).copy_(x)


def _rows(nhwc: Tensor) -> Tensor:
    """[groups, rows, C]: enough groups for every thread, short enough for float32 sums and a core's cache."""
    n, h, w, c = nhwc.shape
    return nhwc.view(n * h, w, c) if n < 32 or h * w > 2048 else nhwc.view(n, h * w, c)


def _windows(nhwc: Tensor, pool: Pooling) -> Tensor:
    n, _, _, c = nhwc.shape
    return nhwc.view(n, pool.out_h, pool.kernel_h, pool.out_w, pool.kernel_w, c)


def _convolution(x: Tensor, w: Tensor, window: Any) -> Tensor:
    """The convolution of NHWC maps, NHWC. Where new memory faults it goes to memory used again: oneDNN adds to what is
    there, which is zero; the bits are the same."""
    sides = (_out(*side) for side in zip(x.shape[1:3], w.shape[2:], *window[:3]))
    shape = x.shape[0], *sides, w.shape[0]
    nbytes = x.element_size() * torch.Size(shape).numel()

    def anew() -> Tensor:
        result: Tensor = _torch.onednn_conv(_map(x), w, None, *window, "none", [], "")
        return result

    if nbytes < buffers.SMALLEST:
        return _nhwc(anew())
    if not buffers.FRESH.faulted(nbytes):
        return _nhwc(buffers.FRESH.watch(nbytes, anew))
    out = buffers.dense(x.dtype, *shape).zero_()
    _torch.onednn_conv_into(_map(out), _map(x), w, None, *window, "add", 1.0, None, [], None)
    return out


def _input_gradient(d: Tensor, layer: SavedLayer, g: Geometry) -> Tensor:
    """The gradient of a layer's input, NHWC: with stride 1 a convolution by the flipped weight."""
    pad = g.dilation_h * (g.kernel_h - 1) - g.pad_h, g.dilation_w * (g.kernel_w - 1) - g.pad_w
    if g.stride_h == g.stride_w == g.groups == 1 and min(pad) >= 0:
        flipped = layer.w.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        return _convolution(d, flipped, (pad, *_window(g)[1:]))
    return _nhwc(_conv_backward(d, layer, g, (True, False, False))[0])


def _conv_backward(d: Tensor, layer: SavedLayer, g: Geometry, mask: Sequence[bool]) -> Any:
    pad, stride, dilation, groups = _window(g)
    return aten.convolution_backward(
        _map(d), _map(layer.x), layer.w, None, stride, pad, dilation, False, (0, 0), groups, mask
    )


def draw(x: Tensor, stage: StageCall) -> Tensor:
    """Dropout2d's factors [N, C], with the draws of torch.nn.functional.dropout2d on the last map."""
    keep = torch.ones(x.shape[0], stage.geometries[-1].out_channels, 1, 1, dtype=stage.dtype, device="cpu")
    if stage.p > 0:
        keep.bernoulli_(1 - stage.p)
    factors = keep.flatten(1).float()
    return factors / (1 - stage.p) if 0 < stage.p < 1 else factors


def forward(
    x: Tensor, layers: Sequence[ConvBNLayer], stage: StageCall, nhwc: Sequence[bool]
) -> tuple[Tensor, list[SavedLayer], Tensor]:
    """(y, what backward needs, the dropout's factors) in training; moves running statistics and counters. Backward
    needs nothing but the arguments where the passes could not go on with what they measured."""
    a = _nhwc(_cast(x.detach(), stage.dtype))
    saved: list[SavedLayer] = []
    seen: list[passes.Measured] = []
    for layer, g in zip(layers, stage.geometries):
        if saved:
            below = saved[-1]
            a = buffers.dense(below.raw.dtype, *below.raw.shape)
            passes.normalize(_rows(below.raw), below.mean, below.scale, below.bias, _rows(a))
        w = layer.weight.detach().to(stage.dtype).contiguous(memory_format=torch.channels_last)
        raw = _convolution(a, w, _window(g))
        bias, bn_weight, bn_bias = (
            passes.vector(t, g.out_channels, default)
            for t, default in ((layer.bias, 0.0), (layer.bn_weight, 1.0), (layer.bn_bias, 0.0))
        )
        found = passes.Measured(*passes.statistics(_rows(raw), bias, bn_weight, passes.number(layer.eps)))
        if not passes.is_sound(found.sound):
            keep = draw(x, stage)
            return _in_format(composed(x, layers, stage, keep), nhwc[-1]), [], keep
        seen.append(found)
        saved.append(SavedLayer(a, w, raw, found.mean, found.scale, found.inverse, bn_bias))
    for layer, found in zip(layers, seen):
        _move_statistics(layer.batch_norm(stage.training), found)
    keep = draw(x, stage)
    return _layout(_end(saved[-1], stage, keep), nhwc[-1]), saved, keep


def _layout(y: Tensor, channels_last: bool) -> Tensor:
    return y if channels_last else y.contiguous()


def _in_format(y: Tensor, channels_last: bool) -> Tensor:
    if _torch.is_legacy_batched(y) or _torch.is_wrapped(y):  # a batch of them, which knows of no formats
        return y
    return y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _end(layer: SavedLayer, stage: StageCall, keep: Tensor) -> Tensor:
    """The stage's result in channels_last: a view of nothing, so that whoever gets it may write to it."""
    raw, pool = layer.raw, stage.pool
    y = buffers.channels_last(raw.dtype, raw.shape[0], raw.shape[3], pool.out_h, pool.out_w)
    vectors = layer.mean, layer.scale, layer.bias
    if stage.plain_end:
        passes.normalize(_rows(raw), *vectors, _rows(_nhwc(y)))
    else:
        _ends(pool).forward(_windows(raw, pool), *vectors, keep, _nhwc(y))
    return y


def _ends(pool: Pooling) -> passes.Ends:
    return passes.ends(pool.kernel_h, pool.kernel_w)


def _move_statistics(bn: BatchNorm, found: passes.Measured) -> None:
    """torch's running statistics: of the map with the convolution's bias, with the unbiased variance."""
    factor = norm.counted(bn).momentum or 0.0
    for running, batch in ((bn.running_mean, found.shifted), (bn.running_var, found.unbiased)):
        # (.data, as torch's own batch norm moves them without a word to autograd: a graph that another call of it made
        # has saved them, and must stay what it is)
        if running is not None:
            running.data.lerp_(batch.to(running.dtype), factor)


def backward(
    dy: Tensor, saved: Sequence[SavedLayer], keep: Tensor, layers: Sequence[ConvBNLayer], stage: StageCall,
    needs: Sequence[bool], nhwc: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the input, then of weight, bias, bn_weight and bn_bias of each layer, each where ``needs`` says so
    and in its tensor's dtype; those of maps and weights laid out as ``nhwc`` says of their layer."""
    gradients: list[Tensor | None] = [None] * len(needs)
    # the lowest layer that something is asked of
    lowest = 0 if needs[0] else next(i for i in range(len(saved)) if any(needs[1 + 4 * i : 5 + 4 * i]))
    d = _nhwc(dy)
    for i in reversed(range(lowest, len(saved))):
        layer, own, g, at = saved[i], layers[i], stage.geometries[i], 1 + 4 * i
        weight, bias, bn_weight, bn_bias = needs[at : at + 4]
        below, last = i > lowest or needs[0], i == len(saved) - 1
        dbias, dweight, a, b, place = _sums(d, layer, stage, keep, last)
        if bn_weight and own.bn_weight is not None:
            gradients[at + 2] = dweight.to(own.bn_weight.dtype)
        if bn_bias and own.bn_bias is not None:
            gradients[at + 3] = dbias.to(own.bn_bias.dtype)
        if bias and own.bias is not None:
            gradients[at + 1] = torch.zeros_like(own.bias)  # batch norm takes a bias away again
        if not (weight or below):
            continue
        d = _raw_gradient(d, layer, stage, keep, (a, b), place, fresh=last)
        if weight:
            found = _conv_backward(d, layer, g, (False, True, False))[1]
            gradients[at] = _layout(found.to(own.weight.dtype), nhwc[i])
        if below:
            d = _input_gradient(d, layer, g)
    if needs[0]:
        gradients[0] = _layout(_map(d), nhwc[0])
    return gradients


def _sums(
    d: Tensor, layer: SavedLayer, stage: StageCall, keep: Tensor, last: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of bn_bias and bn_weight, ``a`` and ``b`` of passes; at an end, to be used once more, the places of the
    windows' winners."""
    raw, mean, scale, inverse, bias = layer[2:]
    if not last or stage.plain_end:
        return *passes.sums(_rows(d), _rows(raw), mean, scale, bias, inverse), None
    place, winner = buffers.dense(torch.bfloat16, *d.shape), buffers.dense(raw.dtype, *d.shape)
    _ends(stage.pool).winners(_windows(raw, stage.pool), mean, scale, bias, place, winner)
    return *_ends(stage.pool).sums(d, place, winner, mean, keep, inverse), place


def _raw_gradient(
    d: Tensor, layer: SavedLayer, stage: StageCall, keep: Tensor, sums: tuple[Tensor, Tensor], place: Tensor | None,
    fresh: bool,
) -> Tensor:  # fmt: skip
    """The gradient of a convolution's output, over ``d`` unless that is the caller's (``fresh``)."""
    raw, mean, scale, _, bias = layer[2:]
    if not fresh:
        passes.gradient_in_place(_rows(d), _rows(raw), mean, scale, bias, *sums)
        return d
    out, pool = buffers.dense(raw.dtype, *raw.shape), stage.pool
    if place is None:
        passes.gradient(_rows(d), _rows(raw), mean, scale, bias, *sums, _rows(out))
    else:
        _ends(pool).gradient(d, _windows(raw, pool), place, mean, scale, *sums, keep, _windows(out, pool))
    return out


def composed(x: Tensor, layers: Sequence[ConvBNLayer], stage: StageCall, keep: Tensor) -> Tensor:
    """The stage in torch's own calls, with the dropout that was drawn: what values go through that passes cannot take,
    and a backward that is itself to be differentiated. Moves the running statistics and counters that layers have."""
    y, dtype, pool = x.to(stage.dtype), stage.dtype, stage.pool
    for layer, g in zip(layers, stage.geometries):
        pad, stride, dilation, groups = _window(g)
        y = F.conv2d(y, layer.weight.to(dtype), None, stride, pad, dilation, groups)
        if layer.bias is not None:
            y = y + layer.bias.to(dtype)[:, None, None]
        y = norm.reference(y, norm.counted(layer.batch_norm(stage.training)), layer.activation, None)
    if stage.plain_end:
        return y
    return F.max_pool2d(y, (pool.kernel_h, pool.kernel_w)) * keep[:, :, None, None].to(dtype)


class _ConvStageCPU(torch.autograd.Function):
    """Saved are, of each layer, its input, the raw output of its convolution and vectors."""

    @staticmethod
    def forward(
        ctx: Any, stage: StageCall, layers: Sequence[ConvBNLayer], nhwc: Sequence[bool], x: Tensor,
        *own: Tensor | None,
    ) -> Tensor:  # fmt: skip
        with torch.autocast("cpu", enabled=False):
            y, saved, keep = forward(x, layers, stage, nhwc)
        # the arguments themselves too: autograd then notices if one is written to, and can differentiate once more
        autograd.save(ctx, x, *own, keep, *(t for layer in saved for t in layer))
        ctx.stage, ctx.nhwc, ctx.composed = stage, nhwc, not saved
        # (what backward has of a layer comes back with the saved tensors)
        ctx.layers = [layer.without_tensors() for layer in layers]
        return y

    @staticmethod
    def backward_composed(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The same in torch's own calls."""
        *given, keep = ctx.saved_tensors[: 2 + 4 * len(ctx.layers)]

        def body(x: Tensor, *own: Tensor | None) -> Tensor:
            return composed(x, _with_tensors(ctx.layers, own), ctx.stage, keep)

        with torch.autocast("cpu", enabled=False):
            dx, *own = autograd.gradients_of(body, given, ctx.needs_input_grad[3:], dy)
            return None, None, None, None if dx is None else _in_format(dx, ctx.nhwc[0]), *own

    @staticmethod
    @autograd.composed_where_differentiated(backward_composed)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        count, width = 4 * len(ctx.layers), len(SavedLayer._fields)
        x, *rest = autograd.saved(ctx)
        layers, keep, kept = _with_tensors(ctx.layers, rest), rest[count], rest[count + 1 :]
        saved = [SavedLayer(*kept[i : i + width]) for i in range(0, len(kept), width)]
        with torch.autocast("cpu", enabled=False):
            dx, *others = backward(
                dy.to(ctx.stage.dtype), saved, keep, layers, ctx.stage, ctx.needs_input_grad[3:], ctx.nhwc
            )
        return None, None, None, None if dx is None else dx.to(x.dtype), *others


def _parameters(layers: Sequence[ConvBNLayer]) -> list[Tensor | None]:
    return [t for layer in layers for t in layer[:4]]


def _with_tensors(layers: Sequence[ConvBNLayer], own: Sequence[Any]) -> list[ConvBNLayer]:
    """The layers with the parameters they were called with, four each."""
    return [layer._replace(**dict(zip(layer._fields[:4], own[4 * i :]))) for i, layer in enumerate(layers)]


def train(x: Tensor, layers: Sequence[ConvBNLayer], stage: StageCall, nhwc: Sequence[bool]) -> Tensor:
    """The stage in training."""
    own = _parameters(layers)
    if guard.recorded(x, *own):
        return _ConvStageCPU.apply(stage, layers, nhwc, x, *own)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return forward(x, layers, stage, nhwc)[0]


@torch.no_grad()
def evaluate(x: Tensor, layers: Sequence[ConvBNLayer], stage: StageCall, nhwc: Sequence[bool]) -> Tensor | None:
    """The stage by running statistics: batch norm in the convolutions' weights, ReLU in their results' memory or in the
    pooling, and so few images at a time that their maps stay in cache. None where a weight and its batch norm have no
    finite product."""
    with torch.autocast("cpu", enabled=False):
        weights, biases, sound = zip(*[_folded(layer, stage.dtype) for layer in layers])
        if not all(map(passes.is_sound, sound)):
            return None
        x = _cast(x, stage.dtype)
        chunk, pool, windows = _chunk(x, stage), stage.pool, [_window(g) for g in stage.geometries]
        if chunk < x.shape[0]:  # in oneDNN's own order once, not once a chunk
            weights = tuple(
                _torch.onednn_pack_conv_weight(w, *window, [chunk, g.in_channels, g.height, g.width])
                for w, window, g in zip(weights, windows, stage.geometries)
            )
        y = buffers.channels_last(x.dtype, x.shape[0], stage.geometries[-1].out_channels, pool.out_h, pool.out_w)
        end = _ends(pool).pool
        for a, out in zip(x.split(chunk), _nhwc(y).split(chunk)):
            for i, (weight, bias, window) in enumerate(zip(weights, biases, windows)):
                a = a.relu_() if i else a.contiguous(memory_format=torch.channels_last)
                # (its ReLU not in the call: oneDNN's makes 0 of NaN)
                a = _torch.onednn_conv(a, weight, bias, *window, "none", [], "")
            end(_windows(_nhwc(a), pool), out)
        return _layout(y, nhwc[-1])


def _chunk(x: Tensor, stage: StageCall) -> int:
    """Images at a time: about as many as CHUNK allows, in chunks of one size; the same number for each thread."""
    largest = max(g.out_h * g.out_w * max(g.out_channels, g.in_channels) for g in stage.geometries)
    threads, images = torch.get_num_threads(), x.shape[0]
    fitting = max(1, threads * CHUNK // (largest * x.element_size()))
    even = math.ceil(images / max(1, round(images / fitting)))
    return min(images, math.ceil(even / threads) * threads) if fitting >= threads else even


def _folded(layer: ConvBNLayer, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and bias of the convolution with batch norm's, and whether they are sound. Made at each call: a kept copy
    would not notice parameters written through ``.data``, as averaging of weights does."""
    dense = layer.weight.is_contiguous()
    weight = layer.weight if dense else _nhwc(layer.weight)
    channels = weight.shape[0]
    folded, bias = (torch.empty(size, dtype=dtype, device="cpu") for size in (weight.shape, (channels,)))
    given = (
        (layer.bias, 0.0), (layer.bn_weight, 1.0), (layer.bn_bias, 0.0), (layer.running_mean, 0.0),
        (layer.running_var, 1.0),
    )  # fmt: skip
    vectors = [passes.vector(t, channels, default) for t, default in given]
    (sound,) = passes.fold(weight.flatten(1), *vectors, passes.number(layer.eps), folded.flatten(1), bias)
    return folded if dense else _map(folded), bias, sound
