"""Linear layers on a CPU: in inference the product by the library that is faster there, and behind it the activation,
in the product's own memory or in memory used again."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tkernels.core import _torch
from tkernels.core import activation as activations
from tkernels.core.autograd import composed_where_differentiated, gradients_of, save, saved
from tkernels.core.mode import plain_eager
from tkernels.cpu import buffers, compiler, guard, norm, packed
from tkernels.cpu.compiler import NOT_COMPILED, Pass

Run = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]

# rows, and features both of the input and of the result, from which on a product may be oneDNN's
ROWS, FEATURES = 256, 64
# where it is faster than torch's own, in products of this size (input, features of the result)
MEASURED, TURNS = (2048, 384, 512), 5


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """F.linear of what nobody differentiates, by oneDNN; None where that is not faster, or the call is one that torch
    refuses or casts. (oneDNN's ReLU as a last step is not ours to use: it makes 0 of NaN.)"""
    if torch.is_grad_enabled() or not guard.supports(x, ROWS * FEATURES * torch.float32.itemsize):
        return None
    if not guard.are_plain((x, weight, bias), torch.float32) or torch.is_autocast_enabled("cpu"):
        return None
    if x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return None
    columns, features = weight.shape
    fits = bias is None or bias.shape == (columns,)
    return _onednn(x, weight, bias) if fits and _by_onednn(x.numel() // features, features, columns) else None


def plan(
    shape: tuple[int, ...], features: int, dtype: torch.dtype, activation: str | None, differentiated: bool
) -> Run | str:
    """The function for a linear layer (input of so many features, weight, bias) with a result of that shape and dtype,
    and its activation; or why they are left to PyTorch."""
    if not compiler.enabled():
        return NOT_COMPILED
    if dtype not in guard.DTYPES:
        return "nothing to gain on a CPU"
    rows, columns = math.prod(shape[:-1]), shape[-1]
    left = differentiated or dtype is not torch.float32 or not _by_onednn(rows, features, columns)
    product = F.linear if left else _onednn
    finish = _finish(shape, dtype, activation, differentiated)
    if isinstance(finish, str) and left:
        return finish

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = product(x, weight, bias)
        if isinstance(finish, str) or z.numel() == 0 or z.dtype is not dtype or not z.is_contiguous():
            return activations.apply(z, activation)
        return finish(z) if plain_eager() else activations.apply(z, activation)

    return run


def _by_onednn(rows: int, features: int, columns: int) -> bool:
    worth_it = rows >= ROWS and min(features, columns) >= FEATURES
    return worth_it and packed.enabled(torch.float32) and onednn_is_ahead(torch.get_num_threads())


def onednn_is_ahead(threads: int) -> bool:
    """Whether products are to be oneDNN's; not where every process is to get the same bits, for it is measured."""
    return not torch.are_deterministic_algorithms_enabled() and _is_measured_ahead(threads)


@functools.cache
def _is_measured_ahead(threads: int) -> bool:
    """Whether oneDNN multiplies float32 matrices faster than what torch takes for them: MKL, whose best code is for
    Intel's CPUs (on an AMD EPYC oneDNN was 0.9 to 1.4 times as fast over eight sizes, 1.04 to 1.24 at this one, and 1.1
    to 3 beside other work). Measured once, in some 50 ms."""
    rows, features, columns = MEASURED
    x, weight = (torch.ones(n, features, dtype=torch.float32, device="cpu") for n in (rows, columns))
    seconds: dict[Run, float] = {}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for _ in range(TURNS):
            for run in (F.linear, _onednn):
                start = time.perf_counter()
                run(x, weight, None)
                seconds[run] = min(seconds.get(run, math.inf), time.perf_counter() - start)
    return seconds[F.linear] > seconds[_onednn]


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    plain = all(t.dtype is torch.float32 and t.is_contiguous() for t in (x, weight, bias) if t is not None)
    if not plain or x.numel() == 0 or not plain_eager():
        return F.linear(x, weight, bias)
    y: Tensor = _torch.onednn_linear(x, weight, bias, "none", [], "")
    return y


def _finish(
    shape: tuple[int, ...], dtype: torch.dtype, activation: str | None, differentiated: bool
) -> Callable[[Tensor], Tensor] | str:
    """The activation of the product, or why it is torch's."""
    if activation is None:
        return "nothing to gain on a CPU"
    # (Measured in convnext_tiny: 1.1 times as fast from there on; but torch's GELU in bfloat16 takes half the time
    # where memory comes without faults, which large memory never does.)
    slow = activation == "gelu" and dtype is torch.bfloat16 and not differentiated
    if math.prod(shape) * dtype.itemsize < (activations.IN_PLACE if slow else buffers.SMALLEST):
        return "nothing to gain on a CPU from so few values"
    if differentiated and not activations.needs_input(activation):
        return "nothing to gain on a CPU: torch has this activation in place"
    return functools.partial(_Activation.apply, activation) if differentiated else _in_place(activation)


@functools.cache
def passes_of(activation: str) -> tuple[Pass, Pass]:
    """Forward and backward of an activation in training, over dense tensors as one row of values."""

    def forward(z: Tensor, out: Tensor) -> tuple[()]:
        out.copy_(activations.apply(z.float(), activation))
        return ()

    def backward(d: Tensor, z: Tensor, out: Tensor) -> tuple[()]:
        out.copy_(activations.gradient(d.float(), z.float(), activation))
        return ()

    return Pass(forward, f"activation {activation}"), Pass(backward, f"activation backward {activation}")


def _in_place(activation: str) -> Callable[[Tensor], Tensor]:
    run = norm.finish_of(activation, normed=False, residual=False, in_place=True)

    def finish(z: Tensor) -> Tensor:
        run(z.view(1, -1), None, None)
        return z

    return finish


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: str, z: Tensor) -> Tensor:
        y = buffers.empty(z)
        passes_of(activation)[0](z.view(-1), y.view(-1))
        save(ctx, z)
        ctx.activation = activation
        return y

    @staticmethod
    def backward_composed(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        """The same in torch's own calls."""
        apply = functools.partial(activations.apply, activation=ctx.activation)
        return None, *gradients_of(apply, ctx.saved_tensors, [True], d)

    @staticmethod
    @composed_where_differentiated(backward_composed)
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        z = saved(ctx)[0].contiguous()
        dz = buffers.empty(z)
        passes_of(ctx.activation)[1](d.contiguous().view(-1), z.view(-1), dz.view(-1))
        return None, dz
