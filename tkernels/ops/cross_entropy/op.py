"""Cross entropy between logits and class indices or probabilities: checks, autograd, and the PyTorch body."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from tkernels.core import _torch, checks, mode, plan
from tkernels.core.late import late
from tkernels.core.operator import Decision, Operator, Passes
from tkernels.core.records import LossOptions
from tkernels.ops import cpu
from tkernels.ops.cross_entropy import layout as class_layout

if TYPE_CHECKING:
    from tkernels.ops.cross_entropy import kernels
else:
    kernels = late(".kernels", __package__)

__all__ = ["cross_entropy"]

REDUCTIONS = ("none", "mean", "sum")
_NUMBERS = {name: number for number, name in enumerate(REDUCTIONS)}  # ATen's
_aten = _torch.nn_functions.cross_entropy_loss
NoneType = type(None)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    size_average: bool | None = None,
    reduce: bool | None = None,
) -> Tensor:
    """Cross entropy between logits and targets, by the formulas of torch.nn.CrossEntropyLoss.

    Empty input, and a weight that asks for a gradient beside probabilities, are left to PyTorch.

    Args:
        input: logits ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``
        target: class indices (int64 or uint8) ``()``, ``(N)`` or ``(N, d1, ...)``, or probabilities (floating) of the
            input's shape
        weight: ``(C)``, a factor for each class; of the input's dtype where targets are indices
        ignore_index: rows of this index count neither in the sum nor in the mean
        reduction: 'mean', 'sum' or 'none'
        label_smoothing: how much of the target is spread evenly over the classes, from 0 to 1
        size_average: torch's old way to name a reduction
        reduce: likewise

    Returns:
        ``()`` or, for reduction 'none', the shape of class indices; computed in float32 and given in the input's dtype
        (float32 under autocast; for probabilities promoted with target and weight)

    Raises:
        TypeError: For arguments that are no tensors or numbers.
        ValueError: For an unknown reduction, or batch sizes that differ.
        RuntimeError: For other shapes, dtypes or devices that do not go together, a ``label_smoothing`` above 1, or a
            non-negative ``ignore_index`` beside probabilities.
        IndexError: On a CPU for an index out of range. On a GPU such an index makes the loss NaN.

    Examples:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> target = torch.tensor([0, 1, -100])  # the last row is ignored
        >>> tkernels.functional.cross_entropy(logits, target)
        tensor(0.1269)
    """
    if size_average is not None or reduce is not None:
        reduction = _torch.reduction_of_old_arguments(size_average, reduce)
    return _operator((input, target, weight), ignore_index, reduction, label_smoothing)


def _check_call(input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Decision | None:
    """Empty input, and class weights that are learned, are PyTorch's."""
    _check_tensors(input, target, weight)
    if not input.is_floating_point() or input.numel() == 0 or input.dim() == 0:
        return None
    if any(t is not None and (t.layout is not torch.strided or t.is_complex()) for t in (input, target, weight)):
        return None
    if weight is not None and weight.requires_grad and torch.is_grad_enabled() and target.is_floating_point():
        return None
    if not mode.use_triton(input, target, weight):
        return None
    checked = _checked_options(input, target, weight, LossOptions(*options))
    return Decision((checked, _loss_dtype(input, target, weight)))


def _checked_options(input: Tensor, target: Tensor, weight: Tensor | None, given: LossOptions) -> LossOptions:
    """What kernels take. Raises what torch raises."""
    reduction = given.reduction
    if reduction == "elementwise_mean":  # torch's old name for it, with torch's warning
        _torch.reduction_number(reduction)
        reduction = "mean"
    ignore_index = checks.integer("ignore_index", given.ignore_index)
    smoothing = checks.number("label_smoothing", given.smoothing)
    _check(input, target, weight, LossOptions(ignore_index, reduction, smoothing))
    # negative or NaN is none, as in torch
    return LossOptions(ignore_index, reduction, smoothing if smoothing > 0 else 0.0)


def _check_tensors(input: Any, target: Any, weight: Any) -> None:
    if not (isinstance(input, Tensor) and isinstance(target, Tensor) and isinstance(weight, (Tensor, NoneType))):
        checks.tensor(input=input, target=target)
        checks.optional_tensor(weight=weight)


