"""The process that measures. It sends rows to its parent, and tells which task it is at, so that the parent can write
a row for a task that takes the whole process down."""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from multiprocessing.connection import Connection

import torch

from perf import operators, providers, schema
from perf.bench import measure, network, process, rows
from perf.bench.measure import Check, Effort, Problem, Subject, Timing
from perf.plan import Task
from perf.schema import Measurement

Numbered = tuple[int, Task]
Rows = Iterator[tuple[int, Measurement]]


def main(parent: Connection, todo: Sequence[Numbered], device: str, effort: Effort) -> None:
    """Measure tasks in order: send the number of the one at hand, (number, row) of each, and None at the end."""
    try:
        if device != "cpu":
            # "cuda" alone has no index, which set_device wants
            torch.cuda.set_device(torch.device(device).index or 0)
        for _, grouped in groupby(todo, key=lambda item: item[1].bench):
            group = list(grouped)
            parent.send(group[0][0])
            if group[0][1].mode in schema.NETWORK_MODES:
                measured = network.Comparison(group, effort, parent.send).rows()
            else:
                measured = _Bench(group, device, effort, parent.send).rows()
            for row in measured:
                parent.send(row)
        parent.send(None)
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(1)  # the parent is gone, or going
    except Exception:
        traceback.print_exc()
        os._exit(process.BROKEN_GPU if device != "cpu" and not process.gpu_answers() else 1)


class _Bench:
    """The tasks of one problem: every provider is checked once, then timed in each mode. ``at``: told a task's number
    when its turn comes."""

    def __init__(self, todo: Sequence[Numbered], device: str, effort: Effort, at: Callable[[int], None]) -> None:
        self._todo, self._device, self._effort, self._at = todo, device, effort, at
        first = todo[0][1]
        operator = operators.get(first.operator)
        self._problem = Problem(operator, dict(first.shape), operators.DTYPES[first.dtype], first.layout, device)
        self._providers: dict[str, providers.Provider] = {}
        self._checks: dict[str, Check] = {}
        self._torch_errors: dict[str, float] = {}

    def rows(self) -> Rows:
        names = dict.fromkeys(task.provider for _, task in self._todo)
        try:
            reference = measure.Reference(self._problem)
        except Exception as error:
            self._gpu_must_answer(error)
            status = measure.failure(error)
            self._checks = {name: Check(f"{status} (in PyTorch's reference)") for name in names}
            yield from ((number, self._row(task, None)) for number, task in self._todo)
            return
        self._torch_errors = reference.torch_errors
        if self._device == "cpu":
            for name in names:
                self._check(name, reference)
            for _, group in groupby(self._todo, key=lambda item: item[1].comparison):
                yield from self._in_turns(list(group))
            return
        # a row as soon as its provider is measured
        for name in names:
            self._check(name, reference)
            yield from self._one_by_one([item for item in self._todo if item[1].provider == name])

    def _check(self, name: str, reference: measure.Reference) -> None:
        self._at(next(number for number, task in self._todo if task.provider == name))
        try:
            self._providers[name] = providers.load(name)
        except Exception as error:  # a module of the user's may raise anything when imported
            self._checks[name] = Check(measure.failure(error))
            return
        self._checks[name] = reference.check(self._providers[name])
        if not self._checks[name].errors:
            self._gpu_must_answer(None)

    def _gpu_must_answer(self, error: Exception | None) -> None:
        if self._device != "cpu" and not process.gpu_answers():
            raise RuntimeError("the GPU no longer answers") from error

    def _prepared(self, task: Task) -> Callable[[], object]:
        """The call to time, made once."""
        call = Subject(self._problem, self._providers[task.provider], exact=False).call(task.mode)
        call()
        return call

    def _in_turns(self, group: list[Numbered]) -> Rows:
        """Time the providers of one mode on the CPU."""
        calls: dict[str, Callable[[], object]] = {}
        found: dict[str, Timing | str] = {}
        for number, task in group:
            if self._checks[task.provider].status != schema.OK:
                continue
            self._at(number)
            if task.timing == "cudagraph":
                found[task.provider] = "unsupported: a CPU has no CUDA graphs"
                continue
            try:
                calls[task.provider] = self._prepared(task)
            except Exception as error:
                found[task.provider] = measure.failure(error)
        found |= measure.interleaved(calls, self._effort) if calls else {}
        for number, task in group:
            yield number, self._row(task, found.get(task.provider))

    def _one_by_one(self, todo: list[Numbered]) -> Rows:
        """Time one provider on the GPU in every mode."""
        for number, task in todo:
            found: Timing | str | None = None
            if self._checks[task.provider].status == schema.OK:
                self._at(number)
                try:
                    with self._providers[task.provider].context():
                        found = measure.on_gpu(functools.partial(self._prepared, task), task.timing, self._effort)
                except Exception as error:
                    found = measure.failure(error)
                    self._gpu_must_answer(error)
            yield number, self._row(task, found)

    def _row(self, task: Task, found: Timing | str | None) -> Measurement:
        """``found``: a time, why there is none, or None where the check says why."""
        check = self._checks[task.provider]
        timing = found if isinstance(found, Timing) else None
        return rows.made(
            Measurement,
            self._device,
            **task.columns(),
            config=check.config.get(task.mode, ""),
            err_fp64=check.errors.get(task.mode),
            torch_err_fp64=self._torch_errors.get(task.mode),
            status=found if isinstance(found, str) else check.status,
            **measure.rates(self._problem, task.mode, timing),
            **(timing.columns() if timing else {}),
        )
