"""What a run finds: timings, checks and a profile, each in a CSV that has a row as soon as it is known."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd

from perf import schema
from perf.bench import rows
from perf.bench.compare import CHECKS, TIMINGS
from perf.schema import Measurement, Row, number, text
from tkernels.core.targets import Target

PROFILE = "profile.csv"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckRow(Row):
    """What checks.csv has of a result."""

    check: str = text("operator, shape, dtype, layout and how the tensors lie")
    what: str = text("the output, the tensor whose gradient it is, or the way it was run again")
    error: float | None = number("against the reference, relative norm")
    torch_error: float | None = number("the same of PyTorch in this dtype")
    max_error: float | None = number("largest error over the reference's largest magnitude")
    torch_max_error: float | None = number("the same of PyTorch in this dtype")
    reference: str = text("float64, or float32 where that did not fit in memory")
    status: str = text("ok; less exact, wrong, differs, error or crashed, with the finding")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileRow(Row):
    """What profile.csv has of a kernel."""

    kernel: str = text("as the GPU knows it")
    calls: float = number("a step")
    us: float = number("microseconds a step, all calls together")
    share: float = number("of the step's time on the device")
    mb: float | None = number("10^6 bytes a step that a count of its arguments gives; empty for what is not ours")
    gbps: float | None = number("mb / us, in 10^9 bytes a second")
    of_copy: float | None = number("gbps over the large copy's: near 1 it is bound by memory and as fast as that")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a block ended: 'ok' or why not. ``left``: its items that were not reached."""

    block: str
    status: str
    seconds: float
    left: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Failure:
    """An item that raised ('error: ...'), or took its process down ('crashed: ...')."""

    block: str
    item: str
    status: str


class Results:
    """Takes what the measuring processes tell, by kind, and writes it down."""

    def __init__(self, out: Path, provider: str) -> None:
        self.out, self.provider = out, provider
        self.facts: dict[str, str] = {}
        self.target: Target | None = None
        self.timings: list[Measurement] = []
        self._speedups = rows.Speedups()
        self.checks: list[CheckRow] = []
        self.profile: list[ProfileRow] = []
        self.bytes: dict[str, float] = {}
        self.compiled = ""
        self.late: list[str] = []
        self.tools: list[tuple[str, str]] = []
        self.failures: list[Failure] = []
        self.outcomes: list[Outcome] = []
        self._timings, self._checks = schema.Writer(out / TIMINGS), schema.Writer(out / CHECKS, CheckRow)

    def close(self) -> None:
        """Close the files."""
        self._timings.close()
        self._checks.close()

    def take(self, block: str, kind: str, what: Any) -> None:
        """One thing told. Raises ValueError for a kind that does not exist."""
        take = getattr(self, f"_take_{kind}", None)
        if take is None:
            raise ValueError(f"block {block} tells {kind!r}, which is no kind of result")
        take(block, what)

    def _take_facts(self, block: str, what: dict[str, str]) -> None:
        self.facts |= what

    def _take_target(self, block: str, what: Target) -> None:
        self.target = what

    def _take_timing(self, block: str, what: Measurement) -> None:
        row = self._speedups.filled(what)
        self.timings.append(row)
        self._timings.append(row)

    def _take_check(self, block: str, what: CheckRow) -> None:
        self.checks.append(what)
        self._checks.append(what)

    def _take_bytes(self, block: str, what: dict[str, float]) -> None:
        self.bytes = what

    def _take_profile(self, block: str, what: list[ProfileRow]) -> None:
        self.profile = [self._with_bytes(row) for row in what]
        frame = pd.DataFrame(map(vars, self.profile), columns=list(ProfileRow.names()))
        schema.write(frame, self.out / PROFILE)

    def _with_bytes(self, row: ProfileRow) -> ProfileRow:
        moved = self.bytes.get(row.kernel)
        if moved is None:
            return row
        rate = moved / row.us / 1e3
        copy = next((t.gbps for t in self.timings if t.operator == "copy"), None)
        return row.having(mb=moved / 1e6, gbps=rate, of_copy=rate / copy if copy else None)

    def _take_compiled(self, block: str, what: str) -> None:
        self.compiled = what

    def _take_late(self, block: str, what: str) -> None:
        self.late.append(what)

    def _take_tool(self, block: str, what: tuple[str, str]) -> None:
        self.tools.append(what)

    def _take_failed(self, block: str, what: tuple[str, str]) -> None:
        self.failures.append(Failure(block, *what))

    def slowest(self, count: int = 5) -> tuple[str, ...]:
        """The kernels of ours that take most of a step."""
        own = [row for row in self.profile if row.mb is not None]
        return tuple(row.kernel for row in sorted(own, key=lambda row: -row.us)[:count])
