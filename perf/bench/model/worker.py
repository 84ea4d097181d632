"""The process in which models compete: what takes it down, as a bug in a library, costs one comparison its times."""

from __future__ import annotations

import contextlib
import os
from multiprocessing.connection import Connection

from perf import models
from perf.bench.measure import Effort
from perf.bench.model import comparison
from perf.bench.model.comparison import Measured, Task
from perf.bench.process import Ended, Process


class Worker:
    """A process that makes one comparison after another; started when it is first needed, and again after a crash."""

    def __init__(self, effort: Effort, compiled: bool) -> None:
        self._effort, self._compiled = effort, compiled
        self._process: Process | None = None

    def measured(self, task: Task) -> Measured:
        """The comparison's rows; where the process died, rows that say so and at whose turn."""
        if self._process is None:
            self._process = Process(_serve, self._effort, self._compiled)
        at = 0
        try:
            self._process.send(task)
            while isinstance(told := self._process.receive(), int):
                at = told
        except Ended as end:
            self.close()
            return self._lost(task, at, str(end))
        return told

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def _lost(self, task: Task, at: int, cause: str) -> Measured:
        competing = list(comparison.providers(self._compiled))
        why = dict.fromkeys(competing, f"not measured: {competing[at]} {cause}") | {competing[at]: cause}
        return Measured(comparison.made(task, {name: {"status": status} for name, status in why.items()}), "")


def _serve(parent: Connection, effort: Effort, compiled: bool) -> None:
    """Measure what is asked for until nobody asks."""
    try:
        with contextlib.suppress(EOFError):
            while True:
                task: Task = parent.recv()
                build = models.resolve([task.name])[task.name]
                parent.send(comparison.measured(task, build, effort, compiled, parent.send))
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(1)  # the parent is gone, or going
