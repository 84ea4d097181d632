"""A conv stage on Triton, forward: convolution with batch norm in its epilogue, and the stage's end in one pass.

In training the convolution stores its raw output and, from the epilogue, partial statistics that batch_norm's finalise
kernel merges; in evaluation the epilogue normalises and activates. The stage's end is one pass over the raw output:
batch norm, activation, max pooling and Dropout2d, of which only the pooled result is stored. Maps are NHWC.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tkernels.core import autotune, mode, targets
from tkernels.core import device as common
from tkernels.core.config import Config, cdiv
from tkernels.core.geometry import Geometry, Pooling
from tkernels.core.launch import launch
from tkernels.core.records import Norm, Partials
from tkernels.ops.batch_norm.kernels import (
    NO_NORM,
    SMALL,
    count_batch,
    load_scale,
    squared_deviations,
    store_sums,
    tile_sum,
)
from tkernels.ops.conv import config as conv_tuning
from tkernels.ops.conv.kernels import Window, channel_units, empty_pixels, forward_tile, window
from tkernels.ops.conv_stage import config as tuning

UNROLLED_TAPS = tl.constexpr(tuning.UNROLLED_TAPS)


@triton.jit
def column_sums(tile, EXACT: tl.constexpr):
    """Sums [BLOCK_N] of a float32 tile's columns and, if EXACT, what their rounding took away."""
    if EXACT:
        total, rest = tile_sum(tile, False)
    else:
        total = tl.sum(tile, axis=0)
        rest = tl.zeros_like(total)
    return total, rest


# One program: a [BLOCK_M output pixels, BLOCK_N channels of one group] tile of y = conv(x, w) + bias, and its
# statistics in the form of batch_norm's statistics_kernel: shift, mean - shift, M2 [3, tiles_m, C_out] and counts
# [tiles_m] (program 0 counts the batch). Without partials_ptr, y = activation(batch_norm(...) + residual) from given
# statistics; the residual is laid out as y.
# Grid: (pixel tiles x channel tiles,), grouped for L2.
@triton.jit(do_not_specialize=["eps", "pixels", "tiles_m", "height", "width", "out_w", "x_stride_n"])
def conv_stage_kernel(x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, partials_ptr, counter_ptr, mean_ptr, var_ptr,
                      bn_weight_ptr, bn_bias_ptr, eps, pixels, tiles_m, height, width, out_w, out_pixels, groups,
                      group_in, group_out, x_stride_n, x_stride_c, x_stride_h, x_stride_w, IN_UNIT: tl.constexpr,
                      OUT_UNIT: tl.constexpr, FLAT: tl.constexpr, WINDOW: tl.constexpr, HALO: tl.constexpr,
                      NCHW: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
                      BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    group_out *= OUT_UNIT
    channels = groups * group_out
    count_batch(counter_ptr)
    acc, offsets, mask, channel, mask_n, in_range, pid_m, pid_n = forward_tile(
        x_ptr, w_ptr, bias_ptr, y_ptr, pixels, tiles_m, height, width, out_w, out_pixels, groups, group_in * IN_UNIT,
        group_out, x_stride_n, x_stride_c, x_stride_h, x_stride_w, FLAT, WINDOW, HALO, NCHW, PRECISION, BLOCK_M,
        BLOCK_N, BLOCK_K)  # fmt: skip
    if partials_ptr is None:
        mean, scale, shift = load_scale(mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, channel, mask_n, channels, eps)
        acc = tl.fma(acc - mean[None, :], scale[None, :], shift[None, :])
        if residual_ptr is not None:
            acc += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        acc = common.activate(acc, ACTIVATION)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, y, mask=mask)
    if partials_ptr is not None:
        rows = tl.minimum(pixels - pid_m.to(tl.int64) * BLOCK_M, BLOCK_M)
        tile_statistics(y, partials_ptr, pid_m, tiles_m, in_range, rows, channels, channel, mask_n, pid_n == 0)


