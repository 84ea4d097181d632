"""The machine, and the two rates that everything else is held against."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from perf import schema
from perf.bench import machine, measure, rows
from perf.bench.gpu.session import Item, Run
from perf.bench.measure import Timing
from perf.schema import Measurement
from tkernels.core import targets

# of nvidia-smi's long report what decides how fast a GPU is
SECTIONS = ("CLOCK", "POWER", "TEMPERATURE", "PERFORMANCE", "ECC", "MEMORY")


def items(run: Run) -> list[Item]:
    """Facts, then ceilings; last what nvidia-smi is asked, which may take its time."""
    return [
        Item("machine", lambda: _machine(run)),
        Item("copy", lambda: _copy(run)),
        Item("product", lambda: _product(run)),
        Item("nvidia-smi", lambda: _told(run, machine.smi(run.device))),
    ]


def _machine(run: Run) -> None:
    run.tell("target", targets.current() if run.on_gpu else targets.TARGETS["sm_90"])
    found = {**machine.facts(run.device), "python": sys.version.split()[0], "system": platform.platform()}
    _told(run, found)


def _told(run: Run, found: dict[str, str]) -> None:
    run.tell("facts", {name: value for name, value in found.items() if value})


def details() -> str:
    """nvidia-smi's report, as far as it says what state the GPU is in; empty where it does not. Asks, sets nothing."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return ""
    try:
        told = subprocess.run([smi, "-q", "-d", ",".join(SECTIONS)], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return told.stdout


def _copy(run: Run) -> None:
    """Copying much more than any cache holds, bytes read and written counted."""
    size = 1 << (32 if run.on_gpu else 24)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=run.device)
    goal = torch.empty_like(source)
    timing = _timed(run, lambda: goal.copy_(source))
    rate = 2 * size / timing.ms.p50 / 1e6
    _tell(run, timing, operator="copy", N=size, bytes=2 * size, gbps=rate)
    run.tell("facts", {"copy": f"{rate:,.0f} GB/s"})


def _product(run: Run) -> None:
    """A large bf16 product by the vendor's library, on random values."""
    size = 8192 if run.on_gpu else 256
    a, b = (torch.randn(size, size, device=run.device, dtype=torch.bfloat16) for _ in range(2))
    timing = _timed(run, lambda: a @ b)
    flops = 2.0 * size**3
    rate = flops / timing.ms.p50 / 1e9
    _tell(run, timing, operator="matmul", dtype="bf16", N=size, C=size, K=size, flops=flops, tflops=rate)
    run.tell("facts", {"product": f"{rate:,.3g} TFLOP/s"})


def _timed(run: Run, call: Any) -> Timing:
    if run.on_gpu:
        return measure.on_gpu(lambda: call, "wall", measure.QUICK)
    return measure.interleaved({"": call}, measure.QUICK)[""]


def _tell(run: Run, timing: Timing, **columns: Any) -> None:
    named = {"mode": "fwd", "provider": "torch", "timing": "wall", "status": schema.OK}
    run.tell("timing", rows.made(Measurement, run.device, **named, **timing.columns(), **columns))


def write_environment(path: Path, facts: dict[str, str]) -> None:
    """Everything known of the machine, for a reader who was not there."""
    from importlib import metadata

    packages = sorted({f"{d.name}=={d.version}" for d in metadata.distributions()}, key=str.lower)
    lines = [f"{name}: {value}" for name, value in facts.items()]
    path.write_text("\n".join([*lines, "", *packages, "", details()]) + "\n")
