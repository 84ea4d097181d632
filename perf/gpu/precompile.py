"""Every kernel that the run needs, compiled before anything is measured by a process a core.

What is launched is recorded on fake tensors that say they are on a GPU, at the shapes that will be checked and timed,
forward and backward; a pool of processes compiles each distinct launch as JITFunction.run would, into Triton's cache,
where the measuring process finds it. No GPU is touched.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing.connection
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
import triton
from torch import nn

import tkernels
import tkernels.nn as tnn
from perf import aot, measure, meter, providers, shapes, traffic
from perf.gpu import problems
from perf.gpu.checks import Checked
from perf.gpu.problems import Case
from perf.gpu.session import Item, Run
from tkernels import targets
from tkernels.targets import Target

# kernels that a dry run compiles: enough to walk the way
DRY_KERNELS = 6
Launches = dict[str, aot.Launch]


def items(run: Run) -> list[Item]:
    """Bytes of a step for the profile, then the kernels."""
    return [
        Item("bytes of a step", functools.partial(_bytes, run)),
        Item("kernels", functools.partial(_compile, run)),
    ]


def _bytes(run: Run) -> None:
    """What each kernel of a training step moves, its arguments counted once: the profile's other column."""
    counted = traffic.step(traffic.fused, 4 if run.request.dry else 256, "sm_90")
    moved: dict[str, float] = {}
    for call in counted.calls:
        if call.kind == "triton":
            moved[call.name] = moved.get(call.name, 0.0) + call.bytes + call.workspace
    run.tell("bytes", moved)


def _compile(run: Run) -> None:
    target = run.request.target or targets.TARGETS["sm_90"]
    start = time.monotonic()
    launches = list(needed(run, target).items())
    recorded = time.monotonic() - start
    if run.request.dry:
        launches = launches[:DRY_KERNELS]
    processes = min(os.cpu_count() or 1, max(len(launches), 1))
    failures = compile_all(launches, target, processes)
    for name, status in failures:
        run.tell("failed", (f"compiling {name}", status))
    seconds = time.monotonic() - start
    run.tell(
        "compiled",
        f"{len(launches) - len(failures)} kernels compiled for {target.name} by {processes} processes in "
        f"{seconds:.0f} s, {recorded:.0f} of them to find out which",
    )


def needed(run: Run, target: Target) -> Launches:
    """Every distinct launch of what the run does, by its specialisation. What cannot be recorded is printed, and is
    compiled when it is met."""
    found: Launches = {}
    for name, call in _calls(run):
        try:
            found |= recorded(call, target)
        except Exception:  # noqa: PERF203
            print(f"not recorded: {name}\n{traceback.format_exc(limit=-3)}", flush=True)
    return found


def recorded(call: Callable[[meter.FakeTensorMode], object], target: Target) -> Launches:
    """What ``call`` launches on a GPU that is not there."""
    launches: list[aot.Launch] = []

    def launch(kernel: Any, args: Any, kwargs: Any, grid: Any) -> None:
        launches.append(aot.record(kernel, args, kwargs, grid, device="cpu"))

    with tkernels.backend("triton"), meter.pretended_gpu(target, launch) as mode:
        call(mode)
    return {aot.specialisation(each, target.name): each for each in launches}


def _calls(run: Run) -> Iterator[tuple[str, Callable[[Any], object]]]:
    """The run's cases, as calls on fake tensors."""
    ours = providers.load(providers.OURS)
    dry = run.request.dry
    for case in (*problems.checked(dry), *(case for case, _ in problems.repeated(dry)), *problems.timed(dry)):
        if case.operator != "cnn":
            yield str(case), functools.partial(_evaluate, ours, case)
    # modules are made here: under fake tensors they could not be moved any more
    for dtype in (torch.float32, torch.bfloat16):
        model, loss = traffic.fused()
        model = model.to(dtype).to(memory_format=torch.channels_last)
        yield f"the network, {dtype} parameters", functools.partial(_network, model, loss, dtype, 4 if dry else 256)
    for s in () if dry else shapes.NAMED["resnet50"]["conv2d"]:
        yield f"a layer of ResNet-50, {s}", functools.partial(_layer, _stage(s), s)


