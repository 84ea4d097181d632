"""The passes of cross entropy on a CPU, over dense logits [N, C].

A row's softmax is exp(x - top - log_sum), with ``top`` its largest logit and ``log_sum`` the logarithm of the sum of
exp(x - top): float32 [N], all that is kept of a row. Arithmetic is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tkernels.cpu.compiler import Pass


def _softmax_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.float()
    top = x.amax(1)
    return top, torch.exp(x - top[:, None]).sum(1).log()


def _softmax_statistics_and_sum(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Also each row's sum of x - top."""
    x = x.float()
    top = x.amax(1)
    d = x - top[:, None]
    return top, torch.exp(d).sum(1).log(), d.sum(1)


def _cross_entropy_gradient(
    x: Tensor, top: Tensor, log_sum: Tensor, target: Tensor, whole: Tensor, hot: Tensor, flat: Tensor, out: Tensor
) -> tuple[()]:
    """softmax * ``whole``, less ``hot`` at the row's ``target`` (int32), less ``flat`` everywhere; all three [N]."""
    p = torch.exp(x.float() - top[:, None] - log_sum[:, None])
    here = torch.arange(x.shape[1], dtype=torch.int32, device="cpu") == target[:, None]
    out.copy_(p * whole[:, None] - torch.where(here, hot[:, None], 0.0) - flat[:, None])
    return ()


softmax_statistics = Pass(_softmax_statistics, channels=False)
softmax_statistics_and_sum = Pass(_softmax_statistics_and_sum, channels=False)
cross_entropy_gradient = Pass(_cross_entropy_gradient, channels=False)
