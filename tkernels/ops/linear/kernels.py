"""Linear layer on Triton: activation(x @ w^T + b) with dropout, and its gradients.

The forward product and the input gradient are one tile loop each over their reduction axis; the weight gradient
reduces over the batch and computes the bias gradient on the way. The gradient of the pre-activation, dz, is formed
tile by tile from dy in the prologue of both gradient products and never written.

Where a product has too few tiles to fill the GPU, programs share a tile's reduction: each writes a float32 partial
tile, and a second kernel adds the partials in a fixed order, so that results do not vary from run to run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tkernels.core import autotune, library, mode, targets
from tkernels.core import device as common
from tkernels.core.config import Config, cdiv
from tkernels.core.launch import launch
from tkernels.ops.linear import config as tuning
from tkernels.ops.linear import kernels_tma
from tkernels.ops.linear.kernels_tma import Operand

STEPS_A_CHAIN = tl.constexpr(4)


@triton.jit
def tile_of_program(pid, rows, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tile coordinates (pid_m, pid_n) of a program, in the order of common.grouped_tile."""
    return common.grouped_tile(pid, tl.cdiv(rows, BLOCK_M), tl.cdiv(cols, BLOCK_N))


@triton.jit
def both_strides(stride, TRANSPOSED: tl.constexpr):
    """Strides of rows and columns of a matrix with a dense dimension: the second, or the first if TRANSPOSED."""
    if TRANSPOSED:
        rows, cols = 1, stride
    else:
        rows, cols = stride, 1
    return rows, cols


