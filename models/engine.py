"""One pass over a data set, training or validating. Sums stay on the device: nothing waits for it within an epoch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.cuda_graph import Step

Loader = Iterable[tuple[Tensor, Tensor]]


class EpochResult(NamedTuple):
    """Means over the images of one pass: the loss, and the fraction classified correctly."""

    loss: float
    accuracy: float
    images: int


def train_epoch(
    model: nn.Module,
    loader: Loader,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device | str,
    *,
    step: Step | None = None,
    progress: str | None = None,
) -> EpochResult:
    """Train on every batch once. ``criterion`` returns the mean loss of a batch; ``step``: what to do with a batch,
    :func:`training_step` if not given; ``progress`` labels a progress bar.

    Loss and accuracy are those of each batch as it was trained on, dropout included.
    Raises ValueError for an empty loader.
    """
    model.train()
    step = step or training_step(model, criterion, optimizer)
    totals = _Totals(device)
    for images, target in _batches(loader, device, progress):
        loss, logits = step(images, target)
        totals.add(loss, logits, target)
    return totals.result()


def training_step(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """Forward, loss, backward and the optimizer's step on a batch; gives (loss, logits)."""

    def step(images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        logits = model(images)
        loss = criterion(logits, target)
        loss.backward()
        optimizer.step()
        return loss.detach(), logits.detach()

    return step


@torch.no_grad()
def validate(
    model: nn.Module,
    loader: Loader,
    criterion: nn.Module,
    device: torch.device | str,
    *,
    progress: str | None = None,
) -> EpochResult:
    """Loss and accuracy in evaluation mode. The model comes back in the mode it was in.

    Raises ValueError for an empty loader.
    """
    training = model.training
    model.eval()
    totals = _Totals(device)
    for images, target in _batches(loader, device, progress):
        logits = model(images)
        totals.add(criterion(logits, target), logits, target)
    model.train(training)
    return totals.result()


class _Totals:
    """Running sums of loss and correct answers, on the device."""

    def __init__(self, device: torch.device | str) -> None:
        self.loss = torch.zeros((), device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.images = 0

    def add(self, loss: Tensor, logits: Tensor, target: Tensor) -> None:
        count = target.shape[0]
        self.loss += loss.float() * count
        self.correct += (logits.argmax(1) == target).sum()
        self.images += count

    def result(self) -> EpochResult:
        if self.images == 0:
            raise ValueError("the loader has no batches")
        return EpochResult(self.loss.item() / self.images, self.correct.item() / self.images, self.images)


def _batches(loader: Loader, device: torch.device | str, progress: str | None) -> Loader:
    """The loader's batches on the device, images channels-last, which is faster on the CPU and on tensor cores."""
    for images, target in _with_bar(loader, progress):
        layout = torch.channels_last if images.dim() == 4 else torch.preserve_format
        yield (
            images.to(device, non_blocking=True, memory_format=layout),
            target.to(device, non_blocking=True),
        )


def _with_bar(loader: Loader, label: str | None) -> Loader:
    if label is None:
        return loader
    from tqdm import tqdm

    # disable=None: no bar where the output is no terminal
    return tqdm(loader, desc=label, unit="batch", leave=False, disable=None, dynamic_ncols=True)
