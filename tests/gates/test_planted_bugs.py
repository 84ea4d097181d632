"""Bugs planted in kernels: each must be reported by the ttsem gate, so that an upgrade cannot switch a check off
unseen. A test here fails when its bug goes unnoticed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.tolerance import assert_close
from tkernels.core.config import Config

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
    # what lies there may be the output of other programs, or be nearer to the start of another tensor
    with pytest.raises(faults, match=r"past the end|before the start|program instances"):
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
    a, b = torch.rand(16, 4096, device=device).half(), torch.rand(4096, 16, device=device).half()
    out = torch.empty(16, 16, device=device, dtype=torch.float16)
    _half_accumulator_kernel[(1,)](a, b, out, 4096, 16)
    with pytest.raises(AssertionError, match="over the bound"):
        assert_close(out, a.double() @ b.double(), 4096)


# Bugs planted in the library's own kernels, by editing a copy of their source.


@pytest.fixture
def edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``edited("attention.kernels", (before, after), ...)``: that module of tkernels.ops with its source changed."""

    def edit(name: str, *changes: tuple[str, str]) -> Any:
        source = Path(importlib.import_module(f"tkernels.ops.{name}").__file__ or "").read_text()
        for before, after in changes:
            assert source.count(before) == 1, f"{name} holds {before!r} {source.count(before)} times"
            source = source.replace(before, after)
        path = tmp_path / f"edited_{name.replace('.', '_')}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, module)
        spec.loader.exec_module(module)
        return module

    return edit


FOUND = r"over the bound|NaN in other places|past the end"
ATTENTION = Config.of(BLOCK_M=16, BLOCK_N=16, BLOCK_D=16, BLOCK_V=16, CHUNK=16)


def _attention(device: str, forward: Any, backward: Any) -> None:
    """The kernels of two modules, in causal order over several tiles, against float64."""
    q, k, v, do = (torch.randn(1, 1, 36, 16, dtype=torch.float64) for _ in range(4))
    # later keys fit better, so that the running maximum moves
    k *= torch.linspace(0.1, 3, 36, dtype=torch.float64)[:, None]
    exact = [t.float().double().requires_grad_() for t in (q, k, v)]
    o64 = torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=True)
    wanted = [o64.detach(), *torch.autograd.grad(o64, exact, do.float().double())]
    q, k, v, do = (t.float().to(device) for t in (q, k, v, do))
    options = {"causal": True, "scale": 0.25, "config": ATTENTION}
    o, lse = forward.launch_forward(q, k, v, **options)
    delta = backward.launch_delta(o, do)
    dq = backward.launch_dq(q, k, v, do, lse, delta, **options)
    dk, dv = backward.launch_dkv(q, k, v, do, lse, delta, **options)
    for name, got, want in zip(("o", "dq", "dk", "dv"), (o, dq, dk, dv), wanted):
        assert_close(got, want, 4 * 36, scale=1.0, name=name)


def test_sound_attention_passes(device: str, edited: Callable[..., Any]) -> None:
    _attention(device, edited("attention.kernels"), edited("attention.kernels_backward"))


@pytest.mark.parametrize(
    "module, before, after",
    (
        ("kernels", "        acc *= rescale[:, None]\n", ""),
        ("kernels", "row_sum * rescale + ", "row_sum + "),
        ("kernels", "offs_n <= offs_m", "offs_n < offs_m"),
        ("kernels", "tl.minimum(n_k, (tile + 1) * BLOCK_M)", "tl.minimum(n_k, tile * BLOCK_M)"),
        ("kernels", "tl.minimum(whole, tile * BLOCK_M //", "tl.minimum(whole, (tile + 1) * BLOCK_M //"),
        ("kernels_backward", "first_tile = tile * BLOCK_N // BLOCK_M", "first_tile = tile * BLOCK_N // BLOCK_M + 1"),
        ("kernels_backward", "ds = weights * (dw - delta[:, None])", "ds = weights * dw"),
        ("kernels_backward", "(dq * scale)", "dq"),
    ),
    ids=("accumulator not rescaled", "sum not rescaled", "causal off by one", "last tile missed", "tile thought whole",
         "first queries missed", "no delta", "no scale"),
)  # fmt: skip
def test_bugs_in_attention(
    device: str, faults: type[Exception], edited: Callable[..., Any], module: str, before: str, after: str
) -> None:
    names = "kernels", "kernels_backward"
    modules = {name: edited(f"attention.{name}", *[(before, after)] * (name == module)) for name in names}
    with pytest.raises((AssertionError, faults), match=FOUND):
        _attention(device, *modules.values())


def _matmul(device: str, module: Any) -> None:
    a, b = torch.randn(20, 40, dtype=torch.float64), torch.randn(40, 20, dtype=torch.float64)
    config = Config.of(BLOCK_M=16, BLOCK_N=16, BLOCK_K=32)
    # views into larger tensors: what lies beyond an edge is there, and is not 0
    wide = [torch.nn.functional.pad(t.float(), (0, 30, 0, 30), value=3.0).to(device) for t in (a, b)]
    out = module.launch_matmul(wide[0][:20, :40], wide[1][:40, :20], config=config, splits=0)
    assert_close(out, a.float().double() @ b.float().double(), 40)


FROM_LINEAR = "from tkernels.ops.linear.kernels import"


@pytest.mark.parametrize(
    "changes",
    (
        (),
        (("a_stride_k, M, K)\n", "a_stride_k, M, K + BLOCK_K)\n"),
         ("b_stride_n, K, N)\n", "b_stride_n, K + BLOCK_K, N)\n")),
        (("acc = tl.dot(a, b, acc, input_precision=PRECISION)", "acc = tl.dot(a, b, input_precision=PRECISION)"),),
        (("tl.minimum(chain + STEPS_A_CHAIN, end_step)", "tl.minimum(chain + STEPS_A_CHAIN, end_step - 1)"),),
    ),
    ids=("none", "no mask at the end of K", "not accumulated", "last step missed"),
)  # fmt: skip
def test_bugs_in_matmul(
    device: str, faults: type[Exception], edited: Callable[..., Any], changes: tuple[tuple[str, str], ...]
) -> None:
    edited("linear.kernels", *changes)
    module = edited("matmul.kernels", (FROM_LINEAR, "from edited_linear_kernels import"))
    if not changes:
        _matmul(device, module)
        return
    with pytest.raises((AssertionError, faults), match=FOUND):
        _matmul(device, module)
