"""The two bodies that are fuzzed, the sizes from which each takes its fast ways, and counts of what ran."""

from __future__ import annotations

import collections
import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch

import tkernels
from tests.fuzz.cases import Case
from tkernels.cpu import buffers, compiler, product

BODIES = ("cpu", "kernels")
_SMALL = {torch.float32: 1, torch.bfloat16: 1}
# sizes from which on the CPU's fast ways are taken, and what a patched case has in their place
THRESHOLDS: tuple[tuple[str, str, Any], ...] = (
    ("tkernels.cpu.packed", "WORTH_IT", _SMALL),
    ("tkernels.cpu.product", "ROWS", 1),
    ("tkernels.cpu.product", "FEATURES", 1),
    ("tkernels.cpu.product", "onednn_is_ahead", lambda threads: True),
    ("tkernels.cpu.buffers", "SMALLEST", 1),
    ("tkernels.cpu.norm", "WORTH_IT", 1),
    ("tkernels.cpu.loss", "WORTH_IT", 1),
    ("tkernels.cpu.loss", "SHORT_WORTH_IT", 1),
    ("tkernels.cpu.stage", "WORTH_IT", 1),
    ("tkernels.core.activation", "IN_PLACE", 1),
)
# names of what ran since the start: kernels launched, passes, oneDNN's products
RAN: collections.Counter[str] = collections.Counter()
_ONEDNN = product._onednn


def missing() -> list[str]:
    """Thresholds that the library has no more: draws would no longer take what they stood before."""
    return [f"{module}.{name}" for module, name, _ in THRESHOLDS if not hasattr(importlib.import_module(module), name)]


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def sizes(case: Case) -> Iterator[None]:
    """The thresholds that a case wants, and what the pool believes of new memory."""
    with contextlib.ExitStack() as stack:
        if case.patched:
            for module, name, value in THRESHOLDS:
                owner = importlib.import_module(module)
                if hasattr(owner, name):
                    stack.enter_context(replaced(owner, name, value))
        if case.fresh is not None:
            faulted = not case.fresh
            stack.enter_context(replaced(type(buffers.FRESH), "faulted", lambda self, nbytes: faulted))
        yield


@contextlib.contextmanager
def counting() -> Iterator[None]:
    """Within the block RAN counts passes and oneDNN's products."""
    run = compiler.Pass.__call__

    def counted(self: Any, *tensors: Any) -> Any:
        RAN[f"pass {self.name}"] += 1
        return run(self, *tensors)

    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(compiler.Pass, "__call__", counted))
        stack.enter_context(replaced(product, "_onednn", _counted_product))
        yield


def _counted_product(*tensors: Any) -> Any:
    RAN["product by oneDNN"] += 1
    return _ONEDNN(*tensors)


@contextlib.contextmanager
def opened(body: str) -> Iterator[Any]:
    """A process that runs this body: for kernels a session of the executor, whose state it gives."""
    with contextlib.ExitStack() as stack:
        if body == "cpu":
            stack.enter_context(counting())
            # autograd must have started before anything looks for a GPU
            torch.ones((), requires_grad=True).backward()
            yield None
            return
        from tests.gates import launches, ttsem

        state = ttsem.open_session(stack)
        launches.count_runs(_Names())
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        stack.enter_context(tkernels.backend("triton"))
        yield state


class _Names(list[str]):
    """What launches.count_runs adds kernels' names to."""

    def append(self, name: str) -> None:
        RAN[f"kernel {name}"] += 1


def autocast(body: str, dtype: torch.dtype, enabled: bool = True) -> contextlib.ExitStack:
    """torch.autocast of a body's device. Tensors that the executor calls cuda are torch's own CPU tensors: what torch
    computes of them, and what ours leave to it, is cast by the CPU's."""
    stack = contextlib.ExitStack()
    stack.enter_context(torch.autocast("cpu", dtype, enabled))
    if body == "kernels":
        stack.enter_context(torch.autocast("cuda", dtype, enabled))
    return stack


def left_on() -> bool:
    """Whether autocast is on where nobody asked for it; it is off then."""
    found = False
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            torch.set_autocast_enabled(device, False)
            found = True
    return found
