"""What got slower or less exact from one sweep's CSV to another's.

A row counts as slower where its median grew by more than the threshold and the two bands from p20 to p80 do not
overlap. On a CPU, where the providers took turns, what the machine did to PyTorch in the same turns is divided out
first; PyTorch's own rows count as slower only where most of them are. A row counts as less exact where its error
against float64 grew by a quarter, and as broken where it was ok and no longer is.

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
MS = ("ms_p20", "ms_p50", "ms_p80")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("old", type=Path, metavar="OLD.csv")
    add("new", type=Path, metavar="NEW.csv")
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
    both = match(schema.read(args.old), schema.read(args.new))
    if both.empty:
        raise Refused(f"{args.old} and {args.new} have no measurement in common (the same operator, shape, device, ...)")
    verdicts = judge(both, args.threshold, args.absolute)
    worse = verdicts[verdicts.verdict != ""]
    if not worse.empty:
        print(worse.to_string(index=False))
    better = int((verdicts["time"] < 1 / (1 + args.threshold)).sum())
    print(
        f"{len(both)} measurements in both files: {len(worse)} worse, {better} faster by more than "
        f"{100 * args.threshold:g}% in the median"
    )
    return 1 if len(worse) else 0


def match(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """The measurements both have, columns suffixed _old and _new; of repeated ones the last."""
    keys = list(schema.KEY)
    sides = [frame.drop_duplicates(keys, keep="last") for frame in (old, new)]
    return sides[0].merge(sides[1], on=keys, suffixes=("_old", "_new"))


def judge(both: pd.DataFrame, threshold: float, absolute: bool = False) -> pd.DataFrame:
    """For each measurement: what it is, its times, their ratio, and a verdict ('' where nothing is wrong)."""
    drift = _drift(both) if not absolute else pd.Series(1.0, index=both.index)
    baseline_slower = _baseline_slower(both, threshold)
    rows = []
    for index, row in both.iterrows():
        ratio = row.ms_p50_new / row.ms_p50_old / drift[index]
        verdict = _broken(row) or _less_exact(row)
        judged_by_drift = not absolute and row.device.startswith("cpu") and row.provider == BASELINE
        slower = baseline_slower if judged_by_drift else True
        if not verdict and slower and ratio > 1 + threshold and _apart(row, drift[index]):
            verdict = f"slower by {100 * (ratio - 1):.0f}%"
        rows.append(
            {
                "operator": row.operator,
                "mode": row["mode"],
                "dtype": row.dtype,
                "layout": row.layout,
                "shape": schema.shape_label(row),
                "provider": row.provider,
                "timing": row.timing,
                "old ms": _shown(row.ms_p50_old),
                "new ms": _shown(row.ms_p50_new),
                "time": ratio,
                "machine": drift[index],
                "verdict": verdict,
            }
        )
    return pd.DataFrame(rows).round({"time": 3, "machine": 3})


def _shown(ms: float) -> str:
    return "" if pd.isna(ms) else f"{ms:.4g}"


def _drift(both: pd.DataFrame) -> pd.Series:
    """How much slower the machine was the second time: PyTorch's ratio of medians in the same turns, 1 elsewhere."""
    contest = [name for name in schema.KEY if name != "provider"]
    timed = both[(both.provider == BASELINE) & both.device.str.startswith("cpu")]
    ratios = (timed.ms_p50_new / timed.ms_p50_old).groupby([timed[name] for name in contest], dropna=False).first()
    found = both[contest].merge(ratios.rename("drift").reset_index(), on=contest, how="left").drift
    found.index = both.index
    return found.where(both.provider != BASELINE, 1.0).fillna(1.0)


def _apart(row: Any, drift: float) -> bool:
    """Whether the new band lies wholly above the old one."""
    return row.ms_p20_new / drift > row.ms_p80_old


def _baseline_slower(both: pd.DataFrame, threshold: float) -> bool:
    """Whether PyTorch itself got slower on the CPU: most of its rows, and clear of noise."""
    timed = both[(both.provider == BASELINE) & both.device.str.startswith("cpu")]
    slower = (timed.ms_p50_new > (1 + threshold) * timed.ms_p50_old) & (timed.ms_p20_new > timed.ms_p80_old)
    return bool(len(timed) and slower.mean() > 0.5)


def _broken(row: Any) -> str:
    if row.status_old == schema.OK and row.status_new != schema.OK:
        return f"was ok, now {row.status_new}"
    return ""


def _less_exact(row: Any) -> str:
    old, new = row.err_fp64_old, row.err_fp64_new
    # an error that PyTorch's own grew with is the library's below or the machine's
    yardstick = max(1.0, row.torch_err_fp64_new / row.torch_err_fp64_old) if row.torch_err_fp64_old > 0 else 1.0
    if row.status_new == schema.OK and new > LESS_EXACT * yardstick * old and new > row.torch_err_fp64_new:
        return f"error {old:.1e} -> {new:.1e}"
    return ""
