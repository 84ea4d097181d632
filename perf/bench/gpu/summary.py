"""What a run found, on one screen: what was wrong, what is slower than its rival, what is faster, what was not reached.
The rest, for who wants to know more, comes behind it."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from perf import schema
from perf.bench import noise
from perf.bench.gpu.results import Results
from perf.bench.ratios import formatted
from perf.bench.rows import times_as_fast, whose
from perf.schema import OK, Measurement

# rows shown of a list whose whole stands in a CSV
MOST_WRONG, MOST_SLOWER, MOST_FASTER, MOST_LEFT = 8, 8, 5, 6
# a rival must be so much faster to be called so
NOISE = 1.03
UNSUPPORTED = "unsupported"
TIMED = {"wall": "as called", "cudagraph": "CUDA graph"}


class Speed(NamedTuple):
    """A comparison: our row and that of the best rival, whose name is given."""

    ours: Measurement
    rival: str
    other: Measurement

    @property
    def ratio(self) -> float:
        """Times as fast as the rival."""
        return times_as_fast(self.ours, self.other)


def screen(found: Results, minutes: float, seconds: float) -> str:
    """The summary so far, in Markdown."""
    facts = found.facts
    now = datetime.datetime.now(datetime.timezone.utc)
    rates = ", ".join(f"{name} {facts[name]}" for name in ("copy", "product") if name in facts)
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "driver", "python") if facts.get(name))
    lines = [
        f"# {found.provider} on {facts.get('device', 'an unknown device')}",
        "",
        f"{now:%Y-%m-%d %H:%M} UTC, commit {facts.get('commit', 'unknown')}, {versions or 'versions unknown'}; "
        f"{seconds:.0f} s of {minutes:g} minutes. Ceilings: {rates or 'not measured'}.",
        *_wrong(found),
        *_speeds(found),
        *_not_reached(found),
    ]
    return "\n".join(lines) + "\n"


def details(found: Results) -> str:
    """What does not fit on the screen."""
    lines = [*_training(found), *_profile(found), *_tools(found), *_blocks(found)]
    return "\n".join(lines) + "\n"


def exit_status(found: Results) -> int:
    """0 where nothing is wrong and every block was done, else 1."""
    return 1 if wrongs(found) or any(outcome.status != "ok" for outcome in found.outcomes) else 0


def wrongs(found: Results) -> list[tuple[str, str]]:
    """What is wrong and how: crashes, errors and wrong values of ours, the worst first."""
    rows = [(f"{f.block}: {f.item}", f.status) for f in found.failures]
    rows += [(f"{c.check}: {c.what}", c.status) for c in found.checks if _is_wrong(c.status)]
    rows += [
        (f"{_label(t)}, {t.provider}", t.status)
        for t in found.timings
        if _is_ours(found, t) and t.status != OK and not t.status.startswith(UNSUPPORTED)
    ]
    rows += [(name, status) for name, status in found.tools if status.startswith(("wrong", "error"))]
    order = ("crashed", "wrong", "differs")
    return sorted(rows, key=lambda row: next((i for i, o in enumerate(order) if row[1].startswith(o)), len(order)))


def _is_wrong(status: str) -> bool:
    return status != OK and not status.startswith("less exact")


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in cells) + " |"

    names = list(head)
    return [line(names), "|" + "---|" * len(names), *map(line, rows)]


def _cut(rows: Sequence[Sequence[object]], most: int, where: str) -> list[Sequence[object]]:
    if len(rows) <= most:
        return list(rows)
    return [*rows[:most], (f"and {len(rows) - most} more, see {where}", *[""] * (len(rows[0]) - 1))]


def _wrong(found: Results) -> list[str]:
    rows = wrongs(found)
    results, cases = len(found.checks), len({check.check for check in found.checks})
    inexact = [c for c in found.checks if c.status.startswith("less exact")]
    done = f"{results:,} results of {cases} cases were compared with a reference or with their first run"
    less = f", {len(inexact)} are less exact than PyTorch's (checks.csv)" if inexact else ""
    if not rows:
        what = f"Nothing: {done}{less}." if results else "Nothing was checked."
        return ["", "## Wrong", "", what]
    shown = _cut([(what, status[:160]) for what, status in rows], MOST_WRONG, "checks.csv and log.txt")
    return ["", f"## Wrong: {len(rows)}", "", *_table(("what", "finding"), shown), "", f"{done}{less}."]


def speeds(found: Results) -> list[Speed]:
    """Every comparison of ours with the fastest of its rivals, the slowest of ours first."""
    comparisons: dict[tuple[str, ...], list[Measurement]] = {}
    for row in found.timings:
        if row.status == OK and row.ms_p50:
            key = schema.key(vars(row), [name for name in schema.TASK if name != "provider"])
            comparisons.setdefault(key, []).append(row)
    listed = []
    for compared in comparisons.values():
        # other ways to run us ("fast launch", "sgd") are no rivals
        ours = [row for row in compared if whose(row.provider) == found.provider]
        others = [row for row in compared if not _is_ours(found, row)]
        if ours and others:
            best = min(others, key=lambda row: row.ms_p50 or 0.0)
            listed.append(Speed(ours[0], whose(best.provider), best))
    return sorted(listed, key=lambda speed: speed.ratio)


def _label(row: Measurement) -> str:
    mode = {**schema.MODES, **schema.GRADIENTS, **schema.NETWORK_MODES}.get(row.mode, row.mode)
    timing = f", {TIMED[row.timing]}" if row.mode == "train" else ""
    return f"{row.operator} {schema.shape_label(vars(row))} {row.dtype} {mode}{timing}"


def _speeds(found: Results) -> list[str]:
    listed = speeds(found)
    if not listed:
        return ["", "## Speed", "", "Nothing was timed against a rival."]
    slower = [speed for speed in listed if speed.ratio * NOISE < 1]
    faster = [speed for speed in reversed(listed) if speed.ratio > NOISE]
    mean = float(np.exp(np.mean([np.log(speed.ratio) for speed in listed])))
    even = len(listed) - len(slower) - len(faster)
    lines = ["", f"## Slower than the fastest rival: {len(slower)} of {len(listed)}", ""]
    lines += _speed_table(slower, MOST_SLOWER) if slower else ["Nothing."]
    lines += ["", f"## Faster than the fastest rival: {len(faster)}", ""]
    lines += _speed_table(faster, MOST_FASTER) if faster else ["Nothing."]
    lines += ["", f"Geometric mean of all {len(listed)}: {mean:.2f} times as fast; {even} within 3%."]
    shown = [*slower[:MOST_SLOWER], *faster[:MOST_FASTER]]
    return lines + noise.footnotes(vars(row) for speed in shown for row in (speed.ours, speed.other))


def _speed_table(listed: Sequence[Speed], most: int) -> list[str]:
    cells = [
        (_label(s.ours), *(noise.times(vars(row)).shown(".4g") for row in (s.ours, s.other)), s.rival, f"{s.ratio:.3g}")
        for s in listed
    ]
    return _table(("what", "our ms", "rival's ms", "rival", "times as fast"), _cut(cells, most, "timings.csv"))


def _training(found: Results) -> list[str]:
    rows = [row for row in found.timings if row.mode == "train"]
    if not rows:
        return []
    cells = []
    for row in sorted(rows, key=lambda row: (row.operator, row.N)):
        times = [row.status[:60], ""]
        if row.status == OK and row.ms_p50 and row.N:
            times = [f"{row.ms_p50:.4g}", f"{1e3 * row.N / row.ms_p50:,.0f}"]
        memory, host = formatted(row.peak_memory_mb, ",.0f"), formatted(row.host_us, ",.0f")
        cells.append((row.operator, row.N, row.provider, TIMED[row.timing], *times, memory, host))
    head = ("network", "batch", "whose", "timed", "ms a step", "images/s", "peak MB", "host us")
    note = "bf16 autocast, channels_last, with Adam (SGD where it says so), random images."
    return ["", "## Training steps", "", note, "", *_table(head, cells)]


def _not_reached(found: Results) -> list[str]:
    rows: list[tuple[str, str]] = []
    for outcome in found.outcomes:
        if outcome.status != "ok" or outcome.left:
            shown = ", ".join(outcome.left[:3]) + (
                f" and {len(outcome.left) - 3} more" if len(outcome.left) > 3 else ""
            )
            rows.append((outcome.block, "; ".join(part for part in (outcome.status, shown) if part)))
    rows += [(name, why) for name, why in found.tools if why.endswith("not installed") or why.startswith(UNSUPPORTED)]
    reasons: dict[str, list[str]] = {}
    for row in found.timings:
        if row.status != OK and (not _is_ours(found, row) or row.status.startswith(UNSUPPORTED)):
            reasons.setdefault(row.status[:160], []).append(f"{_label(row)}, {row.provider}")
    rows += [
        (names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else ""), why) for why, names in reasons.items()
    ]
    if not rows:
        return ["", "## Not reached", "", "Everything was."]
    return ["", f"## Not reached: {len(rows)}", "", *_table(("what", "why"), _cut(rows, MOST_LEFT, "log.txt"))]


def _is_ours(found: Results, row: Measurement) -> bool:
    return str(row.provider).startswith(found.provider)


def _profile(found: Results) -> list[str]:
    if not found.profile:
        return []
    rows = [
        (row.kernel[:70], f"{row.calls:g}", f"{row.us:.1f}", f"{100 * row.share:.1f}",
         formatted(row.mb, ".1f"), formatted(row.gbps, ",.0f"), formatted(row.of_copy, ".0%"))
        for row in found.profile
    ]  # fmt: skip
    head = ("kernel", "calls a step", "us a step", "% of the step", "MB", "GB/s", "of the copy's")
    return ["", "## Where our training step goes", "", *_table(head, _cut(rows, 15, "profile.csv"))]


def _tools(found: Results) -> list[str]:
    return ["", "## Tools and tests", "", *_table(("what", "result"), found.tools)] if found.tools else []


def _blocks(found: Results) -> list[str]:
    rows = [(outcome.block, outcome.status, f"{outcome.seconds:.0f}") for outcome in found.outcomes]
    late = (
        f" {len(found.late)} kernels had to be compiled while measuring: {', '.join(_distinct(found.late))}."
        if found.late
        else ""
    )
    return ["", "## Blocks", "", f"{found.compiled or 'Nothing was compiled beforehand'}.{late}", "",
            *_table(("block", "result", "seconds"), rows)]  # fmt: skip


def _distinct(names: Sequence[str], most: int = 5) -> Iterator[str]:
    listed = list(dict.fromkeys(names))
    yield from listed[:most]
    if len(listed) > most:
        yield "..."
