"""One model as it is, fused and compiled, in turns in one process.

A training step is forward, cross entropy against targets that stay the same, backward, the optimizer's step if one is
asked for, and zero_grad(set_to_none=True); inference is forward in evaluation without autograd. Parameters are float32,
bf16 is autocast's. Everyone has a model of its own with the same parameters. Eager competes twice: how far its two
times are apart is what a ratio can be off by.

In inference every output is compared with the float64 model's; a training step draws its own dropout, its values are
the tests' affair.
"""

from __future__ import annotations

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
from perf import operators, options, schema
from perf.bench import machine, measure, network
from perf.bench.measure import Sample
from perf.bench.model.names import Build
from perf.providers import BASELINE, OURS
from perf.schema import Column

COMPILED, AGAIN = network.COMPILED, f"{BASELINE} again"
# seconds that a turn takes at least: short calls are made several times
TURN = 0.03
WARM_CALLS = 2
PROFILED_CALLS = 5
LEARNING_RATE = 1e-4
# what a model's row has besides a sweep's columns
OWN = (
    Column("optimizer", "text", "train: whose step is part of the training step; empty: none"),
    Column("vs_torch_p25", "number", "torch's time over this provider's in the same round, 25th percentile; above 1 "
           "this provider is ahead; of 'torch again', eager once more, it is the noise"),
    Column("vs_torch_p50", "number", "the same, median"),
    Column("vs_torch_p75", "number", "the same, 75th percentile"),
    Column("first_call_s", "number", "seconds until the first call had returned, fuse() or compile() included"),
    Column("guard_us", "number", "microseconds a call in which Dynamo checks its guards, among the other work"),
    Column("graphs", "whole", "graphs Dynamo captured at the first call"),
    Column("graphs_second", "whole", "graphs it captured more at a second batch size; tkernels only"),
    Column("graphs_third", "whole", "graphs it captured more at a third batch size; tkernels only"),
    Column("fused", "whole", "chains of layers that run fused; tkernels only"),
    Column("left", "whole", "chains that were left to PyTorch; tkernels only"),
    Column("breaks", "whole", "places at which Dynamo broke the graph; tkernels only"),
)  # fmt: skip
COLUMNS = (*schema.COLUMNS, *OWN)
NAMES = tuple(column.name for column in COLUMNS)


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
            "allocator": "shared" if self.device == "cpu" else "", "optimizer": self.optimizer if self.trains else None,
        }  # fmt: skip


class Effort(NamedTuple):
    """Rounds, seconds after which they end, and whether torch.compile competes."""

    rounds: int
    seconds: float
    compiled: bool


class Measured(NamedTuple):
    """A row for each provider, and tkernels.explain's report in words."""

    rows: list[dict[str, Any]]
    report: str


class Rival:
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
    model.compile()


def _fuse(model: nn.Module) -> None:
    tkernels.fuse(model)


def _leave(model: nn.Module) -> None:
    """Eager."""


def providers(compiled: bool) -> dict[str, Callable[[nn.Module], None]]:
    """Who competes, and what is done to its model. Both eager ones have their turn after another one's model."""
    others = {COMPILED: _compile} if compiled else {}
    return {BASELINE: _leave, OURS: _fuse, AGAIN: _leave, **others}


def measured(task: Task, build: Build, effort: Effort, at: Callable[[int], None] = lambda number: None) -> Measured:
    """Measure everyone; whatever one raises becomes its row's status. ``at``: told whose turn it is, by number."""
    torch._dynamo.reset()
    gc.collect()
    found: dict[str, dict[str, Any]] = {}
    rivals: dict[str, Rival] = {}
    report = ""
    competing = providers(effort.compiled)
    number = {name: i for i, name in enumerate(competing)}
    for name, prepare in competing.items():
        at(number[name])
        found[name] = {"status": schema.OK}
        try:
            rival = Rival(task, build)
            found[name] |= _first_call(rival, prepare)
            if name == OURS:
                # as it is now: other batch sizes will add graphs of their own
                made = tkernels.explain(rival.model)
                found[name] |= {"fused": len(made.fused), "left": len(made.left), "breaks": len(made.breaks)}
                report = str(made)
            rivals[name] = rival
        except Exception as error:  # a row of the report; the others go on
            found[name]["status"] = measure.failure(error)
    if rivals and not task.trains:
        _judge(task, build, rivals, found)
    try:
        turn = {name: _turn(task, rival, functools.partial(at, number[name])) for name, rival in rivals.items()}
        samples = measure.rounds(turn, effort.rounds, effort.seconds)
    except Exception as error:
        for name in rivals:
            found[name]["status"] = measure.failure(error)
        rivals, samples = {}, {}
    for name, taken in samples.items():
        at(number[name])
        found[name] |= _times(taken, samples)
        if name != AGAIN:
            found[name]["peak_memory_mb"] = _peak_mb(task, rivals[name])
    if OURS in rivals:
        at(number[OURS])
        try:
            found[OURS] |= _dynamos_part(task, rivals[OURS])
        except Exception as error:
            found[OURS]["status"] = measure.failure(error)
    head = {**machine.stamp(), **machine.facts(task.device), **task.columns()}
    return Measured([{**head, "provider": name, **columns} for name, columns in found.items()], report)


