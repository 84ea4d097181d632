"""One model as it is, fused and compiled, in turns in one process.

A training step is forward, cross entropy against targets that stay the same, backward, the optimizer's step if one is
asked for, and zero_grad(set_to_none=True); inference is forward in evaluation without autograd. Parameters are float32,
bf16 is autocast's. Everyone has a model of its own with the same parameters. Eager competes twice: how far its two
times are apart is what a ratio can be off by.

In inference every output is compared with the float64 model's; a training step draws its own dropout, its values are
the tests' affair.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import tkernels
from models import recipes
from perf import operators, schema
from perf.bench import measure, network, rows
from perf.bench.measure import Effort, Sample
from perf.bench.process import changed_environment
from perf.models import Build
from perf.providers import BASELINE, COMPILED, OURS
from perf.schema import Measurement, number, text
from tkernels.core import hardware

AGAIN = f"{BASELINE} again"
# seconds that a turn takes at least: short calls are made several times
TURN = 0.03
WARM_CALLS = 2
PROFILED_CALLS = 5
LEARNING_RATE = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelMeasurement(Measurement):
    """What perf model writes: a sweep's columns, and these."""

    optimizer: str = text("train: whose step is part of the training step; empty: none")
    first_call_s: float | None = number("seconds until the first call had returned, fuse() or compile() included")
    guard_us: float | None = number("microseconds a call in which Dynamo checks its guards, among the other work")
    graphs: int | None = number("graphs Dynamo captured at the first call")
    graphs_second: int | None = number("graphs it captured more at a second batch size; tkernels only")
    graphs_third: int | None = number("graphs it captured more at a third batch size; tkernels only")
    fused: int | None = number("chains of layers that run fused; tkernels only")
    left: int | None = number("chains that were left to PyTorch; tkernels only")
    breaks: int | None = number("places at which Dynamo broke the graph; tkernels only")


class Task(NamedTuple):
    """What is measured; a square image's ``size``."""

    name: str
    batch: int
    size: int
    dtype: str
    mode: str
    channels_last: bool
    device: str
    optimizer: str | None

    @property
    def trains(self) -> bool:
        return self.mode == "train"

    @property
    def layout(self) -> str:
        return "nhwc" if self.channels_last else "nchw"

    def columns(self) -> dict[str, Any]:
        """Its part of a row."""
        return {
            "operator": self.name, "mode": self.mode, "dtype": self.dtype, "layout": self.layout,
            "N": self.batch, "C": 3, "H": self.size, "W": self.size, "timing": "wall",
            "allocator": "shared" if self.device == "cpu" else "", "optimizer": (self.trains and self.optimizer) or "",
        }  # fmt: skip


class Measured(NamedTuple):
    """A row for each provider, and tkernels.explain's report in words."""

    rows: list[ModelMeasurement]
    report: str


class Contender:
    """A model of its own and what is timed of it."""

    def __init__(self, task: Task, build: Build, dtype: torch.dtype = torch.float32) -> None:
        self._task, self._dtype = task, dtype
        self._layout = network.LAYOUTS[task.layout]
        torch.manual_seed(0)
        self.model = build().to(task.device, dtype).to(memory_format=self._layout).train(task.trains)
        lower = operators.DTYPES[task.dtype] if dtype == torch.float32 else dtype
        kind = torch.device(task.device).type
        self._autocast = torch.autocast(kind, torch.bfloat16, enabled=lower == torch.bfloat16)
        self._images: dict[int, Tensor] = {}
        self._targets: dict[torch.Size, Tensor] = {}
        self._optimizer = None
        if task.trains and task.optimizer:
            self._optimizer = recipes.build_optimizer(task.optimizer, self.model, LEARNING_RATE, 0.9, 0.0, False)

    def step(self, batch: int | None = None) -> None:
        """What is timed, at the task's batch size unless told otherwise."""
        if not self._task.trains:
            self.outputs(batch)
            return
        with self._autocast:
            loss = self._loss(self.model(self.images(batch)))
        loss.backward()
        if self._optimizer is not None:
            self._optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def outputs(self, batch: int | None = None) -> list[Tensor]:
        """Every tensor that inference returns."""
        with torch.no_grad(), self._autocast:
            return _floats(self.model(self.images(batch)))

    def images(self, batch: int | None = None) -> Tensor:
        """The same random images at every call."""
        n, task = batch or self._task.batch, self._task
        if n not in self._images:
            drawn = torch.randn(n, 3, task.size, task.size, generator=torch.Generator().manual_seed(0))
            self._images[n] = drawn.to(task.device, self._dtype).contiguous(memory_format=self._layout)
        return self._images[n]

    def _loss(self, output: Any) -> Tensor:
        """Of all outputs with a class axis: auxiliary classifiers and maps too."""
        losses = [nn.functional.cross_entropy(scores, self._target(scores)) for scores in _floats(output)]
        return torch.stack(losses).sum()

    def _target(self, scores: Tensor) -> Tensor:
        if scores.shape not in self._targets:
            classes, shape = scores.shape[1], (scores.shape[0], *scores.shape[2:])
            drawn = torch.randint(classes, shape, generator=torch.Generator().manual_seed(0))
            self._targets[scores.shape] = drawn.to(scores.device)
        return self._targets[scores.shape]


