"""Conv2d: torch.nn.Conv2d with an optional fused activation."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tkernels.core import activation as activations
from tkernels.ops.conv.op import conv2d

__all__ = ["Conv2d"]


class Conv2d(torch.nn.Conv2d):
    """torch.nn.Conv2d followed by an activation, in one kernel on a GPU: ``(N, C_in, H, W)`` or ``(C_in, H, W)`` to
    ``(N, C_out, H_out, W_out)`` or without N.

    Parameters, their initialisation and the state_dict are torch.nn.Conv2d's; so are the arguments, but for one.
    Padding modes other than 'zeros' pad in a pass of their own. Errors as of :func:`tkernels.functional.conv2d`.

    Args:
        activation: as of :func:`tkernels.functional.linear`

    Examples:
        >>> layer = tkernels.nn.Conv2d(3, 8, kernel_size=3, padding=1, activation="silu")
        >>> layer(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 8, 16, 16])
    """

    activation: str | None = None  # what a torch.nn.Conv2d turned into this class does

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        activation: str | None = None,
    ) -> None:
        activations.check(activation)
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
                         padding_mode, device, dtype)  # fmt: skip
        self.activation = activation

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            sides = self._reversed_padding_repeated_twice
            input = torch.nn.functional.pad(input, sides, mode=self.padding_mode)
            padding = 0
        return conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups, self.activation)

    def extra_repr(self) -> str:
        """torch.nn.Conv2d's arguments, and the activation if there is one."""
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation!r}"
