"""A conv stage, n x (conv -> batch norm -> ReLU), max pooling, Dropout2d: checks, autograd function, PyTorch body."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from tkernels import runtime
from tkernels.ops import batch_norm as bn_ops
from tkernels.ops import checks, conv_stage_cpu
from tkernels.ops import conv as conv_ops
from tkernels.ops.autograd import once_differentiable
from tkernels.tuning import batch_norm as bn_tuning
from tkernels.tuning import conv_stage as tuning
from tkernels.tuning.conv import Geometry
from tkernels.tuning.conv_stage import Pooling

if runtime.HAS_TRITON:
    from tkernels.kernels import batch_norm, conv, conv_backward, conv_depthwise, conv_stage_backward
    from tkernels.kernels import conv_stage as kernels
    from tkernels.kernels import conv_stage_pointwise as pointwise
    from tkernels.kernels import conv_stage_weights as weight_kernels

__all__ = ["ConvBNLayer", "MaxPool", "conv_stage"]


class ConvBNLayer(NamedTuple):
    """One layer of a stage: a convolution's arguments and its batch norm's, named as in torch.nn.functional.

    ``running_mean`` and ``running_var`` None: the batch's statistics normalise, in evaluation too.
    ``num_batches_tracked``: an int64 tensor of shape (), which training adds one to; ``momentum`` None: running
    statistics average over all batches it counted. ``training``: for this layer's batch norm alone, where it is not the
    stage's.
    """

    weight: Tensor
    bias: Tensor | None = None
    bn_weight: Tensor | None = None
    bn_bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] | str = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1
    momentum: float | None = 0.1
    eps: float = 1e-5
    training: bool | None = None

    def counts(self, stage_training: bool) -> bool:
        """Whether this batch's statistics move the running ones."""
        return stage_training if self.training is None else self.training

    def measures(self, stage_training: bool) -> bool:
        """Whether this batch's statistics normalise it."""
        return self.running_mean is None or self.counts(stage_training)


class MaxPool(NamedTuple):
    """Max pooling's arguments as in torch.nn.functional.max_pool2d; ``stride`` None: the kernel's size."""

    kernel_size: int | Sequence[int]
    stride: int | Sequence[int] | None = None
    padding: int | Sequence[int] = 0


class Plan(NamedTuple):
    """A call without its tensors: what its shapes and arguments come to."""

    geometries: tuple[Geometry, ...]
    pool: Pooling
    dtype: torch.dtype
    p: float
    training: bool

    @property
    def plain_end(self) -> bool:
        """Whether nothing follows the last ReLU."""
        return self.pool.taps == 1 and self.pool.stride_h == 1 and self.pool.stride_w == 1 and self.p == 0.0


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


