"""What compiled launches must fulfil, for any target, and the exceptions with their reasons.

Used by ``python -m perf static`` (the column ``complaints``) and by the aot gate, so that both say the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from perf.static import ttir
from perf.static.aot import Launch
from perf.static.facts import Facts
from tkernels.core import targets
from tkernels.core.targets import Target

# Warps a multiprocessor holds of a product's kernel.
FEWEST_WARPS = 8
# Bytes a multiprocessor has under way in a kernel bound by memory, and launches too small to be bound by it.
BYTES_IN_FLIGHT = 32 << 10
SMALL_TRAFFIC = 4 << 20
# Operations of a product that is over before a card is full.
SMALL_PRODUCT = 2e9
# Tensor-core instructions of four warps together, which read shared memory.
WARPGROUP = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}
# What a kernel is given of a channel count, and the factor that was taken out.
CHANNELS = (("group_in", "IN_UNIT"), ("group_out", "OUT_UNIT"), ("channels_in", "IN_UNIT"),
            ("channels_out", "OUT_UNIT"))  # fmt: skip


class Excused(NamedTuple):
    """A complaint that begins with ``complaint`` about kernels whose names begin with ``kernel``, launched with the
    arguments ``given``, and why it stands."""

    kernel: str
    complaint: str
    reason: str
    given: Mapping[str, Any] = {}


_OWN_LAYOUT = "writes a weight's own layout, its reads go along"
_OF_QUERIES = "masks, and vectors of a step's queries: log-sum-exps and sums of the gradient"
_MAY_BE_EMPTY = (
    "either of its loops may have no step, so that none can be assumed; of all variants ptxas minds this one"
)
EXCEPTIONS = (
    Excused(
        "conv_pack", "no 128-bit loads", "transposes a contiguous weight; channels_last ones are copied as they lie"
    ),
    Excused("conv_merge", "no 128-bit loads", _OWN_LAYOUT),
    Excused("merge_pair", "no 128-bit loads", _OWN_LAYOUT),
    Excused("pack_pair", "no 128-bit loads", "transposes a contiguous weight"),
    Excused("conv_depthwise", "keeps", "neighbouring windows share their loads, which the caches serve"),
    Excused("pointwise_", "narrow loads", "batch norm's vectors of a step's channels, loaded in the prologue"),
    Excused("attention_", "narrow loads", _OF_QUERIES),
    Excused("attention_", "waiting loads", f"{_OF_QUERIES}; they go through registers"),
    Excused("attention_forward", "serialised wgmma: C7515", _MAY_BE_EMPTY, {"BOOLEAN": True, "BLOCK_D": 64}),
)


def complaints(launch: Launch, facts: Facts) -> list[str]:
    """What is wrong with one compiled launch, exceptions left out."""
    target = targets.TARGETS[facts.target]
    found = [*_resources(facts, target), *(facts.wgmma.complaints() if facts.wgmma is not None else ())]
    found += _product(launch, facts, target) if facts.has_dot else _memory_bound(launch, facts, target)
    return [text for text in found if not any(_excuses(each, text, facts.kernel, launch) for each in EXCEPTIONS)]


def _excuses(exception: Excused, complaint: str, kernel: str, launch: Launch) -> bool:
    if not (kernel.startswith(exception.kernel) and complaint.startswith(exception.complaint)):
        return False
    given = launch.arguments
    return all(given[name] == value for name, value in exception.given.items())


def resident(registers: int, shared_bytes: int, num_warps: int, target: Target) -> int:
    """Estimated programs that a multiprocessor holds at once, from registers, shared memory and limits."""
    # registers are handed out by the warp, in units of 256 (NVIDIA) or 8 a lane (AMD)
    unit = 256 if target.is_nvidia else 8 * target.warp_size
    of_warp = -(-max(registers, 1) * target.warp_size // unit) * unit
    # NVIDIA's driver keeps a KiB of shared memory a program
    of_program = shared_bytes + (1024 if target.is_nvidia else 0)
    return min(
        target.registers_mp // (of_warp * num_warps),
        target.shared_memory_mp // of_program if of_program else target.max_programs_mp,
        target.max_warps_mp // num_warps,
        target.max_programs_mp,
    )


def occupancy(registers: int, shared_bytes: int, num_warps: int, target: Target) -> float:
    """The same as a share of a multiprocessor's warps."""
    return resident(registers, shared_bytes, num_warps, target) * num_warps / target.max_warps_mp


