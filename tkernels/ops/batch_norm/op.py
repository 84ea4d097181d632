"""Batch norm with residual and activation: checks, the autograd function, the PyTorch body."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor

from tkernels.core import activation as activations
from tkernels.core import checks, mode, plan
from tkernels.core.late import late
from tkernels.core.operator import Decision, Operator, Passes
from tkernels.core.records import BatchNorm, Norm
from tkernels.ops import cpu

if TYPE_CHECKING:
    from tkernels.ops.batch_norm import kernels, launches
else:
    kernels = late(".kernels", __package__)
    launches = late(".launches", __package__)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``activation((input - mean) / sqrt(var + eps) * weight + bias + residual)``, as torch.nn.functional.batch_norm.

    Dtypes: all one, or float32 parameters and statistics with a float16 or bfloat16 input, which sets the output's.
    Under autocast the input's dtype stays and the residual is cast to it. Empty input is left to PyTorch.

    Args:
        input: ``(N, C)``, ``(N, C, L)``, ``(N, C, H, W)`` or ``(N, C, D, H, W)``
        running_mean: ``(C)``
        running_var: ``(C)``, of the unbiased variance
        weight: ``(C)``
        bias: ``(C)``
        training: take mean and (biased) variance from the batch, and move the running statistics, where given; else the
            running statistics normalise
        momentum: how far the running statistics move towards the batch's, from 0 to 1
        eps: is added to the variance
        activation: as of :func:`tkernels.functional.linear`
        residual: of the input's shape

    Raises:
        ValueError: For one value per channel in training, a bad eps, half of the running statistics, or an unknown
            activation.
        RuntimeError: For shapes, dtypes and devices that do not fit.
        TypeError: For what is no tensor or number.

    Examples:
        >>> x, shortcut = torch.randn(2, 4, 8, 6, 6)  # two tensors (4, 8, 6, 6)
        >>> y = tkernels.functional.batch_norm(x, None, None, training=True, activation="relu", residual=shortcut)
        >>> expected = torch.nn.functional.batch_norm(x, None, None, training=True) + shortcut
        >>> torch.allclose(y, expected.relu(), atol=1e-5)
        True
    """
    if momentum is None:
        raise TypeError("momentum must be a number, got None (a module with momentum=None keeps a cumulative average)")
    bn = BatchNorm(running_mean, running_var, weight, bias, training, momentum, eps)
    return counted_batch_norm(input, bn, activation, residual)


def counted_batch_norm(input: Tensor, bn: BatchNorm, activation: str | None, residual: Tensor | None) -> Tensor:
    """batch_norm for modules, which count batches and may average over all of them."""
    activations.check(activation)
    if residual is not None:
        residual = checked_residual(input, residual)
    options = bn.training, bn.momentum, bn.eps, activation
    vectors = bn.weight, bn.bias, bn.running_mean, bn.running_var
    return _operator((input, residual, *vectors, bn.num_batches_tracked), *options)


def _check_call(input: Tensor, residual: Tensor | None, *given: Any) -> Decision | None:
    """Empty input is PyTorch's."""
    bn, activation = _batch_norm_of(given)
    if isinstance(input, Tensor) and input.numel() == 0:
        return None
    check(input, bn)
    if not mode.use_triton(input, *bn.vectors, residual):
        return None
    momentum = None if bn.momentum is None else checks.number("momentum", bn.momentum)
    return Decision((bn.training, momentum, checks.number("eps", bn.eps), activation, memory_format(input)))


def _batch_norm_of(given: tuple[Any, ...]) -> tuple[BatchNorm, str | None]:
    """Of vectors, counter and options as the operator has them: batch norm and activation."""
    weight, bias, running_mean, running_var, counter, training, momentum, eps, activation = given
    return BatchNorm(running_mean, running_var, weight, bias, training, momentum, eps, counter), activation


