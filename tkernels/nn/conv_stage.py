"""Conv stages: ConvStage, n x (conv -> batch norm -> ReLU) with pooling and Dropout2d, and ConvBNReLU2d, one layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.parametrize import type_before_parametrizations

from tkernels.core import _torch, checks
from tkernels.ops.conv_stage.op import ConvBNLayer, MaxPool, conv_stage

__all__ = ["ConvBNReLU2d", "ConvStage"]

IntOrPair = int | tuple[int, int]


def layer_of(conv: torch.nn.Conv2d, norm: torch.nn.BatchNorm2d) -> ConvBNLayer:
    """The arguments of one layer, from the modules that own its tensors."""
    weights, affine, buffers = conv._parameters, norm._parameters, norm._buffers
    tensors: tuple[Any, ...]
    try:  # a third of what attributes cost
        tensors = (
            weights["weight"], weights["bias"], affine["weight"], affine["bias"],
            buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"],
        )  # fmt: skip
    except KeyError:  # parametrized: computed when they are asked for
        tensors = (
            conv.weight, conv.bias, norm.weight, norm.bias,
            norm.running_mean, norm.running_var, norm.num_batches_tracked,
        )  # fmt: skip
    if norm.training and not norm.track_running_stats:
        tensors = (*tensors[:4], None, None, None)  # which stand still, as in torch
    options = conv.stride, conv.padding, conv.dilation, conv.groups, norm.momentum, norm.eps, norm.training, "relu"
    return ConvBNLayer._make((*tensors, *options))


def run_stage(
    pairs: Sequence[tuple[torch.nn.Module, torch.nn.Module]], x: Tensor, pool: Any, dropout: float, training: bool
) -> Tensor:
    """A stage of the modules (convolution, batch norm): as one call, or module by module where a call of one is more
    than its tensors say: where something else was put in its place, such as a SyncBatchNorm or an adapter, or where it
    has hooks, as pruning and weight_norm do."""
    if not _torch.has_global_hook() and all(_is_plain(conv, norm) for conv, norm in pairs):
        return conv_stage(x, [layer_of(conv, norm) for conv, norm in pairs], pool, dropout, training)  # type: ignore[arg-type]
    for conv, norm in pairs:
        x = norm(conv(x))
        if getattr(norm, "activation", None) != "relu":
            x = torch.relu(x)
    if pool is not None:
        x = torch.nn.functional.max_pool2d(x, *(pool if isinstance(pool, MaxPool) else MaxPool(pool)))  # type: ignore[arg-type]
    return torch.nn.functional.dropout2d(x, dropout, training) if dropout > 0 else x


_PLAIN = (torch.nn.Conv2d, torch.nn.BatchNorm2d)


def _is_plain(conv: torch.nn.Module, norm: torch.nn.Module) -> bool:
    """Whether these compute what a stage takes them for."""
    types = type(conv), type(norm)
    if types != _PLAIN:
        types = type_before_parametrizations(conv), type_before_parametrizations(norm)
    return types == _PLAIN and conv.padding_mode == "zeros" and not (_is_hooked(conv) or _is_hooked(norm))


def _is_hooked(module: torch.nn.Module) -> bool:
    """Whether a call of the module is more than its class's forward."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


class ConvStage(torch.nn.Module):
    """n x (Conv2d -> BatchNorm2d -> ReLU), then max pooling and Dropout2d, as one call on a GPU: ``(N, C_in, H, W)`` to
    ``(N, C_out, H_out, W_out)``.

    Submodules are torch.nn's ``conv1``, ``bn1``, ``conv2``, ``bn2``, ...: their parameters, buffers, initialisation and
    state_dict. They hold the tensors and are not called themselves; but where one has hooks (pruning, weight_norm), or
    another module was put in its place (a SyncBatchNorm, an adapter), the stage calls its modules one by one.

    Args:
        channels: of the input, then of each layer's output. The convolution's and the batch norm's arguments that
            follow are torch's, and those of every layer
        pool: a window's size (its stride too), a :class:`tkernels.functional.MaxPool` or None
        dropout: the probability that training drops a whole channel

    Raises:
        TypeError: For channels that are no sequence.
        ValueError: For fewer than two channel counts, or a probability outside [0, 1]. Otherwise errors as of
            :func:`tkernels.functional.conv_stage`.

    Examples:
        >>> stage = tkernels.nn.ConvStage([3, 8, 16], kernel_size=3, padding=1, pool=2, dropout=0.1)
        >>> stage(torch.randn(2, 3, 12, 12)).shape
        torch.Size([2, 16, 6, 6])
        >>> [name for name, _ in stage.named_children()]
        ['conv1', 'bn1', 'conv2', 'bn2']
    """

    def __init__(
        self,
        channels: Sequence[int],
        kernel_size: IntOrPair = 3,
        stride: IntOrPair = 1,
        padding: IntOrPair | str = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        bias: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        pool: IntOrPair | MaxPool | None = None,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not hasattr(channels, "__len__"):
            raise TypeError(f"channels must be a sequence of ints, got {type(channels).__name__}")
        if len(channels) < 2:
            raise ValueError(f"channels must be the input's and at least one layer's, got {channels}")
        checks.probability("dropout", dropout)
        super().__init__()
        self.pool = pool
        self.dropout = dropout
        self.layers = len(channels) - 1
        for i, (before, after) in enumerate(pairwise(channels), start=1):
            conv = torch.nn.Conv2d(
                before, after, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
            )
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", torch.nn.BatchNorm2d(after, eps, momentum, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        modules: Any = self._modules
        pairs = [(modules[f"conv{i}"], modules[f"bn{i}"]) for i in range(1, self.layers + 1)]
        return run_stage(pairs, input, self.pool, self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"pool={self.pool}, dropout={self.dropout}"


class ConvBNReLU2d(torch.nn.Module):
    """Conv2d -> BatchNorm2d -> ReLU as one call on a GPU: ``(N, C_in, H, W)`` to ``(N, C_out, H_out, W_out)``.

    Submodules ``conv`` (torch.nn.Conv2d, arguments as there) and ``bn`` (torch.nn.BatchNorm2d) hold parameters, buffers
    and state_dict; as in :class:`tkernels.nn.ConvStage` they are not called themselves. Errors as of
    :func:`tkernels.functional.conv_stage`.

    Examples:
        >>> layer = tkernels.nn.ConvBNReLU2d(3, 8, kernel_size=3, stride=2, padding=1, bias=False)
        >>> layer(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 8, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: IntOrPair | str = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        bias: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        self.bn = torch.nn.BatchNorm2d(out_channels, eps, momentum, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        return run_stage([(self.conv, self.bn)], input, None, 0.0, self.training)