@triton.jit
def load_tile(ptr, rows, cols, row_stride, col_stride, n_rows, n_cols):
    """A [rows, cols] tile of a matrix, 0 outside it. ``rows`` and ``cols``: indices; strides: in elements."""
    offsets = rows.to(tl.int64)[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
    return tl.load(ptr + offsets, mask=(rows < n_rows)[:, None] & (cols < n_cols)[None, :], other=0.0)


@triton.jit
def product_tile(a_ptr, b_ptr, offs_m, offs_n, M, N, K, a_stride_m, a_stride_k, b_stride_k, b_stride_n, first_step,
                 end_step, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_K: tl.constexpr):  # fmt: skip
    """Float32 tile [BLOCK_M, BLOCK_N] of a[M, K] @ b[K, N], over the steps of BLOCK_K in [first_step, end_step): one at
    the least."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if PRECISION == "ieee" and a_ptr.dtype.element_ty == tl.float32:
        # float32 products round in every term of one long chain; short chains summed on their own halve the error
        for chain in range(first_step, end_step, STEPS_A_CHAIN):
            last = tl.minimum(chain + STEPS_A_CHAIN, end_step)
            acc += product_steps(tl.zeros_like(acc), a_ptr, b_ptr, offs_m, offs_n, M, N, K, a_stride_m, a_stride_k,
                                 b_stride_k, b_stride_n, chain, last, PRECISION, BLOCK_K)  # fmt: skip
        return acc
    tl.assume(first_step < end_step)  # or ptxas runs wgmma one at a time, for the sake of a loop without steps
    return product_steps(acc, a_ptr, b_ptr, offs_m, offs_n, M, N, K, a_stride_m, a_stride_k, b_stride_k, b_stride_n,
                         first_step, end_step, PRECISION, BLOCK_K)  # fmt: skip


@triton.jit
def product_steps(acc, a_ptr, b_ptr, offs_m, offs_n, M, N, K, a_stride_m, a_stride_k, b_stride_k, b_stride_n,
                  first_step, end_step, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """``acc`` plus the products of the steps in [first_step, end_step)."""
    for step in range(first_step, end_step):
        offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        a = load_tile(a_ptr, offs_m, offs_k, a_stride_m, a_stride_k, M, K)
        b = load_tile(b_ptr, offs_k, offs_n, b_stride_k, b_stride_n, K, N)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def store_partial(partials_ptr, tile, offs_m, offs_n, M, N):
    """Write a float32 tile to this split's slice of partials[splits, M, N]; the split is the second grid axis."""
    offsets = (tl.program_id(1).to(tl.int64) * M + offs_m.to(tl.int64))[:, None] * N + offs_n[None, :]
    tl.store(partials_ptr + offsets, tile, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


@triton.jit
def finish_tile(acc, b_ptr, y_ptr, z_ptr, seed_ptr, offs_m, first_n, M, N, b_stride, p, ACTIVATION: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The epilogue: bias, activation, dropout; writes y and, where z_ptr is given, the pre-activation."""
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    rows = offs_m.to(tl.int64)
    offsets = rows[:, None] * N + offs_n[None, :]
    if b_ptr is not None:
        acc += common.load_bias(b_ptr, offs_n * b_stride, mask_n, y_ptr)[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + offsets, acc.to(z_ptr.dtype.element_ty), mask=mask)
    acc = common.activate(acc, ACTIVATION)
    if seed_ptr is not None:
        acc *= common.keep_scale(tl.load(seed_ptr), rows, first_n, N, p, BLOCK_M, BLOCK_N)
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gradient_tile(dy_ptr, saved_ptr, seed, rows, first_col, M, N, dy_stride, p, ACTIVATION: tl.constexpr,
                  SCALED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The prologue of both gradient products: a [BLOCK_M, BLOCK_N] tile of dz, in the dtype of dy if nothing is fused
    and in float32 otherwise. ``saved``: y or z, contiguous. SCALED: y alone tells which elements dropout kept."""
    cols = first_col + tl.arange(0, BLOCK_N)
    dz = load_tile(dy_ptr, rows, cols, dy_stride, 1, M, N)
    if ACTIVATION is not None:
        saved = load_tile(saved_ptr, rows, cols, N, 1, M, N)
        dz = common.activation_gradient(dz.to(tl.float32), saved.to(tl.float32), ACTIVATION)
    if seed is not None:
        dz = dz.to(tl.float32) * common.keep_scale(seed, rows.to(tl.int64), first_col, N, p, BLOCK_M, BLOCK_N)
    if SCALED:
        dz *= tl.where(p < 1.0, 1.0 / (1.0 - p), 0.0)
    return dz


# One program: a [BLOCK_M, BLOCK_N] tile of y, over its split of K. Grid: (tiles of y, splits).
# Without splits (PARTIALS false) it ends with the epilogue; else it writes its partial tile.
@triton.jit(do_not_specialize=["M", "steps"])
def linear_forward_kernel(x_ptr, w_ptr, b_ptr, y_ptr, z_ptr, seed_ptr, partials_ptr, M, N, K, x_stride, w_stride,
                          b_stride, p, steps, UNIT: tl.constexpr, W_TRANSPOSED: tl.constexpr,
                          ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
                          BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    K *= UNIT
    x_stride *= UNIT
    w_stride *= UNIT
    pid_m, pid_n = tile_of_program(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first_step = tl.program_id(1) * steps
    end_step = tl.minimum(first_step + steps, tl.cdiv(K, BLOCK_K))
    w_stride_n, w_stride_k = both_strides(w_stride, W_TRANSPOSED)
    acc = product_tile(x_ptr, w_ptr, offs_m, offs_n, M, N, K, x_stride, 1, w_stride_k, w_stride_n, first_step, end_step,
                       PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    if partials_ptr is not None:
        store_partial(partials_ptr, acc, offs_m, offs_n, M, N)
    else:
        finish_tile(acc, b_ptr, y_ptr, z_ptr, seed_ptr, offs_m, pid_n * BLOCK_N, M, N, b_stride, p, ACTIVATION,
                    BLOCK_M, BLOCK_N)  # fmt: skip


# One program: a [BLOCK_M, BLOCK_K] tile of dx = dz @ w, over its split of N. Grid: (tiles of dx, splits).
# The product is dx^T = w^T @ dz^T, for dz is computed: wgmma reads a computed left operand from registers, which the
# next step may overwrite while it does (Triton 3.5 and 3.6, ptxas before 13.3); a right one lies in shared memory.
@triton.jit(do_not_specialize=["M", "steps"])
def linear_dgrad_kernel(dy_ptr, saved_ptr, seed_ptr, w_ptr, dx_ptr, partials_ptr, M, N, K, dy_stride, w_stride, p,
                        steps, UNIT: tl.constexpr, W_TRANSPOSED: tl.constexpr, ACTIVATION: tl.constexpr,
                        SCALED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
                        BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    N *= UNIT
    K *= UNIT
    dy_stride *= UNIT
    w_stride *= UNIT
    pid_m, pid_k = tile_of_program(tl.program_id(0), M, K, BLOCK_M, BLOCK_K)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    first_step = tl.program_id(1) * steps
    end_step = tl.minimum(first_step + steps, tl.cdiv(N, BLOCK_N))
    seed = None if seed_ptr is None else tl.load(seed_ptr)
    w_stride_n, w_stride_k = both_strides(w_stride, W_TRANSPOSED)
    # without tensor cores the transposed tile only costs registers
    LEFT: tl.constexpr = PRECISION == "ieee" and w_ptr.dtype.element_ty == tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_K) if LEFT else (BLOCK_K, BLOCK_M), dtype=tl.float32)
    tl.assume(first_step < end_step)
    for step in range(first_step, end_step):
        offs_n = step * BLOCK_N + tl.arange(0, BLOCK_N)
        dz = gradient_tile(dy_ptr, saved_ptr, seed, offs_m, step * BLOCK_N, M, N, dy_stride, p, ACTIVATION, SCALED,
                           BLOCK_M, BLOCK_N).to(w_ptr.dtype.element_ty)  # fmt: skip
        if LEFT:
            w = load_tile(w_ptr, offs_n, offs_k, w_stride_n, w_stride_k, N, K)
            acc = tl.dot(dz, w, acc, input_precision=PRECISION)
        else:
            wt = load_tile(w_ptr, offs_k, offs_n, w_stride_k, w_stride_n, K, N)
            acc = tl.dot(wt, tl.trans(dz), acc, input_precision=PRECISION)
    if not LEFT:
        acc = tl.trans(acc)
    if partials_ptr is not None:
        store_partial(partials_ptr, acc, offs_m, offs_k, M, K)
    else:
        offsets = offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]
        tl.store(dx_ptr + offsets, acc.to(dx_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_k < K)[None, :])


# One program: a [BLOCK_K, BLOCK_N] tile of dw^T = x^T @ dz, over its split of the batch; the programs of the first
# tiles along K also sum dz over the batch into db. Grid: (tiles of dw, splits). WITH_WEIGHT false: db only.
# K, usually the longer side, lies on the product's M axis, and dz keeps the order in which it is loaded.
@triton.jit(do_not_specialize=["M", "steps"])
def linear_wgrad_kernel(dy_ptr, saved_ptr, seed_ptr, x_ptr, dw_ptr, db_ptr, M, N, K, dy_stride, x_stride, p, steps,
                        UNIT: tl.constexpr, ACTIVATION: tl.constexpr, SCALED: tl.constexpr, WITH_WEIGHT: tl.constexpr,
                        PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                        BLOCK_K: tl.constexpr):  # fmt: skip
    N *= UNIT
    K *= UNIT
    dy_stride *= UNIT
    x_stride *= UNIT
    # without x there is no K, but still one tile
    pid_k, pid_n = tile_of_program(tl.program_id(0), tl.maximum(K, 1), N, BLOCK_K, BLOCK_N)
    split = tl.program_id(1).to(tl.int64)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first_step = tl.program_id(1) * steps
    end_step = tl.minimum(first_step + steps, tl.cdiv(M, BLOCK_M))
    seed = None if seed_ptr is None else tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    # rows that a thread has of a step are summed first, or db would take registers that the product needs
    DB_ROWS: tl.constexpr = min(BLOCK_M, 16)
    db = tl.zeros((DB_ROWS, BLOCK_N), dtype=tl.float32)
    tl.assume(first_step < end_step)
    for step in range(first_step, end_step):
        offs_m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        dz = gradient_tile(dy_ptr, saved_ptr, seed, offs_m, pid_n * BLOCK_N, M, N, dy_stride, p, ACTIVATION, SCALED,
                           BLOCK_M, BLOCK_N)  # fmt: skip
        if db_ptr is not None:
            db += tl.sum(tl.reshape(dz.to(tl.float32), (BLOCK_M // DB_ROWS, DB_ROWS, BLOCK_N)), axis=0)
        if WITH_WEIGHT:
            xt = load_tile(x_ptr, offs_k, offs_m, 1, x_stride, K, M)
            acc = tl.dot(xt, dz.to(xt.dtype), acc, input_precision=PRECISION)
    if WITH_WEIGHT:
        offsets = (split * N + offs_n)[None, :] * K + offs_k[:, None]
        tl.store(dw_ptr + offsets, acc.to(dw_ptr.dtype.element_ty), mask=(offs_k < K)[:, None] & (offs_n < N)[None, :])
    if db_ptr is not None:
        if pid_k == 0:
            sums = tl.sum(db, axis=0).to(db_ptr.dtype.element_ty)
            tl.store(db_ptr + split * N + offs_n, sums, mask=offs_n < N)


# One program: a [BLOCK_M, BLOCK_N] tile of y, from the sum of partials[splits, M, N]. Grid: (tiles of y,).
@triton.jit(do_not_specialize=["M", "splits"])
def linear_finish_kernel(partials_ptr, b_ptr, y_ptr, z_ptr, seed_ptr, M, N, b_stride, p, splits,
                         ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    pid_m, pid_n = tile_of_program(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for split in range(splits):
        acc += load_tile(partials_ptr + tl.cast(split, tl.int64) * M * N, offs_m, offs_n, N, 1, M, N)
    finish_tile(acc, b_ptr, y_ptr, z_ptr, seed_ptr, offs_m, pid_n * BLOCK_N, M, N, b_stride, p, ACTIVATION, BLOCK_M,
                BLOCK_N)  # fmt: skip


# One program: a [BLOCK_M, BLOCK_N] tile of y, activation and dropout of a product z[M, N]. Grid: (tiles of y,).
@triton.jit(do_not_specialize=["M"])
def linear_end_kernel(z_ptr, y_ptr, seed_ptr, M, N, p, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
                      BLOCK_N: tl.constexpr):  # fmt: skip
    pid_m, pid_n = tile_of_program(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    z = load_tile(z_ptr, offs_m, pid_n * BLOCK_N + tl.arange(0, BLOCK_N), N, 1, M, N).to(tl.float32)
    finish_tile(z, None, y_ptr, None, seed_ptr, offs_m, pid_n * BLOCK_N, M, N, 0, p, ACTIVATION, BLOCK_M, BLOCK_N)


# One program: a [BLOCK_M, BLOCK_N] tile of dz, for products that read it as it is. Grid: (tiles of dz,).
@triton.jit(do_not_specialize=["M"])
def linear_mask_kernel(dy_ptr, saved_ptr, seed_ptr, dz_ptr, M, N, dy_stride, p, UNIT: tl.constexpr,
                       ACTIVATION: tl.constexpr, SCALED: tl.constexpr, BLOCK_M: tl.constexpr,
                       BLOCK_N: tl.constexpr):  # fmt: skip
    N *= UNIT
    dy_stride *= UNIT
    pid_m, pid_n = tile_of_program(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    seed = None if seed_ptr is None else tl.load(seed_ptr)
    dz = gradient_tile(dy_ptr, saved_ptr, seed, offs_m, pid_n * BLOCK_N, M, N, dy_stride, p, ACTIVATION, SCALED,
                       BLOCK_M, BLOCK_N)  # fmt: skip
    offsets = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def row_stride(t: Tensor) -> int | None:
    """The distance between rows of ``t`` [..., C] seen as a matrix, or None where it is none: the last dimension must
    be dense and the others must fold into one."""
    columns = t.shape[-1]
    if columns > 1 and t.stride(-1) != 1:
        return None
    if t.dim() == 2:
        return t.stride(0) if t.shape[0] > 1 else columns
    if t.is_contiguous():
        return columns
    stride, expected = None, 0
    for size, step in zip(reversed(t.shape[:-1]), reversed(t.stride()[:-1])):
        if size == 1:
            continue
        if stride is None:
            stride = step
        elif step != expected:
            return None
        expected = step * size
    return columns if stride is None else stride


def dense_rows(t: Tensor) -> Tensor:
    """``t`` where its rows load as they are, else a contiguous copy."""
    return t if row_stride(t) is not None else t.contiguous()


def dense_weight(w: Tensor) -> Tensor:
    """``w`` [N, K] where one of its dimensions is dense, else a contiguous copy."""
    return w if _weight_stride(w) is not None else w.contiguous()


def _weight_stride(w: Tensor) -> tuple[int, bool] | None:
    """(stride of the dimension that is not dense, whether that is the second), or None where neither is dense."""
    (n, k), (stride_n, stride_k) = w.shape, w.stride()
    if k == 1 or stride_k == 1:
        return (stride_n if n > 1 else k), False
    if n == 1 or stride_n == 1:
        return stride_k, True
    return None


def _unit(t: Tensor, *sizes: int) -> int:
    """Elements in 16 bytes if all sizes are multiples of that, else 1. Triton knows an argument to be a multiple of
    16 or of nothing; sizes of 24 or 40 reach the kernel divided by this and keep their wide loads."""
    width = 16 // t.element_size()
    return width if all(size % width == 0 for size in sizes) else 1


def _rows(t: Tensor) -> int:
    return t.shape[0] if t.dim() == 2 else math.prod(t.shape[:-1])


def _stride(t: Tensor) -> int:
    stride = row_stride(t)
    if stride is None:
        raise ValueError(f"rows of shape {list(t.shape)} and strides {t.stride()} do not fold into a matrix")
    return stride


def split(reduction: int, block: int, splits: int) -> tuple[int, int]:
    """Steps of ``block`` each split takes and the number of splits that have any."""
    total = cdiv(reduction, block)
    steps = max(cdiv(total, max(splits, 1)), 1)
    return steps, max(cdiv(total, steps), 1)


def launch_forward(
    x: Tensor, w: Tensor, b: Tensor | None = None, activation: str | None = None, p: float = 0.0,
    seed: Tensor | None = None, save_z: bool = False, config: Config | None = None, splits: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(y [..., N], the pre-activation z or None) for x [..., K] with dense rows, dense w [N, K], and b of N elements
    or one. ``seed``: dropout's, None for none. ``splits``: 0 for one program a tile, else programs that share one."""
    y = x.new_empty((*x.shape[:-1], w.shape[0]))
    z = torch.empty_like(y) if save_z else None
    forward(x, w, b, y, z, seed, activation, p, config=config, splits=splits)
    return y, z


def _product_flops(x: Sequence[int], w: Sequence[int], *_: Any) -> int:
    return 2 * math.prod(x) * w[0]


@library.launches("linear_forward", mutates="y z", flops=_product_flops)
def forward(
    x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, z: Tensor | None, seed: Tensor | None, activation: str | None,
    p: float, *, config: Config | None = None, splits: int | None = None,
) -> None:  # fmt: skip
    """Writes y and z; arguments as launch_forward's."""
    n, k = w.shape
    m = _rows(x)
    if y.numel() == 0:
        return
    if k == 0:  # an empty sum: a product with one column of zeros, for the epilogue's sake
        forward(x.new_zeros((*x.shape[:-1], 1)), w.new_zeros((n, 1)), b, y, z, seed, activation, p)
        return
    target, precision = targets.current(), mode.dot_precision(x.dtype, "matmul")
    x_stride, (w_stride, w_transposed) = _stride(x), _checked_weight_stride(w)
    unit = _unit(x, k, x_stride, w_stride)
    plain = n % unit == 0 and tuning.is_plain(activation, seed is not None, unit)
    given = config is not None
    config = config or autotune.pick(
        "linear forward", m, (n, k, x.dtype, precision, activation, seed is not None, z is not None),
        tuning.forward(n, k, x.element_size(), precision, seed is not None, target, plain),
        lambda c: forward(x, w, b, y, z, seed, activation, p, config=c, splits=splits), x,
    )  # fmt: skip
    tiles = cdiv(m, config["BLOCK_M"]) * cdiv(n, config["BLOCK_N"])
    if splits is None:
        splits = tuning.forward_splits(tiles, k, target)
    b_stride = 0 if b is None or b.numel() == 1 else b.stride(0)
    if not (given or splits or seed is not None or z is not None):
        operands = Operand(x, m, k, x_stride, False), Operand(w, k, n, w_stride, not w_transposed)
        if kernels_tma.product(*operands, y, b, b_stride, activation):
            return
    steps, parts = split(k, config["BLOCK_K"], splits)
    partials = x.new_empty((parts, m, n), dtype=torch.float32) if splits else None
    launch(
        linear_forward_kernel, (tiles, parts),
        x, w, b, y, z, seed, partials, m, n, k // unit, x_stride // unit, w_stride // unit, b_stride, p, steps,
        UNIT=unit, W_TRANSPOSED=w_transposed, ACTIVATION=activation, PRECISION=precision, **config.options(),
    )  # fmt: skip
    if partials is not None:
        finish(partials, b, b_stride, y, z, activation, p, seed)


def launch_dgrad(
    dy: Tensor, w: Tensor, saved: Tensor | None = None, activation: str | None = None, p: float = 0.0,
    seed: Tensor | None = None, config: Config | None = None, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """dx [..., K] from dy [..., N] with dense rows, dense w [N, K] and what forward saved, z or y
    (activation.needs_input), contiguous. ``p`` without a ``seed``: y tells what dropout kept ('relu')."""
    dx = dy.new_empty((*dy.shape[:-1], w.shape[1]))
    input_gradient(dy, w, saved, seed, dx, activation, p, config=config, splits=splits)
    return dx


def _dgrad_flops(dy: Sequence[int], w: Sequence[int], *_: Any) -> int:
    return 2 * math.prod(dy) * w[1]


@library.launches("linear_input_gradient", mutates="dx", flops=_dgrad_flops)
def input_gradient(
    dy: Tensor, w: Tensor, saved: Tensor | None, seed: Tensor | None, dx: Tensor, activation: str | None, p: float, *,
    config: Config | None = None, splits: int | None = None,
) -> None:  # fmt: skip
    """Writes dx; arguments as launch_dgrad's."""
    n, k = w.shape
    m = _rows(dy)
    if dx.numel() == 0 or n == 0:
        dx.zero_()
        return
    target, precision = targets.current(), mode.dot_precision(dy.dtype, "matmul")
    dy_stride, (w_stride, w_transposed) = _stride(dy), _checked_weight_stride(w)
    unit = _unit(dy, n, k, dy_stride, w_stride)
    config = config or autotune.pick(
        "linear dgrad", m, (n, k, dy.dtype, precision, activation, seed is not None),
        tuning.dgrad(
            n, k, dy.element_size(), precision, target, tuning.is_plain(activation, seed is not None, unit)
        ),
        lambda c: input_gradient(dy, w, saved, seed, dx, activation, p, config=c, splits=splits), dy,
    )  # fmt: skip
    tiles = cdiv(m, config["BLOCK_M"]) * cdiv(k, config["BLOCK_K"])
    if splits is None:
        splits = tuning.forward_splits(tiles, n, target)
    steps, parts = split(n, config["BLOCK_N"], splits)
    partials = dy.new_empty((parts, m, k), dtype=torch.float32) if splits else None
    launch(
        linear_dgrad_kernel, (tiles, parts),
        dy, saved, seed, w, dx, partials, m, n // unit, k // unit, dy_stride // unit, w_stride // unit, p, steps,
        UNIT=unit, W_TRANSPOSED=w_transposed, ACTIVATION=activation, SCALED=p > 0 and seed is None,
        PRECISION=precision, **config.options(),
    )  # fmt: skip
    if partials is not None:
        finish(partials, None, 0, dx)


def launch_wgrad(
    dy: Tensor, x: Tensor | None, saved: Tensor | None = None, activation: str | None = None, p: float = 0.0,
    seed: Tensor | None = None, with_bias: bool = False, config: Config | None = None, splits: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(dw [N, K], db [N]) from dy [..., N] and x [..., K], both with dense rows; other arguments as launch_dgrad's.
    Without ``x`` only db is computed, without ``with_bias`` only dw; what is not computed is None."""
    n = dy.shape[-1]
    dw = None if x is None else dy.new_empty((n, x.shape[-1]))
    db = dy.new_empty(n) if with_bias else None
    weight_gradient(dy, x, saved, seed, dw, db, activation, p, config=config, splits=splits)
    return dw, db


def _wgrad_flops(dy: Sequence[int], x: Sequence[int] | None, *_: Any) -> int:
    return 0 if x is None else 2 * math.prod(dy) * x[-1]


@library.launches("linear_weight_gradient", mutates="dw db", flops=_wgrad_flops)
def weight_gradient(
    dy: Tensor, x: Tensor | None, saved: Tensor | None, seed: Tensor | None, dw: Tensor | None, db: Tensor | None,
    activation: str | None, p: float, *, config: Config | None = None, splits: int | None = None,
) -> None:  # fmt: skip
    """Writes dw and db; arguments as launch_wgrad's."""
    n, m = dy.shape[-1], _rows(dy)
    k = 0 if x is None else x.shape[-1]
    if m == 0 or n == 0 or (k == 0 and db is None):
        for empty in (dw, db):
            if empty is not None:
                empty.zero_()
        return
    target, precision = targets.current(), mode.dot_precision(dy.dtype, "matmul")
    dy_stride, x_stride = _stride(dy), 0 if x is None else _stride(x)
    unit = _unit(dy, n, k, dy_stride, x_stride)
    config = config or autotune.pick(
        "linear wgrad", m, (n, k, dy.dtype, precision, activation, seed is not None, db is not None),
        tuning.wgrad(
            n, k, dy.element_size(), precision, target, tuning.is_plain(activation, seed is not None, unit)
        ),
        lambda c: weight_gradient(dy, x, saved, seed, dw, db, activation, p, config=c, splits=splits), dy,
        rows="",  # BLOCK_M is a step of the reduction here
    )  # fmt: skip
    tiles = max(cdiv(k, config["BLOCK_K"]), 1) * cdiv(n, config["BLOCK_N"])
    if splits is None:
        splits = tuning.wgrad_splits(tiles, m, config["BLOCK_M"], target)
    steps, parts = split(m, config["BLOCK_M"], splits)
    out_w, out_b = dw, db
    if splits:
        # one row a split: its length does not depend on the batch
        out_w = None if dw is None else dy.new_empty((parts, 1, n * k), dtype=torch.float32)
        out_b = None if db is None else dy.new_empty((parts, 1, n), dtype=torch.float32)
    launch(
        linear_wgrad_kernel, (tiles, parts),
        dy, saved, seed, x, out_w, out_b, m, n // unit, k // unit, dy_stride // unit, x_stride // unit, p, steps,
        UNIT=unit, ACTIVATION=activation, SCALED=p > 0 and seed is None, WITH_WEIGHT=k > 0, PRECISION=precision,
        **config.options(),
    )  # fmt: skip
    if splits:
        if k > 0:
            finish(out_w, None, 0, dw, config=tuning.finish_row(n * k, target))
        if db is not None:
            finish(out_b, None, 0, db, config=tuning.finish_row(n, target))


def finish(
    partials: Tensor, b: Tensor | None, b_stride: int, y: Tensor, z: Tensor | None = None,
    activation: str | None = None, p: float = 0.0, seed: Tensor | None = None, config: Config | None = None,
) -> None:  # fmt: skip
    """Sum partials [splits, M, N] into y, through the epilogue."""
    splits, m, n = partials.shape
    config = config or tuning.finish(n, targets.current())
    tiles = cdiv(m, config["BLOCK_M"]) * cdiv(n, config["BLOCK_N"])
    launch(
        linear_finish_kernel, (tiles,),
        partials, b, y, z, seed, m, n, b_stride, p, splits, ACTIVATION=activation, **config.options(),
    )  # fmt: skip


@library.launches("linear_end", mutates="y", flops=library.no_flops)
def end(
    z: Tensor, y: Tensor, seed: Tensor | None, activation: str | None, p: float, *, config: Config | None = None
) -> None:
    """Writes y = dropout(activation(z)), both contiguous; y may be z."""
    m, n = _rows(z), z.shape[-1]
    if z.numel() == 0:
        return
    config = config or tuning.finish(n, targets.current())
    tiles = cdiv(m, config["BLOCK_M"]) * cdiv(n, config["BLOCK_N"])
    launch(linear_end_kernel, (tiles,), z, y, seed, m, n, p, ACTIVATION=activation, **config.options())


@library.launches("linear_activation_gradient", mutates="dz", flops=library.no_flops)
def activation_gradient(
    dy: Tensor, saved: Tensor | None, seed: Tensor | None, dz: Tensor, activation: str | None, p: float, *,
    config: Config | None = None,
) -> None:  # fmt: skip
    """Writes dz, contiguous; arguments as launch_dgrad's."""
    m, n = _rows(dy), dy.shape[-1]
    if dz.numel() == 0:
        return
    config = config or tuning.finish(n, targets.current())
    tiles = cdiv(m, config["BLOCK_M"]) * cdiv(n, config["BLOCK_N"])
    stride = _stride(dy)
    unit = _unit(dy, n, stride)
    launch(
        linear_mask_kernel, (tiles,),
        dy, saved, seed, dz, m, n // unit, stride // unit, p, UNIT=unit, ACTIVATION=activation,
        SCALED=p > 0 and seed is None, **config.options(),
    )  # fmt: skip


def _checked_weight_stride(w: Tensor) -> tuple[int, bool]:
    found = _weight_stride(w)
    if found is None:
        raise ValueError(f"neither dimension of the weight {list(w.shape)} is dense: strides {w.stride()}")
    return found