def check(input: Tensor, bn: BatchNorm) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
    vectors = {name: t for name, t in zip(BatchNorm._fields, bn.vectors) if t is not None}
    checks.tensor(**vectors)
    if not isinstance(bn.training, bool):
        raise TypeError(f"training must be a bool, got {type(bn.training).__name__}")
    if bn.training and input.ndim and input.shape[0] == 1 and all(size == 1 for size in input.shape[2:]):
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
    if bn.training and input.ndim == 0:
        raise IndexError(f"input must have at least 2 dimensions (N, C, ...), got shape {checks.shape(input)}")
    _check_eps(bn.eps, bn.training)
    # an empty vector counts as a batch of no channels, as in torch
    if input.ndim < 2 and not (input.ndim == 1 and input.numel() == 0):
        # torch fails on whichever it meets first: the missing axis, or a vector of the wrong length
        error = RuntimeError if vectors or not bn.training else IndexError
        raise error(f"input must have at least 2 dimensions (N, C, ...), got shape {checks.shape(input)}")
    if bn.momentum is not None:
        checks.number("momentum", bn.momentum)
    if (bn.running_mean is None) != (bn.running_var is None) and bn.training:
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if not bn.training and (bn.running_mean is None or bn.running_var is None):
        missing = "running_mean" if bn.running_mean is None else "running_var"
        raise RuntimeError(f"{missing} must be given in evaluation (training=False), got None")
    if not input.is_floating_point():
        raise NotImplementedError(f"input must have a floating-point dtype, got {input.dtype}")
    _check_vectors(input, vectors)


def _check_eps(eps: float, training: bool) -> None:
    eps = checks.number("eps", eps)
    if (eps <= 0.0) if training else (eps < 0.0):
        raise ValueError(f"eps must be positive in training and not negative in evaluation, got {eps}")


def _check_vectors(input: Tensor, vectors: dict[str, Tensor]) -> None:
    """Parameters and statistics: C values each, on the input's device, of dtypes that torch accepts together."""
    channels, dtype = input.shape[1] if input.ndim > 1 else 0, input.dtype
    for name, t in vectors.items():
        if t.numel() != channels:
            raise RuntimeError(f"{name} must have one value per channel of input {checks.shape(input)} ({channels}), "
                               f"got shape {checks.shape(t)}")  # fmt: skip
        if t.device != input.device:
            checks.same_device(input=input, **vectors)
        if t.dtype != dtype:
            wide = dtype in (torch.float16, torch.bfloat16)
            if not wide or any(other.dtype != torch.float32 for other in vectors.values()):
                listed = ", ".join(f"{key} {other.dtype}" for key, other in vectors.items())
                allowed = f"{dtype} or, all of them, torch.float32" if wide else f"{dtype}"
                raise RuntimeError(f"parameters and statistics of a {dtype} input must be {allowed}, got {listed}")
    for name in ("running_mean", "running_var"):
        t_or_none = vectors.get(name)
        if t_or_none is None:
            continue
        if t_or_none.ndim != 1:
            raise RuntimeError(f"{name} must have shape [{channels}], got {checks.shape(t_or_none)}")
        if t_or_none.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{name} must not require a gradient: batch norm has none for it")


def checked_residual(input: Tensor, residual: Tensor) -> Tensor:
    checks.tensor(input=input, residual=residual)
    if residual.shape != input.shape:
        raise RuntimeError(f"residual must have the input's shape {checks.shape(input)}, got {checks.shape(residual)}")
    checks.same_device(input=input, residual=residual)
    if residual.dtype != input.dtype:
        if mode.autocast_dtype(input) is None or not residual.is_floating_point():
            checks.same_dtype(input=input, residual=residual)
        residual = residual.to(input.dtype)
    return residual


def _reference(input: Tensor, residual: Tensor | None, *given: Any) -> Tensor:
    """The PyTorch body: torch's own batch norm, differentiated by torch; residual and ReLU in place of its output.

    What torch refuses is refused in our words.
    """
    bn, activation = _batch_norm_of(given)
    if bn.training is True and activation is not None and cpu is not None:  # else there is nothing to fuse
        fast = cpu.batch_norm(input, bn, activation, residual)
        if fast is not None:
            return fast
    try:
        if bn.eps <= 0.0:  # torch before 2.14 takes any
            if input.numel() == 0:
                _check_eps(bn.eps, bn.training)
            else:
                check(input, bn)
        y = _torch_normalize(input, bn)
    except checks.REFUSALS as error:
        checks.explain(error, functools.partial(check, input, bn))
    if residual is not None:
        y = add_to_own(y, residual)
    return activations.apply_to_own(y, activation, y.dim())


def add_to_own(y: Tensor, residual: Tensor) -> Tensor:
    """y + residual where nothing else needs ``y``: in its memory, unless it is of a class of its own and so a view,
    whose history autograd would rewrite, or in a vmap, where the residual may be many and ``y`` one."""
    return y.add_(residual) if type(y) is Tensor and not mode.transformed() else y + residual


