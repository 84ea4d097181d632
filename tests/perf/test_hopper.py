"""What perf/static/hopper.py reads off PTX and machine code that is really compiled; tests/aot has its complaints."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from perf.static import aot, hopper, sass
from perf.static.sass import Instruction

pytestmark = pytest.mark.gate("aot")


@triton.jit
def _exponential_product_kernel(a_ptr, b_ptr, c_ptr, k_steps, LEFT: tl.constexpr, BLOCK: tl.constexpr):
    """c = exp(a) @ b of [BLOCK, k_steps * BLOCK] by [k_steps * BLOCK, BLOCK], or b^T @ exp(a)^T if not LEFT."""
    rows = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    tl.assume(k_steps > 0)
    for step in range(k_steps):
        cols = step * BLOCK + tl.arange(0, BLOCK)
        a = tl.load(a_ptr + rows[:, None] * (k_steps * 16) + cols[None, :])
        b = tl.load(b_ptr + cols[:, None] * BLOCK + rows[None, :])
        a = tl.exp(a.to(tl.float32)).to(b.dtype)
        acc = tl.dot(a, b, acc) if LEFT else tl.dot(tl.trans(b), tl.trans(a), acc)
    tl.store(c_ptr + rows[:, None] * BLOCK + rows[None, :], acc.to(tl.bfloat16))


def _compiled(left: bool, target: str = "sm_90") -> tuple[str, list[Instruction]]:
    """PTX and code."""

    def run() -> None:
        a, b, c = (torch.empty(4096, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        _exponential_product_kernel[(1,)](a, b, c, 48, LEFT=left, BLOCK=64, num_stages=3)

    with aot.recording(target) as launches:
        run()
    compiled = aot.compiled(launches[0], target)
    return compiled.asm["ptx"], sass.listing(compiled)


def _left_registers(code: list[Instruction]) -> list[int]:
    """The first register of the left operand of each wgmma that has it in registers."""
    operands = [each.operands.split(",")[1].strip() for each in code if each.name.startswith("HGMMA")]
    return [int(operand[1:]) for operand in operands if re.fullmatch(r"R\d+", operand)]


def test_every_wgmma_is_found_in_the_code() -> None:
    for left in (False, True):
        ptx, code = _compiled(left)
        in_ptx = len(re.findall(r"^\s*wgmma\.mma_async", ptx, re.M))
        assert in_ptx == 4
        assert sum(each.name.startswith("HGMMA") for each in code) == in_ptx
        found = hopper.inspect(ptx, code)
        assert found is not None
        assert found.from_registers == len(_left_registers(code)) == (4 if left else 0)
        assert any(each.name.startswith("HGMMA") for loop in sass.loops(code) for each in loop)


def test_a_right_operand_may_be_computed() -> None:
    found = hopper.inspect(*_compiled(left=False))
    assert found is not None
    assert not found.complaints()


def test_a_computed_left_operand_is_seen() -> None:
    """Triton 3.6 and 3.8 both leave it in registers with wgmmas in flight."""
    found = hopper.inspect(*_compiled(left=True))
    assert found is not None
    assert found.in_flight > 0
    assert any(text.startswith("left operands in registers: 4 wgmma") for text in found.complaints())


def _moved(register: int) -> Instruction:
    return Instruction(-16, "", "MOV", f"R{register}, RZ")


def test_a_write_before_the_wait_is_seen_and_one_after_it_is_not() -> None:
    """Planted into machine code as it is: behind the last wgmma, and behind a wait for all."""
    _, code = _compiled(left=True)
    clean = [each for each in code if each not in hopper.overwrites(code)]
    last = max(i for i, each in enumerate(clean) if each.name.startswith("HGMMA"))
    waits = [i for i, each in enumerate(clean) if each.name.startswith("WARPGROUP.DEPBAR") and "0x0" in each.operands]
    full_wait = next(i for i in waits if i > last)
    for register in (_left_registers(clean)[-1] + offset for offset in range(hopper.LEFT_REGISTERS)):
        moved = _moved(register)
        assert hopper.overwrites([*clean[: last + 1], moved, *clean[last + 1 :]]) == [moved]
        assert hopper.overwrites([*clean[: full_wait + 1], moved, *clean[full_wait + 1 :]]) == []
    elsewhere = _moved(_left_registers(clean)[-1] + hopper.LEFT_REGISTERS + 200)
    assert hopper.overwrites([*clean[: last + 1], elsewhere, *clean[last + 1 :]]) == []


LOOP = """
        /*0000*/                   CS2R R24, SRZ ;                /* 0x0 */
        /*0010*/                   LDSM.16.M88.4 R4, [R3] ;       /* 0x0 */
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR8], R24, gsb0 ;   /* 0x0 */
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, {pending} ;  /* 0x0 */
        /*0040*/              @P1  BRA 0x10 ;                     /* 0x0 */
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ; /* 0x0 */
        /*0060*/                   IMAD.WIDE.U32 R8, R2, R3, R4 ; /* 0x0 */
        /*0070*/                   EXIT ;                         /* 0x0 */
        /*0080*/                   BRA 0x80;                      /* 0x0 */
"""


@pytest.mark.parametrize(
    "pending, load, found",
    (
        ("0x1", "R8", ["LDSM.16.M88.4"]),  # the next turn's load, over the back edge
        ("0x1", "R5", ["LDSM.16.M88.4"]),  # its last register is the operand's first
        ("0x1", "R12", []),
        ("0x1", "R4", []),
        ("0x0", "R8", []),
    ),
)
def test_the_next_turn_of_a_loop_counts(pending: str, load: str, found: list[str]) -> None:
    code = sass.parse(LOOP.replace("{pending}", pending).replace("LDSM.16.M88.4 R4", f"LDSM.16.M88.4 {load}"))
    assert len(code) == 9
    assert [each.name for each in hopper.overwrites(code)] == found
    assert [len(loop) for loop in sass.loops(code)] == [4]


@pytest.mark.parametrize(
    "name, operands, registers",
    (
        ("LDS.128", "R4, [R8]", range(4, 8)),
        ("LDG.E.64.CONSTANT", "R4, desc[UR6][R8.64]", range(4, 6)),
        ("LDG.E.U16", "R4, desc[UR6][R8.64]", range(4, 5)),
        ("LDSM.16.MT88.2", "R4, [R8]", range(4, 6)),
        ("IMAD.WIDE", "R4, R5, R6, R8", range(4, 6)),
        ("SHFL.BFLY", "PT, R4, R5, 0x1, 0x1f", range(4, 5)),
        ("IADD3", "R4, P0, R5, R6, RZ", range(4, 5)),
        ("CS2R", "R4, SRZ", range(4, 6)),
        ("STS.128", "[R8], R4", range(0)),
        ("ISETP.GE.AND", "P0, PT, R4, R5, PT", range(0)),
        ("LDGSTS.E.BYPASS.128", "[R4], desc[UR6][R8.64]", range(0)),
        ("R2UR", "UR4, R5", range(0)),
        ("UMOV", "UR4, 0x1", range(0)),
    ),
)
def test_registers_written(name: str, operands: str, registers: range) -> None:
    assert list(Instruction(0, "", name, operands).writes()) == list(registers)


def test_other_targets_have_no_wgmma() -> None:
    found: list[Any] = [aot.inspect(lambda: _launch_plain(), target)[0][1].wgmma for target in ("sm_80", "sm_100")]
    assert found == [None, None]


def _launch_plain() -> None:
    a, b, c = (torch.empty(4096, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    _exponential_product_kernel[(1,)](a, b, c, 48, LEFT=False, BLOCK=64, num_stages=3)
