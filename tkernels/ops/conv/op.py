"""2-D convolution with a fused activation: checks, autocast, autograd, and the PyTorch body."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from tkernels.core import _torch, autotune, checks, mode, plan, targets
from tkernels.core import activation as activations
from tkernels.core.geometry import Geometry, as_nhwc, suggests_channels_last
from tkernels.core.late import late
from tkernels.core.operator import Decision, Operator, Passes, differentiates
from tkernels.core.records import OURS, Route
from tkernels.ops.conv import aten, routing

if TYPE_CHECKING:
    from tkernels.ops.conv import kernels, launches
else:
    kernels = late(".kernels", __package__)
    launches = late(".launches", __package__)

__all__ = ["conv2d"]

IntOrPair = int | Sequence[int]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:
    """``activation(conv2d(input, weight) + bias)`` in one kernel, as torch.nn.functional.conv2d.

    Args:
        input: ``(N, C_in, H, W)`` or ``(C_in, H, W)``
        weight: ``(C_out, C_in / groups, kernel_h, kernel_w)``
        bias: ``(C_out)``
        stride: an int or a pair
        padding: an int, a pair, 'same' or 'valid'. The zeros take part: times an infinite weight or gradient they are
            NaN, as in a map padded by hand
        dilation: an int or a pair
        groups: how many groups of channels are convolved apart
        activation: as of :func:`tkernels.functional.linear`

    Returns:
        ``(N, C_out, H_out, W_out)`` or without N, in the input's or the autocast dtype; channels_last where the input
        or the weight is

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For an unknown activation.
        RuntimeError: For values, shapes, dtypes or devices that do not go together.

    Examples:
        >>> x, weight = torch.randn(2, 3, 16, 16), torch.randn(8, 3, 3, 3)
        >>> y = tkernels.functional.conv2d(x, weight, stride=2, padding=1, activation="relu")
        >>> y.shape
        torch.Size([2, 8, 8, 8])
        >>> torch.allclose(y, torch.nn.functional.conv2d(x, weight, stride=2, padding=1).relu(), atol=1e-4)
        True
    """
    return _operator((input, weight, bias), stride, padding, dilation, groups, activation)


def _check(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: IntOrPair, padding: IntOrPair | str,
    dilation: IntOrPair, groups: int, activation: str | None,
) -> Decision | None:  # fmt: skip
    """Integers, complex numbers, sparse tensors and zero channels are PyTorch's, and under 'auto' what is faster
    there. Parameters keep their dtype under autocast: kernels cast them as they read them, and write their gradients
    in it."""
    activations.check(activation)
    checks.tensor(input=input, weight=weight)
    checks.optional_tensor(bias=bias)
    channels = input.shape[-3] if input.dim() > 2 else 1
    if not (checks.are_floats(input, weight, bias) and channels > 0 and mode.use_triton(input, weight, bias)):
        return None
    g, autocast = _checked(input, weight, bias, stride, padding, dilation, groups)
    static = g, autocast or input.dtype, activation
    found = route(input, weight, bias, *static)
    # (what follows PyTorch's forward is PyTorch's)
    return None if found.forward else Decision((*static, found))


def _checked(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: IntOrPair,
    padding: IntOrPair | str,
    dilation: IntOrPair,
    groups: int,
) -> tuple[Geometry, torch.dtype | None]:
    """What the call describes, and autocast's dtype. Raises what torch raises."""
    if not isinstance(padding, str):
        padding = pair("padding", padding)
    g = (described if mode.traced() else geometry)(
        tuple(input.shape), tuple(weight.shape), pair("stride", stride), padding, pair("dilation", dilation),
        checks.integer("groups", groups),
    )  # fmt: skip
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != g.out_channels):
        raise RuntimeError(
            f"bias must have shape [{g.out_channels}], one element for each output channel of weight "
            f"{checks.shape(weight)}, got {checks.shape(bias)}"
        )
    autocast = mode.autocast_dtype(input)
    checks.matching_kinds(input, weight, bias, autocast)
    return g, autocast


