"""Attention on Triton: softmax(q @ k^T * scale + mask) @ v, tile by tile, forward.

A program holds some rows of q and goes over all keys with a running maximum and sum (online softmax), so that no matrix
of queries by keys is ever stored. What backward needs of it is one number a row: the base-2 logarithm of the sum of
exponentials (LSE), +inf for a row that attends to nothing, whose output is 0.

A mask that is added may hold the smallest number there is, and a whole row of it is the mean of the values. Scores keep
the natural base then, for times log2 e that number would be -inf, and LSE is two numbers a row, the maximum and the
base-2 logarithm of the sum of exponentials above it: their sum would forget the second.

The loops over keys are split where masking begins: tiles that every row sees whole need no comparisons.

Sources: Milakov, Gimelshein 2018 (online softmax); Dao 2023, "FlashAttention-2" (order of the loops, delta).
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
from tkernels.ops.attention import config as tuning

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(ptr, offs_r, offs_d, stride, n_rows, HEAD: tl.constexpr, FULL_HEAD: tl.constexpr, MASKED: tl.constexpr,
              TRANSPOSED: tl.constexpr = False):  # fmt: skip
    """A tile [rows, head] of a matrix whose rows are dense, 0 outside it; TRANSPOSED: the same as [head, rows].
    FULL_HEAD: offs_d stays below HEAD; MASKED false: offs_r stays below n_rows."""
    R_AXIS: tl.constexpr = 0 if TRANSPOSED else 1
    ptrs = ptr + tl.expand_dims(offs_r.to(tl.int64), R_AXIS) * stride + tl.expand_dims(offs_d, 1 - R_AXIS)
    if MASKED:
        mask = tl.expand_dims(offs_r < n_rows, R_AXIS)
        if not FULL_HEAD:
            mask = mask & tl.expand_dims(offs_d < HEAD, 1 - R_AXIS)
        return tl.load(ptrs, mask=mask, other=0.0)
    if FULL_HEAD:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=tl.expand_dims(offs_d < HEAD, 1 - R_AXIS), other=0.0)


@triton.jit
def program_of(tiles, heads, LAST_FIRST: tl.constexpr):
    """This program's tile, the number of its head over all batches, its batch, and its head there. LAST_FIRST: the last
    tiles, of causal attention the longest, come first."""
    tile = tl.program_id(0) % tiles
    if LAST_FIRST:
        tile = tiles - 1 - tile
    index = (tl.program_id(0) // tiles).to(tl.int64)
    return tile, index, index // heads, index % heads


@triton.jit
def products(a, a_ptr, offs_a, a_stride, n_a, b_ptr, offs_b, b_stride, n_b, HEAD: tl.constexpr, BLOCK: tl.constexpr,
             CHUNK: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_A: tl.constexpr,
             BLOCK_B: tl.constexpr):  # fmt: skip
    """(a[BLOCK_A, HEAD] @ b[BLOCK_B, HEAD]^T, b^T) of a tile ``a``. Where that is None, CHUNK features at a time, and
    0 for b^T: a thread that held whole rows of wide heads, or any without tensor cores, would run out of registers."""
    if a is not None:
        bt = load_rows(b_ptr, offs_b, tl.arange(0, BLOCK), b_stride, n_b, HEAD, HEAD == BLOCK, MASKED, True)
        acc = tl.dot(a, bt, input_precision=PRECISION)
    else:
        bt = 0
        acc = tl.zeros((BLOCK_A, BLOCK_B), dtype=tl.float32)
        for first in range(0, BLOCK, CHUNK):
            offs_d = first + tl.arange(0, CHUNK)
            rows = load_rows(a_ptr, offs_a, offs_d, a_stride, n_a, HEAD, HEAD == BLOCK, True)
            columns = load_rows(b_ptr, offs_b, offs_d, b_stride, n_b, HEAD, HEAD == BLOCK, True, True)
            acc = common.add_product(acc, rows, columns, PRECISION)
    return acc, bt


@triton.jit
def masked_scores(s, mask_ptr, offs_m, offs_n, m_stride, n_stride, n_q, n_k, scale, CAUSAL: tl.constexpr,
                  BOOLEAN: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Scores: times ``scale`` (log2 e included, but for a mask that is added), plus the mask, -inf where none counts.

    ``offs_m``, ``offs_n``: indices of queries and keys, shaped to broadcast against ``s``, which may be transposed.
    """
    s *= scale
    inside = (offs_m < n_q) & (offs_n < n_k)
    if mask_ptr is not None:
        ptrs = mask_ptr + offs_m.to(tl.int64) * m_stride + offs_n.to(tl.int64) * n_stride
        mask = tl.load(ptrs, mask=inside, other=0)
        if BOOLEAN:
            s = tl.where(mask != 0, s, float("-inf"))
        else:
            s += mask.to(tl.float32)
    if MASKED:
        seen = inside
        if CAUSAL:
            seen = seen & (offs_n <= offs_m)
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def exponential(s, ADDED: tl.constexpr):
    """Of differences of scores, in the base that :func:`masked_scores` has them in."""
    if ADDED:
        s *= LOG2_E
    return tl.exp2(s)


