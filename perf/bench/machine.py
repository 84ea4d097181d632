"""The machine a measurement ran on: its names, versions and peak rates."""

from __future__ import annotations

import functools
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch

from perf import options, providers
from tkernels.core import hardware, mode, targets

# bytes read and written by the copies that a CPU's bandwidth is measured with
SMALLEST_COPY, LARGEST_COPY = 1 << 18, 1 << 26


@functools.cache
def facts(device: str) -> dict[str, str]:
    """What is the same for all rows: commit, host, device, driver, versions."""
    return {
        "commit": options.commit(),
        "host": socket.gethostname(),
        "device": device_name(device),
        "driver": "" if device == "cpu" else driver(),
        **providers.versions(),
    }


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's with torch's number of threads."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"cpu: {hardware.cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"


def driver() -> str:
    """The GPU driver's version, empty where nvidia-smi does not tell."""
    told = hardware.ask_smi("driver_version")
    return told[0] if told else ""


@functools.cache
def smi(device: str) -> dict[str, str]:
    """What nvidia-smi knows of the machine's GPUs that decides how fast they are; empty on a CPU or without it."""
    if device == "cpu":
        return {}
    asked = {"GPU": "name", "memory": "memory.total", "power limit": "power.limit", "highest SM clock": "clocks.max.sm",
             "highest memory clock": "clocks.max.memory", "MIG": "mig.mode.current"}  # fmt: skip
    return {name: "; ".join(hardware.ask_smi(field)) for name, field in asked.items()}


def peaks(device: str, dtype: torch.dtype, kind: mode.Op, moved: int) -> tuple[float, float]:
    """Peak 10^12 operations and 10^9 bytes a second: a GPU's from its data sheet, a CPU's as measured.

    ``kind``: whose float32 switch of torch decides between tf32 and IEEE products. ``moved``: bytes of the problem;
    what a CPU's caches hold is compared with a copy that they hold too.
    """
    if device != "cpu":
        target = targets.current()
        if dtype != torch.float32:
            return target.tflops, target.gbps
        # tf32 runs at half the rate of bf16
        return target.tflops / 2 if mode.dot_precision(dtype, kind) == "tf32" else target.tflops_fp32, target.gbps
    # the best of all copies as large or larger: a cache is no slower than what is behind it, and one copy of them may
    # have been disturbed
    least = min(max(moved, SMALLEST_COPY), LARGEST_COPY)
    sizes = range((least - 1).bit_length(), LARGEST_COPY.bit_length())
    return _measured_tflops(dtype), max(_measured_gbps(1 << size) for size in sizes)


@functools.cache
def cache_bytes(device: str) -> int:
    """What the last level of cache holds; 0 where the system does not tell."""
    if device != "cpu":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    told = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text().strip().removesuffix("K")) << 10 for path in told), default=0)


@functools.cache
def _measured_gbps(moved: int) -> float:
    """Of a copy that reads and writes so many bytes in all."""
    source = torch.zeros(moved // 2, dtype=torch.uint8)
    goal = torch.ones_like(source)
    # long enough for the clock and the interpreter not to matter
    times = max(1, (1 << 21) // moved)

    def copies() -> None:
        for _ in range(times):
            goal.copy_(source)

    return times * moved / _best(copies) / 1e9


@functools.cache
def _measured_tflops(dtype: torch.dtype) -> float:
    # few CPUs multiply 16-bit numbers faster than float32, many much slower
    return max(_product_tflops(kind, n) for kind, n in ((dtype, 128), (torch.float32, 384), (torch.float32, 768)))


def _product_tflops(dtype: torch.dtype, n: int) -> float:
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    return 2 * n**3 / _best(lambda: a @ b) / 1e12


def _best(call: Callable[[], object], repetitions: int = 15) -> float:
    def once() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    call()
    return min(once() for _ in range(repetitions))
