"""Bugs planted in kernels: each must be reported by the ttsem gate, so that an upgrade cannot switch a check off
unseen. A test here fails when its bug goes unnoticed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.gate("ttsem")


@pytest.fixture
def faults() -> type[Exception]:
    from ttsem.sanitize import KernelFault

    return KernelFault


def test_the_faster_fma_is_the_exact_one() -> None:
    """This gate's own fused multiply-add gives the bits of ttsem's, which computes in rationals."""
    from ttsem import ops

    from tests.gates.ttsem import multiply_add

    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal((3, 2000)) * np.exp2(rng.integers(-60, 60, (3, 2000)))).astype(np.float32)
    # near cancellations, where one rounding and two differ
    c[::2] = -(a * b)[::2] * (1 + np.exp2(-rng.integers(1, 30, 1000).astype(np.float32)))
    a[:5] = np.inf, -0.0, np.nan, 3.4e38, 1e-45
    c[3:5] = np.inf, 1e-45
    got = multiply_add(*(v.astype(np.float64) for v in (a, b, c))).astype(np.float32)
    exact = [ops._fma_scalar(float(x), float(y), float(z), ops._FMA_FORMATS["f32"]) for x, y, z in zip(a, b, c)]
    np.testing.assert_array_equal(got, np.array(exact).astype(np.float32))


@triton.jit
def _add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASK_LOAD:
        x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
        y = tl.load(y_ptr + offs, mask=offs < n, other=0.0)
    else:
        x = tl.load(x_ptr + offs)
        y = tl.load(y_ptr + offs)
    if MASK_STORE:
        tl.store(out_ptr + offs, x + y, mask=offs < n)
    else:
        tl.store(out_ptr + offs, x + y)


def _add(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor, n: int, **flags: bool) -> None:
    programs = flags.pop("programs", None) or triton.cdiv(n, 256)
    _add_kernel[(programs,)](x, y, out, n, 256, **{"MASK_LOAD": True, "MASK_STORE": True, **flags})


def test_the_sound_kernel_passes(device: str) -> None:
    x, y = torch.randn(1000, device=device), torch.randn(1000, device=device)
    out = torch.empty_like(x)
    _add(x, y, out, 1000)
    torch.testing.assert_close(out, x + y)


@pytest.mark.parametrize("missing", ("MASK_LOAD", "MASK_STORE"))
def test_missing_mask(device: str, faults: type[Exception], missing: str) -> None:
    x, y = torch.randn(1000, device=device), torch.randn(1000, device=device)
    with pytest.raises(faults, match="past the end"):
        _add(x, y, torch.empty_like(x), 1000, **{missing: False})


def test_store_past_a_view(device: str, faults: type[Exception]) -> None:
    base, y = torch.randn(2000, device=device), torch.randn(1000, device=device)
    with pytest.raises(faults, match="past the end"):
        _add(y, y, base[500:1000], 500, MASK_STORE=False)


def test_grid_too_small_leaves_poison(device: str) -> None:
    x = torch.randn(1024, device=device)
    out = torch.empty_like(x)
    _add(x, x, out, 1024, programs=3)
    assert out[768:].isnan().all()


@triton.jit
def _column_sums_kernel(x_ptr, sums_ptr, n_rows, n_cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_COLS)
    mask = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    x = tl.load(x_ptr + rows[:, None] * n_cols + cols[None, :], mask=mask, other=0.0)
    before = tl.load(sums_ptr + cols, mask=cols < n_cols, other=0.0)
    tl.store(sums_ptr + cols, before + tl.sum(x, 0), mask=cols < n_cols)


def test_read_modify_write_race(device: str, faults: type[Exception]) -> None:
    x, sums = torch.randn(200, 20, device=device), torch.zeros(20, device=device)
    with pytest.raises(faults, match="program instances"):
        _column_sums_kernel[(4,)](x, sums, 200, 20, 64, 32)


@triton.jit
def _shift_kernel(x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs + 1, mask=offs + 1 < n, other=0.0)
    tl.store(x_ptr + offs, x, mask=offs < n)


def test_in_place_race(device: str, faults: type[Exception]) -> None:
    with pytest.raises(faults, match="program instances"):
        _shift_kernel[(4,)](torch.randn(1000, device=device), 1000, 256)


@triton.jit
def _mean_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * n + offs, mask=offs < n)
    tl.store(out_ptr + tl.program_id(0), tl.sum(x, 0) / n)


def test_missing_other_is_poison(device: str) -> None:
    x = torch.randn(4, 100, device=device)
    out = torch.empty(4, device=device)
    _mean_kernel[(4,)](x, out, 100, 128)
    assert out.isnan().all()


@triton.jit
def _two_lanes_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs // 2, tl.load(x_ptr + offs))


def test_two_lanes_store_to_one_element(device: str, faults: type[Exception]) -> None:
    with pytest.raises(faults, match="undefined"):
        _two_lanes_kernel[(1,)](torch.randn(64, device=device), torch.empty(32, device=device), 64)


@triton.jit
def _gather_kernel(x_ptr, target_ptr, out_ptr, n_classes):
    row = tl.program_id(0)
    tl.store(out_ptr + row, tl.load(x_ptr + row * n_classes + tl.load(target_ptr + row)))


def test_target_read_as_an_address(device: str, faults: type[Exception]) -> None:
    target = torch.tensor([1, 2, 3, 50], device=device)
    with pytest.raises(faults, match="past the end"):
        _gather_kernel[(4,)](torch.randn(4, 10, device=device), target, torch.empty(4, device=device), 10)


@triton.jit
def _half_accumulator_kernel(a_ptr, b_ptr, out_ptr, n_inner, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float16)
    for k in range(0, n_inner, BLOCK):
        a = tl.load(a_ptr + offs[:, None] * n_inner + k + offs[None, :])
        b = tl.load(b_ptr + (k + offs)[:, None] * BLOCK + offs[None, :])
        acc += tl.dot(a, b).to(tl.float16)
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], acc)


def test_half_accumulator_misses_the_tolerance(device: str) -> None:
    from tests.tolerance import assert_close

    a, b = torch.rand(16, 4096, device=device).half(), torch.rand(4096, 16, device=device).half()
    out = torch.empty(16, 16, device=device, dtype=torch.float16)
    _half_accumulator_kernel[(1,)](a, b, out, 4096, 16)
    with pytest.raises(AssertionError, match="over the bound"):
        assert_close(out, a.double() @ b.double(), 4096)
