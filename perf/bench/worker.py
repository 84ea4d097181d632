"""The process that measures. It sends rows to its parent, and tells which task it is at, so that the parent can write
a row for a task that takes the whole process down."""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from multiprocessing.connection import Connection
from typing import Any

import torch

from perf import operators, providers, schema
from perf.bench import machine, measure, network
from perf.bench.measure import Check, Effort, Problem, Subject, Timing
from perf.plan import Task

# exit status of a worker whose GPU no longer answers
BROKEN_GPU = 70
READY = "ready"


def main(todo: Sequence[tuple[int, Task]], device: str, effort: Effort, rows: Connection, current: Any) -> None:
    """Measure numbered tasks in order, sending READY, (number, row) and None; ``current``: the task at hand."""
    try:
        if device != "cpu":
            # "cuda" alone has no index, which set_device wants
            torch.cuda.set_device(torch.device(device).index or 0)
        rows.send(READY)
        for _, group in groupby(todo, key=lambda item: item[1].bench):
            for row in _rows(list(group), device, effort, rows, current):
                rows.send(row)
        rows.send(None)
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(1)  # the parent is gone, or going
    except Exception:
        traceback.print_exc()
        os._exit(BROKEN_GPU if device != "cpu" and not _gpu_answers() else 1)


def _rows(
    todo: list[tuple[int, Task]], device: str, effort: Effort, rows: Connection, current: Any
) -> Iterator[tuple[int, dict[str, Any]]]:
    if todo[0][1].mode in schema.NETWORK_MODES:
        # it takes minutes before it has a row
        return network.Contest(todo, effort, current, alive=lambda: rows.send(READY)).rows()
    return _Bench(todo, device, effort, current).rows()


def _gpu_answers() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


class _Bench:
    """The tasks of one problem: every provider is checked once, then timed in each mode."""

    def __init__(self, todo: list[tuple[int, Task]], device: str, effort: Effort, current: Any) -> None:
        self._todo, self._device, self._effort, self._current = todo, device, effort, current
        first = todo[0][1]
        operator = operators.get(first.operator)
        self._problem = Problem(operator, dict(first.shape), operators.DTYPES[first.dtype], first.layout, device)
        self._providers: dict[str, providers.Provider] = {}
        self._checks: dict[str, Check] = {}
        self._torch_errors: dict[str, float] = {}
        self._baselines: dict[tuple[object, ...], Timing] = {}

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        names = list(dict.fromkeys(task.provider for _, task in self._todo))
        try:
            reference = measure.Reference(self._problem)
        except Exception as error:
            self._gpu_must_answer(error)
            status = measure.failure(error)
            self._checks = {name: Check(f"{status} (in PyTorch's reference)") for name in names}
            for number, task in self._todo:
                yield number, self._row(task, None, None)
            return
        self._torch_errors = reference.torch_errors
        if self._device == "cpu":
            for name in names:
                self._check(name, reference)
            for _, group in groupby(self._todo, key=lambda item: item[1].contest):
                yield from self._in_turns(list(group))
            return
        # a row as soon as its provider is measured; the baseline first, for the others' speedups
        for name in sorted(names, key=lambda name: name != providers.BASELINE):
            self._check(name, reference)
            yield from self._one_by_one([item for item in self._todo if item[1].provider == name])

    def _check(self, name: str, reference: measure.Reference) -> None:
        self._current.value = next(number for number, task in self._todo if task.provider == name)
        try:
            self._providers[name] = providers.load(name)
        except Exception as error:  # a module of the user's may raise anything when imported
            self._checks[name] = Check(measure.failure(error))
            return
        self._checks[name] = reference.check(self._providers[name])
        if not self._checks[name].errors:
            self._gpu_must_answer(None)

    def _gpu_must_answer(self, error: Exception | None) -> None:
        if self._device != "cpu" and not _gpu_answers():
            raise RuntimeError("the GPU no longer answers") from error

    def _prepared(self, task: Task) -> Callable[[], object]:
        """The call to time, made once."""
        call = Subject(self._problem, self._providers[task.provider], exact=False).call(task.mode)
        call()
        return call

    def _in_turns(self, group: list[tuple[int, Task]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Time the providers of one mode on the CPU."""
        calls: dict[str, Callable[[], object]] = {}
        failed: dict[str, str] = {}
        for number, task in group:
            if self._checks[task.provider].status != schema.OK:
                continue
            self._current.value = number
            if task.timing == "cudagraph":
                failed[task.provider] = "unsupported: a CPU has no CUDA graphs"
                continue
            try:
                calls[task.provider] = self._prepared(task)
            except Exception as error:
                failed[task.provider] = measure.failure(error)
        timings = measure.interleaved(calls, self._effort) if calls else {}
        baseline = timings.get(providers.BASELINE)
        for number, task in group:
            yield number, self._row(task, timings.get(task.provider), baseline, failed.get(task.provider))

    def _one_by_one(self, todo: list[tuple[int, Task]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Time one provider on the GPU in every mode."""
        for number, task in todo:
            timing, failed = None, None
            if self._checks[task.provider].status == schema.OK:
                self._current.value = number
                try:
                    with self._providers[task.provider].context():
                        timing = measure.on_gpu(functools.partial(self._prepared, task), task.timing, self._effort)
                except Exception as error:
                    failed = measure.failure(error)
                    self._gpu_must_answer(error)
            if timing is not None and task.provider == providers.BASELINE:
                self._baselines[task.contest] = timing
            yield number, self._row(task, timing, self._baselines.get(task.contest), failed)

    def _row(
        self, task: Task, timing: Timing | None, baseline: Timing | None, failed: str | None = None
    ) -> dict[str, Any]:
        check = self._checks[task.provider]
        row: dict[str, Any] = {
            **machine.stamp(),
            **machine.facts(self._device),
            **task.columns(),
            "config": check.config.get(task.mode, ""),
            "err_fp64": check.errors.get(task.mode),
            "torch_err_fp64": self._torch_errors.get(task.mode),
            "status": failed or check.status,
        }
        row |= measure.rates(self._problem, task.mode, timing)
        if timing is not None:
            row |= timing.columns()
            row["speedup_vs_torch"] = baseline.ms[1] / timing.ms[1] if baseline else None
        return row
