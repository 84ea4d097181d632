"""Time operators against PyTorch and other libraries; one row of CSV a measurement (columns: perf/schema.py).

examples:
  python -m perf sweep --op linear conv2d --mode fwd bwd --shapes cnn --csv out.csv
  python -m perf sweep --op conv2d --shapes "N=64 C=128 H=28 W=28 K=128" --provider tkernels torch torch.compile
  python -m perf sweep --op cross_entropy --shapes vocab --dtype bf16 --csv out.csv --resume

Every provider is compared with float64 before it is timed. One that is wrong, crashes, runs out of memory or takes
too long gets a row whose status says so, and the sweep goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from perf import machine, measure, operators, options, plan, providers, schema, shapes, worker
from perf.options import Refused
from perf.plan import Task

# seconds until a worker must have imported what it needs
START_LIMIT = 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("--op", nargs="+", required=True, metavar="NAME", help=f"operators: {', '.join(operators.OPERATORS)}")
    add("--mode", nargs="+", default=["fwd", "bwd"], metavar="MODE",
        help=f"{', '.join(schema.MODES)} (default: fwd bwd)")  # fmt: skip
    add("--dtype", nargs="+", metavar="DTYPE",
        help=f"{', '.join(operators.DTYPES)} (default: fp32 on a CPU, bf16 on a GPU)")  # fmt: skip
    add("--layout", nargs="+", default=["nhwc"], metavar="LAYOUT",
        help="of images: nhwc (channels_last), nchw (default: nhwc)")  # fmt: skip
    add("--provider", nargs="+", default=["torch", "tkernels"], metavar="NAME",
        help=f"{', '.join(providers.NEEDS)}, module:NAME (a module of yours whose functions are called as the "
        "operators) (default: torch tkernels)")  # fmt: skip
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
        options.several("mode", args.mode, schema.MODES),
        options.several("dtype", args.dtype or ["fp32" if device == "cpu" else "bf16"], operators.DTYPES),
        options.several("layout", args.layout, operators.LAYOUTS),
        shapes.parse(args.shapes),
        providers.check(args.provider),
        plan.TIMINGS if args.cudagraph else plan.TIMINGS[:1],
        args.quick,
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


@contextlib.contextmanager
def _csv(path: Path | None, resume: bool) -> Iterator[Path]:
    """The file rows go to, a temporary one without a name. Raises Refused rather than add to what it should not."""
    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / "sweep.csv"
            temporary.touch()
            yield temporary
        return
    options.new_file(path)
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
    earlier = plan.baselines(path, machine.device_name(device)) if path.stat().st_size else {}
    writer = schema.Writer(path)
    todo = dict(enumerate(tasks))
    bar = tqdm(total=len(todo), unit="row", disable=None, dynamic_ncols=True)
    try:
        while todo:
            _one_worker(todo, device, effort, writer, limit, earlier, bar)
    finally:
        bar.close()
        writer.close()


def _one_worker(
    todo: dict[int, Task],
    device: str,
    effort: measure.Effort,
    writer: schema.Writer,
    limit: float,
    earlier: dict[plan.Key, dict[str, Any]],
    bar: Any,
) -> None:
    """Run one worker until it is done or gone; tasks that have their rows leave ``todo``."""
    # spawned, not forked: torch's threads and CUDA do not survive a fork
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    current = context.Value("i", min(todo), lock=False)
    arguments = (list(todo.items()), device, effort, sender, current)
    process = context.Process(target=worker.main, args=arguments, daemon=True)
    process.start()
    sender.close()
    fate, patience = "", max(limit, START_LIMIT)
    try:
        while True:
            bar.set_postfix_str(str(todo.get(current.value, "")), refresh=False)
            if not receiver.poll(patience):
                fate = f"timeout: no answer in {patience:g} s"
                break
            patience = limit
            try:
                message = receiver.recv()
            except EOFError:
                break
            if message == worker.READY:
                continue
            if message is None:
                break
            number, row = message
            if row.get("ms_p50"):
                if row["provider"] == providers.BASELINE:
                    earlier[todo[number].key()] = row
                elif row["speedup_vs_torch"] is None:
                    row["speedup_vs_torch"] = _speedup(row, todo[number], earlier)
            writer.append(row)
            del todo[number]
            bar.update()
        if fate:
            process.kill()
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()
        receiver.close()
    if todo:
        fate = fate or _cause(process.exitcode)
        for number in _lost(todo, current.value):
            writer.append({**worker.stamp(), **machine.facts(device), **todo.pop(number).columns(), "status": fate})
            bar.update()


def _speedup(row: dict[str, Any], task: Task, earlier: dict[plan.Key, dict[str, Any]]) -> float | None:
    """Against the baseline's row of a sweep that is being resumed, or of a worker that has died since."""
    baseline = earlier.get(dataclasses.replace(task, provider=providers.BASELINE).key())
    return baseline["ms_p50"] / row["ms_p50"] if baseline else None


def _lost(todo: dict[int, Task], at: int) -> list[int]:
    """The task a worker died at, with those that would die of the same: its provider's on the same problem."""
    guilty = todo.get(at) or todo[min(todo)]
    return [n for n, t in todo.items() if t.problem == guilty.problem and t.provider == guilty.provider]


def _cause(exitcode: int | None) -> str:
    if exitcode == worker.BROKEN_GPU:
        return "crashed: the GPU stopped answering"
    if exitcode is not None and exitcode < 0:
        return f"crashed: signal {-exitcode}"
    return f"crashed: exit status {exitcode}"


def summary(frame: pd.DataFrame) -> None:
    """Print the rows as a table."""
    if frame.empty:
        print("nothing was measured")
        return
    table = pd.DataFrame(
        {
            "operator": frame.operator,
            "mode": frame["mode"],
            "dtype": frame.dtype,
            "layout": frame.layout,
            "shape": [schema.shape_label(row) for row in schema.records(frame)],
            "provider": frame.provider,
            "timing": frame.timing,
            "ms": frame.ms_p50.map("{:.4g}".format, na_action="ignore"),
            "GB/s": frame.gbps.map("{:.1f}".format, na_action="ignore"),
            "TFLOP/s": frame.tflops.map("{:.3g}".format, na_action="ignore"),
            "roofline %": frame.roofline_pct.map("{:.0f}".format, na_action="ignore"),
            "speedup": frame.speedup_vs_torch.map("{:.2f}".format, na_action="ignore"),
            "err": frame.err_fp64.map("{:.1e}".format, na_action="ignore"),
            "status": frame.status,
        }
    )
    print(table.fillna("").to_string(index=False))
