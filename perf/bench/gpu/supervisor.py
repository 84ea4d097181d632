"""Keeps a process measuring: hands it blocks, takes what it tells, and goes on with another where one crashes or hangs.

A second process, with its imports done, stands by: starting one takes seconds that a rented GPU charges for.
"""

from __future__ import annotations

import time

from perf.bench.gpu import session
from perf.bench.gpu.results import Failure, Outcome, Results
from perf.bench.gpu.session import Block, Request
from perf.bench.process import Ended, Process

# seconds that a block has to end by itself when its time is over, and a process to start
GRACE, START = 10.0, 120.0
# a block is given up after so many items that took their process down
MOST_CRASHES = 5


class _Worker(Process):
    """A process that measures. ``used``: it was given something to do, and may have memory on the GPU."""

    def __init__(self, results: Results, dry: bool) -> None:
        # compiling the CPU's passes takes half a minute, and is not what a dry run tries
        compiles = {"TKERNELS_COMPILE": "0"} if dry else {}
        super().__init__(session.main, results.out / "log.txt", dry, daemon=False, environment=compiles)
        self.used = False

    def begin(self, request: Request, module: str) -> None:
        """Hand it a block. Raises as ``receive`` does where it did not even start."""
        if not self.used:
            self.used = True
            self.receive(START)
        self.send((request, module))


class Supervisor:
    """The measuring process of a run, and the one that stands by."""

    def __init__(self, results: Results, device: str, dry: bool) -> None:
        self._results, self._device, self._dry = results, device, dry
        self._spare = _Worker(results, dry)
        self._current: _Worker | None = None

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *raised: object) -> None:
        for worker in (self._current, self._spare):
            if worker is not None:
                worker.close(0.0)

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
            self._current.close(0.0)
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
            worker.begin(request, self._block.module)
            until = time.monotonic() + request.limit + GRACE
            while True:
                kind, what = worker.receive(until - time.monotonic())
                if kind == "end":
                    if what == "ok":
                        self._finish()
                    return str(what)
                self._take(kind, what)
        except TimeoutError:
            return f"stopped: it did not answer {GRACE:.0f} s after its {request.limit:.0f} s"
        except Ended as end:
            return self._crashed(str(end))

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
