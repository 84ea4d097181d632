"""What calls are about, in whole numbers: a convolution, a pooling, a tensor as batch norm's matrix; and layouts."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Below this many channels a group, one step of the reduction would not fill the tensor cores' 16 lanes:
# taps and channels are flattened into one axis instead.
FLATTEN_BELOW = 16
# Contiguous planes up to this size are columns of their own: a tile of one channel would load 16 bytes a row.
SMALL_PLANE = 8


class Geometry(NamedTuple):
    """A 2-D convolution without its batch. ``pad_h``, ``pad_w``: rows above and columns to the left; what is below
    and to the right follows from the output's size."""

    in_channels: int
    out_channels: int
    groups: int
    height: int
    width: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int
    out_h: int
    out_w: int

    @property
    def group_in(self) -> int:
        """Input channels of a group."""
        return self.in_channels // self.groups

    @property
    def group_out(self) -> int:
        """Output channels of a group."""
        return self.out_channels // self.groups

    @property
    def taps(self) -> int:
        return self.kernel_h * self.kernel_w

    @property
    def reduction(self) -> int:
        """Products summed into one output."""
        return self.taps * self.group_in

    @property
    def depthwise(self) -> bool:
        """Whether every group has one input channel, so that there is nothing for a matrix product to share."""
        return self.group_in == 1 and self.groups > 1

    @property
    def flattened(self) -> bool:
        """Whether taps and channels form one reduction axis."""
        return self.group_in < FLATTEN_BELOW

    @property
    def halo(self) -> bool:
        """Whether any tap of any output falls outside the input."""
        reach_h = (self.out_h - 1) * self.stride_h - self.pad_h + (self.kernel_h - 1) * self.dilation_h
        reach_w = (self.out_w - 1) * self.stride_w - self.pad_w + (self.kernel_w - 1) * self.dilation_w
        return self.pad_h > 0 or self.pad_w > 0 or reach_h >= self.height or reach_w >= self.width

    @property
    def symmetric(self) -> bool:
        """Whether both sides are padded alike, as numbers can say it; 'same' pads even windows more on one."""
        reach_h, reach_w = self.dilation_h * (self.kernel_h - 1), self.dilation_w * (self.kernel_w - 1)
        steps_h, steps_w = self.height + 2 * self.pad_h - reach_h - 1, self.width + 2 * self.pad_w - reach_w - 1
        return self.out_h == steps_h // self.stride_h + 1 and self.out_w == steps_w // self.stride_w + 1

    @property
    def phases(self) -> tuple[int, int]:
        """How many residues of rows and of columns modulo the stride the input has."""
        return min(self.stride_h, self.height), min(self.stride_w, self.width)

    @property
    def row_pitch(self) -> int:
        """Elements from one output channel to the next in a packed weight; padded so that rows start aligned."""
        return (self.reduction + 15) // 16 * 16 if self.flattened else self.reduction


class Pooling(NamedTuple):
    """Max pooling of a map of height x width; a window of one pixel and stride 1 is no pooling."""

    height: int
    width: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    out_h: int
    out_w: int

    @property
    def taps(self) -> int:
        return self.kernel_h * self.kernel_w

    @property
    def overlaps(self) -> bool:
        """Whether a pixel may lie in several windows."""
        return self.kernel_h > self.stride_h or self.kernel_w > self.stride_w

    @property
    def border(self) -> bool:
        """Whether any window reaches outside the map."""
        return self.pad_h > 0 or self.pad_w > 0

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of the stride-sized cells, one at each window's corner, that cover the whole map."""
        rows, columns = self.height + self.pad_h, self.width + self.pad_w
        return -(-rows // self.stride_h), -(-columns // self.stride_w)


def no_pooling(height: int, width: int) -> Pooling:
    """The Pooling that changes nothing."""
    return Pooling(height, width, 1, 1, 1, 1, 0, 0, height, width)


class Matrix(NamedTuple):
    """A dense tensor as rows of ``width`` elements.

    ``planes`` False: [rows, width] with width = channels * spatial, and column c belongs to channel c // spatial
    (channels_last and (N, C): spatial is 1, rows are pixels). ``planes`` True: [rows, channels, width], a row an
    image, width its pixels.
    """

    rows: int
    channels: int
    width: int
    spatial: int
    planes: bool

    @property
    def values(self) -> int:
        """How many values a channel has."""
        return self.rows * (self.width if self.planes else self.spatial)

    @property
    def unit(self) -> int:
        """The largest power of two up to 16 that divides ``width``; it tells the compiler how wide loads may be."""
        return math.gcd(self.width, 16)


@functools.lru_cache(maxsize=4096)
def matrix(shape: Sequence[int], channels_last: bool) -> Matrix:
    """The matrix of a dense tensor of ``shape`` (N, C, ...), contiguous or channels_last."""
    batch, channels = shape[0], shape[1]
    spatial = math.prod(shape[2:])
    if channels_last or spatial == 1:
        return Matrix(batch * spatial, channels, channels, 1, False)
    if spatial <= SMALL_PLANE:
        return Matrix(batch, channels, channels * spatial, spatial, False)
    return Matrix(batch, channels, spatial, 1, True)


def matrix_of(t: Tensor) -> Matrix:
    """Of a tensor that is dense in one of the two formats."""
    return matrix(t.shape, not t.is_contiguous())


def as_nhwc(t: Tensor) -> Tensor:
    """The tensor densely in NHWC order; itself where it is."""
    return t.contiguous(memory_format=torch.channels_last)


def empty_pixels(x: Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype, channels_last: bool) -> Tensor:
    """An uninitialised tensor of logical shape (N, C, H, W) in one of the two memory formats. It is a view of nothing:
    autograd lets nobody write to a view that comes out of a Function."""
    _, c, h, w = shape
    if channels_last:
        return x.new_empty_strided(shape, (h * w * c, 1, w * c, c), dtype=dtype)
    return x.new_empty(shape, dtype=dtype)


def suggests_channels_last(t: Tensor) -> bool:
    """Whether the strides of a 4-D tensor make torch choose channels_last for the result."""
    (n, c, h, w), (stride_n, stride_c, stride_h, stride_w) = t.shape, t.stride()
    if stride_c == 0:
        return False
    least = 0
    for size, stride in ((c, stride_c), (w, stride_w), (h, stride_h)):
        if size == 0 or stride < least:
            return False
        least = stride * size if size > 1 else stride
    return n > 0 and stride_n >= least and least != stride_c


def stage_channels_last(x: Tensor, weights: Sequence[Tensor], geometries: Sequence[Geometry]) -> list[bool]:
    """Of each layer whether torch's own calls in a row would give it a channels_last map. One of a single channel or
    pixel is contiguous as well, and leaves an activation as that."""
    found: list[bool] = []
    last = suggests_channels_last(x)
    for weight, g in zip(weights, geometries):
        found.append(last or suggests_channels_last(weight))
        last = found[-1] and g.out_channels > 1 and not g.out_h == g.out_w == 1
    return found
