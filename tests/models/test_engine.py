"""train_epoch and validate: what they compute, what they leave alone, and that nothing waits for the device."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.engine import Step, Totals, TrainingStep, progress_bar, steps, train_epoch, validate

pytestmark = pytest.mark.gate("torch")

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def trained(model: nn.Module, batches: Batches, optimizer: torch.optim.Optimizer) -> Any:
    train, totals = TrainingStep(model, nn.CrossEntropyLoss(), optimizer), Totals("cpu")
    parts = steps([len(target) for _, target in batches])
    assert list(train_epoch(model, batches, train, totals, parts)) == parts
    return totals.result()


@pytest.fixture
def batches() -> Batches:
    """Three batches, the last one smaller: means over batches are not means over images."""
    return [(torch.randn(n, 3, 4, 4), torch.randint(3, (n,))) for n in (5, 5, 2)]


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def test_validate(model: nn.Module, batches: Batches) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = validate(model, batches, nn.CrossEntropyLoss(), "cpu")
    with torch.no_grad():
        images, target = (torch.cat(parts) for parts in zip(*batches))
        logits = model.eval()(images)
    assert result.images == 12
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, target).item(), rel=1e-5)
    assert result.accuracy == pytest.approx((logits.argmax(1) == target).float().mean().item())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_validate_leaves_the_mode(model: nn.Module, batches: Batches, training: bool) -> None:
    model.train(training)
    validate(model, batches, nn.CrossEntropyLoss(), "cpu")
    assert model.training is training


def test_train_epoch_is_the_loop_written_out(model: nn.Module, batches: Batches) -> None:
    import copy

    twin = copy.deepcopy(model)
    model.eval()  # train_epoch turns training mode on
    criterion = nn.CrossEntropyLoss()
    result = trained(model, batches, torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    loss_sum, correct = 0.0, 0
    for images, target in batches:
        optimizer.zero_grad()
        logits = twin(images)
        loss = criterion(logits, target)
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(target)
        correct += (logits.argmax(1) == target).sum().item()
    assert result.loss == pytest.approx(loss_sum / 12, rel=1e-6)
    assert result.accuracy == correct / 12
    for name, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_learns(model: nn.Module, batches: Batches) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    results = [trained(model, batches, optimizer) for _ in range(40)]
    assert results[-1].loss < 0.2 * results[0].loss
    assert results[-1].accuracy == 1.0


def test_batches_of_rows(batches: Batches) -> None:
    rows = [(images.flatten(1), target) for images, target in batches]
    assert validate(nn.Linear(48, 3), rows, nn.CrossEntropyLoss(), "cpu").images == 12


def test_empty_loader(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="the loader has no batches"):
        validate(model, [], nn.CrossEntropyLoss(), "cpu")


class _Waits(TorchDispatchMode):
    """Counts the calls that bring a value from the device to Python."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_waits_for_the_device_once_an_epoch(model: nn.Module, batches: Batches) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with _Waits() as watch:
        trained(model, batches * 3, optimizer)
        validate(model, batches * 3, nn.CrossEntropyLoss(), "cpu")
    assert watch.count == 4, "two sums read at the end of each pass, none on the way"


def test_bar_only_on_a_terminal(model: nn.Module, batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = {}
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        validate(model, batches, nn.CrossEntropyLoss(), "cpu", bar=progress_bar("epoch 1", len(batches)))
        shown[type(stream)] = stream.getvalue()
    assert "epoch 1" in shown[Terminal]
    assert shown[io.StringIO] == ""


def test_confusion_counts_every_answer(model: nn.Module, batches: Batches) -> None:
    counts = torch.zeros(3, 3, dtype=torch.int64)
    validate(model, batches, nn.CrossEntropyLoss(), "cpu", confusion=counts)
    images, target = (torch.cat(parts) for parts in zip(*batches))
    with torch.no_grad():
        answers = model.eval()(images).argmax(1)
    expected = [[int(((target == i) & (answers == j)).sum()) for j in range(3)] for i in range(3)]
    assert counts.tolist() == expected


def test_parts_of_a_step_are_the_step() -> None:
    """Accumulated gradients, each part weighing what it is of the examples; clipped as a whole."""
    rows, target = torch.randn(12, 5, dtype=torch.float64), torch.randint(3, (12,))
    weights = []
    for sizes in ([12], [5, 5, 2]):
        torch.manual_seed(0)
        model = nn.Linear(5, 3).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        step = TrainingStep(model, nn.CrossEntropyLoss(), optimizer, clip=0.01)
        before = model.weight.detach().clone(), model.bias.detach().clone()
        for some, labels, part in zip(rows.split(sizes), target.split(sizes), steps(sizes, 3)):
            step(some, labels, part)
        moved = [(p.detach() - old) for p, old in zip(model.parameters(), before)]
        assert sum(m.square().sum() for m in moved).sqrt().item() == pytest.approx(0.01, rel=1e-4)
        weights.append(model.weight.detach())
    torch.testing.assert_close(weights[0], weights[1])


def test_which_batches_make_a_step() -> None:
    assert steps([4, 4, 2]) == [Step(0), Step(1), Step(2)]
    assert steps([4, 4, 4, 2, 1], 2) == [
        Step(0, True, False, 0.5), Step(1, False, True, 0.5), Step(2, True, False, 2 / 3), Step(3, False, True, 1 / 3),
        Step(4),
    ]  # fmt: skip
    assert steps([3, 1], 5) == [Step(0, True, False, 0.75), Step(1, False, True, 0.25)]
    assert steps([]) == []


def test_a_scaled_loss_trains_as_an_unscaled_one() -> None:
    """GradScaler's factor is gone from what clipping and the optimizer see; a step that overflows is left out."""
    rows, target = torch.randn(6, 5), torch.randint(3, (6,))
    weights = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        step = TrainingStep(
            model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=1.0), scaler=scaler, clip=0.5
        )
        step(rows, target)
        weights.append(model.weight.detach().clone())
        if scaler is not None:
            step(rows * float("inf"), target)
            assert torch.equal(model.weight, weights[-1])
            assert scaler.get_scale() == 2.0**9
    torch.testing.assert_close(weights[0], weights[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_computes_in_the_dtype(dtype: torch.dtype) -> None:
    model, seen = nn.Linear(5, 3), []
    model.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    batch = (torch.randn(6, 5), torch.randint(3, (6,)))
    TrainingStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters()), amp=dtype)(*batch)
    validate(model, [batch], nn.CrossEntropyLoss(), "cpu", amp=dtype)
    assert seen == [dtype, dtype]