@triton.jit
def tile_statistics(y, partials_ptr, producer, producers, in_range, rows, channels, channel, mask, counts):
    """Write a tile's row of statistics partials: those of ``y`` [pixels, channels] as it is stored, of which ``rows``
    pixels are ``in_range``."""
    EXACT: tl.constexpr = y.dtype == tl.float32
    value = tl.where(in_range[:, None], y.to(tl.float32), 0.0)
    n = rows.to(tl.float32)
    shift = tl.sum(value * SMALL, axis=0) / n * (1.0 / SMALL)
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    d = tl.where(in_range[:, None], value - shift[None, :], 0.0)
    total, rest = column_sums(d, EXACT)
    mean = (total + rest) / n
    m2 = squared_deviations(tl.sum(d * d, axis=0), 0.0, total, rest, mean)
    store_statistics(partials_ptr, producer, producers, channels, channel, mask, shift, mean, m2, n, counts)


@triton.jit
def store_statistics(partials_ptr, producer, producers, channels, channel, mask, shift, mean, m2, n, counts):
    """One producer's row of statistics partials, and its count where ``counts``."""
    slot = producer.to(tl.int64) * channels + channel
    size = producers.to(tl.int64) * channels
    tl.store(partials_ptr + slot, shift, mask=mask)
    tl.store(partials_ptr + size + slot, mean, mask=mask)
    tl.store(partials_ptr + 2 * size + slot, m2, mask=mask)
    if counts:
        tl.store(partials_ptr + 3 * size + producer, n)