def _torch_normalize(input: Tensor, bn: BatchNorm) -> Tensor:
    running_mean, running_var, training, momentum = bn.running_mean, bn.running_var, bn.training, bn.momentum
    # torch's CPU backward takes vectors to be dense; running statistics it moves must be the caller's own
    weight, bias = dense(bn.weight), dense(bn.bias)
    if not training:
        running_mean, running_var = dense(running_mean), dense(running_var)
    counter = bn.num_batches_tracked if training else None
    if momentum is None:
        if counter is not None:
            if (counter.is_cuda or mode.traced() or mode.transformed()) and running_mean is not None:
                return _average_on_device(input, running_mean, running_var, weight, bias, bn.eps, counter)
            momentum = 1.0 / (float(counter) + 1.0)
        else:
            momentum = 0.0  # torch's modules stand still where there is nothing to average by
    if type(input) is Tensor and input.dim() > 1 and not mode.jit_traced() and input.shape[0] > 1:
        # what torch.nn.functional.batch_norm comes to once it has looked at each size of the input
        cudnn = input.is_cuda and torch.backends.cudnn.enabled
        y = torch.batch_norm(input, weight, bias, running_mean, running_var, training, momentum, bn.eps, cudnn)
    else:
        y = torch.nn.functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, bn.eps)
    if counter is not None:
        counter.add_(1)
    return y


def _average_on_device(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    counter: Tensor,
) -> Tensor:
    """torch's batch norm in training with a cumulative average that does not wait for the device's counter."""
    batch = [(running, torch.zeros_like(running)) for running in (running_mean, running_var) if running is not None]
    mean, var = (fresh for _, fresh in batch)
    y = torch.nn.functional.batch_norm(input, mean, var, weight, bias, True, 1.0, eps)
    counter.add_(1)
    # an empty batch has no statistics, and torch then leaves the running ones
    if input.numel() > 0:
        for running, fresh in batch:
            running.lerp_(fresh, counter.to(running.dtype).reciprocal())
    return y


def move_running(bn: BatchNorm, mean: Tensor, var: Tensor, count: int | Tensor) -> None:
    """Count the batch, and move the running statistics, where given, to its mean and (biased) variance, both float64,
    of ``count`` values a channel; nothing waits for the device. What too few values do not tell stays as it is."""
    with torch.no_grad():
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
        if bn.running_mean is None or bn.running_var is None:
            return
        factor = share_of_batch(bn)
        for running, batch, least in ((bn.running_mean, mean, 1), (bn.running_var, var * (count / (count - 1)), 2)):
            old = running.double()
            moved = old * (1 - factor) + batch * factor
            running.copy_(torch.where(count >= least, moved, old) if isinstance(count, Tensor) else moved)


def share_of_batch(bn: BatchNorm) -> float | Tensor:
    """How far running statistics move to this batch's, which is counted already; nothing waits for the device."""
    if bn.momentum is not None:
        return bn.momentum
    # torch's modules stand still where there is nothing to average by
    return 0.0 if bn.num_batches_tracked is None else bn.num_batches_tracked.double().reciprocal()