@triton.jit
def load_lse(lse_ptr, first_row, offs_m, n_q, ADDED: tl.constexpr):
    """Of rows ``offs_m`` of the head that begins at ``first_row``: the two numbers of an added mask, else (LSE, 0)."""
    if ADDED:
        lse_ptr += first_row
        logsum = tl.load(lse_ptr + first_row + n_q + offs_m)
    else:
        logsum = 0.0
    return tl.load(lse_ptr + first_row + offs_m), logsum


@triton.jit
def weights_of(s, top, logsum, axis: tl.constexpr, ADDED: tl.constexpr):
    """Softmax of scores from what forward kept of their rows (load_lse); ``axis``: the one of the keys."""
    s -= tl.expand_dims(top, axis)
    if ADDED:
        s = s * LOG2_E - tl.expand_dims(logsum, axis)
    return tl.exp2(s)


@triton.jit
def attend(acc, row_max, row_sum, q, q_ptr, k_ptr, v_ptr, mask_ptr, seed, first_row, offs_m, first_key, end_key, n_q,
           n_k, q_stride, k_stride, v_stride, mask_stride_m, mask_stride_n, scale, p, CAUSAL: tl.constexpr,
           BOOLEAN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, HEAD: tl.constexpr,
           V_HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Take the keys in [first_key, end_key) into a tile's running output, maximum and sum."""
    ADDED: tl.constexpr = mask_ptr is not None and not BOOLEAN
    offs_v = tl.arange(0, BLOCK_V)
    for first in range(first_key, end_key, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        s, _kt = products(q, q_ptr, offs_m, q_stride, n_q, k_ptr, offs_n, k_stride, n_k, HEAD, BLOCK_D, CHUNK, MASKED,
                          PRECISION, BLOCK_M, BLOCK_N)  # fmt: skip
        s = masked_scores(s, mask_ptr, offs_m[:, None], offs_n[None, :], mask_stride_m, mask_stride_n, n_q, n_k, scale,
                          CAUSAL, BOOLEAN, MASKED)  # fmt: skip
        new_max = tl.maximum(row_max, tl.max(s, axis=1))
        # a row that has seen nothing yet: -inf less -inf would be NaN
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = exponential(s - shift[:, None], ADDED)
        rescale = exponential(row_max - shift, ADDED)
        row_sum = row_sum * rescale + tl.sum(weights, axis=1)
        acc *= rescale[:, None]
        if seed is not None:
            weights *= common.keep_scale(seed, first_row + offs_m, first, n_k, p, BLOCK_M, BLOCK_N)
        v = load_rows(v_ptr, offs_n, offs_v, v_stride, n_k, V_HEAD, V_HEAD == BLOCK_V, MASKED)
        acc = common.add_product(acc, weights.to(v.dtype), v, PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


# One program: BLOCK_M rows of the output [batch, heads, n_q, V_HEAD] and their LSE [batch, heads, n_q].
# Grid: (tiles of rows * batch * heads,). Strides arrive divided by UNIT.
@triton.jit(do_not_specialize=["heads", "group", "n_q", "n_k", "tiles", "q_stride_b", "q_stride_h", "q_stride_m",
                               "k_stride_b", "k_stride_h", "k_stride_n", "v_stride_b", "v_stride_h", "v_stride_n",
                               "o_stride_b", "o_stride_h", "o_stride_m", "mask_stride_b", "mask_stride_h",
                               "mask_stride_m"])  # fmt: skip
def attention_forward_kernel(q_ptr, k_ptr, v_ptr, mask_ptr, seed_ptr, o_ptr, lse_ptr, heads, group, n_q, n_k, tiles,
                             q_stride_b, q_stride_h, q_stride_m, k_stride_b, k_stride_h, k_stride_n, v_stride_b,
                             v_stride_h, v_stride_n, o_stride_b, o_stride_h, o_stride_m, mask_stride_b, mask_stride_h,
                             mask_stride_m, mask_stride_n, scale, p, UNIT: tl.constexpr, CAUSAL: tl.constexpr,
                             BOOLEAN: tl.constexpr, PRECISION: tl.constexpr, HEAD: tl.constexpr, V_HEAD: tl.constexpr,
                             BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
                             BLOCK_N: tl.constexpr):  # fmt: skip
    tile, index, batch, head = program_of(tiles, heads, CAUSAL)
    q_ptr += (batch * q_stride_b + head * q_stride_h) * UNIT
    k_ptr += (batch * k_stride_b + head // group * k_stride_h) * UNIT
    v_ptr += (batch * v_stride_b + head // group * v_stride_h) * UNIT
    o_ptr += (batch * o_stride_b + head * o_stride_h) * UNIT
    if mask_ptr is not None:
        mask_ptr += batch * mask_stride_b + head * mask_stride_h
    q_stride_m *= UNIT
    k_stride_n *= UNIT
    v_stride_n *= UNIT
    first_row = index * n_q
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_v = tl.arange(0, BLOCK_V)
    q = None
    if CHUNK == BLOCK_D:
        q = load_rows(q_ptr, offs_m, tl.arange(0, BLOCK_D), q_stride_m, n_q, HEAD, HEAD == BLOCK_D, True)
    seed = None if seed_ptr is None else tl.load(seed_ptr)
    row_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
    end = n_k
    whole = n_k // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.minimum(n_k, (tile + 1) * BLOCK_M)
        whole = tl.minimum(whole, tile * BLOCK_M // BLOCK_N * BLOCK_N)
    for MASKED in tl.static_range(2):
        acc, row_max, row_sum = attend(
            acc, row_max, row_sum, q, q_ptr, k_ptr, v_ptr, mask_ptr, seed, first_row, offs_m, whole if MASKED else 0,
            end if MASKED else whole, n_q, n_k, q_stride_m, k_stride_n, v_stride_n, mask_stride_m, mask_stride_n, scale,
            p, CAUSAL, BOOLEAN, MASKED, PRECISION, HEAD, V_HEAD, BLOCK_D, BLOCK_V, CHUNK, BLOCK_M, BLOCK_N)  # fmt: skip
    nothing = row_sum == 0
    acc /= tl.where(nothing, 1.0, row_sum)[:, None]
    if lse_ptr is not None:
        top, logsum = row_max, tl.log2(row_sum)
        if mask_ptr is not None and not BOOLEAN:
            lse_ptr += first_row
            tl.store(lse_ptr + first_row + n_q + offs_m, tl.where(nothing, 0.0, logsum), mask=offs_m < n_q)
        else:
            top += logsum
        tl.store(lse_ptr + first_row + offs_m, tl.where(nothing, float("inf"), top), mask=offs_m < n_q)
    offsets = offs_m.to(tl.int64)[:, None] * (o_stride_m * UNIT) + offs_v[None, :]
    tl.store(o_ptr + offsets, acc.to(o_ptr.dtype.element_ty), mask=(offs_m < n_q)[:, None] & (offs_v < V_HEAD)[None, :])


def dense_heads(t: Tensor) -> Tensor:
    """``t`` [batch, heads, length, head] where heads are dense, else a contiguous copy."""
    return t if t.shape[-1] == 1 or t.stride(-1) == 1 else t.contiguous()


def like_heads(t: Tensor) -> Tensor:
    """An empty tensor of its shape with dense heads: in its memory order where that has them (that of overlapping rows,
    as torch makes it, may not)."""
    like = torch.empty_like(t)
    return like if like.shape[-1] == 1 or like.stride(-1) == 1 else t.new_empty(t.shape)


def unit_of(*tensors: Tensor) -> int:
    """Elements in 16 bytes if all strides and head dimensions are multiples of that, else 1."""
    width = 16 // tensors[0].element_size()
    sizes = [size for t in tensors for size in (*t.stride()[:-1], t.shape[-1])]
    return width if all(size % width == 0 for size in sizes) else 1


def strides_of(t: Tensor | None, unit: int) -> tuple[int, ...]:
    """Strides of batch, head and row in units."""
    return (0, 0, 0) if t is None else tuple(stride // unit for stride in t.stride()[:-1])


def mask_of(mask: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor | None, tuple[int, ...]]:
    """(mask, as bytes if it is boolean; its strides over [batch, heads, n_q, n_k], 0 where it repeats)."""
    if mask is None:
        return None, (0, 0, 0, 0)
    whole = mask.expand(*q.shape[:-1], k.shape[-2])
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask), whole.stride()


def is_added(mask: Tensor | None) -> bool:
    """Whether it is added to the scores."""
    return mask is not None and mask.dtype != torch.bool


def score_factor(scale: float, mask: Tensor | None) -> float:
    """What the kernels scale scores by: see masked_scores."""
    return scale if is_added(mask) else scale * math.log2(math.e)


def like_flash(q: Tensor, head: int) -> Tensor:
    """An empty output [batch, heads, length, head] in the memory order of PyTorch's flash attention: heads of one
    position side by side, as the projection behind attention reads them."""
    batch, heads, length, _ = q.shape
    return q.new_empty_strided((batch, heads, length, head), (length * heads * head, head, heads * head, 1))


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, p: float = 0.0, causal: bool = False,
    scale: float = 1.0, seed: Tensor | None = None, save_lse: bool = True, config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(o [B, H, n_q, V], LSE in float32 of lse_shape, or None) for q [B, H, n_q, D], k [B, G, n_k, D] and
    v [B, G, n_k, V], all with dense last dimensions; H is a multiple of G. ``mask``: broadcasts to [B, H, n_q, n_k],
    boolean or added. ``seed``: dropout's, None for none."""
    o = like_flash(q, v.shape[-1])
    lse = q.new_empty(tuning.lse_shape(q.shape, is_added(mask)), dtype=torch.float32) if save_lse else None
    forward(q, k, v, mask, seed, o, lse, p, causal, scale, config=config)
    return o, lse


def product_flops(q: Sequence[int], k: Sequence[int], width: int) -> int:
    """Of one product over all queries and keys; as in torch's count, a causal mask spares none."""
    return 2 * math.prod(q[:3]) * k[-2] * width


def _flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any) -> int:
    return product_flops(q, k, q[-1] + v[-1])


@library.launches("attention_forward", mutates="o lse", flops=_flops)
def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, o: Tensor, lse: Tensor | None, p: float,
    causal: bool, scale: float, *, config: Config | None = None,
) -> None:  # fmt: skip
    """Writes o and lse; arguments as launch_forward's."""
    (batch, heads, n_q, head), v_head = q.shape, v.shape[-1]
    n_k = k.shape[-2]
    if o.numel() == 0:
        return
    precision = mode.dot_precision(q.dtype, "matmul")
    config = config or autotune.pick(
        "attention forward", batch * heads,
        (head, v_head, n_q, n_k, q.dtype, precision, causal, mask is not None, p > 0),
        tuning.forward(head, v_head, q.element_size(), precision, mask is not None or p > 0, targets.current()),
        lambda c: forward(q, k, v, mask, seed, o, lse, p, causal, scale, config=c), q,
        least=tuning.least_rows(q.element_size(), targets.current()),
    )  # fmt: skip
    unit = unit_of(q, k, v, o)
    mask_bytes, mask_strides = mask_of(mask, q, k)
    tiles = cdiv(n_q, config["BLOCK_M"])
    launch(
        attention_forward_kernel, (tiles * batch * heads,),
        q, k, v, mask_bytes, seed, o, lse, heads, heads // k.shape[1], n_q, n_k, tiles, *strides_of(q, unit),
        *strides_of(k, unit), *strides_of(v, unit), *strides_of(o, unit), *mask_strides, score_factor(scale, mask), p,
        UNIT=unit, CAUSAL=causal, BOOLEAN=mask is not None and mask.dtype == torch.bool, PRECISION=precision,
        HEAD=head, V_HEAD=v_head, **config.options(),
    )  # fmt: skip