def conv_stage(
    input: Tensor,
    layers: Sequence[ConvBNLayer],
    pool: int | Sequence[int] | MaxPool | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """n x (conv2d -> batch_norm -> ReLU), then max pooling and Dropout2d, as one autograd function.

    input: (N, C, H, W); layers: at least one :class:`ConvBNLayer`, each taking what the one before gives; pool: a
    window's size (int or pair, which is its stride too) or a :class:`MaxPool`; dropout_p: the probability that
    training drops a whole channel. Result: (N, C_out, H_out, W_out) in the input's dtype or the autocast dtype, of the
    last layer's channels; channels_last where the input or a weight is. In training the batch's statistics normalise
    and move the running ones.

    Raises ValueError for an empty sequence, an input that is not 4-D, one value per channel in training or a
    probability outside [0, 1]; TypeError for arguments of the wrong type; RuntimeError for values, shapes, dtypes or
    devices that do not go together.
    """
    checks.tensor(input=input)
    checks.probability("dropout_p", dropout_p)
    if input.dim() != 4:
        raise ValueError(f"input must be 4-D (N, C, H, W), got shape {checks.shape(input)}")
    geometries = _geometries(input, layers)
    pooling = _pooling(geometries[-1], pool)
    autocast = runtime.autocast_dtype(input)
    for i, (layer, g) in enumerate(zip(layers, geometries)):
        _check_layer(i, layer, input, g, training, autocast)
    p = float(dropout_p) if training else 0.0
    tensors = [t for layer in layers for t in layer[:6] if t is not None]
    plan = Plan(geometries, pooling, autocast or input.dtype, p, training)
    if input.numel() == 0 or not runtime.use_triton(input, *tensors):
        y = _cpu_body(input, layers, plan)
        return y if y is not None else _torch_body(input, layers, pool, p, training)
    return _triton_body(input, layers, plan)


def _geometries(input: Tensor, layers: Sequence[ConvBNLayer]) -> tuple[Geometry, ...]:
    """The convolutions, one after the other. Raises TypeError, ValueError or RuntimeError where torch refuses one."""
    if not isinstance(layers, (list, tuple)) or not all(isinstance(layer, ConvBNLayer) for layer in layers):
        raise TypeError(f"layers must be a sequence of ConvBNLayer, got {type(layers).__name__}")
    if not layers:
        raise ValueError("layers must hold at least one ConvBNLayer, got none")
    found: list[Geometry] = []
    shape = tuple(input.shape)
    geometry = conv_ops.described if runtime.traced() else conv_ops.geometry
    for layer in layers:
        checks.tensor(weight=layer.weight)
        padding = layer.padding if isinstance(layer.padding, str) else conv_ops.pair("padding", layer.padding)
        g = geometry(
            shape, tuple(layer.weight.shape), conv_ops.pair("stride", layer.stride), padding,
            conv_ops.pair("dilation", layer.dilation), layer.groups,
        )  # fmt: skip
        found.append(g)
        shape = (shape[0], g.out_channels, g.out_h, g.out_w)
    return tuple(found)


def _pooling(g: Geometry, pool: int | Sequence[int] | MaxPool | None) -> Pooling:
    """The pooling after convolution ``g``. Raises RuntimeError where torch refuses it."""
    if pool is None:
        return tuning.no_pooling(g.out_h, g.out_w)
    if not isinstance(pool, MaxPool):
        pool = MaxPool(pool)
    kernel = conv_ops.pair("pool", pool.kernel_size)
    stride = kernel if pool.stride is None else conv_ops.pair("the pool's stride", pool.stride)
    pooling = described_pooling if runtime.traced() else _checked_pooling
    return pooling(g.out_h, g.out_w, kernel, stride, conv_ops.pair("the pool's padding", pool.padding))


def described_pooling(
    height: int, width: int, kernel: tuple[int, int], stride: tuple[int, int], pad: tuple[int, int]
) -> Pooling:
    if min(kernel) <= 0 or min(stride) <= 0:
        raise RuntimeError(f"the pool's size and stride must be positive, got {kernel} and {stride}")
    if min(pad) < 0 or 2 * pad[0] > kernel[0] or 2 * pad[1] > kernel[1]:
        raise RuntimeError(f"the pool's padding must be at most half of its size {kernel}, got {pad}")
    out_h = (height + 2 * pad[0] - kernel[0]) // stride[0] + 1
    out_w = (width + 2 * pad[1] - kernel[1]) // stride[1] + 1
    if out_h <= 0 or out_w <= 0:
        raise RuntimeError(f"a pool of {kernel} with padding {pad} does not fit into a map of {height} x {width}")
    return Pooling(height, width, *kernel, *stride, *pad, out_h, out_w)


_checked_pooling = functools.lru_cache(maxsize=1024)(described_pooling)


def _check_layer(
    i: int, layer: ConvBNLayer, input: Tensor, g: Geometry, training: bool, autocast: torch.dtype | None
) -> None:
    """Raise what torch's conv2d and batch_norm raise for a layer's tensors."""
    channels, weight = g.out_channels, layer.weight
    names = ("bias", "bn_weight", "bn_bias", "running_mean", "running_var")
    vectors = {name: t for name, t in zip(names, layer[1:6]) if t is not None}
    for name, t in vectors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} of layer {i} must be a Tensor or None, got {type(t).__name__}")
        if t.dim() != 1 or t.shape[0] != channels:
            raise RuntimeError(f"{name} of layer {i} must have shape [{channels}], got {checks.shape(t)}")
    if any(t.device != input.device for t in (weight, *vectors.values())):
        checks.same_device(input=input, weight=weight, **vectors)
    conv_dtypes = {t.dtype for t in (weight, layer.bias) if t is not None}
    if autocast is None and conv_dtypes != {input.dtype}:
        checks.same_dtype(input=input, weight=weight, bias=layer.bias)
    if (layer.running_mean is None) != (layer.running_var is None):
        raise ValueError(f"running_mean and running_var of layer {i} must both be given or both be None")
    if layer.measures(training) and input.shape[0] * g.out_h * g.out_w == 1:
        size = (input.shape[0], channels, g.out_h, g.out_w)
        raise ValueError(f"Expected more than 1 value per channel when training, got layer {i}'s size {size}")
    if layer.eps <= 0.0:
        raise ValueError(f"eps of layer {i} must be positive, got {layer.eps}")


