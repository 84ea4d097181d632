"""Measuring a network on a CPU as people run it: a training step with Adam, and inference.

Rivals take turns, a call each, every round beginning with another one. Each has a process of its own, because what an
allocator does to one depends on what others hold: PyTorch's own step has no page fault or 45,000, and takes 168 ms or
230, by who shares its heap. (The allocator called 'shared' is that: all in one process.)

Parameters are float32; lower dtypes are autocast's. Each rival is first compared with the float64 network: its output
(inference) or gradients (training, with dropout left out; torch.compile's gradients are not looked at, as that would
compile it twice).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from perf import operators, providers, schema
from perf.bench import machine, measure
from perf.bench.measure import Effort, Sample, Timing
from perf.plan import Task
from tkernels.cpu import buffers

# seconds a rival's rounds take, and the least number of rounds
EFFORT = Effort(4.0, 15)
# steps before memory is looked at, and during it
WARM_STEPS, WATCHED_STEPS = 2, 2
# seconds in which the threads of who had the last turn stop waiting for more work
PAUSE = 0.005
# seconds a process has to end
PATIENCE = 5.0
NO_DROPOUT = {"dropout": 0.0, "dropout2d": 0.0}
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
COMPILED = "torch.compile"
_Desk = tuple[SpawnProcess, Connection]


def environment(allocator: str) -> dict[str, str | None]:
    """What a process must be started with, None: without. glibc's ceiling for memory that is mapped and unmapped at
    every allocation, and the free memory it keeps, are read only then, as is how oneDNN computes float32."""
    keeps_all = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    own = keeps_all if allocator == "faultless" else dict.fromkeys(keeps_all)
    return {**own, "ONEDNN_DEFAULT_FPMATH_MODE": "STRICT", "GLIBC_TUNABLES": None}


class Contest:
    """The rivals of one mode, dtype and allocator."""

    def __init__(
        self, todo: Sequence[tuple[int, Task]], effort: Effort, current: Any, alive: Callable[[], None]
    ) -> None:
        self._todo, self._current, self._alive = todo, current, alive
        self._effort = EFFORT if effort == measure.NORMAL else effort

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        tasks = [task for _, task in self._todo]
        groups = [tasks] if tasks[0].allocator == "shared" else [[task] for task in tasks]
        with contextlib.ExitStack() as stack:
            desks = {task: desk for group in groups for desk in [stack.enter_context(_desk(group))] for task in group}
            yield from self._measured({task: _Proxy(desk, task) for task, desk in desks.items()})

    def _measured(self, rivals: dict[Task, _Proxy]) -> Iterator[tuple[int, dict[str, Any]]]:
        first = self._todo[0][1]
        what = "gradients" if first.mode == "train" else "output"
        baseline = dataclasses.replace(first, provider=providers.BASELINE, layout="nhwc")
        exact = Rival(baseline, exact=True).result()
        torchs = measure.relative(Rival(baseline).result(), exact)
        status: dict[Task, str] = {}
        errors: dict[Task, float] = {}
        for number, task in self._todo:
            self._at(number)
            found = rivals[task].ask("prepare")
            if isinstance(found, str):
                status[task] = found
                continue
            if found is not None:
                errors[task] = measure.relative(torch.from_numpy(found), exact)
            dtype = operators.DTYPES[task.dtype]
            status[task] = measure.too_far(what, errors.get(task, 0.0), torchs, dtype) or schema.OK
        timings = self._turns({task: rivals[task] for task, said in status.items() if said == schema.OK})
        for number, task in self._todo:
            self._at(number)
            row = self._row(task, status[task], timings.get(task))
            if task in timings and task.mode == "train" and task.allocator == "default":
                memory = rivals[task].ask("memory")
                row |= memory if isinstance(memory, dict) else {}
            yield number, {**row, "err_fp64": errors.get(task), "torch_err_fp64": torchs}

    def _at(self, number: int) -> None:
        self._current.value = number
        self._alive()

    def _turns(self, rivals: dict[Task, _Proxy]) -> dict[Task, Timing]:
        if not rivals:
            return {}
        numbers = {task: number for number, task in self._todo}

        def turn(task: Task) -> Sample:
            self._at(numbers[task])
            time.sleep(PAUSE)
            taken = rivals[task].ask("turn")
            if not isinstance(taken, Sample):
                raise RuntimeError(taken)
            return taken

        calls: dict[str, Callable[[], Sample]] = {str(task): functools.partial(turn, task) for task in rivals}
        cost = sum(call().ms for call in calls.values()) / 1e3
        ours = next((str(task) for task in rivals if task.provider == providers.OURS), "")
        timings = measure.turns(calls, self._effort, cost, ours)
        return {task: timings[str(task)] for task in rivals}

    def _row(self, task: Task, status: str, timing: Timing | None) -> dict[str, Any]:
        measured = timing.columns() if timing is not None else {}
        return {**machine.stamp(), **machine.facts("cpu"), **task.columns(), **measured, "status": status}


class _Proxy:
    """A rival in its process."""

    def __init__(self, desk: _Desk, task: Task) -> None:
        self._desk, self._task = desk, task

    def ask(self, what: str) -> Any:
        """Have it do one of Rival's things; a status where that failed."""
        process, connection = self._desk
        try:
            connection.send((self._task, what))
            return connection.recv()
        except (EOFError, OSError):
            process.join()
            return measure.crashed(process.exitcode)


@contextlib.contextmanager
def _desk(tasks: Sequence[Task]) -> Iterator[_Desk]:
    """A process for these rivals and the connection to it."""
    # with this process's environment; spawned because threads do not survive a fork
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, os.getpid()))
    process.start()
    there.close()
    try:
        yield process, here
    finally:
        here.close()
        process.join(PATIENCE)  # it sees that nobody is there
        process.kill()
        process.join()


