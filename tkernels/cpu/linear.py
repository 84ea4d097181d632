"""What follows a linear layer on a CPU: its activation, in the product's own memory or in memory used again."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tkernels.cpu import buffers, compiler, norm
from tkernels.cpu.chain import DTYPES, NOT_COMPILED
from tkernels.cpu.compiler import Pass, plain_backward
from tkernels.ops import activation as activations

Run = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def plan(shape: tuple[int, ...], dtype: torch.dtype, activation: str | None, differentiated: bool) -> Run | str:
    """The function for a linear layer (input, weight, bias) with a result of that shape and dtype, and its activation;
    or why they are left to PyTorch."""
    if not compiler.enabled():
        return NOT_COMPILED
    if activation is None or dtype not in DTYPES:
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
    """Of one activation in training, over dense tensors as one row of values."""

    def __init__(self, activation: str) -> None:
        self.activation = activation
        self.forward = Pass(self._forward, f"activation {activation}")
        self.backward = Pass(self._backward, f"activation backward {activation}")

    def _forward(self, z: Tensor, out: Tensor) -> tuple[()]:
        out.copy_(activations.apply(z.float(), self.activation))
        return ()

    def _backward(self, d: Tensor, z: Tensor, out: Tensor) -> tuple[()]:
        out.copy_(activations.gradient(d.float(), z.float(), self.activation))
        return ()


passes_of = functools.cache(Passes)


def _in_place(activation: str) -> Callable[[Tensor], Tensor]:
    run = norm.finish_of(activation, normed=False, residual=False, in_place=True)

    def finish(z: Tensor) -> Tensor:
        run(z.view(1, -1), (), 0.0, None)
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
        if not plain_backward(d):
            with torch.enable_grad():
                y = activations.apply(z, ctx.activation)
                return None, torch.autograd.grad(y, z, d, create_graph=True)[0]
        z = z.contiguous()
        dz = buffers.empty(z)
        passes_of(ctx.activation).backward(d.contiguous().view(-1), z.view(-1), dz.view(-1))
        return None, dz
