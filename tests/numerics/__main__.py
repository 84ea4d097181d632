"""``python -m tests.numerics [--csv OUT] [--gate]``: prints the table of our error and torch's; see table.py."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
from pathlib import Path

from tests.numerics import table
from tests.numerics.table import BODIES, HEADER


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.numerics", description=table.__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, metavar="OUT", help="also write the table to this file")
    parser.add_argument("--gate", action="store_true", help="exit with status 1 if a ratio is over its bound")
    options = parser.parse_args(arguments)
    name = table.gate()
    bounds = f"{table.NORM_BOUND} (norm) and {table.MAX_BOUND} (max)"
    print(f"{BODIES[name]}; relative errors against float64, ratios at most {bounds}")
    if name == "torch":
        print(
            "The Triton path is not measured here: TK_GATE=ttsem executes it on the CPU at small sizes, a GPU at full."
        )
    print(HEADER)
    rows = []
    with table.measuring(name):
        for row in table.rows(name):
            rows.append(row)
            print(row, flush=True)
    over = [row for row in rows if not row.holds]
    worst = max(rows, key=lambda row: row.norm_ratio), max(rows, key=lambda row: row.max_ratio)
    print(f"{len(rows)} rows, {len(over)} over the bound; worst norm ratio {worst[0].norm_ratio:.2f}"
          f" ({worst[0].operator} {worst[0].result}), worst max ratio {worst[1].max_ratio:.2f}"
          f" ({worst[1].operator} {worst[1].result})")  # fmt: skip
    if options.csv is not None:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(table.Row)])
            writer.writeheader()
            writer.writerows(dataclasses.asdict(row) for row in rows)
    return 1 if options.gate and over else 0


if __name__ == "__main__":
    sys.exit(main())