def _reference(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: IntOrPair, padding: IntOrPair | str,
    dilation: IntOrPair, groups: int, activation: str | None,
) -> Tensor:  # fmt: skip
    """PyTorch's own call, with its autograd and autocast. What it refuses is refused in our words."""
    activations.check(activation)
    try:
        z = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    except checks.REFUSALS as error:
        arguments = input, weight, bias, stride, padding, dilation, groups
        checks.explain(error, functools.partial(_check_all, *arguments))
    return activations.apply_to_own(z, activation, 4)


def _check_all(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: IntOrPair, padding: IntOrPair | str,
    dilation: IntOrPair, groups: int,
) -> None:  # fmt: skip
    checks.tensor(input=input, weight=weight)
    checks.optional_tensor(bias=bias)
    _checked(input, weight, bias, stride, padding, dilation, groups)


def pair(name: str, value: Any) -> tuple[int, int]:
    """An int or a sequence of one or two as a pair. Raises TypeError for other types, RuntimeError for lengths."""
    if isinstance(value, (tuple, list)):
        items = tuple(checks.integer(f"each element of {name}", v) for v in value)
        if len(items) not in (1, 2):
            raise RuntimeError(f"{name} must be an int or a pair of ints, got {value}")
        return items[0], items[-1]
    number = checks.integer(f"{name} (or each of its two elements)", value)
    return number, number


def described(
    input_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
) -> Geometry:
    """The convolution these arguments describe. Raises RuntimeError where torch refuses it."""
    _check_shapes(input_shape, weight_shape, groups)
    if min(stride) <= 0:
        raise RuntimeError(f"non-positive stride is not supported, got stride={stride}")
    if min(dilation) <= 0:
        raise RuntimeError(f"dilation should be greater than zero, got dilation={dilation}")
    if max(*stride, *dilation, *(padding if isinstance(padding, tuple) else ())) >= 2**31:
        # as cuDNN: kernels hold them in 32 bits
        raise RuntimeError(f"stride, padding and dilation must be below 2**31, got {stride}, {padding}, {dilation}")
    channels, height, width = input_shape[-3:]
    kernel_h, kernel_w = weight_shape[2:]
    reach = dilation[0] * (kernel_h - 1), dilation[1] * (kernel_w - 1)
    before, both = _padding(padding, stride, reach)
    padded = height + both[0], width + both[1]
    if padded[0] <= reach[0] or padded[1] <= reach[1]:
        raise RuntimeError(
            f"Calculated padded input size per channel: ({padded[0]} x {padded[1]}). Kernel size: ({reach[0] + 1} x "
            f"{reach[1] + 1}). Kernel size can't be greater than actual input size: input is {list(input_shape)}, "
            f"weight {list(weight_shape)}, padding={padding}, dilation={dilation}"
        )
    if height == 0 or width == 0:
        raise RuntimeError(f"only the batch or the channels of input may be empty, got input {list(input_shape)}")
    out_h = (padded[0] - reach[0] - 1) // stride[0] + 1
    out_w = (padded[1] - reach[1] - 1) // stride[1] + 1
    return Geometry(channels, weight_shape[0], groups, height, width, kernel_h, kernel_w, *stride, *before, *dilation,
                    out_h, out_w)  # fmt: skip


geometry = functools.lru_cache(maxsize=4096)(described)


def _check_shapes(input_shape: tuple[int, ...], weight_shape: tuple[int, ...], groups: int) -> None:
    shapes = f"input {list(input_shape)} and weight {list(weight_shape)}"
    if len(input_shape) not in (3, 4):
        raise RuntimeError(f"expected 3D (unbatched) or 4D (batched) input to conv2d, got {shapes}")
    if len(weight_shape) != 4:
        raise RuntimeError(f"weight must have 4 dimensions (C_out, C_in / groups, kernel_h, kernel_w), got {shapes}")
    if groups <= 0:
        raise RuntimeError(f"non-positive groups is not supported, got groups={groups}")
    out_channels, group_in, kernel_h, kernel_w = weight_shape
    if kernel_h == 0 or kernel_w == 0:
        raise RuntimeError(f"kernel sizes must be at least 1, got {shapes}")
    if out_channels < groups or out_channels % groups:
        raise RuntimeError(
            f"dimension 0 of weight must be a positive multiple of groups={groups}, got {out_channels}: {shapes}"
        )
    if input_shape[-3] != group_in * groups:
        raise RuntimeError(
            f"given groups={groups} and weight {list(weight_shape)}, expected input {list(input_shape)} to have "
            f"{group_in * groups} channels, but got {input_shape[-3]} channels instead"
        )


