"""What a compiled kernel's machine code says: registers, spills, shared memory, which instructions."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable
from typing import Any

from perf.static import hopper, sass
from tkernels.core.targets import Target

TENSOR_CORE = ("HGMMA", "UTCHMMA", "HMMA", "v_mfma", "v_wmma")
_STORES = ("STG", "UTMASTG", "global_store", "buffer_store")

# how often each instruction occurs, by its mnemonic with its suffixes
Mix = collections.Counter[str]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the machine code of one launch says. ``mix``: instructions of the whole kernel; ``loop``: of the innermost
    loop with tensor-core instructions (empty without one). ``wgmma``: how Hopper's kernels use theirs, None without
    any. Loads and stores are those from and to global memory, asynchronous copies among them."""

    kernel: str
    target: str
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    mix: Mix
    loop: Mix
    ttir: str = dataclasses.field(repr=False)
    wgmma: hopper.Wgmma | None = None

    @property
    def has_dot(self) -> bool:
        return "tt.dot" in self.ttir

    @property
    def tensor_core(self) -> str | None:
        """The tensor-core mnemonic the kernel uses, or None."""
        return next((t for t in TENSOR_CORE if any(op.startswith(t) for op in self.mix)), None)

    @property
    def tensor_core_instructions(self) -> int:
        return _count(self.mix, lambda op: op.startswith(TENSOR_CORE))

    @property
    def loads_128(self) -> int:
        return _count(self.mix, lambda op: _is_load(op) and _is_wide(op))

    @property
    def stores_128(self) -> int:
        return _count(self.mix, lambda op: op.startswith(_STORES) and _is_wide(op))

    @property
    def loop_wide_loads(self) -> int:
        return _count(self.loop, lambda op: _is_load(op) and _is_wide(op))

    @property
    def loop_narrow_loads(self) -> int:
        return _count(self.loop, lambda op: _is_load(op) and not _is_wide(op))

    @property
    def waiting_loads(self) -> int:
        """Loads in NVIDIA's product loop that are no asynchronous copies."""
        return _count(self.loop, lambda op: op.startswith("LDG") and not op.startswith(("LDGSTS", "LDGDEP")))


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
    products = sorted((loop for loop in loops if any(op.startswith(TENSOR_CORE) for op in loop)), key=len)
    return Facts(
        kernel, target.name, compiled.metadata.num_warps, registers, spill_bytes,
        compiled.metadata.shared, Mix(names), Mix(products[0] if products else ()), compiled.asm["ttir"], wgmma,
    )  # fmt: skip


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


def _count(mix: Mix, counts: Callable[[str], bool]) -> int:
    return sum(n for op, n in mix.items() if counts(op))


def _is_load(op: str) -> bool:
    # LDGDEPBAR only closes a group of asynchronous copies
    return op.startswith(("LDG", "UTMALDG", "global_load", "buffer_load")) and not op.startswith("LDGDEPBAR")


def _is_wide(op: str) -> bool:
    """Whether an instruction moves 128 bits a thread."""
    return op.startswith(("UTMALDG", "UTMASTG")) or ".128" in op or op.endswith(("dwordx4", "b128"))
