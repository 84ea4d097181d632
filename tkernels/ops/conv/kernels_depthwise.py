"""Depthwise 2-D convolution on Triton: every group has one input channel, so there is no matrix product to share.

Tiles are [pixels, channels] with channels contiguous; each tap is one multiplication. Output channel o reads input
channel o // MULTIPLIER. Weights are read through their strides, in their own dtype.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tkernels.core import device as common
from tkernels.core import targets
from tkernels.core.config import Config, cdiv
from tkernels.core.geometry import Geometry
from tkernels.core.launch import launch
from tkernels.ops.conv import config as tuning
from tkernels.ops.conv.kernels import empty_pixels, locate_pixels, pixel_offsets, window
from tkernels.ops.conv.kernels_backward import advance_pixels, phase_of, phase_taps


# One program: a [BLOCK_P output pixels, BLOCK_C output channels] tile of y = activation(conv(x, w) + bias) and, where
# z_ptr is given, of the activation's input. Grid: (pixel tiles, channel tiles).
@triton.jit(do_not_specialize=["pixels", "height", "width", "out_w"])
def conv_depthwise_forward_kernel(x_ptr, w_ptr, bias_ptr, y_ptr, z_ptr, pixels, height, width, out_w, out_pixels,
                                  channels_in, w_stride_o, w_stride_h, w_stride_w, UNIT: tl.constexpr,
                                  MULTIPLIER: tl.constexpr, WINDOW: tl.constexpr, NCHW: tl.constexpr,
                                  ACTIVATION: tl.constexpr, UNROLL: tl.constexpr, BLOCK_P: tl.constexpr,
                                  BLOCK_C: tl.constexpr):  # fmt: skip
    channels_in *= UNIT
    channels_out = channels_in * MULTIPLIER
    first = tl.program_id(0).to(tl.int64) * BLOCK_P
    image, inside, row, col = locate_pixels(first, out_pixels, out_w, BLOCK_P)
    in_range = first + tl.arange(0, BLOCK_P) < pixels
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels_out
    origin = image * height * width
    top = row * WINDOW.stride_h - WINDOW.pad_h
    left = col * WINDOW.stride_w - WINDOW.pad_w
    acc = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for tap in tl.range(0, WINDOW.taps, loop_unroll_factor=UNROLL):
        y = top + tap // WINDOW.kernel_w * WINDOW.dilation_h
        x = left + tap % WINDOW.kernel_w * WINDOW.dilation_w
        ok = in_range & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        pixel = tl.where(ok, origin + y * width + x, 0)
        value = tl.load(x_ptr + pixel[:, None] * channels_in + (offs_c // MULTIPLIER)[None, :],
                        mask=ok[:, None] & mask_c[None, :], other=0.0)  # fmt: skip
        spot = tap // WINDOW.kernel_w * w_stride_h + tap % WINDOW.kernel_w * w_stride_w
        w = tl.load(w_ptr + offs_c.to(tl.int64) * w_stride_o + spot, mask=mask_c, other=0.0)
        acc += value.to(tl.float32) * w.to(tl.float32)[None, :]
    if bias_ptr is not None:
        acc += common.load_bias(bias_ptr, offs_c, mask_c, y_ptr)[None, :]
    offsets = pixel_offsets(image, inside, first, out_pixels, channels_out, offs_c, NCHW, BLOCK_P)
    mask = in_range[:, None] & mask_c[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + offsets, acc.to(z_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + offsets, common.activate(acc, ACTIVATION).to(y_ptr.dtype.element_ty), mask=mask)


# One program: a [BLOCK_P input pixels of one phase, BLOCK_C input channels] tile of dx; pixels no output touches get
# 0. Grid: (pixel tiles of the largest phase, channel tiles, phases); programs past their phase leave.
@triton.jit(do_not_specialize=["images", "height", "width", "out_h", "out_w"])
def conv_depthwise_dgrad_kernel(dy_ptr, w_ptr, dx_ptr, images, height, width, out_h, out_w, in_pixels, channels_in,
                                w_stride_o, w_stride_h, w_stride_w, PHASES_W: tl.constexpr, UNIT: tl.constexpr,
                                MULTIPLIER: tl.constexpr, WINDOW: tl.constexpr, NCHW: tl.constexpr,
                                BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    channels_in *= UNIT
    channels_out = channels_in * MULTIPLIER
    phase_h, phase_w, phase_pixels, cols, pixels = phase_of(tl.program_id(2), images, height, width, PHASES_W, WINDOW)
    first = tl.program_id(0).to(tl.int64) * BLOCK_P
    if first >= pixels:
        return
    image, inside, row, col = locate_pixels(first, phase_pixels, cols, BLOCK_P)
    in_range = first + tl.arange(0, BLOCK_P) < pixels
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels_in
    first_h, count_h, base_h = phase_taps(phase_h, WINDOW.kernel_h, WINDOW.stride_h, WINDOW.pad_h,
                                           WINDOW.dilation_h, WINDOW.tap_step_h)  # fmt: skip
    first_w, count_w, base_w = phase_taps(phase_w, WINDOW.kernel_w, WINDOW.stride_w, WINDOW.pad_w,
                                           WINDOW.dilation_w, WINDOW.tap_step_w)  # fmt: skip
    origin = image * out_h * out_w
    acc = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for step in range(count_h * count_w * MULTIPLIER):
        tap = step // MULTIPLIER
        channel = offs_c * MULTIPLIER + step % MULTIPLIER
        tap_h = tap // count_w
        tap_w = tap - tap_h * count_w
        y = row + base_h - tap_h * (WINDOW.tap_step_h * WINDOW.dilation_h // WINDOW.stride_h)
        x = col + base_w - tap_w * (WINDOW.tap_step_w * WINDOW.dilation_w // WINDOW.stride_w)
        ok = in_range & (y >= 0) & (y < out_h) & (x >= 0) & (x < out_w)
        pixel = tl.where(ok, origin + y * out_w + x, 0)
        dy = tl.load(dy_ptr + pixel[:, None] * channels_out + channel[None, :],
                     mask=ok[:, None] & mask_c[None, :], other=0.0)  # fmt: skip
        spot = (first_h + tap_h * WINDOW.tap_step_h) * w_stride_h + (first_w + tap_w * WINDOW.tap_step_w) * w_stride_w
        w = tl.load(w_ptr + channel.to(tl.int64) * w_stride_o + spot, mask=mask_c, other=0.0)
        acc += dy.to(tl.float32) * w.to(tl.float32)[None, :]
    if WINDOW.stride_h != 1 or WINDOW.stride_w != 1:
        inside = (phase_h + row * WINDOW.stride_h) * width + phase_w + col * WINDOW.stride_w
    if NCHW:
        offsets = (image * in_pixels * channels_in + inside)[:, None] + offs_c.to(tl.int64)[None, :] * in_pixels
    else:
        offsets = (image * in_pixels + inside)[:, None] * channels_in + offs_c[None, :]
    tl.store(dx_ptr + offsets, acc.to(dx_ptr.dtype.element_ty), mask=in_range[:, None] & mask_c[None, :])


# One program: over one run of pixels, the weight gradient of BLOCK_T taps and BLOCK_C output channels and, in the
# first block of taps, the bias gradient. A run's workspace: [taps, C_out] weight sums, then [C_out] bias sums.
# Grid: (blocks of taps, channel tiles, runs).
@triton.jit(do_not_specialize=["pixels", "run", "height", "width", "out_w"])
def conv_depthwise_wgrad_kernel(x_ptr, dy_ptr, workspace_ptr, pixels, run, workspace_size, height, width, out_w,
                                out_pixels, channels_in, UNIT: tl.constexpr, MULTIPLIER: tl.constexpr,
                                HAS_BIAS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_T: tl.constexpr,
                                BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    channels_in *= UNIT
    channels_out = channels_in * MULTIPLIER
    first = tl.program_id(2).to(tl.int64) * run
    last = tl.minimum(first + run, pixels)
    workspace_ptr += tl.program_id(2).to(tl.int64) * workspace_size
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels_out
    shift_h = (offs_t // WINDOW.kernel_w * WINDOW.dilation_h - WINDOW.pad_h)[:, None]
    shift_w = (offs_t % WINDOW.kernel_w * WINDOW.dilation_w - WINDOW.pad_w)[:, None]
    acc = tl.zeros((BLOCK_T, BLOCK_P, BLOCK_C), dtype=tl.float32)
    acc_b = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    image, _inside, row, col = locate_pixels(first, out_pixels, out_w, BLOCK_P)
    for p in range(0, (last - first).to(tl.int32), BLOCK_P):
        pixel = first + p + tl.arange(0, BLOCK_P)
        mask_p = pixel < last
        dy = tl.load(dy_ptr + pixel[:, None] * channels_out + offs_c[None, :], mask=mask_p[:, None] & mask_c[None, :],
                     other=0.0).to(tl.float32)  # fmt: skip
        y = row[None, :] * WINDOW.stride_h + shift_h
        x = col[None, :] * WINDOW.stride_w + shift_w
        ok = (offs_t < WINDOW.taps)[:, None] & mask_p[None, :] & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        source = tl.where(ok, (image * height * width)[None, :] + y * width + x, 0)
        value = tl.load(x_ptr + source[:, :, None] * channels_in + (offs_c // MULTIPLIER)[None, None, :],
                        mask=ok[:, :, None] & mask_c[None, None, :], other=0.0)  # fmt: skip
        acc += value.to(tl.float32) * dy[None, :, :]
        if HAS_BIAS:
            acc_b += dy
        image, row, col = advance_pixels(image, row, col, out_pixels, out_w, BLOCK_P)
    offsets = offs_t.to(tl.int64)[:, None] * channels_out + offs_c[None, :]
    tl.store(workspace_ptr + offsets, tl.sum(acc, axis=1), mask=(offs_t < WINDOW.taps)[:, None] & mask_c[None, :])
    if HAS_BIAS:
        bias_ptr = workspace_ptr + channels_out.to(tl.int64) * WINDOW.taps
        tl.store(bias_ptr + offs_c, tl.sum(acc_b, axis=0), mask=mask_c & (tl.program_id(0) == 0))


@functools.lru_cache(maxsize=4096)
def _unit(g: Geometry) -> tuple[int, int, int]:
    """Input channels with their unit taken out, the unit, and output channels for each input channel."""
    unit = tuning.unit(g.in_channels)
    return g.in_channels // unit, unit, g.group_out


def launch_forward(x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry, activation: str | None = None,
                   keep_input: bool = False, channels_last: bool = True,
                   config: Config | None = None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """y = activation(conv(x, w) + bias), and the activation's input if ``keep_input``.

    ``x``: NHWC, its dtype is the output's. ``weight``: [C_out, 1, kernel_h, kernel_w], any strides and dtype.
    """
    shape = (x.shape[0], g.out_channels, g.out_h, g.out_w)
    y = empty_pixels(x, shape, x.dtype, channels_last)
    z = empty_pixels(x, shape, x.dtype, channels_last) if keep_input else None
    forward(x, weight, bias, y, z, g, activation, channels_last, config)
    return y, z


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, z: Tensor | None, g: Geometry,
            activation: str | None, channels_last: bool, config: Config | None = None) -> None:  # fmt: skip
    """Writes y and z; arguments as launch_forward's."""
    if y.numel() == 0:
        return
    config = config or tuning.depthwise(g.out_channels, targets.current())
    channels, unit, multiplier = _unit(g)
    out_pixels = g.out_h * g.out_w
    pixels = x.shape[0] * out_pixels
    grid = (cdiv(pixels, config["BLOCK_P"]), cdiv(g.out_channels, config["BLOCK_C"]))
    stride_o, _, stride_h, stride_w = weight.stride()
    launch(
        conv_depthwise_forward_kernel, grid,
        x, weight, bias, y, z, pixels, g.height, g.width, g.out_w, out_pixels, channels, stride_o, stride_h,
        stride_w, UNIT=unit, MULTIPLIER=multiplier, NCHW=not channels_last, ACTIVATION=activation,
        UNROLL=g.kernel_w if g.kernel_w <= 7 else 1, **window(g), **config.options(),
    )  # fmt: skip


