"""Matrix products on Triton: out[batch, M, N] = a[batch, M, K] @ b[batch, K, N], and a vector times matrices.

Operands come with any strides as long as one of their two matrix dimensions is dense: a transposed operand is read
where it lies. The tile loop, its float32 chains and the split reduction are the linear layer's (tkernels.ops.
linear): where a product has too few tiles for the GPU, programs share a reduction and a second kernel adds their
float32 partials in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tkernels.core import autotune, library, mode, targets
from tkernels.core.config import Config, cdiv
from tkernels.core.launch import launch
from tkernels.ops.linear import config as linear_tuning
from tkernels.ops.linear import kernels as linear
from tkernels.ops.linear import kernels_tma
from tkernels.ops.linear.kernels import both_strides, load_tile, product_tile, tile_of_program
from tkernels.ops.linear.kernels_tma import Operand
from tkernels.ops.matmul import config as tuning


@triton.jit
def matrices_of_program(a_ptr, b_ptr, tiles, inner, a_stride_outer, a_stride_inner, b_stride_outer, b_stride_inner,
                        A_UNIT: tl.constexpr, B_UNIT: tl.constexpr):  # fmt: skip
    """(a_ptr, b_ptr, batch) of this program; the batch is outer * ``inner`` + inner."""
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    outer_index, inner_index = batch // inner, batch % inner
    a_ptr += outer_index * (a_stride_outer * A_UNIT) + inner_index * (a_stride_inner * A_UNIT)
    b_ptr += outer_index * (b_stride_outer * B_UNIT) + inner_index * (b_stride_inner * B_UNIT)
    return a_ptr, b_ptr, batch


# One program: a [BLOCK_M, BLOCK_N] tile of one product, over its split of K. Grid: (batches * tiles, splits).
# out: [splits, batches, M, N]. Sizes and strides arrive divided by their units: by 16
# bytes where all of a kind are multiples of that, so that loads are as wide.
@triton.jit(do_not_specialize=["M", "N", "K", "tiles", "inner", "batches", "steps", "a_stride", "a_stride_outer",
                               "a_stride_inner", "b_stride", "b_stride_outer", "b_stride_inner"])  # fmt: skip
def matmul_kernel(a_ptr, b_ptr, out_ptr, M, N, K, tiles, inner, batches, a_stride, a_stride_outer, a_stride_inner,
                  b_stride, b_stride_outer, b_stride_inner, steps, A_UNIT: tl.constexpr, B_UNIT: tl.constexpr,
                  M_UNIT: tl.constexpr, N_UNIT: tl.constexpr, K_UNIT: tl.constexpr, A_TRANSPOSED: tl.constexpr,
                  B_TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_K: tl.constexpr):  # fmt: skip
    a_ptr, b_ptr, batch = matrices_of_program(a_ptr, b_ptr, tiles, inner, a_stride_outer, a_stride_inner,
                                              b_stride_outer, b_stride_inner, A_UNIT, B_UNIT)  # fmt: skip
    M *= M_UNIT
    N *= N_UNIT
    K *= K_UNIT
    a_stride_m, a_stride_k = both_strides(a_stride * A_UNIT, A_TRANSPOSED)
    b_stride_k, b_stride_n = both_strides(b_stride * B_UNIT, B_TRANSPOSED)
    pid_m, pid_n = tile_of_program(tl.program_id(0) % tiles, M, N, BLOCK_M, BLOCK_N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first_step = tl.program_id(1) * steps
    end_step = tl.minimum(first_step + steps, tl.cdiv(K, BLOCK_K))
    acc = product_tile(a_ptr, b_ptr, offs_m, offs_n, M, N, K, a_stride_m, a_stride_k, b_stride_k, b_stride_n,
                       first_step, end_step, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    rows = (tl.program_id(1).to(tl.int64) * batches + batch) * M + offs_m
    offsets = rows[:, None] * N + offs_n[None, :]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


# One program: BLOCK_N elements of one vector a[K] @ b[K, N], over its split of K, without tensor cores: every element
# of b is read once, and that is the time. Sums stay apart by their place in a step until the end.
# Grid: (batches * tiles, splits). out: [splits, batches, N].
@triton.jit(do_not_specialize=["N", "K", "tiles", "inner", "batches", "steps", "a_stride_outer", "a_stride_inner",
                               "b_stride", "b_stride_outer", "b_stride_inner"])  # fmt: skip
def vector_matmul_kernel(a_ptr, b_ptr, out_ptr, N, K, tiles, inner, batches, a_stride, a_stride_outer, a_stride_inner,
                         b_stride, b_stride_outer, b_stride_inner, steps, B_UNIT: tl.constexpr,
                         B_TRANSPOSED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    a_ptr, b_ptr, batch = matrices_of_program(a_ptr, b_ptr, tiles, inner, a_stride_outer, a_stride_inner,
                                              b_stride_outer, b_stride_inner, 1, B_UNIT)  # fmt: skip
    b_stride_k, b_stride_n = both_strides(b_stride * B_UNIT, B_TRANSPOSED)
    if B_TRANSPOSED:
        K *= B_UNIT
    else:
        N *= B_UNIT
    offs_n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    first_step = tl.program_id(1) * steps
    end_step = tl.minimum(first_step + steps, tl.cdiv(K, BLOCK_K))
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for step in range(first_step, end_step):
        offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + offs_k.to(tl.int64) * a_stride, mask=offs_k < K, other=0.0)
        b = load_tile(b_ptr, offs_n, offs_k, b_stride_n, b_stride_k, N, K)
        acc += a.to(tl.float32)[None, :] * b.to(tl.float32)
    offsets = (tl.program_id(1).to(tl.int64) * batches + batch) * N + offs_n
    tl.store(out_ptr + offsets, tl.sum(acc, axis=1).to(out_ptr.dtype.element_ty), mask=offs_n < N)


class Matrices(NamedTuple):
    """How a tensor [*batch, rows, columns] lies: the stride of the matrix dimension that is not dense, whether that is
    the second, and the strides of two batch dimensions."""

    stride: int
    transposed: bool
    outer: int
    inner: int

    def unit(self, t: Tensor, dense: int) -> int:
        """Elements in 16 bytes if all strides and the dense dimension are multiples of it, else 1."""
        width = 16 // t.element_size()
        sizes = (self.stride, self.outer, self.inner, dense)
        return width if all(size % width == 0 for size in sizes) else 1


def dense_matrices(t: Tensor) -> Tensor:
    """``t`` where one of its last two dimensions is dense, else a contiguous copy."""
    return t if _matrix_stride(t) is not None else t.contiguous()


def _matrix_stride(t: Tensor) -> tuple[int, bool] | None:
    """(stride of the matrix dimension that is not dense, whether that is the second), or None where neither is."""
    rows, columns = t.shape[-2:]
    stride_rows, stride_columns = t.stride()[-2:]
    if columns == 1 or stride_columns == 1:
        return (stride_rows if rows > 1 else columns), False
    if rows == 1 or stride_rows == 1:
        return stride_columns, True
    return None


def fold_batches(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Batch dimensions merged as far as all operands allow: (sizes, strides of each operand). Sizes of 1 vanish."""
    sizes: list[int] = []
    folded: list[list[int]] = [[] for _ in strides]
    for dim, size in enumerate(shape):
        if size == 1:
            continue
        steps = [operand[dim] for operand in strides]
        if sizes and all(kept[-1] == step * size for kept, step in zip(folded, steps)):
            sizes[-1] *= size
            for kept, step in zip(folded, steps):
                kept[-1] = step
            continue
        sizes.append(size)
        for kept, step in zip(folded, steps):
            kept.append(step)
    return sizes, folded


