"""Products by descriptors on Hopper: what is copied goes from global memory to wgmma without passing registers."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from perf.static import aot, rules, sass
from perf.static.cases import descriptors as cases
from tkernels.core.descriptors import describe
from tkernels.core.launch import launch

pytestmark = pytest.mark.gate("aot")

COPIES = re.compile(r"UTMALDG|UTMASTG|LDGSTS|LDSM|HGMMA")


def copies(found: aot.Launch) -> Counter[str]:
    code = sass.listing(aot.compiled(found, "sm_90"))
    return Counter(match[0] for match in (COPIES.match(each.name) for each in code) if match)


@pytest.mark.parametrize("name", ("linear relu", "matmul ab", "conv 64-64@56 bf16 relu", "conv 256-256@14 bf16 relu"))
def test_operands_stay_in_shared_memory(name: str) -> None:
    (case,) = (each for each in cases.cases() if each.name == f"{name} by descriptors")
    ((found, facts),) = aot.inspect(case.run, "sm_90")
    seen = copies(found)
    assert seen["UTMALDG"] >= 6, "two operands of three stages"
    assert seen["UTMASTG"] == 1
    assert seen["HGMMA"] >= 4
    assert not seen["LDSM"]
    assert not seen["LDGSTS"]
    assert not rules.complaints(found, facts)


@triton.jit
def _left_operand_kernel(x_desc, w_desc, y_desc, steps, BLOCK_N: tl.constexpr):
    acc = tl.zeros((128, BLOCK_N), tl.float32)
    tl.assume(steps > 0)
    for step in range(steps):
        x = x_desc.load([0, 0, 0, step * 64]).reshape(128, 64)
        acc = tl.dot(x, w_desc.load([0, step * 64]).T, acc)
    y_desc.store([0, 0, 0, 0], acc.to(y_desc.dtype).reshape(1, 8, 16, BLOCK_N))


def test_a_reshaped_left_operand_passes_registers() -> None:
    """Why a convolution by descriptors is the transposed product."""

    def run() -> None:
        x, y = (torch.empty(8, 16, 16, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        w = torch.empty(128, 128, device="cuda", dtype=torch.bfloat16)
        maps: list[Any] = [describe(t, t.shape, t.stride(), (1, 8, 16, block)) for t, block in ((x, 64), (y, 128))]
        launch(_left_operand_kernel, (1,), maps[0], describe(w, w.shape, w.stride(), (128, 64)), maps[1], 2,
               BLOCK_N=128, num_warps=8, num_stages=3)  # fmt: skip

    ((found, facts),) = aot.inspect(run, "sm_90")
    assert copies(found)["LDSM"]
    assert facts.wgmma is not None
    assert facts.wgmma.from_registers
