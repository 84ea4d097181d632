"""Measuring a network on a CPU as people run it: a training step with Adam, and inference.

Contenders take turns, a call each, every round beginning with another one. Each has a process of its own, because what
an allocator does to one depends on what others hold: PyTorch's own step has no page fault or 45,000, and takes 168 ms
or 230, by who shares its heap. (The allocator called 'shared' is that: all in one process.)

Parameters are float32; lower dtypes are autocast's. Each contender is first compared with the float64 network: its
output (inference) or gradients (training, with dropout left out; torch.compile's gradients are not looked at, as that
would compile it twice).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from perf import operators, providers, schema
from perf.bench import measure, rows
from perf.bench.measure import Effort, Sample, Timing
from perf.bench.process import Ended, Process
from perf.plan import Task
from perf.schema import Measurement
from tkernels.cpu import buffers

# seconds a contender's rounds take, and the least number of rounds
EFFORT = Effort(4.0, 15)
# steps before memory is looked at, and during it
WARM_STEPS, WATCHED_STEPS = 2, 2
# seconds in which the threads of who had the last turn stop waiting for more work
PAUSE = 0.005
NO_DROPOUT = {"dropout": 0.0, "dropout2d": 0.0}
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}


def environment(allocator: str) -> dict[str, str | None]:
    """What a process must be started with, None: without. glibc's ceiling for memory that is mapped and unmapped at
    every allocation, and the free memory it keeps, are read only then, as is how oneDNN computes float32."""
    keeps_all = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    own = keeps_all if allocator == "faultless" else dict.fromkeys(keeps_all)
    return {**own, "ONEDNN_DEFAULT_FPMATH_MODE": "STRICT", "GLIBC_TUNABLES": None}


class Comparison:
    """The contenders of one mode, dtype and allocator. ``at``: told a task's number when its turn comes."""

    def __init__(self, todo: Sequence[tuple[int, Task]], effort: Effort, at: Callable[[int], None]) -> None:
        self._numbers, self._at = {task: number for number, task in todo}, at
        self._effort = EFFORT if effort == measure.NORMAL else effort
        self._first = todo[0][1]

    def rows(self) -> Iterator[tuple[int, Measurement]]:
        tasks = list(self._numbers)
        with contextlib.ExitStack() as stack:

            def started() -> Process:
                # no daemon, as torch.compile starts processes of its own
                made = Process(_serve, os.getpid(), daemon=False)
                stack.callback(made.close)
                return made

            if self._first.allocator == "shared":
                self._processes = dict.fromkeys(tasks, started())
            else:
                self._processes = {task: started() for task in tasks}
            yield from self._measured()

    def _ask(self, task: Task, what: str) -> Any:
        """Have a contender do something; a status where that failed."""
        try:
            self._processes[task].send((task, what))
            return self._processes[task].receive()
        except Ended as end:
            return str(end)

    def _measured(self) -> Iterator[tuple[int, Measurement]]:
        what = "gradients" if self._first.mode == "train" else "output"
        baseline = dataclasses.replace(self._first, provider=providers.BASELINE, layout="nhwc")
        exact = Contender(baseline, exact=True).result()
        torch_error = measure.relative(Contender(baseline).result(), exact)
        columns: dict[Task, dict[str, Any]] = {}
        for task, number in self._numbers.items():
            self._at(number)
            found = self._ask(task, "prepare")
            if isinstance(found, str):
                columns[task] = {"status": found}
                continue
            error = None if found is None else measure.relative(torch.from_numpy(found), exact)
            wrong = measure.too_far(what, error or 0.0, torch_error, operators.DTYPES[task.dtype])
            columns[task] = {"err_fp64": error, "status": wrong or schema.OK}
        timings = self._turns([task for task, found in columns.items() if found["status"] == schema.OK])
        for task, number in self._numbers.items():
            if task in timings:
                columns[task] |= timings[task].columns()
                if task.mode == "train" and task.allocator == "default":
                    self._at(number)
                    memory = self._ask(task, "memory")
                    columns[task] |= memory if isinstance(memory, dict) else {}
            yield number, rows.made(Measurement, "cpu", **task.columns(), torch_err_fp64=torch_error, **columns[task])

    def _turns(self, tasks: Sequence[Task]) -> dict[Task, Timing]:
        if not tasks:
            return {}

        def turn(task: Task) -> Sample:
            self._at(self._numbers[task])
            time.sleep(PAUSE)
            taken = self._ask(task, "turn")
            if not isinstance(taken, Sample):
                raise RuntimeError(taken)
            return taken

        calls: dict[str, Callable[[], Sample]] = {str(task): functools.partial(turn, task) for task in tasks}
        cost = sum(call().ms for call in calls.values()) / 1e3
        ours = next((str(task) for task in tasks if task.provider == providers.OURS), "")
        baselines = {str(task): str(dataclasses.replace(task, provider=providers.BASELINE)) for task in tasks}
        timings = measure.turns(calls, self._effort, cost, ours, baselines)
        return {task: timings[str(task)] for task in tasks}


def _serve(parent: Connection, pid: int) -> None:
    """Do what is asked, one thing after another, until nobody is there who could ask."""
    threading.Thread(target=_die_with, args=(pid,), daemon=True).start()
    contenders: dict[Task, Contender] = {}
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            task, what = parent.recv()
            try:
                contender = contenders.setdefault(task, Contender(task)) if what == "prepare" else contenders[task]
                answer = getattr(contender, what)()
            except Exception as error:  # whatever a contender does wrong is a row of the report
                answer = measure.failure(error)
            parent.send(answer)


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class Contender:
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
        self._trains, self._compiled = task.mode == "train", task.provider == providers.COMPILED
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
