"""A conv stage, n x (conv -> batch norm -> activation), max pooling, Dropout2d: checks, choice of a body, autograd,
PyTorch's body."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from tkernels.core import activation as activations
from tkernels.core import checks, mode
from tkernels.core.geometry import Geometry, Pooling, no_pooling
from tkernels.core.late import late
from tkernels.core.operator import Decision, Operator, Passes
from tkernels.core.records import TENSORS, ConvBNLayer, MaxPool, StageCall
from tkernels.ops import cpu
from tkernels.ops.batch_norm import op as bn_ops
from tkernels.ops.conv import op as conv_ops
from tkernels.ops.conv_stage import passes

if TYPE_CHECKING:
    from tkernels.ops.conv_stage import routes
else:
    routes = late(".routes", __package__)

__all__ = ["ConvBNLayer", "MaxPool", "conv_stage"]


def conv_stage(
    input: Tensor,
    layers: Sequence[ConvBNLayer],
    pool: int | Sequence[int] | MaxPool | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """n x (conv2d -> batch_norm -> activation), then max pooling and Dropout2d, as one autograd function.

    In training the batch's statistics normalise and move the running ones.

    Args:
        input: ``(N, C, H, W)``
        layers: at least one :class:`tkernels.functional.ConvBNLayer`, each taking what the one before gives
        pool: a window's size (an int or a pair, which is its stride too) or a :class:`tkernels.functional.MaxPool`
        dropout_p: the probability that training drops a whole channel
        training: whether batches' statistics normalise, and whether there is dropout
        residual: of the result's shape and dtype, added between the last layer's batch norm and its activation, in a
            stage without pool and dropout

    Returns:
        ``(N, C_out, H_out, W_out)`` in the input's or the autocast dtype, of the last layer's channels; channels_last
        where the input or a weight is

    Raises:
        ValueError: For an empty sequence, an input that is not 4-D, one value per channel in training, an unknown
            activation, a residual beside pool or dropout, or a probability outside [0, 1].
        TypeError: For an argument of the wrong type.
        RuntimeError: For values, shapes, dtypes or devices that do not go together.

    Examples:
        >>> first = tkernels.functional.ConvBNLayer(torch.randn(8, 3, 3, 3), padding=1)
        >>> second = tkernels.functional.ConvBNLayer(torch.randn(16, 8, 3, 3), padding=1)
        >>> x = torch.randn(2, 3, 12, 12)
        >>> tkernels.functional.conv_stage(x, [first, second], pool=2, dropout_p=0.1, training=True).shape
        torch.Size([2, 16, 6, 6])
    """
    if not isinstance(layers, (list, tuple)) or {layer.__class__ for layer in layers} - {ConvBNLayer}:
        raise TypeError(f"layers must be a sequence of ConvBNLayer, got {type(layers).__name__}")
    if isinstance(input, Tensor) and isinstance(residual, Tensor):
        residual = _in_maps_dtype(input, residual)
    window = None if pool is None else (*pool,) if isinstance(pool, MaxPool) else (pool, None, 0)
    tensors = passes.call_tensors(input, layers, residual)
    y: Tensor = _operator(
        tensors, tuple([layer[TENSORS:] for layer in layers]), window, dropout_p, training, False, False
    )
    return y


def residual_stage(
    input: Tensor,
    layers: Sequence[ConvBNLayer],
    residual: Tensor,
    shortcut: ConvBNLayer | None = None,
    twice: bool = False,
) -> Any:
    """conv_stage with a residual, for graphs whose readers are known.

    ``shortcut``: the layer, without activation, that makes the residual of the tensor given for it; it is then never
    stored behind its batch norm. ``twice``: the result is a pair of one memory, a tensor for each of two readers, who
    do not write to it: what they send back is added as backward reads it, where autograd would add it in a pass of its
    own.
    """
    if shortcut is not None and mode.traced():
        residual, shortcut = conv_stage(residual, [shortcut]), None
    every = list(layers) if shortcut is None else [*layers, shortcut]
    tensors = passes.call_tensors(input, every, _in_maps_dtype(input, residual))
    others = tuple([layer[TENSORS:] for layer in every])
    y = _operator(tensors, others, None, 0.0, False, twice, shortcut is not None)
    return (y, y) if twice and isinstance(y, Tensor) else y


class _Arguments(NamedTuple):
    """conv_stage's and residual_stage's, as :meth:`of` makes them of the operator's; a shortcut is the last layer."""

    input: Tensor
    layers: Sequence[ConvBNLayer]
    residual: Tensor | None
    pool: tuple[Any, ...] | None  # a MaxPool's fields
    dropout_p: float
    training: bool
    twice: bool
    shortcut: bool

    @classmethod
    def of(cls, given: tuple[Any, ...]) -> _Arguments:
        *tensors, others, pool, dropout_p, training, twice, shortcut = given
        layers = [ConvBNLayer._make((*t, *other)) for t, other in zip(passes.layer_tensors(tensors), others)]
        return cls(tensors[0], layers, passes.residual_of(tensors), pool, dropout_p, training, twice, shortcut)


def _check(*given: Any) -> Decision | None:
    """Empty input is PyTorch's, and a call that torch.jit.trace records."""
    if mode.jit_traced():
        mode.use_triton(given[0])
        return None
    call = _Arguments.of(given)
    stage = _described(call)
    if call.input.numel() == 0 or not mode.use_triton(*given[:-_OTHERS]):
        return None
    measured = [layer.measures(call.training) for layer in call.layers]
    twice = call.twice and not mode.traced()
    stage = dataclasses.replace(
        stage, routes=routes.of(call.input, stage, measured), twice=twice, shortcut=call.shortcut
    )
    options = tuple([(layer.momentum, layer.eps, layer.counts(call.training)) for layer in call.layers])
    return Decision((stage, options), dropout=stage.p)


