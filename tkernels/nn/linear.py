"""Linear layers with a fused activation and dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tkernels.core import activation as activations
from tkernels.core import checks
from tkernels.ops.linear.op import linear


class Linear(torch.nn.Linear):
    """torch.nn.Linear followed by an activation and dropout, as one call: ``(*, in_features)`` to
    ``(*, out_features)``.

    Parameters, their initialisation and the state_dict are torch.nn.Linear's; so are the arguments, but for two.

    Args:
        activation: as of :func:`tkernels.functional.linear`
        dropout: the probability of an output to be zeroed in training

    Raises:
        ValueError: For an unknown activation, or a probability outside [0, 1].

    Examples:
        >>> layer = tkernels.nn.Linear(20, 10, activation="relu", dropout=0.1)
        >>> layer
        Linear(in_features=20, out_features=10, bias=True, activation='relu', dropout=0.1)
        >>> layer(torch.randn(8, 20)).shape
        torch.Size([8, 10])
    """

    activation: str | None = None  # what a torch.nn.Linear turned into this class does
    dropout: float = 0.0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str | None = None,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        activations.check(activation)
        checks.probability("dropout", dropout)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.activation = activation
        self.dropout = dropout

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, self.activation, self.dropout, self.training)

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        return ", ".join(parts)


class LinearReLU(Linear):
    """:class:`tkernels.nn.Linear` with activation 'relu'.

    Examples:
        >>> layer = tkernels.nn.LinearReLU(20, 10)
        >>> y = layer(torch.randn(8, 20))
        >>> y.shape, bool((y >= 0).all())
        (torch.Size([8, 10]), True)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, "relu", dropout, device, dtype)
