"""A draw as data: one operator's call, the state of the process around it, and what is done with its result."""

from __future__ import annotations

import dataclasses
from typing import Any

from tests.fuzz.recipes import T, shown

MODES = (
    "grad", "no_grad", "inference", "autocast bfloat16", "autocast float16", "autocast bfloat16 off",
    "autocast bfloat16 float16", "no_grad autocast bfloat16", "inference autocast bfloat16",
)  # fmt: skip
BACKWARDS = ("once", "twice", "double", "batched", "none")
GRADIENTS = ("contiguous", "sum", "expanded", "sliced", "transposed", "channels_last", "stepped", "offset")
HOOKS = ("copies", "other layout", "numpy", "float64 and back")
DEFAULTS = ("device meta", "dtype float64", "dtype bfloat16", "flush denormal")


@dataclasses.dataclass(frozen=True)
class Case:
    """``operator``: a key of operators.OPERATORS, which ``tensors`` and ``options`` are for.

    ``wanted``: whose gradients are asked for, None: of all that require one. ``mutate``: the tensor ("output": the
    result) written to between forward and backward. ``patched``: sizes from which fast ways are taken are 1.
    ``fresh``: what the pool of buffers believes of new memory. ``times``: how often, each with other values.
    ``between``: a call of another kind in between. ``seed``: torch's.
    """

    operator: str
    body: str
    tensors: dict[str, T]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    mode: str = "grad"
    backward: str = "once"
    gradient: str = "contiguous"
    wanted: tuple[str, ...] | None = None
    mutate: str | None = None
    hooks: str | None = None
    default: str | None = None
    threads: int = 2
    patched: bool = False
    fresh: bool | None = None
    deterministic: bool = True
    times: int = 1
    between: Case | None = None
    seed: int = 0

    __repr__ = shown

    def changed(self, **fields: Any) -> Case:
        return dataclasses.replace(self, **fields)

    @property
    def recorded(self) -> bool:
        """Whether autograd records the call."""
        return "no_grad" not in self.mode and "inference" not in self.mode
