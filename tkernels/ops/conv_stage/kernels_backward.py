"""A conv stage on Triton, backward: the stage's end replayed, and the input gradient with batch norm in its epilogue.

Nothing was kept of pooling, dropout and activation: each pass finds the window's maximum again from the raw output and
draws the dropout factors again from the seed. Where windows overlap, so that a pixel would find those of several again,
a byte says where each maximum is (``taps``), except to traces. Sums for batch norm's gradients come as partials in the
form of batch_norm's gradient_sums_kernel.
"""

from __future__ import annotations

import math

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
from tkernels.ops.batch_norm.kernels import load_scale, raw_gradient, store_sums
from tkernels.ops.conv import config as conv_tuning
from tkernels.ops.conv.kernels import channel_units, empty_pixels, is_nhwc, window
from tkernels.ops.conv.kernels_backward import dgrad_tile, phase_of
from tkernels.ops.conv_stage import config as tuning
from tkernels.ops.conv_stage.kernels import (
    column_sums,
    fold_sums_kernel,
    keep_channels,
    launch_fold,
    load_pixels,
    pooling_window,
    window_best,
)


@triton.jit
def load_pooled(dy_ptr, image, row, col, mask, out_w, out_pixels, channels, offs_c, mask_c, dy_stride_n, dy_stride_c,
                dy_stride_h, dy_stride_w, DENSE: tl.constexpr):  # fmt: skip
    """Float32 tile of the stage's incoming gradient at pooled positions; DENSE: it lies densely in NHWC order."""
    if DENSE:
        pixel = tl.where(mask, image * out_pixels + row * out_w + col, 0)
        offsets = pixel[:, None] * channels + offs_c[None, :]
    else:
        spot = image * dy_stride_n + row.to(tl.int64) * dy_stride_h + col.to(tl.int64) * dy_stride_w
        offsets = tl.where(mask, spot, 0)[:, None] + offs_c.to(tl.int64)[None, :] * dy_stride_c
    return tl.load(dy_ptr + offsets, mask=mask[:, None] & mask_c[None, :], other=0.0).to(tl.float32)


@triton.jit
def pooled_gradient(dy, best, centred, scale, shift, ACTIVATION: tl.constexpr):
    """The gradient of batch norm's output at windows' maxima, by the activation's output there, where that is known to
    tell its derivative, else its input."""
    if not (ACTIVATION is None or ACTIVATION == "relu" or ACTIVATION == "leaky_relu" or ACTIVATION == "relu6"):
        best = tl.fma(centred, scale[None, :], shift[None, :])
    return common.activation_gradient(dy, best, ACTIVATION)


