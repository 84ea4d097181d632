"""Batch norm on Triton: statistics, normalisation with residual and activation, and their gradients.

Every reduction has two stages: programs that each walk over a run of tiles write float32 partials, and a small
finalise kernel merges them in float64, always in the same order. Statistics are sums of x - shift with the mean of a
program's first tile as its shift, merged after Chan, Golub and LeVeque (1983). The statistics' rounding remainders are
kept beside them, so that x - mean stays right where the mean is large against the standard deviation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tkernels.core import device as common
from tkernels.core import targets
from tkernels.core.config import Config, cdiv
from tkernels.core.geometry import Matrix
from tkernels.core.launch import launch
from tkernels.core.records import BatchNorm, Norm, Partials
from tkernels.ops.batch_norm import config as tuning

# A power of two: sums of values times it round as sums of the values do, and do not overflow.
SMALL = tl.constexpr(2.0**-24)
# Columns whose signs lie together; a tile has at most so many, and a divisor of them.
SIGNS = tl.constexpr(64)
# a Norm's fields in its absence
NO_NORM = (None, None, None, None, 0.0)
_BATCH_ARGS = ["n_rows", "n_tiles", "tiles_each", "producers", "count", "eps", "momentum"]


@triton.jit
def group_of(pid, channels, width, BLOCK_C: tl.constexpr, PLANES: tl.constexpr):
    """(group, position within it) of a program: groups lie side by side in memory, so neighbours share lines."""
    if PLANES:
        groups = channels
    else:
        groups = tl.cdiv(width, BLOCK_C)
    return pid % groups, pid // groups


@triton.jit
def tile_of(tile, group, n_rows, channels, width, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
            PLANES: tl.constexpr):  # fmt: skip
    """Offsets (int64) and mask of a tile [BLOCK_R, BLOCK_C], and how many values a channel (a column, if not PLANES)
    has in it. PLANES: tiles of one channel's plane; else of a block of columns."""
    if PLANES:
        across = tl.cdiv(width, BLOCK_C)
        row = tile // across * BLOCK_R
        col = tile % across * BLOCK_C
    else:
        row = tile * BLOCK_R
        col = group * BLOCK_C
    rows = row + tl.arange(0, BLOCK_R)
    cols = col + tl.arange(0, BLOCK_C)
    count = tl.minimum(n_rows - row, BLOCK_R)
    if PLANES:
        count *= tl.minimum(width - col, BLOCK_C)
    mask = (rows < n_rows)[:, None] & (cols < width)[None, :]
    starts = rows.to(tl.int64) * width
    if PLANES:
        starts = starts * channels + group.to(tl.int64) * width
    return starts[:, None] + cols[None, :], mask, count


@triton.jit
def column_of(group, width, BLOCK_C: tl.constexpr, PLANES: tl.constexpr):
    """Columns of a program and which of them exist: a channel, a scalar, if PLANES, else [BLOCK_C]."""
    if PLANES:
        col = group
        ok = group >= 0
    else:
        col = group * BLOCK_C + tl.arange(0, BLOCK_C)
        ok = col < width
    return col, ok


@triton.jit
def count_batch(counter_ptr):
    """One batch more, where they are counted: nobody reads num_batches_tracked before the next kernel."""
    if counter_ptr is not None:
        if tl.program_id(0) == 0:
            tl.store(counter_ptr, tl.load(counter_ptr) + 1)


@triton.jit
def store_sums(partials_ptr, producer, producers, line, col, ok, total, rest, total_x, rest_x):
    """One producer's sums of dz and of dz * (x - mean), with their remainders: [4, producers, line]."""
    slot = producer.to(tl.int64) * line + col
    size = producers.to(tl.int64) * line
    tl.store(partials_ptr + slot, total, mask=ok)
    tl.store(partials_ptr + size + slot, rest, mask=ok)
    tl.store(partials_ptr + 2 * size + slot, total_x, mask=ok)
    tl.store(partials_ptr + 3 * size + slot, rest_x, mask=ok)


