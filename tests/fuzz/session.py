"""A worker's loop over draws, and what is said of it."""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import resource
import signal
import time
from pathlib import Path

from tests.fuzz import bodies, report
from tests.fuzz.by_seed import SHARES, case_of
from tests.fuzz.cases import Case
from tests.fuzz.check import differences
from tests.fuzz.simplify import simplified

# Bytes from which on a worker makes room for another: compiled kernels stay, some 0.6 MB each.
MOST_MEMORY = 4 << 30
# of failures of one kind so many are printed; the others are counted
PRINTED = 2
# draws of an operator from which on its fast way must have run, and what that is called, for each body
ENOUGH = 40
FAST = {
    "cpu": {"batch_norm": "pass", "cross_entropy": "pass", "conv_stage": "pass", "fused": "chain"},
    "kernels": dict.fromkeys(SHARES, "kernel"),
}


class Session:
    def __init__(self, arguments: argparse.Namespace, progress: Path, patience: float) -> None:
        self.arguments, self.progress, self.patience = arguments, progress, patience
        self.counts: collections.Counter[str] = collections.Counter()
        self.printed: collections.Counter[str] = collections.Counter()
        self.index = arguments.first

    def run(self) -> bool:
        """Whether the time, or the draws, are over: else another worker is to go on at the next index."""
        arguments, end = self.arguments, time.monotonic() + 60 * self.arguments.minutes
        try:
            if arguments.only is not None:
                self.index = arguments.only
                self.draw()
                return True
            while time.monotonic() < end and (arguments.draws is None or self.index < arguments.draws):
                self.draw()
                self.index += 1
                if _resident() > MOST_MEMORY:
                    return False
        except KeyboardInterrupt:
            pass
        finally:
            self.save()
        return True

    def draw(self) -> None:
        self.save()
        case = case_of(self.arguments.seed, self.index, self.arguments.body, self.arguments.op)
        faulthandler.dump_traceback_later(self.patience, exit=True)
        before = _fast()
        told = differences(case)
        faulthandler.cancel_dump_traceback_later()
        self.counts[f"draw {case.operator}"] += 1
        for kind, n in (_fast() - before).items():
            self.counts[f"fast {case.operator} {kind}"] += n
        self.counts.update(told.events)
        if told.differences:
            self.failed(case, told.differences)

    def failed(self, case: Case, found: list[tuple[str, str]]) -> None:
        self.counts["failures"] += 1
        key = f"{case.operator}: {' '.join(found[0][0].split()[:3])}"
        self.counts[f"kind {key}"] += 1
        self.printed[key] += 1
        if self.printed[key] > PRINTED and self.arguments.only is None:
            return
        faulthandler.dump_traceback_later(self.patience, exit=True)
        if not self.arguments.as_drawn:
            first = found[0][0]
            simpler = simplified(case, lambda c: first in [kind for kind, _ in differences(c).differences])
            if simpler is not case:
                case, found = simpler, differences(simpler).differences or found
        faulthandler.cancel_dump_traceback_later()
        name = f"{case.operator}_{self.arguments.seed}_{self.index}"
        print(report.test_of(case, name, command(self.arguments, self.index), found), flush=True)

    def save(self) -> None:
        state = {"index": self.index, "counts": self.counts, "ran": bodies.RAN}
        self.progress.write_text(json.dumps(state))


def _resident() -> int:
    """Bytes of this process in memory; 0 where nobody tells. (Not getrusage's maximum: a child begins with its
    parent's.)"""
    told = Path("/proc/self/statm")
    return int(told.read_text().split()[1]) * resource.getpagesize() if told.exists() else 0


def _fast() -> collections.Counter[str]:
    found: collections.Counter[str] = collections.Counter()
    for name, n in bodies.RAN.items():
        found[name.partition(" ")[0]] += n
    return found


def command(arguments: argparse.Namespace, index: int) -> str:
    op = f" --op {','.join(arguments.op)}" if arguments.op else ""
    return f"python -m tests.fuzz --body {arguments.body} --seed {arguments.seed}{op} --only {index}"


def died(arguments: argparse.Namespace, index: int, code: int) -> str:
    """The test of a draw at which the process died, or hung until it was ended."""
    case = case_of(arguments.seed, index, arguments.body, arguments.op)
    what = f"the process died by {signal.Signals(-code).name}" if code < 0 else f"the process ended with {code}"
    name = f"{case.operator}_{arguments.seed}_{index}"
    return report.test_of(case, name, command(arguments, index), [("crash", what)])


def conclude(
    arguments: argparse.Namespace, counts: collections.Counter[str], ran: collections.Counter[str], seconds: float,
    broken: int,
) -> int:  # fmt: skip
    """Say what ran. Returns the exit status."""
    kinds = {key[5:]: n for key, n in counts.items() if key.startswith("kind ")}
    for key, n in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"{n} x {key}")
    idle = [] if arguments.only is not None else _idle(arguments.body, counts)
    if idle:
        print(f"the fast way never ran in draws of {', '.join(idle)}")
    gone = bodies.missing() if arguments.body == "cpu" else []
    if gone:
        print(f"thresholds that the library no longer has (tests/fuzz/bodies.py): {', '.join(gone)}")
    print(report.summary(counts, ran, seconds, arguments.body), flush=True)
    if counts["failures"] or broken:
        return 1
    return 2 if idle or gone or not counts["calls"] else 0


def _idle(body: str, counts: collections.Counter[str]) -> list[str]:
    """Operators that were drawn often enough and never went their fast way."""
    return [
        name
        for name, kind in FAST[body].items()
        if counts[f"draw {name}"] >= ENOUGH and not counts[f"fast {name} {kind}"]
    ]
