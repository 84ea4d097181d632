"""Where our training step goes, kernel by kernel; in a process of its own, so that nothing is timed or captured where a
profiler has been."""

from __future__ import annotations

import functools
from typing import Any

import torch

from perf.bench.gpu import headline, training
from perf.bench.gpu.results import ProfileRow
from perf.bench.gpu.session import Item, Run
from perf.bench.gpu.training import Contender
from perf.static import traffic

# steps that are profiled, and rows kept of the profile
STEPS, ROWS = 5, 40


def items(run: Run) -> list[Item]:
    """One profile."""
    batch = (headline.DRY_BATCHES if run.request.dry else headline.BATCHES)[0]
    return [Item("profile", functools.partial(_profile, run, Contender("tkernels", traffic.fused), batch))]


def _profile(run: Run, contender: Contender, batch: int) -> None:
    """Time on the device by kernel, from PyTorch's profiler; on a CPU by operator."""
    from torch.profiler import ProfilerActivity, profile

    if run.on_gpu:
        torch.cuda.set_device(torch.device(run.device).index or 0)
    call = training.step(run, contender, headline.workload(batch))
    for _ in range(3):
        call()
    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU] if run.on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        for _ in range(STEPS):
            call()
        if run.on_gpu:
            torch.cuda.synchronize()
    rows = [row for event in recorded.key_averages() if (row := _row(run, event)) is not None]
    total = sum(row.us for row in rows)
    rows.sort(key=lambda row: -row.us)
    run.tell("profile", [row.having(share=row.us / total) for row in rows[:ROWS]])


def _row(run: Run, event: Any) -> ProfileRow | None:
    """One kernel's part of the profile. A range that somebody named, as each of our launches and an optimizer's step,
    is told on the device too, beside the kernels within."""
    on_device = "CUDA" in str(event.device_type)
    if on_device != run.on_gpu or event.is_user_annotation:
        return None
    us = event.self_device_time_total if run.on_gpu else event.self_cpu_time_total
    return ProfileRow(kernel=event.key, calls=event.count / STEPS, us=us / STEPS) if us else None
