"""Cross entropy loss."""

from __future__ import annotations

import torch
from torch import Tensor

from tkernels.ops.cross_entropy.op import cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss, arguments, buffers and all; errors as :func:`tkernels.functional.cross_entropy`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing)
