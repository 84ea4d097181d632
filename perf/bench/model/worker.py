"""The process in which models compete: what takes it down, as a bug in a library does, costs one contest its times."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from perf.bench import machine, measure
from perf.bench.model import contest, names
from perf.bench.model.contest import Effort, Measured, Task

# seconds a process has to end
PATIENCE = 5.0


class Worker:
    """A process that measures one contest after another; started when it is first needed, and again after a crash."""

    def __init__(self, effort: Effort) -> None:
        self._effort = effort
        self._process: SpawnProcess | None = None
        # spawned, not forked: torch's threads and CUDA do not survive a fork
        self._context = multiprocessing.get_context("spawn")
        self._current = self._context.Value("i", 0, lock=False)

    def measured(self, task: Task) -> Measured:
        """The contest's rows; where the process died, rows that say so and at whose turn."""
        if self._process is None:
            self._start()
        try:
            self._desk.send(task)
            done: Measured = self._desk.recv()
            return done
        except (EOFError, OSError):
            return self._lost(task)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._desk.close()
            self._process.join(PATIENCE)  # it sees that nobody is there
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        self._desk, there = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(there, self._current, self._effort), daemon=True)
        self._process.start()
        there.close()

    def _lost(self, task: Task) -> Measured:
        assert self._process is not None
        self._process.join()
        cause, self._process = measure.crashed(self._process.exitcode), None
        competing = list(contest.providers(self._effort.compiled))
        guilty = competing[self._current.value]
        head = {**machine.stamp(), **machine.facts(task.device), **task.columns()}
        rows: list[dict[str, Any]] = [
            {**head, "provider": name, "status": cause if name == guilty else f"not measured: {guilty} {cause}"}
            for name in competing
        ]
        return Measured(rows, "")


def _serve(desk: Connection, current: Any, effort: Effort) -> None:
    """Measure what is asked for until nobody asks."""
    try:
        with contextlib.suppress(EOFError):
            while True:
                task: Task = desk.recv()
                build = names.resolve([task.name])[task.name]
                desk.send(contest.measured(task, build, effort, lambda at: setattr(current, "value", at)))
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(1)  # the parent is gone, or going
