"""Launch configurations of the conv stage's kernels."""

from __future__ import annotations

import dataclasses
import functools

import torch

from tkernels.core.config import Config, block, cdiv, next_power_of_two
from tkernels.core.geometry import Geometry, Pooling
from tkernels.core.targets import Target
from tkernels.ops.conv import config as conv_tuning

# A finalise program merges at most this many partial rows; more are folded first.
MAX_PARTIALS = 512
UNROLLED_TAPS = 16  # windows of at most this many pixels are unrolled


def applies_in_prologue(g: Geometry, dtype: torch.dtype, target: Target) -> bool:
    """Whether a convolution should normalise and activate its input as it loads it, so that the activation between it
    and the layer before is never stored: where the estimate says so, which is for 1x1 windows alone.

    The activation's pass costs one read and one write of the map, and its consumers (forward and weight gradient) read
    it as they would read the raw map. A prologue repeats the arithmetic, about 6 instructions an element, once for each
    tap and each tile of output channels, and its operand comes through registers instead of by asynchronous copy. For a
    3x3 window that costs more than the bytes are worth, on every card.
    """
    pointwise = g.taps == 1 and g.stride_h == g.stride_w == 1 and not g.halo and g.groups == 1 and not g.flattened
    return pointwise and prologue_gain(g, dtype, target) > 1.0


def prologue_gain(g: Geometry, dtype: torch.dtype, target: Target) -> float:
    """Time of the pass a prologue would save over the time of the arithmetic it would repeat."""
    bytes_saved = 2 * dtype.itemsize
    repeats = 2 * g.taps * cdiv(g.group_out, 128)
    pass_time = bytes_saved / target.gbps
    # a fused multiply-add counts as two of a card's float32 operations
    repeat_time = repeats * 6 * 2 / (target.tflops_fp32 * 1e3)
    return pass_time / repeat_time


def wgrad(g: Geometry, dtype: torch.dtype, precision: str, target: Target) -> Config:
    """Tiles of the weight gradient with batch norm's backward in its prologue: those of the plain one, on at least 4
    warps, which share out the second map's operand."""
    config = conv_tuning.wgrad(g, dtype, precision, target)
    return dataclasses.replace(config, num_warps=max(config.num_warps, 4))


def normalizes_in_wgrad(g: Geometry, dtype: torch.dtype, precision: str, target: Target) -> bool:
    """Whether a layer whose input needs no gradient goes through batch norm's backward as its weight gradient loads it,
    instead of in a pass of its own.

    The pass reads two maps and writes one, which every tile along the reduction then reads; without it each of those
    reads two. So up to two such tiles the prologue moves fewer bytes: that is the RGB stem, and 1x1 convolutions.
    """
    config = conv_tuning.wgrad(g, dtype, precision, target)
    _rows, _cols, out_on_rows = conv_tuning.wgrad_sides(g)
    tiles = cdiv(g.reduction, config["BLOCK_N" if out_on_rows else "BLOCK_M"])
    return 2 * tiles < 3 + tiles


@functools.lru_cache(maxsize=1024)
def _with_epilogue(config: Config, exact: bool, target: Target) -> Config:
    """A product's tiles where an epilogue reduces them: at most 32 accumulators a thread leave it registers enough for
    two programs a multiprocessor (64 of them spill on sm_90 and sm_100, where they are normalised or go through an
    activation's derivative)."""
    warps = config.num_warps
    while warps < 8 and config["BLOCK_M"] * config["BLOCK_N"] > 32 * target.warp_size * warps:
        warps *= 2
    config = _half_the_pixels(config, 64 * target.warp_size * warps)
    # a register limit that suits the plain product is too low for its epilogue; left alone ptxas aims at 168 of them
    # on sm_86 and sm_89, for three programs a multiprocessor, and spills two
    cap = 192 if target.name in ("sm_86", "sm_89") and warps == 4 else config.maxnreg if exact else None
    return dataclasses.replace(config, num_warps=warps, maxnreg=cap)


def forward(
    g: Geometry, dtype: torch.dtype, precision: str, target: Target, channels_last: bool = True, training: bool = False
) -> Config:
    """Tiles of the convolution with a batch norm epilogue: those of the plain one, on more warps. ``training``: the
    epilogue is partial statistics, beside which sm_90 holds a tile of 128 x 128, one a multiprocessor: for long loops.

    An NCHW store holds an offset for every element: half the pixels where a tile would have 8192 of them.
    """
    if training and channels_last and g.reduction >= 1024 and conv_tuning.is_hopper(g, dtype, target):
        config = conv_tuning.forward(g, dtype, precision, target, plain=True)
        if config.num_warps == 8:
            sizes = {**dict(config.blocks), "BLOCK_N": min(config["BLOCK_N"], 128)}
            return dataclasses.replace(config, blocks=tuple(sizes.items()))
    config = conv_tuning.forward(g, dtype, precision, target)
    config = _with_epilogue(config, conv_tuning.is_exact(dtype, precision), target)
    return config if channels_last else _half_the_pixels(config, 8192)


