"""The passes between convolutions on a CPU: batch norm, ReLU, max pooling and Dropout2d, forward and backward.

Maps are dense NHWC. Where every pixel is like another they come as [groups, rows, C], and sums over pixels are taken
group by group first, which keeps a group in cache and float32 sums short. Where windows matter they come as
[N, out_h, kernel_h, out_w, kernel_w, C]. Vectors are float32 [C], ``keep`` is float32 [N, C]: Dropout2d's factors.
``mean``: the batch's; ``scale``: bn_weight / sqrt(var + eps); ``bias``: bn_bias. Arithmetic is float32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tkernels.cpu.compiler import Pass


def _normalized(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return (x.float() - mean) * scale + bias


def _behind_relu(d: Tensor, z: Tensor) -> Tensor:
    """The gradient below ReLU; NaN lets it through, as in torch."""
    return torch.where(z <= 0, 0.0, d.float())


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of x [groups, rows, C]: Chan's merge of the groups, shifted by the first one's mean."""
    groups, rows, _ = x.shape
    shift = x[0].float().mean(0)
    d = x.float() - shift
    total, squares = d.sum(1), (d * d).sum(1)
    mean = total.sum(0) / (groups * rows)
    within = squares - total * total / rows
    between = rows * (total / rows - mean) ** 2
    return shift + mean, (within + between).sum(0) / (groups * rows)


def _normalize(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, out: Tensor) -> tuple[()]:
    out.copy_(torch.relu(_normalized(x, mean, scale, bias)))
    return ()


def _sums(d: Tensor, x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the gradient behind ReLU and of its product with x - mean."""
    g = _behind_relu(d, _normalized(x, mean, scale, bias))
    return g.sum(1).sum(0), (g * (x.float() - mean)).sum(1).sum(0)


def _raw_gradient(g: Tensor, x: Tensor, mean: Tensor, scale: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Batch norm's input gradient; ``a``, ``b``: the sums over the number of values, b also times 1 / (var + eps)."""
    return scale * (g - a - (x.float() - mean) * b)


def _gradient(
    d: Tensor, x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, a: Tensor, b: Tensor, out: Tensor
) -> tuple[()]:
    g = _behind_relu(d, _normalized(x, mean, scale, bias))
    out.copy_(_raw_gradient(g, x, mean, scale, a, b))
    return ()


def _gradient_in_place(
    d: Tensor, x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, a: Tensor, b: Tensor
) -> tuple[()]:
    g = _behind_relu(d, _normalized(x, mean, scale, bias))
    d.copy_(_raw_gradient(g, x, mean, scale, a, b))
    return ()


statistics = Pass(_statistics)
normalize = Pass(_normalize)
sums = Pass(_sums)
gradient = Pass(_gradient)
gradient_in_place = Pass(_gradient_in_place)


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
        largest = self._largest(_normalized(x, mean, scale, bias))
        out.copy_(torch.relu(largest) * keep[:, None, None, :])
        return ()

    def _pool(self, x: Tensor, out: Tensor) -> tuple[()]:
        out.copy_(self._largest(x))
        return ()

    def _winners(
        self, x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, place: Tensor, winner: Tensor
    ) -> tuple[()]:
        """Of each window the place of the first largest value (the number of taps where ReLU gives 0: no gradient
        passes) and what stands there in x. Places are bfloat16: whole numbers that vectorise, as bytes do not."""
        x = x.float()
        z = _normalized(x, mean, scale, bias)
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

    def _sums(self, dy: Tensor, place: Tensor, winner: Tensor, mean: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """As sums: only a window's winner has a gradient."""
        g = self._passing(dy, place, keep)
        return g.sum((1, 2)).sum(0), (g * (winner.float() - mean)).sum((1, 2)).sum(0)

    def _gradient(
        self, dy: Tensor, x: Tensor, place: Tensor, mean: Tensor, scale: Tensor, a: Tensor, b: Tensor, keep: Tensor,
        out: Tensor,
    ) -> tuple[()]:  # fmt: skip
        rows, cols = torch.arange(x.shape[2])[:, None, None, None], torch.arange(x.shape[4])[:, None]
        here = (rows * self.kernel_w + cols).float()
        g = torch.where(
            place[:, :, None, :, None].float() == here, (dy.float() * keep[:, None, None, :])[:, :, None, :, None], 0.0
        )
        out.copy_(_raw_gradient(g, x, mean, scale, a, b))
        return ()


@functools.cache
def ends(kernel_h: int, kernel_w: int) -> Any:
    """The passes for windows of that size; 1 x 1 where a stage ends without pooling."""
    return Ends(kernel_h, kernel_w)