def _floats(output: Any) -> list[Tensor]:
    found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not found:
        raise TypeError(f"the model returns {type(output).__name__} without a tensor of numbers")
    return found


def _compile(model: nn.Module) -> None:
    hardware.find_cuda()
    # (model.compile() captures nothing of a model that is an nn.Sequential in torch 2.11)
    model.forward = torch.compile(model.forward)


def _fuse(model: nn.Module) -> None:
    tkernels.fuse(model)


def _leave(model: nn.Module) -> None:
    """Eager."""


def providers(compiled: bool) -> dict[str, Callable[[nn.Module], None]]:
    """Who competes, and what is done to its model. Both eager ones have their turn after another one's model."""
    others = {COMPILED: _compile} if compiled else {}
    return {BASELINE: _leave, OURS: _fuse, AGAIN: _leave, **others}


def measured(
    task: Task, build: Build, effort: Effort, compiled: bool, at: Callable[[int], object] = lambda number: None
) -> Measured:
    """Measure everyone; whatever one raises becomes its row's status. ``at``: told whose turn it is, by number."""
    torch._dynamo.reset()
    gc.collect()
    if task.device != "cpu":
        torch.cuda.set_device(torch.device(task.device).index or 0)
    competing = providers(compiled)
    place = {name: i for i, name in enumerate(competing)}
    columns: dict[str, dict[str, Any]] = {name: {"status": schema.OK} for name in competing}
    contenders: dict[str, Contender] = {}
    report = ""
    for name, prepare in competing.items():
        at(place[name])
        try:
            contender = Contender(task, build)
            columns[name] |= _first_call(contender, prepare)
            if name == OURS:
                # as it is now: other batch sizes will add graphs of their own
                explained = tkernels.explain(contender.model)
                counts = {part: len(getattr(explained, part)) for part in ("fused", "left", "breaks")}
                columns[name] |= counts
                report = str(explained)
            contenders[name] = contender
        except Exception as error:  # a row of the report; the others go on
            columns[name]["status"] = measure.failure(error)
    if contenders and not task.trains:
        for name, judged in _judged(task, build, contenders).items():
            columns[name] |= judged
    try:
        turn = {name: _turn(task, each, functools.partial(at, place[name])) for name, each in contenders.items()}
        samples = measure.rounds(turn, effort.repetitions, effort.seconds)
    except Exception as error:
        for name in contenders:
            columns[name]["status"] = measure.failure(error)
        contenders, samples = {}, {}
    for name, taken in samples.items():
        at(place[name])
        columns[name] |= measure.timing(taken, samples.get(OURS), samples.get(BASELINE)).columns()
        if name != AGAIN:
            columns[name]["peak_memory_mb"] = _peak_mb(task, contenders[name])
    if OURS in contenders:
        at(place[OURS])
        try:
            columns[OURS] |= _dynamos_part(task, contenders[OURS])
        except Exception as error:
            columns[OURS]["status"] = measure.failure(error)
    return Measured(made(task, columns), report)


