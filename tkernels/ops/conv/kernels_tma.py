"""Convolutions of stride 1 by descriptors (tkernels.core.descriptors), where TKERNELS_TMA=1: forward, NHWC.

A tile of the map is fetched once a tap, shifted; the engine fills what lies outside of the map with zeros.
"""

from __future__ import annotations

import functools
import itertools

import triton
import triton.language as tl
from torch import Tensor

from tkernels.core import descriptors, targets
from tkernels.core import device as common
from tkernels.core.config import Config, block, cdiv
from tkernels.core.geometry import Geometry
from tkernels.core.launch import launch
from tkernels.ops.linear.kernels_tma import LONG

MOST_IMAGES = 64  # of a tile


# One program: tiles of y = activation(conv(x, w) + bias), one after another in grouped order: [BLOCK_I images, BLOCK_H
# rows, BLOCK_W columns] by BLOCK_N output channels. Grid: one program a multiprocessor. w_desc: [taps, C_out, C_in].
# The product is y^T = w @ x^T: of a left operand that is reshaped, as the map's tile is, Triton makes registers.
@triton.jit(do_not_specialize=["tiles_m", "tiles_n", "tiles_h", "tiles_w", "steps", "C_out"])
def conv_tma_kernel(x_desc, w_desc, y_desc, bias_ptr, tiles_m, tiles_n, tiles_h, tiles_w, steps, C_out,
                    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
                    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, ACTIVATION: tl.constexpr,
                    BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_K: tl.constexpr):  # fmt: skip
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    PIXELS: tl.constexpr = BLOCK_I * BLOCK_H * BLOCK_W
    tl.assume(steps > 0)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pid_m, pid_n = common.grouped_tile(tile, tiles_m, tiles_n)
        image = pid_m // (tiles_h * tiles_w) * BLOCK_I
        row = pid_m // tiles_w % tiles_h * BLOCK_H
        col = pid_m % tiles_w * BLOCK_W
        n = pid_n * BLOCK_N
        acc = tl.zeros((BLOCK_N, PIXELS), dtype=tl.float32)
        for step in range(TAPS * steps):
            # all taps of some channels, then of the next: what is fetched again is still in the L2 cache
            tap, k = step % TAPS, step // TAPS * BLOCK_K
            h = row + tap // KERNEL_W * DILATION_H - PAD_H
            w = col + tap % KERNEL_W * DILATION_W - PAD_W
            x = x_desc.load([image, h, w, k]).reshape(PIXELS, BLOCK_K)
            weight = w_desc.load([tap, n, k]).reshape(BLOCK_N, BLOCK_K)
            acc = tl.dot(weight, x.T, acc, input_precision="ieee")
        if bias_ptr is not None:
            offs_n = n + tl.arange(0, BLOCK_N)
            bias = tl.load(bias_ptr + offs_n, mask=offs_n < C_out, other=0.0).to(y_desc.dtype).to(tl.float32)
            acc = tl.fma(acc, 1.0, bias[:, None])
        y = common.activate(acc, ACTIVATION).to(y_desc.dtype)
        y_desc.store([image, row, col, n], y.T.reshape(BLOCK_I, BLOCK_H, BLOCK_W, BLOCK_N))


@functools.lru_cache(maxsize=4096)
def pixels(height: int, width: int, count: int) -> tuple[int, int, int]:
    """Images, rows and columns of a tile of ``count`` pixels: what covers maps of height x width with the fewest
    pixels outside of them, of those the one of the fewest images."""
    powers = [1 << i for i in range(count.bit_length())]
    shapes = [(count // (h * w), h, w) for h, w in itertools.product(powers, powers) if h * w <= count]
    return min(
        (shape for shape in shapes if shape[0] <= MOST_IMAGES),
        key=lambda s: (cdiv(height, s[1]) * s[1] * cdiv(width, s[2]) * s[2], s[0], abs(s[1] - s[2])),
    )


def config(g: Geometry, itemsize: int, activation: str | None) -> Config:
    large = activation not in LONG and targets.current().shared_memory >= 160 << 10
    count, bn, bk = 256 if large else 128, block(g.out_channels, 64, 128), block(g.in_channels, 16, 128 // itemsize)
    images, rows, cols = pixels(g.out_h, g.out_w, count)
    stages = descriptors.stages((count + bn) * bk * itemsize, count * bn * itemsize)
    return Config.of(8, stages, None, BLOCK_I=images, BLOCK_H=rows, BLOCK_W=cols, BLOCK_N=bn, BLOCK_K=bk)


def forward(x: Tensor, packed: Tensor, bias: Tensor | None, y: Tensor, g: Geometry, activation: str | None,
            launched: Config | None = None) -> bool:  # fmt: skip
    """Writes ``y``, NHWC as ``x`` is; False, and nothing is done, where descriptors cannot be taken."""
    width = descriptors.ALIGNMENT // y.element_size()
    fits = (g.stride_h, g.stride_w, g.groups) == (1, 1, 1) and g.taps > 1 and not g.flattened
    if not (fits and g.in_channels % width == 0 and g.out_channels % width == 0):
        return False
    if not descriptors.take(x, packed, y):
        return False
    c = launched or config(g, y.element_size(), activation)
    images, rows, cols, bn, bk = (c[f"BLOCK_{axis}"] for axis in "IHWNK")
    n, channels, out = x.shape[0], g.in_channels, g.out_channels
    tiles_h, tiles_w, tiles_n = cdiv(g.out_h, rows), cdiv(g.out_w, cols), cdiv(out, bn)
    tiles_m = cdiv(n, images) * tiles_h * tiles_w
    launch(
        conv_tma_kernel, (descriptors.programs(tiles_m * tiles_n),),
        _pixels_of(x, (n, g.height, g.width, channels), (images, rows, cols, bk)),
        # (by taps, so that no channel of one meets a weight of the next, which may be infinite)
        descriptors.describe(packed, (g.taps, out, channels), (channels, g.row_pitch, 1), (1, bn, bk)),
        _pixels_of(y, (n, g.out_h, g.out_w, out), (images, rows, cols, bn)),
        bias, tiles_m, tiles_n, tiles_h, tiles_w, cdiv(channels, bk), out, KERNEL_H=g.kernel_h, KERNEL_W=g.kernel_w,
        PAD_H=g.pad_h, PAD_W=g.pad_w, DILATION_H=g.dilation_h, DILATION_W=g.dilation_w, ACTIVATION=activation,
        **c.options(),
    )  # fmt: skip
    return True


def _pixels_of(t: Tensor, shape: tuple[int, int, int, int], tile: tuple[int, int, int, int]) -> object:
    _, h, w, c = shape
    return descriptors.describe(t, shape, (h * w * c, w * c, c, 1), tile)
