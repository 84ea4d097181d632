"""What the tests of attention share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tkernels.functional import scaled_dot_product_attention


def factors(q: Tensor, k: Tensor, p: float, **options: Any) -> Tensor:
    """Dropout's factors [B, H, L, S] of the next call on such tensors: the output for equal weights and unit values."""
    n_k = k.shape[-2]
    unit = torch.eye(n_k, device=q.device, dtype=torch.float32).expand(*q.shape[:2], n_k, n_k)
    zeros = torch.zeros_like(q, dtype=torch.float32), torch.zeros_like(k, dtype=torch.float32)
    return scaled_dot_product_attention(*zeros, unit, None, p, **options).detach() * n_k
