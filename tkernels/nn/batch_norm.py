"""BatchNorm1d, BatchNorm2d and BatchNorm3d with a fused residual and activation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tkernels.core import activation as activations
from tkernels.core._torch import AnyBatchNorm
from tkernels.core.records import BatchNorm
from tkernels.ops.batch_norm import op as ops

if TYPE_CHECKING:
    _Base = AnyBatchNorm
else:
    _Base = object


def normalized(norm: AnyBatchNorm, input: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
    """activation(batch norm of ``input`` by a module of torch's or ours + ``residual``)."""
    norm._check_input_dim(input)
    tracks = norm.training and norm.track_running_stats
    running = not norm.training or norm.track_running_stats
    bn = BatchNorm(
        norm.running_mean if running else None,
        norm.running_var if running else None,
        norm.weight,
        norm.bias,
        norm.training or (norm.running_mean is None and norm.running_var is None),
        norm.momentum,
        norm.eps,
        norm.num_batches_tracked if tracks else None,
    )
    return ops.counted_batch_norm(input, bn, activation, residual)


class FusedBatchNorm(_Base):
    """What the three modules add to torch's: the constructor's ``activation``, ``forward`` with a residual."""

    activation: str | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        activation: str | None = None,
        **options: Any,
    ) -> None:
        activations.check(activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(batch norm of ``input`` + ``residual``); ``residual`` has the input's shape and dtype."""
        return normalized(self, input, self.activation, residual)

    def extra_repr(self) -> str:
        extra: str = super().extra_repr()
        return extra if self.activation is None else f"{extra}, activation={self.activation!r}"


class BatchNorm1d(FusedBatchNorm, torch.nn.BatchNorm1d):
    """torch.nn.BatchNorm1d for ``(N, C)`` or ``(N, C, L)``; ``forward(input, residual=None)`` adds a residual and
    applies an activation in the same call.

    Arguments, parameters, buffers and the state_dict are torch.nn.BatchNorm1d's. Errors as of
    :func:`tkernels.functional.batch_norm`.

    Args:
        activation: as of :func:`tkernels.functional.linear`

    Examples:
        >>> norm = tkernels.nn.BatchNorm1d(16, activation="relu")
        >>> norm(torch.randn(8, 16)).shape
        torch.Size([8, 16])
    """


class BatchNorm2d(FusedBatchNorm, torch.nn.BatchNorm2d):
    """torch.nn.BatchNorm2d for ``(N, C, H, W)``; ``forward(input, residual=None)`` adds a residual and
    applies an activation in the same call.

    Arguments, parameters, buffers and the state_dict are torch.nn.BatchNorm2d's. Errors as of
    :func:`tkernels.functional.batch_norm`.

    Args:
        activation: as of :func:`tkernels.functional.linear`

    Examples:
        >>> norm = tkernels.nn.BatchNorm2d(16, activation="relu")
        >>> x, shortcut = torch.randn(2, 8, 16, 6, 6)  # two tensors (8, 16, 6, 6)
        >>> norm(x, shortcut).shape  # relu(batch norm of x + shortcut)
        torch.Size([8, 16, 6, 6])
    """


class BatchNorm3d(FusedBatchNorm, torch.nn.BatchNorm3d):
    """torch.nn.BatchNorm3d for ``(N, C, D, H, W)``; ``forward(input, residual=None)`` adds a residual and
    applies an activation in the same call.

    Arguments, parameters, buffers and the state_dict are torch.nn.BatchNorm3d's. Errors as of
    :func:`tkernels.functional.batch_norm`.

    Args:
        activation: as of :func:`tkernels.functional.linear`

    Examples:
        >>> norm = tkernels.nn.BatchNorm3d(16, activation="relu")
        >>> norm(torch.randn(2, 16, 4, 6, 6)).shape
        torch.Size([2, 16, 4, 6, 6])
    """
