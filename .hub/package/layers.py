"""Layers whose forward takes the place of another's (kernels.kernelize): they read its parameters and add nothing.

Those of torch.nn's names are for torch.nn's layers. LinearReLU: for a linear layer with a ReLU behind it. ConvBNReLU2d:
for a block of ``conv`` and ``bn`` (torch.nn's), and a ReLU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tkernels.functional import conv2d, cross_entropy, linear
from tkernels.nn.batch_norm import normalized
from tkernels.nn.conv_stage import run_stage


class Linear(torch.nn.Module):
    can_torch_compile = True
    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class LinearReLU(torch.nn.Module):
    can_torch_compile = True
    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, "relu")


class Conv2d(torch.nn.Module):
    can_torch_compile = True
    weight: Tensor
    bias: Tensor | None
    stride: Any
    padding: Any
    dilation: Any
    groups: int
    padding_mode: str

    def forward(self, input: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            sides: Any = self._reversed_padding_repeated_twice
            input, padding = torch.nn.functional.pad(input, sides, self.padding_mode), 0
        return conv2d(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class BatchNorm1d(torch.nn.Module):
    can_torch_compile = True

    def forward(self: Any, input: Tensor) -> Tensor:
        return normalized(self, input, None, None)


class BatchNorm2d(BatchNorm1d):
    """The module that it stands for says how many axes it takes."""


class BatchNorm3d(BatchNorm1d):
    """As BatchNorm2d."""


class ConvBNReLU2d(torch.nn.Module):
    can_torch_compile = True
    conv: torch.nn.Conv2d
    bn: torch.nn.BatchNorm2d

    def forward(self, x: Tensor) -> Tensor:
        return run_stage([(self.conv, self.bn)], x, None, 0.0, self.training)


class CrossEntropyLoss(torch.nn.Module):
    can_torch_compile = True
    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing)
