"""NVIDIA's machine code as ``cuobjdump -sass`` lists it: instructions, where they branch to, what they write."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import triton

_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.M)
# Instructions whose first general register is read: stores, barriers, predicates, what writes uniform registers only;
# and wgmma, which writes later, after those before it.
_READS_ONLY = (
    "ST", "RED", "LDGSTS", "LDGDEPBAR", "BAR", "DEPBAR", "WARPGROUP", "BRA", "BRX", "JMP", "JMX", "CALL", "RET", "EXIT",
    "ISETP", "FSETP", "HSETP", "DSETP", "PLOP3", "R2UR", "R2P", "NOP", "WARPSYNC", "SYNCS", "MEMBAR", "FENCE", "U",
    "BSSY", "BSYNC", "NANOSLEEP", "ERRBAR", "CCTL", "HGMMA",
)  # fmt: skip
_RESULT = re.compile(r"\s*(?:U?P[T\d]\s*,\s*)*R(\d+)")


class Instruction(NamedTuple):
    """One instruction: its address, predicate ('' without one), name with its suffixes, and operands."""

    address: int
    predicate: str
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """The address a branch goes to, or None."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.name.startswith("BRA") else None
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow."""
        leaves = self.name.startswith(("BRA", "EXIT", "RET", "BRX", "JMP", "JMX"))
        return not leaves or bool(self.predicate) or (self.name.startswith("BRA") and "P" in self.operands)

    def writes(self) -> range:
        """The general registers that it writes."""
        if self.name.startswith(_READS_ONLY):
            return range(0)
        found = _RESULT.match(self.operands)
        if found is None:
            return range(0)
        first = int(found[1])
        return range(first, first + self._registers_written())

    def _registers_written(self) -> int:
        if self.name.startswith(("LDSM", "MOVM")):
            return {".4": 4, ".2": 2}.get(self.name[-2:], 1)
        if self.name.startswith(("LD", "ATOM")):
            wide = re.search(r"\.(64|128)\b", self.name)
            return int(wide[1]) // 32 if wide else 1
        if self.name.startswith("HMMA"):
            return 2 if self.name.endswith(".F16") else 4
        if self.name.startswith("IMMA"):
            return 4
        if self.name.startswith("CS2R"):
            return 1 if ".32" in self.name else 2
        return 2 if ".WIDE" in self.name or self.name.startswith(("DADD", "DMUL", "DFMA", "F2F.F64", "I2F.F64")) else 1


def printed(content: bytes, *command: str) -> str:
    """What a tool prints about a file of this content."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        done = subprocess.run([*command, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def usage(compiled: Any) -> tuple[int, int]:
    """Registers and spilled bytes of a compiled kernel."""
    text = printed(compiled.asm["cubin"], os.path.join(_TOOLS, "cuobjdump"), "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text[:200]!r}")
    # STACK is where spills show; LOCAL stays 0
    return int(found[1]), int(found[2])


def listing(compiled: Any) -> list[Instruction]:
    """The instructions of a compiled kernel, in order."""
    return parse(printed(compiled.asm["cubin"], os.path.join(_TOOLS, "cuobjdump"), "-sass"))


def parse(listing: str) -> list[Instruction]:
    """The instructions of a listing, in order."""
    return [Instruction(int(m[1], 16), (m[2] or "").strip(), m[3], m[4].strip()) for m in _LINE.finditer(listing)]


def loops(code: Sequence[Instruction]) -> Iterator[list[Instruction]]:
    """The bodies of the loops: from the target of a backward branch to the branch. The endless one after the last exit
    is none."""
    for instruction in code:
        start = instruction.target
        if start is not None and start < instruction.address:
            yield [each for each in code if start <= each.address <= instruction.address]
