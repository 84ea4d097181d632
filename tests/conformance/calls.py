"""A call as data: its arguments, copies of it on another device or in another dtype, and what came of running it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PARAMETERS = {
    "linear": ("input", "weight", "bias", "activation", "dropout_p", "training"),
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups", "activation"),
    "batch_norm": (
        *("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        *("activation", "residual"),
    ),
    "cross_entropy": (
        *("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing"),
    ),
    "matmul": ("a", "b"),
    "scaled_dot_product_attention": ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
}


def of_torch(operator: str) -> Callable[..., Tensor]:
    """torch's own function of that name; matmul is no part of torch.nn.functional and names its operands otherwise."""
    return (lambda a, b: torch.matmul(a, b)) if operator == "matmul" else getattr(F, operator)


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of one operator, as a user would write them."""

    operator: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def named(self) -> dict[str, Any]:
        """Every argument given, by its name."""
        return {**dict(zip(PARAMETERS[self.operator], self.args)), **self.kwargs}

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.named().items() if isinstance(value, Tensor)}

    def on(self, device: str, dtype: torch.dtype | None = None) -> Call:
        """The same call with fresh tensors of the same strides and offsets; floating ones in ``dtype``."""

        def moved(value: Any) -> Any:
            return replica(value, device, dtype) if isinstance(value, Tensor) else value

        args = tuple(moved(a) for a in self.args)
        return Call(self.operator, args, {name: moved(value) for name, value in self.kwargs.items()})

    def __str__(self) -> str:
        return f"{self.operator}({', '.join(f'{name}={described(value)}' for name, value in self.named().items())})"


def described(value: Any) -> str:
    """A value in few characters: tensors by dtype, shape, strides where not dense, offset and requires_grad."""
    if not isinstance(value, Tensor):
        return repr(value)
    text = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if not value.is_contiguous():
        text += f" strides {list(value.stride())}"
    if value.storage_offset():
        text += f" offset {value.storage_offset()}"
    return text + (" grad" if value.requires_grad else "")


def replica(t: Tensor, device: str, dtype: torch.dtype | None = None) -> Tensor:
    """A leaf with its own storage and the strides, offset, values and requires_grad of ``t``."""
    with torch.no_grad():
        if t.numel():
            end = t.storage_offset() + 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
        else:
            end = t.storage_offset()
        whole = t.detach().as_strided((end,), (1,), 0).clone()
        whole = whole.to(device=device, dtype=dtype if t.is_floating_point() else None)
        copy = whole.as_strided(t.shape, t.stride(), t.storage_offset())
    return copy.detach().requires_grad_(t.requires_grad)


@dataclasses.dataclass
class Outcome:
    """What a caller sees of one call: the output, the gradients by argument (None where none flows), or the error."""

    call: Call
    output: Tensor | None = None
    gradients: dict[str, Tensor | None] = dataclasses.field(default_factory=dict)
    error: Exception | None = None


def run(function: Callable[..., Tensor], call: Call, cotangent: Callable[[Tensor], Tensor] | None) -> Outcome:
    """Call ``function`` and, where something asks for it, take gradients with ``cotangent(output)`` coming in."""
    try:
        output = function(*call.args, **call.kwargs)
        wanted = {name: t for name, t in call.tensors().items() if t.requires_grad}
        if cotangent is None or not wanted or not output.requires_grad:
            return Outcome(call, output)
        incoming = cotangent(output.detach())
        gradients = torch.autograd.grad(output, list(wanted.values()), incoming, allow_unused=True)
    except Exception as error:  # whatever class it is: it is compared with torch's
        return Outcome(call, error=error)
    return Outcome(call, output, dict(zip(wanted, gradients)))
