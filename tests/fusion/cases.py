"""What the tests of fusion make models of."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

# by the names that operators have for them
ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "leaky_relu": nn.LeakyReLU, "silu": nn.SiLU, "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
}  # fmt: skip


def cnn() -> nn.Sequential:
    """Two chains: 0 to 2 and 3 to 5."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


# what its chains are, two or, where kernels run, one conv stage
CNN_CHAINS = "0 -> 1 -> 2 -> 3 -> 4 -> 5"
