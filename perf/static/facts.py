"""What a compiled kernel's machine code says: registers, spills, shared memory, which instructions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from perf.static import hopper, sass
from tkernels.core.targets import Target

TENSOR_CORE = ("HGMMA", "UTCHMMA", "HMMA", "v_mfma", "v_wmma")
# from and to global memory, asynchronous copies among them (LDGDEPBAR only closes a group of them)
_LOAD = re.compile(r"LDG(?!DEPBAR)|UTMALDG|global_load|buffer_load")
_STORE = re.compile(r"STG|UTMASTG|global_store|buffer_store")
_WAITING_LOAD = re.compile(r"LDG(?!STS|DEP)")
# of 128 bits a thread
_WIDE = re.compile(r"UTMALDG|UTMASTG|.*(\.128|dwordx4$|b128$)")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the machine code of one launch says. ``loop_...``: of the innermost loop with tensor-core instructions;
    ``waiting_loads``: those of NVIDIA's there that are no asynchronous copies. ``tensor_core``: the mnemonic of what
    the kernel uses, None without any; ``wgmma``: how Hopper's kernels use theirs."""

    kernel: str
    target: str
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core: str | None
    tensor_core_instructions: int
    loads_128: int
    stores_128: int
    loop_wide_loads: int
    loop_narrow_loads: int
    waiting_loads: int
    wgmma: hopper.Wgmma | None
    ttir: str = dataclasses.field(repr=False)

    @property
    def has_dot(self) -> bool:
        return "tt.dot" in self.ttir


def read(kernel: str, compiled: Any, target: Target) -> Facts:
    """The facts of what Triton compiled for a target."""
    wgmma = None
    if target.is_nvidia:
        (registers, spill_bytes), code = sass.usage(compiled), sass.listing(compiled)
        names = [each.name for each in code]
        loops = [[each.name for each in loop] for loop in sass.loops(code)]
        if target.name == "sm_90":
            wgmma = hopper.inspect(compiled.asm["ptx"], code)
    else:
        (registers, spill_bytes), names, loops = _amd(compiled.asm["amdgcn"])
    products = [op for op in names if op.startswith(TENSOR_CORE)]
    loops = sorted((loop for loop in loops if any(op.startswith(TENSOR_CORE) for op in loop)), key=len)
    loop = loops[0] if loops else []
    loop_loads, loop_wide_loads = _count(loop, _LOAD), _count(loop, _LOAD, _WIDE)
    return Facts(
        kernel=kernel,
        target=target.name,
        num_warps=compiled.metadata.num_warps,
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=compiled.metadata.shared,
        tensor_core=next((t for t in TENSOR_CORE if any(op.startswith(t) for op in products)), None),
        tensor_core_instructions=len(products),
        loads_128=_count(names, _LOAD, _WIDE),
        stores_128=_count(names, _STORE, _WIDE),
        loop_wide_loads=loop_wide_loads,
        loop_narrow_loads=loop_loads - loop_wide_loads,
        waiting_loads=_count(loop, _WAITING_LOAD),
        wgmma=wgmma,
        ttir=compiled.asm["ttir"],
    )


def _count(names: Sequence[str], *kinds: re.Pattern[str]) -> int:
    """How many instructions are of all these kinds."""
    return sum(all(kind.match(name) for kind in kinds) for name in names)


def _amd(listing: str) -> tuple[tuple[int, int], list[str], list[list[str]]]:
    """Registers and spilled bytes, the instructions, and those of each loop."""

    def fact(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", listing)
        if found is None:
            raise RuntimeError(f"the listing has no .{name}")
        return int(found[1])

    labels: dict[str, int] = {}
    ops: list[str] = []
    loops = []
    for label, op, operands in re.findall(r"^(?:(\.LBB\w+):|[ \t]+([a-z]\w+)[ \t]*(\S*))", listing, re.M):
        if label:
            labels[label] = len(ops)
            continue
        ops.append(op)
        if op.startswith(("s_cbranch", "s_branch")) and operands in labels:
            loops.append(ops[labels[operands] :])
    # scalar registers spill to lanes of vector registers, which are no memory: scratch is
    spills = max(4 * fact("vgpr_spill_count"), fact("private_segment_fixed_size"))
    return (fact("vgpr_count"), spills), ops, loops