def _first_call(rival: Rival, prepare: Callable[[nn.Module], None]) -> dict[str, Any]:
    before, start = _graphs(), time.perf_counter()
    prepare(rival.model)
    rival.step()
    _wait(rival.images().device)
    return {"first_call_s": time.perf_counter() - start, "graphs": _graphs() - before}


def _judge(task: Task, build: Build, rivals: dict[str, Rival], found: dict[str, dict[str, Any]]) -> None:
    """Errors against the float64 model, and the status of who is much further away than PyTorch."""
    try:
        exact = _flat(Rival(task, build, torch.float64).outputs())
    except Exception as error:
        print(f"note: {task.name} does not run in float64, outputs are not compared: {measure.failure(error)}")
        return
    errors = {name: measure.relative(_flat(rival.outputs()), exact) for name, rival in rivals.items()}
    for name, own in errors.items():
        torchs = errors.get(BASELINE, 0.0)
        wrong = measure.too_far("output", own, torchs, operators.DTYPES[task.dtype])
        found[name] |= {"err_fp64": own, "torch_err_fp64": torchs, "status": wrong or schema.OK}


def _flat(outputs: Iterable[Tensor]) -> Tensor:
    return torch.cat([output.double().flatten() for output in outputs])


def _turn(task: Task, rival: Rival, begins: Callable[[], None]) -> Callable[[], Sample]:
    """``begins``: called at the beginning of each."""
    begins()
    for _ in range(WARM_CALLS):
        start = time.perf_counter()
        rival.step()
        _wait(task.device)
        once = time.perf_counter() - start
    repeats = max(1, round(TURN / max(once, 1e-6)))

    def calls() -> None:
        for _ in range(repeats):
            rival.step()
        _wait(task.device)

    def turn() -> Sample:
        begins()
        taken = measure.sample(calls, 1)
        return taken._replace(ms=taken.ms / repeats, page_faults=taken.page_faults / repeats)

    return turn


def _times(taken: list[Sample], samples: dict[str, list[Sample]]) -> dict[str, Any]:
    timing = measure.timing(taken, samples.get(OURS))
    columns: dict[str, Any] = timing.columns()
    eager = samples.get(BASELINE)
    if eager:
        versus = measure.timing(eager, taken)
        columns |= dict(zip(("vs_torch_p25", "vs_torch_p50", "vs_torch_p75"), versus.ratio or ()))
        columns["speedup_vs_torch"] = versus.ms[1] / timing.ms[1]
    return columns


def _peak_mb(task: Task, rival: Rival) -> float | None:
    """Of a call, above what stands between calls."""
    if task.device == "cpu":
        peak = network.peak_bytes(rival.step)
        return None if peak is None else peak / 1e6
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rival.step()
    _wait(task.device)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def _dynamos_part(task: Task, rival: Rival) -> dict[str, Any]:
    """What the fused model's guards cost, and whether it is captured again for other batch sizes."""
    columns: dict[str, Any] = {"guard_us": guard_us(rival.step)}
    second = max(task.batch // 2, 2) if task.batch > 2 else task.batch + 1
    third = second + 1 if second + 1 != task.batch else second + 2
    for column, batch in (("graphs_second", second), ("graphs_third", third)):
        before = _graphs()
        rival.step(batch)
        columns[column] = _graphs() - before
    return columns


def guard_us(call: Callable[[], object]) -> float:
    """Microseconds a call that Dynamo looks for the graph to run, by its own mark in PyTorch's profiler: between the
    model's other work, where the objects that guards look at have left the caches."""
    # the profiler complains in stderr of a GPU that is not there
    with (
        options.environment({"KINETO_LOG_LEVEL": "5"}),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
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
