"""The passes between convolutions on a CPU: batch norm, ReLU, max pooling and Dropout2d, forward and backward.

Maps are dense NHWC. Where every pixel is like another they come as [groups, rows, C], and sums over pixels are taken
group by group first, which keeps a group in cache and float32 sums short. Where windows matter they come as
[N, out_h, kernel_h, out_w, kernel_w, C]. Vectors are float32 [C], ``keep`` is float32 [N, C]: Dropout2d's factors.
``mean``: the batch's; ``inverse``: 1 / sqrt(var + eps); ``scale``: that times bn_weight; ``bias``: bn_bias; ``eps``:
float32 []. Arithmetic is float32. What follows from a pass's sums for each channel is part of the pass: between two
convolutions, which leave nothing in the caches, a call of ATen for a few numbers costs as much as thousands of pixels.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from tkernels.cpu.compiler import Pass


def normalized(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return (x.float() - mean) * scale + bias


def tiled(vector: Tensor, lanes: int) -> Tensor:
    """[C] as [lanes, C] in memory: over pixels [..., lanes, C] a loop then runs over lanes and channels as one, without
    the remainder of each pixel's channels, which takes as long as four whole vectors."""
    channels = vector.shape[0]
    # (as_strided has Inductor write it down; otherwise it would read [C] over again in the loop over the pixels)
    return vector.expand(lanes, channels).clone().as_strided((lanes, channels), (channels, 1))


def _behind_relu(d: Tensor, z: Tensor) -> Tensor:
    """The gradient below ReLU; NaN lets it through, as in torch."""
    return torch.where(z <= 0, 0.0, d.float())


class Measured(NamedTuple):
    """``shifted`` mean and ``unbiased`` variance are what running statistics see. ``sound`` []: finite where all of a
    batch's means, variances and scales are."""

    mean: Tensor
    inverse: Tensor
    scale: Tensor
    shifted: Tensor
    unbiased: Tensor
    sound: Tensor


def is_sound(measured: Tensor) -> bool:
    """Whether passes may go on with what was measured. Where they may not, torch's own calls take over, for
    what they make of it: NaN and Inf where they put them, and sums in float64 for maps that are not channels_last."""
    return math.isfinite(float(measured))


def measured(x: Tensor, shift: Tensor | float, weight: Tensor, eps: Tensor) -> Measured:
    """Of x [groups, rows, lanes, C], plus ``shift``. Chan's merge of the groups, each about the mean of its lane in the
    first one."""
    groups, rows, lanes, _ = x.shape
    count = groups * rows * lanes
    starts = x[0].float().mean(0)
    d = x.float() - starts
    total, squares = d.sum(1), (d * d).sum(1)
    offset = total / rows + (starts - starts[0])
    mean = offset.sum((0, 1)) / (groups * lanes)
    within = squares - total * total / rows
    between = rows * (offset - mean) ** 2
    deviations = (within + between).sum((0, 1))
    inverse = torch.rsqrt(deviations / count + eps)
    mean, scale, unbiased = starts[0] + mean, inverse * weight, deviations / (count - 1)
    shifted = mean + shift
    return Measured(mean, inverse, scale, shifted, unbiased, deviations.sum() + scale.sum() + shifted.sum())


def _statistics(x: Tensor, shift: Tensor, weight: Tensor, eps: Tensor) -> tuple[Tensor, ...]:
    return tuple(measured(x[:, :, None], shift, weight, eps))


def _normalize(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, out: Tensor) -> tuple[()]:
    out.copy_(torch.relu(normalized(x, mean, scale, bias)))
    return ()