def launch_dgrad(dy: Tensor, weight: Tensor, g: Geometry, dtype: torch.dtype, channels_last: bool = True,
                 config: Config | None = None) -> Tensor:  # fmt: skip
    """dx, [N, C, H, W] in ``dtype``, in the memory format ``channels_last`` says. ``dy``: NHWC."""
    dx = empty_pixels(dy, (dy.shape[0], g.in_channels, g.height, g.width), dtype, channels_last)
    input_gradient(dy, weight, dx, g, channels_last, config)
    return dx


def input_gradient(dy: Tensor, weight: Tensor, dx: Tensor, g: Geometry, channels_last: bool,
                   config: Config | None = None) -> None:  # fmt: skip
    """Writes dx; arguments as launch_dgrad's."""
    if dx.numel() == 0:
        return
    n = dy.shape[0]
    config = config or tuning.depthwise(g.in_channels, targets.current())
    channels, unit, multiplier = _unit(g)
    largest = n * cdiv(g.height, g.stride_h) * cdiv(g.width, g.stride_w)
    phases_h, phases_w = g.phases
    grid = (cdiv(largest, config["BLOCK_P"]), cdiv(g.in_channels, config["BLOCK_C"]), phases_h * phases_w)
    stride_o, _, stride_h, stride_w = weight.stride()
    launch(
        conv_depthwise_dgrad_kernel, grid,
        dy, weight, dx, n, g.height, g.width, g.out_h, g.out_w, g.height * g.width, channels, stride_o, stride_h,
        stride_w, PHASES_W=phases_w, UNIT=unit, MULTIPLIER=multiplier, NCHW=not channels_last, **window(g),
        **config.options(),
    )  # fmt: skip


