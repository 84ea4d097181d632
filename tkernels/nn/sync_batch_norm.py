"""SyncBatchNorm, whose statistics are those of all processes, and the conversion of networks to it."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tkernels.core._torch import AnyBatchNorm
from tkernels.core.records import BatchNorm
from tkernels.nn.batch_norm import FusedBatchNorm
from tkernels.ops.batch_norm.sync import sync_batch_norm

__all__ = ["SyncBatchNorm"]


# not a torch.nn.SyncBatchNorm: DistributedDataParallel would refuse it on CPUs
class SyncBatchNorm(FusedBatchNorm, AnyBatchNorm):
    """Batch norm of ``(N, C, ...)`` that in training normalises by the statistics of all processes, on GPUs and CPUs,
    with a residual and an activation as :class:`tkernels.nn.BatchNorm2d`.

    Arguments and state_dict are torch.nn.SyncBatchNorm's. Every process must call it, forward and backward; numbers of
    values may differ. In evaluation, in one process and without torch.distributed it is batch norm. Weight and bias get
    this process's gradients, for DistributedDataParallel to average. Errors as of
    :func:`tkernels.functional.batch_norm`.

    Args:
        process_group: whose statistics count; None: all of the job
        activation: as of :func:`tkernels.functional.linear`

    Examples:
        >>> norm = tkernels.nn.SyncBatchNorm(16, activation="relu")
        >>> norm(torch.randn(8, 16, 6, 6)).shape
        torch.Size([8, 16, 6, 6])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        activation: str | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, activation)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(batch norm of ``input`` + ``residual``); ``residual`` has the input's shape and dtype."""
        measures = self.training or (self.running_mean is None and self.running_var is None)
        if not (measures and _several_processes(self.process_group)):
            return super().forward(input, residual)
        self._check_input_dim(input)
        tracks = self.training and self.track_running_stats
        bn = BatchNorm(
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            self.weight,
            self.bias,
            True,
            self.momentum,
            self.eps,
            self.num_batches_tracked if tracks else None,
        )
        return sync_batch_norm(input, bn, self.activation, residual, self.process_group)

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """``module`` with every BatchNorm1d, 2d and 3d (torch's and ours) replaced by this class, as
        torch.nn.SyncBatchNorm's: the same parameters, buffers and state_dict keys; ``module`` itself is changed.

        Statistics that cross processes come between a convolution and its normalisation, so
        :class:`tkernels.nn.ConvStage` and :class:`tkernels.nn.ConvBNReLU2d` call their layers one by one then.

        Examples:
            >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
            >>> model = tkernels.nn.SyncBatchNorm.convert_sync_batchnorm(model)
            >>> isinstance(model[1], tkernels.nn.SyncBatchNorm)
            True
        """
        if isinstance(module, AnyBatchNorm) and not isinstance(module, cls):
            return _converted_norm(cls, module, process_group)
        for name, child in module.named_children():
            converted = cls.convert_sync_batchnorm(child, process_group)
            if converted is not child:
                setattr(module, name, converted)
        return module


def _several_processes(group: Any) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def _converted_norm(cls: type[SyncBatchNorm], norm: AnyBatchNorm, group: Any) -> SyncBatchNorm:
    """The same batch norm, synchronised: it takes over parameters and buffers."""
    if norm.affine and norm._parameters.keys() != {"weight", "bias"}:
        raise TypeError(
            f"weight and bias of {type(norm).__name__} must be parameters to be converted to SyncBatchNorm, got "
            f"{list(norm._parameters)}: remove its pruning or parametrization first"
        )
    activation = getattr(norm, "activation", None)
    converted = cls(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, group, "meta", None,
        activation,
    )  # fmt: skip
    for name, parameter in norm.named_parameters(recurse=False):
        setattr(converted, name, parameter)
    for name, buffer in norm.named_buffers(recurse=False):
        setattr(converted, name, buffer)
    return converted.train(norm.training)


def _keep_ours() -> None:
    """torch's own conversion makes a torch.nn.SyncBatchNorm of whatever is a batch norm, by the arguments that torch's
    has: of ours it would drop the activation without a word. It asks for ours here instead."""
    torch_convert = torch.nn.SyncBatchNorm.convert_sync_batchnorm.__func__  # type: ignore[attr-defined]

    @functools.wraps(torch_convert)
    def convert(cls: Any, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        if isinstance(module, FusedBatchNorm):
            return SyncBatchNorm.convert_sync_batchnorm(module, process_group)
        converted: torch.nn.Module = torch_convert(cls, module, process_group)
        return converted

    torch.nn.SyncBatchNorm.convert_sync_batchnorm = classmethod(convert)  # type: ignore[assignment]


_keep_ours()
