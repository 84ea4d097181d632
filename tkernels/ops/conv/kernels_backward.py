"""Gradients of 2-D convolution on Triton: input gradient, weight and bias gradient, and the activation's derivative.

The input gradient is a dense convolution for each of the stride_h x stride_w residues (phases) of the input's pixels,
so no tap is wasted. The weight gradient reduces over output pixels, cut into runs that separate programs sum into a
float32 workspace; a second kernel adds the runs in a fixed order, so that results do not vary from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tkernels.core import autotune, mode, targets
from tkernels.core import device as common
from tkernels.core.config import Config, cdiv
from tkernels.core.geometry import Geometry
from tkernels.core.launch import launch
from tkernels.ops.batch_norm.kernels import load_scale, raw_gradient
from tkernels.ops.conv import config as tuning
from tkernels.ops.conv.kernels import (
    channel_units,
    empty_pixels,
    is_nhwc,
    locate_pixels,
    pixel_offsets,
    row_pitch,
    window,
)


@triton.jit
def load_gradient(dy_ptr, saved_ptr, offsets, mask, ACTIVATION: tl.constexpr):
    """A tile of dy, or, where ``saved_ptr`` is given, of dy times the activation's derivative, in the dtype of dy."""
    dz = tl.load(dy_ptr + offsets, mask=mask, other=0.0)
    if saved_ptr is not None:
        saved = tl.load(saved_ptr + offsets, mask=mask, other=0.0)
        dz = common.activation_gradient(dz.to(tl.float32), saved.to(tl.float32), ACTIVATION).to(dy_ptr.dtype.element_ty)
    return dz