def made(task: Task, columns: dict[str, dict[str, Any]]) -> list[ModelMeasurement]:
    """A row for each provider of which there are columns."""
    return [
        rows.made(ModelMeasurement, task.device, **task.columns(), provider=name, **own)
        for name, own in columns.items()
    ]


def _first_call(contender: Contender, prepare: Callable[[nn.Module], None]) -> dict[str, Any]:
    before, start = _graphs(), time.perf_counter()
    prepare(contender.model)
    contender.step()
    _wait(contender.images().device)
    return {"first_call_s": time.perf_counter() - start, "graphs": _graphs() - before}


def _judged(task: Task, build: Build, contenders: dict[str, Contender]) -> dict[str, dict[str, Any]]:
    """Errors against the float64 model, and the status of who is much further away than PyTorch."""
    try:
        exact = _flat(Contender(task, build, torch.float64).outputs())
    except Exception as error:
        print(f"note: {task.name} does not run in float64, outputs are not compared: {measure.failure(error)}")
        return {}
    errors = {name: measure.relative(_flat(each.outputs()), exact) for name, each in contenders.items()}
    torch_error, dtype = errors.get(BASELINE, 0.0), operators.DTYPES[task.dtype]
    return {
        name: {
            "err_fp64": error,
            "torch_err_fp64": torch_error,
            "status": measure.too_far("output", error, torch_error, dtype) or schema.OK,
        }
        for name, error in errors.items()
    }


def _flat(outputs: Iterable[Tensor]) -> Tensor:
    return torch.cat([output.double().flatten() for output in outputs])


def _turn(task: Task, contender: Contender, begins: Callable[[], object]) -> Callable[[], Sample]:
    """``begins``: called at the beginning of each."""
    begins()
    for _ in range(WARM_CALLS):
        start = time.perf_counter()
        contender.step()
        _wait(task.device)
        once = time.perf_counter() - start
    repeats = max(1, round(TURN / max(once, 1e-6)))

    def calls() -> None:
        for _ in range(repeats):
            contender.step()
        _wait(task.device)

    def turn() -> Sample:
        begins()
        time.sleep(network.PAUSE)  # whoever hears of it is done with that
        taken = measure.sample(calls, 1)
        return taken._replace(ms=taken.ms / repeats, page_faults=taken.page_faults / repeats)

    return turn


def _peak_mb(task: Task, contender: Contender) -> float | None:
    """Of a call, above what stands between calls."""
    if task.device != "cpu":
        return measure.gpu_peak_mb(contender.step)
    peak = network.peak_bytes(contender.step)
    return None if peak is None else peak / 1e6


def _dynamos_part(task: Task, contender: Contender) -> dict[str, Any]:
    """What the fused model's guards cost, and whether it is captured again for other batch sizes."""
    columns: dict[str, Any] = {"guard_us": guard_us(contender.step)}
    second = max(task.batch // 2, 2) if task.batch > 2 else task.batch + 1
    third = second + 1 if second + 1 != task.batch else second + 2
    for column, batch in (("graphs_second", second), ("graphs_third", third)):
        before = _graphs()
        contender.step(batch)
        columns[column] = _graphs() - before
    return columns


def guard_us(call: Callable[[], object]) -> float:
    """Microseconds a call that Dynamo looks for the graph to run, by its own mark in PyTorch's profiler: between the
    model's other work, where the objects that guards look at have left the caches."""
    # the profiler tells on stderr that it starts and stops, and complains of a GPU that is not there
    with (
        changed_environment({"KINETO_LOG_LEVEL": "99"}),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile,
    ):
        for _ in range(PROFILED_CALLS):
            call()
    marks = (event for event in profile.events() or () if event.name == "TorchDynamo Cache Lookup")
    spent = [mark.time_range.elapsed_us() for mark in marks]
    # a call may have several, one for each graph
    return float(np.median([part.sum() for part in np.array_split(spent, PROFILED_CALLS)]))


def _graphs() -> int:
    """Graphs Dynamo captured in this process."""
    return counters["stats"]["unique_graphs"]


def _wait(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
