"""Matrix products by descriptors (tkernels.core.descriptors): linear's forward and matmul, where TKERNELS_TMA=1."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from tkernels.core import descriptors, targets
from tkernels.core import device as common
from tkernels.core.config import Config, block, cdiv
from tkernels.core.launch import launch

# Activations that need registers for themselves: tiles half as large.
LONG = ("gelu", "silu")


# One program: [BLOCK_M, BLOCK_N] tiles of out = activation(a @ b + bias), one after another in grouped order. Grid: one
# program a multiprocessor. a_desc: of a[M, K], or of [K, M] where A_TRANSPOSED; b_desc: of b[K, N] or [N, K].
@triton.jit(do_not_specialize=["tiles_m", "tiles_n", "steps", "N"])
def linear_tma_kernel(a_desc, b_desc, out_desc, bias_ptr, tiles_m, tiles_n, steps, N, bias_stride,
                      A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, ACTIVATION: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    tl.assume(steps > 0)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pid_m, pid_n = common.grouped_tile(tile, tiles_m, tiles_n)
        m, n = pid_m * BLOCK_M, pid_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(steps):
            k = step * BLOCK_K
            a = a_desc.load([k, m]).T if A_TRANSPOSED else a_desc.load([m, k])
            b = b_desc.load([n, k]).T if B_TRANSPOSED else b_desc.load([k, n])
            acc = tl.dot(a, b, acc, input_precision="ieee")
        if bias_ptr is not None:
            offs_n = n + tl.arange(0, BLOCK_N)
            bias = tl.load(bias_ptr + offs_n * bias_stride, mask=offs_n < N, other=0.0)
            acc = common.add_bias(acc, bias.to(tl.float32))
        out_desc.store([m, n], common.activate(acc, ACTIVATION).to(out_desc.dtype))


class Operand(NamedTuple):
    """``t`` as a matrix [rows, columns]; ``stride``: of the dimension that is not dense, ``transposed``: the second."""

    t: Tensor
    rows: int
    columns: int
    stride: int
    transposed: bool

    def lies_well(self) -> bool:
        width = descriptors.ALIGNMENT // self.t.element_size()
        return self.stride % width == 0 and self.stride >= (self.rows if self.transposed else self.columns)

    def describe(self, rows: int, columns: int) -> object:
        """Its descriptor, for blocks of [rows, columns]."""
        shape, block = (self.rows, self.columns), (rows, columns)
        if self.transposed:
            shape, block = shape[::-1], block[::-1]
        return descriptors.describe(self.t, shape, (self.stride, 1), block)


def config(n: int, k: int, itemsize: int, activation: str | None) -> Config:
    """For out[M, n] = a[M, k] @ b[k, n]."""
    # both need a result's tile and two stages of operands
    large = activation not in LONG and targets.current().shared_memory >= 160 << 10
    bm, bn, bk = 128, block(n, 64, 256 if large else 128), block(k, 16, 128 // itemsize)
    stages = descriptors.stages((bm + bn) * bk * itemsize, bm * bn * itemsize)
    return Config.of(num_warps=8, num_stages=stages, BLOCK_M=bm, BLOCK_N=bn, BLOCK_K=bk)


def product(
    a: Operand, b: Operand, out: Tensor, bias: Tensor | None = None, bias_stride: int = 0,
    activation: str | None = None, launched: Config | None = None,
) -> bool:  # fmt: skip
    """Writes ``out`` [.., N], contiguous, = activation(a @ b + bias); False, and nothing is done, where descriptors
    cannot be taken."""
    m, n, k = a.rows, b.columns, a.columns
    result = Operand(out, m, n, n, False)
    if not (descriptors.take(a.t, b.t, out) and a.lies_well() and b.lies_well() and result.lies_well()):
        return False
    c = launched or config(n, k, out.element_size(), activation)
    bm, bn, bk = c["BLOCK_M"], c["BLOCK_N"], c["BLOCK_K"]
    tiles_m, tiles_n = cdiv(m, bm), cdiv(n, bn)
    launch(
        linear_tma_kernel, (descriptors.programs(tiles_m * tiles_n),),
        a.describe(bm, bk), b.describe(bk, bn), result.describe(bm, bn), bias, tiles_m, tiles_n, cdiv(k, bk), n,
        bias_stride, A_TRANSPOSED=a.transposed, B_TRANSPOSED=b.transposed, ACTIVATION=activation, **c.options(),
    )  # fmt: skip
    return True
