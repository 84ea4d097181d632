"""What a wgmma must not do on Hopper, read off a kernel's PTX and machine code.

wgmma runs beside the instructions that follow it until a wait covers it. Its right operand lies in shared memory, its
left one in shared memory or in registers, which must stay as they are that long. Triton 3.5 and 3.6 let the next step
of a loop write them (triton #9433, fixed in 3.7), and so does ptxas before 13.3 by itself (triton #11781): wrong
values, now and then. So a left operand in registers is one mistake, whatever the compiler made of it, where a wait
leaves wgmmas in flight; a write that the machine code really has is another.

ptxas gives up on overlapping them (advisories C7514 and C7515) where it sees accumulators written by anything else, a
loop that may have no step for one: every wgmma is then followed by a full wait.

None of the three shows in spills, loads or instruction names, nor to an executor of Triton's intermediate code.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Sequence

import triton

from perf.static import sass
from perf.static.sass import Instruction

_LEFT_IN_REGISTERS = re.compile(r"wgmma\.mma_async\S* \{[^}]*\}, ?\{[^}]*\}")
_WAIT = re.compile(r"wgmma\.wait_group\S* (\d+)")
_ADVISORY = re.compile(r"C751\d")
LEFT_REGISTERS = 4  # a thread's share of one wgmma's left operand, whatever its type
_OLDEST = 8  # more groups than any wait leaves in flight


@dataclasses.dataclass(frozen=True)
class Wgmma:
    """Of a kernel with wgmma: how many read their left operand from registers, the most groups that a wait leaves in
    flight, writes to registers that one in flight reads, and ptxas's advisories ('' if it lets them overlap)."""

    from_registers: int
    in_flight: int
    overwrites: int
    serialised: str

    def complaints(self) -> list[str]:
        """What is wrong."""
        found = []
        if self.overwrites:
            found.append(f"overwrites registers that a wgmma in flight reads, in {self.overwrites} places")
        if self.from_registers and self.in_flight:
            found.append(f"left operands in registers: {self.from_registers} wgmma, {self.in_flight} groups in flight")
        if self.serialised:
            found.append(f"serialised wgmma: {self.serialised}")
        return found


def inspect(ptx: str, code: Sequence[Instruction]) -> Wgmma | None:
    """What ``ptx`` and the machine code made of it say, or None for a kernel without wgmma."""
    if "wgmma.mma_async" not in ptx:
        return None
    waits = [int(wait) for wait in _WAIT.findall(ptx)]
    left = len(_LEFT_IN_REGISTERS.findall(ptx))
    return Wgmma(left, max(waits, default=0), len(overwrites(code)), advisories(ptx))


@functools.lru_cache(maxsize=4096)
def advisories(ptx: str) -> str:
    """The names of ptxas's advisories on wgmma for a kernel's PTX, '' without any. Runs the ptxas that Triton would."""
    command = (triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "-o", os.devnull)
    told = sass.printed(ptx.encode(), *command)
    return " ".join(sorted(set(_ADVISORY.findall(told))))


def overwrites(code: Sequence[Instruction]) -> list[Instruction]:
    """Instructions that write a register which a wgmma that may still be in flight reads as its left operand.

    A forward data flow over the code: for each wgmma how many groups have been committed since at the least.
    """
    at = {instruction.address: i for i, instruction in enumerate(code)}
    before: list[dict[int, int] | None] = [None] * len(code)
    waiting = [0] if code else []
    if code:
        before[0] = {}
    while waiting:
        i = waiting.pop()
        after = _step(code[i], i, before[i] or {})
        target = code[i].target
        following = [i + 1] if code[i].falls_through else []
        following += [at[target]] if target in at else []
        for j in following:
            if j < len(code) and (merged := _merge(before[j], after)) != before[j]:
                before[j] = merged
                waiting.append(j)
    left = {i: _left_operand(instruction) for i, instruction in enumerate(code)}
    return [
        instruction
        for instruction, flight in zip(code, before)
        if flight and any(r in left[i] for i in flight for r in instruction.writes())
    ]


def _step(instruction: Instruction, index: int, flight: dict[int, int]) -> dict[int, int]:
    """What is in flight after an instruction: the index of each wgmma -> groups committed since, its own included."""
    if instruction.name.startswith("WARPGROUP.DEPBAR"):
        found = re.search(r"0x([0-9a-f]+)", instruction.operands)
        pending = int(found[1], 16) if found else 0
        return {i: age for i, age in flight.items() if age <= pending}
    if not instruction.name.startswith("HGMMA"):
        return flight
    flight = {**flight, index: 0} if _left_operand(instruction) else flight
    if "gsb0" in instruction.operands:  # commits the group
        return {i: min(age + 1, _OLDEST) for i, age in flight.items()}
    return flight


def _merge(known: dict[int, int] | None, new: dict[int, int]) -> dict[int, int]:
    if known is None:
        return new
    return {i: min(known.get(i, _OLDEST), new.get(i, _OLDEST)) for i in known.keys() | new.keys()}


def _left_operand(instruction: Instruction) -> range:
    """The registers of a wgmma's left operand; empty where it lies in shared memory, and for other instructions."""
    if not instruction.name.startswith("HGMMA"):
        return range(0)
    found = re.match(r"R(\d+)", instruction.operands.split(",")[1].strip())
    return range(int(found[1]), int(found[1]) + LEFT_REGISTERS) if found else range(0)
