"""Recipes: optimizers, and the course of the learning rate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from models import options
from models.recipes import Schedule, build_optimizer

pytestmark = pytest.mark.gate("torch")


def _rates(shape: str, warmup: int, total: int) -> list[float]:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.5)
    schedule = Schedule(optimizer, 0.5, shape, warmup, total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.advance()
    return rates


def test_schedules() -> None:
    assert _rates("constant", 0, 3) == [0.5] * 3
    assert _rates("linear", 0, 4) == pytest.approx([0.5, 0.375, 0.25, 0.125])
    assert _rates("cosine", 0, 4) == pytest.approx([0.25 * (1 + math.cos(math.pi * i / 4)) for i in range(4)])
    # up along a line to the peak, then as without warm-up in what is left
    assert _rates("linear", 3, 7) == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.375, 0.25, 0.125])
    assert _rates("constant", 1, 3) == pytest.approx([0.25, 0.5, 0.5])


def test_schedule_goes_on_and_moves_a_tensor_in_place() -> None:
    rate = torch.tensor(0.5)
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), rate)
    schedule = Schedule(optimizer, 0.5, "linear", 0, 4)
    schedule.advance()
    assert rate.item() == 0.375
    other = Schedule(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.5), 0.5, "linear", 0, 4)
    other.load_state_dict(schedule.state_dict())
    assert other.rate == 0.375


def test_optimizers() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    adam = build_optimizer("adam", model, 0.1, 0.9, 0.3, False)
    assert type(adam) is torch.optim.Adam
    assert [len(g["params"]) for g in adam.param_groups] == [4]
    assert adam.param_groups[0]["weight_decay"] == 0.3
    for name, kind in (("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)):
        optimizer = build_optimizer(name, model, 0.1, 0.8, 0.3, False)
        assert type(optimizer) is kind
        assert [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] == [(1, 0.3), (3, 0.0)]
    assert optimizer.param_groups[0]["nesterov"] is True
    assert optimizer.param_groups[0]["momentum"] == 0.8
    assert build_optimizer("sgd", model, 0.1, 0.0, 0.3, False).param_groups[0]["nesterov"] is False


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_the_sgd_of_a_graph_steps_as_the_other(momentum: float) -> None:
    """It is fused, for that form alone does not ask for a learning rate that is a tensor; and rounds a little else."""
    found = []
    for rate, capturable in ((0.1, False), (torch.tensor(0.1), True)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        optimizer = build_optimizer("sgd", model, rate, momentum, 0.3, capturable)
        assert optimizer.param_groups[0]["fused"] is (True if capturable else None)
        for i in range(4):
            optimizer.zero_grad()
            model(torch.randn(5, 3, generator=torch.Generator().manual_seed(i))).square().sum().backward()
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_recipes_set_what_is_not_given() -> None:
    default = options.parse(["--data", "cifar10"])
    assert (default.epochs, default.batch_size, default.optimizer, default.schedule) == (50, 128, "adam", "cosine")
    fast = options.parse(["--data", "cifar10", "--recipe", "fast", "--lr", "0.3"])
    assert (fast.epochs, fast.optimizer, fast.schedule, fast.lr) == (16, "sgd", "linear", 0.3)
    assert fast.label_smoothing == 0.1
    assert fast.warmup == 0.2
    assert (fast.flip, fast.rotate) == (True, 10.0)
    assert options.parse(["--recipe", "fast", "--epochs", "3"]).epochs == 3
