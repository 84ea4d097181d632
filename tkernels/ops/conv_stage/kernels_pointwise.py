"""1x1 convolutions of a conv stage that normalise and activate their input as they load it.

The layer before leaves its raw output; its activation of batch_norm(x) is formed in the prologue of the two products
that read it, forward and weight gradient, and never stored. Maps are NHWC, which here is a matrix [pixels, channels].

In both the computed operand is the right one, as in kernels/linear.py's input gradient, and for its reason.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tkernels.core import device as common
from tkernels.core import mode, targets
from tkernels.core.config import Config, cdiv
from tkernels.core.geometry import Geometry
from tkernels.core.launch import launch
from tkernels.core.records import Norm, Partials
from tkernels.ops.batch_norm.kernels import count_batch, load_scale
from tkernels.ops.conv import config as conv_tuning
from tkernels.ops.conv.kernels import channel_units, empty_pixels
from tkernels.ops.conv_stage import config as tuning
from tkernels.ops.conv_stage.kernels import fold_statistics_kernel, launch_fold, tile_statistics


@triton.jit
def load_activation(x_ptr, offsets, mask, mean, scale, shift, ACTIVATION: tl.constexpr, dtype: tl.constexpr):
    """activation(batch_norm(x)) in ``dtype``, as the unfused pass would store it; 0 where masked."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, common.activate(tl.fma(x - mean, scale, shift), ACTIVATION), 0.0).to(dtype)


# One program: a [BLOCK_M pixels, BLOCK_N output channels] tile of y = activation(batch_norm(x)) @ w^T + bias and its
# statistics, in the form of conv_stage_kernel's. Grid: (pixel tiles x channel tiles,), grouped for L2.
@triton.jit(do_not_specialize=["eps", "pixels", "tiles_m"])
def pointwise_forward_kernel(x_ptr, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps, w_ptr, bias_ptr, y_ptr,
                             partials_ptr, counter_ptr, pixels, tiles_m, channels_in, channels_out,
                             IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, ACTIVATION: tl.constexpr,
                             PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                             BLOCK_K: tl.constexpr):  # fmt: skip
    channels_in *= IN_UNIT
    channels_out *= OUT_UNIT
    count_batch(counter_ptr)
    pid_m, pid_n = common.grouped_tile(tl.program_id(0), tiles_m, tl.cdiv(channels_out, BLOCK_N))
    first = pid_m.to(tl.int64) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    in_range = rows < pixels
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < channels_out
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    tl.assume(channels_in > 0)
    for k in range(0, channels_in, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < channels_in
        mean, scale, shift = load_scale(mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, offs_k, mask_k, channels_in,
                                        eps)  # fmt: skip
        a = load_activation(x_ptr, rows[:, None] * channels_in + offs_k[None, :],
                            in_range[:, None] & mask_k[None, :], mean[None, :], scale[None, :], shift[None, :],
                            ACTIVATION, w_ptr.dtype.element_ty)  # fmt: skip
        w = tl.load(w_ptr + offs_n.to(tl.int64)[:, None] * channels_in + offs_k[None, :],
                    mask=mask_n[:, None] & mask_k[None, :], other=0.0)  # fmt: skip
        acc = common.add_product(acc, w, tl.trans(a), PRECISION)
    acc = tl.trans(acc)
    if bias_ptr is not None:
        acc += common.load_bias(bias_ptr, offs_n, mask_n, y_ptr)[None, :]
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * channels_out + offs_n[None, :], y, mask=in_range[:, None] & mask_n[None, :])
    tile_statistics(y, partials_ptr, pid_m, tiles_m, in_range, tl.minimum(pixels - first, BLOCK_M), channels_out,
                    offs_n, mask_n, pid_n == 0)  # fmt: skip


