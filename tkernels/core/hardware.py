"""Which dtypes a device computes in by instructions of its own; what the system tells of CPU, GPUs and compilers."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import platform
import subprocess
from pathlib import Path

import torch

from tkernels.core import _torch, targets

# by dtype, what oneDNN computes products with, of what CPUs may have (torch.cpu.get_capabilities): x86, then Arm
_INSTRUCTIONS = {
    torch.bfloat16: ({"avx512_bf16": "AVX512-BF16", "amx_tile": "AMX-BF16"}, {"bf16": "Arm's BF16"}),
    torch.float16: ({"avx512_fp16": "AVX512-FP16", "amx_fp16": "AMX-FP16"}, {"fp16_arith": "Arm's FP16"}),
}


@functools.cache
def cpu_instructions(dtype: torch.dtype) -> tuple[str, ...]:
    """Names of this CPU's instructions for a 16-bit dtype; none for another."""
    has = _torch.cpu_features()
    return tuple(said for kind in _INSTRUCTIONS.get(dtype, ()) for name, said in kind.items() if has.get(name))


def why_slow(dtype: torch.dtype, device: torch.device | str) -> str | None:
    """Why products in ``dtype`` are slower on a device than in float32, and what to take instead; None where it has
    instructions for them, or nothing is known of its kind."""
    device = torch.device(device)
    if dtype not in _INSTRUCTIONS or device.type not in ("cpu", "cuda"):
        return None
    name = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        arch, first = targets.of(device).arch, {torch.bfloat16: 80, torch.float16: 70}[dtype]
        if not isinstance(arch, int) or arch >= first:
            return None
        what = f"this GPU, of compute capability {arch / 10}, has no {name} instructions (from {first / 10} on)"
        half = dtype is torch.bfloat16 and why_slow(torch.float16, device) is None
        return f"{what}: take float32{' or float16' if half else ''}"
    if cpu_instructions(dtype):
        return None
    names = ", ".join(said for kind in _INSTRUCTIONS[dtype] for said in kind.values())
    instead = "bfloat16, for which it has some" if cpu_instructions(torch.bfloat16) else "float32"
    return f"this CPU has no {name} instructions ({names}) and is slower in it than in float32: take {instead}"


def cpu_model() -> str:
    """The processor's name where the system tells it, else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def printed(*command: str) -> list[str]:
    """The lines that a program prints; none where it fails or is not there."""
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return told.stdout.strip().splitlines()


def ask_smi(field: str) -> list[str]:
    """What nvidia-smi calls by that name, a line a GPU; none without it."""
    return printed("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader")


def find_cuda() -> None:
    """Look for CUDA's compiler, as Inductor is about to. Where there is one and no GPU, torch warns as it looks, once;
    nobody has anything to do about that."""
    log = logging.getLogger("torch.utils.cpp_extension")
    disabled, log.disabled = log.disabled, True
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module("torch.utils.cpp_extension")
    finally:
        log.disabled = disabled