def launch_matmul(
    a: Tensor, b: Tensor, dtype: torch.dtype | None = None, config: Config | None = None, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """a [*, M, K] @ b [*, K, N] with batch dimensions that broadcast; contiguous, in ``dtype`` (default: a's).

    Each operand must have a dense matrix dimension (:func:`dense_matrices`). ``splits``: 0 for one program a tile, else
    programs that share one. More than two batch dimensions that do not fold take a launch for each of the outermost.
    """
    batches = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    out = a.new_empty((*batches, a.shape[-2], b.shape[-1]), dtype=dtype or a.dtype)
    product(a, b, out, config=config, splits=splits)
    return out


def _flops(a: Sequence[int], b: Sequence[int], out: Sequence[int]) -> int:
    return 2 * math.prod(out) * a[-1]


@library.launches("matmul", mutates="out", flops=_flops)
def product(a: Tensor, b: Tensor, out: Tensor, *, config: Config | None = None, splits: int | None = None) -> None:
    """Writes ``out``, whose dtype decides; arguments as launch_matmul's."""
    (m, k), n, batches = a.shape[-2:], b.shape[-1], out.shape[:-2]
    if out.numel() == 0 or k == 0:
        out.zero_()
        return
    _launch_batches(a.expand(*batches, m, k), b.expand(*batches, k, n), out, config, splits)


def _launch_batches(a: Tensor, b: Tensor, out: Tensor, config: Config | None, splits: int | None) -> None:
    """The same for operands of equal batch dimensions, written to ``out``."""
    sizes, strides = fold_batches(out.shape[:-2], (a.stride()[:-2], b.stride()[:-2]))
    if len(sizes) > 2:
        for i in range(out.shape[0]):
            _launch_batches(a.select(0, i), b.select(0, i), out.select(0, i), config, splits)
        return
    inner = sizes[-1] if sizes else 1
    (a_outer, a_inner), (b_outer, b_inner) = ([0, 0, *steps][-2:] for steps in strides)
    layouts = Matrices(*_checked_stride(a), a_outer, a_inner), Matrices(*_checked_stride(b), b_outer, b_inner)
    m, n = out.shape[-2:]
    if m == 1:
        _launch_vector(a, b, layouts, inner, out.view(-1, n), config, splits)
    elif n == 1:
        # the same vector times the transposed matrix
        layouts = tuple(each._replace(transposed=not each.transposed) for each in reversed(layouts))
        _launch_vector(b.transpose(-2, -1), a.transpose(-2, -1), layouts, inner, out.view(-1, m), config, splits)
    else:
        _launch_matrices(a, b, layouts, inner, out.view(-1, m, n), config, splits)


def _checked_stride(t: Tensor) -> tuple[int, bool]:
    found = _matrix_stride(t)
    if found is None:
        raise ValueError(f"neither matrix dimension of {list(t.shape)} is dense: strides {t.stride()}")
    return found


def _launch_matrices(a: Tensor, b: Tensor, layouts: tuple[Matrices, Matrices], inner: int, out: Tensor,
                     config: Config | None, splits: int | None) -> None:  # fmt: skip
    (batches, m, n), k = out.shape, a.shape[-1]
    la, lb = layouts
    precision, given = mode.dot_precision(a.dtype, "matmul"), config is not None
    a_unit = la.unit(a, m if la.transposed else k)
    b_unit = lb.unit(b, k if lb.transposed else n)
    # rows matter to the width of a load only where they are what is dense
    m_unit, n_unit, k_unit = _width(a, m) if la.transposed else 1, _width(a, n), _width(a, k)
    config = config or autotune.pick(
        "matmul", m, (batches, n, k, a.dtype, precision, la.transposed, lb.transposed),
        tuning.product(
            m, n, k, a.element_size(), precision, targets.current(), min(a_unit, b_unit, n_unit, k_unit) > 1
        ),
        lambda c: _launch_matrices(a, b, layouts, inner, out, c, splits), a,
    )  # fmt: skip
    tiles = cdiv(m, config["BLOCK_M"]) * cdiv(n, config["BLOCK_N"])
    if splits is None:
        splits = tuning.splits(batches * tiles, k, targets.current())
    if batches == 1 and not (given or splits):
        one = Operand(a, m, k, la.stride, la.transposed), Operand(b, k, n, lb.stride, lb.transposed)
        if kernels_tma.product(*one, out):
            return
    steps, parts = linear.split(k, config["BLOCK_K"], splits)
    target = a.new_empty((parts, batches, m, n), dtype=torch.float32) if splits else out
    launch(
        matmul_kernel, (batches * tiles, parts),
        a, b, target, m // m_unit, n // n_unit, k // k_unit, tiles, inner, batches,
        la.stride // a_unit, la.outer // a_unit, la.inner // a_unit,
        lb.stride // b_unit, lb.outer // b_unit, lb.inner // b_unit, steps,
        A_UNIT=a_unit, B_UNIT=b_unit, M_UNIT=m_unit, N_UNIT=n_unit, K_UNIT=k_unit, A_TRANSPOSED=la.transposed,
        B_TRANSPOSED=lb.transposed, PRECISION=precision, **config.options(),
    )  # fmt: skip
    if splits:
        linear.finish(target.view(parts, batches * m, n), None, 0, out)


def _launch_vector(a: Tensor, b: Tensor, layouts: tuple[Matrices, Matrices], inner: int, out: Tensor,
                   config: Config | None, splits: int | None) -> None:  # fmt: skip
    (batches, n), k = out.shape, b.shape[-2]
    la, lb = layouts
    # the vector's own step: a row of one matrix, wherever its dense dimension is
    step = a.stride(-1) if k > 1 else 1
    config = config or tuning.vector(n, k, lb.transposed)
    tiles = cdiv(n, config["BLOCK_N"])
    if splits is None:
        splits = tuning.splits(batches * tiles, k, targets.current())
    steps, parts = linear.split(k, config["BLOCK_K"], splits)
    unit = lb.unit(b, k if lb.transposed else n)
    target = a.new_empty((parts, batches, n), dtype=torch.float32) if splits else out
    launch(
        vector_matmul_kernel, (batches * tiles, parts),
        a, b, target, n // (1 if lb.transposed else unit), k // (unit if lb.transposed else 1), tiles, inner, batches,
        step, la.outer, la.inner, lb.stride // unit, lb.outer // unit, lb.inner // unit, steps, B_UNIT=unit,
        B_TRANSPOSED=lb.transposed, **config.options(),
    )  # fmt: skip
    if splits:
        one_row = linear_tuning.finish(n, targets.current())
        linear.finish(target.view(parts, batches, n), None, 0, out, config=one_row)


def _width(t: Tensor, size: int) -> int:
    width = 16 // t.element_size()
    return width if size % width == 0 else 1
