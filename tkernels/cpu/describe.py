"""What of this folder runs on this machine, and what is in the way of the rest: for python -m tkernels."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import torch

from tkernels.core import _torch, hardware
from tkernels.cpu import compiler, packed, product
from tkernels.cpu.guard import DTYPES

NO_ONEDNN = "this torch has no oneDNN, or it is off"


def describe() -> Iterator[tuple[str, str]]:
    """(what, by whom it is computed and why). One pass is compiled to see whether any can be: some seconds where the
    cache is empty."""
    for dtype in (torch.bfloat16, torch.float16):
        yield f"{_name(dtype)} instructions", ", ".join(hardware.cpu_instructions(dtype)) or "none"
    yield "C++ compiler", _cpp_compiler()
    why_not = compiler.why_not()
    yield "compiled passes", f"none: {why_not}" if why_not else f"compile, for {_torch.pick_vec_isa()}"
    compiled = () if why_not else DTYPES
    onednn = tuple(dtype for dtype in compiled if packed.enabled(dtype))
    for name, dtypes, by_whom in (
        ("conv_stage", onednn, "oneDNN and compiled passes"),
        ("batch_norm", compiled, "compiled passes"),
        ("cross_entropy", compiled, "compiled passes"),
        ("fused chains", compiled, "compiled passes"),
        ("inference's convolutions", onednn, "oneDNN, by weights kept in its order"),
    ):
        said = f"{by_whom}, in {' and '.join(map(_name, dtypes))}"
        yield name, said if dtypes else f"PyTorch's: {'nothing compiles' if why_not else NO_ONEDNN}"
    yield "inference's linear layers", _linear()


def _linear() -> str:
    if not packed.enabled(torch.float32):
        return f"PyTorch's: {NO_ONEDNN}"
    if torch.are_deterministic_algorithms_enabled():
        return (
            "PyTorch's: deterministic algorithms are asked for, and oneDNN is taken where it is measured to be faster"
        )
    ahead = product.onednn_is_ahead(torch.get_num_threads())
    return "oneDNN, in float32: measured to be faster here" if ahead else "PyTorch's: measured to be as fast here"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cpp_compiler() -> str:
    """Inductor's choice, by the first line that it says of itself."""
    try:
        command = _torch.cpp_compiler()
        done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60, check=True)
    except Exception as error:  # Inductor's own classes, and what a system says of programs
        return f"none found: {' '.join(str(error).split())[:200]}"
    return f"{shutil.which(command) or command}: {done.stdout.splitlines()[0]}"