def _padding(
    padding: tuple[int, int] | str, stride: tuple[int, int], reach: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows above and columns to the left, and both sides together. 'same' puts the odd one below and to the right."""
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        if max(stride) > 1:
            raise RuntimeError(f"padding='same' is not supported for strided convolutions, got stride={stride}")
        return (reach[0] // 2, reach[1] // 2), reach
    if isinstance(padding, str):
        raise RuntimeError(f"padding must be an int, a pair of ints, 'same' or 'valid', got {padding!r}")
    if min(padding) < 0:
        raise RuntimeError(f"negative padding is not supported, got padding={padding}")
    return padding, (2 * padding[0], 2 * padding[1])


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry, dtype: torch.dtype, activation: str | None
) -> Route:
    """Who computes this convolution's products: by estimate, or as measured where autotuning is on."""
    if not (mode.asks_choosers(cudnn=True) and g.symmetric):
        return OURS
    fused, biased = activation is not None, bias is not None
    if mode.traced():
        sizes = [operator.index(size) for size in g[:3] + g[5:9]]
        return Route(*_route_in_traces(*sizes, dtype, fused, biased))
    images = x.shape[0] if x.dim() == 4 else 1
    precision = mode.dot_precision(dtype, "conv")
    if autotune.enabled and routing.cudnn_competes(g, dtype, precision, targets.current()):
        return _measured_route(x, weight, bias, g, images, dtype, precision, activation)
    recorded = differentiates((x, weight, bias))
    return routing.of_conv(g, images, dtype, precision, fused, biased, recorded, targets.current())


@_torch.constant_in_traces  # which has no business with facts of GPUs
def _route_in_traces(
    in_channels: int, out_channels: int, groups: int, kernel_h: int, kernel_w: int, stride_h: int, stride_w: int,
    dtype: torch.dtype, fused: bool, biased: bool,
) -> tuple[bool, ...]:  # fmt: skip
    g = routing.large(in_channels, out_channels, groups, kernel_h, kernel_w, stride_h, stride_w)
    precision = mode.dot_precision(dtype, "conv")
    return tuple(routing.of_conv(g, routing.MANY, dtype, precision, fused, biased, True, targets.current()))


def _measured_route(
    x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry, images: int, dtype: torch.dtype, precision: str,
    activation: str | None,
) -> Route:  # fmt: skip
    """Each product by the clock, of maps in NHWC. (Nothing is differentiated: values do not matter.)"""
    x, weight = x.detach(), weight.detach()
    maps = kernels.empty_pixels(x, (images, g.in_channels, g.height, g.width), dtype, True)
    dy = kernels.empty_pixels(x, (images, g.out_channels, g.out_h, g.out_w), dtype, True)
    cast, dx, dw = aten.weight_of(weight, dtype), torch.empty_like(maps), torch.empty_like(weight)
    bias = None if bias is None else bias.detach()

    def theirs() -> Tensor:
        return activations.apply(aten.forward(maps, cast, bias, g), activation)

    calls: autotune.Bodies = [
        (lambda: _passes(None, (maps, weight, bias), (g, dtype, activation, OURS)), theirs),
        (
            lambda: launches.gradients(dy, None, weight, None, None, dx, None, None, tuple(g), None, True),
            lambda: aten.input_gradient(dy, maps, cast, g),
        ),
        (
            lambda: launches.gradients(dy, maps, weight, None, None, None, dw, None, tuple(g), None, True),
            lambda: aten.weight_gradient(dy, maps, cast, weight, g),
        ),
    ]
    shape = g, dtype, precision, activation, bias is not None
    return autotune.measured_route("conv2d", images, shape, calls)


def _run(call: plan.KnownCall | None, tensors: plan.Tensors, static: tuple[Any, ...]) -> Tensor:
    """The kernels, which take a batch."""
    x, *parameters = cast(Any, tensors)
    if x.dim() == 3:
        return _passes(call, (x.unsqueeze(0), *parameters), static).squeeze(0)
    return _passes(call, tensors, static)


@plan.Planned
def _forward(
    tensors: plan.Tensors, g: Geometry, dtype: torch.dtype, activation: str | None, route: Route,
    needs: tuple[bool, ...] | None,
) -> plan.Tensors:  # fmt: skip
    """y, and what backward needs."""
    x, weight, bias = cast(Any, tensors)
    needs_input, needs_weight, needs_bias = needs or (False, False, False)
    if x.dtype != dtype and (needs_input or g.depthwise or not g.flattened):
        x = x.to(dtype)
    channels_last = suggests_channels_last(x) or suggests_channels_last(weight)
    shape = (x.shape[0], g.out_channels, g.out_h, g.out_w)
    y = kernels.empty_pixels(x, shape, dtype, channels_last)
    keeps = needs is not None and activations.needs_input(activation)
    z = kernels.empty_pixels(x, shape, dtype, channels_last) if keeps else None
    packed = None
    if not g.depthwise and kernels.packs(weight, g, dtype):
        packed = weight.new_empty((g.out_channels, g.row_pitch), dtype=dtype)
    launches.forward(x, weight, bias, y, z, packed, tuple(g), activation, channels_last)
    saved = None if activation is None else z if z is not None else y
    # the weight itself is saved beside its packed form so that autograd notices if it is changed in place
    kept = x if needs_weight else None, weight, bias if needs_bias else None, packed if needs_input else None, saved
    return y, *kept


def _keep(tensors: plan.Tensors, static: tuple[Any, ...]) -> tuple[Any, ...]:
    x: Any = tensors[0]
    g, _, activation, route = static
    return g, activation, suggests_channels_last(x), x.dtype, route


@plan.Planned
def _backward(
    tensors: plan.Tensors, g: Geometry, activation: str | None, channels_last: bool, dtype: torch.dtype, route: Route,
    needs: tuple[bool, ...],
) -> plan.Tensors:  # fmt: skip
    """Gradients of input (of ``dtype``, in the memory format ``channels_last`` says), weight and bias."""
    dy, x, weight, bias, packed, saved = cast(Any, tensors)
    dx = dw = db = None
    shape = dy.shape[0], g.in_channels, g.height, g.width
    by_pytorch = needs[0] and route.dgrad, x is not None and route.wgrad
    if any(by_pytorch):
        if activation is not None:
            dz = kernels.empty_pixels(dy, tuple(dy.shape), dy.dtype, True)
            launches.activation_gradient(dy, saved, dz, activation)
            dy, activation, saved = dz, None, None
        dy = as_nhwc(dy)
        maps = kernels.empty_pixels(dy, shape, dy.dtype, True) if x is None else as_nhwc(x.to(dy.dtype))
        cast_weight = aten.weight_of(weight, dy.dtype)
        if by_pytorch[0]:
            dx = aten.input_gradient(dy, maps, cast_weight, g)
            dx = dx if channels_last else dx.contiguous()
        if by_pytorch[1]:
            dw = aten.weight_gradient(dy, maps, cast_weight, weight, g)
    own_dx = kernels.empty_pixels(dy, shape, dy.dtype, channels_last) if needs[0] and dx is None else None
    own_dw = torch.empty_like(weight) if x is not None and dw is None else None
    if bias is not None:
        db = torch.empty_like(bias)
    if not (own_dx is own_dw is db is None):
        x = x if own_dw is not None else None
        launches.gradients(dy, x, weight, packed, saved, own_dx, own_dw, db, tuple(g), activation, channels_last)
    dx = own_dx if dx is None else dx
    return dx if dx is None else dx.to(dtype), own_dw if dw is None else dw, db


_passes = Passes("Conv2d", 3, _forward, _backward, _keep)
_operator = Operator(_reference, _check, _run)
