"""A conv stage on the CPU as one autograd function: oneDNN's convolutions, compiled passes, memory used again.

Against torch's own calls in a row it leaves out what they spend between convolutions: passes over maps, int64 indices
of the pooling, zero fills and page faults. ``ops.conv_stage`` takes it where it pays and where it is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tkernels.core import _torch, autograd
from tkernels.core.geometry import Geometry, Pooling
from tkernels.core.records import BatchNorm, ConvBNLayer, StageCall
from tkernels.cpu import buffers, compiler, packed, passes

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16)
# Elements of a stage's largest map from which on a call is worth compiled passes.
WORTH_IT = 1 << 18
# Bytes of a chunk's largest map in evaluation, which then stays in cache from layer to layer.
CHUNK = 5 << 20


def takes(x: Tensor, layers: Sequence[ConvBNLayer], stage: StageCall) -> bool:
    """Whether this call goes the fast way. Nothing here depends on what ran before."""
    # first of all, lest a trace learns of sizes and modes that are none of its business
    if torch.compiler.is_compiling() or not compiler.enabled() or stage.dtype not in DTYPES or x.device.type != "cpu":
        return False
    geometries, pool, dtype = stage.geometries, stage.pool, stage.dtype
    largest = x.shape[0] * max(g.out_h * g.out_w * g.out_channels for g in geometries)
    if largest < WORTH_IT or pool.pad_h or pool.pad_w or pool.border:
        return False
    whole = pool.kernel_h == pool.stride_h and pool.kernel_w == pool.stride_w and pool.taps <= 16
    if not whole or pool.height % pool.kernel_h or pool.width % pool.kernel_w:
        return False
    if not _symmetric(geometries) or not packed.enabled(dtype):
        return False
    if not all(
        packed.is_safe(g.in_channels, (g.stride_h, g.stride_w), (g.dilation_h, g.dilation_w)) for g in geometries
    ):
        return False
    if any(layer.activation != "relu" for layer in layers):
        return False
    tensors = [x, *(t for layer in layers for t in layer[:6] if t is not None)]
    allowed = (torch.float32, dtype)
    return (
        all(type(t) in (Tensor, torch.nn.Parameter) and t.dtype in allowed and not t.is_neg() for t in tensors)
        and compiler.plain_eager()
    )


def _symmetric(geometries: Sequence[Geometry]) -> bool:
    """Whether torch's own padding argument says all there is to say of each convolution's."""

    def reach(size: int, out: int, stride: int, window: int, dilation: int, pad: int) -> bool:
        return out == (size + 2 * pad - dilation * (window - 1) - 1) // stride + 1

    return all(
        reach(g.height, g.out_h, g.stride_h, g.kernel_h, g.dilation_h, g.pad_h)
        and reach(g.width, g.out_w, g.stride_w, g.kernel_w, g.dilation_w, g.pad_w)
        for g in geometries
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


class End(NamedTuple):
    """A stage's end: Dropout2d's factors [N, C], and whether anything follows the last ReLU."""

    keep: Tensor
    pool: Pooling
    plain: bool


class Sums(NamedTuple):
    """What batch norm's backward sums over a batch: gradients of its parameters, and ``a`` and ``b`` of passes."""

    dbias: Tensor
    dweight: Tensor
    a: Tensor
    b: Tensor


