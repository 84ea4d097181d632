"""What a run finds: timings, checks and a profile, each in a CSV that has a row as soon as it is known."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd

from perf import schema
from perf.bench.compare import CHECKS, TIMINGS
from perf.schema import Column
from tkernels.core.targets import Target

PROFILE = "profile.csv"
CHECK_COLUMNS = (
    Column("check", "text", "operator, shape, dtype, layout and how the tensors lie"),
    Column("what", "text", "the output, the tensor whose gradient it is, or the way it was run again"),
    Column("error", "number", "against the reference, relative norm"),
    Column("torch_error", "number", "the same of PyTorch in this dtype"),
    Column("max_error", "number", "largest error over the reference's largest magnitude"),
    Column("torch_max_error", "number", "the same of PyTorch in this dtype"),
    Column("reference", "text", "float64, or float32 where that did not fit in memory"),
    Column("status", "text", "ok; less exact, wrong, differs, error or crashed, with the finding"),
)
CHECK_NAMES = tuple(column.name for column in CHECK_COLUMNS)
PROFILE_COLUMNS = (
    Column("kernel", "text", "as the GPU knows it"),
    Column("calls", "number", "a step"),
    Column("us", "number", "microseconds a step, all calls together"),
    Column("share", "number", "of the step's time on the device"),
    Column("mb", "number", "10^6 bytes a step that a count of its arguments gives; empty for what is not ours"),
    Column("gbps", "number", "mb / us, in 10^9 bytes a second"),
    Column("of_copy", "number", "gbps over the large copy's: near 1 it is bound by memory and as fast as that"),
)
PROFILE_NAMES = tuple(column.name for column in PROFILE_COLUMNS)


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
        self.timings: list[dict[str, Any]] = []
        self.checks: list[dict[str, Any]] = []
        self.profile: list[dict[str, Any]] = []
        self.bytes: dict[str, float] = {}
        self.compiled = ""
        self.late: list[str] = []
        self.tools: list[tuple[str, str]] = []
        self.failures: list[Failure] = []
        self.outcomes: list[Outcome] = []
        self._writers = {
            TIMINGS: schema.Writer(out / TIMINGS),
            CHECKS: schema.Writer(out / CHECKS, CHECK_NAMES),
        }

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()

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

    def _take_timing(self, block: str, what: dict[str, Any]) -> None:
        self.timings.append({**dict.fromkeys(schema.NAMES), **what})
        self._writers[TIMINGS].append(what)

    def _take_check(self, block: str, what: dict[str, Any]) -> None:
        self.checks.append({**dict.fromkeys(CHECK_NAMES), **what})
        self._writers[CHECKS].append(what)

    def _take_bytes(self, block: str, what: dict[str, float]) -> None:
        self.bytes = what

    def _take_profile(self, block: str, what: list[dict[str, Any]]) -> None:
        self.profile = [{**row, **self._traffic(row)} for row in what]
        schema.write(pd.DataFrame(self.profile, columns=list(PROFILE_NAMES)), self.out / PROFILE)

    def _traffic(self, row: dict[str, Any]) -> dict[str, Any]:
        moved = self.bytes.get(row["kernel"])
        if moved is None:
            return {"mb": None, "gbps": None, "of_copy": None}
        rate = moved / row["us"] / 1e3
        copy = next((t["gbps"] for t in self.timings if t["operator"] == "copy"), None)
        return {"mb": moved / 1e6, "gbps": rate, "of_copy": rate / copy if copy else None}

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
        own = [row for row in self.profile if row["mb"] is not None]
        return tuple(row["kernel"] for row in sorted(own, key=lambda row: -row["us"])[:count])
