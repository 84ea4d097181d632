"""Batch norm by the batch's statistics with what follows it: a residual, an activation. On a CPU, over NHWC.

Each direction is one compiled pass: two reads of the input and one write forward, two reads of input and gradient and
one write backward. torch's own calls pass over the map once more for the residual and once more for the activation.
What autograd keeps are the input and vectors; what the activation let through is computed again, or read off the
output where a residual went in.

``ops.batch_norm`` takes this with ReLU, in training, where maps are large and pixels stand together: (N, C), or
channels_last. Compiled graphs take it for whole chains (chain.py).
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
from tkernels.cpu import buffers, compiler, guard, passes
from tkernels.cpu.compiler import Pass

# Rows in a group: sums are taken group by group first, which stays in a core's caches and keeps float32 sums short.
# (Measured: within 5% of the best from 32 on, unless too few groups are left; below 16 their own sums cost.)
LARGEST_GROUP, SMALLEST_GROUP = 128, 16
# Pixels lie side by side in a row that is a multiple of WHOLE bytes, a vector; where nothing is summed, of LONG bytes.
# (Measured: whole vectors are up to 10 times as fast for 16 channels in bfloat16, 2 to 4 times for 24, 40 and 72.)
WHOLE, LONG, MOST_LANES = 64, 2048, 64
# Bytes of the input from which on the passes pay for the calls around them. (Measured: 0.7 of torch's speed at 1 MB,
# 0.9 to 1.2 times it at 2 MB, 1.2 to 5 times from 4 MB on.)
WORTH_IT = 1 << 22


def batch_norm(x: Tensor, bn: BatchNorm, activation: str | None, residual: Tensor | None) -> Tensor | None:
    """relu(batch norm of ``x``) by the batch's statistics; moves running statistics and counter. None where that is
    PyTorch's, as is whatever torch refuses."""
    if activation != "relu" or residual is not None or not guard.supports(x, WORTH_IT):
        return None
    if not (
        _fits(x)
        and guard.are_plain(bn.vectors, torch.float32)
        and all(t is None or (t.shape == x.shape[1:2] and t.is_contiguous()) for t in bn.vectors)
        and (bn.running_mean is None) == (bn.running_var is None)
        and not any(t is not None and t.requires_grad for t in bn.vectors[:2])
        and (type(bn.momentum) is float or (bn.momentum is None and bn.num_batches_tracked is not None))
        and type(bn.eps) is float
        and bn.eps > 0.0
        and compiler.enabled()
    ):
        return None
    return normalize(x, counted(bn), activation, None, guard.recorded(x, bn.weight, bn.bias))


def _fits(x: Tensor) -> bool:
    """Whether pixels stand together, a channel has more than the one value that torch refuses, and autograd may keep
    ``x``."""
    together = x.is_contiguous() if x.dim() == 2 else x.dim() == 4 and is_nhwc(x) and not x.is_contiguous()
    return together and x.numel() > x.shape[1] and not x.is_inference()


def counted(bn: BatchNorm) -> BatchNorm:
    """Adds one to the counter, where there is one; the batch norm with how far this batch moves running statistics."""
    counter, momentum = bn.num_batches_tracked, bn.momentum
    if counter is not None:
        counter.add_(1)
    if momentum is None:
        momentum = 0.0 if counter is None else 1.0 / float(counter)
    return bn._replace(momentum=float(momentum))


def reference(x: Tensor, bn: BatchNorm, activation: str | None, residual: Tensor | None) -> Tensor:
    """activation(batch norm + residual) in torch's own calls, of a batch norm that is counted."""
    z = F.batch_norm(x, *bn.vectors, bn.training, bn.momentum or 0.0, bn.eps)
    return activations.apply(z if residual is None else z + residual, activation)


