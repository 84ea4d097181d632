"""Time operators against PyTorch and other libraries; one row of CSV a measurement (columns: perf/schema.py).

examples:
  python -m perf sweep --op linear conv2d --mode fwd bwd --shapes cnn --csv out.csv
  python -m perf sweep --op conv2d --shapes "N=64 C=128 H=28 W=28 K=128" --provider tkernels torch torch.compile
  python -m perf sweep --op cross_entropy --shapes vocab --dtype bf16 --csv out.csv --resume
  python -m perf sweep --op cnn --device cpu
  python -m perf sweep --op linear_relu batch_norm_relu conv2d_relu cross_entropy --mode fwd full --shapes spread

On a CPU cnn without a --mode is the whole network: training steps (train) and inference (infer) of the CIFAR classifier
against eager and compiled PyTorch, in float32 and bf16 autocast, with the system's memory allocator as it is, all in
one process and in a process each, and with one that never gives memory back, so that nobody has page faults; about a
quarter of an hour.

Figures that a busy machine has scattered are marked (perf/bench/noise.py); so is a roofline above 100%.

Every provider is compared with float64 before it is timed. One that is wrong, crashes, runs out of memory or takes
too long gets a row whose status says so, and the sweep goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from perf import operators, options, plan, providers, schema, shapes
from perf.bench import machine, measure, network, noise, ratios, rows, worker
from perf.bench.process import Ended, Process
from perf.bench.ratios import ALLOCATORS
from perf.options import Refused
from perf.plan import Task
from perf.schema import Measurement

# seconds until a worker must have imported what it needs
START_LIMIT = 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("--op", nargs="+", required=True, metavar="NAME", help=f"operators: {', '.join(operators.OPERATORS)}")
    add("--mode", nargs="+", metavar="MODE",
        help=f"{', '.join(schema.MODES)}; of cnn on a CPU {', '.join(schema.NETWORK_MODES)} too "
        "(default: fwd bwd, of cnn on a CPU train infer)")  # fmt: skip
    add("--dtype", nargs="+", metavar="DTYPE",
        help=f"{', '.join(operators.DTYPES)} (default: fp32 on a CPU, bf16 on a GPU; networks: both)")  # fmt: skip
    add("--layout", nargs="+", metavar="LAYOUT",
        help="of images: nhwc (channels_last), nchw (default: nhwc; train and infer: each provider's)")  # fmt: skip
    add("--provider", nargs="+", metavar="NAME",
        help=f"{', '.join(providers.PROVIDERS)}, module:NAME (a module of yours whose functions are called as the "
        "operators) (default: torch tkernels; for train and infer torch.compile and torch-fp32 too)")  # fmt: skip
    add("--allocator", nargs="+", default=["shared", "default", "faultless"], metavar="NAME",
        help="for train and infer: shared (the system's, all providers in one process), default (the system's, a "
        "process each), faultless (glibc keeps all memory it was ever given) (default: all three)")  # fmt: skip
    add("--shapes", nargs="+", default=["cnn"], metavar="SHAPES",
        help=f"{', '.join(shapes.NAMED)}, a FILE.csv, or sizes such as 'N=256 C=32 K=64' (default: cnn)")  # fmt: skip
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)")
    add("--cudagraph", action="store_true", help="time each call replayed from a CUDA graph too, in rows of their own")
    add("--quick", action="store_true",
        help=f"few repetitions, batches of at most {operators.QUICK_IMAGES} images or "
        f"{operators.QUICK_ROWS} rows")  # fmt: skip
    add("--limit", type=float, default=600.0, metavar="SECONDS",
        help="time after which a provider that does not answer is given up (default: 600)")  # fmt: skip
    add("--csv", type=Path, metavar="FILE", help="where rows go, as they come; without it they are only printed")
    add("--resume", action="store_true", help="go on with the CSV: measure only what it has no row of")


def run(args: argparse.Namespace) -> int:
    """Check everything, then measure. Status 0 even where providers failed: their rows say so."""
    device = options.device(args.device)
    wanted = plan.Wanted(
        options.several("operator", args.op, operators.OPERATORS),
        args.mode and options.several("mode", args.mode, (*schema.MODES, *schema.NETWORK_MODES)),
        args.dtype and options.several("dtype", args.dtype, operators.DTYPES),
        args.layout and options.several("layout", args.layout, operators.LAYOUTS),
        shapes.parse(args.shapes),
        args.provider and providers.check(args.provider),
        plan.TIMINGS if args.cudagraph else plan.TIMINGS[:1],
        args.quick,
        device,
        _allocators(args.allocator),
    )
    if args.limit <= 0:
        raise Refused(f"--limit must be above 0 seconds, got {args.limit:g}")
    if args.resume and args.csv is None:
        raise Refused("--resume needs the --csv FILE to go on with")
    tasks = plan.tasks(wanted)
    effort = measure.QUICK if args.quick else measure.NORMAL
    with _csv(args.csv, args.resume) as path:
        if path.stat().st_size:
            tasks = plan.missing(tasks, path, machine.device_name(device))
            _warn_of_mixture(path)
        sweep(tasks, device, effort, path, args.limit)
        summary(schema.read(path))
    return 0


def _allocators(given: Sequence[str]) -> list[str]:
    """Those of ALLOCATORS that are wanted and that there are here."""
    names = options.several("allocator", given, ALLOCATORS)
    return [name for name in names if name != "faultless" or platform.libc_ver()[0] == "glibc"] or ["default"]


@contextlib.contextmanager
def _csv(path: Path | None, resume: bool) -> Iterator[Path]:
    """The file rows go to, a temporary one without a name. Raises Refused rather than add to what it should not."""
    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / "sweep.csv"
            temporary.touch()
            yield temporary
        return
    with options.alone(options.new_file(path)):
        if path.exists() and path.stat().st_size:
            if not resume:
                raise Refused(f"{path} exists: --resume goes on with it, else name another file")
            schema.drop_torn_line(path)
            if path.stat().st_size:
                schema.read(path)
        path.touch()
        yield path


def _warn_of_mixture(path: Path) -> None:
    before = set(schema.read(path).commit) - {options.commit()}
    if before:
        print(
            f"note: {path} has rows of commit {', '.join(sorted(before))}, this is {options.commit()}", file=sys.stderr
        )


def sweep(tasks: Sequence[Task], device: str, effort: measure.Effort, path: Path, limit: float) -> None:
    """Measure the tasks in processes of their own, appending each row as it comes."""
    frame = schema.read(path) if path.stat().st_size else pd.DataFrame(columns=["device"])
    speedups = rows.Speedups(schema.records(frame[frame.device == machine.device_name(device)]))
    lots: dict[tuple[object, ...], dict[int, Task]] = {}
    for number, task in enumerate(tasks):
        lots.setdefault(task.process, {})[number] = task
    with (
        contextlib.closing(schema.Writer(path)) as writer,
        tqdm(total=len(tasks), unit="row", disable=None, dynamic_ncols=True) as bar,
    ):
        for todo in lots.values():
            while todo:
                for number, row in _by_one_process(todo, device, effort, limit, bar):
                    writer.append(speedups.filled(row))
                    del todo[number]
                    bar.update()


def _by_one_process(
    todo: dict[int, Task], device: str, effort: measure.Effort, limit: float, bar: Any
) -> Iterator[tuple[int, Measurement]]:
    """Rows of the tasks until a process has done them all or is gone; then of what it was at, too."""
    at, tasks = min(todo), list(todo.items())
    allocator = todo[at].allocator
    # one that has a network's contenders to start must be no daemon
    measuring = Process(
        worker.main, tasks, device, effort, daemon=not allocator,
        environment=network.environment(allocator) if allocator else {},
    )  # fmt: skip
    status, patience = "", max(limit, START_LIMIT)
    try:
        while not status:
            bar.set_postfix_str(str(todo.get(at, "")), refresh=False)
            try:
                told = measuring.receive(patience)
            except TimeoutError:
                status = f"timeout: no answer in {patience:g} s"
            except Ended as end:
                status = str(end)
            else:
                if told is None:
                    measuring.close()
                    return
                patience = limit
                if isinstance(told, int):
                    at = told
                else:
                    yield told
    finally:
        measuring.close(0.0)
    for number in _lost(todo, at):
        yield number, rows.made(Measurement, device, **todo[number].columns(), status=status)


def _lost(todo: dict[int, Task], at: int) -> list[int]:
    """The task a process died at, with those that would die of the same: its provider's on the same problem."""
    guilty = todo.get(at) or todo[min(todo)]
    return [n for n, t in todo.items() if t.problem == guilty.problem and t.provider == guilty.provider]


