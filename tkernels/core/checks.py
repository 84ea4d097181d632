"""Checks several operators share. Each raises what torch raises, naming the argument, what was given and allowed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

REFUSALS = (RuntimeError, ValueError, IndexError, TypeError)


def explain(error: Exception, check: Callable[[], None]) -> NoReturn:
    """Raise what ``check`` raises, which names the argument, of the very class of torch's ``error``; else that.

    PyTorch bodies call torch first and check only what it refused: checks cost more than a small operator.
    """
    try:
        check()
    except REFUSALS as ours:
        raise (ours if type(ours) is type(error) else error) from None
    raise error


def tensor(**named: Any) -> None:
    """Raise TypeError for an argument that is not a tensor. Keyword names are the arguments' names."""
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")


def optional_tensor(**named: Any) -> None:
    """Raise TypeError for an argument that is neither None nor a tensor."""
    tensor(**{name: value for name, value in named.items() if value is not None})


def floating(**named: Tensor | None) -> None:
    """Raise RuntimeError for a tensor of integers, booleans or complex numbers."""
    for name, t in named.items():
        if t is not None and not t.is_floating_point():
            raise RuntimeError(f"{name} must have a floating-point dtype, got {t.dtype}")


def are_floats(*tensors: Tensor | None) -> bool:
    """Whether each is a dense tensor of floating-point numbers: neither integers, complex, sparse nor nested."""
    return all(t is None or (t.is_floating_point() and t.layout is torch.strided and not t.is_nested) for t in tensors)


def same_device(**named: Tensor | None) -> None:
    """Raise RuntimeError unless all tensors are on one device."""
    devices = {name: t.device for name, t in named.items() if t is not None}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise RuntimeError(f"expected all tensors to be on the same device, got {listed}")


def same_dtype(**named: Tensor | None) -> None:
    """Raise RuntimeError unless all tensors have one dtype."""
    dtypes = {name: t.dtype for name, t in named.items() if t is not None}
    if len(set(dtypes.values())) > 1:
        listed = ", ".join(f"{name} is {dtype}" for name, dtype in dtypes.items())
        raise RuntimeError(f"expected all tensors to have the same dtype, got {listed}")


def matching_kinds(input: Tensor, weight: Tensor, bias: Tensor | None, autocast: torch.dtype | None) -> None:
    """Raise RuntimeError for devices or dtypes that do not go together (autocast makes dtypes agree)."""
    if weight.device != input.device or (bias is not None and bias.device != input.device):
        same_device(input=input, weight=weight, bias=bias)
    if autocast is None and (weight.dtype != input.dtype or (bias is not None and bias.dtype != input.dtype)):
        same_dtype(input=input, weight=weight, bias=bias)


def integer(name: str, value: Any) -> int:
    """A whole number as an int: what Python counts as an index, but no boolean, as in torch.

    Raises TypeError for anything else, ValueError for one that 64 bits do not hold.
    """
    if type(value) is not int:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        value = value.__index__()
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit into 64 bits, got {value}")
    return value


def number(name: str, value: Any) -> float:
    """A real number as a float: Python's, NumPy's or a tensor of shape () without a gradient. TypeError for others."""
    if type(value) is not float:
        scalar = getattr(value, "ndim", None) == 0 and not getattr(value, "requires_grad", False)
        if not (isinstance(value, (int, float)) or scalar):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        value = float(value)
    return value


def probability(name: str, p: float) -> None:
    """Raise ValueError unless 0 <= p <= 1."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {p}")


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ValueError unless ``value`` is among ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def shape(t: Tensor) -> list[int]:
    """A shape as plain integers, for messages."""
    return list(torch.Size(t.shape))