def _cpu_body(x: Tensor, layers: Sequence[ConvBNLayer], plan: Plan) -> Tensor | None:
    """The fast way on a CPU; None where it is not taken."""
    if not conv_stage_cpu.takes(x, layers, plan.geometries, plan.pool, plan.dtype):
        return None
    channels_last = _channels_last(x, layers)
    if all(layer.measures(plan.training) for layer in layers):
        return conv_stage_cpu.train(x, layers, plan, channels_last)
    own = (t for layer in layers for t in layer[:4])
    given = not any(layer.measures(plan.training) for layer in layers) and plan.p == 0
    if given and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *own))):
        return conv_stage_cpu.evaluate(x, layers, plan, channels_last)
    return None


def _channels_last(x: Tensor, layers: Sequence[ConvBNLayer]) -> bool:
    """Whether torch's convolutions would give channels_last maps."""
    return conv_ops.suggests_channels_last(x) or any(conv_ops.suggests_channels_last(layer.weight) for layer in layers)


def _torch_body(
    x: Tensor, layers: Sequence[ConvBNLayer], pool: int | Sequence[int] | MaxPool | None, p: float, training: bool
) -> Tensor:
    """The same in torch's own calls, differentiated and cast by torch; Dropout2d draws as torch.nn's would."""
    for layer in layers:
        padding = cast(Any, layer.padding)
        x = torch.nn.functional.conv2d(
            x, layer.weight, layer.bias, cast(Any, layer.stride), padding, cast(Any, layer.dilation), layer.groups
        )
        x = bn_ops.counted_batch_norm(
            x, layer.running_mean, layer.running_var, layer.bn_weight, layer.bn_bias, layer.measures(training),
            layer.momentum, layer.eps, "relu", None, layer.num_batches_tracked if layer.counts(training) else None,
        )  # fmt: skip
    if pool is not None:
        size, stride, padding = pool if isinstance(pool, MaxPool) else (pool, None, 0)
        x = torch.nn.functional.max_pool2d(x, cast(Any, size), cast(Any, stride), cast(Any, padding))
    return torch.nn.functional.dropout2d(x, p) if p > 0 else x


def _triton_body(x: Tensor, layers: Sequence[ConvBNLayer], plan: Plan) -> Tensor:
    if runtime.traced():
        return _registered(x, layers, plan)
    if torch.is_grad_enabled():
        parameters = [t for layer in layers for t in layer[:4]]
        if x.requires_grad or any(t is not None and t.requires_grad for t in parameters):
            return _ConvStage.apply(plan, layers, x, *parameters)
    return forward(x, layers, plan, False)[0]


def _registered(x: Tensor, layers: Sequence[ConvBNLayer], plan: Plan) -> Tensor:
    """The call as torch.ops.tkernels.conv_stage, which is functional: running statistics are moved here."""
    measured = [layer.measures(plan.training) for layer in layers]
    vectors: list[Tensor | None] = []
    windows: list[int] = []
    for layer, from_batch in zip(layers, measured):
        given = (None, None) if from_batch else (layer.running_mean, layer.running_var)
        vectors += [layer.bias, layer.bn_weight, layer.bn_bias, *given]
        padding: Any = layer.padding
        if isinstance(padding, str):
            padding = -1 if padding == "same" else 0
        for value in (layer.stride, padding, layer.dilation):
            windows += conv_ops.pair("window", value)
        windows.append(layer.groups)
    weights = [layer.weight for layer in layers]
    differentiates = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, *weights, *vectors)
    )  # fmt: skip
    window = plan.pool
    pool = [window.kernel_h, window.kernel_w, window.stride_h, window.stride_w, window.pad_h, window.pad_w]
    seed = runtime.dropout_seed(x) if plan.p > 0 else None
    y, *stats = torch.ops.tkernels.conv_stage(
        x, weights, [x.new_empty(0) if t is None else t for t in vectors], windows,
        [float(layer.eps) for layer in layers], pool, plan.p, seed, plan.dtype, differentiates or any(measured),
    )[: 1 + len(layers)]  # fmt: skip
    for layer, found, g in zip(layers, stats, plan.geometries):
        if layer.counts(plan.training):
            bn_ops.track(found, x.shape[0] * g.out_h * g.out_w, layer.eps, layer.running_mean, layer.running_var,
                         layer.momentum, layer.num_batches_tracked)  # fmt: skip
    result: Tensor = y
    return result