def summary(frame: pd.DataFrame) -> None:
    """Print the rows as tables: single calls, how they compare; networks, how they compare."""
    if frame.empty:
        print("nothing was measured")
        return
    whole = frame["mode"].isin(list(schema.NETWORK_MODES))
    parts = [_calls(frame[~whole]), ratios.operators_table(frame[~whole]), *ratios.network_tables(frame[whole])]
    print("\n\n".join(part for part in parts if part))


def _calls(frame: pd.DataFrame) -> str:
    """Each row of a single call in a line."""
    if frame.empty:
        return ""
    records = schema.records(frame)
    shown = {"GB/s": ("gbps", ".1f"), "TFLOP/s": ("tflops", ".3g"), "roofline %": ("roofline_pct", ".0f"),
             "err": ("err_fp64", ".1e")}  # fmt: skip
    cells = {name: [ratios.formatted(row[column], form) for row in records] for name, (column, form) in shown.items()}
    above = ["*" if row["above_roofline"] else "" for row in records]
    cells["roofline %"] = [f"{percent} {star}".strip() for percent, star in zip(cells["roofline %"], above)]
    table = frame[["operator", "mode", "dtype", "layout"]].assign(
        shape=[schema.shape_label(row) for row in records],
        provider=frame.provider,
        timing=frame.timing,
        **{
            "ms (quartiles)": [noise.times(row).shown(".4g") for row in records],
            "speedup (quartiles)": [noise.speedup(row).shown(".2f") for row in records],
        },
        **cells,
        status=frame.status,
    )
    return "\n".join([schema.as_text(table, index=False), *noise.footnotes(records)])
