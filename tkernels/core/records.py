"""What operators hand on as one: arguments that belong together, and what one kernel leaves for the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tkernels.core.geometry import Geometry, Pooling


class BatchNorm(NamedTuple):
    """A batch norm as called: vectors (C), and numbers as in torch.nn.functional.batch_norm.

    ``training``: the batch's statistics normalise and move the running ones, where given. ``momentum`` None: those are
    the average over all batches that ``num_batches_tracked`` (int64, shape ()) counted; training adds one to it.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    momentum: float | None
    eps: float
    num_batches_tracked: Tensor | None = None

    @property
    def vectors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Running mean and variance, weight, bias."""
        return self.running_mean, self.running_var, self.weight, self.bias


class Norm(NamedTuple):
    """What normalises: ``mean`` and ``var`` are running statistics, or ``mean`` is the batch's [4, C] from
    launch_finalize_statistics and ``var`` None."""

    mean: Tensor
    var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Partials(NamedTuple):
    """What the first stage of a reduction wrote, and how many programs wrote it."""

    data: Tensor
    producers: int


class LossOptions(NamedTuple):
    """Cross entropy's, as in torch.nn.functional.cross_entropy; ``smoothing``: its ``label_smoothing``."""

    ignore_index: int
    reduction: str
    smoothing: float


class WeightSums(NamedTuple):
    """A layer's workspace from launch_wgrad and what to make of it: gradients like ``weight`` and ``bias`` (None: not
    wanted), and one like ``unmoved``, a bias that batch statistics take away again: zeros."""

    workspace: Tensor
    geometry: Geometry
    weight: Tensor
    bias: Tensor | None
    unmoved: Tensor | None


class Route(NamedTuple):
    """Which of a convolution's products PyTorch computes: of the output, the input's gradient, the weight's."""

    forward: bool = False
    dgrad: bool = False
    wgrad: bool = False


OURS = Route()

# how many of a layer's fields are tensors; they come first
TENSORS = 7


class ConvBNLayer(NamedTuple):
    """One layer of a stage: a convolution's arguments and its batch norm's, named as in torch.nn.functional.

    All but ``weight`` may be left out: numbers are torch's defaults then, and the activation is 'relu'.

    Attributes:
        weight: ``(C_out, C_in / groups, kernel_h, kernel_w)``
        bias: ``(C_out)``, the convolution's
        bn_weight: ``(C_out)``, as is each of the batch norm's tensors
        bn_bias: ``(C_out)``
        running_mean: None, and ``running_var`` too: the batch's statistics normalise, in evaluation as well
        running_var: as ``running_mean``
        num_batches_tracked: an int64 tensor of shape ``()``, which training adds one to
        stride: an int or a pair
        padding: an int, a pair, 'same' or 'valid'
        dilation: an int or a pair
        groups: how many groups of channels are convolved apart
        momentum: None: running statistics average over all batches that were counted
        eps: is added to the variance
        training: of this layer's batch norm alone, where it is not the stage's
        activation: as of :func:`tkernels.functional.linear`

    Examples:
        >>> conv, norm = torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.BatchNorm2d(8)
        >>> layer = tkernels.functional.ConvBNLayer(
        ...     conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var, stride=2
        ... )
        >>> x = torch.randn(2, 3, 15, 15)
        >>> y = tkernels.functional.conv_stage(x, [layer])
        >>> torch.allclose(y, torch.relu(norm.eval()(conv(x))), atol=1e-5)
        True
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

    def without_tensors(self) -> ConvBNLayer:
        """Its numbers and names alone."""
        return ConvBNLayer._make((*[None] * TENSORS, *self[TENSORS:]))

    def batch_norm(self, stage_training: bool) -> BatchNorm:
        """The layer's batch norm, without the counter where it does not count."""
        counter = self.num_batches_tracked if self.counts(stage_training) else None
        measures = self.measures(stage_training)
        return BatchNorm(self.running_mean, self.running_var, self.bn_weight, self.bn_bias, measures, self.momentum,
                         self.eps, counter)  # fmt: skip


class MaxPool(NamedTuple):
    """Max pooling's arguments as in torch.nn.functional.max_pool2d.

    Attributes:
        kernel_size: an int or a pair
        stride: an int or a pair; None: the kernel's size
        padding: an int or a pair, 0 where it is left out

    Examples:
        >>> pool = tkernels.functional.MaxPool(3, stride=2, padding=1)
        >>> stage = tkernels.nn.ConvStage([3, 8], kernel_size=7, stride=2, padding=3, pool=pool)
        >>> stage(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 8, 8, 8])
    """

    kernel_size: int | Sequence[int]
    stride: int | Sequence[int] | None = None
    padding: int | Sequence[int] = 0


@dataclasses.dataclass(frozen=True)
class StageCall:
    """A call of a conv stage without its tensors: what its shapes and arguments come to.

    ``routes``: who computes each layer's products. ``twice``: whether it gives its result as two tensors, each of which
    has a gradient. ``shortcut``: whether the last layer is the residual's.
    """

    geometries: tuple[Geometry, ...]
    pool: Pooling
    dtype: torch.dtype
    p: float
    training: bool
    activations: tuple[str | None, ...]
    routes: tuple[Route, ...] = ()
    twice: bool = False
    shortcut: bool = False

    @property
    def depth(self) -> int:
        """How many layers follow one another."""
        return len(self.geometries) - self.shortcut

    def route(self, i: int) -> Route:
        """Of layer ``i``; all ours where nothing is said."""
        return self.routes[i] if self.routes else OURS

    @property
    def plain_end(self) -> bool:
        """Whether nothing follows the last activation."""
        return self.pool.taps == 1 and self.pool.stride_h == 1 and self.pool.stride_w == 1 and self.p == 0.0
