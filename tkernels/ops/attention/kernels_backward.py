"""Gradients of attention on Triton: weights are computed anew from the saved LSE, tile by tile.

Three launches, none with atomics: delta = sum(o * do) a row; dq, a program a tile of queries that goes over the keys;
dk and dv, a program a tile of keys that goes over the queries of all heads that share them.
"""

from __future__ import annotations

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
from tkernels.ops.attention.kernels import (
    like_heads,
    load_lse,
    load_rows,
    mask_of,
    masked_scores,
    product_flops,
    products,
    program_of,
    score_factor,
    strides_of,
    unit_of,
    weights_of,
)


# One program: delta of BLOCK_M rows of one head. Grid: (tiles of rows * batch * heads,).
@triton.jit(do_not_specialize=["heads", "n_q", "tiles", "o_stride_b", "o_stride_h", "o_stride_m", "do_stride_b",
                               "do_stride_h", "do_stride_m"])  # fmt: skip
def attention_delta_kernel(o_ptr, do_ptr, delta_ptr, heads, n_q, tiles, o_stride_b, o_stride_h, o_stride_m, do_stride_b,
                           do_stride_h, do_stride_m, UNIT: tl.constexpr, V_HEAD: tl.constexpr, BLOCK_V: tl.constexpr,
                           BLOCK_M: tl.constexpr):  # fmt: skip
    tile, index, batch, head = program_of(tiles, heads, False)
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_v = tl.arange(0, BLOCK_V)
    o_ptr += (batch * o_stride_b + head * o_stride_h) * UNIT
    do_ptr += (batch * do_stride_b + head * do_stride_h) * UNIT
    o = load_rows(o_ptr, offs_m, offs_v, o_stride_m * UNIT, n_q, V_HEAD, V_HEAD == BLOCK_V, True)
    do = load_rows(do_ptr, offs_m, offs_v, do_stride_m * UNIT, n_q, V_HEAD, V_HEAD == BLOCK_V, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    tl.store(delta_ptr + index * n_q + offs_m, delta, mask=offs_m < n_q)


@triton.jit
def gather_dq(dq, q, do, q_ptr, do_ptr, k_ptr, v_ptr, mask_ptr, seed, lse, logsum, delta, first_row, offs_m,
              first_key, end_key, n_q, n_k, q_stride, do_stride, k_stride, v_stride, mask_stride_m, mask_stride_n,
              scale, p, CAUSAL: tl.constexpr, BOOLEAN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
              HEAD: tl.constexpr, V_HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
              CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """``dq`` plus what the keys in [first_key, end_key) give, the scale left out."""
    ADDED: tl.constexpr = mask_ptr is not None and not BOOLEAN
    offs_d = tl.arange(0, BLOCK_D)
    for first in range(first_key, end_key, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        s, kt = products(q, q_ptr, offs_m, q_stride, n_q, k_ptr, offs_n, k_stride, n_k, HEAD, BLOCK_D, CHUNK, MASKED,
                         PRECISION, BLOCK_M, BLOCK_N)  # fmt: skip
        dw, _vt = products(do, do_ptr, offs_m, do_stride, n_q, v_ptr, offs_n, v_stride, n_k, V_HEAD, BLOCK_V, CHUNK,
                           MASKED, PRECISION, BLOCK_M, BLOCK_N)  # fmt: skip
        s = masked_scores(s, mask_ptr, offs_m[:, None], offs_n[None, :], mask_stride_m, mask_stride_n, n_q, n_k, scale,
                          CAUSAL, BOOLEAN, MASKED)  # fmt: skip
        weights = weights_of(s, lse, logsum, 1, ADDED)
        if seed is not None:
            dw *= common.keep_scale(seed, first_row + offs_m, first, n_k, p, BLOCK_M, BLOCK_N)
        ds = weights * (dw - delta[:, None])
        if CHUNK == BLOCK_D:
            k = tl.trans(kt)
        else:
            k = load_rows(k_ptr, offs_n, offs_d, k_stride, n_k, HEAD, HEAD == BLOCK_D, MASKED)
        dq = common.add_product(dq, ds.to(k.dtype), k, PRECISION)
    return dq


# One program: BLOCK_M rows of dq [batch, heads, n_q, HEAD]. Grid: (tiles of rows * batch * heads,).
@triton.jit(do_not_specialize=["heads", "group", "n_q", "n_k", "tiles", "q_stride_b", "q_stride_h", "q_stride_m",
                               "k_stride_b", "k_stride_h", "k_stride_n", "v_stride_b", "v_stride_h", "v_stride_n",
                               "do_stride_b", "do_stride_h", "do_stride_m", "dq_stride_b", "dq_stride_h",
                               "dq_stride_m", "mask_stride_b", "mask_stride_h", "mask_stride_m"])  # fmt: skip
def attention_dq_kernel(q_ptr, k_ptr, v_ptr, do_ptr, mask_ptr, seed_ptr, lse_ptr, delta_ptr, dq_ptr, heads, group, n_q,
                        n_k, tiles, q_stride_b, q_stride_h, q_stride_m, k_stride_b, k_stride_h, k_stride_n, v_stride_b,
                        v_stride_h, v_stride_n, do_stride_b, do_stride_h, do_stride_m, dq_stride_b, dq_stride_h,
                        dq_stride_m, mask_stride_b, mask_stride_h, mask_stride_m, mask_stride_n, scale, score_scale, p,
                        UNIT: tl.constexpr, CAUSAL: tl.constexpr, BOOLEAN: tl.constexpr, PRECISION: tl.constexpr,
                        HEAD: tl.constexpr, V_HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
                        CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    tile, index, batch, head = program_of(tiles, heads, CAUSAL)
    q_ptr += (batch * q_stride_b + head * q_stride_h) * UNIT
    k_ptr += (batch * k_stride_b + head // group * k_stride_h) * UNIT
    v_ptr += (batch * v_stride_b + head // group * v_stride_h) * UNIT
    do_ptr += (batch * do_stride_b + head * do_stride_h) * UNIT
    dq_ptr += (batch * dq_stride_b + head * dq_stride_h) * UNIT
    if mask_ptr is not None:
        mask_ptr += batch * mask_stride_b + head * mask_stride_h
    q_stride_m *= UNIT
    k_stride_n *= UNIT
    v_stride_n *= UNIT
    do_stride_m *= UNIT
    first_row = index * n_q
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    q, do = None, None
    if CHUNK == BLOCK_D:
        q = load_rows(q_ptr, offs_m, offs_d, q_stride_m, n_q, HEAD, HEAD == BLOCK_D, True)
        do = load_rows(do_ptr, offs_m, tl.arange(0, BLOCK_V), do_stride_m, n_q, V_HEAD, V_HEAD == BLOCK_V, True)
    seed = None if seed_ptr is None else tl.load(seed_ptr)
    there = tl.minimum(offs_m, n_q - 1)  # dq's other rows are not stored
    lse, logsum = load_lse(lse_ptr, first_row, there, n_q, mask_ptr is not None and not BOOLEAN)
    delta = tl.load(delta_ptr + first_row + there)
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    end = n_k
    whole = n_k // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.minimum(n_k, (tile + 1) * BLOCK_M)
        whole = tl.minimum(whole, tile * BLOCK_M // BLOCK_N * BLOCK_N)
    for MASKED in tl.static_range(2):
        dq = gather_dq(
            dq, q, do, q_ptr, do_ptr, k_ptr, v_ptr, mask_ptr, seed, lse, logsum, delta, first_row, offs_m,
            whole if MASKED else 0, end if MASKED else whole, n_q, n_k, q_stride_m, do_stride_m, k_stride_n, v_stride_n,
            mask_stride_m, mask_stride_n, score_scale, p, CAUSAL, BOOLEAN, MASKED, PRECISION, HEAD, V_HEAD, BLOCK_D,
            BLOCK_V, CHUNK, BLOCK_M, BLOCK_N)  # fmt: skip
    offsets = offs_m.to(tl.int64)[:, None] * (dq_stride_m * UNIT) + offs_d[None, :]
    mask = (offs_m < n_q)[:, None] & (offs_d < HEAD)[None, :]
    tl.store(dq_ptr + offsets, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask)


# One program: BLOCK_N rows of dk [batch, heads / group, n_k, HEAD] and of dv [.., V_HEAD], over the queries of the
# heads that share them. Tiles of weights lie transposed, [keys, queries]. Grid: (tiles * batch * heads / group,).
@triton.jit(do_not_specialize=["kv_heads", "group", "n_q", "n_k", "tiles", "q_stride_b", "q_stride_h", "q_stride_m",
                               "k_stride_b", "k_stride_h", "k_stride_n", "v_stride_b", "v_stride_h", "v_stride_n",
                               "do_stride_b", "do_stride_h", "do_stride_m", "dk_stride_b", "dk_stride_h",
                               "dk_stride_n", "dv_stride_b", "dv_stride_h", "dv_stride_n", "mask_stride_b",
                               "mask_stride_h", "mask_stride_m"])  # fmt: skip
def attention_dkv_kernel(q_ptr, k_ptr, v_ptr, do_ptr, mask_ptr, seed_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, kv_heads,
                         group, n_q, n_k, tiles, q_stride_b, q_stride_h, q_stride_m, k_stride_b, k_stride_h, k_stride_n,
                         v_stride_b, v_stride_h, v_stride_n, do_stride_b, do_stride_h, do_stride_m, dk_stride_b,
                         dk_stride_h, dk_stride_n, dv_stride_b, dv_stride_h, dv_stride_n, mask_stride_b, mask_stride_h,
                         mask_stride_m, mask_stride_n, scale, score_scale, p, UNIT: tl.constexpr, CAUSAL: tl.constexpr,
                         BOOLEAN: tl.constexpr, PRECISION: tl.constexpr, HEAD: tl.constexpr, V_HEAD: tl.constexpr,
                         BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
                         BLOCK_N: tl.constexpr):  # fmt: skip
    ADDED: tl.constexpr = mask_ptr is not None and not BOOLEAN
    tile, index, batch, kv_head = program_of(tiles, kv_heads, False)
    first_head = kv_head * group
    q_ptr += (batch * q_stride_b + first_head * q_stride_h) * UNIT
    k_ptr += (batch * k_stride_b + kv_head * k_stride_h) * UNIT
    v_ptr += (batch * v_stride_b + kv_head * v_stride_h) * UNIT
    do_ptr += (batch * do_stride_b + first_head * do_stride_h) * UNIT
    if mask_ptr is not None:
        mask_ptr += batch * mask_stride_b + first_head * mask_stride_h
    q_stride_m *= UNIT
    k_stride_n *= UNIT
    v_stride_n *= UNIT
    do_stride_m *= UNIT
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_V)
    k = None
    if CHUNK == BLOCK_D:
        k = load_rows(k_ptr, offs_n, offs_d, k_stride_n, n_k, HEAD, HEAD == BLOCK_D, True)
        v = load_rows(v_ptr, offs_n, offs_v, v_stride_n, n_k, V_HEAD, V_HEAD == BLOCK_V, True)
    seed = None if seed_ptr is None else tl.load(seed_ptr)
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    # under a causal mask the first queries do not see these keys
    first_tile = 0
    if CAUSAL:
        first_tile = tile * BLOCK_N // BLOCK_M
    # keys that no query sees take one step, in which all is masked: ptxas does not overlap wgmmas in a loop that may
    # have none
    steps = tl.maximum(tl.cdiv(n_q, BLOCK_M) - first_tile, 1)
    if CHUNK == BLOCK_D:  # heads in pieces have no wgmma in this loop, and ptxas spills on sm_120
        tl.assume(steps * group > 0)
    # One loop over all queries of all heads of the group, in which the tiles on a causal mask's diagonal alone compare.
    # Keys that are not there give rows of dk and dv that are not stored. A query that is not there has the last one's
    # weights and no gradient: it adds 0, or NaN to keys for which the last one has a NaN.
    for step in range(steps * group):
        head = (step // steps).to(tl.int64)  # of the group
        first = (first_tile + step % steps) * BLOCK_M
        offs_m = first + tl.arange(0, BLOCK_M)
        there = tl.minimum(offs_m, n_q - 1)
        q_at = q_ptr + head * q_stride_h * UNIT
        do_at = do_ptr + head * do_stride_h * UNIT
        first_row = (index * group + head) * n_q
        lse, logsum = load_lse(lse_ptr, first_row, there, n_q, ADDED)
        if CHUNK == BLOCK_D or dv_ptr is not None:
            do = load_rows(do_at, offs_m, offs_v, do_stride_m, n_q, V_HEAD, V_HEAD == BLOCK_V, True)
        s, qt = products(k, k_ptr, offs_n, k_stride_n, n_k, q_at, there, q_stride_m, n_q, HEAD, BLOCK_D, CHUNK, False,
                         PRECISION, BLOCK_N, BLOCK_M)  # fmt: skip
        if dk_ptr is not None and CHUNK == BLOCK_D:  # ahead of the weights, which are formed meanwhile
            dw = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        mask_at = None
        if mask_ptr is not None:
            mask_at = mask_ptr + head * mask_stride_h
        s = masked_scores(s, mask_at, there[None, :], offs_n[:, None], mask_stride_m, mask_stride_n, n_q, n_k,
                          score_scale, CAUSAL, BOOLEAN, False)  # fmt: skip
        weights = weights_of(s, lse, logsum, 0, ADDED)
        if CAUSAL:
            if first < (tile + 1) * BLOCK_N:
                # (0, but NaN in a row of NaN)
                unseen = weights_of(tl.full((1, BLOCK_M), float("-inf"), tl.float32), lse, logsum, 0, ADDED)
                seen = (offs_n - first)[:, None] <= tl.arange(0, BLOCK_M)[None, :]
                weights = tl.where(seen & (offs_n < n_q)[:, None], weights, unseen)
        if seed is not None:
            keep = tl.trans(common.keep_scale(seed, first_row + offs_m, tile * BLOCK_N, n_k, p, BLOCK_M, BLOCK_N))
        if dv_ptr is not None:
            dropped = weights
            if seed is not None:
                dropped = weights * keep
            dv = common.add_product(dv, dropped.to(do.dtype), do, PRECISION)
        if dk_ptr is not None:
            if CHUNK != BLOCK_D:
                dw, _dot = products(None, v_ptr, offs_n, v_stride_n, n_k, do_at, offs_m, do_stride_m, n_q, V_HEAD,
                                    BLOCK_V, CHUNK, True, PRECISION, BLOCK_N, BLOCK_M)  # fmt: skip
            if seed is not None:
                dw *= keep
            ds = weights * (dw - tl.load(delta_ptr + first_row + offs_m, mask=offs_m < n_q, other=0.0)[None, :])
            if CHUNK == BLOCK_D:
                q = tl.trans(qt)
            else:
                q = load_rows(q_at, there, offs_d, q_stride_m, n_q, HEAD, HEAD == BLOCK_D, False)
            dk = common.add_product(dk, ds.to(q.dtype), q, PRECISION)
    rows = offs_n.to(tl.int64)[:, None]
    mask_n = (offs_n < n_k)[:, None]
    if dk_ptr is not None:
        dk_ptr += (batch * dk_stride_b + kv_head * dk_stride_h) * UNIT
        tl.store(dk_ptr + rows * (dk_stride_n * UNIT) + offs_d[None, :], (dk * scale).to(dk_ptr.dtype.element_ty),
                 mask=mask_n & (offs_d < HEAD)[None, :])  # fmt: skip
    if dv_ptr is not None:
        dv_ptr += (batch * dv_stride_b + kv_head * dv_stride_h) * UNIT
        tl.store(dv_ptr + rows * (dv_stride_n * UNIT) + offs_v[None, :], dv.to(dv_ptr.dtype.element_ty),
                 mask=mask_n & (offs_v < V_HEAD)[None, :])  # fmt: skip


def launch_delta(o: Tensor, do: Tensor, config: Config | None = None) -> Tensor:
    """sum(o * do) over the last dimension, [B, H, n_q] in float32."""
    delta = o.new_empty(o.shape[:-1], dtype=torch.float32)
    row_sums(o, do, delta, config=config)
    return delta


@library.launches("attention_row_sums", mutates="delta", flops=library.no_flops)
def row_sums(o: Tensor, do: Tensor, delta: Tensor, *, config: Config | None = None) -> None:
    """Writes delta; arguments as launch_delta's."""
    batch, heads, n_q, v_head = o.shape
    if delta.numel() == 0:
        return
    config = config or tuning.delta(v_head)
    unit = unit_of(o, do)
    tiles = cdiv(n_q, config["BLOCK_M"])
    launch(
        attention_delta_kernel, (tiles * batch * heads,),
        o, do, delta, heads, n_q, tiles, *strides_of(o, unit), *strides_of(do, unit), UNIT=unit, V_HEAD=v_head,
        **config.options(),
    )  # fmt: skip


def launch_dq(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, mask: Tensor | None = None, p: float = 0.0,
    causal: bool = False, scale: float = 1.0, seed: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of q, in its memory order; ``lse`` and ``delta`` as forward and :func:`launch_delta` give them."""
    dq = like_heads(q)
    query_gradient(q, k, v, do, mask, seed, lse, delta, dq, p, causal, scale, config=config)
    return dq


def _query_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any) -> int:
    """Scores, their gradients, and the product of those with the keys."""
    return product_flops(q, k, q[-1] + v[-1] + q[-1])


@library.launches("attention_query_gradient", mutates="dq", flops=_query_flops)
def query_gradient(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, mask: Tensor | None, seed: Tensor | None, lse: Tensor, delta: Tensor,
    dq: Tensor, p: float, causal: bool, scale: float, *, config: Config | None = None,
) -> None:  # fmt: skip
    """Writes dq; arguments as launch_dq's."""
    (batch, heads, n_q, head), v_head, n_k = q.shape, v.shape[-1], k.shape[-2]
    if dq.numel() == 0 or n_k == 0 or v_head == 0:
        dq.zero_()
        return
    precision = mode.dot_precision(q.dtype, "matmul")
    config = config or autotune.pick(
        "attention dq", batch * heads,
        (head, v_head, n_q, n_k, q.dtype, precision, causal, mask is not None, p > 0),
        tuning.dq(head, v_head, q.element_size(), precision, mask is not None or p > 0, targets.current()),
        lambda c: query_gradient(q, k, v, do, mask, seed, lse, delta, dq, p, causal, scale, config=c), q,
        least=tuning.least_rows(q.element_size(), targets.current()),
    )  # fmt: skip
    unit = unit_of(q, k, v, do, dq)
    mask_bytes, mask_strides = mask_of(mask, q, k)
    tiles = cdiv(n_q, config["BLOCK_M"])
    launch(
        attention_dq_kernel, (tiles * batch * heads,),
        q, k, v, do, mask_bytes, seed, lse, delta, dq, heads, heads // k.shape[1], n_q, n_k, tiles,
        *strides_of(q, unit), *strides_of(k, unit), *strides_of(v, unit), *strides_of(do, unit), *strides_of(dq, unit),
        *mask_strides, scale, score_factor(scale, mask), p, UNIT=unit, CAUSAL=causal,
        BOOLEAN=mask is not None and mask.dtype == torch.bool, PRECISION=precision, HEAD=head, V_HEAD=v_head,
        **config.options(),
    )  # fmt: skip


def launch_dkv(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, mask: Tensor | None = None, p: float = 0.0,
    causal: bool = False, scale: float = 1.0, seed: Tensor | None = None, needs_k: bool = True, needs_v: bool = True,
    again: bool = False, config: Config | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of k and v that are needed, in their memory order. ``again``: after launch_dq."""
    dk = like_heads(k) if needs_k else None
    dv = like_heads(v) if needs_v else None
    key_value_gradients(q, k, v, do, mask, seed, lse, delta, dk, dv, p, causal, scale, again, config=config)
    return dk, dv


def _key_value_flops(
    q: Sequence[int], k: Sequence[int], v: Sequence[int], do: Sequence[int], mask: Any, seed: Any, lse: Any, delta: Any,
    dk: Sequence[int] | None, dv: Sequence[int] | None, p: float, causal: bool, scale: float, again: bool = False,
) -> int:  # fmt: skip
    """As torch counts: scores and their gradients once, though both launches form them."""
    width = 0 if dk is None else q[-1]
    width += 0 if dv is None else v[-1]
    if not again:
        width += q[-1] + (0 if dk is None else v[-1])
    return product_flops(q, k, width)


@library.launches("attention_key_value_gradients", mutates="dk dv", flops=_key_value_flops)
def key_value_gradients(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, mask: Tensor | None, seed: Tensor | None, lse: Tensor, delta: Tensor,
    dk: Tensor | None, dv: Tensor | None, p: float, causal: bool, scale: float, again: bool = False, *,
    config: Config | None = None,
) -> None:  # fmt: skip
    """Writes dk and dv; arguments as launch_dkv's. ``again``: whether query_gradient has formed the same scores."""
    (batch, heads, n_q, head), v_head = q.shape, v.shape[-1]
    kv_heads, n_k = k.shape[1:3]
    if 0 in (batch, heads, n_q, head, n_k, v_head):
        for empty in (dk, dv):
            if empty is not None:
                empty.zero_()
        return
    precision = mode.dot_precision(q.dtype, "matmul")
    if dk is not None and dv is not None and config is None:
        extras = mask is not None or p > 0
        if tuning.apart(head, v_head, q.element_size(), precision, extras, targets.current()):
            given = q, k, v, do, mask, seed, lse, delta
            key_value_gradients(*given, dk, None, p, causal, scale, again)
            key_value_gradients(*given, None, dv, p, causal, scale, True)
            return
    config = config or autotune.pick(
        "attention dkv", batch * heads,
        (head, v_head, n_q, n_k, q.dtype, precision, causal, mask is not None, p > 0, dk is not None, dv is not None),
        tuning.dkv(head, v_head, q.element_size(), precision, mask is not None or p > 0, targets.current()),
        lambda c: key_value_gradients(q, k, v, do, mask, seed, lse, delta, dk, dv, p, causal, scale, config=c), q,
    )  # fmt: skip
    unit = unit_of(*(t for t in (q, k, v, do, dk, dv) if t is not None))
    mask_bytes, mask_strides = mask_of(mask, q, k)
    tiles = cdiv(n_k, config["BLOCK_N"])
    launch(
        attention_dkv_kernel, (tiles * batch * kv_heads,),
        q, k, v, do, mask_bytes, seed, lse, delta, dk, dv, kv_heads, heads // kv_heads, n_q, n_k, tiles,
        *strides_of(q, unit), *strides_of(k, unit), *strides_of(v, unit), *strides_of(do, unit), *strides_of(dk, unit),
        *strides_of(dv, unit), *mask_strides, scale, score_factor(scale, mask), p, UNIT=unit, CAUSAL=causal,
        BOOLEAN=mask is not None and mask.dtype == torch.bool, PRECISION=precision, HEAD=head, V_HEAD=v_head,
        **config.options(),
    )  # fmt: skip
