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
from models.cifar_cnn import FusedCNNClassifier
from perf import operators, providers
from perf.bench import measure
from perf.bench.gpu import ab, headline, problems, resnet50, tools
from perf.bench.gpu.checks import Checked
from perf.bench.gpu.problems import Case
from perf.bench.gpu.session import Item, Run
from perf.bench.process import Ended, Process
from perf.static import aot, meter, traffic
from perf.static.rewritten import Rewritten
from tkernels.core import targets
from tkernels.core.targets import Target

# kernels that a dry run compiles: enough to walk the way
DRY_KERNELS = 6
# whose convolutions go where backend 'auto' sends them
RESNET50 = "fuse(resnet50)"
Launches = dict[str, aot.Launch]
# on fake tensors of this mode
Call = Callable[[meter.FakeTensorMode], object]


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
    for name, made in _calls(run.request.dry, target):
        try:
            found |= recorded(made(), target, "auto" if name == RESNET50 else "triton")
        except Exception:  # noqa: PERF203
            print(f"not recorded: {name}\n{traceback.format_exc(limit=-3)}", flush=True)
    return found


def recorded(call: Call, target: Target, backend: str = "triton") -> Launches:
    """What ``call`` launches on a GPU that is not there."""
    launches: list[aot.Launch] = []

    def launch(kernel: Any, args: Any, kwargs: Any, grid: Any) -> None:
        launches.append(aot.record(kernel, args, kwargs, grid, device="cpu"))

    with tkernels.backend(backend), meter.pretended_gpu(target, launch) as mode:
        call(mode)
    return {aot.specialisation(each, target.name): each for each in launches}


def _calls(dry: bool, target: Target) -> Iterator[tuple[str, Callable[[], Call]]]:
    """The run's cases: what makes a call on fake tensors of each."""
    ours = providers.load(providers.OURS)
    for case in (*problems.checked(dry), *(case for case, _ in problems.repeated(dry)), *problems.timed(dry)):
        if case.operator != "cnn":
            yield str(case), functools.partial(_evaluation, ours, case)
    for case in problems.compared(dry):
        yield f"{case} by descriptors", functools.partial(_by_descriptors, ours, case)
    batches = headline.DRY_BATCHES if dry else headline.BATCHES
    for batch in batches:
        made = functools.partial(_step, traffic.fused, (batch, 3, 32, 32), torch.float32, True)
        yield f"the network in training, batch {batch}", made
    for name, build in (("the network in bf16", traffic.fused), ("the network as checked", _exact)):
        yield name, functools.partial(_step, build, (batches[0], 3, 32, 32), torch.bfloat16, False)
    images = (2, 3, 32, 32) if dry else (256, 3, 224, 224)
    build = functools.partial(_rewritten, images, target)
    yield RESNET50, functools.partial(_step, build, images, torch.float32, True)
    yield "the tools' attention", lambda: lambda mode: tools.attend("cpu")


def _evaluation(ours: providers.Provider, case: Case) -> Call:
    return lambda mode: measure.evaluate(Checked(case, "cpu", ours))


def _by_descriptors(ours: providers.Provider, case: Case) -> Call:
    def call(mode: meter.FakeTensorMode) -> None:
        with ab.by_descriptors():
            _evaluation(ours, case)(mode)

    return call


def _exact() -> tuple[nn.Module, nn.Module]:
    """The network as it is checked: without dropout, and without the gradients that nobody compares."""
    model = FusedCNNClassifier(dropout=0.0, dropout2d=0.0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in operators.get("cnn").differentiable)
    return model, tkernels.nn.CrossEntropyLoss()


def _rewritten(images: tuple[int, ...], target: Target) -> tuple[nn.Module, nn.Module]:
    """The graph of fuse(resnet50), of a batch of two: nothing in it depends on more."""
    model, loss = resnet50.plain()
    with torch.autocast("cpu", torch.bfloat16):  # convolutions are PyTorch's or ours by their dtype
        return Rewritten(model, torch.empty(2, *images[1:]), target), loss


def _step(
    build: Callable[[], tuple[nn.Module, nn.Module]], size: tuple[int, ...], dtype: torch.dtype, autocast: bool
) -> Call:
    """A training step's forward and backward. The network is made here: fake it could not be moved any more."""
    model, loss = build()
    model = model.to(dtype).to(memory_format=torch.channels_last)

    def call(mode: meter.FakeTensorMode) -> None:
        meter.make_fake(model, mode)
        images = torch.empty(size, dtype=dtype).contiguous(memory_format=torch.channels_last)
        with _autocast(autocast):
            value = loss(model(images), torch.zeros(size[0], dtype=torch.int64))
        value.backward()

    return call


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


def compile_all(launches: Iterable[tuple[str, aot.Launch]], target: Target, processes: int) -> list[tuple[str, str]]:
    """Compile launches into Triton's cache; (kernel, what the compiler said) of those that failed."""
    listed = [launch for _, launch in launches]
    todo, failures = iter(range(len(listed))), []
    pool = [_Compiler(listed, target) for _ in range(processes)]
    try:
        busy = {compiler.connection: compiler for compiler in pool if compiler.start(next(todo, None))}
        while busy:
            for connection in multiprocessing.connection.wait(list(busy)):
                compiler = busy.pop(connection)
                index, status = compiler.answer()
                if status:
                    failures.append((listed[index].kernel.__name__, status))
                if status.startswith("crashed"):
                    pool.append(compiler := _Compiler(listed, target))
                if compiler.start(next(todo, None)):
                    busy[compiler.connection] = compiler
    finally:  # out of time, say: nothing may go on compiling beside what is measured
        for compiler in pool:
            compiler.close(0.0)
    return failures


class _Compiler(Process):
    """A process that compiles one launch after another. Forked: launches hold kernels, which cannot be sent."""

    def __init__(self, launches: list[aot.Launch], target: Target) -> None:
        super().__init__(_serve, launches, target, method="fork")
        self._index = -1

    def start(self, index: int | None) -> bool:
        """Give it a launch; whether there was one."""
        if index is None:
            return False
        self._index = index
        self.send(index)
        return True

    def answer(self) -> tuple[int, str]:
        """Which launch it had, and what was wrong with it, empty where nothing was."""
        try:
            return self._index, self.receive()
        except Ended as end:
            return self._index, str(end)


def _serve(connection: Connection, launches: list[aot.Launch], target: Target) -> None:
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