def _resident_warps(facts: Facts, target: Target) -> float:
    return occupancy(facts.registers, facts.shared_bytes, facts.num_warps, target) * target.max_warps_mp


def _resources(facts: Facts, target: Target) -> list[str]:
    found = []
    if facts.spill_bytes:
        found.append(f"spills {facts.spill_bytes} bytes")
    if facts.shared_bytes > target.shared_memory:
        found.append(f"needs {facts.shared_bytes} bytes of shared memory of {target.shared_memory}")
    return found


def _product(launch: Launch, facts: Facts, target: Target) -> list[str]:
    rows, _cols = ttir.tile(facts.ttir)
    found = []
    warps = _resident_warps(facts, target)
    if warps < FEWEST_WARPS:
        found.append(f"{warps:.0f} warps a multiprocessor")
    if math.prod(launch.grid) < target.multiprocessors // 2 and launch.grid[1] == 1:
        operations = sum(ttir.products(facts.ttir, launch.arguments, launch.grid).values())
        if operations > SMALL_PRODUCT:
            found.append(f"{math.prod(launch.grid)} programs for {target.multiprocessors} multiprocessors, not split")
    return [*found, *_operands(launch, facts, target, rows)] if sixteen_bit(launch) else found


def _operands(launch: Launch, facts: Facts, target: Target, rows: int) -> list[str]:
    """How a 16-bit product of a tile with so many rows is computed and fed."""
    found = []
    if facts.tensor_core is None:
        found.append("no tensor-core instruction")
    elif rows >= 64 and target.name in WARPGROUP and facts.tensor_core != WARPGROUP[target.name]:
        found.append(f"{facts.tensor_core} in place of {WARPGROUP[target.name]}")
    if aligned(launch.arguments):
        wide, narrow = facts.loop_wide_loads, facts.loop_narrow_loads
        if not wide or narrow:
            found.append(f"narrow loads: {narrow} beside {wide} wide ones in the loop")
        if target.is_nvidia and facts.waiting_loads:
            found.append(f"waiting loads: {facts.waiting_loads} in the loop are not asynchronous")
    return found


def sixteen_bit(launch: Launch) -> bool:
    """Whether a product's operands are bfloat16 or float16."""
    first = launch.arguments[launch.kernel.arg_names[0]]
    first = getattr(first, "base", first)  # a descriptor's tensor
    return str(first.dtype).endswith(("bf16", "fp16", "bfloat16", "float16"))


def aligned(given: Mapping[str, Any]) -> bool:
    """Whether rows start at 16-byte boundaries, as far as the kernel knows: not the RGB stem's gather, nor channels or
    features that are no multiple of 8."""
    if given.get("FLAT") or given.get("PADDED"):
        return False
    if "UNIT" in given:
        return bool(given["UNIT"] == 8)
    counts = [given[count] * given[unit] for count, unit in CHANNELS if count in given]
    return all(count % 8 == 0 for count in counts)


def _starts_anywhere(launch: Launch) -> bool:
    """Whether a pass reads rows that do not start at 16-byte boundaries: NCHW maps pixel by pixel, and rows (or planes)
    whose length is no multiple of 16 bytes."""
    given = launch.arguments
    return bool(given.get("NCHW")) or given.get("UNIT", 8) < (8 if sixteen_bit(launch) else 4)


def _memory_bound(launch: Launch, facts: Facts, target: Target) -> list[str]:
    if sum(launch.bytes.values()) < SMALL_TRAFFIC or _starts_anywhere(launch):
        return []
    if not facts.loads_128:
        return ["no 128-bit loads"]
    warps = _resident_warps(facts, target)
    in_flight = int(warps * target.warp_size * facts.loads_128 * 16)
    return [f"keeps {in_flight} bytes in flight"] if in_flight < BYTES_IN_FLIGHT else []
