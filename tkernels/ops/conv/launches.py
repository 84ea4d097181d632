"""A convolution's forward and its gradients, each as one launch function: copies, packing and kernels, in order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tkernels.core import library, mode
from tkernels.core.geometry import Geometry, as_nhwc
from tkernels.ops.conv import kernels, kernels_backward, kernels_depthwise


def _flops(y: Sequence[int], weight: Sequence[int]) -> int:
    """Of one product, groups or not."""
    return 2 * math.prod(y) * math.prod(weight[1:])


def _forward_flops(x: Any, weight: Sequence[int], bias: Any, y: Sequence[int], *_: Any) -> int:
    return _flops(y, weight)


@library.launches("conv2d_forward", mutates="y z packed", flops=_forward_flops)
def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, z: Tensor | None, packed: Tensor | None,
    geometry: Sequence[int], activation: str | None, channels_last: bool,
) -> None:  # fmt: skip
    """Writes y = activation(conv(x, w) + bias), the activation's input z where it is given, and the packed weight
    where the weight is to be packed.

    ``x``: in the dtype of ``y``, or in any where a dense product is flattened; any strides. ``geometry``: Geometry's
    fields. ``channels_last``: the memory format of y and z.
    """
    g = Geometry(*geometry)
    if bias is not None:
        bias = bias.contiguous()
    if g.depthwise:
        kernels_depthwise.forward(as_nhwc(x), weight, bias, y, z, g, activation, channels_last)
        return
    if packed is not None:
        kernels.pack(weight, packed, g)
    if not g.flattened:
        x = as_nhwc(x)
    kernels.forward(x, weight if packed is None else packed, bias, y, z, g, activation, channels_last)


@library.launches("conv2d_activation_gradient", mutates="dz", flops=library.no_flops)
def activation_gradient(dy: Tensor, saved: Tensor, dz: Tensor, activation: str) -> None:
    """Writes dz = dy times the activation's derivative, NHWC. ``saved``: what that needs."""
    kernels_backward.activation_gradient(dy, saved, dz, activation)


def _gradient_flops(
    dy: Sequence[int], x: Any, weight: Sequence[int], packed: Any, saved: Any, dx: Any, dw: Any, *_: Any
) -> int:
    return _flops(dy, weight) * ((dx is not None) + (dw is not None))


@library.launches("conv2d_gradients", mutates="dx dw db", flops=_gradient_flops)
def gradients(
    dy: Tensor, x: Tensor | None, weight: Tensor, packed: Tensor | None, saved: Tensor | None, dx: Tensor | None,
    dw: Tensor | None, db: Tensor | None, geometry: Sequence[int], activation: str | None, channels_last: bool,
) -> None:  # fmt: skip
    """Writes the gradients of input, weight and bias that are given.

    ``x``: forward's, None without ``dw``. ``packed``: the weight as forward packed it, if it did. ``saved``: what the
    activation's gradient needs. ``channels_last``: the memory format of dx.
    """
    g = Geometry(*geometry)
    dz, saved = _masked(dy, saved, g, activation, dx is not None)
    fused = activation if saved is not None else None
    if dx is not None and g.depthwise:
        kernels_depthwise.input_gradient(dz, weight, dx, g, channels_last)
    elif dx is not None:
        # tf32 products on tensor cores want both operands contiguous along the reduction
        transposed = mode.dot_precision(dz.dtype, "conv") == "tf32"
        if transposed or packed is None:
            packed = kernels.launch_pack(weight, g, dz.dtype, transposed)
        kernels_backward.input_gradient(dz, packed, dx, g, channels_last, transposed, saved, fused)
    if dw is not None or db is not None:
        workspace = _weight_sums(x, dz, saved, g, fused, db is not None)
        kernels_backward.merge(workspace, dw, db, g)


def _weight_sums(
    x: Tensor | None, dz: Tensor, saved: Tensor | None, g: Geometry, activation: str | None, needs_bias: bool
) -> Tensor:
    """The workspace of the weight's gradient (where ``x`` is given) and the bias's."""
    if x is None:
        return kernels_backward.launch_wgrad(dz, dz, g, False, needs_bias, saved, activation)
    if g.depthwise:
        return kernels_depthwise.launch_wgrad(as_nhwc(x), dz, g, needs_bias)
    return kernels_backward.launch_wgrad(x if g.flattened else as_nhwc(x), dz, g, True, needs_bias, saved, activation)


def _masked(
    dy: Tensor, saved: Tensor | None, g: Geometry, activation: str | None, needs_input: bool
) -> tuple[Tensor, Tensor | None]:
    """dy in NHWC, and ``saved`` if the activation's derivative is left to the gradient kernels.

    They apply it in their prologue where each reads dy once. The input gradient of a larger window reads every element
    once a tap: there one pass beforehand moves fewer bytes, and it changes the layout too where that is needed.
    """
    if activation is None or saved is None:
        return as_nhwc(dy), None
    read_once = not g.depthwise and not (needs_input and g.taps > 1)
    if read_once and kernels.is_nhwc(dy) and kernels.is_nhwc(saved):
        return dy, saved
    return kernels_backward.launch_mask(dy, saved, activation), None
