"""SyncBatchNorm, whose statistics are those of all processes, and the conversion of networks to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tkernels import functional
from tkernels.nn.batch_norm import _FusedBatchNorm
from tkernels.nn.conv_stage import ConvBNReLU2d, ConvStage
from tkernels.ops.conv_stage import MaxPool
from tkernels.ops.sync_batch_norm import sync_batch_norm

__all__ = ["SyncBatchNorm"]


# not a torch.nn.SyncBatchNorm: DistributedDataParallel would refuse it on CPUs
class SyncBatchNorm(_FusedBatchNorm, torch.nn.modules.batchnorm._BatchNorm):
    """Batch norm of (N, C, ...) that in training normalises by the statistics of all processes of ``process_group``
    (None: all of the job), on GPUs and CPUs; arguments and state_dict as torch.nn.SyncBatchNorm, and ``activation``
    and ``forward(input, residual=None)`` as :class:`BatchNorm2d`.

    Every process must call it, forward and backward; numbers of values may differ. In evaluation, in one process and
    without torch.distributed it is batch norm. Weight and bias get this process's gradients, for
    DistributedDataParallel to average. Errors as :func:`tkernels.functional.batch_norm`.
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
        return sync_batch_norm(
            input,
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            self.weight,
            self.bias,
            self.momentum,
            self.eps,
            self.activation,
            residual,
            self.num_batches_tracked if tracks else None,
            self.process_group,
        )

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """``module`` with every BatchNorm1d, 2d and 3d (torch's and ours) replaced by this class, as
        torch.nn.SyncBatchNorm's: the same parameters, buffers and state_dict keys; ``module`` itself is changed.

        Statistics that cross processes come between a convolution and its normalisation, so :class:`ConvStage` and
        :class:`ConvBNReLU2d` become modules that call their layers one by one: convolution, batch norm with ReLU.
        """
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and not isinstance(module, cls):
            return _converted_norm(cls, module, process_group)
        if isinstance(module, ConvStage):
            names = [(f"conv{i}", f"bn{i}") for i in range(1, module.layers + 1)]
            return _SplitStage(cls, module, names, module.pool, module.dropout, process_group)
        if isinstance(module, ConvBNReLU2d):
            return _SplitStage(cls, module, [("conv", "bn")], None, 0.0, process_group)
        for name, child in module.named_children():
            converted = cls.convert_sync_batchnorm(child, process_group)
            if converted is not child:
                setattr(module, name, converted)
        return module


def _several_processes(group: Any) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def _converted_norm(
    cls: type[SyncBatchNorm], norm: torch.nn.modules.batchnorm._BatchNorm, group: Any, activation: str | None = None
) -> SyncBatchNorm:
    """The same batch norm, synchronised: it takes over parameters and buffers."""
    activation = activation or getattr(norm, "activation", None)
    converted = cls(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, group, "meta", None,
        activation,
    )  # fmt: skip
    for name, parameter in norm.named_parameters(recurse=False):
        setattr(converted, name, parameter)
    for name, buffer in norm.named_buffers(recurse=False):
        setattr(converted, name, buffer)
    return converted.train(norm.training)


class _SplitStage(torch.nn.Module):
    """A ConvStage or ConvBNReLU2d of several processes: the same submodules' names, its layers called one by one."""

    def __init__(
        self,
        cls: type[SyncBatchNorm],
        stage: torch.nn.Module,
        names: Sequence[tuple[str, str]],
        pool: Any,
        dropout: float,
        group: Any,
    ) -> None:
        super().__init__()
        self.names, self.pool, self.dropout = tuple(names), pool, dropout
        for conv, norm in names:
            self.add_module(conv, stage.get_submodule(conv))
            found: Any = stage.get_submodule(norm)
            self.add_module(norm, _converted_norm(cls, found, group, "relu"))
        self.train(stage.training)

    def forward(self, input: Tensor) -> Tensor:
        x = input
        for conv_name, norm_name in self.names:
            conv: Any = self._modules[conv_name]
            norm: Any = self._modules[norm_name]
            x = norm(
                functional.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
            )
        if self.pool is not None:
            pool = self.pool if isinstance(self.pool, MaxPool) else MaxPool(self.pool)
            x = torch.nn.functional.max_pool2d(x, *pool)  # type: ignore[arg-type]
        return torch.nn.functional.dropout2d(x, self.dropout, self.training) if self.dropout > 0 else x

    def extra_repr(self) -> str:
        return f"pool={self.pool}, dropout={self.dropout}"