def _reference(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor:  # fmt: skip
    """PyTorch's own call, with its autograd and autocast, but for large logits on a CPU. What it refuses is refused in
    our words."""
    options = LossOptions(ignore_index, reduction, label_smoothing)
    try:
        loss = None if cpu is None else cpu.cross_entropy(input, target, weight, options)
        if loss is not None:
            return loss
        if type(input) is type(target) is Tensor and reduction in _NUMBERS:
            # what torch.nn.functional.cross_entropy comes to
            return _aten(input, target, weight, _NUMBERS[reduction], ignore_index, label_smoothing)
        return torch.nn.functional.cross_entropy(
            input, target, weight, None, ignore_index, None, reduction, label_smoothing
        )
    except checks.REFUSALS as error:
        checks.explain(error, functools.partial(_check_all, input, target, weight, options))


def _check_all(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> None:
    _check_tensors(input, target, weight)
    _check(input, target, weight, options)
    _check_range(input, target, options.ignore_index)


def _check(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> None:
    """Raise for what torch refuses, but for the range of class indices, which takes a look at the values."""
    reduction = options.reduction
    if reduction not in REDUCTIONS:
        checks.one_of("reduction", reduction, REDUCTIONS)
    ignore_index = checks.integer("ignore_index", options.ignore_index)
    label_smoothing = checks.number("label_smoothing", options.smoothing)
    if (weight is not None and weight.device != input.device) or target.device != input.device:
        checks.same_device(input=input, target=target, weight=weight)
    if target.shape == input.shape:
        _check_probabilities(input, target, ignore_index)
    else:
        _check_indices(input, target, label_smoothing)
    if weight is not None:
        _check_weight(input, target, weight)
        if target.dtype is torch.uint8 and reduction == "mean" and label_smoothing > 0:
            raise RuntimeError("target must have dtype int64 beside weight, label_smoothing and the mean, got uint8")
    if label_smoothing > 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0, got {label_smoothing}")


def _given(input: Tensor, target: Tensor) -> str:
    return f"got input {checks.shape(input)} and target {checks.shape(target)}"


def _check_probabilities(input: Tensor, target: Tensor, ignore_index: int) -> None:
    if not target.is_floating_point():
        raise RuntimeError(
            f"target of the input's shape {checks.shape(input)} holds class probabilities and must have a "
            f"floating-point dtype, got {target.dtype} and shape {checks.shape(target)}"
        )
    if ignore_index >= 0:
        raise RuntimeError(f"ignore_index must be negative where target holds class probabilities, got {ignore_index}")


def _check_indices(input: Tensor, target: Tensor, label_smoothing: float) -> None:
    if input.dim() == 1:
        if target.dim() > 1:
            raise RuntimeError(f"target must have shape [] or [1] for 1-D input, {_given(input, target)}")
        if target.numel() != 1 and not target.is_floating_point():
            raise ValueError(f"target must have shape [] or [1] for 1-D input, {_given(input, target)}")
        if target.dim() == 1 and label_smoothing > 0:
            raise RuntimeError(f"target must have shape [] for 1-D input and label_smoothing, {_given(input, target)}")
    elif target.dim() == 0 or target.shape[0] != input.shape[0]:
        raise ValueError(f"target must have the input's batch size {input.shape[0]}, {_given(input, target)}")
    elif target.shape[1:] != input.shape[2:]:
        allowed = [*input.shape[:1], *input.shape[2:]]
        raise RuntimeError(
            f"target must have shape {allowed} for class indices or {checks.shape(input)} for class probabilities, "
            f"{_given(input, target)}"
        )
    if target.dtype is not torch.int64 and (target.dtype is not torch.uint8 or input.dim() > 2):
        raise RuntimeError(
            f"target must have dtype int64 for class indices (or uint8 where input has one or two dimensions), "
            f"got {target.dtype} for input {checks.shape(input)}"
        )


def _check_weight(input: Tensor, target: Tensor, weight: Tensor) -> None:
    n_classes = input.shape[1] if input.dim() > 1 else input.shape[0]
    if weight.dim() != 1 or weight.shape[0] != n_classes:
        raise RuntimeError(
            f"weight must have shape [{n_classes}], one value a class, "
            f"got weight {checks.shape(weight)} and input {checks.shape(input)}"
        )
    if target.is_floating_point():
        return
    if weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("weight must not require grad where target holds class indices: it has no gradient")
    if weight.dtype != input.dtype and mode.autocast_dtype(input) is None:
        raise RuntimeError(f"weight must have the input's dtype {input.dtype}, got {weight.dtype}")


def _check_range(input: Tensor, target: Tensor, ignore_index: int) -> None:
    """Raise IndexError for a class index out of range; it reads the values, so only where an error is known."""
    if target.is_floating_point():
        return
    n_classes = input.shape[1] if input.dim() > 1 else input.shape[0]
    index = target.to(torch.int64)
    wrong = index[(index != ignore_index) & ((index < 0) | (index >= n_classes))]
    if wrong.numel():
        raise IndexError(
            f"target must hold classes from 0 to {n_classes - 1} or ignore_index = {ignore_index}, "
            f"got {int(wrong[0])} for input {checks.shape(input)}"
        )


def _loss_dtype(input: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype:
    dtype = torch.float32 if mode.autocast_dtype(input) is not None else input.dtype
    if target.is_floating_point():
        if target.dtype != dtype:
            dtype = torch.promote_types(dtype, target.dtype)
        if weight is not None and weight.dtype != dtype:
            dtype = torch.promote_types(dtype, weight.dtype)
    return dtype


@plan.Planned
def _forward(
    tensors: plan.Tensors, options: LossOptions, loss_dtype: torch.dtype, needs: tuple[bool, ...] | None
) -> plan.Tensors:
    """The loss, and what the gradients are made of."""
    input, target, weight = cast(Any, tensors)
    x = class_layout.readable(input)
    target = class_layout.readable(target) if target.is_floating_point() else target.contiguous()
    weight = None if weight is None else weight.contiguous()
    loss, stats, count = kernels.launch_forward(x, target, weight, options, loss_dtype)
    return loss, x, target, weight, stats, count


@plan.Planned
def _backward(
    tensors: plan.Tensors, options: LossOptions, loss_dtype: torch.dtype, needs: tuple[bool, ...]
) -> plan.Tensors:
    """Gradients of logits and of probabilities."""
    grad, x, target, weight, stats, count = cast(Any, tensors)
    dx = dp = None
    if needs[0]:
        dx = kernels.launch_backward(grad, x, target, weight, stats, count, options)
    if needs[1]:
        dp = kernels.launch_target_backward(grad, x, target, weight, stats, count, options)
    return dx, dp


_operator = Operator(_reference, _check_call, Passes("CrossEntropy", 2, _forward, _backward))
