"""Cross entropy loss."""

from __future__ import annotations

import torch
from torch import Tensor

from tkernels.ops.cross_entropy.op import cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss, arguments, buffers and all; shapes and errors as of
    :func:`tkernels.functional.cross_entropy`.

    Examples:
        >>> criterion = tkernels.nn.CrossEntropyLoss(label_smoothing=0.1)
        >>> criterion(torch.zeros(3, 10), torch.tensor([4, 0, 7]))  # log 10
        tensor(2.3026)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing)
