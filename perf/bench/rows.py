"""Rows as they are made: with what all have, and with what a row has from an earlier one."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from perf import schema
from perf.bench import machine
from perf.providers import BASELINE
from perf.schema import Measurement

M = TypeVar("M", bound=Measurement)


def made(kind: type[M], device: str, **columns: Any) -> M:
    """A row of something measured on this machine now. Raises TypeError for a column that there is not."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return kind(**{"timestamp": now, **machine.facts(device), **columns})


def whose(provider: str) -> str:
    """The provider of a row, without how perf gpu has timed it."""
    return provider.removesuffix(" graph")


class Speedups:
    """Fills in speedup_vs_torch where there were no rounds to take it from, of rows whose baseline came before.
    ``earlier``: rows of a sweep that goes on."""

    def __init__(self, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        self._ms: dict[tuple[str, ...], float] = {}
        for row in earlier:
            self._remember(row)

    def _remember(self, row: Mapping[str, Any]) -> None:
        if whose(row["provider"]) == BASELINE and not schema.is_empty(row["ms_p50"]):
            self._ms[self._measurement(row)] = row["ms_p50"]

    @staticmethod
    def _measurement(row: Mapping[str, Any]) -> tuple[str, ...]:
        return schema.key(row, [name for name in schema.KEY if name != "provider"])

    def filled(self, row: M) -> M:
        """The row with its speed-up where there is one."""
        self._remember(vars(row))
        baseline = self._ms.get(self._measurement(vars(row)))
        if row.speedup_vs_torch is not None or baseline is None or row.ms_p50 is None:
            return row
        return row.having(speedup_vs_torch=baseline / row.ms_p50)


def times_as_fast(row: Measurement, other: Measurement) -> float:
    """How many times as fast one row is as another of the same call, both timed: by their speed-ups over PyTorch, so
    that every table says what the column does; where one has none, by their medians."""
    own, rival = row.speedup_vs_torch, other.speedup_vs_torch
    if own is None or rival is None:
        own, rival = other.ms_p50, row.ms_p50
    assert own is not None
    assert rival is not None
    return own / rival