def is_nhwc(x: Tensor) -> bool:
    return x.is_contiguous() if x.dim() == 2 else x.is_contiguous(memory_format=torch.channels_last)


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
    if not is_nhwc(x):
        x = x.contiguous() if x.dim() == 2 else x.permute(0, 2, 3, 1).contiguous()
    # (one call, where permute and view are two: there are up to six of them a layer)
    return x.as_strided(*_layout(x.numel() // channels, channels, x.element_size(), least))


def _like(x: Tensor) -> Tensor:
    """Memory for a result whose groups are views of it, however ``x`` is laid out."""
    return buffers.dense(x.dtype, *x.shape) if x.dim() == 2 else buffers.channels_last(x.dtype, *x.shape)


class Passes:
    """The passes of one activation, with a residual or without."""

    def __init__(self, activation: str | None, residual: bool) -> None:
        self.activation, self.residual = activation, residual
        # whether the output tells what the activation let through, so that the residual need not be kept
        self.by_output = residual and activation in activations.FROM_OUTPUT
        name = f"{activation or 'linear'}{' residual' if residual else ''}"
        self.forward = Pass(self._forward, f"batch norm {name}")
        self.backward = Pass(self._backward, f"batch norm backward {name}")

    def _forward(
        self, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: Tensor,
        eps: Tensor, *rest: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """``rest``: the residual, where there is one, and the result. Gives whether the statistics are sound, which
        move the running ones then; 1 / sqrt(var + eps) [C]; for each lane the batch's mean, what its values are
        multiplied by, and the bias."""
        mean, inverse, scale, _, var, sound = passes.measured(x, 0.0, weight.float(), eps)
        finite = sound.isfinite()
        for running, batch in ((running_mean, mean), (running_var, var)):
            running.copy_(torch.where(finite, running * (1.0 - momentum) + batch * momentum, running))
        vectors = [passes.tiled(vector, x.shape[2]) for vector in (mean, scale, bias.float())]
        z = passes.normalized(x, *vectors)
        if self.residual:
            z = z + rest[0].float()
        rest[-1].copy_(activations.apply(z, self.activation))
        return sound, inverse, *vectors

    def _backward(
        self, d: Tensor, x: Tensor, inverse: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, *rest: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of weight and bias. ``rest``: what was kept of a residual, the output where that tells, and its
        gradient, where an activation is behind one; the input's gradient."""
        *kept, out = rest
        z = kept[0].float() if kept and self.by_output else passes.normalized(x, mean, scale, bias)
        if kept and not self.by_output:
            z = kept[0].float() + z
        g = activations.gradient(d.float(), z, self.activation)
        if kept:
            kept[1].copy_(g)
        first, second = g.sum(1).sum((0, 1)), (g * (x.float() - mean)).sum(1).sum((0, 1))
        groups, rows, lanes, _ = x.shape
        dbias, dweight, a, b = passes.parameter_gradients(first, second, inverse, groups * rows * lanes)
        a, b = passes.tiled(a, lanes), passes.tiled(b, lanes)
        out.copy_(passes.raw_gradient(g, x, mean, scale, a, b))
        return dweight, dbias


passes_of = functools.cache(Passes)


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
        needs, again = ctx.needs_input_grad[:4], False
        if ctx.residual:
            again = kept is not None and not passes_of(activation, True).by_output
            if not again:  # what is behind the sum does not depend on it any more
                d, activation = activations.gradient(d, kept, activation), None

        def normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
            return reference(x, BatchNorm(None, None, weight, bias, True, 0.0, eps), activation, residual)

        if again:
            return *gradients_of(normed, (*given, kept), needs, d), None, None
        return *gradients_of(normed, given, needs[:3], d), d if needs[3] else None, None, None

    @staticmethod
    @composed_where_differentiated(backward_composed)
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, _, _, kept, *vectors = saved(ctx)
        dx, below, between = _like(x), d, []
        if kept is not None:
            below = _like(x)
            between = [groups(kept), groups(below)]
        # (a gradient in another dtype would compile the passes anew)
        run = passes_of(ctx.activation, ctx.residual).backward
        dweight, dbias = run(groups(d), groups(x), *vectors, *between, groups(dx))
        found = dx, dweight, dbias, below
        return *(g if need else None for g, need in zip(found, ctx.needs_input_grad)), None, None


def _forward(
    x: Tensor, bn: BatchNorm, activation: str | None, residual: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The result; 1 / sqrt(var + eps), and for each lane mean, scale and bias: none of them where it is torch's."""
    channels, y = x.shape[1], _like(x)
    # (where there are none, what nobody will read)
    moved = (passes.unread(channels) if t is None else t for t in (bn.running_mean, bn.running_var))
    sound, *kept = passes_of(activation, residual is not None).forward(
        groups(x), passes.vector(bn.weight, channels, 1.0), passes.vector(bn.bias, channels, 0.0), *moved,
        passes.number(bn.momentum or 0.0), passes.number(bn.eps),
        *([] if residual is None else [groups(residual)]), groups(y),
    )  # fmt: skip
    if passes.is_sound(sound):
        return y, tuple(kept)
    return reference(x, bn, activation, residual), ()


def normalize(x: Tensor, bn: BatchNorm, activation: str | None, residual: Tensor | None, recorded: bool) -> Tensor:
    """activation(batch norm of ``x`` by its own statistics + ``residual``), ``recorded`` by autograd or not; moves the
    running statistics of ``bn``, which is counted.

    ``x`` is channels_last or a matrix, float32 or bfloat16, and not empty; ``residual`` is of its dtype and shape.
    """
    if recorded:
        y: Tensor = _BatchNorm.apply(x, bn.weight, bn.bias, residual, bn, activation)
        return y
    with torch.no_grad():
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
            defaults = 0.0, 1.0, 1.0, 0.0
            arguments += [passes.vector(t, x.shape[1], default) for t, default in zip(bn.vectors, defaults)]
            arguments.append(passes.number(bn.eps))
        if residual is not None:
            arguments.append(groups(residual, LONG))
        out = x if self.in_place else _like(x)
        if not self.in_place:
            arguments.append(groups(out, LONG))
        self.run(*arguments)
        return out


finish_of = functools.cache(Finish)