@triton.jit
def load_raw_gradient(dz_ptr, raw_ptr, mean_ptr, bn_weight_ptr, coefficients_ptr, offsets, mask, channel, mask_c,
                      channels):  # fmt: skip
    """A tile of the gradient of batch norm's input from that of its output (batch_norm's input_gradient_kernel), in
    the dtype of dz; masked lanes hold anything finite."""
    dz = tl.load(dz_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    raw = tl.load(raw_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    mean, scale, _shift = load_scale(mean_ptr, None, bn_weight_ptr, None, channel, mask_c, channels, 0.0)
    dz = raw_gradient(dz, raw, mean, scale, coefficients_ptr, channel, mask_c, channels)
    return dz.to(dz_ptr.dtype.element_ty)


@triton.jit
def phase_taps(phase, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DILATION: tl.constexpr,
               TAP_STEP: tl.constexpr):  # fmt: skip
    """Along one axis, which taps join input positions phase, phase + STRIDE, ... to an output: the first, how many
    (every TAP_STEP-th), and the output that the first tap joins to position ``phase``."""
    if STRIDE == 1:
        return 0, KERNEL, PAD
    first = KERNEL
    for i in tl.static_range(KERNEL):
        first = tl.where((phase + PAD - (KERNEL - 1 - i) * DILATION) % STRIDE == 0, KERNEL - 1 - i, first)
    return first, (KERNEL - first + TAP_STEP - 1) // TAP_STEP, (phase + PAD - first * DILATION) // STRIDE


@triton.jit
def phase_of(pid, images, height, width, PHASES_W: tl.constexpr, WINDOW: tl.constexpr):
    """The phase numbered ``pid``: its first row and column, its pixels and columns in an image, its pixels in all."""
    phase_h = pid // PHASES_W
    phase_w = pid % PHASES_W
    rows = (height - phase_h + WINDOW.stride_h - 1) // WINDOW.stride_h
    cols = (width - phase_w + WINDOW.stride_w - 1) // WINDOW.stride_w
    return phase_h, phase_w, rows * cols, cols, rows * cols * images.to(tl.int64)


@triton.jit
def dgrad_tile(dy_ptr, saved_ptr, w_ptr, pid_m, pid_n, phase_h, phase_w, phase_pixels, cols, pixels, width, out_h,
               out_w, in_pixels, groups, group_in, group_out, PADDED: tl.constexpr, TRANSPOSED: tl.constexpr,
               WINDOW: tl.constexpr, NCHW: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Float32 tile [BLOCK_M input pixels of a phase, BLOCK_N channels of one group] of the input gradient: one loop
    over the phase's taps and blocks of output channels. Then where its elements lie in dx, and which of them exist;
    its channels, and which of them exist. Where dy is multiplied by the activation's derivative it is the right operand
    (kernels/linear.py's input gradient says why)."""
    tiles_n = tl.cdiv(group_in, BLOCK_N)
    group = pid_n // tiles_n
    first = pid_m.to(tl.int64) * BLOCK_M
    image, inside, row, col = locate_pixels(first, phase_pixels, cols, BLOCK_M)
    in_range = first + tl.arange(0, BLOCK_M) < pixels
    offs_n = (pid_n - group * tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < group_in
    COMPUTED: tl.constexpr = saved_ptr is not None
    N_AXIS: tl.constexpr = 0 if COMPUTED else 1  # of the weight's tile
    acc = tl.zeros((BLOCK_N, BLOCK_M) if COMPUTED else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    first_h, count_h, base_h = phase_taps(phase_h, WINDOW.kernel_h, WINDOW.stride_h, WINDOW.pad_h,
                                           WINDOW.dilation_h, WINDOW.tap_step_h)  # fmt: skip
    first_w, count_w, base_w = phase_taps(phase_w, WINDOW.kernel_w, WINDOW.stride_w, WINDOW.pad_w,
                                           WINDOW.dilation_w, WINDOW.tap_step_w)  # fmt: skip
    origin = image * out_h * out_w
    bottom = row + base_h
    right = col + base_w
    steps = tl.cdiv(group_out, BLOCK_K)
    # nothing is assumed of the steps: a phase may have no taps, and where none can be empty ptxas overlaps wgmmas as it
    # is, but spills for the assumption on sm_80
    for step in range(count_h * count_w * steps):
        tap = step // steps
        offs_k = (step - tap * steps) * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < group_out
        tap_h = tap // count_w
        tap_w = tap - tap_h * count_w
        # from one tap of the phase to the next, the output moves back by dilation / gcd(dilation, stride)
        y = bottom - tap_h * (WINDOW.tap_step_h * WINDOW.dilation_h // WINDOW.stride_h)
        x = right - tap_w * (WINDOW.tap_step_w * WINDOW.dilation_w // WINDOW.stride_w)
        joined = in_range & (y >= 0) & (y < out_h) & (x >= 0) & (x < out_w)
        pixel = tl.where(joined, origin + y * out_w + x, 0)
        a = load_gradient(dy_ptr, saved_ptr,
                          pixel[:, None] * (groups * group_out) + (group * group_out + offs_k)[None, :],
                          joined[:, None] & mask_k[None, :], ACTIVATION)  # fmt: skip
        tap = (first_h + tap_h * WINDOW.tap_step_h) * WINDOW.kernel_w + first_w + tap_w * WINDOW.tap_step_w
        if TRANSPOSED:
            w_rows = (group * group_in + offs_n).to(tl.int64) * (WINDOW.taps * group_out)
            offsets = tl.expand_dims(w_rows, 1 - N_AXIS) + tl.expand_dims(tap * group_out + offs_k, N_AXIS)
        else:
            w_rows = (group * group_out + offs_k).to(tl.int64) * row_pitch(WINDOW.taps * group_in, PADDED)
            offsets = tl.expand_dims(w_rows, N_AXIS) + tl.expand_dims(tap * group_in + offs_n, 1 - N_AXIS)
        mask = tl.expand_dims(mask_n, 1 - N_AXIS) & tl.expand_dims(mask_k, N_AXIS)
        w = tl.load(w_ptr + offsets, mask=mask, other=0.0)
        if COMPUTED:
            acc = common.add_product(acc, w, tl.trans(a), PRECISION)
        else:
            acc = common.add_product(acc, a, w, PRECISION)
    channel = group * group_in + offs_n
    channels = groups * group_in
    if WINDOW.stride_h == 1 and WINDOW.stride_w == 1:
        offsets = pixel_offsets(image, inside, first, in_pixels, channels, channel, NCHW, BLOCK_M)
    else:
        spot = (phase_h + row * WINDOW.stride_h) * width + phase_w + col * WINDOW.stride_w
        if NCHW:
            offsets = (image * in_pixels * channels + spot)[:, None] + channel.to(tl.int64)[None, :] * in_pixels
        else:
            offsets = (image * in_pixels + spot)[:, None] * channels + channel[None, :]
    return tl.trans(acc) if COMPUTED else acc, offsets, in_range[:, None] & mask_n[None, :], channel, mask_n


# One program: a tile of dx. Pixels no output touches get 0. Grid: (pixel tiles of the largest phase x channel tiles,
# phases); programs past their phase leave.
@triton.jit(do_not_specialize=["images", "tiles_m", "height", "width", "out_h", "out_w"])
def conv_dgrad_kernel(dy_ptr, saved_ptr, w_ptr, dx_ptr, images, tiles_m, height, width, out_h, out_w, in_pixels, groups,
                      group_in, group_out, PHASES_W: tl.constexpr, IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr,
                      PADDED: tl.constexpr, TRANSPOSED: tl.constexpr, WINDOW: tl.constexpr, NCHW: tl.constexpr,
                      ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                      BLOCK_K: tl.constexpr):  # fmt: skip
    group_in *= IN_UNIT
    group_out *= OUT_UNIT
    phase_h, phase_w, phase_pixels, cols, pixels = phase_of(tl.program_id(1), images, height, width, PHASES_W, WINDOW)
    pid_m, pid_n = common.grouped_tile(tl.program_id(0), tiles_m, groups * tl.cdiv(group_in, BLOCK_N))
    if pid_m.to(tl.int64) * BLOCK_M >= pixels:
        return
    if WINDOW.stride_h == 1 and WINDOW.stride_w == 1:
        phase_pixels, cols = in_pixels, width
    acc, offsets, mask, _channel, _mask_n = dgrad_tile(
        dy_ptr, saved_ptr, w_ptr, pid_m, pid_n, phase_h, phase_w, phase_pixels, cols, pixels, width, out_h, out_w,
        in_pixels, groups, group_in, group_out, PADDED, TRANSPOSED, WINDOW, NCHW, ACTIVATION, PRECISION, BLOCK_M,
        BLOCK_N, BLOCK_K)  # fmt: skip
    tl.store(dx_ptr + offsets, acc.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def wgrad_product(x_ptr, dy_ptr, saved_ptr, mean_ptr, bn_weight_ptr, coefficients_ptr, first, last, group, offs_r,
                  mask_r, offs_o, mask_o, height, width, out_w, out_pixels, group_in, channels_in, channels_out,
                  x_stride_n, x_stride_c, x_stride_h, x_stride_w, FLAT: tl.constexpr, OUT_ON_ROWS: tl.constexpr,
                  ACTIVATION: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):  # fmt: skip
    """Float32 tile of the weight gradient, summed over pixels first .. last - 1: (tap, input channel) ``offs_r``
    against output channel ``offs_o``, the latter along M if OUT_ON_ROWS. The left operand is loaded through transposed
    pointers: the one along M, unless that one alone is computed (kernels/linear.py's input gradient says why)."""
    CAST: tl.constexpr = x_ptr.dtype.element_ty != dy_ptr.dtype.element_ty
    COMPUTED: tl.constexpr = saved_ptr is not None
    DZ_LEFT: tl.constexpr = OUT_ON_ROWS if CAST == COMPUTED else CAST
    acc = tl.zeros((BLOCK_M, BLOCK_N) if DZ_LEFT == OUT_ON_ROWS else (BLOCK_N, BLOCK_M), dtype=tl.float32)
    R_AXIS: tl.constexpr = 1 if DZ_LEFT else 0
    P_AXIS: tl.constexpr = 1 - R_AXIS  # the pixels' axis of x's tile; dy's tile has it on the other one
    tap = offs_r // group_in
    shift_h = tl.expand_dims(tap // WINDOW.kernel_w * WINDOW.dilation_h - WINDOW.pad_h, P_AXIS)
    shift_w = tl.expand_dims(tap % WINDOW.kernel_w * WINDOW.dilation_w - WINDOW.pad_w, P_AXIS)
    x_channel = tl.expand_dims(group * group_in + offs_r % group_in, P_AXIS)
    x_mask = tl.expand_dims(mask_r, P_AXIS)
    dy_channel = tl.expand_dims(offs_o, R_AXIS)
    dy_mask = tl.expand_dims(mask_o, R_AXIS)
    image, _inside, row, col = locate_pixels(first, out_pixels, out_w, BLOCK_P)
    pixels = (last - first).to(tl.int32)
    tl.assume(pixels > 0)
    for p in range(0, pixels, BLOCK_P):
        pixel = first + p + tl.arange(0, BLOCK_P)
        mask_p = pixel < last
        y = tl.expand_dims(row * WINDOW.stride_h, R_AXIS) + shift_h
        x = tl.expand_dims(col * WINDOW.stride_w, R_AXIS) + shift_w
        in_image = x_mask & tl.expand_dims(mask_p, R_AXIS) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        if FLAT:
            origin = tl.expand_dims(tl.where(mask_p, image, 0) * x_stride_n, R_AXIS)
            spot = tl.where(in_image, y.to(tl.int64) * x_stride_h + x.to(tl.int64) * x_stride_w, 0)
            x_offsets = origin + spot + x_channel.to(tl.int64) * x_stride_c
        else:
            origin = tl.expand_dims(image * height * width, R_AXIS)
            x_offsets = tl.where(in_image, origin + y * width + x, 0) * channels_in + x_channel
        x_tile = tl.load(x_ptr + x_offsets, mask=in_image, other=0.0).to(dy_ptr.dtype.element_ty)
        dy_offsets = tl.expand_dims(pixel * channels_out, P_AXIS) + dy_channel
        mask = tl.expand_dims(mask_p, P_AXIS) & dy_mask
        if coefficients_ptr is not None:
            dz = load_raw_gradient(dy_ptr, saved_ptr, mean_ptr, bn_weight_ptr, coefficients_ptr, dy_offsets, mask,
                                   dy_channel, dy_mask, channels_out)  # fmt: skip
        else:
            dz = load_gradient(dy_ptr, saved_ptr, dy_offsets, mask, ACTIVATION)
        if DZ_LEFT:
            acc = common.add_product(acc, dz, x_tile, PRECISION)
        else:
            acc = common.add_product(acc, x_tile, dz, PRECISION)
        image, row, col = advance_pixels(image, row, col, out_pixels, out_w, BLOCK_P)
    return acc if DZ_LEFT == OUT_ON_ROWS else tl.trans(acc)


@triton.jit
def advance_pixels(image, row, col, image_pixels, width, STEP: tl.constexpr):
    """The positions STEP pixels further on, without a vector division."""
    images = STEP // image_pixels
    rest = STEP - images * image_pixels
    rows = rest // width
    col += rest - rows * width
    wrapped = col >= width
    col = tl.where(wrapped, col - width, col)
    row += rows + wrapped.to(tl.int32)
    height = image_pixels // width
    wrapped = row >= height
    row = tl.where(wrapped, row - height, row)
    return image + images + wrapped.to(tl.int64), row, col


# One program: over one run of pixels, a [BLOCK_M, BLOCK_N] tile of one group's weight gradient or, in the last
# bias_tiles programs of the first axis, the sums of BLOCK_B channels of dz. A run's workspace: [groups, M, N] weight
# sums (output channels along M if OUT_ON_ROWS), then [C_out] bias sums. With coefficients_ptr, dy is the gradient of a
# batch norm's output and saved its input: it goes through as it is loaded. Grid: (weight tiles + bias tiles, runs).
@triton.jit(do_not_specialize=["pixels", "run", "weight_tiles", "height", "width", "out_w", "x_stride_n"])
def conv_wgrad_kernel(x_ptr, dy_ptr, saved_ptr, mean_ptr, bn_weight_ptr, coefficients_ptr, workspace_ptr, pixels, run,
                      weight_tiles, workspace_size, weight_size, height, width, out_w, out_pixels, groups, group_in,
                      group_out, x_stride_n, x_stride_c, x_stride_h, x_stride_w, IN_UNIT: tl.constexpr,
                      OUT_UNIT: tl.constexpr, FLAT: tl.constexpr, OUT_ON_ROWS: tl.constexpr, ACTIVATION: tl.constexpr,
                      WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                      BLOCK_P: tl.constexpr, BLOCK_B: tl.constexpr):  # fmt: skip
    group_in *= IN_UNIT
    group_out *= OUT_UNIT
    channels_out = groups * group_out
    first = tl.program_id(1).to(tl.int64) * run
    last = tl.minimum(first + run, pixels)
    workspace_ptr += tl.program_id(1).to(tl.int64) * workspace_size
    tile = tl.program_id(0)
    reduction = WINDOW.taps * group_in
    if tile >= weight_tiles:
        offs_b = (tile - weight_tiles) * BLOCK_B + tl.arange(0, BLOCK_B)
        sums = channel_sums(dy_ptr, saved_ptr, first, last, offs_b, channels_out, ACTIVATION, BLOCK_P, BLOCK_B)
        tl.store(workspace_ptr + weight_size + offs_b, sums, mask=offs_b < channels_out)
        return
    rows = group_out if OUT_ON_ROWS else reduction
    cols = reduction if OUT_ON_ROWS else group_out
    tiles_n = tl.cdiv(cols, BLOCK_N)
    tiles = tl.cdiv(rows, BLOCK_M) * tiles_n
    group = tile // tiles
    tile -= group * tiles
    offs_m = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < rows
    mask_n = offs_n < cols
    offs_r, mask_r, offs_o, mask_o = offs_m, mask_m, offs_n, mask_n
    if OUT_ON_ROWS:
        offs_r, mask_r, offs_o, mask_o = offs_n, mask_n, offs_m, mask_m
    acc = wgrad_product(x_ptr, dy_ptr, saved_ptr, mean_ptr, bn_weight_ptr, coefficients_ptr, first, last, group, offs_r,
                        mask_r, group * group_out + offs_o, mask_o, height, width, out_w, out_pixels, group_in,
                        groups * group_in, channels_out, x_stride_n, x_stride_c, x_stride_h, x_stride_w, FLAT,
                        OUT_ON_ROWS, ACTIVATION, WINDOW, PRECISION, BLOCK_M, BLOCK_N, BLOCK_P)  # fmt: skip
    offsets = (group * rows + offs_m).to(tl.int64)[:, None] * cols + offs_n[None, :]
    tl.store(workspace_ptr + offsets, acc, mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def channel_sums(dy_ptr, saved_ptr, first, last, offs_c, channels, ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr,
                 BLOCK_C: tl.constexpr):  # fmt: skip
    """Float32 sums [BLOCK_C] of dz over pixels first .. last - 1."""
    acc = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for p in range(0, (last - first).to(tl.int32), BLOCK_P):
        pixel = first + p + tl.arange(0, BLOCK_P)
        mask = (pixel < last)[:, None] & (offs_c < channels)[None, :]
        acc += load_gradient(dy_ptr, saved_ptr, pixel[:, None] * channels + offs_c[None, :], mask, ACTIVATION)
    return tl.sum(acc, axis=0)


@triton.jit
def merge_tile(pid, workspace_ptr, dw_ptr, db_ptr, runs, size, weight_size, rows, cols, group_in, group_out,
               dw_stride_o, dw_stride_i, dw_stride_h, dw_stride_w, KERNEL_W: tl.constexpr, OUT_ON_ROWS: tl.constexpr,
               BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """BLOCK elements of the weight's or the bias's gradient, summed over all runs, BLOCK_S at a time, and written in
    the gradient's own layout and dtype."""
    offs = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    acc = tl.zeros((BLOCK_S, BLOCK), dtype=tl.float32)
    for s in range(0, runs, BLOCK_S):
        run = s + tl.arange(0, BLOCK_S)
        acc += tl.load(workspace_ptr + run.to(tl.int64)[:, None] * size + offs[None, :],
                       mask=(run < runs)[:, None] & mask[None, :], other=0.0)  # fmt: skip
    total = tl.sum(acc, axis=0)
    if dw_ptr is not None:
        row = offs // cols
        group = row // rows
        if OUT_ON_ROWS:
            channel_out = row
            within = offs % cols
        else:
            channel_out = group * group_out + offs % cols
            within = row % rows
        tap = within // group_in
        offsets = (channel_out * dw_stride_o + within % group_in * dw_stride_i + tap // KERNEL_W * dw_stride_h
                   + tap % KERNEL_W * dw_stride_w)  # fmt: skip
        tl.store(dw_ptr + offsets, total.to(dw_ptr.dtype.element_ty), mask=offs < weight_size)
    if db_ptr is not None:
        tl.store(db_ptr + (offs - weight_size), total.to(db_ptr.dtype.element_ty), mask=mask & (offs >= weight_size))


# One program: merge_tile of a workspace. Grid: (blocks of its elements,).
@triton.jit(do_not_specialize=["runs"])
def conv_merge_kernel(workspace_ptr, dw_ptr, db_ptr, runs, size, weight_size, rows, cols, group_in, group_out,
                      dw_stride_o, dw_stride_i, dw_stride_h, dw_stride_w, KERNEL_W: tl.constexpr,
                      OUT_ON_ROWS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    merge_tile(tl.program_id(0), workspace_ptr, dw_ptr, db_ptr, runs, size, weight_size, rows, cols, group_in,
               group_out, dw_stride_o, dw_stride_i, dw_stride_h, dw_stride_w, KERNEL_W, OUT_ON_ROWS, BLOCK_S,
               BLOCK)  # fmt: skip


# One program: a [BLOCK_P pixels, BLOCK_C channels] tile of dz = dy * activation'(saved), NHWC, from dy of any strides
# and saved of either memory format. Grid: (pixel tiles, channel tiles).
@triton.jit(do_not_specialize=["pixels", "width", "dy_stride_n"])
def conv_mask_kernel(dy_ptr, saved_ptr, dz_ptr, pixels, width, image_pixels, channels, dy_stride_n, dy_stride_c,
                     dy_stride_h, dy_stride_w, NCHW: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr,
                     BLOCK_C: tl.constexpr):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK_P
    image, inside, row, col = locate_pixels(first, image_pixels, width, BLOCK_P)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (first + tl.arange(0, BLOCK_P) < pixels)[:, None] & (offs_c < channels)[None, :]
    spot = image * dy_stride_n + row.to(tl.int64) * dy_stride_h + col.to(tl.int64) * dy_stride_w
    dy = tl.load(dy_ptr + spot[:, None] + offs_c.to(tl.int64)[None, :] * dy_stride_c, mask=mask, other=0.0)
    saved_offsets = pixel_offsets(image, inside, first, image_pixels, channels, offs_c, NCHW, BLOCK_P)
    saved = tl.load(saved_ptr + saved_offsets, mask=mask, other=0.0)
    dz = common.activation_gradient(dy.to(tl.float32), saved.to(tl.float32), ACTIVATION)
    offsets = pixel_offsets(image, inside, first, image_pixels, channels, offs_c, False, BLOCK_P)
    tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask=mask)


def launch_mask(dy: Tensor, saved: Tensor, activation: str, config: Config | None = None) -> Tensor:
    """dz = dy times the activation's derivative, NHWC. ``saved``: dense in one of the two formats."""
    dz = empty_pixels(dy, tuple(dy.shape), dy.dtype, channels_last=True)
    activation_gradient(dy, saved, dz, activation, config)
    return dz


def activation_gradient(dy: Tensor, saved: Tensor, dz: Tensor, activation: str, config: Config | None = None) -> None:
    """Writes what launch_mask returns."""
    n, channels, height, width = dy.shape
    if dz.numel() == 0:
        return
    config = config or tuning.mask(channels)
    pixels = n * height * width
    grid = (cdiv(pixels, config["BLOCK_P"]), cdiv(channels, config["BLOCK_C"]))
    launch(
        conv_mask_kernel, grid,
        dy, saved, dz, pixels, width, height * width, channels, *dy.stride(), NCHW=not is_nhwc(saved),
        ACTIVATION=activation, **config.options(),
    )  # fmt: skip


def launch_dgrad(dy: Tensor, packed: Tensor, g: Geometry, dtype: torch.dtype, channels_last: bool = True,
                 transposed: bool = False, saved: Tensor | None = None, activation: str | None = None,
                 config: Config | None = None) -> Tensor:  # fmt: skip
    """dx, [N, C, H, W] in ``dtype``, in the memory format ``channels_last`` says.

    ``dy``: NHWC. ``packed``: from launch_pack, with the same ``transposed``. ``saved``: NHWC, where dy is still to be
    multiplied by the activation's derivative.
    """
    dx = empty_pixels(dy, (dy.shape[0], g.in_channels, g.height, g.width), dtype, channels_last)
    input_gradient(dy, packed, dx, g, channels_last, transposed, saved, activation, config)
    return dx


def input_gradient(dy: Tensor, packed: Tensor, dx: Tensor, g: Geometry, channels_last: bool, transposed: bool,
                   saved: Tensor | None, activation: str | None, config: Config | None = None) -> None:  # fmt: skip
    """Writes dx; arguments as launch_dgrad's."""
    if dx.numel() == 0:
        return
    n = dy.shape[0]
    precision = mode.dot_precision(dy.dtype, "conv")
    config = config or autotune.pick(
        "conv2d dgrad", n, (g, dy.dtype, precision, activation, channels_last),
        tuning.dgrad(g, dy.dtype, precision, targets.current(), saved is not None, channels_last),
        lambda c: input_gradient(dy, packed, dx, g, channels_last, transposed, saved, activation, c), dy,
    )  # fmt: skip
    group_in, group_out, in_unit, out_unit = channel_units(g)
    largest = n * cdiv(g.height, g.stride_h) * cdiv(g.width, g.stride_w)
    tiles_m = cdiv(largest, config["BLOCK_M"])
    phases_h, phases_w = g.phases
    grid = (tiles_m * g.groups * cdiv(g.group_in, config["BLOCK_N"]), phases_h * phases_w)
    launch(
        conv_dgrad_kernel, grid,
        dy, saved, packed, dx, n, tiles_m, g.height, g.width, g.out_h, g.out_w, g.height * g.width, g.groups,
        group_in, group_out, PHASES_W=phases_w, IN_UNIT=in_unit, OUT_UNIT=out_unit, PADDED=g.flattened,
        TRANSPOSED=transposed, NCHW=not channels_last, ACTIVATION=activation, PRECISION=precision, **window(g),
        **config.options(),
    )  # fmt: skip


def launch_wgrad(x: Tensor, dy: Tensor, g: Geometry, needs_weight: bool = True, needs_bias: bool = True,
                 saved: Tensor | None = None, activation: str | None = None, config: Config | None = None,
                 runs: int | None = None, through: Sequence[Tensor | None] = (None, None, None)
                 ) -> Tensor:  # fmt: skip
    """The workspace [runs, weight sums and bias sums] that launch_merge turns into the gradients.

    ``x``: as in launch_forward. ``dy``: NHWC. ``saved``: as in launch_dgrad. ``runs``: into how many runs the pixels
    are cut (at most). ``through``: the statistics, weight and coefficients of a batch norm that dy has yet to go
    through, with ``saved`` its input; no bias gradient then.
    """
    precision = mode.dot_precision(dy.dtype, "conv")
    config = config or autotune.pick(
        "conv2d wgrad", dy.shape[0], (g, dy.dtype, precision, activation, needs_weight, needs_bias),
        tuning.wgrad(g, dy.dtype, precision, targets.current(), saved is not None, plain=True),
        lambda c: launch_wgrad(x, dy, g, needs_weight, needs_bias, saved, activation, c, runs, through), dy,
    )  # fmt: skip
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    rows, cols, out_on_rows = tuning.wgrad_sides(g)
    weight_tiles = g.groups * cdiv(rows, block_m) * cdiv(cols, block_n) if needs_weight else 0
    block_b = min(block_m, block_n)
    tiles = weight_tiles + (cdiv(g.out_channels, block_b) if needs_bias else 0)
    weight_size = g.out_channels * g.reduction if needs_weight else 0
    size = weight_size + (g.out_channels if needs_bias else 0)
    pixels = dy.shape[0] * g.out_h * g.out_w
    if pixels == 0:  # the kernel takes a run to have some
        return dy.new_zeros((1, size), dtype=torch.float32)
    run, runs = tuning.runs(pixels, tiles, config, size * 4, targets.current(), runs)
    workspace = dy.new_empty((runs, size), dtype=torch.float32)
    group_in, group_out, in_unit, out_unit = channel_units(g)
    strides = x.stride() if g.flattened else (0, 0, 0, 0)
    launch(
        conv_wgrad_kernel, (tiles, runs),
        x, dy, saved, *through, workspace, pixels, run, weight_tiles, size, weight_size, g.height, g.width, g.out_w,
        g.out_h * g.out_w, g.groups, group_in, group_out, *strides, IN_UNIT=in_unit, OUT_UNIT=out_unit,
        FLAT=g.flattened, OUT_ON_ROWS=out_on_rows, ACTIVATION=activation, PRECISION=precision, BLOCK_B=block_b,
        **window(g), **config.options(),
    )  # fmt: skip
    return workspace


def launch_merge(workspace: Tensor, g: Geometry, weight: Tensor | None, bias: Tensor | None,
                 config: Config | None = None) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(dw, db) from a workspace, each like the given ``weight`` and ``bias`` in layout and dtype, or None."""
    dw = torch.empty_like(weight) if weight is not None else None
    db = torch.empty_like(bias) if bias is not None else None
    merge(workspace, dw, db, g, config)
    return dw, db


def merge(workspace: Tensor, dw: Tensor | None, db: Tensor | None, g: Geometry,
          config: Config | None = None) -> None:  # fmt: skip
    """Writes dw and db, the sums of a workspace's runs."""
    runs, size = workspace.shape
    weight_size = g.out_channels * g.reduction if dw is not None else 0
    config = config or tuning.merge(size)
    rows, cols, out_on_rows = tuning.wgrad_sides(g)
    strides = dw.stride() if dw is not None else (0, 0, 0, 0)
    launch(
        conv_merge_kernel, (cdiv(size, config["BLOCK"]),),
        workspace, dw, db, runs, size, weight_size, rows, cols, g.group_in, g.group_out,
        *strides, KERNEL_W=g.kernel_w, OUT_ON_ROWS=out_on_rows, **config.options(),
    )  # fmt: skip
