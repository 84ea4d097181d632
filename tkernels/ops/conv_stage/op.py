"""A conv stage, n x (conv -> batch norm -> activation), max pooling, Dropout2d: checks, choice of a body, autograd,
PyTorch's body."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tkernels.core import activation as activations
from tkernels.core import autograd, checks, plan
from tkernels.core import mode as runtime
from tkernels.core.geometry import Geometry, Pooling, no_pooling, suggests_channels_last
from tkernels.core.records import TENSORS, ConvBNLayer, MaxPool, StageCall
from tkernels.ops import cpu
from tkernels.ops.batch_norm import op as bn_ops
from tkernels.ops.conv import op as conv_ops
from tkernels.ops.conv_stage import passes

__all__ = ["ConvBNLayer", "MaxPool", "conv_stage"]

Pool = int | Sequence[int] | MaxPool | None


def conv_stage(
    input: Tensor,
    layers: Sequence[ConvBNLayer],
    pool: int | Sequence[int] | MaxPool | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """n x (conv2d -> batch_norm -> activation), then max pooling and Dropout2d, as one autograd function.

    input: (N, C, H, W); layers: at least one :class:`ConvBNLayer`, each taking what the one before gives; pool: a
    window's size (int or pair, which is its stride too) or a :class:`MaxPool`; dropout_p: the probability that
    training drops a whole channel; residual: of the result's shape and dtype, added between the last layer's batch norm
    and its activation, in a stage without pool and dropout. Result: (N, C_out, H_out, W_out) in the input's dtype or
    the autocast dtype, of the last layer's channels; channels_last where the input or a weight is. In training the
    batch's statistics normalise and move the running ones.

    Raises ValueError for an empty sequence, an input that is not 4-D, one value per channel in training, an unknown
    activation, a residual beside pool or dropout, or a probability outside [0, 1]; TypeError for arguments of the wrong
    type; RuntimeError for values, shapes, dtypes or devices that do not go together.
    """
    key = None if runtime.leaves_to_torch(input) else _key(input, layers, pool, dropout_p, training, residual)
    call = _calls.get(key)
    if call is not None:
        return _run(input, layers, call.value, residual, call)
    checks.tensor(input=input)
    if runtime.jit_traced():  # sizes are none there
        runtime.use_triton(input)
        return _torch_body(input, layers, pool, float(dropout_p) if training else 0.0, training, residual)
    checks.probability("dropout_p", dropout_p)
    if input.dim() != 4:
        raise ValueError(f"input must be 4-D (N, C, H, W), got shape {checks.shape(input)}")
    geometries = _geometries(input, layers)
    pooling = _pooling(geometries[-1], pool)
    autocast = runtime.autocast_dtype(input)
    for i, (layer, g) in enumerate(zip(layers, geometries)):
        _check_layer(i, layer, input, g, training, autocast)
    if residual is not None:
        if pool is not None or dropout_p > 0:
            raise ValueError(f"residual goes with neither pool nor dropout, got pool={pool} and dropout_p={dropout_p}")
        residual = _checked_residual(input, residual, geometries[-1], autocast)
    p = float(dropout_p) if training else 0.0
    tensors = [t for layer in layers for t in layer[:6] if t is not None]
    stage = StageCall(
        geometries, pooling, autocast or input.dtype, p, training, tuple(layer.activation for layer in layers)
    )
    if input.numel() == 0 or not runtime.use_triton(input, *tensors, residual):
        y = None if cpu is None or residual is not None else cpu.conv_stage(input, layers, stage)
        return y if y is not None else _torch_body(input, layers, pool, p, training, residual)
    call = None if key is None else _calls.add(key, plan.Call(stage))
    return _run(input, layers, stage, residual, call)


# calls that passed the checks, with what they come to
_calls = plan.Cache(plan.MOST_PLANS)


def _key(
    input: Tensor, layers: Sequence[ConvBNLayer], pool: Pool, dropout_p: float, training: bool,
    residual: Tensor | None,
) -> Hashable | None:  # fmt: skip
    try:
        tensors = passes.call_tensors(input, layers, residual)
        others = tuple([layer[TENSORS:] for layer in layers])
    except TypeError:  # layers that are none
        return None
    return plan.call_key(tensors, others, pool, dropout_p, training)


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


def _pooling(g: Geometry, pool: Pool) -> Pooling:
    """The pooling after convolution ``g``. Raises RuntimeError where torch refuses it."""
    if pool is None:
        return no_pooling(g.out_h, g.out_w)
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
    activations.check(layer.activation)
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


def _checked_residual(input: Tensor, residual: Tensor, g: Geometry, autocast: torch.dtype | None) -> Tensor:
    """The residual in the dtype of the maps. Raises where it does not fit the last layer's."""
    checks.tensor(residual=residual)
    shape = (input.shape[0], g.out_channels, g.out_h, g.out_w)
    if tuple(residual.shape) != shape:
        raise RuntimeError(f"residual must have the result's shape {list(shape)}, got {checks.shape(residual)}")
    checks.same_device(input=input, residual=residual)
    if autocast is None or not residual.is_floating_point():
        checks.same_dtype(input=input, residual=residual)
    return residual.to(autocast or input.dtype)


