"""2-D convolution on Triton: the forward product as an implicit GEMM, and what all its kernels share.

Inside, everything is NHWC: activations are [N, H, W, C], weights [C_out, kernel_h, kernel_w, C_in / groups] (packed).
The product has a row for each output pixel, a column for each output channel of a group, and reduces over taps and
input channels. Outputs may be stored in either memory format.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tkernels.core import activation as activations
from tkernels.core import autotune, mode, targets
from tkernels.core import device as common
from tkernels.core.config import Config, cdiv
from tkernels.core.geometry import Geometry, empty_pixels
from tkernels.core.launch import launch
from tkernels.ops.conv import config as tuning
from tkernels.ops.conv import kernels_tma


@dataclasses.dataclass(frozen=True)
class Window:
    """A convolution's or a pooling's window, one compile-time argument of kernels: WINDOW. (Of a NamedTuple Triton
    makes a tuple of its own, without properties.)"""

    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int = 1
    dilation_w: int = 1

    @property
    def taps(self) -> int:
        return self.kernel_h * self.kernel_w

    @property
    def tap_step_h(self) -> int:
        """From one row of taps that joins a phase of input rows to outputs to the next that joins the same."""
        return self.stride_h // math.gcd(self.stride_h, self.dilation_h)

    @property
    def tap_step_w(self) -> int:
        """The same of columns."""
        return self.stride_w // math.gcd(self.stride_w, self.dilation_w)


@triton.jit
def locate_pixels(first, image_pixels, width, BLOCK: tl.constexpr):
    """Where pixels first .. first + BLOCK - 1 of a batch lie: image (int64), pixel in the image, row, column."""
    image = first // image_pixels
    inside = (first - image * image_pixels).to(tl.int32) + tl.arange(0, BLOCK)
    image += (inside // image_pixels).to(tl.int64)
    inside = inside % image_pixels
    return image, inside, inside // width, inside % width


@triton.jit
def pixel_offsets(image, inside, first, image_pixels, channels, offs_c, NCHW: tl.constexpr, BLOCK: tl.constexpr):
    """Element offsets [BLOCK, channels] of consecutive pixels in a tensor of either memory format."""
    if NCHW:
        return (image * image_pixels * channels + inside)[:, None] + offs_c.to(tl.int64)[None, :] * image_pixels
    return (first + tl.arange(0, BLOCK))[:, None] * channels + offs_c[None, :]


@triton.jit
def row_pitch(reduction, PADDED: tl.constexpr):
    """Elements from one output channel to the next in a packed weight (Geometry.row_pitch)."""
    if PADDED:
        return (reduction + 15) // 16 * 16
    return reduction


@triton.jit
def forward_product(x_ptr, w_ptr, image, row, col, in_range, group, offs_n, mask_n, height, width, group_in, channels,
                    group_out, PADDED: tl.constexpr, WINDOW: tl.constexpr, HALO: tl.constexpr, PRECISION: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Float32 tile [BLOCK_M output pixels, BLOCK_N output channels]: one loop over taps and blocks of channels."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    origin = image * height * width
    top = row * WINDOW.stride_h - WINDOW.pad_h
    left = col * WINDOW.stride_w - WINDOW.pad_w
    w_rows = (group * group_out + offs_n).to(tl.int64) * row_pitch(WINDOW.taps * group_in, PADDED)
    steps = tl.cdiv(group_in, BLOCK_K)
    tl.assume(steps > 0)  # no channels at all are PyTorch's: ops/conv.py
    for step in range(WINDOW.taps * steps):
        tap = step // steps
        offs_k = (step - tap * steps) * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < group_in
        y = top + tap // WINDOW.kernel_w * WINDOW.dilation_h
        x = left + tap % WINDOW.kernel_w * WINDOW.dilation_w
        inside = in_range
        if HALO:
            inside = in_range & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        # the pixel is clamped, not the finished offset: that would hide its alignment from the compiler
        pixel = tl.where(inside, origin + y * width + x, 0)
        a = tl.load(x_ptr + pixel[:, None] * channels + (group * group_in + offs_k)[None, :],
                    mask=inside[:, None] & mask_k[None, :], other=0.0)  # fmt: skip
        b = tl.load(w_ptr + w_rows[None, :] + (tap * group_in + offs_k)[:, None],
                    mask=mask_k[:, None] & mask_n[None, :], other=0.0)  # fmt: skip
        acc = common.add_product(acc, a, b, PRECISION)
    return acc


@triton.jit
def forward_product_flat(x_ptr, w_ptr, image, row, col, in_range, group, offs_n, mask_n, height, width, group_in,
                         group_out, x_stride_n, x_stride_c, x_stride_h, x_stride_w, PADDED: tl.constexpr,
                         WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                         BLOCK_K: tl.constexpr):  # fmt: skip
    """As forward_product for few channels a group: taps and channels are one axis of the reduction, and the image is
    read through its strides in its own dtype, so that it need be neither transposed nor cast. An image that is cast on
    the way is a computed operand, and the right one (kernels/linear.py's input gradient says why)."""
    CAST: tl.constexpr = x_ptr.dtype.element_ty != w_ptr.dtype.element_ty
    N_AXIS: tl.constexpr = 0 if CAST else 1  # of the weight's tile
    acc = tl.zeros((BLOCK_N, BLOCK_M) if CAST else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    reduction = WINDOW.taps * group_in
    origin = tl.where(in_range, image, 0) * x_stride_n
    top = row * WINDOW.stride_h - WINDOW.pad_h
    left = col * WINDOW.stride_w - WINDOW.pad_w
    w_rows = (group * group_out + offs_n).to(tl.int64) * row_pitch(reduction, PADDED)
    if w_ptr.dtype.element_ty != tl.float32 or PRECISION != "ieee":  # no wgmma, and ptxas spills on sm_80
        tl.assume(reduction > 0)
    for first in range(0, reduction, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        mask_k = offs_k < reduction
        tap = offs_k // group_in
        channel = group * group_in + offs_k % group_in
        y = top[:, None] + (tap // WINDOW.kernel_w * WINDOW.dilation_h)[None, :]
        x = left[:, None] + (tap % WINDOW.kernel_w * WINDOW.dilation_w)[None, :]
        inside = in_range[:, None] & mask_k[None, :] & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        spot = tl.where(inside, y.to(tl.int64) * x_stride_h + x.to(tl.int64) * x_stride_w, 0)
        a = tl.load(
            x_ptr + (origin[:, None] + spot) + (channel.to(tl.int64) * x_stride_c)[None, :], mask=inside, other=0.0
        )
        w_offsets = tl.expand_dims(w_rows, 1 - N_AXIS) + tl.expand_dims(offs_k, N_AXIS)
        w_mask = tl.expand_dims(mask_n, 1 - N_AXIS) & tl.expand_dims(mask_k, N_AXIS)
        w = tl.load(w_ptr + w_offsets, mask=w_mask, other=0.0)
        if CAST:
            acc = common.add_product(acc, w, tl.trans(a.to(w.dtype)), PRECISION)
        else:
            acc = common.add_product(acc, a, w, PRECISION)
    return tl.trans(acc) if CAST else acc


@triton.jit
def forward_tile(x_ptr, w_ptr, bias_ptr, y_ptr, pixels, tiles_m, height, width, out_w, out_pixels, groups, group_in,
                 group_out, x_stride_n, x_stride_c, x_stride_h, x_stride_w, FLAT: tl.constexpr, WINDOW: tl.constexpr,
                 HALO: tl.constexpr, NCHW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """The program's float32 tile [BLOCK_M output pixels, BLOCK_N channels of one group] of conv(x, w) + bias; where its
    elements lie in y, and which of them exist; the channels, and which of them exist; which pixels exist; the tile's
    numbers (pid_m, pid_n). Grid: (pixel tiles x channel tiles,), grouped for L2."""
    tiles_n = tl.cdiv(group_out, BLOCK_N)
    pid_m, pid_n = common.grouped_tile(tl.program_id(0), tiles_m, groups * tiles_n)
    group = pid_n // tiles_n
    first = pid_m.to(tl.int64) * BLOCK_M
    image, inside, row, col = locate_pixels(first, out_pixels, out_w, BLOCK_M)
    in_range = first + tl.arange(0, BLOCK_M) < pixels
    offs_n = (pid_n - group * tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < group_out
    if FLAT:
        acc = forward_product_flat(x_ptr, w_ptr, image, row, col, in_range, group, offs_n, mask_n, height, width,
                                   group_in, group_out, x_stride_n, x_stride_c, x_stride_h, x_stride_w, FLAT, WINDOW,
                                   PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    else:
        acc = forward_product(x_ptr, w_ptr, image, row, col, in_range, group, offs_n, mask_n, height, width, group_in,
                              groups * group_in, group_out, FLAT, WINDOW, HALO, PRECISION, BLOCK_M, BLOCK_N,
                              BLOCK_K)  # fmt: skip
    channel = group * group_out + offs_n
    if bias_ptr is not None:
        acc = common.add_bias(acc, common.load_bias(bias_ptr, channel, mask_n, y_ptr))
    offsets = pixel_offsets(image, inside, first, out_pixels, groups * group_out, channel, NCHW, BLOCK_M)
    return acc, offsets, in_range[:, None] & mask_n[None, :], channel, mask_n, in_range, pid_m, pid_n


# One program: forward_tile of y = activation(conv(x, w) + bias) and, where z_ptr is given, of the activation's input.
@triton.jit(do_not_specialize=["pixels", "tiles_m", "height", "width", "out_w", "x_stride_n"])
def conv_forward_kernel(x_ptr, w_ptr, bias_ptr, y_ptr, z_ptr, pixels, tiles_m, height, width, out_w, out_pixels, groups,
                        group_in, group_out, x_stride_n, x_stride_c, x_stride_h, x_stride_w, IN_UNIT: tl.constexpr,
                        OUT_UNIT: tl.constexpr, FLAT: tl.constexpr, WINDOW: tl.constexpr, HALO: tl.constexpr,
                        NCHW: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
                        BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    acc, offsets, mask, _channel, _mask_n, _in_range, _pid_m, _pid_n = forward_tile(
        x_ptr, w_ptr, bias_ptr, y_ptr, pixels, tiles_m, height, width, out_w, out_pixels, groups, group_in * IN_UNIT,
        group_out * OUT_UNIT, x_stride_n, x_stride_c, x_stride_h, x_stride_w, FLAT, WINDOW, HALO, NCHW, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    if z_ptr is not None:
        tl.store(z_ptr + offsets, acc.to(z_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + offsets, common.activate(acc, ACTIVATION).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def pack_tile(pid_r, pid_c, w_ptr, packed_ptr, rows, columns, pitch, inner, group_rows, w_stride_o, w_stride_i,
              w_stride_h, w_stride_w, KERNEL_W: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_R: tl.constexpr,
              BLOCK_C: tl.constexpr):  # fmt: skip
    """A [BLOCK_R, BLOCK_C] tile of the packed weight. Rows are output channels, columns (tap, input channel);
    TRANSPOSED: rows are input channels of all groups, columns (tap, output channel of the group)."""
    offs_r = pid_r.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    tap = offs_c // inner
    within = offs_c % inner
    spot = tap // KERNEL_W * w_stride_h + tap % KERNEL_W * w_stride_w
    if TRANSPOSED:
        out_channel = (offs_r // group_rows * inner)[:, None] + within[None, :]
        offsets = out_channel * w_stride_o + (offs_r % group_rows * w_stride_i)[:, None] + spot[None, :]
    else:
        offsets = (offs_r * w_stride_o)[:, None] + (within.to(tl.int64) * w_stride_i + spot)[None, :]
    mask_r = offs_r < rows
    # columns past the last one pad the row with zeros
    w = tl.load(w_ptr + offsets, mask=mask_r[:, None] & (offs_c < columns)[None, :], other=0.0)
    tl.store(packed_ptr + offs_r[:, None] * pitch + offs_c[None, :], w.to(packed_ptr.dtype.element_ty),
             mask=mask_r[:, None] & (offs_c < pitch)[None, :])  # fmt: skip


# One program: pack_tile of a weight. Grid: (row tiles, column tiles).
@triton.jit
def conv_pack_kernel(w_ptr, packed_ptr, rows, columns, pitch, inner, group_rows, w_stride_o, w_stride_i, w_stride_h,
                     w_stride_w, KERNEL_W: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_R: tl.constexpr,
                     BLOCK_C: tl.constexpr):  # fmt: skip
    pack_tile(tl.program_id(0), tl.program_id(1), w_ptr, packed_ptr, rows, columns, pitch, inner, group_rows,
              w_stride_o, w_stride_i, w_stride_h, w_stride_w, KERNEL_W, TRANSPOSED, BLOCK_R, BLOCK_C)  # fmt: skip


@functools.lru_cache(maxsize=4096)
def window(g: Geometry) -> dict[str, Any]:
    """The compile-time argument that describes the kernel's window."""
    window = Window(g.kernel_h, g.kernel_w, g.stride_h, g.stride_w, g.pad_h, g.pad_w, g.dilation_h, g.dilation_w)
    return {"WINDOW": window}


def channel_units(g: Geometry) -> tuple[int, int, int, int]:
    """(input channels, output channels) of a group, each with its unit taken out, and the units."""
    in_unit, out_unit = tuning.unit(g.group_in), tuning.unit(g.group_out)
    return g.group_in // in_unit, g.group_out // out_unit, in_unit, out_unit


def is_nhwc(x: Tensor) -> bool:
    """Whether the elements lie densely in NHWC order."""
    return x.is_contiguous(memory_format=torch.channels_last)


def packs(weight: Tensor, g: Geometry, dtype: torch.dtype) -> bool:
    """Whether launch_pack (not transposed) has anything to do: the weight does not lie as the product reads it."""
    return weight.dtype != dtype or g.row_pitch != g.reduction or not is_nhwc(weight)


def launch_pack(weight: Tensor, g: Geometry, dtype: torch.dtype, transposed: bool = False,
                config: Config | None = None) -> Tensor:  # fmt: skip
    """The weight as [C_out, (tap, C_in / groups)] in ``dtype``, rows g.row_pitch apart; ``transposed``: as
    [C_in, (tap, C_out / groups)]. The weight itself where it already lies so."""
    if not transposed and not packs(weight, g, dtype):
        return weight
    shape = (g.in_channels, g.taps * g.group_out) if transposed else (g.out_channels, g.row_pitch)
    packed = weight.new_empty(shape, dtype=dtype)
    pack(weight, packed, g, transposed, config)
    return packed


def pack(weight: Tensor, packed: Tensor, g: Geometry, transposed: bool = False, config: Config | None = None) -> None:
    """Writes ``packed``, of launch_pack's shape."""
    rows, pitch = packed.shape
    inner, group_rows = (g.group_out, g.group_in) if transposed else (g.group_in, g.group_out)
    columns = g.taps * inner
    config = config or tuning.pack(columns)
    grid = (cdiv(rows, config["BLOCK_R"]), cdiv(pitch, config["BLOCK_C"]))
    launch(conv_pack_kernel, grid, weight, packed, rows, columns, pitch, inner, group_rows, *weight.stride(),
                           KERNEL_W=g.kernel_w, TRANSPOSED=transposed, **config.options())  # fmt: skip


def launch_forward(x: Tensor, packed: Tensor, bias: Tensor | None, g: Geometry, activation: str | None = None,
                   keep_input: bool = False, channels_last: bool = True,
                   config: Config | None = None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """y = activation(conv(x, w) + bias), and the activation's input if ``keep_input``.

    ``x``: [N, C, H, W], NHWC in memory and in the dtype of ``packed`` unless g.flattened (then any). ``packed``: from
    launch_pack; its dtype is the output's. ``channels_last``: the output's memory format.
    """
    shape = (x.shape[0], g.out_channels, g.out_h, g.out_w)
    y = empty_pixels(x, shape, packed.dtype, channels_last)
    z = empty_pixels(x, shape, packed.dtype, channels_last) if keep_input else None
    forward(x, packed, bias, y, z, g, activation, channels_last, config)
    return y, z


def forward(x: Tensor, packed: Tensor, bias: Tensor | None, y: Tensor, z: Tensor | None, g: Geometry,
            activation: str | None, channels_last: bool, config: Config | None = None) -> None:  # fmt: skip
    """Writes y and z; arguments as launch_forward's."""
    if y.numel() == 0:
        return
    if config is None and z is None and channels_last and kernels_tma.forward(x, packed, bias, y, g, activation):
        return
    n = x.shape[0]
    precision = mode.dot_precision(packed.dtype, "conv")
    plain = channels_last and z is None and not activations.needs_input(activation)
    config = config or autotune.pick(
        "conv2d forward", n, (g, packed.dtype, precision, activation, channels_last),
        tuning.forward(g, packed.dtype, precision, targets.current(), plain),
        lambda c: forward(x, packed, bias, y, z, g, activation, channels_last, c), x,
    )  # fmt: skip
    group_in, group_out, in_unit, out_unit = channel_units(g)
    out_pixels = g.out_h * g.out_w
    tiles_m = cdiv(n * out_pixels, config["BLOCK_M"])
    grid = (tiles_m * g.groups * cdiv(g.group_out, config["BLOCK_N"]),)
    strides = x.stride() if g.flattened else (0, 0, 0, 0)
    launch(
        conv_forward_kernel, grid,
        x, packed, bias, y, z, n * out_pixels, tiles_m, g.height, g.width, g.out_w, out_pixels, g.groups,
        group_in, group_out, *strides, IN_UNIT=in_unit, OUT_UNIT=out_unit, FLAT=g.flattened, HALO=g.halo,
        NCHW=not channels_last, ACTIVATION=activation, PRECISION=precision, **window(g), **config.options(),
    )  # fmt: skip
