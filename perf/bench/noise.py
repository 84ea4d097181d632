"""How much a measurement's figures are to be trusted, and what a reader is told of that.

As in torch.utils.benchmark, quartiles that are a tenth of their median apart get a mark, and a louder one at a quarter.
The standard error of a median of n rounds would be smaller, by the root of n, were rounds independent of each other;
what another process does lasts for several. Where everyone takes turns, times and speed-ups are judged each for
themselves: a round that is slow for all scatters the times, not the speed-ups, which are of one round each.

Quartiles do not tell everything: a call of 0.02 ms whose second thread finds no core free takes 8 ms, the scheduler's
slice, again and again. So the time that a thread waits for a CPU is asked for too, and judged by the same shares.
"""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from perf import schema

SOME, MUCH = 0.10, 0.25
# quartiles of fewer rounds say nothing
LEAST_ROUNDS = 5
THREADS = "/proc/self/task"


class Quartiles(NamedTuple):
    """25th percentile, median and 75th percentile. ``waited``: for a CPU, as a share of the time."""

    p25: float | None
    p50: float | None
    p75: float | None
    waited: float = 0.0

    @property
    def apart(self) -> float:
        """The quartiles' distance as a share of the median; 0 where they are not known."""
        if schema.is_empty(self.p25) or schema.is_empty(self.p75) or not self.p50:
            return 0.0
        return (self.p75 - self.p25) / self.p50  # type: ignore[operator]

    @property
    def mark(self) -> str:
        """'', '!' or '!!'."""
        doubt = max(self.apart, self.waited)
        return "!!" if doubt >= MUCH else "!" if doubt >= SOME else ""

    def shown(self, form: str) -> str:
        """The median, the quartiles where they are known, and the mark."""
        if schema.is_empty(self.p50):
            return ""
        spread = "" if schema.is_empty(self.p25) else f" ({self.p25:{form}} to {self.p75:{form}})"
        return f"{self.p50:{form}}{spread} {self.mark}".rstrip()


def quartiles(samples: Iterable[float]) -> Quartiles:
    """Of samples, of which there must be one."""
    return Quartiles(*np.quantile(list(samples), (0.25, 0.5, 0.75)).tolist())


def times(row: Mapping[str, Any]) -> Quartiles:
    """A row's milliseconds."""
    return Quartiles(row["ms_p25"], row["ms_p50"], row["ms_p75"], _waited(row))


def speedup(row: Mapping[str, Any]) -> Quartiles:
    """A row's speed-up over PyTorch."""
    return Quartiles(row["speedup_p25"], row["speedup_vs_torch"], row["speedup_p75"], _waited(row))


def ratio(row: Mapping[str, Any]) -> Quartiles:
    """A row's time over tkernels'."""
    return Quartiles(row["ratio_p25"], row["ratio_p50"], row["ratio_p75"], _waited(row))


def _waited(row: Mapping[str, Any]) -> float:
    return 0.0 if schema.is_empty(row["cpu_wait_pct"]) else row["cpu_wait_pct"] / 100


def reason(row: Mapping[str, Any]) -> str:
    """Why a row's figures are to be taken with care; '' where they are not."""
    rounds, waited = row["rounds"], _waited(row)
    if not schema.is_empty(rounds) and rounds < LEAST_ROUNDS:
        return f"unknown: {rounds} round{'s' if rounds > 1 else ''}, too few for quartiles"
    compared = ratio(row) if schema.is_empty(row["speedup_p25"]) else speedup(row)
    apart = {"times": times(row).apart, "speed-up": compared.apart}
    wide = ", ".join(f"{share:.0%} ({what})" for what, share in apart.items() if share >= SOME)
    found = [f"quartiles apart by {wide} of the median"] if wide else []
    if waited >= SOME:
        found.append(f"a thread waited for a CPU {waited:.0%} of the time")
    very = "very " if max(waited, *apart.values()) >= MUCH else ""
    return f"{very}noisy: {', '.join(found)}" if found else ""


def footnotes(rows: Iterable[Mapping[str, Any]], sign: str = "! noisy, !! very noisy") -> list[str]:
    """What stands below rows of which some are marked, by ``sign``."""
    listed, notes = list(rows), []
    noisy = sum(bool(row["noise"]) for row in listed)
    if noisy:
        notes.append(
            f"{sign}: quartiles at least {SOME:.0%} ({MUCH:.0%}) of the median apart, or as much of the time waited "
            f"for a CPU: {noisy} of {len(listed)} rows (why: the CSV's column noise)"
        )
    above = collections.Counter(str(row["above_roofline"]).partition(":")[0] for row in listed)
    counts = ", ".join(f"{count} {why}" for why, count in above.items() if why)
    return [*notes, f"* above 100% of the roofline: {counts} (the CSV's column above_roofline)"] if counts else notes


def waiting() -> dict[str, int]:
    """Nanoseconds that each thread of this process has waited for a CPU so far; empty where the system does not tell
    (Linux does)."""
    found = {}
    with contextlib.suppress(OSError, IndexError):
        for thread in os.listdir(THREADS):
            # one may have ended meanwhile
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found[thread] = int(Path(THREADS, thread, "schedstat").read_bytes().split()[1])
    return found


def waited_ms(before: Mapping[str, int], after: Mapping[str, int]) -> float:
    """Milliseconds that the thread which waited longest did so in between."""
    return max((after[thread] - before.get(thread, 0) for thread in after), default=0) / 1e6