def _torch_body(
    x: Tensor, layers: Sequence[ConvBNLayer], pool: Pool, p: float, training: bool,
    residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """The same in torch's own calls, differentiated and cast by torch; Dropout2d draws as torch.nn's would."""
    for i, layer in enumerate(layers):
        window = layer.stride, layer.padding, layer.dilation, layer.groups
        x = torch.nn.functional.conv2d(x, layer.weight, layer.bias, *window)  # type: ignore[arg-type]
        added = residual if i == len(layers) - 1 else None
        x = bn_ops.counted_batch_norm(x, layer.batch_norm(training), layer.activation, added)
    if pool is not None:
        x = torch.nn.functional.max_pool2d(x, *(pool if isinstance(pool, MaxPool) else MaxPool(pool)))  # type: ignore[arg-type]
    return torch.nn.functional.dropout2d(x, p) if p > 0 else x


class _ConvStage(torch.autograd.Function):
    """Saved are, of each layer, the raw output, vectors, and the input (the activation of the layer before) unless the
    layer formed it from the raw output before as it loaded it; and what behind_residual says."""

    @staticmethod
    def forward(
        ctx: Any, call: plan.Call | None, stage: StageCall, layers: Sequence[ConvBNLayer], x: Tensor,
        *others: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """``others``: the layers' parameters, and the residual."""
        seed = runtime.dropout_seed(x) if stage.p > 0 else None
        y, *kept = _forward(call, x, layers, stage, seed, others[-1], ctx.needs_input_grad[3:])
        autograd.save(ctx, seed, *kept)
        ctx.stage, ctx.eps = stage, tuple(layer.eps for layer in layers)
        ctx.input_format = x.dtype, suggests_channels_last(x)
        return cast(Tensor, y)

    @staticmethod
    @autograd.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.stage, ctx.eps, ctx.needs_input_grad[3:], ctx.input_format
        return None, None, None, *passes.backward((dy, *autograd.saved(ctx)), *given)


def _forward(
    call: plan.Call | None, x: Tensor, layers: Sequence[ConvBNLayer], stage: StageCall, seed: Tensor | None,
    residual: Tensor | None, needs: tuple[bool, ...] | None,
) -> plan.Tensors:  # fmt: skip
    given = (*passes.call_tensors(x, layers, residual), seed)
    options = tuple([(layer.momentum, layer.eps, layer.counts(stage.training)) for layer in layers])
    return passes.forward.of_call(call, given, stage, options, needs)


def _run(
    x: Tensor, layers: Sequence[ConvBNLayer], stage: StageCall, residual: Tensor | None, call: plan.Call | None
) -> Tensor:
    """The kernels, differentiable where that is asked for."""
    if residual is not None:
        residual = residual.to(stage.dtype)
    if torch.is_grad_enabled():
        others = [t for layer in layers for t in layer[:4]]
        others.append(residual)
        if x.requires_grad or any(t is not None and t.requires_grad for t in others):
            y: Tensor = _ConvStage.apply(call, stage, layers, *autograd.apart(x, *others))
            return y
    seed = runtime.dropout_seed(x) if stage.p > 0 else None
    return cast(Tensor, _forward(call, x, layers, stage, seed, residual, None)[0])
