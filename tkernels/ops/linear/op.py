"""Linear layer with activation and dropout: checks, autocast, autograd, and the PyTorch body."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from tkernels.core import activation as activations
from tkernels.core import autograd, checks, plan
from tkernels.core import mode as runtime
from tkernels.ops import cpu

if runtime.HAS_TRITON:
    from tkernels.ops.linear import kernels

__all__ = ["linear", "linear_relu"]


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """``dropout(activation(input @ weight.T + bias))`` in one kernel; ``dropout`` only if ``training``.

    input: (\\*, in_features); weight: (out_features, in_features) or (in_features); bias: (out_features) or whatever
    broadcasts as in torch.nn.functional.linear; result: (\\*, out_features), in the input's or the autocast dtype.
    activation: None, 'relu', 'leaky_relu' (slope 0.01), 'gelu' (erf), 'silu', 'relu6' or 'hardswish'. A dropped element
    passes a gradient of 0 behind a ReLU, even where an infinite one comes in (torch: NaN).

    Raises TypeError for an argument that is not a tensor, ValueError for an unknown activation or a ``dropout_p``
    outside [0, 1], RuntimeError for shapes, dtypes or devices that do not go together.
    """
    key, torchs = None, runtime.leaves_to_torch(input)
    if not torchs:
        key = plan.call_key((input, weight, bias), activation, dropout_p, training)
        call = _calls.get(key)
        if call is not None:
            return _run(input, weight, bias, activation, call.value, call)
    if activation not in activations.ACTIVATIONS:
        activations.check(activation)
    if not 0.0 <= dropout_p <= 1.0:
        checks.probability("dropout_p", dropout_p)
    p = float(dropout_p) if training else 0.0
    if torchs or not _takes_triton(input, weight, bias):
        return _torch_body(input, weight, bias, activation, p)
    _check_shapes(input, weight, bias)
    cast = runtime.autocast_dtype(input)
    if cast is not None:
        key = None  # of the tensors before
        input, weight, bias = runtime.cast_for_autocast(cast, input, weight, bias)  # type: ignore[assignment]
    checks.matching_kinds(input, weight, bias, None)
    call = None
    if key is not None and weight.dim() == 2 and (bias is None or bias.dim() <= 1):
        call = _calls.add(key, plan.Call(p))
    return _triton_body(input, weight, bias, activation, p, call)


# calls that passed the checks and go to _run, with dropout's probability
_calls = plan.Cache(plan.MOST_PLANS)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``relu(input @ weight.T + bias)``: :func:`linear` with activation 'relu'; shapes and errors are the same."""
    if runtime.leaves_to_torch(input):
        return _torch_body(input, weight, bias, "relu", 0.0)
    return linear(input, weight, bias, "relu")


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


def _takes_triton(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """The backend decision; integers, complex numbers and sparse tensors are PyTorch's."""
    checks.tensor(input=input, weight=weight)
    checks.optional_tensor(bias=bias)
    for t in (input, weight, bias):
        if t is not None and not (t.is_floating_point() and t.layout is torch.strided):
            return False
    return runtime.use_triton(input, weight, bias)


def _torch_body(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, p: float) -> Tensor:
    """The same in ATen calls, with PyTorch's own autograd and autocast."""
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
    checks.matching_kinds(input, weight, bias, runtime.autocast_dtype(input))


def _triton_body(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, p: float, call: plan.Call | None = None
) -> Tensor:
    if weight.dim() == 1:
        return _triton_body(input, weight.unsqueeze(0), bias, activation, p).squeeze(-1)
    if bias is not None and bias.dim() > 1:
        # rows of their own: the sum is a separate pass, and what follows it too
        y = activations.apply(_triton_body(input, weight, None, None, 0.0) + bias, activation)
        return F.dropout(y, p) if p > 0 else y
    return _run(input, weight, bias, activation, p, call)


def _run(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, p: float, call: plan.Call | None
) -> Tensor:
    """The kernels, differentiable where that is asked for."""
    seed = runtime.dropout_seed(input) if p > 0 else None
    if torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        y: Tensor = _Linear.apply(*autograd.apart(input, weight, bias), activation, p, seed, call)
        return y
    return cast(Tensor, _forward.of_call(call, (input, weight, bias, seed), activation, p, (False, False, False))[0])


def _saves_seed(activation: str | None) -> bool:
    """Whether backward replays dropout from the seed. After a ReLU it need not: where y is 0 the gradient is 0, be it
    by dropout or by ReLU, and where y is not 0 the element was kept."""
    return activation != "relu"


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None,
        p: float,
        seed: Tensor | None,
        call: plan.Call | None,
    ) -> Tensor:
        needs = ctx.needs_input_grad[:3]
        y, *kept = _forward.of_call(call, (input, weight, bias, seed), activation, p, needs)
        autograd.save(ctx, *kept)
        ctx.activation, ctx.p, ctx.needs_bias = activation, p, needs[2]
        return y  # type: ignore[return-value]

    @staticmethod
    @autograd.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _backward((dy, *autograd.saved(ctx)), ctx.activation, ctx.p, ctx.needs_bias)
        # db has a value for each output feature; autograd sums it for a bias of one element
        return *gradients, None, None, None, None


@plan.Planned
def _forward(
    tensors: tuple[Tensor | None, ...], activation: str | None, p: float, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """y, and what backward needs for the gradients of input, weight and bias that ``needs`` asks for."""
    input, weight, bias, seed = cast(Any, tensors)
    needs_input, needs_weight, _ = needs
    x, w = kernels.dense_rows(input), kernels.dense_weight(weight)
    y, z = kernels.launch_forward(x, w, bias, activation, p, seed, save_z=activations.needs_input(activation, p))
    saved = None if activation is None else z if z is not None else y
    return y, x if needs_weight else None, w if needs_input else None, saved, seed if _saves_seed(activation) else None


@plan.Planned
def _backward(
    tensors: tuple[Tensor | None, ...], activation: str | None, p: float, needs_bias: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight and bias, of dy and what _forward kept."""
    dy, x, w, saved, seed = cast(Any, tensors)
    dy = kernels.dense_rows(dy)
    dx = dw = db = None
    if w is not None:
        dx = kernels.launch_dgrad(dy, w, saved, activation, p, seed)
    if x is not None or needs_bias:
        dw, db = kernels.launch_wgrad(dy, x, saved, activation, p, seed, needs_bias)
    return dx, dw, db
