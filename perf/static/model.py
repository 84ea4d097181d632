"""How long a launch takes on an H100, by formula: the column ``estimated_ms`` of the static report. An estimate.

A multiprocessor runs as many programs at once as fit, and each takes its share of the largest of three times:

- arithmetic: what the products do, at the peak rate of the target's sheet and the clock which that rate means;
- operands: every tile loaded in the loop of a product (per tap, per step, second maps too) comes from the L2 cache, for
  asynchronous copies pass the L1 cache by: L2_BYTES_CLOCK;
- operands gathered element by element, whose addresses are the work: GATHERED elements a clock.

Programs that do not fit wait for a wave of their own; in a last, partial wave the busiest multiprocessor decides. A
wave begins with an empty pipeline and ends with stores, which adds WAVE_US, and a launch adds LAUNCH_US. No launch is
faster than its tensor arguments, each once, at MEMORY of the sheet's bandwidth.

The formula, FLOPS_CLOCK, L2_BYTES_CLOCK and MEMORY are of a review of these kernels made before they ran on a GPU, from
public figures of other kernels. LAUNCH_US is a fair guess. Fitted to an H100's timings were WAVE_US, GATHERED and
REPLAY_US, which only the comparison with such timings adds. perf/RESULTS.md has the errors. Not in it: what else a
program issues (addresses, masks, a softmax: attention is not estimated well), wgmma in series, spills.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from perf.static import rules
from perf.static.aot import Launch
from perf.static.facts import Facts
from tkernels.core.targets import Target

# The targets that the constants are for.
MODELLED = ("sm_90",)
# 16-bit operations a clock of a multiprocessor.
FLOPS_CLOCK = 4096
# Bytes a clock of a multiprocessor from the L2 cache, sustained.
L2_BYTES_CLOCK = 30
# Elements a clock of a multiprocessor by loads narrower than 16 bytes a thread.
GATHERED = 1.2
# Of the sheet's bandwidth.
MEMORY = 0.9
LAUNCH_US, WAVE_US = 2.0, 1.0
# A replay of a graph that holds next to nothing, beside its launches.
REPLAY_US = 4.0
# What large products of a vendor's library reach of the sheet's rate.
VENDOR = 0.6

_LOC = re.compile(r"\s+loc\(.*$")
_LOAD = re.compile(r"(?:tt\.load .*: tensor<([\dx]+)x!tt\.ptr|tt\.descriptor_load .*-> tensor<([\dx]+)x)<?[a-z]*(\d+)")
_DOT = re.compile(r"tt\.dot .*: tensor<([\dx]+)x\w+> \* tensor<[\dx]*?(\d+)x[a-z]\w+>")


class Loops(NamedTuple):
    """What one pass through the loops with products does: bytes loaded, operations; how many ``bodies`` they are."""

    bytes: int
    operations: int
    bodies: int


class Estimate(NamedTuple):
    """``resident``: programs a multiprocessor holds; ``fit``: the target; ``waves``: the grid over that.
    ``l2_bytes_clock``: what operands would need of the L2 cache at the peak rate, None without a product.
    ``milliseconds``: None on a target that the model is not for. ``operations``: of its products."""

    resident: int
    fit: int
    waves: float
    l2_bytes_clock: float | None
    milliseconds: float | None
    operations: float


def rates(target: Target) -> dict[str, float]:
    """Peak rates in 10^12 operations a second, by the kind of a product's operands."""
    return {"16-bit": target.tflops, "tf32": target.tflops / 2, "ieee": target.tflops_fp32}


def loops(ttir: str) -> Loops:
    """Read off a listing. What is outside of every loop counts as a loop of one pass if a product is there."""
    region, found = [[0, 0]], Loops(0, 0, 0)  # of each open region: bytes, operations
    repeats = [True]
    for line in ttir[ttir.index("tt.func") :].splitlines()[1:]:
        text = _LOC.sub("", line).strip()
        if text.startswith("}"):
            (loaded, operations), is_loop = region.pop(), repeats.pop()
            if is_loop and operations:
                found = Loops(found.bytes + loaded, found.operations + operations, found.bodies + 1)
            elif region and not is_loop:
                region[-1] = [region[-1][0] + loaded, region[-1][1] + operations]
            if not region:
                break
        if load := _LOAD.search(text):
            sizes = (load[1] or load[2]).split("x")
            region[-1][0] += math.prod(map(int, sizes)) * max(int(load[3]) // 8, 1)
        elif dot := _DOT.search(text):
            region[-1][1] += 2 * math.prod(map(int, dot[1].split("x"))) * int(dot[2])
        if text.endswith("{"):
            region.append([0, 0])
            repeats.append("scf.for" in text or "scf.while" in text)
    return found


def estimate(launch: Launch, facts: Facts, products: dict[str, float], target: Target) -> Estimate:
    """Of a compiled launch whose products do so many operations, by their kinds."""
    # one that does not fit would not be launched
    resident = max(rules.resident(facts.registers, facts.shared_bytes, facts.num_warps, target), 1)
    fit, programs = resident * target.multiprocessors, tiles(launch)
    waves, operations = programs / fit, sum(products.values())
    if target.name not in MODELLED:
        return Estimate(resident, fit, waves, None, None, operations)
    moved, l2_bytes_clock, clocks = sum(launch.bytes.values()), None, 0.0
    clock = target.tflops * 1e6 / target.multiprocessors / FLOPS_CLOCK  # a microsecond
    if operations:
        seen, rate = loops(facts.ttir), rates(target)
        loaded = operations * seen.bytes / seen.operations
        arithmetic = sum(count / FLOPS_CLOCK * target.tflops / rate[kind] for kind, count in products.items())
        passes = operations * seen.bodies / seen.operations
        gathered = passes * facts.loop_narrow_loads * facts.num_warps * target.warp_size
        l2_bytes_clock = loaded / arithmetic
        clocks = busy(programs, resident, target.multiprocessors, arithmetic, loaded, gathered)
    by_memory = moved / (MEMORY * target.gbps * 1e3)
    microseconds = LAUNCH_US + math.ceil(waves) * WAVE_US * bool(operations) + max(by_memory, clocks / clock)
    return Estimate(resident, fit, waves, l2_bytes_clock, microseconds / 1e3, operations)


def tiles(launch: Launch) -> int:
    """Programs, or, where each takes several tiles one after another (kernels_tma.py), tiles."""
    given = launch.arguments
    persistent = "tiles_m" in given and "tiles_n" in given
    return int(given["tiles_m"] * given["tiles_n"]) if persistent else math.prod(launch.grid)


def busy(
    programs: int, resident: int, multiprocessors: int, arithmetic: float, loaded: float, gathered: float
) -> float:
    """Clocks that all programs take. ``arithmetic``: clocks of one multiprocessor at the peak rate, ``loaded``: bytes,
    ``gathered``: elements; sums over the programs, which have equal shares."""
    one = max(arithmetic, loaded / L2_BYTES_CLOCK, gathered / GATHERED) / programs
    full, rest = divmod(programs, resident * multiprocessors)
    return (full * resident + math.ceil(rest / multiprocessors)) * one


def vendor(operations: float, moved: float, target: Target) -> float:
    """Milliseconds of a 16-bit product by a vendor's library: at VENDOR of the peak rate or MEMORY of the bandwidth,
    whichever takes longer."""
    return max(operations / (VENDOR * target.tflops * 1e9), moved / (MEMORY * target.gbps * 1e6))
