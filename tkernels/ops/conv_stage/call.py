"""What a call of a conv stage is made of: its layers' arguments, its pooling, and what all of that comes to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tkernels.ops.conv import op as conv_ops
from tkernels.ops.conv.config import Geometry
from tkernels.ops.conv_stage.config import Pooling

__all__ = ["TENSORS", "ConvBNLayer", "MaxPool", "Plan", "channels_last"]


# how many of a layer's fields are tensors; they come first
TENSORS = 7


class ConvBNLayer(NamedTuple):
    """One layer of a stage: a convolution's arguments and its batch norm's, named as in torch.nn.functional.

    ``running_mean`` and ``running_var`` None: the batch's statistics normalise, in evaluation too.
    ``num_batches_tracked``: an int64 tensor of shape (), which training adds one to; ``momentum`` None: running
    statistics average over all batches it counted. ``training``: for this layer's batch norm alone, where it is not the
    stage's. ``activation``: any that :func:`tkernels.functional.batch_norm` takes.
    """

    weight: Tensor
    bias: Tensor | None = None
    bn_weight: Tensor | None = None
    bn_bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] | str = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1
    momentum: float | None = 0.1
    eps: float = 1e-5
    training: bool | None = None
    activation: str | None = "relu"

    def counts(self, stage_training: bool) -> bool:
        """Whether this batch's statistics move the running ones."""
        return stage_training if self.training is None else self.training

    def measures(self, stage_training: bool) -> bool:
        """Whether this batch's statistics normalise it."""
        return self.running_mean is None or self.counts(stage_training)


class MaxPool(NamedTuple):
    """Max pooling's arguments as in torch.nn.functional.max_pool2d; ``stride`` None: the kernel's size."""

    kernel_size: int | Sequence[int]
    stride: int | Sequence[int] | None = None
    padding: int | Sequence[int] = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """A call without its tensors: what its shapes and arguments come to."""

    geometries: tuple[Geometry, ...]
    pool: Pooling
    dtype: torch.dtype
    p: float
    training: bool
    activations: tuple[str | None, ...]

    @property
    def plain_end(self) -> bool:
        """Whether nothing follows the last activation."""
        return self.pool.taps == 1 and self.pool.stride_h == 1 and self.pool.stride_w == 1 and self.p == 0.0


def channels_last(x: Tensor, weights: Sequence[Tensor], geometries: Sequence[Geometry]) -> list[bool]:
    """Of each layer whether torch's own calls in a row would give it a channels_last map. One of a single channel or
    pixel is contiguous as well, and leaves an activation as that."""
    found: list[bool] = []
    last = conv_ops.suggests_channels_last(x)
    for weight, g in zip(weights, geometries):
        found.append(last or conv_ops.suggests_channels_last(weight))
        last = found[-1] and g.out_channels > 1 and not g.out_h == g.out_w == 1
    return found
