"""Keeps a process measuring: hands it blocks, takes what it tells, and goes on with another where one crashes or hangs.

A second process, with its imports done, stands by: starting one takes seconds that a rented GPU charges for.
"""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType

from perf import options
from perf.bench.gpu import session
from perf.bench.gpu.results import Failure, Outcome, Results
from perf.bench.gpu.session import Block, Request

# seconds that a block has to end by itself when its time is over, and a process to start
GRACE, START = 10.0, 120.0
# a block is given up after so many items that took their process down
MOST_CRASHES = 5


class _Worker:
    """A process that measures."""

    def __init__(self, results: Results, dry: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection: Connection
        self._connection, there = context.Pipe()
        self._process: SpawnProcess = context.Process(target=session.main, args=(there, results.out / "log.txt", dry))
        # compiling the CPU's passes takes half a minute, and is not what a dry run tries
        with options.environment({"TKERNELS_COMPILE": "0"} if dry else {}):
            self._process.start()
        there.close()
        self._ready = False
        # whether it has done anything yet
        self.used = False

    def send(self, request: Request, module: str) -> None:
        if not self._ready:
            self.receive(time.monotonic() + START)
            self._ready = True
        self.used = True
        self._connection.send((request, module))

    def receive(self, until: float) -> tuple[str, object]:
        """What it tells next. Raises TimeoutError, or EOFError where the process has ended."""
        if not self._connection.poll(max(until - time.monotonic(), 0.0)):
            raise TimeoutError
        told: tuple[str, object] = self._connection.recv()
        return told

    def ended(self) -> str:
        """How a process that has ended did so."""
        self._process.join(GRACE)
        code = self._process.exitcode
        if code == session.BROKEN_GPU:
            return "crashed: the GPU no longer answers"
        return f"crashed: signal {-code}" if code is not None and code < 0 else f"crashed: exit status {code}"

    def kill(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.join(GRACE)  # one that waits within a driver that hangs does not even die


class Supervisor:
    """The measuring process of a run, and the one that stands by."""

    def __init__(self, results: Results, device: str, dry: bool) -> None:
        self._results, self._device, self._dry = results, device, dry
        self._spare = _Worker(results, dry)
        self._current: _Worker | None = None

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in (self._current, self._spare):
            if worker is not None:
                worker.kill()

    def do(self, block: Block, limit: float) -> Outcome:
        """Do a block within its limit; a process that crashes is replaced, and what it was at left out."""
        start = time.monotonic()
        following = _Following(block, self._results)
        if block.alone:
            self._retire()
        while True:
            left = start + limit - time.monotonic()
            request = Request(
                block.name, self._device, self._dry, self._results.provider, max(left, 0.0), block.alone,
                frozenset(following.done), self._results.target, self._results.slowest(),
            )  # fmt: skip
            status = following.follow(self._worker(), request)
            if status != "ok" or block.alone:
                self._retire()
            if not status.startswith("crashed") or following.crashes == MOST_CRASHES or left < 1.0:
                break
        return Outcome(block.name, status, time.monotonic() - start, following.left())

    def _worker(self) -> _Worker:
        if self._current is None:
            self._current, self._spare = self._spare, _Worker(self._results, self._dry)
        return self._current

    def _retire(self) -> None:
        """Give the process up, and its memory on the GPU, if it has done anything."""
        if self._current is not None and self._current.used:
            self._current.kill()
            self._current = None


class _Following:
    """What is known of a block while processes are at it."""

    def __init__(self, block: Block, results: Results) -> None:
        self._block, self._results = block, results
        self._items: list[str] = []
        self._at: str | None = None
        self.done: list[str] = []
        self.crashes = 0

    def follow(self, worker: _Worker, request: Request) -> str:
        """Take what a process tells until it has done the block, dies, or is far over its time."""
        try:
            worker.send(request, self._block.module)
            until = time.monotonic() + request.limit + GRACE
            while True:
                kind, what = worker.receive(until)
                if kind == "end":
                    if what == "ok":
                        self._finish()
                    return str(what)
                self._take(kind, what)
        except TimeoutError:
            return f"stopped: it did not answer {GRACE:.0f} s after its {request.limit:.0f} s"
        except (EOFError, OSError):
            return self._crashed(worker.ended())

    def _take(self, kind: str, what: object) -> None:
        if kind == "items":
            self._items = list(what)  # type: ignore[call-overload]
        elif kind == "item":
            self._finish()
            self._at = str(what)
        else:
            self._results.take(self._block.name, kind, what)

    def _finish(self) -> None:
        if self._at is not None:
            self.done.append(self._at)
            self._at = None

    def _crashed(self, status: str) -> str:
        self.crashes += 1
        self._results.failures.append(Failure(self._block.name, self._at or "(start)", status))
        if self._at is None:
            self.crashes = MOST_CRASHES  # it would do the same again
        self._finish()
        return status

    def left(self) -> tuple[str, ...]:
        """Items that were not done."""
        return tuple(name for name in self._items if name not in self.done)
