"""Does it matter for the result which kernels compute it? ``python -m models.seeds`` trains the fused and the plain
network in float32 and in bfloat16, each from several seeds, and prints the accuracies beside what seeds alone change.

Exit status: 0; 1 where the mean accuracies of two ways differ by more than a way's seeds do (largest less smallest);
that of python -m models.train where a run failed.
"""

from __future__ import annotations

import csv
import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from models import checkpoint, train
from models.arguments import IntArgument, Parser

PROGRAM = "python -m models.seeds"
MODELS, DTYPES = ("fused", "plain"), {"fp32": "off", "bf16": "bf16"}


class Way(NamedTuple):
    """A way to train, and the validation accuracy that each seed came to with it."""

    model: str
    dtype: str
    accuracies: list[float]

    @property
    def spread(self) -> float:
        return max(self.accuracies) - min(self.accuracies)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = Parser(
        prog=PROGRAM,
        description="Train fused and plain networks in float32 and bfloat16 from several seeds and compare accuracies; "
        "options that are not named here go to python -m models.train.",
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=IntArgument(2), default=5, metavar="N", help="0 to N - 1 (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"), metavar="DIR",
        help="a folder a run, and seeds.csv with a line each (default: runs/seeds)")  # fmt: skip
    args, rest = parser.parse_known_args(argv)
    for name in ("--model", "--amp", "--seed"):
        if any(given.partition("=")[0] == name for given in rest):
            parser.error(f"argument {name}: this is what is compared")
    ways = []
    for model, dtype in itertools.product(MODELS, DTYPES):
        ways.append(Way(model, dtype, []))
        for seed in range(args.seeds):
            out = args.out / f"{model}-{dtype}-{seed}"
            line = ["--model", model, "--amp", DTYPES[dtype], "--seed", str(seed), "--out", str(out), *rest]
            status = train.main(line)
            if status:
                return status
            ways[-1].accuracies.append(checkpoint.load(out / checkpoint.NAME)["val_acc"])
    write(ways, args.out / "seeds.csv")
    print(table(ways))
    apart = difference(ways)
    print(f"means differ by {apart:.2%} at most, seeds of one way by {max(way.spread for way in ways):.2%}")
    return int(apart > max(way.spread for way in ways))


def difference(ways: Sequence[Way]) -> float:
    """The largest difference of two ways' mean accuracies."""
    means = [statistics.fmean(way.accuracies) for way in ways]
    return max(means) - min(means)


def write(ways: Sequence[Way], path: Path) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("model", "dtype", "seed", "val_acc"))
        for way in ways:
            rows.writerows((way.model, way.dtype, seed, accuracy) for seed, accuracy in enumerate(way.accuracies))


def table(ways: Sequence[Way]) -> str:
    """Accuracies as a table of Markdown, a row a way."""
    seeds = range(len(ways[0].accuracies))
    lines = [f"| network | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | deviation |"]
    lines.append("|---" * (len(seeds) + 3) + "|")
    for way in ways:
        shown = " | ".join(f"{accuracy:.2%}" for accuracy in way.accuracies)
        mean, deviation = statistics.fmean(way.accuracies), statistics.stdev(way.accuracies)
        lines.append(f"| {way.model} {way.dtype} | {shown} | {mean:.2%} | {deviation:.2%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
