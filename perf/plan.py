"""What a sweep has to measure: one task a row of the CSV, in an order in which tasks that share work stand together."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from perf import operators, schema, shapes
from perf.options import Refused
from perf.shapes import Shape, Shapes

TIMINGS = ("wall", "cudagraph")
# as pandas reads it back
Key = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """One row to be."""

    operator: str
    mode: str
    dtype: str
    layout: str
    shape: tuple[tuple[str, int], ...]
    provider: str
    timing: str

    @property
    def problem(self) -> tuple[object, ...]:
        """What tasks have in common that are checked against the same reference."""
        return self.operator, self.dtype, self.layout, self.shape

    @property
    def contest(self) -> tuple[object, ...]:
        """What tasks have in common that are timed in turns."""
        return *self.problem, self.mode, self.timing

    def columns(self) -> dict[str, Any]:
        """The task's part of a row."""
        named = {name: getattr(self, name) for name in ("operator", "mode", "dtype", "layout", "provider", "timing")}
        return {**dict.fromkeys(schema.SHAPE_COLUMNS), **dict(self.shape), **named}

    def key(self) -> Key:
        return schema.key(self.columns())

    def __str__(self) -> str:
        shape = schema.shape_label(self.columns())
        return " ".join(s for s in (self.operator, self.mode, self.dtype, self.layout, shape, self.provider) if s)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a command line asked for, each name checked."""

    operators: Sequence[str]
    modes: Sequence[str]
    dtypes: Sequence[str]
    layouts: Sequence[str]
    shapes: Sequence[Shapes | Shape]
    providers: Sequence[str]
    timings: Sequence[str]
    quick: bool = False


def tasks(wanted: Wanted) -> list[Task]:
    """Every task wanted, operator by operator. Raises Refused for an operator that none of the shapes is for."""
    found: list[Task] = []
    for name in wanted.operators:
        operator = operators.get(name)
        listed = _shapes_of(operator, wanted)
        if not listed:
            raise Refused(
                f"none of the shapes given is for operator {name!r}, which takes {', '.join(operator.required)}"
            )
        layouts = wanted.layouts if operator.images else ("",)
        problems = itertools.product(listed, wanted.dtypes, layouts)
        for shape, dtype, layout in problems:
            for mode, timing, provider in itertools.product(wanted.modes, wanted.timings, wanted.providers):
                found.append(Task(name, mode, dtype, layout, tuple(shape.items()), provider, timing))
    return list(dict.fromkeys(found))


def _shapes_of(operator: operators.Operator, wanted: Wanted) -> list[Shape]:
    found: list[Shape] = []
    for given in wanted.shapes:
        single = not any(isinstance(value, list) for value in given.values())
        if single and len(wanted.operators) > 1 and not operator.fits(given):  # type: ignore[arg-type]
            continue  # it is for one of the others
        found += [given] if single else operator.of_named(given)  # type: ignore[list-item, arg-type]
    complete = [operator.complete(shape) for shape in found]
    return shapes.distinct(operator.quick(shape) if wanted.quick else shape for shape in complete)


def missing(planned: Iterable[Task], path: Path, device: str) -> list[Task]:
    """The tasks a CSV has no row of on this device yet."""
    frame = schema.read(path)
    done = {schema.key(row) for row in schema.records(frame) if row["device"] == device}
    return [task for task in planned if task.key() not in done]


def baselines(path: Path, device: str) -> dict[Key, dict[str, Any]]:
    """Rows of the provider all others are compared with, by key."""
    frame = schema.read(path)
    rows = frame[(frame.provider == "torch") & (frame.status == schema.OK) & (frame.device == device)]
    return {schema.key(row): row for row in schema.records(rows)}