def forward(
    x: Tensor, layers: Sequence[ConvBNLayer], plan: Plan, keep: bool, seed: Tensor | None = None
) -> tuple[Tensor, list[SavedLayer], Tensor | None]:
    """(y, what backward needs if ``keep``, dropout's seed or None)."""
    channels_last = _channels_last(x, layers)
    if plan.p > 0 and seed is None:
        seed = runtime.dropout_seed(x)
    saved: list[SavedLayer] = []
    packed = _pack(layers, plan)
    last = len(layers) - 1
    before: Any = None  # the norm that x, a raw map, has yet to go through
    for i, (layer, g) in enumerate(zip(layers, plan.geometries)):
        end = i == last
        given = not layer.measures(plan.training)
        if before is None:
            x = conv_input(x, g, plan.dtype)
        if given and not keep:
            x = _folded(x, packed[i], layer, g, channels_last or not (end and plan.plain_end))
            if end and not plan.plain_end:
                x = kernels.launch_end(x, plan.pool, None, channels_last=channels_last)
            continue
        raw, norm = _given(x, packed[i], layer, g) if given else _measured(x, before, packed[i], layer, g, plan)
        if keep:
            saved.append(SavedLayer(x if before is None else None, layer.weight, layer.bias, packed[i], raw, norm.mean,
                                    norm.var, norm.weight, norm.bias))  # fmt: skip
        before = norm if not end and normalizes_in_next(layers[i + 1], plan, i + 1) else None
        if before is not None:
            x = raw
        elif end and not (plan.plain_end and channels_last):
            x = kernels.launch_end(raw, plan.pool, norm, plan.p, seed, channels_last)
        else:
            x = batch_norm.launch_normalize(raw, _matrix(raw), norm, "relu")
    return x, saved, seed


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


def _folded(x: Tensor, packed: Any, layer: ConvBNLayer, g: Geometry, channels_last: bool) -> Tensor:
    """relu(batch_norm(conv(x))) by running statistics, in one kernel."""
    norm, bias = _given_norm(layer), dense(layer.bias)
    if g.depthwise:
        raw, _ = conv_depthwise.launch_forward(x, layer.weight, bias, g)
        if channels_last:
            return batch_norm.launch_normalize(raw, _matrix(raw), norm, "relu")
        return kernels.launch_end(raw, tuning.no_pooling(g.out_h, g.out_w), norm, channels_last=False)
    return kernels.launch_conv(x, packed, bias, g, norm, channels_last=channels_last)[0]


def _given(x: Tensor, packed: Any, layer: ConvBNLayer, g: Geometry) -> tuple[Tensor, Any]:
    """(raw output, Norm) where running statistics normalise and backward will ask for the raw map."""
    bias = dense(layer.bias)
    if g.depthwise:
        return conv_depthwise.launch_forward(x, layer.weight, bias, g)[0], _given_norm(layer)
    return conv.launch_forward(x, packed, bias, g)[0], _given_norm(layer)


def _measured(x: Tensor, before: Any, packed: Any, layer: ConvBNLayer, g: Geometry, plan: Plan) -> tuple[Tensor, Any]:
    """(raw output, Norm) by the batch's statistics; in training moves the running ones. ``before``: the Norm that x has
    yet to go through, or None."""
    counter = layer.num_batches_tracked if layer.counts(plan.training) else None
    bias = dense(layer.bias)
    partials: Any
    if g.depthwise:
        raw, _ = conv_depthwise.launch_forward(x, layer.weight, bias, g)
        partials = batch_norm.launch_statistics(raw, _matrix(raw), counter)
    elif before is not None:
        raw, partials = pointwise.launch_forward(x, before, packed, bias, g, counter)
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
    """What each layer's backward has to do for the gradients ``needs`` asks for: input, then 4 a layer."""
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


