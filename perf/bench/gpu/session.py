"""The process that measures: it is given blocks, does their items one after another and tells what it finds.

A block that takes longer than its limit is interrupted wherever it is. The process is given up afterwards, because a
CUDA graph that is being captured, or a compiler, may be left half way; so is one whose GPU no longer answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from perf.bench.process import BROKEN_GPU, gpu_answers
from perf.schema import Measurement
from tkernels.core.targets import Target


class OutOfTime(BaseException):
    """A block's limit is over. Not an Exception: whatever an item catches, this ends it."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A block to do. ``provider``: whose kernels are judged; ``limit``: seconds; ``alone``: it takes a GPU only when it
    wants one; ``done``: items that an earlier process did or died of; ``target``: the GPU, once it is known;
    ``slowest``: kernels of the profile, worst first."""

    block: str
    device: str
    dry: bool
    provider: str
    limit: float
    alone: bool = False
    done: frozenset[str] = frozenset()
    target: Target | None = None
    slowest: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Run:
    """What an item needs to know, and ``tell(kind, what)`` for what it finds (kinds: results.py)."""

    request: Request
    tell: Callable[[str, Any], None]

    @property
    def device(self) -> str:
        return self.request.device

    @property
    def on_gpu(self) -> bool:
        return self.request.device != "cpu"

    def tell_timing(self, row: Measurement) -> None:
        """A row of timings.csv. Raises RuntimeError where what it was measured of has left the GPU unusable."""
        self.tell("timing", row)
        if self.on_gpu and row.status != "ok" and not gpu_answers():
            raise RuntimeError(f"{row.provider} left the GPU unusable: {row.status}")


@dataclasses.dataclass(frozen=True)
class Item:
    """A part of a block: what it is called, and what it does."""

    name: str
    do: Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Block:
    """``weight``: its share of the time; ``module``: its ``items(run)`` lists what there is to do; ``alone``: it must
    have the GPU's memory, or the processes of its own, for itself: no process that was used before does it."""

    name: str
    weight: float
    module: str
    alone: bool = False


def main(connection: Connection, log: Path, dry: bool) -> None:
    """Serve requests until nobody is there; what this process and its children print goes to ``log``. ``dry``: on one
    thread, which tiny tensors are fastest on."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    faulthandler.enable()
    # the parent decides; a handler, unlike SIG_IGN, is not passed on to pytest, which must hear of an interrupt
    signal.signal(signal.SIGINT, lambda signum, frame: None)
    # what takes seconds to import is there when the first request comes
    # (perf.static.aot sets a variable that is part of the key of Triton's cache: all processes must agree on it)
    for name in ("torch", "tkernels", "perf.bench.measure", "perf.static.aot"):
        importlib.import_module(name)
    # torch.fx has a bar that it does not show, whose lock would be a semaphore left behind where this process is killed
    importlib.import_module("tqdm").tqdm.set_lock(threading.RLock())
    if dry:
        importlib.import_module("torch").set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError):
        connection.send(("ready", None))
        while True:
            request, module = connection.recv()
            connection.send(("end", _serve(request, module, connection)))


def _serve(request: Request, module: str, connection: Connection) -> str:
    """Do a block; 'ok', or why it ended early."""
    print(f"\n=== {request.block} on {request.device}, {request.limit:.0f} s", flush=True)
    if request.device != "cpu" and not request.alone:
        torch: Any = importlib.import_module("torch")
        torch.cuda.set_device(torch.device(request.device).index or 0)
    run = Run(request, lambda kind, what: connection.send((kind, what)))
    try:
        with _limited(request.limit):
            items: list[Item] = importlib.import_module(module).items(run)
            run.tell("items", [item.name for item in items])
            with _late_compilations(run):
                for item in items:
                    if item.name not in request.done:
                        run.tell("item", item.name)
                        _do(item, run)
    except OutOfTime:
        return f"stopped after its {request.limit:.0f} s"
    except Exception as error:  # a block that cannot even list its items
        traceback.print_exc()
        return _one_line(error)
    return "ok"


def _do(item: Item, run: Run) -> None:
    print(f"--- {item.name}", flush=True)
    try:
        item.do()
    except Exception as error:  # the next item may fare better
        traceback.print_exc()
        run.tell("failed", (item.name, _one_line(error)))
        if run.on_gpu and not gpu_answers():
            os._exit(BROKEN_GPU)


def _one_line(error: Exception) -> str:
    from perf.bench import measure

    return measure.failure(error)


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block once the seconds are over, as soon as Python is at work."""

    def over(signum: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _late_compilations(run: Run) -> Iterator[None]:
    """Tell of each kernel that Triton compiles within the block: the pool was to have done that before."""
    knobs = sys.modules.get("triton.knobs")
    if knobs is None or run.request.block == "compile":
        yield
        return

    def heard(*, src: Any, cache_hit: bool, **_: Any) -> None:
        name = getattr(src, "name", "?")
        if not cache_hit and not name.startswith("triton_"):  # as Inductor calls its own
            print(f"late: {name} {getattr(src, 'signature', '')} {getattr(src, 'constants', '')}", flush=True)
            run.tell("late", name)

    before, knobs.compilation.listener = knobs.compilation.listener, heard
    try:
        yield
    finally:
        knobs.compilation.listener = before
