"""What the tests of the CPU's part share."""

from __future__ import annotations

import torch
from torch import Tensor

from tkernels.cpu import buffers

SIZE = 4096


def take(pool: buffers.Pool, nbytes: int = SIZE) -> Tensor:
    """Bytes of a pool."""
    return pool.take(torch.uint8, (nbytes,), (1,), nbytes)
