"""Every kernel at the CNN's real shapes, compiled for GPUs that are not there: no spills, shared memory within the
limit, and in each 16-bit product tensor-core instructions fed by 128-bit loads."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import perf.static.cases
from perf.static import aot, rules
from tkernels.core import targets

pytestmark = pytest.mark.gate("aot")

# TK_AOT=all compiles every case for every target there is (a quarter of an hour on 2 cores), TK_AOT=sm_90,sm_80 for
# those; by default float32 cases, whose tiles depend little on the target, are compiled for the one with the fewest
# registers to spare
ASKED = os.environ.get("TK_AOT", "")
ALL = tuple(targets.TARGETS) if ASKED in ("", "all") else tuple(ASKED.split(","))
TARGETS = ALL if ASKED else ("sm_80", "sm_90", "sm_100", "gfx942")
FLOAT32_TARGETS = ALL if ASKED else ("sm_80",)
# whose findings here were so far those of sm_90 as well
LATER = None if ASKED else "sm_100"


# Cases that are no part of the CIFAR network's training or evaluation: compiled by make test-extended
BEYOND_THE_NETWORK = (
    "gelu", "NCHW", "residual", "48x7x7", "40x2x2", "3x32x32", "overlap", "1024->", "1000->", "hundred", "imagenet",
    "vocabulary", "few rows", "segmentation", "stride 2", "depthwise", "mask", "smoothed", "pointwise", "networks",
    "matmul", "attention",
)  # fmt: skip


def _cases() -> Iterator[Any]:
    for _, module, _ in pkgutil.iter_modules(perf.static.cases.__path__):
        for case in importlib.import_module(f"perf.static.cases.{module}").cases():
            few = FLOAT32_TARGETS if "fp32" in case.name or "float32" in case.name else TARGETS
            for target in ALL if module == "networks" else few:
                beyond = target == LATER or any(word in case.name for word in BEYOND_THE_NETWORK)
                marks = [pytest.mark.extended("aot")] if beyond else []
                yield pytest.param(case, target, id=f"{module}-{case.name}-{target}", marks=marks)


# Two float32 kernels for which ptxas takes 72 and 128 registers of 255, to fit one program more, and keeps one or two
# values in memory outside the loop over the reduction (Triton 3.8)
KNOWN = {"normalize_kernel on sm_100: spills 8 bytes", "conv_stage_kernel on sm_120: spills 8 bytes"}


@pytest.mark.parametrize("case, target", list(_cases()))
def test_compiles_clean(case: aot.Case, target: str) -> None:
    reason = case.reason_to_skip(target)
    if reason is not None:
        pytest.skip(f"left to PyTorch: {reason}")
    compiled = aot.inspect(case.run, target)
    assert compiled, "the case launched nothing"
    if case.product:
        assert any(
            facts.has_dot and rules.sixteen_bit(launch) and rules.aligned(launch.arguments)
            for launch, facts in compiled
        ), "the case says product, but no launch has a dot of aligned operands"
    problems = [
        f"{facts.kernel} on {target}: {text}" for launch, facts in compiled for text in rules.complaints(launch, facts)
    ]
    known = KNOWN if "fp32" in case.name else set()
    assert known.issuperset(problems), "\n".join(problems)


# The operators that have products, in perf/static/cases. Two are exhaustive: attention has a tile of each pass in
# test_attention_and_matmul.py, and the networks' layers have the products of conv and conv_stage.
PRODUCTS = (
    "conv", "conv_stage", "linear", "matmul",
    *(pytest.param(name, marks=pytest.mark.extended("aot")) for name in ("attention", "networks")),
)  # fmt: skip


def _may_hold_wgmma(launch: aot.Launch) -> bool:
    given = launch.arguments
    half = any(str(getattr(value, "dtype", "")).endswith("float16") for value in given.values())
    return "PRECISION" in given and (half or given["PRECISION"] == "tf32")


@pytest.mark.parametrize("operator", PRODUCTS)
def test_wgmma_overlaps_and_reads_what_stays(operator: str) -> None:
    """All products of perf/static/cases, whatever else of them make test leaves to make test-extended: neither spills
    nor wide loads tell of these mistakes, and two of the three give wrong values."""
    found: dict[str, list[str]] = {}
    seen, alone = 0, 0
    for case in importlib.import_module(f"perf.static.cases.{operator}").cases():
        if case.reason_to_skip("sm_90") is not None:
            continue
        for launch, facts in aot.inspect(case.run, "sm_90", _may_hold_wgmma):
            if facts.wgmma is None:
                continue
            seen += rules.sixteen_bit(launch)
            alone += bool(facts.wgmma.serialised)
            about = [text for text in facts.wgmma.complaints() if text in rules.complaints(launch, facts)]
            if about:
                found[f"{case.name}, {facts.kernel}"] = about
    assert seen, "no 16-bit product was looked at"
    assert not found
    # what perf/static/rules.py excuses
    assert alone <= (1 if operator == "attention" else 0)


@triton.jit
def _product_kernel(
    a_ptr, b_ptr, c_ptr, rows, group_in, IN_UNIT: tl.constexpr, LATE_WHERE: tl.constexpr, TRANS: tl.constexpr,
    COMPUTED: tl.constexpr, MAY_BE_EMPTY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """c[m, n] = sum over k of a[m, k] b[k, n]; with TRANS a lies as [k, m]; COMPUTED: of exp(a)."""
    length = group_in * IN_UNIT
    if not MAY_BE_EMPTY:
        tl.assume(length > 0)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    inside = offs_m < rows
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, length, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (offs_k < length)[None, :]
        if TRANS:
            a = tl.trans(tl.load(a_ptr + offs_k[:, None].to(tl.int64) * BLOCK_M + offs_m[None, :]))
        elif LATE_WHERE:
            a_offs = tl.where(inside[:, None], offs_m[:, None].to(tl.int64) * length + offs_k[None, :], 0)
            a = tl.load(a_ptr + a_offs, mask=mask, other=0.0)
        else:
            a_offs = tl.where(inside, offs_m, 0)[:, None].to(tl.int64) * length + offs_k[None, :]
            a = tl.load(a_ptr + a_offs, mask=mask, other=0.0)
        if COMPUTED:
            a = tl.exp(a.to(tl.float32)).to(a_ptr.dtype.element_ty)
        b = tl.load(b_ptr + offs_k[:, None] * BLOCK_N + offs_n[None, :], mask=(offs_k < length)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(c_ptr + offs_m[:, None] * BLOCK_N + offs_n[None, :], acc.to(c_ptr.dtype.element_ty))


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, STEP: tl.constexpr):
    offs = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)) * STEP
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


GOOD = {
    "LATE_WHERE": False, "TRANS": False, "COMPUTED": False, "MAY_BE_EMPTY": False, "IN_UNIT": 8, "wide": 64,
    "num_warps": 4,
}  # fmt: skip
# what is planted -> (changes, targets, complaint); ptxas refuses to squeeze HGMMA's accumulators on sm_90
FAULTS: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "late where": ({"LATE_WHERE": True}, ("sm_80", "sm_90"), "narrow loads"),
    "a multiple of 8 that the kernel does not know of": ({"IN_UNIT": 1}, ("sm_80", "sm_90"), "narrow loads"),
    "tl.trans": ({"TRANS": True}, ("sm_80",), "not asynchronous"),
    "too few registers": ({"wide": 256, "maxnreg": 64}, ("sm_80",), "spills"),
    "a tile too large for its warps": ({"wide": 256, "num_warps": 2}, ("sm_80",), "spills"),
    "a computed left operand": ({"COMPUTED": True}, ("sm_90",), "left operands in registers"),
    "registers overwritten": ({"COMPUTED": True}, ("sm_90",), "overwrites registers"),
    "a loop that may have no step": ({"COMPUTED": True, "MAY_BE_EMPTY": True}, ("sm_90",), "serialised wgmma: C7515"),
    "too much shared memory": ({"num_stages": 8, "wide": 128, "num_warps": 8}, ("sm_86",), "shared memory"),
}


def _planted(changes: dict[str, Any], target: str) -> list[str]:
    options = {**GOOD, **changes}
    unit, wide = options.pop("IN_UNIT"), options.pop("wide")
    length = 4104  # 8 * 513

    def run() -> None:
        a, b, c = (torch.empty(4096, 4104, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        _product_kernel[(512,)](
            a, b, c, 60, length // unit, IN_UNIT=unit, BLOCK_M=64, BLOCK_N=wide, BLOCK_K=64, **options
        )

    ((launch, facts),) = aot.inspect(run, target)
    return rules.complaints(launch, facts)


@pytest.mark.parametrize("fault, target", [(name, target) for name, (_, on, _) in FAULTS.items() for target in on])
def test_planted_faults_are_seen(fault: str, target: str) -> None:
    changes, _, complaint = FAULTS[fault]
    problems = _planted(changes, target)
    assert any(complaint in text for text in problems), problems


@pytest.mark.parametrize("target", ("sm_80", "sm_86", "sm_90", "gfx942"))
def test_without_a_fault_nothing_is_said(target: str) -> None:
    assert not _planted({}, target)


@pytest.mark.parametrize("step, complaint", ((1, None), (3, "no 128-bit loads")))
def test_narrow_access_of_what_memory_bounds_is_seen(step: int, complaint: str | None) -> None:
    def run() -> None:
        x, y = (torch.empty(1 << 22, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        _copy_kernel[(4096,)](x, y, 1 << 22, BLOCK=1024, STEP=step)

    ((launch, facts),) = aot.inspect(run, "sm_90")
    assert rules.complaints(launch, facts) == ([complaint] if complaint else [])


def test_a_batch_that_is_specialised_for_is_seen() -> None:
    """Two batches of a kernel that lists its batch among what is not specialised share a compiled kernel."""

    def keys(kernel: Any) -> set[str]:
        with aot.recording("sm_90") as launches:
            for batch in (256, 17, 1):
                kernel[(1,)](torch.empty(8, device="cuda"), torch.empty(8, device="cuda"), batch, BLOCK=8, STEP=1)
        return {aot.specialisation(launch, "sm_90") for launch in launches}

    assert len(keys(_copy_kernel)) == 3
    assert len(keys(triton.jit(_copy_kernel.fn, do_not_specialize=["n"]))) == 1
