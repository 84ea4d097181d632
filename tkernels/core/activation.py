"""Activations an operator may fuse: their names, and the PyTorch body of value and gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from tkernels.core import checks, mode

LEAKY_SLOPE = 0.01  # torch.nn.functional.leaky_relu's default
aten = torch.ops.aten


class Activation(NamedTuple):
    """``function(z)``; ``gradient(dy, saved)``: ``dy`` times the derivative; ``from_output``: whether ``saved`` may be
    the output as well as the input ``z``."""

    function: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Any], Tensor]
    from_output: bool = False


# (traces number them: new ones go to the end)
_TABLE: dict[str | None, Activation] = {
    None: Activation(lambda z: z, lambda dy, saved: dy),
    "relu": Activation(torch.relu, lambda dy, saved: aten.threshold_backward(dy, saved, 0), True),
    "leaky_relu": Activation(
        lambda z: F.leaky_relu(z, LEAKY_SLOPE),
        lambda dy, saved: aten.leaky_relu_backward(dy, saved, LEAKY_SLOPE, True), True,
    ),
    "gelu": Activation(F.gelu, aten.gelu_backward),
    "silu": Activation(F.silu, aten.silu_backward),
    "relu6": Activation(F.relu6, lambda dy, saved: aten.hardtanh_backward(dy, saved, 0, 6), True),
    "hardswish": Activation(F.hardswish, aten.hardswish_backward),
}  # fmt: skip
ACTIVATIONS = tuple(_TABLE)
# Their output tells the derivative; the others need their input.
FROM_OUTPUT = tuple(name for name, activation in _TABLE.items() if activation.from_output)
# Bytes from which on ReLU in place pays in training; glibc maps larger buffers anew each time. (Measured: 0.93 to 0.97
# of the speed at 8 MB, 1.1 to 1.2 times it from 32 MB on.)
IN_PLACE = 1 << 25


def check(activation: str | None) -> None:
    """Raise ValueError for a name outside ACTIVATIONS."""
    checks.one_of("activation", activation, ACTIVATIONS)


def needs_input(activation: str | None, p: float = 0.0) -> bool:
    """Whether backward needs the activation's input rather than its output, which dropout at ``p`` scales: its sign
    stays, but ReLU6's upper end moves."""
    return activation is not None and (activation not in FROM_OUTPUT or (activation == "relu6" and p > 0))


def apply(z: Tensor, activation: str | None) -> Tensor:
    """The activation of ``z``, any shape; the tensor itself for None."""
    return _TABLE[activation].function(z)


def apply_to_own(z: Tensor, activation: str | None, dims: int) -> Tensor:
    """:func:`apply` where nothing else needs ``z``: ReLU takes its memory. Not where it has another number of
    dimensions than ``dims``: then it is a view, and autograd would rewrite the history of what it is a view of. Nor in
    training below the size that is mapped anew each time: backward finds the memory that ``z`` frees still in cache.
    Nor in torch.jit.trace, whose check compares what is recorded with gradients and without."""
    if activation == "relu" and z.dim() == dims and (not z.requires_grad or _is_large(z)) and not mode.jit_traced():
        return torch.relu_(z)
    return apply(z, activation)


def _is_large(z: Tensor) -> bool:
    # a trace must not learn of sizes: Dynamo is gone after the first test, fake tensors after the second
    return not is_dynamo_compiling() and type(z) is Tensor and z.nbytes >= IN_PLACE


def gradient(dy: Tensor, saved: Tensor | None, activation: str | None) -> Tensor:
    """``dy`` times the derivative. ``saved``: the output for FROM_OUTPUT (or the input: it tells the same),
    the input for the others."""
    return _TABLE[activation].gradient(dy, saved)
