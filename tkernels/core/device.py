"""Device functions that several kernels share: activations, their gradients, dropout masks."""

from __future__ import annotations

import triton
import triton.language as tl

LEAKY_SLOPE = tl.constexpr(0.01)  # torch.nn.functional.leaky_relu's default


@triton.jit
def relu(x):
    """max(x, 0) that keeps NaN, as torch does."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The activation of float32 ``z``. ACTIVATION: a name of tkernels.core.activation ('gelu' is that of erf)."""
    if ACTIVATION == "relu":
        z = relu(z)
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0, z, z * LEAKY_SLOPE)
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "silu":
        z = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "relu6":
        z = tl.minimum(relu(z), 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "hardswish":
        z = z * (tl.minimum(tl.maximum(z + 3.0, 0.0), 6.0) * (1.0 / 6.0))  # the factor comes to 1 exactly
    return z


@triton.jit
def activation_gradient(dy, saved, ACTIVATION: tl.constexpr):
    """dy times the activation's derivative, in float32. ``saved``: the activation's input, or its output where that
    tells all ('relu', 'leaky_relu', 'relu6'). NaN lets the gradient through where pieces are straight, as in torch."""
    if ACTIVATION == "relu":
        dy = tl.where(saved <= 0, 0.0, dy)
    elif ACTIVATION == "leaky_relu":
        dy = tl.where(saved > 0, dy, dy * LEAKY_SLOPE)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(saved * 0.7071067811865476))
        dy = dy * (cdf + saved * 0.3989422804014327 * tl.exp(-0.5 * saved * saved))
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-saved))
        dy = dy * s * (1.0 + saved * (1.0 - s))
    elif ACTIVATION == "relu6":
        dy = tl.where((saved <= 0) | (saved >= 6.0), 0.0, dy)
    elif ACTIVATION == "hardswish":
        slope = tl.where(saved < 3.0, saved * (1.0 / 3.0) + 0.5, 1.0)
        dy = tl.where(saved <= -3.0, 0.0, dy * slope)
    return dy


@triton.jit
def pack_bits(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of truth values [ROWS, COLUMNS] as bytes [ROWS, COLUMNS // 8], the first column in the lowest bit."""
    bits = tl.reshape(tile.to(tl.int32), (ROWS, COLUMNS // 8, 8)) << tl.arange(0, 8)[None, None, :]
    return tl.sum(bits, axis=2).to(tl.uint8)


@triton.jit
def unpack_bits(packed, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """pack_bits' tile, as int32 0 and 1."""
    bits = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, COLUMNS))


@triton.jit
def load_bias(bias_ptr, offs, mask, y_ptr):
    """A bias [columns] as torch adds it to a convolution: in the dtype of the result, y_ptr's. (What a large one is
    rounded to decides to which side of it sums in 16 bits are rounded, and so their variance.)"""
    return tl.load(bias_ptr + offs, mask=mask, other=0.0).to(y_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def add_bias(acc, bias):
    """``acc`` [rows, columns] + ``bias`` [columns], as an fma: of a sum with one tl.dot Triton makes a product that
    starts at the bias, and each of its terms is rounded as coarsely as a large bias is."""
    return tl.fma(acc, 1.0, bias[None, :])


@triton.jit
def add_product(acc, a, b, PRECISION: tl.constexpr):
    """acc + a @ b. Float32 without tensor cores rounds in every term of a chain: short ones are summed on their own.
    (By an fma: of a sum Triton makes a product that starts at ``acc``.)"""
    if PRECISION == "ieee" and a.dtype == tl.float32:
        acc = tl.fma(tl.dot(a, b, input_precision=PRECISION), 1.0, acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def keep_scale(seed, row, col, n_cols, p, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Dropout factors of a tile, shape [BLOCK_M, BLOCK_N]: 0 with probability p, else 1 / (1 - p).

    Element (row, col) of a matrix of n_cols columns takes draw col % 4 of the Philox call numbered
    row * ceil(n_cols / 4) + col // 4, so a mask depends on the seed and the logical index only. ``row``: int64
    [BLOCK_M]; ``col``: the tile's first column (a multiple of 4).
    """
    quads = col // 4 + tl.arange(0, BLOCK_N // 4)
    counter = row[:, None] * ((n_cols + 3) // 4) + quads[None, :]
    lo = (counter & 0xFFFFFFFF).to(tl.uint32)
    hi = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(lo)
    r0, r1, r2, r3 = tl.philox(seed, lo, hi, zero, zero)
    # join puts its operands on a new last axis: ((0, 2), (1, 3)) flattens to 0, 1, 2, 3
    draws = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(BLOCK_M, BLOCK_N)
    uniform = tl.uint_to_uniform_float(draws)
    # (draws are below 1: p = 1 keeps nothing, and 1 / 0 is never chosen)
    return tl.where(uniform >= p, 1.0 / (1.0 - p), 0.0)


@triton.jit
def grouped_tile(pid, tiles_m, tiles_n, GROUP: tl.constexpr = 8):
    """Tile coordinates (m, n) of program ``pid``: GROUP rows of tiles at a time share their column operand in L2."""
    first = pid // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = pid % (GROUP * tiles_n)
    return first + within % height, within // height