def _evaluate(ours: providers.Provider, case: Case, mode: Any) -> object:
    return measure.evaluate(Checked(case, "cpu", ours))


def _images(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(n, c, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last)


def _network(model: nn.Module, loss: nn.Module, dtype: torch.dtype, batch: int, mode: Any) -> None:
    """A training step's forward and backward under autocast, as models.train makes it, or all in bf16."""
    meter.make_fake(model, mode)
    images, target = _images(batch, 3, 32, 32, dtype), torch.zeros(batch, dtype=torch.int64)
    with _autocast(dtype == torch.float32):
        value = loss(model(images), target)
    value.backward()


@contextlib.contextmanager
def _autocast(on: bool) -> Iterator[None]:
    """A GPU's autocast to bf16, which torch.autocast switches off where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", on)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def _stage(s: shapes.Shape) -> nn.Module:
    layer = tnn.ConvBNReLU2d(s["C"], s["K"], s["R"], stride=s["stride"], padding=s["padding"], bias=False)
    return layer.to(memory_format=torch.channels_last)


def _layer(layer: nn.Module, s: shapes.Shape, mode: Any) -> None:
    """What a layer of a fused network launches: convolution, batch norm and ReLU, forward and backward."""
    meter.make_fake(layer, mode)
    # the images have no gradient; a map comes in the dtype that the layer before gave it
    first = s["C"] == 3
    x = _images(s["N"], s["C"], s["H"], s["W"], torch.float32 if first else torch.bfloat16)
    with _autocast(True):
        output = layer(x if first else x.requires_grad_())
    output.backward(torch.empty_like(output))


def compile_all(launches: Iterable[tuple[str, aot.Launch]], target: Target, processes: int) -> list[tuple[str, str]]:
    """Compile launches into Triton's cache; (kernel, what the compiler said) of those that failed."""
    listed = [launch for _, launch in launches]
    todo, failures = iter(range(len(listed))), []
    pool = [_Compiler(listed, target) for _ in range(processes)]
    try:
        busy = {compiler.connection: compiler for compiler in pool if compiler.start(next(todo, None))}
        while busy:
            for connection in multiprocessing.connection.wait(list(busy)):
                compiler = busy.pop(connection)  # type: ignore[call-overload]
                index, status = compiler.answer()
                if status:
                    failures.append((listed[index].kernel.__name__, status))
                if status.startswith("crashed"):
                    pool.append(compiler := _Compiler(listed, target))
                if compiler.start(next(todo, None)):
                    busy[compiler.connection] = compiler
    finally:  # out of time, say: nothing may go on compiling beside what is measured
        for compiler in pool:
            compiler.end()
    return failures


class _Compiler:
    """A process that compiles one launch after another. Forked: launches hold kernels, which cannot be sent."""

    def __init__(self, launches: list[aot.Launch], target: Target) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(launches, target, there), daemon=True)
        self._process.start()
        there.close()
        self._index = -1

    def start(self, index: int | None) -> bool:
        """Give it a launch; whether there was one."""
        if index is None:
            return False
        self._index = index
        self.connection.send(index)
        return True

    def answer(self) -> tuple[int, str]:
        """Which launch it had, and what was wrong with it, empty where nothing was."""
        try:
            return self._index, self.connection.recv()
        except EOFError:
            self._process.join()
            return self._index, f"crashed: the compiler ended its process with {self._process.exitcode}"

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(launches: list[aot.Launch], target: Target, connection: Connection) -> None:
    triton.runtime.driver.set_active(aot.StubDriver(aot.gpu_target(target)))
    while True:
        try:
            _into_cache(launches[connection.recv()])
        except Exception as error:  # noqa: PERF203
            connection.send(measure.failure(error))
        else:
            connection.send("")


def _into_cache(launch: aot.Launch) -> None:
    """Compile a launch as it will be asked for, and the C function that hands it to the driver where there is one."""
    compiled: Any = launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.kwargs)
    if torch.cuda.device_count() == 0:  # asks nvidia-smi's library, no context is made
        return
    with contextlib.suppress(Exception):  # a launcher that is not built now is built at its first launch
        module = importlib.import_module("triton.backends.nvidia.driver")
        module.CudaLauncher(compiled.src, compiled.metadata)
