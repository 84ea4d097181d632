"""Cross entropy of logits: one pass forward by online softmax, one pass backward.

Rows are numbered ``o * inner + i`` for logits [outer, classes, inner]; (N, C) is outer = 1, inner = N. Of a row,
forward keeps the maximum and the logarithm of the sum of exponentials above it as two float32 numbers: their rounded
sum, the log-sum-exp, would lose the digits the loss is made of once logits are shifted by 1e3.

With coefficients k_c = w_c * (p_c * (1 - s) + s / C) for probabilities p and smoothing s, or k_c = w_c * s / C beside
class indices, a row's loss is the sum over c of k_c * (logsum - (x_c - max)), plus (1 - s) * w_t * (logsum -
(x_t - max)) for a class index t (the formulas of torch.nn.CrossEntropyLoss).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tkernels.core import library, targets
from tkernels.core.config import Config, cdiv
from tkernels.core.launch import launch
from tkernels.core.records import LossOptions
from tkernels.ops.cross_entropy import config as tuning
from tkernels.ops.cross_entropy.layout import layout_of, like

_RUNTIME = ("inner", "n_rows", "ignore_index")


@triton.jit
def _rows(inner, INNER_UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """This program's rows: their outer index, their inner indices, their numbers, and which of them exist."""
    n_inner = inner.to(tl.int64) * INNER_UNIT
    tiles = tl.cdiv(n_inner, BLOCK_ROWS)
    pid = tl.program_id(0)
    outer = (pid // tiles).to(tl.int64)
    i = (pid % tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return outer, i, outer * n_inner + i, i < n_inner


@triton.jit
def _aligned_part(x_row, n_classes, ENDS: tl.constexpr):
    """Classes before a row's first 16-byte boundary, and how many after it fill whole 16-byte words."""
    lead = tl.minimum((ENDS - x_row % ENDS) % ENDS, n_classes)
    return lead, (n_classes - lead) // ENDS * ENDS


@triton.jit
def _ends(lead, interior, n_classes, ENDS: tl.constexpr):
    """The classes around a row's aligned part, [rows, 2 * ENDS], and which of them exist."""
    j = tl.arange(0, 2 * ENDS)[None, :]
    c = tl.where(j < ENDS, j, lead[:, None] + interior[:, None] + (j - ENDS))
    return c, tl.where(j < ENDS, c < lead[:, None], c < n_classes)


@triton.jit
def _coefficients(p_ptr, p_offsets, weight_ptr, c, ok, n_classes, hot, smooth, PROBABILITIES: tl.constexpr):
    """k of a tile: what the loss weighs each -log softmax with. 0 where there is no element."""
    if PROBABILITIES:
        k = tl.load(p_ptr + p_offsets, mask=ok, other=0.0).to(tl.float32) * hot + smooth
    else:
        k = tl.zeros(ok.shape, tl.float32) + smooth
    if weight_ptr is not None:
        k *= tl.load(weight_ptr + c, mask=c < n_classes, other=0.0).to(tl.float32)
    return tl.where(ok, k, 0.0)


@triton.jit
def _take(
    x_ptr, x_offsets, p_ptr, p_offsets, weight_ptr, c, ok, n_classes, hot, smooth, top, total, mass, moment,
    PROBABILITIES: tl.constexpr, WEIGHED: tl.constexpr,
):  # fmt: skip
    """One more tile into a row's state: maximum, sum of exp(x - maximum), sum of k, sum of k * (x - maximum)."""
    x = tl.load(x_ptr + x_offsets, mask=ok, other=-float("inf")).to(tl.float32)
    new_top = tl.maximum(top, tl.max(x, 1))
    # rows of -inf so far: 0 stands in for the maximum, lest -inf - -inf make NaN of a row that may yet be finite
    after = tl.where(new_top == -float("inf"), 0.0, new_top)
    z = x - after[:, None]
    total = total * tl.exp(top - after) + tl.sum(tl.exp(z), 1)
    if WEIGHED:
        k = _coefficients(p_ptr, p_offsets, weight_ptr, c, ok, n_classes, hot, smooth, PROBABILITIES)
        before = tl.where(top == -float("inf"), 0.0, top)
        moment += mass * (before - after) + tl.sum(tl.where(ok, k * z, 0.0), 1)
        mass += tl.sum(k, 1)
    return new_top, total, mass, moment


@triton.jit
def _scan(
    x_ptr, p_ptr, weight_ptr, x_row, p_row, row_ok, begin, end, n_classes, x_stride_c, p_stride_c, hot, smooth,
    PROBABILITIES: tl.constexpr, WEIGHED: tl.constexpr, ENDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The state of [BLOCK_ROWS] rows over the classes [begin, end); a row's first program takes its unaligned ends."""
    top = tl.full((BLOCK_ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    mass = tl.zeros((BLOCK_ROWS,), tl.float32)
    moment = tl.zeros((BLOCK_ROWS,), tl.float32)
    if ENDS > 0:
        lead, interior = _aligned_part(x_row, n_classes, ENDS)
        c, ok = _ends(lead, interior, n_classes, ENDS)
        around = x_row[:, None] + c
        top, total, mass, moment = _take(
            x_ptr, around, p_ptr, around, weight_ptr, c, ok & row_ok[:, None] & (tl.program_id(1) == 0), n_classes,
            hot, smooth, top, total, mass, moment, PROBABILITIES, WEIGHED,
        )  # fmt: skip
        # a multiple of ENDS by construction, which the compiler sees only when it is written so
        aligned = (x_row + lead) // ENDS * ENDS
        for start in range(begin, end, BLOCK_C):
            j = start + tl.arange(0, BLOCK_C)[None, :]
            offsets = aligned[:, None] + j
            top, total, mass, moment = _take(
                x_ptr, offsets, p_ptr, offsets, weight_ptr, lead[:, None] + j,
                row_ok[:, None] & (j < interior[:, None]), n_classes, hot, smooth,
                top, total, mass, moment, PROBABILITIES, WEIGHED,
            )  # fmt: skip
    else:
        for start in range(begin, end, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)[None, :]
            far = c.to(tl.int64)
            top, total, mass, moment = _take(
                x_ptr, x_row[:, None] + far * x_stride_c, p_ptr, p_row[:, None] + far * p_stride_c, weight_ptr, c,
                row_ok[:, None] & (c < n_classes), n_classes, hot, smooth,
                top, total, mass, moment, PROBABILITIES, WEIGHED,
            )  # fmt: skip
    return top, total, mass, moment


@triton.jit
def _class_of(target_ptr, weight_ptr, row, row_ok, n_classes, ignore_index):
    """Rows' class indices: the index, whether the row counts, whether the index is a class, the class's weight.

    The weight is NaN for an index that is no class, which makes loss and gradient NaN; nothing is read by it.
    """
    t = tl.load(target_ptr + row, mask=row_ok, other=0).to(tl.int64)
    counts = t != ignore_index
    inside = (t >= 0) & (t < n_classes)
    tl.device_assert(inside | (t == ignore_index) | (row_ok == 0), "cross_entropy: target is out of range")
    w = tl.where(inside, 1.0, float("nan"))
    if weight_ptr is not None:
        w *= tl.load(weight_ptr + t, mask=row_ok & counts & inside, other=0.0).to(tl.float32)
    return t, counts, inside, tl.where(counts, w, 0.0)


@triton.jit
def _conclude(loss, count, loss_ptr, count_ptr, REDUCTION: tl.constexpr):
    """The reduced loss, and for the mean what it was divided by."""
    if REDUCTION == "mean":
        tl.store(count_ptr, count)
        loss = loss / count
    tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))


@triton.jit
def _hand_on(loss, count, partial_ptr, loss_ptr, count_ptr, REDUCTION: tl.constexpr):
    """A program's share of the sum: the result itself if it is the only one, else [2, programs] partial sums."""
    if tl.num_programs(0) == 1:
        _conclude(loss, count, loss_ptr, count_ptr, REDUCTION)
    else:
        pid = tl.program_id(0)
        tl.store(partial_ptr + pid, loss)
        tl.store(partial_ptr + tl.num_programs(0) + pid, count)


@triton.jit
def _row_loss(
    x_ptr, target_ptr, weight_ptr, stats_ptr, partial_ptr, loss_ptr, count_ptr, x_row, row, row_ok, n_rows, n_classes,
    x_stride_c, ignore_index, hot, top, total, mass, moment,
    PROBABILITIES: tl.constexpr, WEIGHED: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """From rows' states to their losses; keeps the statistics and sums the program's rows."""
    n_rows = n_rows.to(tl.int64)
    top = tl.where(top == -float("inf"), 0.0, top)
    logsum = tl.log(total)
    tl.store(stats_ptr + row, top, mask=row_ok)
    tl.store(stats_ptr + n_rows + row, logsum, mask=row_ok)
    if WEIGHED:
        tl.store(stats_ptr + 2 * n_rows + row, mass, mask=row_ok)
        loss = mass * logsum - moment
    else:
        loss = tl.zeros_like(top)
    if PROBABILITIES:
        count = tl.zeros_like(top) + 1.0
    else:
        t, counts, inside, count = _class_of(target_ptr, weight_ptr, row, row_ok, n_classes, ignore_index)
        x = tl.load(x_ptr + x_row + t * x_stride_c, mask=row_ok & counts & inside, other=0.0).to(tl.float32)
        loss = tl.where(counts, hot * count * (logsum - (x - top)) + loss, 0.0)
    if REDUCTION == "none":
        tl.store(loss_ptr + row, loss.to(loss_ptr.dtype.element_ty), mask=row_ok)
    else:
        loss = tl.sum(tl.where(row_ok, loss, 0.0), 0)
        count = tl.sum(tl.where(row_ok, count, 0.0), 0)
        _hand_on(loss, count, partial_ptr, loss_ptr, count_ptr, REDUCTION)


# A program takes BLOCK_ROWS rows through all their classes in [BLOCK_ROWS, BLOCK_C] tiles, keeps their statistics
# [2 or 3, rows] and writes their losses or its share of the sum. Grid: row tiles.
@triton.jit(do_not_specialize=_RUNTIME)
def cross_entropy_forward(
    x_ptr, target_ptr, weight_ptr, stats_ptr, partial_ptr, loss_ptr, count_ptr,
    inner, n_rows, n_classes, x_stride_o, x_stride_i, x_stride_c, p_stride_o, p_stride_i, p_stride_c,
    ignore_index, hot, smooth,
    PROBABILITIES: tl.constexpr, WEIGHED: tl.constexpr, REDUCTION: tl.constexpr, ENDS: tl.constexpr,
    ONE_STEP: tl.constexpr, INNER_UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    outer, i, row, row_ok = _rows(inner, INNER_UNIT, BLOCK_ROWS)
    x_row = outer * x_stride_o + i * x_stride_i
    p_row = outer * p_stride_o + i * p_stride_i
    end = n_classes
    if ONE_STEP:
        end = BLOCK_C  # constant bounds: no loop, and nothing to rescale
    top, total, mass, moment = _scan(
        x_ptr, target_ptr, weight_ptr, x_row, p_row, row_ok, 0, end, n_classes, x_stride_c, p_stride_c, hot,
        smooth, PROBABILITIES, WEIGHED, ENDS, BLOCK_ROWS, BLOCK_C,
    )  # fmt: skip
    _row_loss(
        x_ptr, target_ptr, weight_ptr, stats_ptr, partial_ptr, loss_ptr, count_ptr, x_row, row, row_ok, n_rows,
        n_classes, x_stride_c, ignore_index, hot, top, total, mass, moment, PROBABILITIES, WEIGHED, REDUCTION,
    )  # fmt: skip


# A program takes BLOCK_ROWS rows through ``length`` of their classes, and leaves the state as one row of each of the
# four [splits, rows] planes of ``state_ptr``. Grid: row tiles, splits.
@triton.jit(do_not_specialize=("inner", "n_rows", "length"))
def cross_entropy_partial(
    x_ptr, target_ptr, weight_ptr, state_ptr,
    inner, n_rows, n_classes, length, x_stride_o, x_stride_i, x_stride_c, p_stride_o, p_stride_i, p_stride_c,
    hot, smooth,
    PROBABILITIES: tl.constexpr, WEIGHED: tl.constexpr, ENDS: tl.constexpr,
    INNER_UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    outer, i, row, row_ok = _rows(inner, INNER_UNIT, BLOCK_ROWS)
    x_row = outer * x_stride_o + i * x_stride_i
    p_row = outer * p_stride_o + i * p_stride_i
    split = tl.program_id(1)
    # in tiles, so that the compiler knows where a tile starts to be a multiple of its width
    begin = split * length * BLOCK_C
    end = tl.minimum(begin + length * BLOCK_C, n_classes)
    top, total, mass, moment = _scan(
        x_ptr, target_ptr, weight_ptr, x_row, p_row, row_ok, begin, end, n_classes, x_stride_c, p_stride_c, hot,
        smooth, PROBABILITIES, WEIGHED, ENDS, BLOCK_ROWS, BLOCK_C,
    )  # fmt: skip
    plane = tl.num_programs(1).to(tl.int64) * n_rows
    state_ptr += split.to(tl.int64) * n_rows
    tl.store(state_ptr + row, top, mask=row_ok)
    tl.store(state_ptr + plane + row, total, mask=row_ok)
    if WEIGHED:
        tl.store(state_ptr + 2 * plane + row, mass, mask=row_ok)
        tl.store(state_ptr + 3 * plane + row, moment, mask=row_ok)


# A program merges the states [4, splits, rows] of BLOCK_ROWS rows, then ends as cross_entropy_forward does.
# Grid: row tiles.
@triton.jit(do_not_specialize=("n_splits", *_RUNTIME))
def cross_entropy_merge(
    state_ptr, x_ptr, target_ptr, weight_ptr, stats_ptr, partial_ptr, loss_ptr, count_ptr,
    n_splits, inner, n_rows, n_classes, x_stride_o, x_stride_i, x_stride_c, ignore_index, hot,
    PROBABILITIES: tl.constexpr, WEIGHED: tl.constexpr, REDUCTION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_ok = row < n_rows
    split = tl.arange(0, BLOCK_SPLITS)[None, :]
    ok = row_ok[:, None] & (split < n_splits)
    offsets = split.to(tl.int64) * n_rows + row[:, None]
    plane = n_rows.to(tl.int64) * n_splits
    tops = tl.load(state_ptr + offsets, mask=ok, other=-float("inf"))
    totals = tl.load(state_ptr + plane + offsets, mask=ok, other=0.0)
    top = tl.max(tops, 1)
    zero = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(totals * tl.exp(tops - zero[:, None]), 1)
    mass = tl.zeros_like(top)
    moment = tl.zeros_like(top)
    if WEIGHED:
        masses = tl.load(state_ptr + 2 * plane + offsets, mask=ok, other=0.0)
        moments = tl.load(state_ptr + 3 * plane + offsets, mask=ok, other=0.0)
        shift = tl.where(tops == -float("inf"), 0.0, tops) - zero[:, None]
        mass = tl.sum(masses, 1)
        moment = tl.sum(tl.where(ok, moments + masses * shift, 0.0), 1)
    x_row = row // inner * x_stride_o + row % inner * x_stride_i
    _row_loss(
        x_ptr, target_ptr, weight_ptr, stats_ptr, partial_ptr, loss_ptr, count_ptr, x_row, row, row_ok, n_rows,
        n_classes, x_stride_c, ignore_index, hot, top, total, mass, moment, PROBABILITIES, WEIGHED, REDUCTION,
    )  # fmt: skip


# A program sums LENGTH of n partial (loss, count) pairs, [2, n]. Grid: parts of the n.
@triton.jit(do_not_specialize=("n",))
def cross_entropy_total(
    in_ptr, partial_ptr, loss_ptr, count_ptr, n,
    REDUCTION: tl.constexpr, BLOCK: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0) * LENGTH
    losses = tl.zeros((BLOCK,), tl.float32)
    counts = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, tl.minimum(begin + LENGTH, n), BLOCK):
        offs = start + tl.arange(0, BLOCK)
        losses += tl.load(in_ptr + offs, mask=offs < n, other=0.0)
        counts += tl.load(in_ptr + n + offs, mask=offs < n, other=0.0)
    _hand_on(tl.sum(losses, 0), tl.sum(counts, 0), partial_ptr, loss_ptr, count_ptr, REDUCTION)


@triton.jit
def _row_gradient(grad_ptr, stride_grad, count_ptr, row, row_ok, REDUCTION: tl.constexpr):
    """The gradient that reaches each row's loss."""
    if REDUCTION == "none":
        return tl.load(grad_ptr + row * stride_grad, mask=row_ok, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr).to(tl.float32)
    if REDUCTION == "mean":
        grad = grad / tl.load(count_ptr)
    return tl.zeros(row.shape, tl.float32) + grad


@triton.jit
def _input_gradient(
    x_ptr, p_ptr, weight_ptr, dx_ptr, x_offsets, p_offsets, dx_offsets, c, ok, n_classes, hot, smooth,
    top, logsum, all_grad, class_grad, grad, t, PROBABILITIES: tl.constexpr, WEIGHED: tl.constexpr,
):  # fmt: skip
    """A tile of all_grad * softmax - grad * k - class_grad * one_hot(t)."""
    x = tl.load(x_ptr + x_offsets, mask=ok, other=0.0).to(tl.float32)
    d = all_grad[:, None] * tl.exp((x - top[:, None]) - logsum[:, None])
    if WEIGHED:
        k = _coefficients(p_ptr, p_offsets, weight_ptr, c, ok, n_classes, hot, smooth, PROBABILITIES)
        d -= grad[:, None] * k
    if not PROBABILITIES:
        d = tl.where(c == t[:, None], d - class_grad[:, None], d)
    tl.store(dx_ptr + dx_offsets, d.to(dx_ptr.dtype.element_ty), mask=ok)


# A program writes a [BLOCK_ROWS, BLOCK_C] tile of the gradient of the logits from the rows' statistics; those of the
# first class tile also the unaligned ends. Grid: row tiles, class tiles.
@triton.jit(do_not_specialize=("stride_grad", *_RUNTIME))
def cross_entropy_backward(
    grad_ptr, x_ptr, target_ptr, weight_ptr, stats_ptr, count_ptr, dx_ptr,
    stride_grad, inner, n_rows, n_classes, x_stride_o, x_stride_i, x_stride_c, p_stride_o, p_stride_i, p_stride_c,
    dx_stride_o, dx_stride_i, dx_stride_c, ignore_index, hot, smooth,
    PROBABILITIES: tl.constexpr, WEIGHED: tl.constexpr, REDUCTION: tl.constexpr, ENDS: tl.constexpr,
    INNER_UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n_rows = n_rows.to(tl.int64)
    outer, i, row, row_ok = _rows(inner, INNER_UNIT, BLOCK_ROWS)
    x_row = outer * x_stride_o + i * x_stride_i
    p_row = outer * p_stride_o + i * p_stride_i
    dx_row = outer * dx_stride_o + i * dx_stride_i
    grad = _row_gradient(grad_ptr, stride_grad, count_ptr, row, row_ok, REDUCTION)
    top = tl.load(stats_ptr + row, mask=row_ok, other=0.0)
    logsum = tl.load(stats_ptr + n_rows + row, mask=row_ok, other=0.0)
    t = row
    class_grad = tl.zeros_like(top)
    if not PROBABILITIES:
        t, counts, _, w = _class_of(target_ptr, weight_ptr, row, row_ok, n_classes, ignore_index)
        grad = tl.where(counts, grad, 0.0)
        class_grad = grad * (hot * w)
    all_grad = class_grad
    if WEIGHED:
        all_grad += grad * tl.load(stats_ptr + 2 * n_rows + row, mask=row_ok, other=0.0)
    start = tl.program_id(1) * BLOCK_C
    if ENDS > 0:
        lead, interior = _aligned_part(x_row, n_classes, ENDS)
        if start == 0:
            c, ok = _ends(lead, interior, n_classes, ENDS)
            offsets = x_row[:, None] + c
            _input_gradient(
                x_ptr, target_ptr, weight_ptr, dx_ptr, offsets, offsets, offsets, c, ok & row_ok[:, None], n_classes,
                hot, smooth, top, logsum, all_grad, class_grad, grad, t, PROBABILITIES, WEIGHED,
            )  # fmt: skip
        j = start + tl.arange(0, BLOCK_C)[None, :]
        offsets = ((x_row + lead) // ENDS * ENDS)[:, None] + j
        _input_gradient(
            x_ptr, target_ptr, weight_ptr, dx_ptr, offsets, offsets, offsets, lead[:, None] + j,
            row_ok[:, None] & (j < interior[:, None]), n_classes, hot, smooth, top, logsum, all_grad, class_grad, grad,
            t, PROBABILITIES, WEIGHED,
        )  # fmt: skip
    else:
        c = start + tl.arange(0, BLOCK_C)[None, :]
        far = c.to(tl.int64)
        _input_gradient(
            x_ptr, target_ptr, weight_ptr, dx_ptr, x_row[:, None] + far * x_stride_c,
            p_row[:, None] + far * p_stride_c, dx_row[:, None] + far * dx_stride_c, c,
            row_ok[:, None] & (c < n_classes), n_classes, hot, smooth, top, logsum, all_grad, class_grad, grad,
            t, PROBABILITIES, WEIGHED,
        )  # fmt: skip


# A program writes a [BLOCK_ROWS, BLOCK_C] tile of the gradient of target probabilities: grad * hot * w * -log softmax.
# Grid: row tiles, class tiles.
@triton.jit(do_not_specialize=("stride_grad", "inner", "n_rows"))
def cross_entropy_target_backward(
    grad_ptr, x_ptr, weight_ptr, stats_ptr, count_ptr, dp_ptr,
    stride_grad, inner, n_rows, n_classes, x_stride_o, x_stride_i, x_stride_c, dp_stride_o, dp_stride_i, dp_stride_c,
    hot,
    REDUCTION: tl.constexpr, INNER_UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n_rows = n_rows.to(tl.int64)
    outer, i, row, row_ok = _rows(inner, INNER_UNIT, BLOCK_ROWS)
    x_row = outer * x_stride_o + i * x_stride_i
    dp_row = outer * dp_stride_o + i * dp_stride_i
    grad = _row_gradient(grad_ptr, stride_grad, count_ptr, row, row_ok, REDUCTION) * hot
    top = tl.load(stats_ptr + row, mask=row_ok, other=0.0)
    logsum = tl.load(stats_ptr + n_rows + row, mask=row_ok, other=0.0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    ok = row_ok[:, None] & (c < n_classes)
    far = c.to(tl.int64)
    x = tl.load(x_ptr + x_row[:, None] + far * x_stride_c, mask=ok, other=0.0).to(tl.float32)
    d = logsum[:, None] - (x - top[:, None])
    if weight_ptr is not None:
        d *= tl.load(weight_ptr + c, mask=c < n_classes, other=0.0).to(tl.float32)
    d *= grad[:, None]
    tl.store(dp_ptr + dp_row[:, None] + far * dp_stride_c, d.to(dp_ptr.dtype.element_ty), mask=ok)


def _factors(smoothing: float, n_classes: int) -> tuple[float, float]:
    return 1.0 - smoothing, smoothing / n_classes


def launch_forward(
    x: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, loss_dtype: torch.dtype,
    config: Config | None = None, splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The loss; the rows' statistics, float32 [2 or 3, rows]; what the mean was divided by, float32 ().

    x: (C) or (N, C, ...), not empty, :func:`readable`; target: contiguous class indices (int64, uint8) of the rows, or
    probabilities of x's shape, readable; weight: contiguous (C).
    """
    shape = x.shape[:1] + x.shape[2:] if options.reduction == "none" and x.dim() > 1 else ()
    loss = x.new_empty(shape, dtype=loss_dtype)
    n_rows = x.numel() // x.shape[1 if x.dim() > 1 else 0]
    stats = x.new_empty((3 if _is_weighed(target, options.smoothing) else 2, n_rows), dtype=torch.float32)
    count = x.new_empty((), dtype=torch.float32) if options.reduction == "mean" else None
    forward(x, target, weight, loss, stats, count, *options, config=config, splits=splits)
    return loss, stats, count


def _is_weighed(target: Tensor, smoothing: float) -> bool:
    """Whether every class of a row counts, not the target's alone."""
    return target.is_floating_point() or smoothing > 0


@library.launches("cross_entropy_forward", mutates="loss stats count", flops=library.no_flops)
def forward(
    x: Tensor, target: Tensor, weight: Tensor | None, loss: Tensor, stats: Tensor, count: Tensor | None,
    ignore_index: int, reduction: str, smoothing: float, *, config: Config | None = None, splits: int | None = None,
) -> None:  # fmt: skip
    """Writes loss, stats and count; arguments as launch_forward's."""
    probabilities, weighed = target.is_floating_point(), _is_weighed(target, smoothing)
    layout = layout_of(x, target) if probabilities else layout_of(x)
    gpu = targets.current()
    config = config or layout.config(gpu)
    tiles, n_rows, n_classes = layout.tiles(config), layout.n_rows, layout.n_classes
    if splits is None:
        splits = tuning.splits(tiles, n_classes, config["BLOCK_C"], gpu)
    hot, smooth = _factors(smoothing, n_classes)

    finish = tuning.merge() if splits > 1 else config
    programs = cdiv(n_rows, finish["BLOCK_ROWS"]) if splits > 1 else tiles
    several = reduction != "none" and programs > 1
    # what is not written gets a pointer of the same type all the same: one compiled kernel for all batches
    partial = x.new_empty((2, programs), dtype=torch.float32) if several else stats
    outputs = (stats, partial, loss, stats if count is None else count)
    strides = (*layout.strides[0], *(layout.strides[1] if probabilities else (0, 0, 0)))
    kind = {"PROBABILITIES": probabilities, "WEIGHED": weighed}
    view = {"ENDS": layout.ends(x.element_size()), "INNER_UNIT": layout.inner_unit}
    inner = layout.inner // layout.inner_unit

    if splits > 1:
        length = cdiv(cdiv(n_classes, config["BLOCK_C"]), splits)
        splits = cdiv(n_classes, length * config["BLOCK_C"])
        state = x.new_empty((4 if weighed else 2, splits, n_rows), dtype=torch.float32)
        launch(
            cross_entropy_partial, (tiles, splits),
            x, target, weight, state, inner, n_rows, n_classes, length, *strides, hot, smooth,
            **kind, **view, **config.options(),
        )  # fmt: skip
        launch(
            cross_entropy_merge, (programs,),
            state, x, target, weight, *outputs, splits, layout.inner, n_rows, n_classes, *layout.strides[0],
            ignore_index, hot, REDUCTION=reduction, **kind, **finish.options(),
        )  # fmt: skip
    else:
        launch(
            cross_entropy_forward, (tiles,),
            x, target, weight, *outputs, inner, n_rows, n_classes, *strides, ignore_index, hot, smooth,
            REDUCTION=reduction, ONE_STEP=n_classes <= config["BLOCK_C"], **kind, **view, **config.options(),
        )  # fmt: skip
    if several:
        launch_total(partial, loss, count, reduction)


def launch_total(
    partial: Tensor, loss: Tensor, count: Tensor | None, reduction: str, config: Config | None = None
) -> None:
    """Sum (loss, count) pairs [2, n] into ``loss`` and ``count``, in as many rounds as it takes; one up to 65,536."""
    config = config or tuning.total()
    left = partial.shape[1]
    while left > 1:
        programs = cdiv(left, config["LENGTH"])
        sums = partial.new_empty((2, programs)) if programs > 1 else partial
        launch(
            cross_entropy_total, (programs,),
            partial, sums, loss, partial if count is None else count, left, REDUCTION=reduction, **config.options(),
        )  # fmt: skip
        partial, left = sums, programs


def _row_gradients(grad: Tensor) -> tuple[Tensor, int]:
    """The incoming gradient and the stride from row to row; an expanded scalar is read as it is."""
    if not any(grad.stride()):
        return grad, 0
    if grad.dim() == 1:
        return grad, grad.stride(0)
    return grad.contiguous(), 1


def launch_backward(
    grad: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, stats: Tensor, count: Tensor | None,
    options: LossOptions, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of the logits, in their dtype and, where it is dense, their layout. Arguments as launch_forward
    took and returned them; grad: of the loss's shape, any strides."""
    dx = like(x)
    gradient(grad, x, target, weight, stats, count, dx, *options, config=config)
    return dx


@library.launches("cross_entropy_gradient", mutates="dx", flops=library.no_flops)
def gradient(
    grad: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, stats: Tensor, count: Tensor | None, dx: Tensor,
    ignore_index: int, reduction: str, smoothing: float, *, config: Config | None = None,
) -> None:  # fmt: skip
    """Writes dx; arguments as launch_backward's."""
    probabilities = target.is_floating_point()
    layout = layout_of(x, dx, target) if probabilities else layout_of(x, dx)
    config = config or layout.config(targets.current())
    grad, stride_grad = _row_gradients(grad)
    hot, smooth = _factors(smoothing, layout.n_classes)
    grid = (layout.tiles(config), cdiv(layout.n_classes, config["BLOCK_C"]))
    launch(
        cross_entropy_backward, grid,
        grad, x, target, weight, stats, stats if count is None else count, dx,
        stride_grad, layout.inner // layout.inner_unit, layout.n_rows, layout.n_classes, *layout.strides[0],
        *(layout.strides[2] if probabilities else (0, 0, 0)), *layout.strides[1], ignore_index, hot, smooth,
        PROBABILITIES=probabilities, WEIGHED=_is_weighed(target, smoothing), REDUCTION=reduction,
        ENDS=layout.ends(x.element_size()), INNER_UNIT=layout.inner_unit, **config.options(),
    )  # fmt: skip


def launch_target_backward(
    grad: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, stats: Tensor, count: Tensor | None,
    options: LossOptions, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of target probabilities, in their dtype. Arguments as in launch_backward."""
    dp = like(target)
    target_gradient(grad, x, weight, stats, count, dp, options.reduction, options.smoothing, config=config)
    return dp


@library.launches("cross_entropy_target_gradient", mutates="dp", flops=library.no_flops)
def target_gradient(
    grad: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, count: Tensor | None, dp: Tensor, reduction: str,
    smoothing: float, *, config: Config | None = None,
) -> None:  # fmt: skip
    """Writes dp; arguments as launch_target_backward's."""
    layout = layout_of(x, dp)
    config = config or layout.config(targets.current())
    grad, stride_grad = _row_gradients(grad)
    grid = (layout.tiles(config), cdiv(layout.n_classes, config["BLOCK_C"]))
    launch(
        cross_entropy_target_backward, grid,
        grad, x, weight, stats, stats if count is None else count, dp,
        stride_grad, layout.inner // layout.inner_unit, layout.n_rows, layout.n_classes,
        *layout.strides[0], *layout.strides[1], 1.0 - smoothing,
        REDUCTION=reduction, INNER_UNIT=layout.inner_unit, **config.options(),
    )  # fmt: skip