def unpacked(stats: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The batch's mean and (biased) variance, float64 [C], of its statistics [4, C]."""
    mean, invstd = stats[:2].double() + stats[2:].double()
    return mean, (invstd.square().reciprocal() - eps).clamp(min=0.0)


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout torch gives batch norm's output: channels_last where the strides say so, else contiguous."""
    if x.is_contiguous() or x.ndim not in (4, 5):
        return torch.contiguous_format
    smallest = 0
    for axis in (1, *range(x.ndim - 1, 1, -1), 0):
        size, stride = x.shape[axis], x.stride(axis)
        if stride < smallest or (axis == 1 and stride == 0) or (axis == 0 and smallest == x.stride(1)):
            return torch.contiguous_format
        smallest = stride * max(size, 1)
    return torch.channels_last if x.ndim == 4 else torch.channels_last_3d


@overload
def dense(t: Tensor) -> Tensor: ...
@overload
def dense(t: Tensor | None) -> Tensor | None: ...
def dense(t: Tensor | None) -> Tensor | None:
    """The tensor itself where it is contiguous. What is no tensor is refused by whoever takes it."""
    return t if t is None or not hasattr(t, "contiguous") else t.contiguous()


def norm_of(bn: BatchNorm, stats: Tensor | None = None) -> Norm:
    """What normalises: the batch's statistics [4, C], or the running ones without."""
    weight, bias = dense(bn.weight), dense(bn.bias)
    if stats is not None:
        return Norm(stats, None, weight, bias, bn.eps)
    mean = cast(Tensor, bn.running_mean)  # which evaluation does not go without
    return Norm(dense(mean), dense(bn.running_var), weight, bias, bn.eps)


def _kept_for_backward(
    has_residual: bool, activation: str | None, from_batch: bool, needs: tuple[bool, ...]
) -> tuple[str | None, bool]:
    """(what the activation's gradient needs beside the input: 'output', 'residual' or None; whether the input is
    needed); see _forward."""
    needs_input, _, needs_weight, needs_bias = needs
    saved_is = None
    needs_sums = needs_weight or needs_bias or (from_batch and needs_input)
    if activation in activations.FROM_OUTPUT and (has_residual or not needs_sums):
        saved_is = "output"
    elif activation is not None and has_residual:
        saved_is = "residual"
    return saved_is, needs_sums or (activation is not None and saved_is != "output")


@plan.Planned
def _forward(
    tensors: plan.Tensors, training: bool, momentum: float | None, eps: float, activation: str | None,
    layout: torch.memory_format, needs: tuple[bool, ...] | None,
) -> plan.Tensors:  # fmt: skip
    """y and what backward needs.

    Saved are the input and C-sized vectors: with batch statistics x is needed for dx anyway, so the activation's
    input is computed again from it, which also reads less than a saved output. A residual hides that input: where
    the output tells the derivative it is read instead (the next layer keeps it alive), else the residual is.
    With given statistics and frozen parameters the output alone does, and x is not kept.
    """
    input, residual, weight, bias, running_mean, running_var, counter = cast(Any, tensors)
    bn = BatchNorm(running_mean, running_var, weight, bias, training, momentum, eps, counter)
    x = input.contiguous(memory_format=layout)
    if residual is not None:
        residual = residual.contiguous(memory_format=layout)
    stats = None
    if training:
        stats = x.new_empty((4, x.shape[1]), dtype=torch.float32)
        launches.statistics(x, stats, running_mean, running_var, counter, momentum, eps)
    norm = norm_of(bn, stats)
    y = kernels.like(x)
    launches.forward(x, residual, *norm[:4], y, eps, activation)
    if needs is None:
        return (y,)
    saved_is, needs_x = _kept_for_backward(residual is not None, activation, training, needs)
    saved = {"output": y, "residual": residual, None: None}[saved_is]
    return y, x if needs_x else None, saved, *norm[:4]


def _keep(tensors: plan.Tensors, static: tuple[Any, ...]) -> tuple[Any, ...]:
    _, _, eps, activation, layout = static
    return eps, activation, layout, tensors[1] is not None


@plan.Planned
def _backward(
    tensors: plan.Tensors, eps: float, activation: str | None, layout: torch.memory_format, has_residual: bool,
    needs: tuple[bool, ...],
) -> plan.Tensors:  # fmt: skip
    """Gradients of (input, residual, weight, bias), where ``needs`` says so, of dy and what _forward kept."""
    dy, x, saved, *norm = cast(Any, tensors)
    _, var, weight, bias = norm
    needs_input, needs_residual, needs_weight, needs_bias = needs
    saved_is, _ = _kept_for_backward(has_residual, activation, var is None, needs)
    dy = dy.contiguous(memory_format=layout)
    x = dy if x is None else x  # not kept and never read: only its shape and layout count
    dx = dweight = dbias = coefficients = None
    dz = unwritten = kernels.like(x) if needs_residual and activation is not None else None
    behind = dy
    if needs_weight or needs_bias or (needs_input and var is None):
        dweight = kernels.gradient_like(weight) if needs_weight else None
        dbias = kernels.gradient_like(bias) if needs_bias else None
        if needs_input and var is None:
            coefficients = x.new_empty((2, x.shape[1]), dtype=torch.float32)
        launches.gradients(dy, x, saved, *norm, dz, dweight, dbias, coefficients, eps, activation, saved_is)
        if dz is not None:  # read instead of dy and what the activation's gradient needs
            behind, unwritten, saved, activation, saved_is = dz, None, None, None, None
    if needs_input or unwritten is not None:
        dx = kernels.like(x) if needs_input else None
        launches.input_gradient(
            behind, x, saved, *norm, coefficients, dx, unwritten, eps, activation, saved_is
        )  # fmt: skip
    return dx, (dy if dz is None else dz) if needs_residual else None, dweight, dbias


_operator = Operator(_reference, _check_call, Passes("BatchNorm", 4, _forward, _backward, _keep))