def launch_wgrad(x: Tensor, dy: Tensor, g: Geometry, needs_bias: bool = True, config: Config | None = None,
                 runs: int | None = None) -> Tensor:  # fmt: skip
    """The workspace [runs, weight sums and bias sums] that conv_backward.launch_merge turns into the gradients."""
    config = config or tuning.depthwise_wgrad(g)
    block_p = config["BLOCK_P"]
    tiles = (cdiv(g.taps, config["BLOCK_T"]), cdiv(g.out_channels, config["BLOCK_C"]))
    size = g.out_channels * (g.taps + needs_bias)
    pixels = dy.shape[0] * g.out_h * g.out_w
    runs = runs or tuning.splits(pixels, tiles[0] * tiles[1], block_p, size * 4, targets.current())
    run = max(cdiv(cdiv(pixels, runs), block_p), 1) * block_p
    runs = max(cdiv(pixels, run), 1)
    workspace = dy.new_empty((runs, size), dtype=torch.float32)
    channels, unit, multiplier = _unit(g)
    launch(
        conv_depthwise_wgrad_kernel, (*tiles, runs),
        x, dy, workspace, pixels, run, size, g.height, g.width, g.out_w, g.out_h * g.out_w, channels, UNIT=unit,
        MULTIPLIER=multiplier, HAS_BIAS=needs_bias, **window(g), **config.options(),
    )  # fmt: skip
    return workspace
