"""Batch norm by the batch's statistics with what follows it: a residual, an activation. On a CPU, over NHWC.

Each direction is one compiled pass: two reads of the input and one write forward, two reads of input and gradient and
one write backward. torch's own calls pass over the map once more for the residual and once more for the activation.
What autograd keeps are the input and vectors; what the activation let through is computed again, or read off the
output where a residual went in.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tkernels.core import activation as activations
from tkernels.core.autograd import composed_where_differentiated, gradients_of, save, saved
from tkernels.core.records import BatchNorm
from tkernels.cpu import buffers, passes
from tkernels.cpu.compiler import Pass

# Rows in a group: sums are taken group by group first, which stays in a core's caches and keeps float32 sums short.
# (Measured: within 5% of the best from 32 on, unless too few groups are left; below 16 their own sums cost.)
LARGEST_GROUP, SMALLEST_GROUP = 128, 16
# Pixels lie side by side in a row that is a multiple of WHOLE bytes, a vector; where nothing is summed, of LONG bytes.
# (Measured: whole vectors are up to 10 times as fast for 16 channels in bfloat16, 2 to 4 times for 24, 40 and 72.)
WHOLE, LONG, MOST_LANES = 64, 2048, 64


def _lanes(pixels: int, pixel: int, least: int) -> int:
    """How many pixels, of ``pixel`` bytes each, make a row: a power of two that divides them all."""
    best = lanes = 1
    while (pixel * best % WHOLE or pixel * best < least) and lanes < MOST_LANES and pixels % (2 * lanes) == 0:
        lanes *= 2
        if pixel * best % WHOLE or pixel * lanes % WHOLE == 0:
            best = lanes
    return best


@functools.lru_cache(maxsize=4096)
def _layout(pixels: int, channels: int, bytes_each: int, least: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of pixels as [groups, rows, lanes, C]. Rows make a group by a divisor that serves, if any."""
    lanes = _lanes(pixels, channels * bytes_each, least)
    count = pixels // lanes
    wanted = min(LARGEST_GROUP, max(SMALLEST_GROUP, count // 8))
    rows = max(rows for rows in range(1, min(wanted, count) + 1) if count % rows == 0)
    rows = rows if 2 * rows >= SMALLEST_GROUP else count
    row = lanes * channels
    return (count // rows, rows, lanes, channels), (rows * row, row, channels, 1)


def groups(x: Tensor, least: int = WHOLE) -> Tensor:
    """The pixels of ``x`` as [groups, rows, lanes, C] in its memory, rows of ``least`` bytes where that can be; densely
    where it is laid out otherwise."""
    channels = x.shape[1]
    if not x.is_contiguous(memory_format=torch.contiguous_format if x.dim() == 2 else torch.channels_last):
        x = x.contiguous() if x.dim() == 2 else x.permute(0, 2, 3, 1).contiguous()
    # (one call, where permute and view are two: there are up to six of them a layer)
    return x.as_strided(*_layout(x.numel() // channels, channels, x.element_size(), least))


def _like(x: Tensor) -> Tensor:
    """Memory for a result whose groups are views of it, however ``x`` is laid out."""
    return buffers.dense(x.dtype, *x.shape) if x.dim() == 2 else buffers.channels_last(x.dtype, *x.shape)


class Passes:
    """The passes of one activation, with a residual or without."""

    def __init__(self, activation: str | None, residual: bool) -> None:
        self.activation = activation
        # whether the output tells what the activation let through, so that the residual need not be kept
        self.by_output = residual and activation in activations.FROM_OUTPUT
        name = f"{activation or 'linear'}{' residual' if residual else ''}"
        self.forward = Pass(self._forward_residual if residual else self._forward, f"batch norm {name}")
        gated = residual and activation is not None
        self.backward = Pass(self._backward_residual if gated else self._backward, f"batch norm backward {name}")

    def _forward(
        self, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: Tensor,
        eps: Tensor, out: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        sound, inverse, *vectors = _measure(x, weight, bias, running_mean, running_var, momentum, eps)
        out.copy_(activations.apply(passes.normalized(x, *vectors), self.activation))
        return sound, inverse, *vectors

    def _forward_residual(
        self, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: Tensor,
        eps: Tensor, residual: Tensor, out: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        sound, inverse, *vectors = _measure(x, weight, bias, running_mean, running_var, momentum, eps)
        z = passes.normalized(x, *vectors) + residual.float()
        out.copy_(activations.apply(z, self.activation))
        return sound, inverse, *vectors

    def _backward(
        self, d: Tensor, x: Tensor, inverse: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, out: Tensor
    ) -> tuple[Tensor, Tensor]:
        z = passes.normalized(x, mean, scale, bias)
        g = activations.gradient(d.float(), z, self.activation)
        return _gradients(g, x, inverse, mean, scale, out)

    def _backward_residual(
        self, d: Tensor, x: Tensor, inverse: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, kept: Tensor,
        residual_out: Tensor, out: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``kept``: the output where that tells, else the residual."""
        z = kept.float()
        if not self.by_output:
            z = z + passes.normalized(x, mean, scale, bias)
        g = activations.gradient(d.float(), z, self.activation)
        residual_out.copy_(g)
        return _gradients(g, x, inverse, mean, scale, out)


def _measure(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: Tensor, eps: Tensor
) -> tuple[Tensor, ...]:
    """Whether it is sound; 1 / sqrt(var + eps) [C]; for each lane the batch's mean, what its values are multiplied by,
    and the bias. Moves the running statistics where it is sound."""
    mean, inverse, scale, _, var, sound = passes.measured(x, 0.0, weight.float(), eps)
    finite = sound.isfinite()
    for running, batch in ((running_mean, mean), (running_var, var)):
        running.copy_(torch.where(finite, running * (1.0 - momentum) + batch * momentum, running))
    mean, scale, bias = (passes.tiled(vector, x.shape[2]) for vector in (mean, scale, bias.float()))
    return sound, inverse, mean, scale, bias


def _gradients(
    g: Tensor, x: Tensor, inverse: Tensor, mean: Tensor, scale: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Those of weight and bias; the input's goes to ``out``."""
    first, second = g.sum(1).sum((0, 1)), (g * (x.float() - mean)).sum(1).sum((0, 1))
    groups, rows, lanes, _ = x.shape
    dbias, dweight, a, b = passes.parameter_gradients(first, second, inverse, groups * rows * lanes)
    a, b = passes.tiled(a, lanes), passes.tiled(b, lanes)
    out.copy_(passes.raw_gradient(g, x, mean, scale, a, b))
    return dweight, dbias


@functools.cache
def passes_of(activation: str | None, residual: bool) -> Passes:
    return Passes(activation, residual)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, bn: BatchNorm,
        activation: str | None,
    ) -> Tensor:  # fmt: skip
        """``weight``, ``bias``: those of ``bn``, which autograd has to be given."""
        y, vectors = _forward(x, bn, activation, residual)
        ctx.composed = not vectors
        kept = None
        if residual is not None and activation is not None:
            kept = y if passes_of(activation, True).by_output else residual
        # the parameters themselves too: autograd then notices if one is written to
        save(ctx, x, weight, bias, kept, *vectors)
        ctx.activation, ctx.eps, ctx.residual = activation, bn.eps, residual is not None
        return y

    @staticmethod
    def backward_composed(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        """The same in torch's own calls."""
        activation, eps = ctx.activation, ctx.eps
        *given, kept = ctx.saved_tensors[:4]
        *needs, needs_residual, _, _ = ctx.needs_input_grad

        def normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
            z = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
            if ctx.residual and residual is None:
                return z  # the derivative of what follows is in ``d``
            return activations.apply(z if residual is None else z + residual, activation)

        if not ctx.residual:
            return *gradients_of(normed, given, needs, d), None, None, None
        if kept is not None and not passes_of(activation, True).by_output:
            return *gradients_of(normed, (*given, kept), (*needs, needs_residual), d), None, None
        d = activations.gradient(d, kept, activation)
        return *gradients_of(normed, given, needs, d), d if needs_residual else None, None, None

    @staticmethod
    @composed_where_differentiated(backward_composed)
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, _, _, kept, *vectors = saved(ctx)
        run = passes_of(ctx.activation, ctx.residual).backward
        # (a gradient in another dtype would compile the passes anew)
        pixels, dy = groups(x), groups(d)
        dx = _like(x)
        if kept is None:
            dweight, dbias = run(dy, pixels, *vectors, groups(dx))
            below = d
        else:
            below = _like(x)
            dweight, dbias = run(dy, pixels, *vectors, groups(kept), groups(below), groups(dx))
        found = dx, dweight, dbias, below
        return *(g if need else None for g, need in zip(found, ctx.needs_input_grad)), None, None


def _forward(
    x: Tensor, bn: BatchNorm, activation: str | None, residual: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The result; 1 / sqrt(var + eps), and for each lane mean, scale and bias: none of them where it is torch's."""
    channels = x.shape[1]
    # (where there are none, what nobody will read)
    moved = (passes.unread(channels) if t is None else t for t in (bn.running_mean, bn.running_var))
    y, momentum = _like(x), bn.momentum or 0.0
    arguments = [
        groups(x), passes.vector(bn.weight, channels, 1.0), passes.vector(bn.bias, channels, 0.0), *moved,
        passes.number(momentum), passes.number(bn.eps),
    ]  # fmt: skip
    if residual is not None:
        arguments.append(groups(residual))
    sound, *vectors = passes_of(activation, residual is not None).forward(*arguments, groups(y))
    if passes.is_sound(sound):
        return y, tuple(vectors)
    z = F.batch_norm(x, *bn.vectors, True, momentum, bn.eps)
    return activations.apply(z if residual is None else z + residual, activation), ()


def batch_norm(x: Tensor, bn: BatchNorm, activation: str | None, residual: Tensor | None) -> Tensor:
    """activation(batch norm of ``x`` by its own statistics + ``residual``), recorded by autograd; moves the running
    statistics, the counter not.

    ``x`` is channels_last or a matrix, float32 or bfloat16, and not empty; ``residual`` is of its dtype and shape.
    """
    y: Tensor = _BatchNorm.apply(x, bn.weight, bn.bias, residual, bn, activation)
    return y


@torch.no_grad()
def batch_norm_alone(x: Tensor, bn: BatchNorm, activation: str | None, residual: Tensor | None) -> Tensor:
    """:func:`batch_norm` that nobody differentiates."""
    return _forward(x, bn, activation, residual)[0]


class Finish:
    """The pass over a map of which nobody wants a gradient: batch norm by running statistics, residual, activation.

    ``normed``, ``residual``: whether there are such; ``in_place``: over the map itself.
    """

    def __init__(self, activation: str | None, normed: bool, residual: bool, in_place: bool) -> None:
        self.activation, self.normed, self.residual, self.in_place = activation, normed, residual, in_place
        parts = ["norm" * normed, "residual" * residual, activation or "", "in place" * in_place]
        self.run = Pass(self._run, " ".join(["finish", *(part for part in parts if part)]))

    def _run(self, x: Tensor, *rest: Tensor) -> tuple[()]:
        given = list(rest)
        z = x.float()
        if self.normed:
            mean, var, weight, bias, eps = (given.pop(0).float() for _ in range(5))
            scale = torch.rsqrt(var + eps) * weight
            z = passes.normalized(z, *(passes.tiled(vector, x.shape[-2]) for vector in (mean, scale, bias)))
        if self.residual:
            z = z + given.pop(0).float()
        (x if self.in_place else given.pop(0)).copy_(activations.apply(z, self.activation))
        return ()

    def __call__(self, x: Tensor, bn: BatchNorm | None, residual: Tensor | None) -> Tensor:
        """``bn``: where it is ``normed``. The result: dense ``x`` itself where it is in place."""
        arguments = [groups(x, LONG)]
        if bn is not None:
            defaults = (0.0, 1.0, 1.0, 0.0)
            arguments += [passes.vector(t, x.shape[1], default) for t, default in zip(bn.vectors, defaults)]
            arguments.append(passes.number(bn.eps))
        if residual is not None:
            arguments.append(groups(residual, LONG))
        out = x if self.in_place else _like(x)
        if not self.in_place:
            arguments.append(groups(out, LONG))
        self.run(*arguments)
        return out


@functools.cache
def finish_of(activation: str | None, normed: bool, residual: bool, in_place: bool) -> Finish:
    return Finish(activation, normed, residual, in_place)