def _nhwc(t: Tensor) -> Tensor:
    """A map as a dense tensor (N, H, W, C); the same memory where it is channels_last."""
    return t.permute(0, 2, 3, 1).contiguous()


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` itself, or a channels_last copy in ``dtype``."""
    if x.dtype == dtype:
        return x
    n, c, h, w = x.shape
    return _map(buffers.dense(dtype, n, h, w, c)).copy_(x)


def _map(nhwc: Tensor) -> Tensor:
    return nhwc.permute(0, 3, 1, 2)


def _rows(nhwc: Tensor) -> Tensor:
    """[groups, rows, C]: enough groups for every thread, short enough for float32 sums and a core's cache."""
    n, h, w, c = nhwc.shape
    return nhwc.view(n * h, w, c) if n < 32 or h * w > 2048 else nhwc.view(n, h * w, c)


def _windows(nhwc: Tensor, pool: Pooling) -> Tensor:
    n, _, _, c = nhwc.shape
    return nhwc.view(n, pool.out_h, pool.kernel_h, pool.out_w, pool.kernel_w, c)


def _convolution(x: Tensor, w: Tensor, g: Geometry, pad: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """The convolution of NHWC maps, NHWC. Where new memory faults it goes to memory used again: oneDNN adds to what is
    there, which is zero; the bits are the same."""
    n, h, width = x.shape[0], x.shape[1], x.shape[2]
    out_h = (h + 2 * pad[0] - g.dilation_h * (g.kernel_h - 1) - 1) // stride[0] + 1
    out_w = (width + 2 * pad[1] - g.dilation_w * (g.kernel_w - 1) - 1) // stride[1] + 1
    shape = n, out_h, out_w, w.shape[0]
    window = pad, stride, (g.dilation_h, g.dilation_w), g.groups
    nbytes = x.element_size() * torch.Size(shape).numel()
    if nbytes < buffers.SMALLEST:
        return _nhwc(_new_convolution(x, w, window))
    if not buffers.FRESH.faulted(nbytes):
        return _nhwc(buffers.FRESH.watch(nbytes, lambda: _new_convolution(x, w, window)))
    out = buffers.dense(x.dtype, *shape).zero_()
    _torch.onednn_conv_into(_map(out), _map(x), w, None, *window, "add", 1.0, None, [], None)
    return out


def _new_convolution(x: Tensor, w: Tensor, window: tuple[object, ...]) -> Tensor:
    result: Tensor = _torch.onednn_conv(_map(x), w, None, *window, "none", [], "")
    return result


def _conv(x: Tensor, w: Tensor, g: Geometry) -> Tensor:
    return _convolution(x, w, g, (g.pad_h, g.pad_w), (g.stride_h, g.stride_w))


def _input_gradient(d: Tensor, layer: SavedLayer, g: Geometry) -> Tensor:
    """The gradient of a layer's input, NHWC: with stride 1 a convolution by the flipped weight."""
    pad = g.dilation_h * (g.kernel_h - 1) - g.pad_h, g.dilation_w * (g.kernel_w - 1) - g.pad_w
    if g.stride_h == g.stride_w == g.groups == 1 and min(pad) >= 0:
        flipped = layer.w.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        return _convolution(d, flipped, g, pad, (1, 1))
    return _nhwc(_conv_backward(d, layer, g, (True, False, False))[0])


def _conv_backward(d: Tensor, layer: SavedLayer, g: Geometry, mask: Sequence[bool]) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = aten.convolution_backward(
        _map(d), _map(layer.x), layer.w, None, (g.stride_h, g.stride_w), (g.pad_h, g.pad_w),
        (g.dilation_h, g.dilation_w), False, (0, 0), g.groups, mask,
    )  # fmt: skip
    return found


def _cast_weight(layer: ConvBNLayer, dtype: torch.dtype) -> Tensor:
    return layer.weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)


def draw(x: Tensor, channels: int, dtype: torch.dtype, p: float) -> Tensor:
    """Dropout2d's factors [N, C], with the draws of torch.nn.functional.dropout2d on a map of ``dtype``."""
    keep = torch.empty(x.shape[0], channels, 1, 1, dtype=dtype, device="cpu")
    if p > 0:
        keep.bernoulli_(1 - p)
    else:
        keep.fill_(1.0)
    factors = keep.view(x.shape[0], channels).float()
    return factors / (1 - p) if 0 < p < 1 else factors


def forward(
    x: Tensor, layers: Sequence[ConvBNLayer], stage: StageCall, channels_last: Sequence[bool]
) -> tuple[Tensor, list[SavedLayer], End]:
    """(y, what backward needs, the stage's end) in training; moves running statistics and counters. Backward needs
    nothing but the arguments where the passes could not go on with what they measured."""
    a = _nhwc(_cast(x.detach(), stage.dtype))
    saved: list[SavedLayer] = []
    seen: list[passes.Measured] = []
    last = len(layers) - 1
    for i, (layer, g) in enumerate(zip(layers, stage.geometries)):
        w = _cast_weight(layer, stage.dtype)
        raw = _conv(a, w, g)
        channels = g.out_channels
        found = passes.Measured(*passes.statistics(
            _rows(raw), passes.vector(layer.bias, channels, 0.0), passes.vector(layer.bn_weight, channels, 1.0),
            passes.number(layer.eps),
        ))  # fmt: skip
        if not passes.is_sound(found.sound):
            end = _drawn_end(x, stage)
            return composed(x, layers, stage, end), [], end
        bias = passes.vector(layer.bn_bias, channels, 0.0)
        seen.append(found)
        saved.append(SavedLayer(a, w, raw, found.mean, found.scale, found.inverse, bias))
        if i < last:
            a = buffers.dense(raw.dtype, *raw.shape)
            passes.normalize(_rows(raw), found.mean, found.scale, bias, _rows(a))
    for layer, found in zip(layers, seen):
        _move_statistics(layer.batch_norm(stage.training), found)
    end = _drawn_end(x, stage)
    return _layout(_end(saved[-1], end), channels_last[-1]), saved, end


def _drawn_end(x: Tensor, stage: StageCall) -> End:
    return End(draw(x, stage.geometries[-1].out_channels, stage.dtype, stage.p), stage.pool, stage.plain_end)


def _layout(y: Tensor, channels_last: bool) -> Tensor:
    return y if channels_last else y.contiguous()


def _end(layer: SavedLayer, end: End) -> Tensor:
    """The stage's result in channels_last: a view of nothing, so that whoever gets it may write to it."""
    raw, pool = layer.raw, end.pool
    y = buffers.channels_last(raw.dtype, raw.shape[0], raw.shape[3], pool.out_h, pool.out_w)
    vectors = layer.mean, layer.scale, layer.bias
    if end.plain:
        passes.normalize(_rows(raw), *vectors, _rows(_nhwc(y)))
    else:
        passes.ends(pool.kernel_h, pool.kernel_w).forward(_windows(raw, pool), *vectors, end.keep, _nhwc(y))
    return y


def _counted(bn: BatchNorm) -> float:
    """Adds one to the counter; how far running statistics move."""
    counter = bn.num_batches_tracked
    if counter is not None:
        counter.add_(1)
    if bn.momentum is not None:
        return float(bn.momentum)
    return 0.0 if counter is None else 1.0 / float(counter)


def _move_statistics(bn: BatchNorm, found: passes.Measured) -> None:
    """torch's running statistics: of the map with the convolution's bias, with the unbiased variance."""
    factor = _counted(bn)
    if bn.running_mean is None or bn.running_var is None:
        return
    for running, batch in ((bn.running_mean, found.shifted), (bn.running_var, found.unbiased)):
        # (.data, as torch's own batch norm moves them without a word to autograd: a graph that another call of it made
        # has saved them, and must stay what it is)
        running.data.lerp_(_as(batch, running), factor)


def _as(t: Tensor, like: Tensor) -> Tensor:
    return t if t.dtype is like.dtype else t.to(like.dtype)


def backward(
    dy: Tensor, saved: Sequence[SavedLayer], end: End, layers: Sequence[ConvBNLayer], geometries: Sequence[Geometry],
    needs: Sequence[bool], channels_last: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the input, then of weight, bias, bn_weight and bn_bias of each layer, each where ``needs`` says so
    and in its tensor's dtype; those of maps and weights laid out as ``channels_last`` says of their layer."""
    gradients: list[Tensor | None] = [None] * len(needs)
    # the lowest layer that something is asked of
    lowest = 0 if needs[0] else next(i for i in range(len(saved)) if any(needs[1 + 4 * i : 5 + 4 * i]))
    d = _nhwc(dy)
    for i in reversed(range(lowest, len(saved))):
        layer, own, g = saved[i], layers[i], geometries[i]
        weight, bias, bn_weight, bn_bias = needs[1 + 4 * i : 5 + 4 * i]
        below = i > lowest or needs[0]
        at_end = i == len(saved) - 1
        sums, place = _end_sums(d, layer, end) if at_end and not end.plain else (_sums(d, layer), None)
        if bn_weight and own.bn_weight is not None:
            gradients[3 + 4 * i] = _as(sums.dweight, own.bn_weight)
        if bn_bias and own.bn_bias is not None:
            gradients[4 + 4 * i] = _as(sums.dbias, own.bn_bias)
        if bias and own.bias is not None:
            # batch norm takes a bias away again
            gradients[2 + 4 * i] = torch.zeros_like(own.bias)
        if not (weight or below):
            continue
        d = _raw_gradient(d, layer, end, sums, place, fresh=at_end)
        if weight:
            found = _as(_conv_backward(d, layer, g, (False, True, False))[1], own.weight)
            gradients[1 + 4 * i] = _layout(found, channels_last[i])
        if below:
            d = _input_gradient(d, layer, g)
    if needs[0]:
        gradients[0] = _layout(_map(d), channels_last[0])
    return gradients


def _sums(d: Tensor, layer: SavedLayer) -> Sums:
    return Sums(*passes.sums(_rows(d), _rows(layer.raw), layer.mean, layer.scale, layer.bias, layer.inverse))


def _end_sums(dy: Tensor, layer: SavedLayer, end: End) -> tuple[Sums, Tensor]:
    """Batch norm's sums and, to be used once more, the places of the windows' winners."""
    ends = passes.ends(end.pool.kernel_h, end.pool.kernel_w)
    place, winner = buffers.dense(torch.bfloat16, *dy.shape), buffers.dense(layer.raw.dtype, *dy.shape)
    ends.winners(_windows(layer.raw, end.pool), layer.mean, layer.scale, layer.bias, place, winner)
    return Sums(*ends.sums(dy, place, winner, layer.mean, end.keep, layer.inverse)), place


def _raw_gradient(d: Tensor, layer: SavedLayer, end: End, sums: Sums, place: Tensor | None, fresh: bool) -> Tensor:
    """The gradient of a convolution's output, over ``d`` unless that is the caller's (``fresh``)."""
    raw = layer.raw
    if not fresh:
        passes.gradient_in_place(_rows(d), _rows(raw), layer.mean, layer.scale, layer.bias, sums.a, sums.b)
        return d
    out = buffers.dense(raw.dtype, *raw.shape)
    if place is None:
        passes.gradient(_rows(d), _rows(raw), layer.mean, layer.scale, layer.bias, sums.a, sums.b, _rows(out))
    else:
        ends = passes.ends(end.pool.kernel_h, end.pool.kernel_w)
        ends.gradient(
            d, _windows(raw, end.pool), place, layer.mean, layer.scale, sums.a, sums.b, end.keep,
            _windows(out, end.pool),
        )  # fmt: skip
    return out


def composed(x: Tensor, layers: Sequence[ConvBNLayer], stage: StageCall, end: End) -> Tensor:
    """The stage in torch's own calls, with the dropout that was drawn: what values go through that passes cannot take,
    and a backward that is itself to be differentiated. Moves the running statistics and counters that layers have."""
    dtype = stage.dtype
    y = x.to(dtype)
    for layer, g in zip(layers, stage.geometries):
        conv = torch.nn.functional.conv2d(
            y, layer.weight.to(dtype), None, (g.stride_h, g.stride_w), (g.pad_h, g.pad_w),
            (g.dilation_h, g.dilation_w), g.groups,
        )  # fmt: skip
        if layer.bias is not None:
            conv = conv + layer.bias.to(dtype)[:, None, None]
        bn = layer.batch_norm(stage.training)
        y = torch.relu(torch.nn.functional.batch_norm(conv, *bn.vectors, True, _counted(bn), bn.eps))
    if not end.plain:
        y = torch.nn.functional.max_pool2d(y, (end.pool.kernel_h, end.pool.kernel_w))
        y = y * end.keep[:, :, None, None].to(dtype)
    return y


class _ConvStageCPU(torch.autograd.Function):
    """Saved are, of each layer, its input, the raw output of its convolution and vectors."""

    @staticmethod
    def forward(
        ctx: Any, stage: StageCall, layers: Sequence[ConvBNLayer], channels_last: Sequence[bool], x: Tensor,
        *own: Tensor | None,
    ) -> Tensor:  # fmt: skip
        with torch.autocast("cpu", enabled=False):
            y, saved, end = forward(x, layers, stage, channels_last)
        # the arguments themselves too: autograd then notices if one is written to, and can differentiate once more
        autograd.save(ctx, x, *own, end.keep, *(t for layer in saved for t in layer))
        ctx.stage, ctx.channels_last, ctx.composed = stage, channels_last, not saved
        # (what backward has of a layer comes back with the saved tensors)
        ctx.layers = [layer.without_tensors() for layer in layers]
        return y

    @staticmethod
    def backward_composed(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The same in torch's own calls."""
        stage, count = ctx.stage, 1 + 4 * len(ctx.layers)
        *given, keep = ctx.saved_tensors[: count + 1]
        end = End(keep, stage.pool, stage.plain_end)

        def body(x: Tensor, *own: Tensor | None) -> Tensor:
            return composed(x, _with_tensors(ctx.layers, own), stage, end)

        with torch.autocast("cpu", enabled=False):
            return None, None, None, *autograd.gradients_of(body, given, ctx.needs_input_grad[3:], dy)

    @staticmethod
    @autograd.composed_where_differentiated(backward_composed)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        stage, count = ctx.stage, len(ctx.layers)
        x, *rest = autograd.saved(ctx)
        layers = _with_tensors(ctx.layers, rest[: 4 * count])
        keep, *kept = rest[4 * count :]
        width = len(SavedLayer._fields)
        saved = [SavedLayer(*kept[i : i + width]) for i in range(0, len(kept), width)]
        end, needs = End(keep, stage.pool, stage.plain_end), ctx.needs_input_grad[3:]
        with torch.autocast("cpu", enabled=False):
            gradients = backward(dy.to(stage.dtype), saved, end, layers, stage.geometries, needs, ctx.channels_last)
        if gradients[0] is not None:
            gradients[0] = gradients[0].to(x.dtype)
        return None, None, None, *gradients


def _with_tensors(layers: Sequence[ConvBNLayer], own: Sequence[Any]) -> list[ConvBNLayer]:
    """The layers with the parameters they were called with, four each."""
    return [
        layer._replace(weight=own[4 * i], bias=own[4 * i + 1], bn_weight=own[4 * i + 2], bn_bias=own[4 * i + 3])
        for i, layer in enumerate(layers)
    ]


def train(x: Tensor, layers: Sequence[ConvBNLayer], stage: StageCall, channels_last: Sequence[bool]) -> Tensor:
    """The stage in training."""
    own = [t for layer in layers for t in layer[:4]]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *own)):
        return _ConvStageCPU.apply(stage, layers, channels_last, x, *own)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return forward(x, layers, stage, channels_last)[0]


@torch.no_grad()
def evaluate(
    x: Tensor, layers: Sequence[ConvBNLayer], stage: StageCall, channels_last: Sequence[bool]
) -> Tensor | None:
    """The stage by running statistics: batch norm in the convolutions' weights, ReLU in their results' memory, and so
    few images at a time that their maps stay in cache. None where a weight and its batch norm have no finite
    product."""
    with torch.autocast("cpu", enabled=False):
        folded = [_folded(layer, stage.dtype) for layer in layers]
        if not all(passes.is_sound(sound) for _, _, sound in folded):
            return None
        x = _cast(x, stage.dtype)
        largest = max(g.out_h * g.out_w * max(g.out_channels, g.in_channels) for g in stage.geometries)
        chunk = max(1, CHUNK // (largest * x.element_size()))
        g, pool = stage.geometries[-1], stage.pool
        y = buffers.channels_last(x.dtype, x.shape[0], g.out_channels, pool.out_h, pool.out_w)
        for start in range(0, x.shape[0], chunk):
            a = x[start : start + chunk]
            for (w, b, _), g in zip(folded, stage.geometries):
                a = _torch.onednn_conv(
                    a.contiguous(memory_format=torch.channels_last), w, b, (g.pad_h, g.pad_w),
                    (g.stride_h, g.stride_w), (g.dilation_h, g.dilation_w), g.groups, "none", [], "",
                )  # fmt: skip
                a.relu_()  # (not in the call: oneDNN's makes 0 of NaN)
            out = _nhwc(y[start : start + chunk])
            if pool.taps == 1:
                out.copy_(_nhwc(a))
            else:
                passes.ends(pool.kernel_h, pool.kernel_w).pool(_windows(_nhwc(a), pool), out)
        return _layout(y, channels_last[-1])


def _folded(layer: ConvBNLayer, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and bias of the convolution with batch norm's, and whether they are sound. Made at each call: a kept copy
    would not notice parameters written through ``.data``, as averaging of weights does."""
    weight = _nhwc(layer.weight)
    channels = weight.shape[0]
    folded, bias = (torch.empty(size, dtype=dtype, device="cpu") for size in (weight.shape, (channels,)))
    given = (
        (layer.bias, 0.0), (layer.bn_weight, 1.0), (layer.bn_bias, 0.0), (layer.running_mean, 0.0),
        (layer.running_var, 1.0),
    )  # fmt: skip
    vectors = [passes.vector(t, channels, default) for t, default in given]
    (sound,) = passes.fold(weight, *vectors, passes.number(layer.eps), folded, bias)
    return _map(folded), bias, sound
