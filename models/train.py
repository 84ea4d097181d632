"""Train the CIFAR classifier: ``python -m models.train --help``.

Writes to the output directory history.csv (a line an epoch, as it happens), curves.png (at the end) and checkpoint.pt
(after every epoch). Exit status: 0 trained; 1 the loss diverged, or results could not be written; 2 a bad option, or
data that cannot be had; 130 interrupted.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence

import torch
from torch import nn

import tkernels
import tkernels.nn as tnn
from models import checkpoint, data, options
from models.cifar_cnn import AttentionCNN, CNNClassifier, FusedCNNClassifier
from models.cuda_graph import GraphedStep
from models.engine import EpochResult, Loader, train_epoch, training_step, validate
from models.history import History, Row, draw_curves
from tkernels import runtime


class TrainingError(Exception):
    """Training that cannot go on; the message says why in one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command: parse, train, report. Returns the exit status; bad options raise SystemExit(2)."""
    chosen = options.parse(argv)
    try:
        chosen.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _fail(error, 2)
    try:
        with tkernels.backend(chosen.backend):
            run(chosen)
    except data.DataError as error:
        return _fail(error, 2)
    except (TrainingError, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def run(chosen: options.Options) -> EpochResult:
    """Train as the options say and write the results; returns the last validation."""
    images = data.load(chosen.data, chosen.data_dir, chosen.seed)
    train_loader, val_loader = data.loaders(
        images, chosen.batch_size, chosen.seed, pin_memory=chosen.device.type == "cuda"
    )
    torch.manual_seed(chosen.seed)
    model, criterion = build(chosen.model, images.num_classes, chosen.device)
    optimizer = adam(model, chosen)
    print(_headline(chosen, model, images), flush=True)

    history = History(chosen.out / "history.csv")
    validation = fit(model, criterion, optimizer, train_loader, val_loader, history, chosen)
    written = ["history.csv", "checkpoint.pt"]
    if history.rows:
        draw_curves(
            history.rows,
            chosen.out / "curves.png",
            f"{chosen.model} CNN on {chosen.data}: {validation.accuracy:.2%} validation accuracy",
        )
        written.insert(1, "curves.png")
    correct = round(validation.accuracy * validation.images)
    print(f"validation accuracy {validation.accuracy:.2%} ({correct} of {validation.images} images)")
    print(f"wrote {', '.join(written)} to {chosen.out}")
    return validation


def build(name: str, num_classes: int, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """The network called ``name`` and the loss that goes with it, on the device."""
    model: nn.Module
    criterion: nn.Module
    if name == "fused":
        model, criterion = FusedCNNClassifier(num_classes), tnn.CrossEntropyLoss()
    elif name == "attention":
        model, criterion = AttentionCNN(num_classes), tnn.CrossEntropyLoss()
    else:
        model, criterion = CNNClassifier(num_classes), nn.CrossEntropyLoss()
    # 1.1 times as fast as NCHW on the CPU, and what the Triton kernels read without a transposition
    return model.to(memory_format=torch.channels_last).to(device), criterion


def adam(model: nn.Module, chosen: options.Options) -> torch.optim.Adam:
    """The optimizer; for a CUDA graph all that changes from step to step is a tensor, the learning rate too."""
    lr: float | torch.Tensor = torch.tensor(chosen.lr, device=chosen.device) if chosen.cuda_graph else chosen.lr
    return torch.optim.Adam(model.parameters(), lr, weight_decay=chosen.weight_decay, capturable=chosen.cuda_graph)


def fit(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    train_loader: Loader,
    val_loader: Loader,
    history: History,
    chosen: options.Options,
) -> EpochResult:
    """Train for all epochs, with history and checkpoint after each; returns the last validation.

    Raises TrainingError when the loss is no longer finite; the checkpoint of the last good epoch stays.
    """
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(chosen.epochs, 1))
    path = chosen.out / "checkpoint.pt"
    step = training_step(model, criterion, optimizer)
    if chosen.cuda_graph:
        step = GraphedStep(step)
    if chosen.epochs == 0:
        validation = validate(model, val_loader, criterion, chosen.device)
        checkpoint.save(path, model, optimizer, 0, validation.accuracy)
    for epoch in range(1, chosen.epochs + 1):
        label = f"epoch {epoch:{len(str(chosen.epochs))}}/{chosen.epochs}"
        start = time.perf_counter()
        training = train_epoch(model, train_loader, criterion, optimizer, chosen.device, step=step, progress=label)
        seconds = time.perf_counter() - start
        validation = validate(model, val_loader, criterion, chosen.device, progress=f"{label} validation")
        scheduler.step()
        history.add(Row(epoch, training.loss, validation.loss, training.accuracy, validation.accuracy))
        if not (math.isfinite(training.loss) and math.isfinite(validation.loss)):
            raise TrainingError(f"the loss is no longer finite after epoch {epoch}: try a --lr below {chosen.lr:g}")
        checkpoint.save(path, model, optimizer, epoch, validation.accuracy)
        print(
            f"{label}  train loss {training.loss:.4f}, accuracy {training.accuracy:6.2%}"
            f"  validation loss {validation.loss:.4f}, accuracy {validation.accuracy:6.2%}"
            f"  {training.images / seconds:,.0f} images/s",
            flush=True,
        )
    return validation


def _headline(chosen: options.Options, model: nn.Module, images: data.Images) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    if chosen.model == "plain":
        how = "torch.nn"
    else:
        how = "Triton kernels" if runtime.use_triton(next(model.parameters())) else "PyTorch"
    return (
        f"{chosen.model} CNN of {parameters:,} parameters on {chosen.device} ({how}); {chosen.data}: "
        f"{len(images.train):,} images to train on, {len(images.val):,} to validate"  # type: ignore[arg-type]
    )


def _fail(error: Exception | str, status: int) -> int:
    print(f"{options.PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