# One program: over one run of pixels, a tile of dy^T @ activation(batch_norm(x)), BLOCK_M output channels by BLOCK_N
# input channels, BLOCK_N by BLOCK_M if not OUT_ON_ROWS, in conv_wgrad_kernel's workspace. Grid: (tiles, runs).
@triton.jit(do_not_specialize=["eps", "pixels", "run"])
def pointwise_wgrad_kernel(x_ptr, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps, dy_ptr, workspace_ptr, pixels,
                           run, channels_in, channels_out, IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr,
                           OUT_ON_ROWS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
                           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):  # fmt: skip
    channels_in *= IN_UNIT
    channels_out *= OUT_UNIT
    first = tl.program_id(1).to(tl.int64) * run
    last = tl.minimum(first + run, pixels)
    tiles_n = tl.cdiv(channels_in if OUT_ON_ROWS else channels_out, BLOCK_N)
    offs_m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if OUT_ON_ROWS:
        offs_o, offs_i = offs_m, offs_n
    else:
        offs_o, offs_i = offs_n, offs_m
    mask_o = offs_o < channels_out
    mask_i = offs_i < channels_in
    mean, scale, shift = load_scale(mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, offs_i, mask_i, channels_in, eps)
    acc = tl.zeros((offs_o.shape[0], offs_i.shape[0]), dtype=tl.float32)
    pixels_here = (last - first).to(tl.int32)
    tl.assume(pixels_here > 0)
    for p in range(0, pixels_here, BLOCK_P):
        pixel = first + p + tl.arange(0, BLOCK_P)
        mask_p = pixel < last
        # loaded through transposed pointers
        dy = tl.load(dy_ptr + pixel[None, :] * channels_out + offs_o[:, None], mask=mask_o[:, None] & mask_p[None, :],
                     other=0.0)  # fmt: skip
        a = load_activation(x_ptr, pixel[:, None] * channels_in + offs_i[None, :], mask_p[:, None] & mask_i[None, :],
                            mean[None, :], scale[None, :], shift[None, :], ACTIVATION,
                            dy_ptr.dtype.element_ty)  # fmt: skip
        acc = common.add_product(acc, dy, a, PRECISION)
    workspace_ptr += tl.program_id(1).to(tl.int64) * channels_out * channels_in
    if OUT_ON_ROWS:
        offsets = offs_o.to(tl.int64)[:, None] * channels_in + offs_i[None, :]
    else:
        offsets = offs_i.to(tl.int64)[None, :] * channels_out + offs_o[:, None]
    tl.store(workspace_ptr + offsets, acc, mask=mask_o[:, None] & mask_i[None, :])


def launch_forward(x: Tensor, norm: Norm, packed: Tensor, bias: Tensor | None, g: Geometry,
                   num_batches_tracked: Tensor | None = None, activation: str | None = "relu",
                   config: Config | None = None) -> tuple[Tensor, Partials]:  # fmt: skip
    """The raw output of a 1x1 convolution of activation(batch_norm(x)) and its partial statistics, as launch_conv's.

    ``x``: the raw output of the layer before, NHWC; ``norm``: that layer's. Adds one to ``num_batches_tracked``.
    """
    y = empty_pixels(x, (x.shape[0], g.out_channels, g.out_h, g.out_w), packed.dtype, True)
    precision = mode.dot_precision(packed.dtype, "conv")
    config = config or tuning.pointwise_forward(g, packed.dtype, precision, targets.current())
    group_in, group_out, in_unit, out_unit = channel_units(g)
    pixels = x.shape[0] * g.out_h * g.out_w
    tiles_m = cdiv(pixels, config["BLOCK_M"])
    partials = Partials(x.new_empty(tiles_m * (3 * g.out_channels + 1), dtype=torch.float32), tiles_m)
    launch(
        pointwise_forward_kernel, (tiles_m * cdiv(g.out_channels, config["BLOCK_N"]),),
        x, *norm, packed, bias, y, partials.data, num_batches_tracked, pixels, tiles_m, group_in, group_out,
        IN_UNIT=in_unit, OUT_UNIT=out_unit, ACTIVATION=activation, PRECISION=precision, **config.options(),
    )  # fmt: skip
    return y, launch_fold(partials, g.out_channels, fold_statistics_kernel)


def launch_wgrad(x: Tensor, norm: Norm, dy: Tensor, g: Geometry, activation: str | None = "relu",
                 config: Config | None = None) -> Tensor:  # fmt: skip
    """The workspace [runs, weight sums] that conv's launch_merge turns into the weight's gradient.

    ``x``, ``norm``: as in launch_forward. ``dy``: NHWC, the gradient of the raw output, of one pixel at the least.
    """
    precision = mode.dot_precision(dy.dtype, "conv")
    config = config or tuning.pointwise_wgrad(g, dy.dtype, precision, targets.current())
    rows, cols, out_on_rows = conv_tuning.wgrad_sides(g)
    tiles = cdiv(rows, config["BLOCK_M"]) * cdiv(cols, config["BLOCK_N"])
    pixels = dy.shape[0] * g.out_h * g.out_w
    run, runs = conv_tuning.runs(pixels, tiles, config, rows * cols * 4, targets.current())
    workspace = dy.new_empty((runs, rows * cols), dtype=torch.float32)
    group_in, group_out, in_unit, out_unit = channel_units(g)
    launch(
        pointwise_wgrad_kernel, (tiles, runs),
        x, *norm, dy, workspace, pixels, run, group_in, group_out, IN_UNIT=in_unit, OUT_UNIT=out_unit,
        OUT_ON_ROWS=out_on_rows, ACTIVATION=activation, PRECISION=precision, **config.options(),
    )  # fmt: skip
    return workspace
