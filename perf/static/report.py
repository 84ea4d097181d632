"""The compiler's report on every kernel, for GPUs that are not there: perf/static/cases compiled for each target.

Registers, spills, shared memory, tensor-core and 128-bit instruction counts are read off the machine code. Occupancy
and microseconds are estimates by formula: the time is the larger of bytes (every tensor argument once) at the peak
bandwidth and operations at the peak rate, which no kernel reaches.

Then, for sm_90, the products of whole networks: tile, programs that fit, waves, milliseconds of ours and of a vendor's
library by estimate (perf/static/model.py), whose product the backend 'auto' takes, and totals; --network leaves out all
else. --measured lays the estimates beside what a run of perf gpu timed.
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
from perf.static import aot, model, products, rules, ttir
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
    tile: str = text("rows x columns of the product's tile; empty without a product")
    resident: int | None = number("programs that a multiprocessor holds at once, by registers and shared memory")
    fit: int | None = number("programs that the target holds at once")
    waves: float | None = number("programs over those that fit")
    l2_bytes_clock: float | None = number("bytes a clock of a multiprocessor that operands need of L2 at the peak rate")
    bytes: int | None = number("every tensor argument once")
    flops: float | None = number("of the products, padding included")
    estimate_us: float | None = number("microseconds at the peak rates: a bound, not a forecast")
    bound_by: str = text("bytes or flops, whichever takes longer")
    estimated_ms: float | None = number("milliseconds by perf/static/model.py, a forecast; empty but on sm_90")
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
    add("--network", nargs="+", metavar="NAME",
        help=f"only the products of networks: {', '.join(products.networks())}")  # fmt: skip
    add("--measured", type=Path, metavar="FILE", help="the products in a run's timings.csv, estimated and measured")
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
    if args.network or args.measured:
        return _run_products(args, chosen)
    units = [(name, target, args.case) for name in names for target in chosen]
    parts = tqdm(_mapped(units, args.jobs), total=len(units), unit="target", disable=None)
    rows = [row for part in parts for row in part]
    if not rows:
        raise Refused(f"no case of {', '.join(names)} has a name with {args.case!r} in it")
    frame = schema.frame_of(Compiled, rows)
    print(schema.as_text(frame[list(SHOWN)].rename(columns=SHOWN), index=False))
    _print_problems(rows)
    if not (args.op or args.case):
        modelled = [name for name in chosen if name in model.MODELLED]
        products.print_networks(
            [row for target in modelled for name in products.networks() for row in products.of_network(name, target)]
        )
    if args.csv is not None:
        schema.write(frame, args.csv)
    return 0


def _run_products(args: argparse.Namespace, chosen: list[str]) -> int:
    """The same of products, whose rows are others."""
    if args.op or args.case:
        raise Refused("--op and --case choose among kernels: they do not go with --network or --measured")
    if args.measured is not None:
        if args.network:
            raise Refused("--network and --measured choose different products: one of them")
        for name in args.target or ():
            options.one_of("target of the model", name, model.MODELLED)
        rows = products.of_run(args.measured, TARGETS[model.MODELLED[0]])
        products.print_run(rows, args.measured)
    else:
        names = options.several("network", args.network, products.networks())
        units = [(name, target) for target in chosen for name in names]
        rows = [row for unit in tqdm(units, unit="network", disable=None) for row in products.of_network(*unit)]
        products.print_networks(rows)
    if args.csv is not None:
        schema.write(schema.frame_of(products.Product, rows), args.csv)
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
    work = ttir.products(facts.ttir, launch.arguments, launch.grid)
    microseconds, bound = estimate(sum(launch.bytes.values()), work, target)
    modelled = model.estimate(launch, facts, work, target)
    milliseconds = modelled.milliseconds
    wgmma = {} if facts.wgmma is None else vars(facts.wgmma)
    return {
        **{name: getattr(facts, name) for name in FACTS},
        **{f"wgmma_{name}": value for name, value in wgmma.items()},
        "occupancy_estimate": round(rules.occupancy(facts.registers, facts.shared_bytes, facts.num_warps, target), 3),
        "tensor_core": facts.tensor_core or "",
        **products.columns(facts, modelled),
        "flops": modelled.operations,
        "estimate_us": round(microseconds, 3),
        "bound_by": bound,
        "estimated_ms": None if milliseconds is None else round(milliseconds, 5),
        "complaints": "; ".join(rules.complaints(launch, facts)),
    }


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _config(launch: Launch) -> str:
    shown = {name: value for name, value in launch.arguments.items() if name.startswith("BLOCK")}
    shown |= {name: launch.kwargs[name] for name in ("num_warps", "num_stages", "maxnreg") if name in launch.kwargs}
    return " ".join(f"{name}={value}" for name, value in shown.items())


def estimate(moved: int, work: dict[str, float], target: Target) -> tuple[float, str]:
    """Microseconds at the target's peak rates, and which of bytes and flops takes them."""
    rates = model.rates(target)
    by_bytes = moved / target.gbps / 1e3
    by_flops = sum(operations / rates[kind] for kind, operations in work.items()) / 1e6
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
