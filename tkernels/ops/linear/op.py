"""Linear layer with activation and dropout: checks, autocast, autograd, and the PyTorch body."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from tkernels.core import _torch, autotune, checks, mode, plan, targets
from tkernels.core import activation as activations
from tkernels.core.late import late
from tkernels.core.operator import Decision, Operator, Passes
from tkernels.core.records import OURS, Route
from tkernels.ops import cpu
from tkernels.ops.linear import routing

if TYPE_CHECKING:
    from tkernels.ops.linear import kernels
else:
    kernels = late(".kernels", __package__)

__all__ = ["linear", "linear_relu"]


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """``dropout(activation(input @ weight.T + bias))`` in one kernel.

    Args:
        input: ``(*, in_features)``
        weight: ``(out_features, in_features)`` or ``(in_features)``
        bias: ``(out_features)``, or whatever broadcasts as in torch.nn.functional.linear
        activation: None, 'relu', 'leaky_relu' (slope 0.01), 'gelu' (erf), 'silu', 'relu6' or 'hardswish'
        dropout_p: the probability of an element to be zeroed. A dropped element passes a gradient of 0 behind a ReLU,
            even where an infinite one comes in (torch: NaN)
        training: whether there is dropout

    Returns:
        ``(*, out_features)``, in the input's or the autocast dtype

    Raises:
        TypeError: For an argument that is not a tensor.
        ValueError: For an unknown activation, or a ``dropout_p`` outside [0, 1].
        RuntimeError: For shapes, dtypes or devices that do not go together.

    Examples:
        >>> x, weight, bias = torch.randn(8, 20), torch.randn(10, 20), torch.randn(10)
        >>> y = tkernels.functional.linear(x, weight, bias, activation="relu")
        >>> y.shape
        torch.Size([8, 10])
        >>> torch.allclose(y, torch.relu(x @ weight.T + bias), atol=1e-4)
        True
    """
    return _operator((input, weight, bias), activation, dropout_p, training)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``relu(input @ weight.T + bias)``: :func:`tkernels.functional.linear` with activation 'relu', shapes and errors
    the same.

    Examples:
        >>> x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [-3.0, -4.0]])
        >>> tkernels.functional.linear_relu(x, weight)
        tensor([[11.,  0.]])
    """
    return linear(input, weight, bias, "relu")


def _probability(activation: str | None, dropout_p: float, training: bool) -> float:
    """With which dropout drops. Raises ValueError for what is no activation or no probability."""
    activations.check(activation)
    if not 0.0 <= dropout_p <= 1.0:
        checks.probability("dropout_p", dropout_p)
    return float(dropout_p) if training else 0.0


def _check(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, dropout_p: float, training: bool
) -> Decision | None:
    """Integers, complex numbers and sparse tensors are PyTorch's. Parameters keep their dtype under autocast: passes
    cast the weight, and write gradients in it."""
    p = _probability(activation, dropout_p, training)
    checks.tensor(input=input, weight=weight)
    checks.optional_tensor(bias=bias)
    if not (checks.are_floats(input, weight, bias) and mode.use_triton(input, weight, bias)):
        return None
    _check_shapes(input, weight, bias)
    autocast = mode.autocast_dtype(input)
    checks.matching_kinds(input, weight, bias, autocast)
    dtype = autocast or input.dtype
    static = activation, p, _route(input, weight, dtype, activation is not None or p > 0), dtype
    # (dropout behind a bias of several axes is torch's own)
    return Decision(static, dropout=p if bias is None or bias.dim() < 2 else 0.0)


def _route(input: Tensor, weight: Tensor, dtype: torch.dtype, fused: bool) -> Route:
    """Who computes the products: by estimate, or as measured where autotuning is on."""
    if not mode.asks_choosers() or weight.dim() == 1 or input.numel() == 0:
        return OURS
    n, k = operator.index(weight.shape[0]), operator.index(weight.shape[1])
    if mode.traced():
        return Route(*_route_in_traces(n, k, dtype, fused))
    m, precision, target = input.numel() // k, mode.dot_precision(dtype, "matmul"), targets.current()
    if not (autotune.enabled and routing.cublas_competes(dtype, precision, target)):
        return routing.of_linear(m, n, k, dtype, precision, fused, target)
    return _measured_route(input.detach(), m, n, k, dtype, precision, fused)


@_torch.constant_in_traces  # which has no business with facts of GPUs
def _route_in_traces(n: int, k: int, dtype: torch.dtype, fused: bool) -> tuple[bool, ...]:
    precision = mode.dot_precision(dtype, "matmul")
    return tuple(routing.of_linear(routing.MANY, n, k, dtype, precision, fused, targets.current()))


