"""Products whose operands Hopper's copy engine (TMA) fetches: by descriptors, which the host makes of tensors.

An experiment, off unless TKERNELS_TMA=1: the kernels that take descriptors (ops/*/kernels_tma.py) have values proven
and are compiled, but no GPU has said yet whether they are faster: ``python -m perf gpu --only ab`` asks one. A plan
makes descriptors anew each time it runs, for they hold an address.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tkernels.core import mode, plan, settings, targets
from tkernels.core.targets import Target

if mode.HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

enabled = settings.TMA.is_on()
DTYPES = (torch.bfloat16, torch.float16)
ALIGNMENT = 16  # bytes: of addresses, and of all strides but the dense dimension's
BARRIERS = 1024  # bytes of shared memory, at the most


def on(target: Target) -> bool:
    """Whether the option is, and a target has such an engine."""
    return enabled and target.is_nvidia and int(target.arch) >= 90


def take(*tensors: Tensor) -> bool:
    """Whether kernels may be given descriptors of these tensors (or slots), as far as the target, their dtype and
    where they start decide."""
    if not on(targets.current()):
        return False
    dtype = tensors[0].dtype
    return dtype in DTYPES and all(t.dtype is dtype and plan.starts_at(t, ALIGNMENT) for t in tensors)


def describe(t: Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]) -> Any:
    """A descriptor of ``t``'s memory as a tensor of ``shape`` and ``strides``, which the engine fetches and stores
    ``block`` by block: 0 comes for what is outside of the shape, and is not stored."""
    return plan.value(_descriptor, t, tuple(shape), tuple(strides), tuple(block))


def _descriptor(t: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]) -> Any:
    return TensorDescriptor(t, list(shape), list(strides), list(block))


def programs(tiles: int) -> int:
    """How many share the tiles, each of which takes one after another: one a multiprocessor."""
    return min(targets.current().multiprocessors, tiles)


def stages(operand_bytes: int, result_bytes: int) -> int:
    """Stages of the pipeline, up to 4, that fit beside the tile of the result."""
    return min(4, (targets.current().shared_memory - BARRIERS - result_bytes) // operand_bytes)