# One program: BLOCK_R rows of statistics partials merged into one, for BLOCK_C channels, after Chan.
# Grid: (rows that come out, channel blocks).
@triton.jit(do_not_specialize=["producers"])
def fold_statistics_kernel(partials_ptr, folded_ptr, producers, channels, BLOCK_R: tl.constexpr,
                           BLOCK_C: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = rows < producers
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    mask = mask_r[:, None] & mask_c[None, :]
    slots = rows.to(tl.int64)[:, None] * channels + offs_c[None, :]
    size = producers.to(tl.int64) * channels
    n = tl.load(partials_ptr + 3 * size + rows, mask=mask_r, other=0.0)
    shift = tl.load(partials_ptr + slots, mask=mask, other=0.0)
    rest = tl.load(partials_ptr + size + slots, mask=mask, other=0.0)
    m2 = tl.load(partials_ptr + 2 * size + slots, mask=mask, other=0.0)
    count = tl.sum(n, axis=0)
    # the first row's mean as a common shift: differences of means, not means, are summed and squared
    first = (tl.program_id(0) * BLOCK_R).to(tl.int64) * channels + offs_c
    centre = tl.load(partials_ptr + first, mask=mask_c, other=0.0)
    centre = tl.where(tl.abs(centre) < float("inf"), centre, 0.0)
    d = (shift - centre[None, :]) + rest
    offset = tl.sum(tl.where(mask, n[:, None] * d, 0.0), axis=0) / count
    d -= offset[None, :]
    squares = tl.sum(tl.where(mask, n[:, None] * d * d + m2, 0.0), axis=0)
    mean = centre + offset
    store_statistics(folded_ptr, tl.program_id(0), tl.num_programs(0), channels, offs_c, mask_c, mean,
                     offset - (mean - centre), squares, count, tl.program_id(1) == 0)  # fmt: skip


# One program: BLOCK_R rows of gradient partials added into one, for BLOCK_C channels.
# Grid: (rows that come out, channel blocks).
@triton.jit(do_not_specialize=["producers"])
def fold_sums_kernel(partials_ptr, folded_ptr, producers, channels, BLOCK_R: tl.constexpr,
                     BLOCK_C: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    mask = (rows < producers)[:, None] & mask_c[None, :]
    slots = rows.to(tl.int64)[:, None] * channels + offs_c[None, :]
    size = producers.to(tl.int64) * channels
    total, rest = tile_sum(tl.load(partials_ptr + slots, mask=mask, other=0.0), False)
    rest += tl.sum(tl.load(partials_ptr + size + slots, mask=mask, other=0.0), axis=0)
    total_x, rest_x = tile_sum(tl.load(partials_ptr + 2 * size + slots, mask=mask, other=0.0), False)
    rest_x += tl.sum(tl.load(partials_ptr + 3 * size + slots, mask=mask, other=0.0), axis=0)
    store_sums(folded_ptr, tl.program_id(0), tl.num_programs(0), channels, offs_c, mask_c, total, rest, total_x,
               rest_x)  # fmt: skip


@triton.jit
def load_pixels(x_ptr, origin, row, col, inside, width, channels, offs_c, mask_c):
    """Float32 tile [pixels, channels] of an NHWC map; 0 where not ``inside``."""
    pixel = tl.where(inside, origin + row * width + col, 0)
    mask = inside[:, None] & mask_c[None, :]
    return tl.load(x_ptr + pixel[:, None] * channels + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def window_step(tap, best, which, centred, x_ptr, origin, top, left, inside, height, width, channels, offs_c, mask_c,
                mean, scale, shift, WINDOW: tl.constexpr, BORDER: tl.constexpr, NORMALIZE: tl.constexpr,
                ACTIVATION: tl.constexpr):  # fmt: skip
    """One tap of window_best."""
    row = top + tap // WINDOW.kernel_w
    col = left + tap % WINDOW.kernel_w
    if BORDER:
        inside = inside & (row >= 0) & (row < height) & (col >= 0) & (col < width)
    value = load_pixels(x_ptr, origin, row, col, inside, width, channels, offs_c, mask_c)
    d = value
    if NORMALIZE:
        # rounded as the unpooled activation would be: ties are those of the dtype
        d = value - mean[None, :]
        value = common.activate(tl.fma(d, scale[None, :], shift[None, :]), ACTIVATION)
        value = value.to(x_ptr.dtype.element_ty).to(tl.float32)
    take = (value > best) | (value != value)
    if BORDER:
        take = (take | (which < 0)) & inside[:, None]
    return tl.where(take, value, best), tl.where(take, tap, which), tl.where(take, d, centred)


@triton.jit
def window_best(x_ptr, origin, top, left, inside, height, width, channels, offs_c, mask_c, mean, scale, shift,
                WINDOW: tl.constexpr, BORDER: tl.constexpr, NORMALIZE: tl.constexpr, ACTIVATION: tl.constexpr,
                BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """For windows at (top, left): the largest activation, the tap it is at, and x - mean there, [BLOCK_P, BLOCK_C].

    Of equals the first in window order, and NaN above all, as torch.max_pool2d.
    """
    best = tl.full((BLOCK_P, BLOCK_C), float("-inf"), dtype=tl.float32)
    # the first pixel inside is taken whatever it is: -inf, too
    which = tl.full((BLOCK_P, BLOCK_C), -1 if BORDER else 0, dtype=tl.int32)
    centred = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    # the arithmetic of other activations on many taps at once would spill
    CHEAP: tl.constexpr = (
        ACTIVATION is None or ACTIVATION == "relu" or ACTIVATION == "leaky_relu" or ACTIVATION == "relu6"
    )
    TAPS: tl.constexpr = WINDOW.taps
    if TAPS <= (UNROLLED_TAPS if CHEAP else 1):
        for tap in tl.static_range(TAPS):
            best, which, centred = window_step(tap, best, which, centred, x_ptr, origin, top, left, inside, height,
                                               width, channels, offs_c, mask_c, mean, scale, shift, WINDOW, BORDER,
                                               NORMALIZE, ACTIVATION)  # fmt: skip
    else:
        for tap in range(TAPS):
            best, which, centred = window_step(tap, best, which, centred, x_ptr, origin, top, left, inside, height,
                                               width, channels, offs_c, mask_c, mean, scale, shift, WINDOW, BORDER,
                                               NORMALIZE, ACTIVATION)  # fmt: skip
    return best, which, centred


@triton.jit
def keep_channels(seed_ptr, image, first_channel, channels, p, BLOCK_C: tl.constexpr):
    """Dropout2d's factors [1, BLOCK_C] of one image: one draw for each (image, channel)."""
    return common.keep_scale(tl.load(seed_ptr), image + tl.arange(0, 1), first_channel, channels, p, 1, BLOCK_C)


# One program: a [BLOCK_P output pixels of one image, BLOCK_C channels] tile of
# y = dropout2d(max_pool(activation(batch_norm(x)))); without mean_ptr only pooled. Writes the place of each maximum in
# its window, a byte, NHWC, where taps_ptr is given.
# Grid: (images x tiles, channel tiles).
@triton.jit(do_not_specialize=["eps", "p", "tiles", "height", "width", "out_w", "out_pixels"])
def stage_end_kernel(x_ptr, y_ptr, taps_ptr, seed_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, p, tiles, height,
                     width, out_w, out_pixels, channels, UNIT: tl.constexpr, WINDOW: tl.constexpr, BORDER: tl.constexpr,
                     NCHW: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr,
                     BLOCK_C: tl.constexpr):  # fmt: skip
    channels *= UNIT
    NORMALIZE: tl.constexpr = mean_ptr is not None
    image = (tl.program_id(0) // tiles).to(tl.int64)
    offs_p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < out_pixels
    first_channel = tl.program_id(1) * BLOCK_C
    offs_c = first_channel + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    if NORMALIZE:
        mean, scale, shift = load_scale(mean_ptr, var_ptr, weight_ptr, bias_ptr, offs_c, mask_c, channels, eps)
    else:
        mean, scale, shift = 0.0, 1.0, 0.0
    top = offs_p // out_w * WINDOW.stride_h - WINDOW.pad_h
    left = offs_p % out_w * WINDOW.stride_w - WINDOW.pad_w
    y, which, _centred = window_best(x_ptr, image * height * width, top, left, mask_p, height, width, channels, offs_c,
                                      mask_c, mean, scale, shift, WINDOW, BORDER, NORMALIZE, ACTIVATION, BLOCK_P,
                                      BLOCK_C)  # fmt: skip
    if seed_ptr is not None:
        y *= keep_channels(seed_ptr, image, first_channel, channels, p, BLOCK_C)
    if taps_ptr is not None:
        places = (image * out_pixels + offs_p)[:, None] * channels + offs_c[None, :]
        tl.store(taps_ptr + places, which.to(tl.uint8), mask=mask_p[:, None] & mask_c[None, :])
    if NCHW:
        offsets = (image * channels + offs_c)[None, :] * out_pixels + offs_p[:, None]
    else:
        offsets = (image * out_pixels + offs_p)[:, None] * channels + offs_c[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask_p[:, None] & mask_c[None, :])


@functools.lru_cache(maxsize=4096)
def pooling_window(pool: Pooling) -> dict[str, Any]:
    """The compile-time arguments that describe the pooling window."""
    window = Window(pool.kernel_h, pool.kernel_w, pool.stride_h, pool.stride_w, pool.pad_h, pool.pad_w)
    return {"WINDOW": window, "BORDER": pool.border}


def launch_conv(x: Tensor, packed: Tensor, bias: Tensor | None, g: Geometry, norm: Norm | None = None,
                num_batches_tracked: Tensor | None = None, channels_last: bool = True,
                activation: str | None = "relu", residual: Tensor | None = None,
                config: Config | None = None) -> tuple[Tensor, Partials | None]:  # fmt: skip
    """The raw output conv(x, w) + bias and its partial statistics, or, with a ``norm`` of given statistics,
    activation(batch_norm(conv(x, w) + bias) + residual) and None. ``x``, ``packed``: as for conv's launch_forward;
    ``residual``: laid out as the output.

    Adds one to ``num_batches_tracked`` (int64, shape ()) where given.
    """
    n = x.shape[0]
    y = empty_pixels(x, (n, g.out_channels, g.out_h, g.out_w), packed.dtype, channels_last)
    precision = mode.dot_precision(packed.dtype, "conv")
    if norm is None:
        activation = None  # what the statistics are of does not depend on it
    config = config or autotune.pick(
        "conv_stage forward", n,
        (g, packed.dtype, precision, norm is None, channels_last, activation, residual is not None),
        tuning.forward(g, packed.dtype, precision, targets.current(), channels_last, norm is None),
        # nothing is counted while it is timed
        lambda c: launch_conv(x, packed, bias, g, norm, None, channels_last, activation, residual, c), x,
    )  # fmt: skip
    group_in, group_out, in_unit, out_unit = channel_units(g)
    out_pixels = g.out_h * g.out_w
    tiles_m = cdiv(n * out_pixels, config["BLOCK_M"])
    grid = (tiles_m * g.groups * cdiv(g.group_out, config["BLOCK_N"]),)
    strides = x.stride() if g.flattened else (0, 0, 0, 0)
    partials = None
    if norm is None:
        partials = Partials(x.new_empty(tiles_m * (3 * g.out_channels + 1), dtype=torch.float32), tiles_m)
    launch(
        conv_stage_kernel, grid,
        x, packed, bias, residual, y, partials and partials.data, num_batches_tracked, *(norm or NO_NORM),
        n * out_pixels, tiles_m, g.height, g.width, g.out_w, out_pixels, g.groups, group_in, group_out, *strides,
        IN_UNIT=in_unit, OUT_UNIT=out_unit, FLAT=g.flattened, HALO=g.halo, NCHW=not channels_last,
        ACTIVATION=activation, PRECISION=precision, **window(g), **config.options(),
    )  # fmt: skip
    return y, partials and launch_fold(partials, g.out_channels, fold_statistics_kernel)


def launch_fold(partials: Partials, channels: int, kernel: Any, config: Config | None = None) -> Partials:
    """The partials in at most MAX_PARTIALS rows. ``kernel``: fold_statistics_kernel or fold_sums_kernel."""
    config = config or tuning.fold(channels)
    while partials.producers > tuning.MAX_PARTIALS:
        rows = cdiv(partials.producers, config["BLOCK_R"])
        line = 3 * channels + 1 if kernel is fold_statistics_kernel else 4 * channels
        folded = partials.data.new_empty(rows * line)
        grid = (rows, cdiv(channels, config["BLOCK_C"]))
        launch(kernel, grid, partials.data, folded, partials.producers, channels, **config.options())
        partials = Partials(folded, rows)
    return partials


def taps_like(x: Tensor, pool: Pooling) -> Tensor | None:
    """Room for the place of each window's maximum, NHWC. None where windows do not overlap, so that finding it again
    costs a read that is made anyway, or have more pixels than a byte can say."""
    if not pool.overlaps or pool.taps > 255:
        return None
    return empty_pixels(x, (x.shape[0], x.shape[1], pool.out_h, pool.out_w), torch.uint8, True)


def launch_end(x: Tensor, pool: Pooling, norm: Norm | None, p: float = 0.0, seed: Tensor | None = None,
               channels_last: bool = True, activation: str | None = "relu", taps: Tensor | None = None,
               config: Config | None = None) -> Tensor:  # fmt: skip
    """dropout2d(max_pool(activation(batch_norm(x)))) of an NHWC map, or its max pooling alone where ``norm`` is None.

    ``seed``: None for no dropout. ``channels_last``: the output's memory format. ``taps``: taps_like's, written where
    given.
    """
    n, channels = x.shape[:2]
    y = empty_pixels(x, (n, channels, pool.out_h, pool.out_w), x.dtype, channels_last)
    if norm is None:
        activation = None
    config = config or tuning.end(channels, pool, targets.current())
    unit = conv_tuning.unit(channels)
    out_pixels = pool.out_h * pool.out_w
    tiles = cdiv(out_pixels, config["BLOCK_P"])
    launch(
        stage_end_kernel, (n * tiles, cdiv(channels, config["BLOCK_C"])),
        x, y, taps, seed, *(norm or NO_NORM), p, tiles, pool.height, pool.width, pool.out_w, out_pixels,
        channels // unit, UNIT=unit, NCHW=not channels_last, ACTIVATION=activation, **pooling_window(pool),
        **config.options(),
    )  # fmt: skip
    return y
