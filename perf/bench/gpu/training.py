"""Timing whole training steps: steps back to back as they are made, or replayed from a CUDA graph."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models import engine, recipes
from perf import schema
from perf.bench import measure, rows
from perf.bench.gpu.session import Run
from perf.bench.measure import Timing
from perf.schema import Measurement

# windows of steps whose means are the samples, and the seconds of one
WINDOWS, WINDOW = 7, 0.12
DRY_WINDOWS, DRY_WINDOW = 2, 0.0
WARM_UP = 4
Step = Callable[[], tuple[Tensor, Tensor]]


class Contender(NamedTuple):
    """Whose step: ``build`` gives network and loss. ``graph``: captured as a CUDA graph by us; ``replayed``: it makes
    graphs itself; ``context``: entered round everything."""

    name: str
    build: Callable[[], tuple[nn.Module, nn.Module]]
    graph: bool = False
    replayed: bool = False
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    optimizer: str = "adam"


class Workload(NamedTuple):
    """What is trained: a row's operator and shape, with so many classes."""

    operator: str
    shape: dict[str, int]
    classes: int


def step(run: Run, contender: Contender, workload: Workload) -> Step:
    """A training step on random images that stay the same, as models.train makes it: bf16 autocast over float32
    parameters, channels_last, the optimizer's step at the end."""
    torch.manual_seed(0)
    model, loss = contender.build()
    model = model.to(run.device).to(memory_format=torch.channels_last).train()
    optimizer = recipes.build_optimizer(
        contender.optimizer, model, torch.tensor(1e-3, device=run.device) if contender.graph else 1e-3, 0.9, 0.0,
        capturable=contender.graph and run.on_gpu,
    )  # fmt: skip
    shape = workload.shape
    images = torch.randn(shape["N"], shape["C"], shape["H"], shape["W"], device=run.device)
    images = images.contiguous(memory_format=torch.channels_last)
    target = torch.randint(workload.classes, (shape["N"],), device=run.device)
    whole = engine.TrainingStep(model, loss, optimizer, amp=torch.bfloat16)

    def call() -> tuple[Tensor, Tensor]:
        if contender.replayed:
            torch.compiler.cudagraph_mark_step_begin()
        return whole(images, target)

    return call


def measured(run: Run, contender: Contender, workload: Workload) -> Measurement:
    """A row of timings.csv; what the contender raises becomes its status."""
    timing = "cudagraph" if contender.graph or contender.replayed else "wall"
    row = rows.made(
        Measurement, run.device, operator=workload.operator, mode="train", dtype="bf16", layout="nhwc",
        provider=contender.name, timing=timing, **workload.shape,
    )  # fmt: skip
    if contender.graph and not run.on_gpu:
        return row.having(status="unsupported: a CPU has no CUDA graphs")
    if run.on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if run.on_gpu else 0
    try:
        with contender.context():
            timed, status = _timed(run, contender, workload)
    except Exception as error:  # a row of the report; the others go on
        return row.having(status=measure.failure(error))
    row = row.having(**timed.columns(), status=status)
    if run.on_gpu:
        row = row.having(peak_memory_mb=(torch.cuda.max_memory_allocated() - before) / 1e6)
    return row


def _timed(run: Run, contender: Contender, workload: Workload) -> tuple[Timing, str]:
    last: list[Tensor] = []

    def prepare() -> Callable[[], object]:
        call = step(run, contender, workload)

        def kept() -> None:
            last[:] = [call()[0]]

        return kept

    call = measure.graphed(prepare) if contender.graph else prepare()
    for _ in range(WARM_UP if run.on_gpu else 1):
        call()
    host = measure.host_us(call) if run.on_gpu and not contender.graph else None
    ms = measure.percentiles(_windows(run, call))
    status = schema.OK if torch.isfinite(last[0]).item() else "wrong: the loss is no longer finite"
    return Timing(ms, host_us=host), status


def _windows(run: Run, call: Callable[[], object]) -> list[float]:
    """Milliseconds a step of each window: nothing waits for the GPU within one."""
    once = _seconds(run, call, 1)
    count, window = (WINDOWS, WINDOW) if run.on_gpu else (DRY_WINDOWS, DRY_WINDOW)
    steps = max(1, round(window / max(once, 1e-6)))
    return [1e3 * _seconds(run, call, steps) / steps for _ in range(count)]


def _seconds(run: Run, call: Callable[[], object], steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        call()
    if run.on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compiled(build: Callable[[], tuple[nn.Module, nn.Module]], run: Run, mode: str | None = None) -> Callable[[], Any]:
    """Network and loss under torch.compile. A dry run leaves Inductor out, which takes minutes on a CPU."""

    def made() -> tuple[Any, Any]:
        torch._dynamo.reset()
        options: dict[str, Any] = {"backend": "aot_eager"} if not run.on_gpu else {"mode": mode}
        model, loss = build()
        return torch.compile(model, dynamic=False, **options), torch.compile(loss, dynamic=False, **options)

    return made
