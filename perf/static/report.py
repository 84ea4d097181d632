"""The compiler's report on every kernel, for GPUs that are not there: perf/static/cases compiled for each target.

Registers, spills, shared memory, tensor-core and 128-bit instruction counts are read off the machine code. Occupancy
and microseconds are estimates by formula: the time is the larger of bytes (every tensor argument once) at the peak
bandwidth and operations at the peak rate, which no kernel reaches.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib
import math
import multiprocessing
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

import perf.static.cases
from perf import options, schema
from perf.options import Refused
from perf.schema import Row, number, text
from perf.static import aot, rules, ttir
from perf.static.aot import Launch
from perf.static.facts import Facts
from tkernels.core.targets import TARGETS, Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled(Row):
    """What the compiler made of a launch on a target."""

    operator: str = text("the file of perf/static/cases")
    case: str = text("the case's name: pass, shape, dtype")
    kernel: str = text("the kernel's name")
    config: str = text("block sizes and launch options")
    target: str = text("the GPU compiled for")
    programs: int | None = number("size of the grid")
    num_warps: int | None = number("warps of a program")
    registers: int | None = number("a thread")
    spill_bytes: int | None = number("a thread")
    shared_bytes: int | None = number("a program")
    shared_limit: int | None = number("what the target allows a program")
    occupancy_estimate: float | None = number("share of a multiprocessor's warps, by registers and shared memory")
    tensor_core: str = text("the tensor-core instruction used; empty without one")
    tensor_core_instructions: int | None = number("in the code, not executed")
    loads_128: int | None = number("128-bit loads in the code, async copies included")
    stores_128: int | None = number("128-bit stores in the code")
    loop_wide_loads: int | None = number("128-bit loads in the loop of the product")
    loop_narrow_loads: int | None = number("narrower ones there")
    wgmma_from_registers: int | None = number("wgmma whose left operand lies in registers; sm_90, as the next three")
    wgmma_in_flight: int | None = number("the most groups of wgmma that a wait leaves in flight")
    wgmma_overwrites: int | None = number("writes to registers that a wgmma in flight reads: wrong values")
    wgmma_serialised: str = text("why ptxas runs one wgmma at a time (C7514, C7515); empty if they overlap")
    bytes: int | None = number("every tensor argument once")
    flops: float | None = number("of the products, padding included")
    estimate_us: float | None = number("microseconds at the peak rates: a bound, not a forecast")
    bound_by: str = text("bytes or flops, whichever takes longer")
    complaints: str = text("what breaks a rule of perf/static/rules.py; empty if nothing does")
    status: str = text("ok, or what the compiler said")


# What the machine code says, columns by the names of Facts
FACTS = ("num_warps", "registers", "spill_bytes", "shared_bytes", "tensor_core_instructions", "loads_128", "stores_128",
         "loop_wide_loads", "loop_narrow_loads")  # fmt: skip
# Columns that are printed, and how they are headed
SHOWN = {
    "operator": "operator", "case": "case", "kernel": "kernel", "target": "target", "num_warps": "warps",
    "registers": "regs", "spill_bytes": "spills", "shared_bytes": "shared", "occupancy_estimate": "occupancy~",
    "tensor_core": "tensor core", "tensor_core_instructions": "count", "loads_128": "ld128",
    "stores_128": "st128", "estimate_us": "us~",
}  # fmt: skip


def operators() -> list[str]:
    """The files of perf/static/cases."""
    return [name for _, name, _ in pkgutil.iter_modules(perf.static.cases.__path__)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("--op", nargs="+", metavar="NAME", help=f"{', '.join(operators())} (default: all)")
    add("--target", nargs="+", metavar="NAME", help=f"{', '.join(TARGETS)} (default: all)")
    add("--case", metavar="TEXT", default="", help="only cases whose names contain this")
    add("--jobs", type=int, default=1, metavar="N", help="processes that compile (default: 1)")
    add("--csv", type=Path, metavar="FILE", help="where the rows go; an older file is replaced")


def run(args: argparse.Namespace) -> int:
    """Compile, print, write."""
    names = options.several("operator", args.op or operators(), operators())
    chosen = options.several("target", args.target or list(TARGETS), TARGETS)
    if args.jobs < 1:
        raise Refused(f"--jobs must be at least 1, got {args.jobs}")
    if args.csv is not None:
        options.new_file(args.csv)
    units = [(name, target, args.case) for name in names for target in chosen]
    parts = tqdm(_mapped(units, args.jobs), total=len(units), unit="target", disable=None)
    rows = [row for part in parts for row in part]
    if not rows:
        raise Refused(f"no case of {', '.join(names)} has a name with {args.case!r} in it")
    frame = schema.frame_of(Compiled, rows)
    print(schema.as_text(frame[list(SHOWN)].rename(columns=SHOWN), index=False))
    _print_problems(rows)
    if args.csv is not None:
        schema.write(frame, args.csv)
    return 0


def _mapped(units: list[tuple[str, str, str]], jobs: int) -> Iterator[list[Compiled]]:
    if jobs == 1:
        yield from map(report, units)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        yield from pool.map(report, units)


def report(unit: tuple[str, str, str]) -> list[Compiled]:
    """Rows of one operator on one target: a row a distinct launch of each case whose name contains the text."""
    operator, target_name, words = unit
    rows = []
    for case in importlib.import_module(f"perf.static.cases.{operator}").cases():
        if words not in case.name or case.reason_to_skip(target_name) is not None:
            continue
        head = Compiled(operator=operator, case=case.name, target=target_name)
        try:
            with aot.recording(target_name) as launches:
                case.run()
        except Exception as error:  # a case that cannot be made is a row of the report
            rows.append(head.having(status=_one_line(error)))
            continue
        distinct = {aot.specialisation(launch, target_name): launch for launch in launches}
        rows += [head.having(**_of_launch(launch, TARGETS[target_name])) for launch in distinct.values()]
    return rows


def _of_launch(launch: Launch, target: Target) -> dict[str, Any]:
    row = {
        "kernel": launch.kernel.__name__,
        "config": _config(launch),
        "programs": math.prod(launch.grid),
        "shared_limit": target.shared_memory,
        "bytes": sum(launch.bytes.values()),
    }
    try:
        facts = aot.compile_launch(launch, target.name)
    except Exception as error:
        return {**row, "status": _one_line(error)}
    return {**row, **_of_code(launch, facts, target), "status": "ok"}


def _of_code(launch: Launch, facts: Facts, target: Target) -> dict[str, Any]:
    products = ttir.products(facts.ttir, launch.arguments, launch.grid)
    microseconds, bound = estimate(sum(launch.bytes.values()), products, target)
    wgmma = {} if facts.wgmma is None else vars(facts.wgmma)
    return {
        **{name: getattr(facts, name) for name in FACTS},
        **{f"wgmma_{name}": value for name, value in wgmma.items()},
        "occupancy_estimate": round(rules.occupancy(facts.registers, facts.shared_bytes, facts.num_warps, target), 3),
        "tensor_core": facts.tensor_core or "",
        "flops": sum(products.values()),
        "estimate_us": round(microseconds, 3),
        "bound_by": bound,
        "complaints": "; ".join(rules.complaints(launch, facts)),
    }


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _config(launch: Launch) -> str:
    shown = {name: value for name, value in launch.arguments.items() if name.startswith("BLOCK")}
    shown |= {name: launch.kwargs[name] for name in ("num_warps", "num_stages", "maxnreg") if name in launch.kwargs}
    return " ".join(f"{name}={value}" for name, value in shown.items())


def estimate(moved: int, products: dict[str, float], target: Target) -> tuple[float, str]:
    """Microseconds at the target's peak rates, and which of bytes and flops takes them."""
    rates = {"16-bit": target.tflops, "tf32": target.tflops / 2, "ieee": target.tflops_fp32}
    by_bytes = moved / target.gbps / 1e3
    by_flops = sum(operations / rates[kind] for kind, operations in products.items()) / 1e6
    return max(by_bytes, by_flops), "flops" if by_flops > by_bytes else "bytes"


def _print_problems(rows: list[Compiled]) -> None:
    failed = [row for row in rows if row.status != "ok"]
    bad = [row for row in rows if row.complaints]
    for row in failed:
        print(f"{row.operator}, {row.case}, {row.target}: {row.status}")
    for row in bad:
        print(f"{row.operator}, {row.case}, {row.kernel}, {row.target}: {row.complaints}")
    compiled = len(rows) - len(failed)
    print(f"\n{compiled} launches compiled, {len(failed)} failed, {len(bad)} with complaints   (~ estimated)")