@triton.jit
def at_tap(taps_ptr, x_ptr, image, row, col, mask, height, width, out_w, out_pixels, channels, offs_c, mask_c, mean,
           scale, shift, WINDOW: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """window_best's (best, centred) where ``taps`` say it is."""
    inside = mask[:, None] & mask_c[None, :]
    window = tl.where(mask, image * out_pixels + row * out_w + col, 0)
    tap = tl.load(taps_ptr + window[:, None] * channels + offs_c[None, :], mask=inside, other=0).to(tl.int32)
    y = row[:, None] * WINDOW.stride_h - WINDOW.pad_h + tap // WINDOW.kernel_w
    x = col[:, None] * WINDOW.stride_w - WINDOW.pad_w + tap % WINDOW.kernel_w
    pixel = tl.where(inside, image * height * width + y * width + x, 0)
    raw = tl.load(x_ptr + pixel * channels + offs_c[None, :], mask=inside, other=0.0).to(tl.float32)
    return activated(raw, mean, scale, shift, x_ptr, ACTIVATION)


@triton.jit
def activated(raw, mean, scale, shift, x_ptr, ACTIVATION: tl.constexpr):
    """(the activation of a raw tile as it would be stored, raw - mean)."""
    centred = raw - mean[None, :]
    value = common.activate(tl.fma(centred, scale[None, :], shift[None, :]), ACTIVATION)
    return value.to(x_ptr.dtype.element_ty).to(tl.float32), centred


# One program: over a run of units_each tiles [BLOCK_P windows of one image, BLOCK_C channels], the sums of dz and of
# dz * (x - mean), where dz is the gradient of batch norm's output, not 0 at each window's maximum only.
# Grid: (producers, channel tiles).
@triton.jit(do_not_specialize=["eps", "p", "units", "units_each", "producers", "tiles", "height", "width", "out_w",
                               "out_pixels", "dy_stride_n"])  # fmt: skip
def stage_sums_kernel(dy_ptr, x_ptr, taps_ptr, partials_ptr, seed_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, p,
                      units, units_each, producers, tiles, height, width, out_w, out_pixels, channels, dy_stride_n,
                      dy_stride_c, dy_stride_h, dy_stride_w, UNIT: tl.constexpr, DENSE: tl.constexpr,
                      WINDOW: tl.constexpr, BORDER: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr,
                      BLOCK_C: tl.constexpr):  # fmt: skip
    channels *= UNIT
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    first_channel = tl.program_id(1) * BLOCK_C
    offs_c = first_channel + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    mean, scale, shift = load_scale(mean_ptr, var_ptr, weight_ptr, bias_ptr, offs_c, mask_c, channels, eps)
    plain = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    times_x = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    producer = tl.program_id(0)
    start = producer * units_each
    for unit in range(start, tl.minimum(start + units_each, units)):
        image = (unit // tiles).to(tl.int64)
        offs_p = unit % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
        mask_p = offs_p < out_pixels
        row = offs_p // out_w
        col = offs_p % out_w
        if taps_ptr is not None:
            best, centred = at_tap(taps_ptr, x_ptr, image, row, col, mask_p, height, width, out_w, out_pixels, channels,
                                   offs_c, mask_c, mean, scale, shift, WINDOW, ACTIVATION)  # fmt: skip
        else:
            best, _which, centred = window_best(x_ptr, image * height * width, row * WINDOW.stride_h - WINDOW.pad_h,
                                                col * WINDOW.stride_w - WINDOW.pad_w, mask_p, height, width, channels,
                                                offs_c, mask_c, mean, scale, shift, WINDOW, BORDER, True, ACTIVATION,
                                                BLOCK_P, BLOCK_C)  # fmt: skip
        dz = load_pooled(dy_ptr, image, row, col, mask_p, out_w, out_pixels, channels, offs_c, mask_c, dy_stride_n,
                         dy_stride_c, dy_stride_h, dy_stride_w, DENSE)  # fmt: skip
        if seed_ptr is not None:
            dz *= keep_channels(seed_ptr, image, first_channel, channels, p, BLOCK_C)
        dz = tl.where(mask_p[:, None], pooled_gradient(dz, best, centred, scale, shift, ACTIVATION), 0.0)
        plain += dz
        times_x = tl.fma(dz, tl.where(mask_p[:, None], centred, 0.0), times_x)
    total, rest = column_sums(plain, EXACT)
    total_x, rest_x = column_sums(times_x, EXACT)
    store_sums(partials_ptr, producer, producers, channels, offs_c, mask_c, total, rest, total_x, rest_x)


# One program: the raw output's gradient in BLOCK_P cells of one image and BLOCK_C channels, for windows that do not
# overlap. A cell is the stride_h x stride_w pixels from a window's corner on; cells past the last window have none.
# Grid: (images x tiles, channel tiles).
@triton.jit(do_not_specialize=["eps", "p", "tiles", "height", "width", "out_h", "out_w", "cells", "cells_w",
                               "dy_stride_n"])  # fmt: skip
def stage_gradient_kernel(dy_ptr, x_ptr, dx_ptr, seed_ptr, coefficients_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr,
                          eps, p, tiles, height, width, out_h, out_w, cells, cells_w, channels, dy_stride_n,
                          dy_stride_c, dy_stride_h, dy_stride_w, UNIT: tl.constexpr, DENSE: tl.constexpr,
                          WINDOW: tl.constexpr, BORDER: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr,
                          BLOCK_C: tl.constexpr):  # fmt: skip
    channels *= UNIT
    image = (tl.program_id(0) // tiles).to(tl.int64)
    offs_p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < cells
    first_channel = tl.program_id(1) * BLOCK_C
    offs_c = first_channel + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    mean, scale, shift = load_scale(mean_ptr, var_ptr, weight_ptr, bias_ptr, offs_c, mask_c, channels, eps)
    row = offs_p // cells_w
    col = offs_p % cells_w
    has_window = mask_p & (row < out_h) & (col < out_w)
    top = row * WINDOW.stride_h - WINDOW.pad_h
    left = col * WINDOW.stride_w - WINDOW.pad_w
    origin = image * height * width
    best, which, centred = window_best(x_ptr, origin, top, left, has_window, height, width, channels, offs_c, mask_c,
                                       mean, scale, shift, WINDOW, BORDER, True, ACTIVATION, BLOCK_P,
                                       BLOCK_C)  # fmt: skip
    dz = load_pooled(dy_ptr, image, row, col, has_window, out_w, out_h * out_w, channels, offs_c, mask_c, dy_stride_n,
                     dy_stride_c, dy_stride_h, dy_stride_w, DENSE)  # fmt: skip
    if seed_ptr is not None:
        dz *= keep_channels(seed_ptr, image, first_channel, channels, p, BLOCK_C)
    dz = pooled_gradient(dz, best, centred, scale, shift, ACTIVATION)
    UNROLL: tl.constexpr = WINDOW.stride_h * WINDOW.stride_w if WINDOW.stride_h * WINDOW.stride_w <= 16 else 1
    for tap in tl.range(0, WINDOW.stride_h * WINDOW.stride_w, loop_unroll_factor=UNROLL):
        in_row = tap // WINDOW.stride_w
        in_col = tap % WINDOW.stride_w
        y = top + in_row
        x = left + in_col
        inside = mask_p & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        raw = load_pixels(x_ptr, origin, y, x, inside, width, channels, offs_c, mask_c)
        covered = (in_row < WINDOW.kernel_h) & (in_col < WINDOW.kernel_w)
        tap_in_window = tl.where(covered, in_row * WINDOW.kernel_w + in_col, -1)
        here = tl.where(which == tap_in_window, dz, 0.0)
        dx = raw_gradient(here, raw, mean, scale, coefficients_ptr, offs_c, mask_c, channels)
        pixel = tl.where(inside, origin + y * width + x, 0)
        tl.store(dx_ptr + pixel[:, None] * channels + offs_c[None, :], dx.to(dx_ptr.dtype.element_ty),
                 mask=inside[:, None] & mask_c[None, :])  # fmt: skip


# As stage_gradient_kernel where windows overlap: BLOCK_P pixels of one image, each asking every window it lies in
# whether it is that window's maximum, or reading it off the window's byte of taps_ptr.
# Grid: (images x tiles, channel tiles).
@triton.jit(do_not_specialize=["eps", "p", "tiles", "height", "width", "out_h", "out_w", "dy_stride_n"])
def stage_overlap_kernel(dy_ptr, x_ptr, taps_ptr, dx_ptr, seed_ptr, coefficients_ptr, mean_ptr, var_ptr, weight_ptr,
                         bias_ptr, eps, p, tiles, height, width, out_h, out_w, channels, dy_stride_n, dy_stride_c,
                         dy_stride_h, dy_stride_w, UNIT: tl.constexpr, DENSE: tl.constexpr, WINDOW: tl.constexpr,
                         BORDER: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr,
                         BLOCK_C: tl.constexpr):  # fmt: skip
    channels *= UNIT
    image = (tl.program_id(0) // tiles).to(tl.int64)
    offs_p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < height * width
    first_channel = tl.program_id(1) * BLOCK_C
    offs_c = first_channel + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    mean, scale, shift = load_scale(mean_ptr, var_ptr, weight_ptr, bias_ptr, offs_c, mask_c, channels, eps)
    y = offs_p // width
    x = offs_p % width
    origin = image * height * width
    raw = load_pixels(x_ptr, origin, y, x, mask_p, width, channels, offs_c, mask_c)
    best, at_best = activated(raw, mean, scale, shift, x_ptr, ACTIVATION)
    dz = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    WINDOWS_H: tl.constexpr = (WINDOW.kernel_h + WINDOW.stride_h - 1) // WINDOW.stride_h
    WINDOWS_W: tl.constexpr = (WINDOW.kernel_w + WINDOW.stride_w - 1) // WINDOW.stride_w
    for i in tl.range(0, WINDOWS_H * WINDOWS_W, loop_unroll_factor=4 if taps_ptr is not None else 1):
        row = (y + WINDOW.pad_h) // WINDOW.stride_h - i // WINDOWS_W
        col = (x + WINDOW.pad_w) // WINDOW.stride_w - i % WINDOWS_W
        top = row * WINDOW.stride_h - WINDOW.pad_h
        left = col * WINDOW.stride_w - WINDOW.pad_w
        covers = mask_p & (row >= 0) & (row < out_h) & (y - top < WINDOW.kernel_h)
        covers = covers & (col >= 0) & (col < out_w) & (x - left < WINDOW.kernel_w)
        if taps_ptr is not None:
            window = tl.where(covers, image * out_h * out_w + row * out_w + col, 0)
            which = tl.load(taps_ptr + window[:, None] * channels + offs_c[None, :],
                            mask=covers[:, None] & mask_c[None, :], other=0).to(tl.int32)  # fmt: skip
        else:
            _best, which, _centred = window_best(x_ptr, origin, top, left, covers, height, width, channels, offs_c,
                                                 mask_c, mean, scale, shift, WINDOW, BORDER, True, ACTIVATION, BLOCK_P,
                                                 BLOCK_C)  # fmt: skip
        dy = load_pooled(dy_ptr, image, row, col, covers, out_w, out_h * out_w, channels, offs_c, mask_c,
                         dy_stride_n, dy_stride_c, dy_stride_h, dy_stride_w, DENSE)  # fmt: skip
        tap = (y - top) * WINDOW.kernel_w + x - left
        chosen = covers[:, None] & (which == tap[:, None])
        dz += tl.where(chosen, dy, 0.0)
    if seed_ptr is not None:
        dz *= keep_channels(seed_ptr, image, first_channel, channels, p, BLOCK_C)
    # of a window's maximum the pixel's own activation tells the derivative
    dz = pooled_gradient(dz, best, at_best, scale, shift, ACTIVATION)
    dx = raw_gradient(dz, raw, mean, scale, coefficients_ptr, offs_c, mask_c, channels)
    tl.store(dx_ptr + (origin + offs_p)[:, None] * channels + offs_c[None, :], dx.to(dx_ptr.dtype.element_ty),
             mask=mask_p[:, None] & mask_c[None, :])  # fmt: skip


# One program: a [BLOCK_M input pixels of one phase, BLOCK_N channels of one group] tile of
# dz = activation'(batch_norm(x)) * dgrad(dy), where x is the layer before's raw output, and the sums of dz and of
# dz * (x - mean). Grid: (pixel tiles of the largest phase x channel tiles, phases).
@triton.jit(do_not_specialize=["eps", "images", "tiles_m", "height", "width", "out_h", "out_w"])
def conv_stage_dgrad_kernel(dy_ptr, w_ptr, x_ptr, dz_ptr, partials_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps,
                            images, tiles_m, height, width, out_h, out_w, in_pixels, groups, group_in, group_out,
                            PHASES_W: tl.constexpr, IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, PADDED: tl.constexpr,
                            TRANSPOSED: tl.constexpr, WINDOW: tl.constexpr, ACTIVATION: tl.constexpr,
                            PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                            BLOCK_K: tl.constexpr):  # fmt: skip
    group_in *= IN_UNIT
    group_out *= OUT_UNIT
    channels = groups * group_in
    EXACT: tl.constexpr = dz_ptr.dtype.element_ty == tl.float32
    phase_h, phase_w, phase_pixels, cols, pixels = phase_of(tl.program_id(1), images, height, width, PHASES_W, WINDOW)
    pid_m, pid_n = common.grouped_tile(tl.program_id(0), tiles_m, groups * tl.cdiv(group_in, BLOCK_N))
    # in a tile past the end of a smaller phase all rows are masked: its sums come out as 0
    acc, offsets, mask, channel, mask_n = dgrad_tile(
        dy_ptr, None, w_ptr, pid_m, pid_n, phase_h, phase_w, phase_pixels, cols, pixels, width, out_h, out_w, in_pixels,
        groups, group_in, group_out, PADDED, TRANSPOSED, WINDOW, False, None, PRECISION, BLOCK_M, BLOCK_N,
        BLOCK_K)  # fmt: skip
    mean, scale, shift = load_scale(mean_ptr, var_ptr, weight_ptr, bias_ptr, channel, mask_n, channels, eps)
    centred = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
    z = tl.fma(centred, scale[None, :], shift[None, :])
    # the sum keeps what picks from the accumulators apart from them: else ptxas runs wgmma one at a time (C7514), under
    # Triton 3.6 with 32 channels
    dz = common.activation_gradient(acc + 0.0, z, ACTIVATION).to(dz_ptr.dtype.element_ty)
    tl.store(dz_ptr + offsets, dz, mask=mask)
    # the sums are of what is stored
    value = tl.where(mask, dz.to(tl.float32), 0.0)
    total, rest = column_sums(value, EXACT)
    total_x, rest_x = column_sums(tl.where(mask, value * centred, 0.0), EXACT)
    store_sums(partials_ptr, tl.program_id(1) * tiles_m + pid_m, tiles_m * tl.num_programs(1), channels, channel,
               mask_n, total, rest, total_x, rest_x)  # fmt: skip


def launch_end_sums(dy: Tensor, x: Tensor, pool: Pooling, norm: Norm, p: float = 0.0, seed: Tensor | None = None,
                    activation: str | None = "relu", taps: Tensor | None = None,
                    config: Config | None = None) -> Partials:  # fmt: skip
    """Partial sums for batch norm's gradients from the stage's incoming gradient (any strides) and the raw map x.
    ``taps``: launch_end's."""
    n, channels = x.shape[:2]
    config = config or tuning.end_sums(channels, pool, targets.current())
    unit = conv_tuning.unit(channels)
    out_pixels = pool.out_h * pool.out_w
    tiles = cdiv(out_pixels, config["BLOCK_P"])
    each = tuning.tiles_a_program(n * tiles)
    producers = cdiv(n * tiles, each)
    partials = x.new_empty(producers * 4 * channels, dtype=torch.float32)
    dense, strides = gradient_strides(dy)
    launch(
        stage_sums_kernel, (producers, cdiv(channels, config["BLOCK_C"])),
        dy, x, taps, partials, seed, *norm, p, n * tiles, each, producers, tiles, pool.height, pool.width, pool.out_w,
        out_pixels, channels // unit, *strides, UNIT=unit, DENSE=dense, ACTIVATION=activation, **pooling_window(pool),
        **config.options(),
    )  # fmt: skip
    return Partials(partials, producers)


def launch_end_gradient(dy: Tensor, x: Tensor, pool: Pooling, norm: Norm, coefficients: Tensor | None,
                        p: float = 0.0, seed: Tensor | None = None, activation: str | None = "relu",
                        taps: Tensor | None = None, config: Config | None = None) -> Tensor:  # fmt: skip
    """The raw map's gradient, NHWC. ``coefficients``: batch_norm's, None where the statistics were given; ``taps``:
    launch_end's."""
    n, channels = x.shape[:2]
    dx = empty_pixels(x, (n, channels, pool.height, pool.width), x.dtype, channels_last=True)
    config = config or tuning.end_gradient(channels, pool, targets.current())
    unit = conv_tuning.unit(channels)
    cells_h, cells_w = pool.cells
    spots = pool.height * pool.width if pool.overlaps else cells_h * cells_w
    tiles = cdiv(spots, config["BLOCK_P"])
    dense, strides = gradient_strides(dy)
    sizes: tuple[int, ...] = (pool.height, pool.width, pool.out_h, pool.out_w)
    kernel = stage_overlap_kernel
    maps: tuple[Tensor | None, ...] = dy, x, taps, dx
    if not pool.overlaps:
        kernel, maps = stage_gradient_kernel, (dy, x, dx)
        sizes += (spots, cells_w)
    launch(
        kernel, (n * tiles, cdiv(channels, config["BLOCK_C"])),
        *maps, seed, coefficients, *norm, p, tiles, *sizes, channels // unit, *strides, UNIT=unit,
        DENSE=dense, ACTIVATION=activation, **pooling_window(pool), **config.options(),
    )  # fmt: skip
    return dx


def gradient_strides(dy: Tensor) -> tuple[bool, tuple[int, ...]]:
    """Whether dy is dense in NHWC order, and its strides where they matter (equal ones share a compiled kernel)."""
    return (True, (0, 0, 0, 0)) if is_nhwc(dy) else (False, dy.stride())


def launch_dgrad(dy: Tensor, packed: Tensor, g: Geometry, x: Tensor, norm: Norm, transposed: bool = False,
                 activation: str | None = "relu",
                 config: Config | None = None) -> tuple[Tensor, Partials]:  # fmt: skip
    """dz, the gradient of the layer before's batch norm output, and its partial sums. ``x``: that layer's raw output;
    ``activation``: that layer's; the rest as for conv's launch_dgrad."""
    n = dy.shape[0]
    dz = empty_pixels(dy, (n, g.in_channels, g.height, g.width), x.dtype, channels_last=True)
    precision = mode.dot_precision(dy.dtype, "conv")
    config = config or autotune.pick(
        "conv_stage dgrad", n, (g, dy.dtype, precision, activation),
        tuning.dgrad(g, dy.dtype, precision, targets.current()),
        lambda c: launch_dgrad(dy, packed, g, x, norm, transposed, activation, c), dy,
    )  # fmt: skip
    group_in, group_out, in_unit, out_unit = channel_units(g)
    phases = math.prod(g.phases)
    tiles_m = cdiv(n * cdiv(g.height, g.stride_h) * cdiv(g.width, g.stride_w), config["BLOCK_M"])
    partials = dy.new_empty(tiles_m * phases * 4 * g.in_channels, dtype=torch.float32)
    grid = (tiles_m * g.groups * cdiv(g.group_in, config["BLOCK_N"]), phases)
    launch(
        conv_stage_dgrad_kernel, grid,
        dy, packed, x, dz, partials, *norm, n, tiles_m, g.height, g.width, g.out_h, g.out_w, g.height * g.width,
        g.groups, group_in, group_out, PHASES_W=g.phases[1], IN_UNIT=in_unit, OUT_UNIT=out_unit, PADDED=g.flattened,
        TRANSPOSED=transposed, ACTIVATION=activation, PRECISION=precision, **window(g), **config.options(),
    )  # fmt: skip
    return dz, launch_fold(Partials(partials, tiles_m * phases), g.in_channels, fold_sums_kernel)