_OTHERS = 6  # arguments of the operator behind its tensors


def _described(call: _Arguments) -> StageCall:
    """What the call comes to. Raises what torch raises."""
    input, layers, residual, pool, dropout_p, training, _, shortcut = call
    checks.tensor(input=input)
    checks.probability("dropout_p", dropout_p)
    if input.dim() != 4:
        raise ValueError(f"input must be 4-D (N, C, H, W), got shape {checks.shape(input)}")
    depth = len(layers) - shortcut
    geometries = _geometries(input, layers[:depth])
    pooling = _pooling(geometries[-1], pool)
    of_shortcut = _geometries(residual, layers[depth:]) if residual is not None and shortcut else ()
    autocast = mode.autocast_dtype(input)
    for i, (layer, g) in enumerate(zip(layers, (*geometries, *of_shortcut))):
        _check_layer(i, layer, input, g, training, autocast)
    dtype = _maps_dtype(input)
    if residual is not None:
        if pool is not None or dropout_p > 0:
            raise ValueError(f"residual goes with neither pool nor dropout, got pool={pool} and dropout_p={dropout_p}")
        if not shortcut:
            _check_residual(input, residual, geometries[-1], dtype)
    p = float(dropout_p) if training else 0.0
    names = tuple([layer.activation for layer in layers])
    return StageCall((*geometries, *of_shortcut), pooling, dtype, p, training, names)


def _geometries(input: Tensor, layers: Sequence[ConvBNLayer]) -> tuple[Geometry, ...]:
    """The convolutions, one after the other. Raises TypeError, ValueError or RuntimeError where torch refuses one."""
    if not layers:
        raise ValueError("layers must hold at least one ConvBNLayer, got none")
    found: list[Geometry] = []
    shape = tuple(input.shape)
    geometry = conv_ops.described if mode.traced() else conv_ops.geometry
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


def _pooling(g: Geometry, pool: tuple[Any, ...] | None) -> Pooling:
    """The pooling after convolution ``g``. ``pool``: a MaxPool's fields. Raises RuntimeError where torch refuses it."""
    if pool is None:
        return no_pooling(g.out_h, g.out_w)
    pool = MaxPool(*pool)
    kernel = conv_ops.pair("pool", pool.kernel_size)
    stride = kernel if pool.stride is None else conv_ops.pair("the pool's stride", pool.stride)
    pooling = described_pooling if mode.traced() else _checked_pooling
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
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in layer[4:6]):
        raise RuntimeError(f"running_mean and running_var of layer {i} must not require a gradient: they have none")
    if (layer.running_mean is None) != (layer.running_var is None):
        raise ValueError(f"running_mean and running_var of layer {i} must both be given or both be None")
    if layer.measures(training) and input.shape[0] * g.out_h * g.out_w == 1:
        size = (input.shape[0], channels, g.out_h, g.out_w)
        raise ValueError(f"Expected more than 1 value per channel when training, got layer {i}'s size {size}")
    if layer.eps <= 0.0:
        raise ValueError(f"eps of layer {i} must be positive, got {layer.eps}")


def _maps_dtype(input: Tensor) -> torch.dtype:
    """Of the stage's maps: autocast leaves float64 as it is."""
    return input.dtype if input.dtype is torch.float64 else mode.autocast_dtype(input) or input.dtype


def _in_maps_dtype(input: Tensor, residual: Tensor) -> Tensor:
    """The residual as autocast has it; other differences are for the check."""
    cast = residual.is_floating_point() and mode.autocast_dtype(input) is not None
    return residual.to(_maps_dtype(input)) if cast else residual


def _check_residual(input: Tensor, residual: Tensor, g: Geometry, dtype: torch.dtype) -> None:
    """Raise where it does not fit the last layer's map."""
    checks.tensor(residual=residual)
    shape = (input.shape[0], g.out_channels, g.out_h, g.out_w)
    if tuple(residual.shape) != shape:
        raise RuntimeError(f"residual must have the result's shape {list(shape)}, got {checks.shape(residual)}")
    checks.same_device(input=input, residual=residual)
    if residual.dtype != dtype:
        raise RuntimeError(f"residual must have the maps' dtype {dtype}, got {residual.dtype}")


def _reference(*given: Any) -> Tensor:
    """On a CPU its passes, else torch's own calls, differentiated and cast by torch; Dropout2d draws as torch.nn's."""
    call = _Arguments.of(given)
    x, layers, residual, pool, dropout_p, training, _, shortcut = call
    if shortcut:
        *layers, own = layers
        residual = _reference(
            *passes.call_tensors(cast(Tensor, residual), [own], None),
            (own[TENSORS:],),
            None,
            0.0,
            training,
            False,
            False,
        )
    p = float(dropout_p) if training else 0.0
    if not mode.jit_traced():  # sizes are none there
        stage = _described(call)
        y = None if cpu is None or residual is not None else cpu.conv_stage(x, layers, stage)
        if y is not None:
            return y
    for i, layer in enumerate(layers):
        window = layer.stride, layer.padding, layer.dilation, layer.groups
        x = torch.nn.functional.conv2d(x, layer.weight, layer.bias, *window)  # type: ignore[arg-type]
        added = residual if i == len(layers) - 1 else None
        x = bn_ops.counted_batch_norm(x, layer.batch_norm(training), layer.activation, added)
    if pool is not None:
        x = torch.nn.functional.max_pool2d(x, *pool)
    return torch.nn.functional.dropout2d(x, p) if p > 0 else x


_operator = Operator(
    _reference,
    _check,
    Passes("ConvStage", passes.leaves, passes.forward, passes.backward, passes.keep, lambda stage, _: stage.twice),
)
