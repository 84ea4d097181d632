"""What a sweep has to measure: one task a row of the CSV, in an order in which tasks that share work stand together."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from perf import operators, providers, schema, shapes
from perf.options import Refused
from perf.shapes import Shape, Shapes

TIMINGS = ("wall", "cudagraph")
# what is measured where the command line does not say
MODES, LAYOUTS, PROVIDERS = ("fwd", "bwd"), ("nhwc",), (providers.BASELINE, providers.OURS)
# The network, whose training steps and inference are measured as people run them; who competes there, in which layout
NETWORK, NETWORK_DTYPES = "cnn", ("fp32", "bf16")
CONTENDERS = (
    (providers.BASELINE, "nhwc"),
    (providers.OURS, "nhwc"),
    (providers.COMPILED, "nhwc"),
    (providers.COMPILED, "nchw"),
    (providers.USUAL, "nchw"),
)
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
    allocator: str = ""

    @property
    def problem(self) -> tuple[object, ...]:
        """What tasks have in common that are checked against the same reference."""
        return self.operator, self.dtype, self.layout, self.shape

    @property
    def comparison(self) -> tuple[object, ...]:
        """What tasks have in common that are timed in turns."""
        return *self.problem, self.mode, self.timing

    @property
    def process(self) -> tuple[object, ...]:
        """What tasks have in common that a process is started for."""
        return (self.operator, self.shape, self.dtype, self.mode, self.allocator) if self.allocator else ()

    @property
    def bench(self) -> tuple[object, ...]:
        """What tasks have in common that are set up together: layouts of a network compete too."""
        return self.process or self.problem

    def columns(self) -> dict[str, Any]:
        """The task's part of a row."""
        named = {name: value for name, value in vars(self).items() if name != "shape"}
        return {**named, **dict.fromkeys(schema.SHAPE_COLUMNS), **dict(self.shape)}

    def key(self) -> Key:
        return schema.key(self.columns())

    def __str__(self) -> str:
        shape = schema.shape_label(self.columns())
        parts = self.operator, self.mode, self.dtype, self.layout, shape, self.provider, self.allocator
        return " ".join(part for part in parts if part)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a command line asked for, each name checked; None: what suits the operator."""

    operators: Sequence[str]
    modes: Sequence[str] | None
    dtypes: Sequence[str] | None
    layouts: Sequence[str] | None
    shapes: Sequence[Shapes | Shape]
    providers: Sequence[str] | None
    timings: Sequence[str]
    quick: bool = False
    device: str = "cpu"
    allocators: Sequence[str] = ("default",)


def tasks(wanted: Wanted) -> list[Task]:
    """Every task wanted, operator by operator. Raises Refused for an operator that none of the shapes is for, and for
    modes of networks where there is no network or no CPU."""
    networks = [mode for mode in wanted.modes or () if mode in schema.NETWORK_MODES]
    if networks and (wanted.device != "cpu" or NETWORK not in wanted.operators):
        raise Refused(
            f"mode {networks[0]!r} is of operator {NETWORK!r} on a CPU, use {', '.join(schema.MODES)} elsewhere"
        )
    found: list[Task] = []
    for name in wanted.operators:
        listed = _shapes_of(operators.get(name), wanted)
        if not listed:
            raise Refused(
                f"none of the shapes given is for operator {name!r}, "
                f"which takes {', '.join(operators.get(name).required)}"
            )
        modes = wanted.modes or (schema.NETWORK_MODES if name == NETWORK and wanted.device == "cpu" else MODES)
        found += _in_calls(name, listed, [mode for mode in modes if mode in schema.MODES], wanted)
        if name == NETWORK:
            found += _in_comparisons(listed, [mode for mode in modes if mode in schema.NETWORK_MODES], wanted)
    return list(dict.fromkeys(found))


def _in_calls(name: str, listed: Sequence[Shape], modes: Sequence[str], wanted: Wanted) -> Iterator[Task]:
    """An operator's tasks of single calls."""
    ordered = _ordered(wanted.providers or PROVIDERS)
    dtypes = wanted.dtypes or (("fp32",) if wanted.device == "cpu" else ("bf16",))
    layouts = (wanted.layouts or LAYOUTS) if operators.get(name).images else ("",)
    for shape, dtype, layout in itertools.product(listed, dtypes, layouts):
        for mode, timing, provider in itertools.product(modes, wanted.timings, ordered):
            yield Task(name, mode, dtype, layout, tuple(shape.items()), provider, timing)


def _in_comparisons(listed: Sequence[Shape], modes: Sequence[str], wanted: Wanted) -> Iterator[Task]:
    """A network's tasks, those of a comparison together."""
    named = list(itertools.product(_ordered(wanted.providers or ()), wanted.layouts or LAYOUTS))
    contenders = named or [each for each in CONTENDERS if each[1] in (wanted.layouts or each[1])]
    dtypes = wanted.dtypes or NETWORK_DTYPES
    for shape, mode, dtype, allocator in itertools.product(listed, modes, dtypes, wanted.allocators):
        for provider, layout in contenders:
            yield Task(NETWORK, mode, dtype, layout, tuple(shape.items()), provider, "wall", allocator)


def _ordered(names: Iterable[str]) -> list[str]:
    """The baseline first: the others' speed-ups need its time."""
    return sorted(names, key=lambda name: name != providers.BASELINE)


def _shapes_of(operator: operators.Operator, wanted: Wanted) -> list[Shape]:
    found: list[Shape] = []
    for given in wanted.shapes:
        single = not any(isinstance(value, list) for value in given.values())
        if single and len(wanted.operators) > 1 and not operator.fits(given):  # type: ignore[arg-type]
            continue  # it is for one of the others
        found += [given] if single else operator.of_named(given)  # type: ignore[list-item, arg-type]
    complete = [operator.complete(shape) for shape in found]
    return shapes.distinct(operator.quick(shape) if wanted.quick else shape for shape in complete)


def missing(planned: Sequence[Task], path: Path, device: str) -> list[Task]:
    """The tasks a CSV has no row of on this device yet, and all of a comparison that is not complete: who was not there
    in the same rounds cannot be compared."""
    done = {schema.key(row) for row in schema.records(schema.read(path)) if row["device"] == device}
    broken = {task.process for task in planned if task.key() not in done} - {()}
    return [task for task in planned if task.key() not in done or task.process in broken]
