"""Convolutions of which nobody wants a gradient, by weights that oneDNN has brought into its own order beforehand.

torch.conv2d casts a weight (under autocast) and reorders it at every call: for wide layers over small maps as much work
as the convolution. A kept copy must notice whatever is written to the weight, also behind autograd's back, as averages
of weights and optimizers' foreach code do: each call reads the weight's bits and compares 64 of them for each output
channel with what they came to when the copy was made.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from tkernels.core import _torch
from tkernels.cpu.compiler import Pass

# Elements of a weight from which on a kept copy is worth the look at them. (Measured over four networks' inference at
# 96 pixels: in float32 2^16 is up to 1.17 times as fast as 2^14; in bfloat16, where a cast goes too, 2^14 is.)
WORTH_IT = {torch.float32: 1 << 16, torch.bfloat16: 1 << 14}
# Weights that a call keeps copies of: one graph may serve several layers.
KEPT = 8


def _fingerprint(bits: Tensor, odd: Tensor) -> tuple[Tensor]:
    """Of [K, n], for each row the sum of its values times random odd numbers, modulo 2^64: any one change shows, and
    what is changed in several places goes unseen once in 2^32 times for each row of it at the most."""
    return ((bits.to(torch.int64) * odd).sum(1),)


@functools.lru_cache(maxsize=256)
def _odd(count: int) -> Tensor:
    with torch.inference_mode(False):
        generator = torch.Generator("cpu").manual_seed(0)
        return torch.randint(-(1 << 62), 1 << 62, (count,), generator=generator, device="cpu") * 2 + 1


fingerprint = Pass(_fingerprint, "weight fingerprint")


class Copy(NamedTuple):
    """A weight in oneDNN's order, and what its own bits and strides were."""

    bits: Tensor
    strides: tuple[int, ...]
    packed: Tensor


class Packed:
    """torch.conv2d with these arguments, in ``dtype``, of channels_last images about as large as ``input``."""

    def __init__(
        self, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], groups: int,
        dtype: torch.dtype, input: tuple[int, ...],
    ) -> None:  # fmt: skip
        self.window = padding, stride, dilation, groups
        self.dtype, self.input = dtype, input
        self.copies: dict[int, Copy] = {}

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bits = _bits(weight)
        if bits is None:
            padding, stride, dilation, groups = self.window
            return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
        x, bias = x.to(self.dtype), None if bias is None else bias.to(self.dtype)
        y: Tensor = _torch.onednn_conv(x, self._packed(weight, bits), bias, *self.window, "none", [], "")
        return y

    def _packed(self, weight: Tensor, bits: Tensor) -> Tensor:
        (now,), place = fingerprint(bits, _odd(bits.shape[1])), weight.data_ptr()
        copy = self.copies.get(place)
        if copy is None or copy.strides != weight.stride() or not torch.equal(copy.bits, now):
            if len(self.copies) >= KEPT:
                self.copies.clear()
            low = weight.detach().to(self.dtype)
            packed = _torch.onednn_pack_conv_weight(low, *self.window, list(self.input))
            copy = self.copies[place] = Copy(now, weight.stride(), packed)
        return copy.packed


def is_safe(channels: int, stride: tuple[int, int], dilation: tuple[int, int]) -> bool:
    """Whether oneDNN called by name convolves images of so many channels as torch does. (torch 2.14: those of one
    channel, which torch.conv2d takes to be contiguous, come out wrong at stride 1 down and 2 across: foreign memory.)
    """
    return channels > 1 or (stride[0] == stride[1] and dilation == (1, 1))


def enabled(dtype: torch.dtype) -> bool:
    """Whether oneDNN may take convolutions in this dtype here."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    return dtype is torch.float32 or bool(_torch.onednn_has_bfloat16())


def _bits(weight: Tensor) -> Tensor | None:
    """A weight's memory as whole numbers [K, n]; None where it is not in one piece."""
    if weight.is_neg() or not (weight.is_contiguous(memory_format=torch.channels_last) or weight.is_contiguous()):
        return None
    rows = weight.shape[0]
    bits = weight.detach().as_strided((rows, weight.numel() // rows), (weight.numel() // rows, 1))
    return bits.view(torch.int16 if bits.shape[1] * bits.element_size() % 4 else torch.int32)