@triton.jit
def add_pairs(a, a_rest, b, b_rest):
    """Sum of two (value, remainder) pairs: the addition's own rounding error joins the remainder (Knuth's two-sum)."""
    total = a + b
    part = total - a
    return total, a_rest + b_rest + ((a - (total - part)) + (b - part))


@triton.jit
def tile_sum(x, PLANES: tl.constexpr):
    """Sum (value, remainder) of a tile per column, or of all of it if PLANES."""
    total, rest = x, tl.zeros_like(x)
    if PLANES:
        total, rest = tl.reduce((total, rest), 1, add_pairs)
    total, rest = tl.reduce((total, rest), 0, add_pairs)
    # an infinite total has a NaN remainder
    return total, tl.where(rest == rest, rest, 0.0)


@triton.jit
def squared_deviations(squares, squares_rest, total, rest, mean):
    """M2 of n values from the sums of their d = x - shift and of d^2 (value, remainder), and the mean of d."""
    # below 0 only by rounding; NaN stays
    m2 = common.relu((squares - mean * total) + (squares_rest - mean * rest))
    # the squares of finite values may be too large for float32: Inf, not Inf - Inf
    return tl.where((squares == float("inf")) & (tl.abs(total) < float("inf")), float("inf"), m2)


@triton.jit
def inverse_std(var, eps):
    """1 / sqrt(var + eps) as (value, remainder): one Newton step gives what float32 rounded away."""
    v = var + eps
    r = tl.div_rn(1.0, tl.sqrt_rn(v))
    p = v * r
    error = tl.fma(-p, r, 1.0) - tl.fma(v, r, -p) * r
    rest = 0.5 * r * error
    return r, tl.where(rest == rest, rest, 0.0)


@triton.jit
def load_statistics(mean_ptr, var_ptr, channel, ok, channels, eps):
    """Mean and 1 / std with their remainders: from the saved [4, channels], or from running statistics."""
    mean = tl.load(mean_ptr + channel, mask=ok, other=0.0).to(tl.float32)
    if var_ptr is None:
        invstd = tl.load(mean_ptr + channels + channel, mask=ok, other=0.0)
        mean_rest = tl.load(mean_ptr + 2 * channels + channel, mask=ok, other=0.0)
        invstd_rest = tl.load(mean_ptr + 3 * channels + channel, mask=ok, other=0.0)
    else:
        var = tl.load(var_ptr + channel, mask=ok, other=1.0).to(tl.float32)
        invstd, invstd_rest = inverse_std(var, eps)
        mean_rest = tl.zeros_like(mean)
    return mean, mean_rest, invstd, invstd_rest


@triton.jit
def load_scale(mean_ptr, var_ptr, weight_ptr, bias_ptr, channel, ok, channels, eps):
    """(mean, scale, shift) of batch norm as (x - mean) * scale + shift, in float32.

    Mean and product stay apart (x * scale + (bias - mean * scale) would cancel); the shift absorbs the mean's
    remainder.
    """
    mean, mean_rest, invstd, invstd_rest = load_statistics(mean_ptr, var_ptr, channel, ok, channels, eps)
    scale = invstd + invstd_rest
    if weight_ptr is not None:
        w = tl.load(weight_ptr + channel, mask=ok, other=0.0).to(tl.float32)
        scale = tl.fma(invstd, w, invstd_rest * w)
    shift = -mean_rest * scale
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + channel, mask=ok, other=0.0).to(tl.float32)
    return mean, scale, shift


