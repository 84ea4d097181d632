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
from torch.compiler import is_dynamo_compiling

from tkernels.core import _torch
from tkernels.core import activation as activations
from tkernels.core.autograd import composed_where_differentiated, gradients_of, save, saved
from tkernels.cpu import buffers, compiler, norm, packed
from tkernels.cpu.chain import DTYPES, NOT_COMPILED
from tkernels.cpu.compiler import Pass

Run = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]

PLAIN = (Tensor, torch.nn.Parameter)
# rows, and features both of the input and of the result, from which on a product may be oneDNN's
ROWS, FEATURES = 256, 64
# how many times as fast as torch's own it must be, in products of this size (input, features of the result)
FASTER, MEASURED, TURNS = 1.15, (2048, 384, 512), 5


def plan(
    shape: tuple[int, ...], features: int, dtype: torch.dtype, activation: str | None, differentiated: bool
) -> Run | str:
    """The function for a linear layer (input of so many features, weight, bias) with a result of that shape and dtype,
    and its activation; or why they are left to PyTorch."""
    if not compiler.enabled():
        return NOT_COMPILED
    if dtype not in DTYPES:
        return "nothing to gain on a CPU"
    product = _product(shape, features, dtype, differentiated)
    finish = _finish(shape, dtype, activation, differentiated)
    if isinstance(finish, str) and product is F.linear:
        return finish

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = product(x, weight, bias)
        if isinstance(finish, str) or z.numel() == 0 or z.dtype is not dtype or not z.is_contiguous():
            return activations.apply(z, activation)
        return finish(z) if compiler.plain_eager() else activations.apply(z, activation)

    return run


def _product(shape: tuple[int, ...], features: int, dtype: torch.dtype, differentiated: bool) -> Run:
    """F.linear, or oneDNN's."""
    rows, columns = math.prod(shape[:-1]), shape[-1]
    if differentiated or dtype is not torch.float32 or not _by_onednn(rows, features, columns):
        return F.linear
    return _onednn


def _by_onednn(rows: int, features: int, columns: int) -> bool:
    worth_it = rows >= ROWS and min(features, columns) >= FEATURES
    return worth_it and packed.enabled(torch.float32) and onednn_is_ahead(torch.get_num_threads())


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """F.linear of what nobody differentiates, by oneDNN; None where that is not faster, or the call is one that torch
    refuses or casts. (oneDNN's ReLU as a last step is not ours to use: it makes 0 of NaN.)"""
    # (what most calls fail on first: they are small; a trace must not even learn of sizes)
    if is_dynamo_compiling() or _torch.is_jit_tracing() or type(x) not in PLAIN or x.numel() < ROWS * FEATURES:
        return None
    if type(weight) not in PLAIN or x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return None
    columns, features = weight.shape
    fits = (bias is None or bias.shape == (columns,)) and _plain(x, weight, bias)
    return _onednn(x, weight, bias) if fits and _by_onednn(x.numel() // features, features, columns) else None


def _plain(*tensors: Tensor | None) -> bool:
    """Whether these are float32 in a CPU's memory, as they are."""
    return not torch.is_autocast_enabled("cpu") and all(
        t is None or (compiler.is_plain(t) and t.dtype is torch.float32 and not (t.is_cuda or t.is_neg()))
        for t in tensors
    )


def onednn_is_ahead(threads: int) -> bool:
    """Whether products are to be oneDNN's; not where every process is to get the same bits, for it is measured."""
    return not torch.are_deterministic_algorithms_enabled() and _is_measured_ahead(threads)


@functools.cache
def _is_measured_ahead(threads: int) -> bool:
    """Whether oneDNN multiplies float32 matrices faster than what torch takes for them: MKL, whose best code is for
    Intel's CPUs (on an AMD EPYC oneDNN took a half to a third of its time). Measured once, in some 50 ms."""
    rows, features, columns = MEASURED
    x, weight = (torch.ones(n, features, dtype=torch.float32, device="cpu") for n in (rows, columns))
    seconds: dict[Run, float] = {}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for _ in range(TURNS):
            for run in (F.linear, _onednn):
                start = time.perf_counter()
                run(x, weight, None)
                seconds[run] = min(seconds.get(run, math.inf), time.perf_counter() - start)
    return seconds[F.linear] > FASTER * seconds[_onednn]


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    plain = all(t.dtype is torch.float32 and t.is_contiguous() for t in (x, weight, bias) if t is not None)
    if not plain or x.numel() == 0 or not compiler.plain_eager():
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
        run(z.view(1, -1), None, None)
        return z

    return finish


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: str, z: Tensor) -> Tensor:
        y = buffers.empty(z)
        passes_of(activation).forward(z.view(-1), y.view(-1))
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
        passes_of(ctx.activation).backward(d.contiguous().view(-1), z.view(-1), dz.view(-1))
        return None, dz
