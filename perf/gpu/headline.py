"""The headline: a training step of the CIFAR CNN with its optimizer, ours and everybody's, and where ours goes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from perf import traffic
from perf.gpu import training
from perf.gpu.session import Item, Run
from perf.gpu.training import Rival, Task
from tkernels import launch

BATCHES, DRY_BATCHES = (256, 1024, 64), (4,)
# who is ready at once, and who compiles for a minute or more, at the first batch and then at the others
AT_ONCE = ("tkernels", "tkernels graph", "torch", "torch graph")
ONCE = ("tkernels fast launch", "tkernels sgd graph")
COMPILED, MODES = "torch.compile", ("reduce-overhead", "max-autotune")
# steps that are profiled, and rows kept of the profile
STEPS, ROWS = 5, 40


def items(run: Run) -> list[Item]:
    """Batch by batch, whatever takes longest to compile last."""
    first, *others = DRY_BATCHES if run.request.dry else BATCHES
    rivals = {rival.name: rival for rival in _rivals(run)}
    found = [_item(run, rivals[name], first) for name in AT_ONCE]
    found.append(Item("profile", functools.partial(_profile, run, rivals["tkernels"], first)))
    found += [_item(run, rivals[name], first) for name in ONCE]
    found += [_item(run, rivals[name], others[0]) for name in AT_ONCE if others]
    found.append(_item(run, rivals[COMPILED], first))
    found += [_item(run, rivals[name], batch) for batch in others[1:] for name in AT_ONCE]
    found += [_item(run, rivals[f"{COMPILED} {mode}"], first) for mode in MODES[:1]]
    found += [_item(run, rivals[COMPILED], batch) for batch in others]
    return [*found, *(_item(run, rivals[f"{COMPILED} {mode}"], first) for mode in MODES[1:])]


def _item(run: Run, rival: Rival, batch: int) -> Item:
    return Item(f"batch {batch} {rival.name}", lambda: run.tell_timing(training.measured(run, rival, _task(batch))))


def _task(batch: int) -> Task:
    return Task("cnn", {"N": batch, "C": 3, "H": 32, "W": 32}, 10)


def _rivals(run: Run) -> Iterator[Rival]:
    yield Rival("tkernels", traffic.fused)
    yield Rival("tkernels graph", traffic.fused, graph=True)
    yield Rival("tkernels fast launch", traffic.fused, context=functools.partial(launch.fast, True))
    yield Rival("tkernels sgd graph", traffic.fused, graph=True, optimizer="sgd")
    yield Rival("torch", traffic.plain, context=tuned)
    yield Rival("torch graph", traffic.plain, graph=True, context=tuned)
    yield Rival(COMPILED, training.compiled(traffic.plain, run), context=tuned)
    for mode in MODES:
        build = training.compiled(traffic.plain, run, mode)
        yield Rival(f"{COMPILED} {mode}", build, replayed=run.on_gpu, context=tuned)


@contextlib.contextmanager
def tuned() -> Iterator[None]:
    """cuDNN tries its algorithms and takes the fastest."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _profile(run: Run, rival: Rival, batch: int) -> None:
    """Time on the device by kernel, from PyTorch's profiler; on a CPU by operator."""
    from torch.profiler import ProfilerActivity, profile

    call = training.step(run, rival, _task(batch))
    for _ in range(3):
        call()
    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU] if run.on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        for _ in range(STEPS):
            call()
        if run.on_gpu:
            torch.cuda.synchronize()
    rows = [row for event in recorded.key_averages() if (row := _row(run, event)) is not None]
    total = sum(row["us"] for row in rows)
    rows.sort(key=lambda row: -row["us"])
    run.tell("profile", [{**row, "share": row["us"] / total} for row in rows[:ROWS]])


def _row(run: Run, event: Any) -> dict[str, Any] | None:
    """One kernel's part of the profile."""
    on_device = "CUDA" in str(event.device_type)
    if on_device != run.on_gpu:
        return None
    us = event.self_device_time_total if run.on_gpu else event.self_cpu_time_total
    return {"kernel": event.key, "calls": event.count / STEPS, "us": us / STEPS} if us else None