def _serve(desk: Connection, parent: int) -> None:
    """Do what is asked, one thing after another, until nobody is there who could ask."""
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    rivals: dict[Task, Rival] = {}
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            task, what = desk.recv()
            try:
                rival = rivals.setdefault(task, Rival(task)) if what == "prepare" else rivals[task]
                answer = getattr(rival, what)()
            except Exception as error:  # whatever a rival does wrong is a row of the report
                answer = measure.failure(error)
            desk.send(answer)


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class Rival:
    """Whose network is measured, and how: made and used in a process that may be its own. ``exact``: in float64."""

    def __init__(self, task: Task, exact: bool = False) -> None:
        _true_float32()
        self._provider = providers.load(task.provider)
        if "cnn" not in self._provider.functions:
            raise ValueError(f"{task.provider} has no cnn")
        # no backward runs twice here: what torch.compile saved for it may be overwritten, which is its default
        import torch._functorch.config as functorch

        functorch.donated_buffer = True
        self._layout = LAYOUTS[task.layout]
        self._trains, self._compiled = task.mode == "train", task.provider == COMPILED
        self._dtype = torch.float64 if exact else operators.DTYPES[task.dtype]
        lower = self._dtype in (torch.bfloat16, torch.float16) and task.provider != providers.USUAL
        self._autocast = torch.autocast("cpu", self._dtype if lower else torch.bfloat16, enabled=lower)
        draws = torch.Generator().manual_seed(0)
        images = torch.randn(dict(task.shape)["N"], 3, 32, 32, generator=draws)
        self._images = images.to(torch.float64 if exact else torch.float32).contiguous(memory_format=self._layout)
        self._target = torch.randint(10, images.shape[:1], generator=draws)
        self._call: Callable[[], object] | None = None

    def prepare(self) -> np.ndarray[Any, Any] | None:
        """Make the call that is timed, and call it. Returns what is to be compared with float64, None: nothing."""
        result = None if self._trains and self._compiled else self.result().numpy()
        self._model, self._loss = self._network({})
        self._call = self._step() if self._trains else self._infer
        self._call()
        gc.collect()
        gc.disable()
        return result

    def turn(self) -> Sample:
        """One timed call."""
        assert self._call is not None
        return measure.sample(self._call, 1)

    def memory(self) -> dict[str, float | None]:
        """Columns of a row. Torch.compile would compile again for the hooks that count what is saved."""
        assert self._call is not None
        gc.enable()
        own = [*self._model.parameters(), self._images, self._target]
        saved = None if self._compiled else saved_bytes(self._call, own) / 1e6
        peak = peak_bytes(self._call)
        return {"saved_mb": saved, "peak_memory_mb": None if peak is None else peak / 1e6}

    def result(self) -> Tensor:
        """float64: all gradients in one vector, or the output."""
        self._model, self._loss = self._network(NO_DROPOUT if self._trains else {})
        if not self._trains:
            return self._infer().double()
        self._forward().backward()
        # a bias before batch norm has a gradient of zero: what is computed of it is rounding noise
        judged = [p for name, p in self._model.named_parameters() if not re.search(r"conv\d\.bias", name)]
        return torch.cat([p.grad.double().flatten() for p in judged if p.grad is not None])

    def _network(self, arguments: dict[str, Any]) -> tuple[nn.Module, Callable[..., Tensor]]:
        """The network with everybody's parameters, and its loss."""
        model, loss = self._provider.functions["cnn"](arguments)
        model.load_state_dict(_trained_state())
        if self._dtype == torch.float64:
            model.double()
        return model.to(memory_format=self._layout).train(self._trains), loss

    def _forward(self) -> Tensor:
        with self._autocast:
            loss: Tensor = self._loss(self._model(self._images), self._target)
            return loss

    def _step(self) -> Callable[[], object]:
        optimizer = torch.optim.Adam(self._model.parameters())

        def step() -> None:
            optimizer.zero_grad()
            self._forward().backward()
            optimizer.step()

        return step

    def _infer(self) -> Tensor:
        with torch.no_grad(), self._autocast:
            output: Tensor = self._model(self._images)
            return output


def _true_float32() -> None:
    """float32 products of float32 numbers, whatever the process was started with."""
    torch.set_float32_matmul_precision("highest")
    switches: Any = torch.backends.mkldnn
    for switch in (switches.conv, switches.matmul):
        switch.fp32_precision = "ieee"


def _trained_state() -> dict[str, Tensor]:
    """Parameters as they are drawn, and running statistics as a network has them that has seen something."""
    from models.cifar_cnn import CNNClassifier

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = CNNClassifier()
        for _ in range(3):
            model(torch.randn(64, 3, 32, 32))
    return model.state_dict()


def saved_bytes(step: Callable[[], object], own: Iterable[Tensor]) -> int:
    """Bytes of the storages autograd keeps in a step, each once; those of ``own`` tensors, which stay anyway, not."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    for t in own:
        kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def peak_bytes(step: Callable[[], object]) -> int | None:
    """The process's largest resident memory during a step, above what stands between steps once all that is free has
    been given back. None where the system does not tell (Linux does)."""
    for _ in range(WARM_STEPS):
        step()
    buffers.POOL.clear()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the largest so far is forgotten
        for _ in range(WATCHED_STEPS):
            step()
        return _status("VmHWM") - before
    except (OSError, AttributeError, TypeError):
        return None


def _status(field: str) -> int:
    """A size from Linux's account of this process, in bytes."""
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"no {field}")
    return 1024 * int(found[1])
