"""The summary of ``python -m perf gpu`` in Markdown: facts, how each part ended, what the sweeps say, the plots."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perf import machine, schema
from perf.options import Refused
from perf.providers import BASELINE
from perf.schema import MODES

if TYPE_CHECKING:
    from perf.gpu import Outcome

TIMINGS = {"wall": "as called", "cudagraph": "CUDA graph"}
# of a failed part's log
TAIL = 25


def summary(out: Path, device: str, minutes: float, outcomes: Sequence[Outcome]) -> str:
    """The run so far."""
    rows = sweeps(out)
    now = datetime.datetime.now(datetime.timezone.utc)
    lines = [f"# tkernels on {machine.device_name(device)}", ""]
    lines += [f"`python -m perf gpu`, {minutes:g} minutes, {now:%Y-%m-%d %H:%M} UTC", ""]
    lines += [f"- {name}: {value}" for name, value in {**machine.facts(device), **machine.smi(device)}.items() if value]
    lines += ["", *_outcomes(out, outcomes)]
    if rows is not None:
        lines += [*_steps(rows), *_speedups(rows), *_unmeasured(rows)]
    pictures = sorted(path.name for path in out.glob("*.png"))
    if pictures:
        lines += ["", "## Plots", "", *(f"![{Path(name).stem}]({name})" for name in pictures)]
    return "\n".join(lines) + "\n"


def sweeps(out: Path) -> pd.DataFrame | None:
    """The rows of all of a run's sweeps, those of interrupted ones too; None where there are none."""
    read = [_read(path) for path in sorted((out / "sweeps").glob("*.csv"))]
    frames = [frame for frame in read if frame is not None]
    return pd.concat(frames, ignore_index=True) if frames else None


def _read(path: Path) -> pd.DataFrame | None:
    """A sweep's rows; None where it was stopped before it had one."""
    if not path.exists():
        return None
    try:
        schema.drop_torn_line(path)
        frame = schema.read(path)
    except Refused:
        return None
    return None if frame.empty else frame


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"

    names = list(head)
    return [line(names), "|" + "---|" * len(names), *map(line, rows)]


def _outcomes(out: Path, outcomes: Sequence[Outcome]) -> list[str]:
    """How each part ended, and the end of the log of each that failed."""
    cells = [(f"[{o.name}]({o.log})", o.status, f"{o.seconds:.0f}", _told(out, o)) for o in outcomes]
    lines = _table(("part", "result", "seconds", "what it says"), cells)
    for outcome in outcomes:
        if outcome.status != "ok":
            tail = _log(out, outcome)[-TAIL:]
            lines += ["", f"## {outcome.name}: {outcome.status}", "", "```", *tail, "```"]
    return lines


def _log(out: Path, outcome: Outcome) -> list[str]:
    path = out / outcome.log
    return path.read_text(errors="replace").strip().splitlines() if path.exists() else []


def _told(out: Path, outcome: Outcome) -> str:
    """The line that matters: rows of a sweep, pytest's count, the training's accuracy."""
    kind, _, name = outcome.name.partition(" ")
    if kind == "sweep":
        frame = _read(out / "sweeps" / f"{name}.csv")
        if frame is None:
            return "no row"
        ok = int((frame.status == schema.OK).sum())
        return f"{len(frame)} rows, {ok} of them measured"
    pattern = {"tests": r"\d+ (passed|failed|error)", "train": "validation accuracy"}.get(kind)
    if pattern is None:
        return ""
    found = [line for line in _log(out, outcome) if re.search(pattern, line)]
    return found[-1].strip("= ") if found else ""


def _steps(rows: pd.DataFrame) -> list[str]:
    """Forward, loss and backward of the CIFAR network, a line a provider."""
    steps = rows[(rows.operator == "cnn") & (rows["mode"] == "full") & (rows.status == schema.OK)]
    if steps.empty:
        return []
    steps = steps.sort_values("provider", key=lambda names: names != BASELINE, kind="stable")
    cells = [
        (
            row["provider"],
            TIMINGS[row["timing"]],
            row["dtype"],
            row["N"],
            f"{row['ms_p50']:.3g} ({row['ms_p20']:.3g} to {row['ms_p80']:.3g})",
            f"{1e3 * row['N'] / row['ms_p50']:,.0f}",
            _number(row["speedup_vs_torch"], ".2f"),
            _number(row["peak_memory_mb"], ",.0f"),
            _number(row["host_us"], ",.0f"),
        )
        for row in schema.records(steps)
    ]
    head = ("provider", "timed", "dtype", "images", "ms, p50 (p20 to p80)", "images/s", "times as fast",
            "peak MB", "host us")  # fmt: skip
    return ["", "## A training step of the CIFAR network", "", "Without the optimizer.", "", *_table(head, cells)]


def _number(value: Any, form: str) -> str:
    return "" if pd.isna(value) else format(float(value), form)


def _speedups(rows: pd.DataFrame) -> list[str]:
    """How many times as fast as PyTorch, by operator, mode and dtype."""
    timed = rows[(rows.status == schema.OK) & rows.speedup_vs_torch.notna() & (rows.provider != BASELINE)]
    cells = []
    for (operator, mode, dtype, timing, provider), part in timed.groupby(
        ["operator", "mode", "dtype", "timing", "provider"], sort=False
    ):
        speed = part.speedup_vs_torch.astype(float)
        mean = 2 ** float(np.log2(speed).mean())
        spread = f"{speed.min():.2f} to {speed.max():.2f}" if len(part) > 1 else ""
        named = (operator, MODES[str(mode)], dtype, provider, TIMINGS[str(timing)])
        cells.append((*named, len(part), f"**{mean:.2f}**", spread, f"{part.roofline_pct.median():.0f}"))
    if not cells:
        return []
    head = ("operator", "pass", "dtype", "provider", "timed", "shapes", "times as fast", "least to most",
            "% of roofline")  # fmt: skip
    text = "Geometric mean over the shapes, against PyTorch eager (its CUDA graph for rows replayed from one)."
    return ["", "## How many times as fast as PyTorch", "", text, "", *_table(head, cells)]


def _unmeasured(rows: pd.DataFrame) -> list[str]:
    """What has no time and why, alike rows together."""
    other = rows[rows.status != schema.OK]
    if other.empty:
        return []
    cells = []
    for (provider, status), part in other.groupby(["provider", "status"], sort=False):
        row = schema.records(part)[0]
        first = f"{row['operator']} {row['mode']} {row['dtype']} {row['layout']} {schema.shape_label(row)}"
        cells.append((provider, status, len(part), ", ".join(dict.fromkeys(part.operator)), " ".join(first.split())))
    head = ("provider", "status", "rows", "operators", "first of them")
    return ["", "## Not measured", "", *_table(head, cells)]