@triton.jit
def signs_of(tile, group, n_rows, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where a tile's signs lie (int64), and which of them exist: a byte for eight columns, [columns // 64, rows, 8], so
    that a tile's lie together."""
    rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    column = group * BLOCK_C
    starts = ((column // SIGNS).to(tl.int64) * n_rows + rows) * (SIGNS // 8) + column % SIGNS // 8
    return starts[:, None] + tl.arange(0, BLOCK_C // 8)[None, :], (rows < n_rows)[:, None]


@triton.jit
def gradient_of_sum(dy_ptr, more_ptr, saved_ptr, x, mean, scale, shift, offsets, mask, tile, group, n_rows,
                    ACTIVATION: tl.constexpr, SAVED: tl.constexpr, BLOCK_R: tl.constexpr,
                    BLOCK_C: tl.constexpr):  # fmt: skip
    """dz, the gradient of the activation's input, as a float32 tile: of dy, or of the sum of both gradients given.

    The input is computed again from x (and the residual, where SAVED is 'residual'); SAVED 'output' reads the
    activation's sign off the saved output instead, 'signs' a bit of it.
    """
    dz = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if more_ptr is not None:
        dz += tl.load(more_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION is not None:
        if SAVED == "output":
            z = tl.load(saved_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        elif SAVED == "signs":
            places, exist = signs_of(tile, group, n_rows, BLOCK_R, BLOCK_C)
            z = common.unpack_bits(tl.load(saved_ptr + places, mask=exist, other=0), BLOCK_R, BLOCK_C)
        else:
            z = tl.fma(x - mean, scale, shift)
            if SAVED == "residual":
                z += tl.load(saved_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dz = common.activation_gradient(dz, z, ACTIVATION)
    return dz


@triton.jit
def raw_gradient(dz, x, mean, scale, coefficients_ptr, channel, ok, channels):
    """The gradient of batch norm's input x from that of its output, in float32. ``coefficients_ptr``:
    finalize_gradients_kernel's, None where the statistics were given."""
    if coefficients_ptr is not None:
        first = tl.load(coefficients_ptr + channel, mask=ok, other=0.0)
        second = tl.load(coefficients_ptr + channels + channel, mask=ok, other=0.0)
        dz = tl.fma(mean - x, second, dz - first)
    return dz * scale


# Statistics of a run of tiles_each tiles [BLOCK_R, BLOCK_C]: of each of BLOCK_C columns, or of one channel's planes.
# Grid: groups * producers. Writes shift, mean - shift, M2 [3, producers, line] and counts [producers] as one array.
# Program 0 also counts the batch.
@triton.jit(do_not_specialize=_BATCH_ARGS)
def statistics_kernel(x_ptr, partials_ptr, counter_ptr, n_rows, n_tiles, tiles_each, producers, channels, units,
                      UNIT: tl.constexpr, PLANES: tl.constexpr, BLOCK_R: tl.constexpr,
                      BLOCK_C: tl.constexpr):  # fmt: skip
    pid = tl.program_id(0)
    width = units * UNIT
    count_batch(counter_ptr)
    group, producer = group_of(pid, channels, width, BLOCK_C, PLANES)
    tile = producer * tiles_each
    end = tl.minimum(tile + tiles_each, n_tiles)

    offsets, mask, count = tile_of(tile, group, n_rows, channels, width, BLOCK_R, BLOCK_C, PLANES)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    # any finite shift is right; near the mean it keeps sum(d^2) - sum(d)^2 / n from cancelling
    shift = tl.sum(x * SMALL, axis=0)
    if PLANES:
        shift = tl.sum(shift, axis=0)
    shift = shift / count * (1.0 / SMALL)
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    d = tl.where(mask, x - shift, 0.0)
    first = d
    second = d * d
    for t in range(tile + 1, end):
        offsets, mask, more = tile_of(t, group, n_rows, channels, width, BLOCK_R, BLOCK_C, PLANES)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        d = tl.where(mask, x - shift, 0.0)
        first += d
        second += d * d
        count += more

    total, rest = tile_sum(first, PLANES)
    squares, squares_rest = tile_sum(second, PLANES)
    n = count.to(tl.float32)
    mean = (total + rest) / n
    m2 = squared_deviations(squares, squares_rest, total, rest, mean)
    col, ok = column_of(group, width, BLOCK_C, PLANES)
    line = channels if PLANES else width
    slot = producer.to(tl.int64) * line + col
    size = producers.to(tl.int64) * line
    tl.store(partials_ptr + slot, shift, mask=ok)
    tl.store(partials_ptr + size + slot, mean, mask=ok)
    tl.store(partials_ptr + 2 * size + slot, m2, mask=ok)
    if group == 0:
        tl.store(partials_ptr + 3 * size + producer, n)


# Merges the partials of BLOCK_C channels, BLOCK_P at a time, in float64. Grid: channel blocks. Writes
# stats [4, channels] (mean, 1 / std and what their rounding to float32 took away) and updates running statistics:
# with the unbiased variance, and by 1 / num_batches_tracked where counter_ptr is given (cumulative average).
@triton.jit(do_not_specialize=_BATCH_ARGS)
def finalize_statistics_kernel(partials_ptr, stats_ptr, running_mean_ptr, running_var_ptr, counter_ptr, producers,
                               count, eps, momentum, channels, SPATIAL: tl.constexpr, BLOCK_P: tl.constexpr,
                               BLOCK_C: tl.constexpr):  # fmt: skip
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = offs_c < channels
    size = producers.to(tl.int64) * channels * SPATIAL
    # the first partial's mean as a common shift: differences of means, not means, are squared
    first = offs_c * SPATIAL
    centre = tl.load(partials_ptr + first, mask=ok, other=0.0).to(tl.float64)
    centre += tl.load(partials_ptr + size + first, mask=ok, other=0.0)
    centre = tl.where(tl.abs(centre) < float("inf"), centre, 0.0)
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    n_partials = producers * SPATIAL
    for start in range(0, n_partials, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        producer = offs_p // SPATIAL
        slots = (producer.to(tl.int64) * channels * SPATIAL + offs_p % SPATIAL)[:, None] + first[None, :]
        mask = (offs_p < n_partials)[:, None] & ok[None, :]
        n = tl.load(partials_ptr + 3 * size + producer, mask=offs_p < n_partials, other=0.0).to(tl.float64)[:, None]
        mean = tl.load(partials_ptr + slots, mask=mask, other=0.0).to(tl.float64)
        mean += tl.load(partials_ptr + size + slots, mask=mask, other=0.0)
        m2 = tl.load(partials_ptr + 2 * size + slots, mask=mask, other=0.0)
        d = tl.where(mask, mean - centre[None, :], 0.0)
        sums += n * d
        squares += m2 + n * d * d
    total = count.to(tl.float64)
    offset = tl.sum(sums, axis=0) / total
    mean = centre + offset
    m2 = tl.sum(squares, axis=0) - offset * offset * total
    m2 = tl.where(m2 < 0.0, 0.0, m2)
    invstd = 1.0 / tl.sqrt(m2 / total + eps)
    tl.store(stats_ptr + offs_c, mean.to(tl.float32), mask=ok)
    tl.store(stats_ptr + channels + offs_c, invstd.to(tl.float32), mask=ok)
    tl.store(stats_ptr + 2 * channels + offs_c, (mean - mean.to(tl.float32)).to(tl.float32), mask=ok)
    tl.store(stats_ptr + 3 * channels + offs_c, (invstd - invstd.to(tl.float32)).to(tl.float32), mask=ok)

    if running_mean_ptr is not None:
        factor = tl.full((), 1.0, tl.float64) * momentum
        if counter_ptr is not None:
            factor = 1.0 / tl.load(counter_ptr).to(tl.float64)
        unbiased = m2 / (total - 1.0)
        old_mean = tl.load(running_mean_ptr + offs_c, mask=ok, other=0.0).to(tl.float64)
        old_var = tl.load(running_var_ptr + offs_c, mask=ok, other=0.0).to(tl.float64)
        new_mean = factor * mean + (1.0 - factor) * old_mean
        new_var = factor * unbiased + (1.0 - factor) * old_var
        tl.store(running_mean_ptr + offs_c, new_mean.to(running_mean_ptr.dtype.element_ty), mask=ok)
        tl.store(running_var_ptr + offs_c, new_var.to(running_var_ptr.dtype.element_ty), mask=ok)


# y = activation((x - mean) * (invstd * weight) + bias + residual), one tile [BLOCK_R, BLOCK_C] a program, in float32;
# where signs_ptr is given, a bit of each value that says whether it is above 0 or NaN. The residual goes through a norm
# of its own, and is rounded behind it, where other_mean_ptr is given. Grid: groups * tiles.
@triton.jit(do_not_specialize=[*_BATCH_ARGS, "other_eps"])
def normalize_kernel(x_ptr, residual_ptr, y_ptr, signs_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, other_mean_ptr,
                     other_var_ptr, other_weight_ptr, other_bias_ptr, other_eps, n_rows, eps, channels, units,
                     UNIT: tl.constexpr, SPATIAL: tl.constexpr, PLANES: tl.constexpr, ACTIVATION: tl.constexpr,
                     BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    pid = tl.program_id(0)
    width = units * UNIT
    group, tile = group_of(pid, channels, width, BLOCK_C, PLANES)
    offsets, mask, _count = tile_of(tile, group, n_rows, channels, width, BLOCK_R, BLOCK_C, PLANES)
    col, ok = column_of(group, width, BLOCK_C, PLANES)
    mean, scale, shift = load_scale(mean_ptr, var_ptr, weight_ptr, bias_ptr, col // SPATIAL, ok, channels, eps)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    z = tl.fma(x - mean, scale, shift)
    if residual_ptr is not None:
        r = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if other_mean_ptr is not None:
            mean, scale, shift = load_scale(other_mean_ptr, other_var_ptr, other_weight_ptr, other_bias_ptr,
                                            col // SPATIAL, ok, channels, other_eps)  # fmt: skip
            r = tl.fma(r - mean, scale, shift).to(y_ptr.dtype.element_ty).to(tl.float32)
        z += r
    y = common.activate(z, ACTIVATION).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, y, mask=mask)
    if signs_ptr is not None:
        places, exist = signs_of(tile, group, n_rows, BLOCK_R, BLOCK_C)
        above = (y.to(tl.float32) <= 0.0) == 0  # NaN lets gradients through
        tl.store(signs_ptr + places, common.pack_bits(above, BLOCK_R, BLOCK_C), mask=exist)


# sum(dz) and sum(dz * (x - mean)) of a run of tiles_each tiles, per column or channel, where dz is of dy + more (more
# may be None); writes dz where dz_ptr is given
# (the residual's gradient, which the input gradient then reads instead of dy and what the activation needs).
# Grid: groups * producers. Writes [4, producers, line]: each sum and its remainder.
@triton.jit(do_not_specialize=_BATCH_ARGS)
def gradient_sums_kernel(dy_ptr, more_ptr, x_ptr, saved_ptr, dz_ptr, partials_ptr, mean_ptr, var_ptr, weight_ptr,
                         bias_ptr, n_rows, n_tiles, tiles_each, producers, eps, channels, units, UNIT: tl.constexpr,
                         SPATIAL: tl.constexpr, PLANES: tl.constexpr, ACTIVATION: tl.constexpr, SAVED: tl.constexpr,
                         BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    pid = tl.program_id(0)
    width = units * UNIT
    group, producer = group_of(pid, channels, width, BLOCK_C, PLANES)
    start = producer * tiles_each
    end = tl.minimum(start + tiles_each, n_tiles)
    col, ok = column_of(group, width, BLOCK_C, PLANES)
    mean, scale, shift = load_scale(mean_ptr, var_ptr, weight_ptr, bias_ptr, col // SPATIAL, ok, channels, eps)
    plain = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    times_x = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    # float32 products round at the precision asked for; what they lose is summed beside them
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    lost = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for t in range(start, end):
        offsets, mask, _count = tile_of(t, group, n_rows, channels, width, BLOCK_R, BLOCK_C, PLANES)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dz = gradient_of_sum(dy_ptr, more_ptr, saved_ptr, x, mean, scale, shift, offsets, mask, t, group, n_rows,
                             ACTIVATION, SAVED, BLOCK_R, BLOCK_C)  # fmt: skip
        if dz_ptr is not None:
            rounded = dz.to(dz_ptr.dtype.element_ty)
            tl.store(dz_ptr + offsets, rounded, mask=mask)
            dz = rounded.to(tl.float32)
        dz = tl.where(mask, dz, 0.0)
        d = tl.where(mask, x - mean, 0.0)
        plain += dz
        if EXACT:
            product = dz * d
            times_x += product
            lost += tl.fma(dz, d, -product)
        else:
            times_x = tl.fma(dz, d, times_x)

    total, rest = tile_sum(plain, PLANES)
    total_x, rest_x = tile_sum(times_x, PLANES)
    if EXACT:
        lost_x, _ = tile_sum(lost, PLANES)
        rest_x += tl.where(lost_x == lost_x, lost_x, 0.0)
    store_sums(partials_ptr, producer, producers, channels if PLANES else width, col, ok, total, rest, total_x, rest_x)


# Merges the sums of BLOCK_C channels in float64. Grid: channel blocks. Writes the gradients of weight and bias and,
# where coefficients_ptr is given, [2, channels] such that dx = (dz - first - (x - mean) * second) * scale.
@triton.jit(do_not_specialize=_BATCH_ARGS)
def finalize_gradients_kernel(partials_ptr, dweight_ptr, dbias_ptr, coefficients_ptr, mean_ptr, var_ptr, producers,
                              count, eps, channels, SPATIAL: tl.constexpr, BLOCK_P: tl.constexpr,
                              BLOCK_C: tl.constexpr):  # fmt: skip
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = offs_c < channels
    size = producers.to(tl.int64) * channels * SPATIAL
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    sums_x = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    n_partials = producers * SPATIAL
    for start in range(0, n_partials, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        rows = (offs_p // SPATIAL).to(tl.int64) * channels * SPATIAL + offs_p % SPATIAL
        slots = rows[:, None] + (offs_c * SPATIAL)[None, :]
        mask = (offs_p < n_partials)[:, None] & ok[None, :]
        sums += tl.load(partials_ptr + slots, mask=mask, other=0.0).to(tl.float64)
        sums += tl.load(partials_ptr + size + slots, mask=mask, other=0.0)
        sums_x += tl.load(partials_ptr + 2 * size + slots, mask=mask, other=0.0).to(tl.float64)
        sums_x += tl.load(partials_ptr + 3 * size + slots, mask=mask, other=0.0)
    dz = tl.sum(sums, axis=0)
    dz_x = tl.sum(sums_x, axis=0)
    _, mean_rest, invstd, invstd_rest = load_statistics(mean_ptr, var_ptr, offs_c, ok, channels, eps)
    mean_rest = mean_rest.to(tl.float64)
    invstd = invstd.to(tl.float64) + invstd_rest
    dz_x -= mean_rest * dz
    if dweight_ptr is not None:
        tl.store(dweight_ptr + offs_c, (dz_x * invstd).to(dweight_ptr.dtype.element_ty), mask=ok)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + offs_c, dz.to(dbias_ptr.dtype.element_ty), mask=ok)
    if coefficients_ptr is not None:
        total = count.to(tl.float64)
        second = dz_x * invstd * invstd / total
        first = dz / total - mean_rest * second
        tl.store(coefficients_ptr + offs_c, first.to(tl.float32), mask=ok)
        tl.store(coefficients_ptr + channels + offs_c, second.to(tl.float32), mask=ok)


# dx of one tile [BLOCK_R, BLOCK_C]: (dz - first - (x - mean) * second) * scale, or dz * scale where the statistics
# were given (no coefficients). Writes dz, the residual's gradient, where dz_ptr is given. Grid: groups * tiles.
@triton.jit(do_not_specialize=_BATCH_ARGS)
def input_gradient_kernel(dy_ptr, more_ptr, x_ptr, saved_ptr, dx_ptr, dz_ptr, coefficients_ptr, mean_ptr, var_ptr,
                          weight_ptr, bias_ptr, n_rows, eps, channels, units, UNIT: tl.constexpr, SPATIAL: tl.constexpr,
                          PLANES: tl.constexpr, ACTIVATION: tl.constexpr, SAVED: tl.constexpr, BLOCK_R: tl.constexpr,
                          BLOCK_C: tl.constexpr):  # fmt: skip
    pid = tl.program_id(0)
    width = units * UNIT
    group, tile = group_of(pid, channels, width, BLOCK_C, PLANES)
    offsets, mask, _count = tile_of(tile, group, n_rows, channels, width, BLOCK_R, BLOCK_C, PLANES)
    col, ok = column_of(group, width, BLOCK_C, PLANES)
    mean, scale, shift = load_scale(mean_ptr, var_ptr, weight_ptr, bias_ptr, col // SPATIAL, ok, channels, eps)
    # without coefficients, and where the activation does not ask for it, x is never read
    if coefficients_ptr is not None or (ACTIVATION is not None and SAVED != "output" and SAVED != "signs"):
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        x = mean
    dz = gradient_of_sum(dy_ptr, more_ptr, saved_ptr, x, mean, scale, shift, offsets, mask, tile, group, n_rows,
                         ACTIVATION, SAVED, BLOCK_R, BLOCK_C)  # fmt: skip
    if dz_ptr is not None:
        tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    if dx_ptr is not None:
        ptrs = dx_ptr + offsets
        dx = raw_gradient(dz, x, mean, scale, coefficients_ptr, col // SPATIAL, ok, channels)
        tl.store(ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def like(x: Tensor) -> Tensor:
    """An empty tensor laid out as dense ``x``, with the strides torch gives (those of axes of size 1 included)."""
    if x.is_contiguous():
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(x, memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def _line(m: Matrix) -> int:
    return m.channels if m.planes else m.width


def launch_statistics(
    x: Tensor, m: Matrix, num_batches_tracked: Tensor | None = None, config: Config | None = None
) -> Partials:
    """Partial statistics of dense ``x``; adds one to ``num_batches_tracked`` (int64, shape ()) where given."""
    config = config or tuning.statistics(m)
    producers, each = tuning.producers(m, config, targets.current())
    partials = x.new_empty(producers * (3 * _line(m) + 1), dtype=torch.float32)
    launch(
        statistics_kernel, (tuning.groups(m, config) * producers,),
        x, partials, num_batches_tracked, m.rows, tuning.tiles(m, config), each, producers, m.channels,
        m.width // m.unit, UNIT=m.unit, PLANES=m.planes, **config.options(),
    )  # fmt: skip
    return Partials(partials, producers)


def launch_finalize_statistics(
    partials: Partials, m: Matrix, bn: BatchNorm, config: Config | None = None, stats: Tensor | None = None
) -> Tensor:
    """Statistics [4, C] from partials, written to ``stats`` where given; updates contiguous running statistics in
    place. ``bn.num_batches_tracked`` already counts this batch."""
    config = config or tuning.finalize(m)
    if stats is None:
        stats = partials.data.new_empty((4, m.channels))
    counter = bn.num_batches_tracked if bn.momentum is None else None
    launch(
        finalize_statistics_kernel, (cdiv(m.channels, config["BLOCK_C"]),),
        partials.data, stats, bn.running_mean, bn.running_var, counter, partials.producers, m.values, bn.eps,
        bn.momentum or 0.0, m.channels, SPATIAL=m.spatial, **config.options(),
    )  # fmt: skip
    return stats


def launch_normalize(
    x: Tensor, m: Matrix, norm: Norm, activation: str | None = None, residual: Tensor | None = None,
    config: Config | None = None, y: Tensor | None = None, signs: Tensor | None = None, of_residual: Norm | None = None,
) -> Tensor:  # fmt: skip
    """The output, laid out as dense ``x`` and ``residual``, written to ``y`` where given. ``signs``: signs_like's, of
    the output; ``of_residual``: a norm that the residual is yet to go through."""
    config = config or tuning.normalize(m)
    if y is None:
        y = like(x)
    launch(
        normalize_kernel, (tuning.groups(m, config) * tuning.tiles(m, config),),
        x, residual, y, signs, *norm[:4], *(of_residual or NO_NORM), m.rows, norm.eps, m.channels, m.width // m.unit,
        UNIT=m.unit, SPATIAL=m.spatial, PLANES=m.planes, ACTIVATION=activation, **config.options(),
    )  # fmt: skip
    return y


def signs_like(x: Tensor, m: Matrix) -> Tensor | None:
    """Room for a bit of each value of dense ``x``; None where columns do not come in such groups."""
    return None if m.planes or m.width % SIGNS.value else x.new_empty(m.rows * m.width // 8, dtype=torch.uint8)


def launch_gradient_sums(
    dy: Tensor, x: Tensor, m: Matrix, norm: Norm, activation: str | None = None, saved: Tensor | None = None,
    saved_is: str | None = None, write_dz: bool = False, config: Config | None = None, dz: Tensor | None = None,
    more: Tensor | None = None,
) -> tuple[Partials, Tensor | None]:  # fmt: skip
    """Partial sums for the gradients, and dz if ``write_dz``, or where given. ``saved_is``: 'output', 'signs',
    'residual' or None; ``more``: a second gradient to be added to dy, laid out alike."""
    config = config or tuning.gradient(m)
    producers, each = tuning.producers(m, config, targets.current())
    partials = x.new_empty(producers * 4 * _line(m), dtype=torch.float32)
    dz = like(x) if write_dz else dz
    # fusing the products' additions would count what they lose twice
    launch(
        gradient_sums_kernel, (tuning.groups(m, config) * producers,),
        dy, more, x, saved, dz, partials, norm.mean, norm.var, norm.weight, norm.bias, m.rows, tuning.tiles(m, config),
        each, producers, norm.eps, m.channels, m.width // m.unit, UNIT=m.unit, SPATIAL=m.spatial, PLANES=m.planes,
        ACTIVATION=activation, SAVED=saved_is, enable_fp_fusion=False, **config.options(),
    )  # fmt: skip
    return Partials(partials, producers), dz


def launch_finalize_gradients(
    partials: Partials, m: Matrix, norm: Norm, needs_weight: bool = True, needs_bias: bool = True,
    needs_input: bool = True, config: Config | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dweight, dbias, coefficients of the input gradient), each where asked for."""
    dweight = gradient_like(norm.weight) if needs_weight else None
    dbias = gradient_like(norm.bias) if needs_bias else None
    coefficients = partials.data.new_empty((2, m.channels)) if needs_input else None
    finalize_gradients(partials, m, norm, dweight, dbias, coefficients, config)
    return dweight, dbias, coefficients


def finalize_gradients(
    partials: Partials, m: Matrix, norm: Norm, dweight: Tensor | None, dbias: Tensor | None,
    coefficients: Tensor | None, config: Config | None = None,
) -> None:  # fmt: skip
    """Writes what launch_finalize_gradients returns."""
    config = config or tuning.finalize(m)
    launch(
        finalize_gradients_kernel, (cdiv(m.channels, config["BLOCK_C"]),),
        partials.data, dweight, dbias, coefficients, norm.mean, norm.var, partials.producers, m.values, norm.eps,
        m.channels, SPATIAL=m.spatial, **config.options(),
    )  # fmt: skip


def gradient_like(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else torch.empty_like(parameter, memory_format=torch.contiguous_format)


def launch_input_gradient(
    dy: Tensor, x: Tensor, m: Matrix, norm: Norm, coefficients: Tensor | None, activation: str | None = None,
    saved: Tensor | None = None, saved_is: str | None = None, needs_input: bool = True, write_dz: bool = False,
    config: Config | None = None, more: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(dx, dz), each where asked for. ``coefficients``: None where the statistics were given (evaluation); ``more``:
    launch_gradient_sums'."""
    dx = like(x) if needs_input else None
    dz = like(x) if write_dz else None
    input_gradient(dy, x, m, norm, coefficients, dx, dz, activation, saved, saved_is, config, more)
    return dx, dz


def input_gradient(
    dy: Tensor, x: Tensor, m: Matrix, norm: Norm, coefficients: Tensor | None, dx: Tensor | None, dz: Tensor | None,
    activation: str | None, saved: Tensor | None, saved_is: str | None, config: Config | None = None,
    more: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes what launch_input_gradient returns."""
    config = config or tuning.gradient(m)
    launch(
        input_gradient_kernel, (tuning.groups(m, config) * tuning.tiles(m, config),),
        dy, more, x, saved, dx, dz, coefficients, norm.mean, norm.var, norm.weight, norm.bias, m.rows, norm.eps,
        m.channels, m.width // m.unit, UNIT=m.unit, SPATIAL=m.spatial, PLANES=m.planes, ACTIVATION=activation,
        SAVED=saved_is, **config.options(),
    )  # fmt: skip
