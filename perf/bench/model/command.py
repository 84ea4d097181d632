"""A model as it is, under torch.compile and after tkernels.fuse, side by side: is fuse() worth it for yours?

examples:
  python -m perf model torchvision:resnet50
  python -m perf model timm:efficientnet_b0 --size 96 224 --dtype fp32 bf16 --mode train --csv out.csv
  python -m perf model mymodels:build --batch 64 --report
  python -m perf model all --no-compile --csv out.csv

A model is torchvision:NAME, timm:NAME, or module:function of your own that returns a module for images; 'all' is a
list of one of each kind. Everyone takes turns, eager twice: what its two times differ by is the noise. A training step
is forward, cross entropy, backward and zero_grad(set_to_none=True), with an optimizer's step only where one is asked
for. Columns of the CSV: perf/schema.py and perf/bench/model/comparison.py; perf compare takes two of them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from models import recipes
from perf import models, options, schema
from perf.bench import machine, noise, ratios
from perf.bench.measure import Effort
from perf.bench.model import worker
from perf.bench.model.comparison import AGAIN, ModelMeasurement, Task
from perf.options import Refused
from perf.providers import COMPILED, OURS

DTYPES = ("fp32", "bf16")
# of eager's time over the fused model's: the geometric mean to reach over the list, by mode, and no model below
MEAN_AIMS, LEAST_AIM = {"train": 1.10, "infer": 1.15}, 0.98


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("model", nargs="+", metavar="NAME", help=f"torchvision:NAME, timm:NAME, module:function, or {models.ALL}")
    add("--batch", type=int, default=16, metavar="N", help="images a call (default: 16)")
    add("--size", type=int, nargs="+", default=[96], metavar="N", help="height and width of the images (default: 96)")
    add("--dtype", nargs="+", default=list(DTYPES), metavar="DTYPE",
        help="fp32, bf16 (autocast over float32 parameters) (default: both)")  # fmt: skip
    add("--mode", nargs="+", default=list(schema.NETWORK_MODES), metavar="MODE",
        help="train, infer (default: both)")  # fmt: skip
    add("--channels-last", action=flag, default=True, help="layout of model and images (default: channels_last)")
    add("--compile", action=flag, default=True, help="whether torch.compile competes (default: it does)")
    add("--optimizer", metavar="NAME", help=f"{', '.join(recipes.OPTIMIZERS)}, in training steps (default: none)")
    add("--rounds", type=int, default=20, metavar="N", help="rounds of turns, fewer of slow models (default: 20)")
    add("--seconds", type=float, default=20.0, metavar="S",
        help="after which a model's rounds end, five at least (default: 20)")  # fmt: skip
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)")
    add("--csv", type=Path, metavar="FILE", help="where rows go, after those it has")
    add("--report", action="store_true", help="print what was fused, and what was left and why")


def run(args: argparse.Namespace) -> int:
    """Check everything, then measure. Status 0 even where a model failed: its rows say so."""
    device = options.device(args.device)
    tasks = list(_tasks(args, list(models.resolve(args.model)), device))
    for option in ("rounds", "seconds"):
        if getattr(args, option) <= 0:
            raise Refused(f"--{option} must be above 0, got {getattr(args, option)}")
    with contextlib.nullcontext() if args.csv is None else _writer(args.csv) as writer:
        measured = _measure(args, tasks, device, writer)
        frame = pd.DataFrame(map(vars, measured)) if args.csv is None else read(args.csv)
    means = summary(frame)
    if means:
        print(f"\n{means}")
    return 0


def _measure(
    args: argparse.Namespace, tasks: Sequence[Task], device: str, writer: schema.Writer | None
) -> list[ModelMeasurement]:
    """Measure, print and write each task; all rows."""
    facts = machine.facts(device)
    print(f"{_where(device)}, triton {facts['triton'] or 'none'}, commit {facts['commit']}", flush=True)
    rows: list[ModelMeasurement] = []
    with contextlib.closing(worker.Worker(Effort(args.seconds, args.rounds), args.compile)) as process:
        for task in tasks:
            done = process.measured(task)
            rows += done.rows
            if writer is not None:
                for row in done.rows:
                    writer.append(row)
            print(f"\n{shown(task, done.rows)}", flush=True)
            if args.report and done.report:
                print(f"\n{done.report}", flush=True)
    return rows


def _tasks(args: argparse.Namespace, models: Sequence[str], device: str) -> Iterator[Task]:
    dtypes = options.several("dtype", args.dtype, DTYPES)
    modes = options.several("mode", args.mode, schema.NETWORK_MODES)
    if args.optimizer is not None:
        options.one_of("optimizer", args.optimizer, recipes.OPTIMIZERS)
    if args.batch < 1 or min(args.size) < 1:
        raise Refused(f"--batch and --size must be at least 1, got {args.batch} and {min(args.size)}")
    for name, size, dtype, mode in itertools.product(models, dict.fromkeys(args.size), dtypes, modes):
        yield Task(name, args.batch, size, dtype, mode, args.channels_last, device, args.optimizer)


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[schema.Writer]:
    """Adds rows to a file, alone. Raises Refused for one of another kind."""
    with options.alone(options.new_file(path)):
        if path.exists() and path.stat().st_size:
            read(path)
        with contextlib.closing(schema.Writer(path, ModelMeasurement)) as writer:
            yield writer


def read(path: Path) -> pd.DataFrame:
    """A CSV of this command with typed columns. Raises Refused for anything else."""
    frame = schema.table(path)
    if tuple(frame.columns) != ModelMeasurement.names():
        raise Refused(f"{path} is not a CSV of perf model, or of another version of it: name another file")
    return schema.typed(frame, ModelMeasurement.columns(), path)


def _where(device: str) -> str:
    if device == "cpu":
        return ratios.machine_line()
    return f"{machine.device_name(device)}, torch {machine.facts(device)['torch']}"


def shown(task: Task, rows: Sequence[ModelMeasurement]) -> str:
    """One comparison: a line a provider, then what Dynamo and fuse() made of the model."""
    optimizer = f" with {task.optimizer}" if task.optimizer and task.trains else ""
    title = f"{task.name} {task.batch}x3x{task.size}x{task.size} {task.dtype} {task.layout}"
    lines = [
        [
            row.provider,
            noise.times(vars(row)).shown(".4g"),
            noise.speedup(vars(row)).shown(".3f"),
            ratios.formatted(row.peak_memory_mb, ",.0f"),
            ratios.formatted(row.first_call_s, ".1f"),
            ratios.formatted(row.err_fp64, ".1e"),
            row.status,
        ]
        for row in rows
    ]
    head = ["", "ms (quartiles)", "speedup (quartiles)", "peak MB", "first call s", "err", "status"]
    ours = next(row for row in rows if row.provider == OURS)
    words = [f"{ours.rounds or 'no'} rounds"]
    if ours.fused is not None:
        words += [f"{ours.fused} chains fused", f"{ours.left} chains left"]
    if ours.guard_us is not None:
        words += [
            f"guards {ours.guard_us:.0f} us a call",
            f"graphs {ours.graphs}, at a second batch size {ours.graphs_second} more, at a third {ours.graphs_third}",
        ]
    table = ratios.table(head, lines)
    notes = [f"{row.provider}: {row.noise}" for row in rows if row.noise]
    below = "\n".join(["; ".join(words), *notes, *noise.footnotes(map(vars, rows))])
    return f"{title}, {schema.NETWORK_MODES[task.mode]}{optimizer}\n\n{table}\n\n{below}"


def summary(frame: pd.DataFrame) -> str:
    """Geometric means of the ratios over all models, by mode and dtype; '' where there is but one."""
    frame = frame.drop_duplicates(list(schema.KEY), keep="last")
    timed = frame[frame.speedup_vs_torch.notna()].astype({"speedup_vs_torch": float})
    lines = []
    for mode, part in timed.groupby("mode", sort=False):
        groups = [*part.groupby("dtype", sort=False)]
        for dtype, rows in [*groups, ("all", part)] if len(groups) > 1 else groups:
            ours = rows[rows.provider == OURS]
            if len(ours) < 2:
                continue
            worst = schema.records(ours.loc[[ours.speedup_vs_torch.idxmin()]])[0]
            lines.append([
                f"{schema.NETWORK_MODES[str(mode)]}, {dtype}", f"{len(ours)}", _mean(ours),
                f"{MEAN_AIMS[str(mode)]:.2f}", f"{worst['speedup_vs_torch']:.3f}",
                f"{worst['operator']} {schema.shape_label(worst)} {worst['dtype']}",
                f"{(ours.speedup_vs_torch < LEAST_AIM).sum()}", _mean(rows[rows.provider == COMPILED]),
                _mean(rows[rows.provider == AGAIN]), f"{_widest(rows):.3f}", f"{(ours.noise != '').sum()}",
            ])  # fmt: skip
    failed = int((frame.status != schema.OK).sum())
    head = ["speed-up", "models", "fused, geometric mean", "aim", "least", "of", f"below {LEAST_AIM}",
            "torch.compile", "eager again", "noise, at most", "noisy"]  # fmt: skip
    parts = [ratios.table(head, lines)] if lines else []
    if failed:
        parts.append(f"{failed} of {len(frame)} rows are not ok")
    return "\n\n".join(parts)


def _mean(rows: pd.DataFrame) -> str:
    return f"{np.exp(np.log(rows.speedup_vs_torch).mean()):.3f}" if len(rows) else ""


def _widest(rows: pd.DataFrame) -> float:
    """The largest difference between eager and eager again in a model's median."""
    return float((rows[rows.provider == AGAIN].speedup_vs_torch - 1).abs().max())