def _measured_route(input: Tensor, m: int, n: int, k: int, dtype: torch.dtype, precision: str, fused: bool) -> Route:
    """Each product by the clock, on matrices without values."""
    x, w, y = (input.new_empty(shape, dtype=dtype) for shape in ((m, k), (n, k), (m, n)))
    activation = "relu" if fused else None
    dx, dw = torch.empty_like(x), torch.empty_like(w)
    calls: autotune.Bodies = [
        (
            lambda: kernels.forward(x, w, None, y, None, None, activation, 0.0),
            lambda: kernels.end(F.linear(x, w), y, None, activation, 0.0) if fused else F.linear(x, w),
        ),
        (lambda: kernels.input_gradient(y, w, None, None, dx, None, 0.0), lambda: y @ w),
        (lambda: kernels.weight_gradient(y, x, None, None, dw, None, None, 0.0), lambda: y.t() @ x),
    ]
    return autotune.measured_route("linear", m, (n, k, dtype, precision, fused), calls)


def _check_shapes(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise RuntimeError for the shapes torch refuses."""
    if input.dim() == 0 or weight.dim() not in (1, 2):
        raise RuntimeError(
            "input must have at least one dimension and weight one or two, "
            f"got input {checks.shape(input)} and weight {checks.shape(weight)}"
        )
    if input.shape[-1] != weight.shape[-1]:
        raise RuntimeError(
            f"the last dimension of input must be in_features = {weight.shape[-1]}, "
            f"got input {checks.shape(input)} and weight {checks.shape(weight)}"
        )
    if bias is None:
        return
    if weight.dim() == 2 and bias.dim() == 1 and bias.shape[0] in (weight.shape[0], 1):
        return
    if weight.dim() == 1:
        allowed = input.dim() == 1 and bias.dim() == 0
    else:
        allowed = _broadcasts(bias, (*input.shape[:-1], weight.shape[0]))
    if not allowed:
        raise RuntimeError(
            f"bias must have shape [out_features] or broadcast to the result, "
            f"got bias {checks.shape(bias)} and weight {checks.shape(weight)} for input {checks.shape(input)}"
        )


def _broadcasts(t: Tensor, shape: tuple[int, ...]) -> bool:
    sizes = zip(reversed(t.shape), reversed(shape))
    return t.dim() <= len(shape) and all(size in (1, target) for size, target in sizes)


def _reference(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, dropout_p: float, training: bool
) -> Tensor:
    """The same in ATen calls, with PyTorch's own autograd and autocast."""
    p = _probability(activation, dropout_p, training)
    z = None if cpu is None else cpu.linear(input, weight, bias)
    try:
        # (on one line for all modes: torch.jit.trace compares lines)
        z = F.linear(input, weight, bias) if z is None else z
    except checks.REFUSALS as error:
        checks.explain(error, functools.partial(_check_all, input, weight, bias))
    y = activations.apply_to_own(z, activation, 2)
    return F.dropout(y, p) if p > 0 else y


def _check_all(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    checks.tensor(input=input, weight=weight)
    checks.optional_tensor(bias=bias)
    _check_shapes(input, weight, bias)
    checks.matching_kinds(input, weight, bias, mode.autocast_dtype(input))


def _run(call: plan.KnownCall | None, tensors: plan.Tensors, static: tuple[Any, ...]) -> Tensor:
    """The kernels, which take a weight of two axes and a bias of one."""
    input, weight, bias, seed = cast(Any, tensors)
    if weight.dim() == 1:
        return _run(call, (input, weight.unsqueeze(0), bias, seed), static).squeeze(-1)
    if bias is not None and bias.dim() > 1:
        # rows of their own: the sum is a separate pass, and what follows it too, with dropout as torch draws it
        activation, p, route, dtype = static
        z = _passes(call, (input, weight, None, None), (None, 0.0, route, dtype))
        y = activations.apply(z + bias.to(dtype), activation)
        return F.dropout(y, p) if p > 0 else y
    return _passes(call, tensors, static)


def _saves_seed(activation: str | None) -> bool:
    """Whether backward replays dropout from the seed. After a ReLU it need not: where y is 0 the gradient is 0, be it
    by dropout or by ReLU, and where y is not 0 the element was kept."""
    return activation != "relu"


@plan.Planned
def _forward(
    tensors: plan.Tensors, activation: str | None, p: float, route: Route, dtype: torch.dtype,
    needs: tuple[bool, ...] | None,
) -> plan.Tensors:  # fmt: skip
    """y, and what backward needs."""
    input, weight, bias, seed = cast(Any, tensors)
    needs_input, needs_weight, _ = needs or (False, False, False)
    x, w = kernels.dense_rows(input.to(dtype)), kernels.dense_weight(weight.to(dtype))
    keeps_z = needs is not None and activations.needs_input(activation, p)
    z: Tensor | None
    if route.forward:
        z = y = plan.call(_product, x, w, None if bias is None else bias.to(dtype))
        if activation is not None or seed is not None:
            # (what backward does not read is written over)
            y = torch.empty_like(z) if keeps_z or mode.traced() else z
            kernels.end(z, y, seed, activation, p)
    else:
        y, z = kernels.launch_forward(x, w, bias, activation, p, seed, save_z=keeps_z)
    z = z if keeps_z else None
    saved = None if activation is None else z if z is not None else y
    return y, x if needs_weight else None, w if needs_input else None, saved, seed if _saves_seed(activation) else None


def _keep(tensors: plan.Tensors, static: tuple[Any, ...]) -> tuple[Any, ...]:
    input, weight, bias, _ = cast(Any, tensors)
    return *static[:3], (input.dtype, weight.dtype, None if bias is None else bias.dtype)


@plan.Planned
def _backward(
    tensors: plan.Tensors, activation: str | None, p: float, route: Route, dtypes: tuple[Any, ...],
    needs: tuple[bool, ...],
) -> plan.Tensors:  # fmt: skip
    """Gradients of input, weight and bias, of ``dtypes``, of dy and what _forward kept. The bias's has a value for each
    output feature; autograd sums it for a bias of one element."""
    dy, x, w, saved, seed = cast(Any, tensors)
    dy = kernels.dense_rows(dy)
    dx = dw = db = None
    fused = activation is not None or p > 0
    if fused and (_by_pytorch(route, x, w) or _forms_gradient(dy, x, w)):
        dz = dy.new_empty(dy.shape)
        kernels.activation_gradient(dy, saved, seed, dz, activation, p)
        dy, saved, activation, p, seed = dz, None, None, 0.0, None
    if w is not None:
        own = not route.dgrad
        dx = kernels.launch_dgrad(dy, w, saved, activation, p, seed) if own else plan.call(_input_gradient, dy, w)
        dx = dx.to(dtypes[0])
    if x is not None and route.wgrad:
        dw, x = plan.call(_weight_gradient, dy, x).to(dtypes[1]), None
    if x is not None or needs[2]:
        own_dw = None if x is None else dy.new_empty((dy.shape[-1], x.shape[-1]), dtype=dtypes[1])
        db = dy.new_empty(dy.shape[-1], dtype=dtypes[2]) if needs[2] else None
        kernels.weight_gradient(dy, x, saved, seed, own_dw, db, activation, p)
        dw = own_dw if dw is None else dw
    return dx, dw, db


def _by_pytorch(route: Route, x: Tensor | None, w: Tensor | None) -> bool:
    """Whether a gradient that is asked for is PyTorch's product."""
    return (route.dgrad and w is not None) or (route.wgrad and x is not None)


def _forms_gradient(dy: Tensor, x: Tensor | None, w: Tensor | None) -> bool:
    """Whether our products read the gradient behind what is fused as a pass has formed it. (No question of a trace,
    whose rows may be a symbol.)"""
    if mode.traced() or (x is None and w is None):
        return False
    n, k = dy.shape[-1], x.shape[-1] if x is not None else w.shape[1]  # type: ignore[union-attr]
    return routing.forms_gradient(math.prod(dy.shape[:-1]), n, k)


# PyTorch's products. (Dense rows fold into matrices without copies.)


def _product(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, w, bias)


def _input_gradient(dz: Tensor, w: Tensor) -> Tensor:
    return _as_they_are(torch.matmul, dz, w)


def _weight_gradient(dz: Tensor, x: Tensor) -> Tensor:
    return _as_they_are(torch.mm, dz.reshape(-1, dz.shape[-1]).t(), x.reshape(-1, x.shape[-1]))


def _as_they_are(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Backward may run within autocast where forward did not: the operands have the dtype that forward chose."""
    kind = a.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return product(a, b)
    with torch.autocast(kind, enabled=False):
        return product(a, b)


_passes = Passes("Linear", 3, _forward, _backward, _keep)
_operator = Operator(_reference, _check, _run)
