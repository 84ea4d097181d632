"""What single operators move, forward and backward: the rows of ``python -m perf traffic --op``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

import tkernels
from perf import operators, options, plan, providers, schema, shapes
from perf.plan import Task
from perf.schema import Counted, Sizes, number, text
from perf.static import meter

PROVIDERS = ("torch", "tkernels")
# (the network is what the command counts without --op)
NAMES = tuple(name for name in operators.OPERATORS if name != "cnn")
PHASES = {"forward": "fwd", "backward": "bwd"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Which(Counted):
    operator: str = text("a name of perf/operators.py")
    dtype: str = text("bf16, fp16 or fp32: of inputs, weights and outputs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperatorTraffic(Sizes, _Which):
    """What an operator moves in a phase."""

    provider: str = text("tkernels or torch (eager)")
    phase: str = text("forward or backward")
    bytes: int | None = number(schema.BYTES)
    least_bytes: int | None = number("each operand of the operator read once, each result written once")
    workspace_bytes: int | None = number("float32 operands made and dropped within the phase")
    launches: int | None = number(schema.LAUNCHES)
    aten_calls: int | None = number(schema.ATEN_CALLS)
    saved_bytes: int | None = number("forward: distinct storages kept for backward, inputs and parameters counted")


def rows(names: Sequence[str], given: Sequence[str], dtypes: Sequence[str], target_name: str) -> list[OperatorTraffic]:
    """A row for each operator, shape, dtype, provider and phase. ``given``: shapes as perf sweep takes them. Raises
    Refused."""
    checked = options.several("operator", names, NAMES)
    options.several("dtype", dtypes, operators.DTYPES)
    wanted = plan.Wanted(checked, ["full"], dtypes, ["nhwc"], shapes.parse(given), PROVIDERS, ["wall"])
    return [row for task in plan.tasks(wanted) for row in _of_task(task, count(task, target_name))]


def count(task: Task, target_name: str) -> meter.Step:
    """Forward and backward of one operator. Those of ours must take Triton, but for what they leave to PyTorch."""
    operator = operators.get(task.operator)
    function = providers.load(task.provider).functions[task.operator]
    shape = dict(task.shape)

    def make() -> tuple[Any, list[Any]]:
        tensors = operator.tensors(shape, operators.Sources(operators.DTYPES[task.dtype], task.layout, "cpu"))
        leaves = [tensors[name].requires_grad_() for name in operator.differentiable]
        return operator.bind(function, tensors, shape, exact=False), leaves

    with tkernels.backend("triton"):
        return meter.one_call(make, target_name)


def _of_task(task: Task, counted: meter.Step) -> Iterator[OperatorTraffic]:
    itemsize = operators.DTYPES[task.dtype].itemsize
    case = OperatorTraffic(operator=task.operator, dtype=task.dtype, provider=task.provider).having(**dict(task.shape))
    for phase, mode in PHASES.items():
        saved = sum(counted.saved.values()) if phase == "forward" else 0
        calls = [call for call in counted.calls if call.phase == phase]
        least, _ = operators.get(task.operator).work(dict(task.shape), mode, itemsize)
        yield case.having(phase=phase, least_bytes=least, **meter.counts(calls, saved))


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """What is printed: a line an operator, shape, dtype and provider. The ratios are those to the least bytes."""
    frame = frame.assign(shape=[schema.shape_label(row) for row in schema.records(frame)])
    keys = ["operator", "shape", "dtype", "provider"]
    by_case = frame.groupby(keys, sort=False)
    columns: dict[str, Any] = {}
    for phase in PHASES:
        part = frame[frame.phase == phase].set_index(keys)
        columns[f"{phase} MB"] = (part.bytes / 1e6).astype(float).round(2)
        columns[f"of least {phase}"] = (part.bytes / part.least_bytes).astype(float).round(2)
    columns["workspace MB"] = (by_case.workspace_bytes.sum() / 1e6).astype(float).round(2)
    columns["saved MB"] = (by_case.saved_bytes.sum() / 1e6).astype(float).round(2)
    columns["launches"] = by_case.launches.sum()
    columns["ATen calls"] = by_case.aten_calls.sum()
    return pd.DataFrame(columns).reset_index()
