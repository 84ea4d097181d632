"""How to train: named sets of defaults, optimizers, and the course of the learning rate."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("cosine", "linear", "constant")


class Recipe(NamedTuple):
    """Defaults of the options of the same names; epochs and batch_size by the kind of data, cifar10's or others'."""

    epochs: tuple[int, int]
    batch_size: tuple[int, int]
    optimizer: str
    lr: float
    weight_decay: float
    schedule: str
    warmup: float
    label_smoothing: float
    clip: float


RECIPES = {
    "default": Recipe((50, 10), (128, 32), "adam", 1e-3, 1e-4, "cosine", 0.0, 0.0, 0.0),
    # what CIFAR speed records share and this network can use: large steps of SGD-Nesterov, a learning rate that rises
    # and falls along straight lines, smoothed labels, few epochs
    "fast": Recipe((16, 6), (256, 64), "sgd", 0.05, 5e-4, "linear", 0.2, 0.1, 0.0),
}


def build_optimizer(
    name: str, model: nn.Module, lr: float | Tensor, momentum: float, weight_decay: float, capturable: bool
) -> torch.optim.Optimizer:
    """The optimizer; ``capturable``: all that changes from step to step is a tensor, the learning rate too.

    Adam's weight decay is L2 on every parameter, as torch's; AdamW and SGD (Nesterov's) decay what has 2 axes or more.
    """
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr, weight_decay=weight_decay, capturable=capturable)
    every = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in every if p.dim() > 1]},
        {"params": [p for p in every if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr, weight_decay=weight_decay, capturable=capturable)
    # fused alone takes a learning rate that is a tensor without asking the device for its value
    return torch.optim.SGD(
        groups, lr, momentum, weight_decay=weight_decay, nesterov=momentum > 0, fused=True if capturable else None
    )


class Schedule:
    """Sets the learning rate before each step: warm-up along a line, then down along a cosine or a line, to 0.

    A pure function of the step's number: that is all its state.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, peak: float, shape: str, warmup_steps: int, total_steps: int
    ) -> None:
        self._optimizer, self._peak, self._shape = optimizer, peak, shape
        self._warmup, self._total = warmup_steps, max(total_steps, 1)
        self._step = 0
        self._apply()

    def factor(self, step: int) -> float:
        """What part of the peak a step's learning rate is."""
        if step < self._warmup:
            return (step + 1) / (self._warmup + 1)
        if self._shape == "constant":
            return 1.0
        done = min((step - self._warmup) / max(self._total - self._warmup, 1), 1.0)
        return 0.5 * (1 + math.cos(math.pi * done)) if self._shape == "cosine" else 1.0 - done

    @property
    def rate(self) -> float:
        return self._peak * self.factor(self._step)

    def advance(self) -> None:
        """To the next step's learning rate."""
        self._step += 1
        self._apply()

    def state_dict(self) -> dict[str, int]:
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._step = state["step"]
        self._apply()

    def _apply(self) -> None:
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.rate)
            else:
                group["lr"] = self.rate
