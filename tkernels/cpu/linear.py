"""What follows a linear layer on a CPU: its activation, in the product's own memory or in memory used again."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tkernels.cpu import buffers, compiler
from tkernels.cpu.compiler import Pass
from tkernels.ops import activation as activations

Run = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def plan(shape: tuple[int, ...], dtype: torch.dtype, activation: str | None, differentiated: bool) -> Run | str:
    """The function for a linear layer (input, weight, bias) with a result of that shape and dtype, and its activation;
    or why they are left to PyTorch."""
    if not compiler.enabled():
        return "passes are not compiled here: TKERNELS_COMPILE=0, or no C++ compiler"
    if activation is None or dtype not in (torch.float32, torch.bfloat16):
        return "nothing to gain on a CPU"
    # (Measured in convnext_tiny: 1.1 times as fast from there on; but torch's GELU in bfloat16 takes half the time
    # where memory comes without faults, which large memory never does.)
    slow = activation == "gelu" and dtype is torch.bfloat16 and not differentiated
    if math.prod(shape) * dtype.itemsize < (activations.IN_PLACE if slow else buffers.SMALLEST):
        return "nothing to gain on a CPU from so few values"
    if differentiated and not activations.needs_input(activation):
        return "nothing to gain on a CPU: torch has this activation in place"
    finish = functools.partial(_Activation.apply, activation) if differentiated else _in_place(activation)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = F.linear(x, weight, bias)
        if z.numel() == 0 or z.dtype is not dtype or not z.is_contiguous() or not compiler.plain_eager():
            return activations.apply(z, activation)
        y: Tensor = finish(z)
        return y

    return run


class Passes:
    """Of one activation, over dense tensors as one row of values."""

    def __init__(self, activation: str) -> None:
        self.activation = activation
        self.forward = Pass(self._forward, f"activation {activation}")
        self.in_place = Pass(self._in_place, f"activation {activation} in place")
        self.backward = Pass(self._backward, f"activation backward {activation}")

    def _forward(self, z: Tensor, out: Tensor) -> tuple[()]:
        out.copy_(activations.apply(z.float(), self.activation))
        return ()

    def _in_place(self, z: Tensor) -> tuple[()]:
        z.copy_(activations.apply(z.float(), self.activation))
        return ()

    def _backward(self, d: Tensor, z: Tensor, out: Tensor) -> tuple[()]:
        out.copy_(activations.gradient(d.float(), z.float(), self.activation))
        return ()


passes_of = functools.cache(Passes)


def _in_place(activation: str) -> Callable[[Tensor], Tensor]:
    run = passes_of(activation).in_place

    def finish(z: Tensor) -> Tensor:
        run(z.view(-1))
        return z

    return finish


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: str, z: Tensor) -> Tensor:
        y = buffers.empty(z)
        passes_of(activation).forward(z.view(-1), y.view(-1))
        ctx.save_for_backward(z)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[None, Tensor]:
        (z,) = ctx.saved_tensors
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(d):
            # (to be differentiated once more, or is_grads_batched: a tensor without memory that passes could read)
            with torch.enable_grad():
                y = activations.apply(z, ctx.activation)
                return None, torch.autograd.grad(y, z, d, create_graph=True)[0]
        z = z.contiguous()
        dz = buffers.empty(z)
        passes_of(ctx.activation).backward(d.contiguous().view(-1), z.view(-1), dz.view(-1))
        return None, dz
