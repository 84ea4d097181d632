"""One pass over a data set, training or validating. Sums stay on the device: nothing waits for it within an epoch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models import distributed

Loader = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Step:
    """What a batch is of an optimizer's step.

    ``index``: the batch's number in its epoch; ``first`` and ``last`` of the batches that make the step, of whose
    examples it is the ``share``.
    """

    index: int = 0
    first: bool = True
    last: bool = True
    share: float = 1.0


def steps(sizes: Sequence[int], accumulate: int = 1) -> list[Step]:
    """For the batches of an epoch, of these sizes: so many of them make a step, each counting by its examples."""
    found = []
    for i, size in enumerate(sizes):
        begin = i // accumulate * accumulate
        together = sizes[begin : begin + accumulate]
        found.append(Step(i, i == begin, i == begin + len(together) - 1, size / sum(together)))
    return found


WHOLE = Step()


class EpochResult(NamedTuple):
    """Means over the examples of one pass, of all processes: the loss, and the fraction classified correctly."""

    loss: float
    accuracy: float
    images: int


class Totals:
    """Running sums of loss and correct answers, on the device; of this process."""

    def __init__(self, device: torch.device | str) -> None:
        self.loss = torch.zeros((), device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.images = 0

    def add(self, loss: Tensor, logits: Tensor, target: Tensor) -> None:
        count = target.shape[0]
        if target.dim() == 2:  # mixed: the likeliest class is the right one
            target = target.argmax(1)
        self.loss += loss.float() * count
        self.correct += (logits.argmax(1) == target).sum()
        self.images += count

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss.cpu(), "correct": self.correct.cpu(), "images": self.images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss.copy_(state["loss"])
        self.correct.copy_(state["correct"])
        self.images = state["images"]

    def result(self) -> EpochResult:
        """Raises ValueError if there was nothing to add up."""
        loss, correct, images = self.loss.item(), self.correct.item(), self.images
        if distributed.active():
            own = torch.tensor([loss, correct, images], dtype=torch.float64, device=self.loss.device)
            loss, correct, images = distributed.add_up(own).tolist()
        if images == 0:
            raise ValueError("the loader has no batches")
        return EpochResult(loss / images, correct / images, int(images))


class TrainingStep:
    """Forward, loss, backward and the optimizer's step on a batch; gives (loss, logits).

    ``amp``: the dtype to autocast to; ``scaler``: scales the loss, for float16; ``clip``: the largest norm of all
    gradients together, 0 for any. Where a batch is only part of a step, the first one clears the gradients and the last
    one moves the parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        amp: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        clip: float = 0.0,
    ) -> None:
        self._model, self._criterion, self._optimizer = model, criterion, optimizer
        self._amp, self._scaler, self._clip = amp, scaler, clip

    def __call__(self, images: Tensor, target: Tensor, step: Step = WHOLE) -> tuple[Tensor, Tensor]:
        if step.first:
            self._optimizer.zero_grad(set_to_none=True)
        with contextlib.ExitStack() as stack:
            # gradients cross processes once a step
            if not step.last and isinstance(self._model, nn.parallel.DistributedDataParallel):
                stack.enter_context(self._model.no_sync())
            with autocast(images, self._amp):
                logits = self._model(images)
                loss = self._criterion(logits, target)
            part = loss if step.share == 1.0 else loss * step.share
            (part if self._scaler is None else self._scaler.scale(part)).backward()
        if step.last:
            self._update()
        return loss.detach(), logits.detach()

    def abandon(self) -> None:
        """Let go of what a call that broke off has left: gradients, and what the scaler noted of them."""
        self._optimizer.zero_grad(set_to_none=True)
        if self._scaler is not None:
            self._scaler.update(self._scaler.get_scale())
            for name in ("grad_scale", "found_inf"):  # lent to a fused optimizer for its step
                vars(self._optimizer).pop(name, None)

    def _update(self) -> None:
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        if self._clip > 0:
            parameters = (p for group in self._optimizer.param_groups for p in group["params"])
            nn.utils.clip_grad_norm_(parameters, self._clip)
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)
            self._scaler.update()


def autocast(images: Tensor, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if dtype is None else torch.autocast(images.device.type, dtype)


def train_epoch(
    model: nn.Module,
    batches: Loader,
    train: Callable[[Tensor, Tensor, Step], tuple[Tensor, Tensor]],
    totals: Totals,
    steps: Iterable[Step],
) -> Iterator[Step]:
    """Train on each batch as the part of a step that it is, add to ``totals``, and give what was done.

    Loss and accuracy are those of each batch as it was trained on, dropout included.
    """
    model.train()
    for (images, target), step in zip(batches, steps):
        totals.add(*train(images, target, step), target)
        yield step


@torch.no_grad()
def validate(
    model: nn.Module,
    batches: Loader,
    criterion: nn.Module,
    device: torch.device | str,
    *,
    amp: torch.dtype | None = None,
    confusion: Tensor | None = None,
    bar: Callable[[Loader], Loader] = iter,
) -> EpochResult:
    """Loss and accuracy in evaluation mode. The model comes back in the mode it was in.

    ``confusion``, (classes, classes) of int64, gets one more at [target, answer] for each example of all processes.
    Raises ValueError where there is no batch.
    """
    training = model.training
    model.eval()
    totals = Totals(device)
    counts = None if confusion is None else torch.zeros_like(confusion)
    for images, target in bar(batches):
        with autocast(images, amp):
            logits = model(images)
            loss = criterion(logits, target)
        totals.add(loss, logits, target)
        if counts is not None:
            pairs = target * counts.shape[1] + logits.argmax(1)
            counts.view(-1).scatter_add_(0, pairs, torch.ones_like(pairs))
    model.train(training)
    if confusion is not None and counts is not None:
        confusion += distributed.add_up(counts)
    return totals.result()


def progress_bar(label: str, total: int, done: int = 0) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """Shows how far a pass is, on a terminal only and by the main process only."""
    from tqdm import tqdm

    return functools.partial(
        tqdm, desc=label, total=total, initial=done, unit="batch", leave=False, dynamic_ncols=True,
        disable=None if distributed.is_main() else True,  # None: no bar where the output is no terminal
    )  # fmt: skip