def parameter_gradients(
    first: Tensor, second: Tensor, inverse: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the sums of the gradient behind ReLU and of its product with x - mean: the gradients of bias and weight, and
    what raw_gradient takes."""
    dweight = second * inverse
    return first, dweight, first / count, dweight * inverse / count


def _sums(
    d: Tensor, x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = _behind_relu(d, normalized(x, mean, scale, bias))
    sums = g.sum(1).sum(0), (g * (x.float() - mean)).sum(1).sum(0)
    return parameter_gradients(*sums, inverse, x.shape[0] * x.shape[1])


def raw_gradient(g: Tensor, x: Tensor, mean: Tensor, scale: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Batch norm's input gradient; ``a``, ``b``: the sums over the number of values, b also times inverse squared."""
    return scale * (g - a - (x.float() - mean) * b)


def _gradient(
    d: Tensor, x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, a: Tensor, b: Tensor, out: Tensor | None = None
) -> tuple[()]:
    """To ``out``, or over ``d``."""
    g = _behind_relu(d, normalized(x, mean, scale, bias))
    (d if out is None else out).copy_(raw_gradient(g, x, mean, scale, a, b))
    return ()


def _fold(
    weight: Tensor, bias: Tensor, bn_weight: Tensor, bn_bias: Tensor, mean: Tensor, var: Tensor, eps: Tensor,
    out_weight: Tensor, out_bias: Tensor,
) -> tuple[Tensor]:  # fmt: skip
    """A convolution's weight [K, n] and bias with the batch norm by running statistics that follows it. The
    result is finite where they are."""
    scale = torch.rsqrt(var + eps) * bn_weight
    whole, shift = weight.float() * scale[:, None], (bias - mean) * scale + bn_bias
    out_weight.copy_(whole)
    out_bias.copy_(shift)
    return (whole.sum() + shift.sum(),)


@functools.lru_cache(maxsize=256)
def number(value: float) -> Tensor:
    """A number as an argument of passes: float32 []."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float32, device="cpu")


@functools.lru_cache(maxsize=256)
def _constant(channels: int, value: float) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((channels,), value, dtype=torch.float32, device="cpu")


def vector(t: Tensor | None, channels: int, default: float) -> Tensor:
    """A parameter as an argument of passes; nobody may write to it."""
    if t is None:
        return _constant(channels, default)
    # (several a layer: what is as it should be is not worth two calls)
    return t if t.dtype is torch.float32 and t.is_contiguous() else t.float().contiguous()


def unread(channels: int) -> Tensor:
    """A vector for what a pass writes and nobody reads."""
    return torch.empty(channels, dtype=torch.float32, device="cpu")


statistics = Pass(_statistics)
fold = Pass(_fold, channels=False)
normalize = Pass(_normalize)
sums = Pass(_sums)
gradient = Pass(_gradient)
gradient_in_place = Pass(_gradient, "gradient_in_place")


class Ends:
    """The passes that end a stage with windows of ``kernel_h`` x ``kernel_w`` that neither overlap nor leave gaps."""

    def __init__(self, kernel_h: int, kernel_w: int) -> None:
        self.taps = [(i, j) for i in range(kernel_h) for j in range(kernel_w)]
        self.kernel_w = kernel_w
        size = f"{kernel_h}x{kernel_w}"
        self.forward = Pass(self._forward, f"end {size}")
        self.pool = Pass(self._pool, f"pool {size}")
        self.winners = Pass(self._winners, f"winners {size}")
        self.sums = Pass(self._sums, f"end sums {size}")
        self.gradient = Pass(self._gradient, f"end gradient {size}")

    def _largest(self, z: Tensor) -> Tensor:
        return functools.reduce(torch.maximum, [z[:, :, i, :, j] for i, j in self.taps])

    def _forward(self, x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, keep: Tensor, out: Tensor) -> tuple[()]:
        largest = self._largest(normalized(x, mean, scale, bias))
        out.copy_(torch.relu(largest) * keep[:, None, None, :])
        return ()

    def _pool(self, x: Tensor, out: Tensor) -> tuple[()]:
        out.copy_(torch.relu(self._largest(x)))
        return ()

    def _winners(
        self, x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, place: Tensor, winner: Tensor
    ) -> tuple[()]:
        """Of each window the place of the first largest value (the number of taps where ReLU gives 0: no gradient
        passes) and what stands there in x. Places are bfloat16: whole numbers that vectorise, as bytes do not."""
        x = x.float()
        z = normalized(x, mean, scale, bias)
        best, raw = z[:, :, 0, :, 0], x[:, :, 0, :, 0]
        found = torch.zeros_like(best)
        for k, (i, j) in enumerate(self.taps[1:], 1):
            other = z[:, :, i, :, j]
            wins = ~(other <= best)
            best = torch.where(wins, other, best)
            raw = torch.where(wins, x[:, :, i, :, j], raw)
            found = torch.where(wins, float(k), found)
        place.copy_(torch.where(best <= 0, float(len(self.taps)), found))
        winner.copy_(raw)
        return ()

    def _passing(self, dy: Tensor, place: Tensor, keep: Tensor) -> Tensor:
        return torch.where(place.float() == float(len(self.taps)), 0.0, dy.float() * keep[:, None, None, :])

    def _sums(
        self, dy: Tensor, place: Tensor, winner: Tensor, mean: Tensor, keep: Tensor, inverse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As sums: only a window's winner has a gradient."""
        g = self._passing(dy, place, keep)
        sums = g.sum((1, 2)).sum(0), (g * (winner.float() - mean)).sum((1, 2)).sum(0)
        return parameter_gradients(*sums, inverse, dy.shape[0] * dy.shape[1] * dy.shape[2] * len(self.taps))

    def _gradient(
        self, dy: Tensor, x: Tensor, place: Tensor, mean: Tensor, scale: Tensor, a: Tensor, b: Tensor, keep: Tensor,
        out: Tensor,
    ) -> tuple[()]:  # fmt: skip
        rows, cols = (torch.arange(x.shape[axis], device="cpu")[:, None] for axis in (2, 4))
        rows = rows[:, None, None]
        here = (rows * self.kernel_w + cols).float()
        g = torch.where(
            place[:, :, None, :, None].float() == here, (dy.float() * keep[:, None, None, :])[:, :, None, :, None], 0.0
        )
        out.copy_(raw_gradient(g, x, mean, scale, a, b))
        return ()


@functools.cache
def ends(kernel_h: int, kernel_w: int) -> Ends:
    """The passes for windows of that size; 1 x 1 where a stage ends without pooling."""
    return Ends(kernel_h, kernel_w)