def backward(
    dy: Tensor, saved: Sequence[SavedLayer], seed: Tensor | None, plan: Plan, eps: Sequence[float],
    needs: Sequence[bool], input_format: tuple[torch.dtype, bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the input (in ``input_format``: its dtype, whether it is channels_last), then of weight, bias,
    bn_weight and bn_bias of each layer, each where ``needs`` says so."""
    gradients: list[Tensor | None] = [None] * len(needs)
    tasks = wanted(needs, saved)
    # layers whose weight's gradient waits for its runs to be merged
    waiting: list[tuple[int, Any]] = []
    # the gradient of a layer's activation, or, if masked, of its batch norm's output
    d: Any = conv_ops.as_nhwc(dy) if plan.plain_end else dy
    partials: Any = None
    masked = False
    for i in reversed(range(len(saved))):
        task, layer, g = tasks[i], saved[i], plan.geometries[i]
        if not (task.raw or task.sums):
            break
        norm = _norm_of(layer, eps[i])
        end = _End(plan, seed) if i == len(saved) - 1 and not plan.plain_end else None
        coefficients, gradients[3 + 4 * i], gradients[4 + 4 * i] = _norm_gradients(
            d, layer, norm, task, end, partials, masked
        )
        if not task.raw:
            break
        recomputes = task.weight and layer.x is None
        if masked and not (task.below or task.bias or recomputes) and _normalizes_in_wgrad(g, coefficients, d):
            through = (layer.mean, layer.bn_weight, coefficients)
            x: Any = layer.x
            config = tuning.wgrad(g, d.dtype, runtime.dot_precision(d.dtype, "conv"))
            workspace = conv_backward.launch_wgrad(
                x, d, g, True, False, layer.raw, config=config, through=through
            )  # fmt: skip
            waiting.append((i, workspace))
            break
        draw = _raw_gradient(d, layer, norm, coefficients, end, masked)
        d, partials, masked = draw, None, False
        if recomputes:
            waiting.append((i, pointwise.launch_wgrad(*_input_of(saved, i, eps), draw, g)))
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
            raw: Any = before.raw
            norm = _norm_of(before, eps[i - 1])
            packed, transposed = _packed(draw, layer, g)
            d, partials = conv_stage_backward.launch_dgrad(draw, packed, g, raw, norm, transposed)
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


def _input_of(saved: Sequence[SavedLayer], i: int, eps: Sequence[float]) -> tuple[Any, Any]:
    """(raw output, Norm) of the layer before, of which layer ``i`` formed its input as it loaded it."""
    return saved[i - 1].raw, _norm_of(saved[i - 1], eps[i - 1])


class _End(NamedTuple):
    """The stage's end, to be replayed."""

    plan: Plan
    seed: Tensor | None


def _norm_gradients(
    d: Tensor, layer: SavedLayer, norm: Any, task: Wanted, end: _End | None, partials: Any, masked: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """batch_norm's coefficients of its input gradient, and the gradients of bn_weight and bn_bias, where wanted.

    ``d``: the stage's incoming gradient where ``end`` is given, else the activation's (``masked``: already multiplied
    by ReLU's derivative, with its ``partials``).
    """
    if not task.sums:
        return None, None, None
    raw: Any = layer.raw
    m = _matrix(raw)
    if end is not None:
        partials = conv_stage_backward.launch_end_sums(d, raw, end.plan.pool, norm, end.plan.p, end.seed)
    elif partials is None:
        partials, _ = batch_norm.launch_gradient_sums(d, raw, m, norm, None if masked else "relu")
    dweight, dbias, coefficients = batch_norm.launch_finalize_gradients(
        partials, m, norm, task.bn_weight, task.bn_bias, norm.var is None and task.raw
    )
    return coefficients, dweight, dbias


def _raw_gradient(
    d: Tensor, layer: SavedLayer, norm: Any, coefficients: Tensor | None, end: _End | None, masked: bool
) -> Any:
    """The gradient of the convolution's output; ``d`` as for _norm_gradients."""
    raw: Any = layer.raw
    if end is not None:
        pool, p = end.plan.pool, end.plan.p
        return conv_stage_backward.launch_end_gradient(d, raw, pool, norm, coefficients, p, end.seed)
    activation = None if masked else "relu"
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
    layer formed it from the raw output before as it loaded it."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, layers: Sequence[ConvBNLayer], x: Tensor, *parameters: Tensor | None) -> Tensor:
        y, saved, seed = forward(x, layers, plan, True)
        tasks = wanted(ctx.needs_input_grad[2:], saved)
        kept: list[Tensor | None] = [seed]
        for i, (layer, task, needs_bias) in enumerate(zip(saved, tasks, ctx.needs_input_grad[4::4])):
            above = i + 1 < len(saved) and saved[i + 1].x is None and tasks[i + 1].weight
            kept += layer._replace(
                x=layer.x if task.weight else None,
                bias=layer.bias if needs_bias else None,
                packed=layer.packed if task.below and layer.packed is not layer.weight else None,
                raw=layer.raw if task.raw or task.sums or above else None,
            )
        ctx.save_for_backward(*kept)
        ctx.plan, ctx.eps = plan, [layer.eps for layer in layers]
        ctx.input_format = x.dtype, conv_ops.suggests_channels_last(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        seed, *kept = ctx.saved_tensors
        width = len(SavedLayer._fields)
        saved = [SavedLayer(*kept[i : i + width]) for i in range(0, len(kept), width)]
        needs = ctx.needs_input_grad[2:]
        return None, None, *backward(dy, saved, seed, ctx.plan, ctx.eps, needs, ctx.input_format)
