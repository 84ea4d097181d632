"""What got slower or less exact from one sweep's CSV, or one run of perf gpu, to another.

A row counts as slower where its median grew by more than the threshold and the two bands from p20 to p80 do not
overlap. On a CPU, where the providers took turns, what the machine did to PyTorch in the same turns is divided out
too, with PyTorch's own band as a margin; PyTorch's rows count as slower only where most of them are. A row counts
as less exact where its error against float64 grew by a quarter, and as broken where it was ok and no longer is. Of
a row that is noisy (perf/bench/noise.py) in one of the files, or in both, the table says so.

Exit status: 0 nothing got worse, 1 something did, 2 the files cannot be compared.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from perf import schema
from perf.options import Refused
from perf.providers import BASELINE

# by which factor an error must grow to count
LESS_EXACT = 1.25
# of a run of perf gpu
TIMINGS, CHECKS = "timings.csv", "checks.csv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("old", type=Path, metavar="OLD", help="a CSV of perf sweep, or a folder of perf gpu")
    add("new", type=Path, metavar="NEW", help="a later one")
    add("--threshold", type=_percent, default=0.05, metavar="PERCENT",
        help="growth of the median that counts as slower (default: 5%%)")  # fmt: skip
    add("--absolute", action="store_true", help="do not divide out what the machine did to PyTorch (CPU rows)")


def _percent(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        value = -1.0
    if not 0 <= value < 10:
        raise argparse.ArgumentTypeError(f"must be a percentage such as 5%, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Compare and print; 1 if anything got worse."""
    both = match(*(schema.read(_file(given)) for given in (args.old, args.new)))
    if both.empty:
        raise Refused(
            f"{args.old} and {args.new} have no measurement in common (the same operator, shape, device, ...)"
        )
    verdicts = judge(both, args.threshold, args.absolute)
    worse = verdicts[verdicts.verdict != ""]
    if not worse.empty:
        print(worse.to_string(index=False))
    broken = newly_wrong(args.old, args.new)
    for line in broken:
        print(line)
    noisy = int((verdicts.noisy != "").sum())
    faster = int(judge(_swapped(both), args.threshold, args.absolute).verdict.str.startswith("slower").sum())
    print(
        f"{len(both)} measurements in both files: {len(worse)} worse, {faster} faster by more than "
        f"{100 * args.threshold:g}%, beyond noise" + (f"; {noisy} noisy in one of them or both" if noisy else "")
    )
    return 1 if len(worse) or broken else 0


def newly_wrong(old: Path, new: Path) -> list[str]:
    """What two runs of perf gpu both checked and only the later one found wrong or less exact."""
    if not (old / CHECKS).exists() or not (new / CHECKS).exists():
        return []
    before, after = (schema.table(given / CHECKS).set_index(["check", "what"]).status for given in (old, new))
    both = [name for name in before.index if name in after.index and before[name] == schema.OK != after[name]]
    return [f"{check}: {what}: was ok, now {after[check, what]}" for check, what in both]


def _file(given: Path) -> Path:
    """The timings of a folder that perf gpu wrote; any other path as it is."""
    return given / TIMINGS if given.is_dir() else given


def match(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """The measurements both have, columns suffixed _old and _new; of repeated ones the last."""
    keys = list(schema.KEY)
    sides = [frame.drop_duplicates(keys, keep="last") for frame in (old, new)]
    return sides[0].merge(sides[1], on=keys, suffixes=("_old", "_new"))


def _swapped(both: pd.DataFrame) -> pd.DataFrame:
    """Old as new and new as old."""
    ends = {"_old": "_new", "_new": "_old"}
    return both.rename(columns=lambda name: name[:-4] + ends[name[-4:]] if name[-4:] in ends else name)


def judge(both: pd.DataFrame, threshold: float, absolute: bool = False) -> pd.DataFrame:
    """For each measurement: what it is, its times, their ratio, and a verdict ('' where nothing is wrong)."""
    drift, doubt = _drift(both, absolute)
    baseline_slower = _baseline_slower(both, threshold)
    rows = []
    for row, machine, margin in zip(schema.records(both), drift, doubt):
        ratio = row["ms_p50_new"] / row["ms_p50_old"] / machine
        verdict = _broken(row) or _less_exact(row)
        yardstick = row["provider"] == BASELINE and row["device"].startswith("cpu") and not absolute
        if (
            not verdict
            and ratio > 1 + threshold
            and _apart(row, machine * margin)
            and (baseline_slower or not yardstick)
        ):
            verdict = f"slower by {100 * (ratio - 1):.0f}%"
        rows.append(
            {
                **{name: row[name] for name in ("operator", "mode", "dtype", "layout")},
                "shape": schema.shape_label(row),
                **{name: row[name] for name in ("provider", "timing")},
                "old ms": _shown(row["ms_p50_old"]),
                "new ms": _shown(row["ms_p50_new"]),
                "time": ratio,
                "machine": machine,
                "noisy": " ".join(side for side in ("old", "new") if row[f"noise_{side}"]),
                "verdict": verdict,
            }
        )
    return pd.DataFrame(rows).round({"time": 3, "machine": 3})


def _shown(ms: float) -> str:
    return "" if pd.isna(ms) else f"{ms:.4g}"


def _drift(both: pd.DataFrame, absolute: bool) -> tuple[pd.Series, pd.Series]:
    """How much slower the machine was the second time, by PyTorch's medians in the same turns (1 elsewhere), and by
    which factor that may be off: half of PyTorch's own bands."""
    compared = [name for name in schema.KEY if name != "provider"]
    timed = both[(both.provider == BASELINE) & both.device.str.startswith("cpu") & (not absolute)]
    measured = timed[compared].assign(
        drift=timed.ms_p50_new / timed.ms_p50_old,
        doubt=(timed.ms_p80_new / timed.ms_p20_new * timed.ms_p80_old / timed.ms_p20_old) ** 0.25,
    )
    found = both[[*compared, "provider"]].merge(measured, on=compared, how="left").set_index(both.index)
    own = found.provider == BASELINE
    return found.drift.mask(own).fillna(1.0), found.doubt.mask(own).fillna(1.0)


def _apart(row: dict[str, Any], drift: float) -> bool:
    """Whether the new band lies wholly above the old one, with the machine's drift divided out and without."""
    return row["ms_p20_new"] / max(drift, 1.0) > row["ms_p80_old"]


def _baseline_slower(both: pd.DataFrame, threshold: float) -> bool:
    """Whether PyTorch itself got slower on the CPU: most of its rows, and clear of noise."""
    timed = both[(both.provider == BASELINE) & both.device.str.startswith("cpu")]
    slower = (timed.ms_p50_new > (1 + threshold) * timed.ms_p50_old) & (timed.ms_p20_new > timed.ms_p80_old)
    return bool(len(timed) and slower.mean() > 0.5)


def _broken(row: dict[str, Any]) -> str:
    if row["status_old"] == schema.OK and row["status_new"] != schema.OK:
        return f"was ok, now {row['status_new']}"
    return ""


def _less_exact(row: dict[str, Any]) -> str:
    if row["status_new"] != schema.OK:
        return ""
    old, new = row["err_fp64_old"], row["err_fp64_new"]
    before, now = row["torch_err_fp64_old"], row["torch_err_fp64_new"]
    # an error that PyTorch's own grew with is the machine's or the library's below
    grown = LESS_EXACT * max(1.0, now / before) if before > 0 else LESS_EXACT
    return f"error {old:.1e} -> {new:.1e}" if new > grown * old and new > now else ""