def _half_the_pixels(config: Config, elements: int) -> Config:
    """Tiles with half the pixels where they would have ``elements`` or more."""
    if config["BLOCK_M"] * config["BLOCK_N"] < elements:
        return config
    return dataclasses.replace(
        config, blocks=tuple((name, size // 2 if name == "BLOCK_M" else size) for name, size in config.blocks)
    )


def dgrad(g: Geometry, dtype: torch.dtype, precision: str, target: Target) -> Config:
    """Tiles of the input gradient with a batch norm epilogue: those of the plain one, on more warps."""
    return _with_epilogue(
        conv_tuning.dgrad(g, dtype, precision, target), conv_tuning.is_exact(dtype, precision), target
    )


def pointwise_forward(g: Geometry, dtype: torch.dtype, precision: str, target: Target) -> Config:
    """Tiles of a 1x1 convolution with batch norm in prologue and epilogue."""
    config = _with_prologue(forward(g, dtype, precision, target), "BLOCK_K", dtype, target)
    if target.name == "sm_100":  # left alone ptxas aims at 128 registers and spills two
        return dataclasses.replace(config, maxnreg=168)
    if target.name in ("sm_80", "sm_86", "sm_89") and dtype == torch.float32:  # and here at 128 and at 168
        return dataclasses.replace(config, maxnreg=192)
    return config


def pointwise_wgrad(g: Geometry, dtype: torch.dtype, precision: str, target: Target) -> Config:
    """Tiles of its weight gradient, with the same prologue."""
    config = _with_prologue(wgrad(g, dtype, precision, target), "BLOCK_P", dtype, target)
    if conv_tuning.is_hopper(g, dtype, target) and config.num_warps == 8:
        return dataclasses.replace(config, maxnreg=128)  # two programs a multiprocessor, whatever the activation
    return config


@functools.lru_cache(maxsize=1024)
def _with_prologue(config: Config, step: str, dtype: torch.dtype, target: Target) -> Config:
    """Tiles of a product whose operand passes through registers: short steps, which hold half as much of it."""
    shorter = tuple((name, min(size, 32) if name == step else size) for name, size in config.blocks)
    warps = config.num_warps
    if not target.is_nvidia and dtype == torch.float32:
        warps = max(warps, 8)  # gfx942 spills the float32 operand of 4
    return dataclasses.replace(config, blocks=shorter, num_warps=warps)


@functools.lru_cache(maxsize=1024)
def fold(channels: int) -> Config:
    """Blocks of the kernels that fold partial rows: BLOCK_R rows into one, BLOCK_C channels."""
    return Config.of(8, 1, BLOCK_R=64, BLOCK_C=block(channels, 1, 32))


def tiles_a_program(tiles: int) -> int:
    """How many tiles a producer of partial rows runs over, so that there are at most MAX_PARTIALS rows."""
    return cdiv(tiles, MAX_PARTIALS)


@functools.lru_cache(maxsize=4096)
def _tile(channels: int, pixels: int, elements: int, warp_size: int) -> Config:
    """Up to ``elements`` of one image: no taller than the image, and few different sizes, which share compiled
    kernels."""
    block_c = block(channels, 8, 32)
    tallest = elements // block_c
    block_p = tallest if pixels >= tallest else min(next_power_of_two(pixels), tallest // 2)
    # so many threads that each loads 16 bytes of bfloat16, and 64 at the least
    warps = max(64 // warp_size, min(4, block_p * block_c // (8 * warp_size)))
    return Config.of(warps, 1, BLOCK_P=block_p, BLOCK_C=block_c)


def end(channels: int, pool: Pooling, target: Target) -> Config:
    """Blocks of the pass that normalises, activates and pools: BLOCK_P output pixels, BLOCK_C channels."""
    return _tile(channels, pool.out_h * pool.out_w, 4096 if pool.taps == 1 else 2048, target.warp_size)


def end_sums(channels: int, pool: Pooling, target: Target) -> Config:
    """Blocks of the pass that sums the gradient: BLOCK_P windows a step, BLOCK_C channels."""
    return _tile(channels, pool.out_h * pool.out_w, 2048, target.warp_size)


def end_gradient(channels: int, pool: Pooling, target: Target) -> Config:
    """Blocks of the pass that makes the raw output's gradient: BLOCK_P cells (pixels where windows overlap)."""
    if pool.overlaps:
        return _tile(channels, pool.height * pool.width, 1024, target.warp_size)
    cells_h, cells_w = pool.cells
    return _tile(channels, cells_h * cells_w, 2048 if pool.taps == 1 else 1024, target.warp_size)
