"""The compiler's report on every kernel, for GPUs that are not there: perf/static/cases compiled for each target.

Registers, spills, shared memory, tensor-core and 128-bit instruction counts are read off the machine code. Occupancy
and microseconds are estimates by formula: the time is the larger of bytes (every tensor argument once) at the peak
bandwidth and operations at the peak rate, which no kernel reaches.
"""

from __future__ import annotations

import argparse
import concurrent.futures
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
from perf.schema import Column
from perf.static import aot, rules, ttir
from perf.static.aot import Launch
from perf.static.facts import Facts
from tkernels.core.targets import TARGETS, Target

COLUMNS = (
    Column("operator", "text", "the file of perf/static/cases"),
    Column("case", "text", "the case's name: pass, shape, dtype"),
    Column("kernel", "text", "the kernel's name"),
    Column("config", "text", "block sizes and launch options"),
    Column("target", "text", "the GPU compiled for"),
    Column("programs", "whole", "size of the grid"),
    Column("num_warps", "whole", "warps of a program"),
    Column("registers", "whole", "a thread"),
    Column("spill_bytes", "whole", "a thread"),
    Column("shared_bytes", "whole", "a program"),
    Column("shared_limit", "whole", "what the target allows a program"),
    Column("occupancy_estimate", "number", "share of a multiprocessor's warps, by registers and shared memory"),
    Column("tensor_core", "text", "the tensor-core instruction used; empty without one"),
    Column("tensor_core_instructions", "whole", "in the code, not executed"),
    Column("loads_128", "whole", "128-bit loads in the code, async copies included"),
    Column("stores_128", "whole", "128-bit stores in the code"),
    Column("loop_wide_loads", "whole", "128-bit loads in the loop of the product"),
    Column("loop_narrow_loads", "whole", "narrower ones there"),
    Column("wgmma_from_registers", "whole", "wgmma whose left operand lies in registers; sm_90, as the next three"),
    Column("wgmma_in_flight", "whole", "the most groups of wgmma that a wait leaves in flight"),
    Column("wgmma_overwrites", "whole", "writes to registers that a wgmma in flight reads: wrong values"),
    Column("wgmma_serialised", "text", "why ptxas runs one wgmma at a time (C7514, C7515); empty if they overlap"),
    Column("bytes", "whole", "every tensor argument once"),
    Column("flops", "number", "of the products, padding included"),
    Column("estimate_us", "number", "microseconds at the peak rates: a bound, not a forecast"),
    Column("bound_by", "text", "bytes or flops, whichever takes longer"),
    Column("complaints", "text", "what breaks a rule of perf/static/rules.py; empty if nothing does"),
    Column("status", "text", "ok, or what the compiler said"),
)
NAMES = tuple(column.name for column in COLUMNS)
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
    frame = schema.frame_of(rows, COLUMNS)
    print(schema.as_text(frame[list(SHOWN)].rename(columns=SHOWN), index=False))
    _print_problems(rows)
    if args.csv is not None:
        schema.write(frame, args.csv)
    return 0


def _mapped(units: list[tuple[str, str, str]], jobs: int) -> Iterator[list[dict[str, Any]]]:
    if jobs == 1:
        yield from map(report, units)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        yield from pool.map(report, units)


def report(unit: tuple[str, str, str]) -> list[dict[str, Any]]:
    """Rows of one operator on one target: a row a distinct launch of each case whose name contains the text."""
    operator, target_name, text = unit
    rows = []
    for case in importlib.import_module(f"perf.static.cases.{operator}").cases():
        if text not in case.name or case.reason_to_skip(target_name) is not None:
            continue
        head = {"operator": operator, "case": case.name, "target": target_name}
        try:
            with aot.recording(target_name) as launches:
                case.run()
        except Exception as error:  # a case that cannot be made is a row of the report
            rows.append({**head, "status": _one_line(error)})
            continue
        distinct = {aot.specialisation(launch, target_name): launch for launch in launches}
        rows += [{**head, **_of_launch(launch, TARGETS[target_name])} for launch in distinct.values()]
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


def _print_problems(rows: list[dict[str, Any]]) -> None:
    failed = [row for row in rows if row["status"] != "ok"]
    bad = [row for row in rows if row.get("complaints")]
    for row in failed:
        print(f"{row['operator']}, {row['case']}, {row['target']}: {row['status']}")
    for row in bad:
        print(f"{row['operator']}, {row['case']}, {row['kernel']}, {row['target']}: {row['complaints']}")
    compiled = len(rows) - len(failed)
    print(f"\n{compiled} launches compiled, {len(failed)} failed, {len(bad)} with complaints   (~ estimated)")
