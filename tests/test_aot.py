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

import perf.cases
from perf import aot
from tkernels import targets

pytestmark = pytest.mark.gate("aot")

# TK_AOT=all compiles every case for every target there is (a quarter of an hour on 2 cores); by default float32 cases,
# whose tiles depend little on the target, are compiled for the one with the fewest registers to spare
EVERYTHING = os.environ.get("TK_AOT") == "all"
TARGETS = tuple(targets.TARGETS) if EVERYTHING else ("sm_80", "sm_90", "sm_100", "gfx942")
FLOAT32_TARGETS = TARGETS if EVERYTHING else ("sm_80",)


# Cases that are no part of the CIFAR network's training or evaluation: compiled by make test-extended
BEYOND_THE_NETWORK = (
    "gelu", "NCHW", "residual", "48x7x7", "40x2x2", "3x32x32", "overlap", "1024->", "1000->", "hundred", "imagenet",
    "vocabulary", "few rows", "segmentation", "stride 2", "depthwise", "mask", "smoothed", "pointwise",
    "matmul", "attention",
)  # fmt: skip


def _cases() -> Iterator[Any]:
    for _, module, _ in pkgutil.iter_modules(perf.cases.__path__):
        for case in importlib.import_module(f"perf.cases.{module}").cases():
            for target in FLOAT32_TARGETS if "fp32" in case.name or "float32" in case.name else TARGETS:
                beyond = any(word in case.name for word in BEYOND_THE_NETWORK)
                marks = [pytest.mark.extended("aot")] if beyond else []
                yield pytest.param(case, target, id=f"{module}-{case.name}-{target}", marks=marks)


def complaints(facts: aot.Facts, product: bool) -> list[str]:
    """What is wrong with one compiled launch."""
    found = []
    limit = targets.TARGETS[facts.target].shared_memory
    if facts.spill_bytes:
        found.append(f"spills {facts.spill_bytes} bytes")
    if facts.shared_bytes > limit:
        found.append(f"needs {facts.shared_bytes} bytes of shared memory of {limit}")
    if product and facts.has_dot:
        if facts.tensor_core is None:
            found.append("has no tensor-core instruction")
        elif not facts.wide_loads() or facts.narrow_loads():
            found.append(f"has {facts.wide_loads()} wide and {facts.narrow_loads()} narrow loads in its loop")
    return [f"{facts.kernel} on {facts.target} {text}" for text in found]


@pytest.mark.parametrize("case, target", list(_cases()))
def test_compiles_clean(case: aot.Case, target: str) -> None:
    reason = case.reason_to_skip(target)
    if reason is not None:
        pytest.skip(f"left to PyTorch: {reason}")
    compiled = aot.inspect(case.run, target, only_products=True)
    assert compiled, "the case launched nothing"
    if case.product:
        assert any(facts.has_dot for facts in compiled), "the case says product, but no launch has a dot"
    problems = [text for facts in compiled for text in complaints(facts, case.product)]
    assert not problems, "\n".join(problems)


@triton.jit
def _gather_product_kernel(
    a_ptr, b_ptr, c_ptr, n_rows, n_inner, BLOCK: tl.constexpr, LATE_WHERE: tl.constexpr, WIDE: tl.constexpr
):
    offs = tl.arange(0, BLOCK)
    wide = tl.arange(0, WIDE)
    acc = tl.zeros((BLOCK, WIDE), tl.float32)
    for k in range(0, n_inner, BLOCK):
        inside = offs < n_rows
        if LATE_WHERE:
            a_offs = tl.where(inside[:, None], offs[:, None].to(tl.int64) * n_inner + (k + offs)[None, :], 0)
        else:
            a_offs = tl.where(inside, offs, 0)[:, None].to(tl.int64) * n_inner + (k + offs)[None, :]
        a = tl.load(a_ptr + a_offs, mask=inside[:, None], other=0.0)
        b = tl.load(b_ptr + (k + offs)[:, None] * WIDE + wide[None, :])
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(c_ptr + offs[:, None] * WIDE + wide[None, :], acc.to(c_ptr.dtype.element_ty))


# ptxas refuses to squeeze HGMMA's accumulators on sm_90 instead of spilling them
@pytest.mark.parametrize(
    "fault, target",
    ((None, "sm_80"), (None, "sm_90"), ("late where", "sm_80"), ("late where", "sm_90"), ("spill", "sm_80")),
)
def test_planted_faults_are_seen(fault: str | None, target: str) -> None:
    wide = 256 if fault == "spill" else 64

    def run() -> None:
        a = torch.empty(64, 4096, device="cuda", dtype=torch.bfloat16)
        b = torch.empty(4096, wide, device="cuda", dtype=torch.bfloat16)
        c = torch.empty(64, wide, device="cuda", dtype=torch.bfloat16)
        options = {"maxnreg": 64, "num_warps": 4} if fault == "spill" else {"num_warps": 4}
        _gather_product_kernel[(1,)](a, b, c, 60, 4096, 64, LATE_WHERE=fault == "late where", WIDE=wide, **options)

    (facts,) = aot.inspect(run, target)
    expected = {None: None, "late where": "narrow loads", "spill": "spills"}[fault]
    problems = complaints(facts, product=True)
    assert (not problems) if expected is None else any(expected in text for text in problems), problems
