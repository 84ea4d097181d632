"""Which calls the CPU's fast ways may take at all. What an operator asks beyond that stands with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from tkernels.core import _torch
from tkernels.core.mode import plain_eager

PLAIN = (Tensor, torch.nn.Parameter)
DTYPES = (torch.float32, torch.bfloat16)


def supports(x: Any, smallest: int = 0) -> bool:
    """Whether a call whose first tensor ``x`` has at least ``smallest`` bytes may go a fast way. Nothing depends on
    what ran before."""
    # in this order: a trace must not learn of sizes (Dynamo is gone after the first line, fake tensors and subclasses
    # after the second; torch.jit.trace does not see nbytes), and most calls that are left are too small
    return (
        not is_dynamo_compiling()
        and type(x) in PLAIN
        and x.nbytes >= smallest
        and is_plain(x)
        and x.dtype in DTYPES
        and not x.is_neg()
        and plain_eager()
    )


def are_plain(tensors: Sequence[Tensor | None], *dtypes: torch.dtype) -> bool:
    """Whether a call's other tensors are as plain, and in one of these dtypes."""
    return all(t is None or (is_plain(t) and t.dtype in dtypes and not t.is_neg()) for t in tensors)


def recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call with these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_plain(t: Any) -> bool:
    """Whether that is a tensor with memory of its own on a CPU, rather than one that stands for a GPU's or a batch."""
    return (
        type(t) in PLAIN
        and t.device.type == "cpu"
        and not t.is_cuda
        and t.layout is torch.strided
        and not _torch.is_wrapped(t)
        and not _torch.is_legacy_batched(t)
    )
