"""Sixty steps on real digits, dropout off: the fused network learns what the plain one learns, step by step."""

from __future__ import annotations

from itertools import chain, count, islice
from pathlib import Path

import pytest
import torch
from torch import nn

import tkernels.nn as tnn
from models import data
from models.augment import image_transforms
from models.cifar_cnn import CNNClassifier, FusedCNNClassifier
from models.loader import Feed, TrainLoader

# Not the cuda gate: where fused and plain round differently, a ReLU that flips grows past any such bound in 60 steps.
pytestmark = pytest.mark.gate("torch")

STEPS = 60
# Bodies that are equal but for rounding must pass, on any CPU, so the training must not amplify rounding. At 32x32 and
# batch 32 it does: enlarged digits are large areas of one value, whose ReLUs flip together, and noise of 1e-7 in the
# gradients becomes 1e-2 in the loss. At the digits' own 8x8, in large batches that average flips and at a small
# learning rate, the compiled passes of the fused network stay within 1.4e-4 (at a batch of 256 and 3e-4 it was 1.1e-3).
IMAGE_SIZE = 8
BATCH_SIZE = 512
WIDTH = 16
LEARNING_RATE = 2.5e-4


def _curve(network: type[nn.Module], criterion: nn.Module, device: str, dtype: torch.dtype | None) -> torch.Tensor:
    """The losses of training on the digits, (STEPS,)."""
    parts = data.load("digits", Path(), seed=0)
    prepare, _ = image_transforms(IMAGE_SIZE, parts.mean or (), parts.std or ())
    loader = TrainLoader(parts.train, BATCH_SIZE, 0, Feed(torch.device(device)), prepare)
    torch.manual_seed(0)
    model = network(width=WIDTH, image_size=IMAGE_SIZE, dropout2d=0.0, dropout=0.0).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for images, target in islice(chain.from_iterable(map(loader.epoch, count(1))), STEPS):
        optimizer.zero_grad()
        with torch.autocast(device, dtype, enabled=dtype is not None):
            # the loader's batches are channels_last
            loss = criterion(model(images.contiguous()), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().float().cpu())
    return torch.stack(losses)


def _curves(device: str, dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
    plain = _curve(CNNClassifier, nn.CrossEntropyLoss(), device, dtype)
    fused = _curve(FusedCNNClassifier, tnn.CrossEntropyLoss(), device, dtype)
    # it learned: ten classes guessed at random give 2.3
    assert plain[:5].mean() > 2.2
    assert plain[-5:].mean() < 0.8
    return plain, fused


def test_float32_losses_agree_at_every_step(device: str) -> None:
    plain, fused = _curves(device, None)
    difference = (plain - fused).abs()
    assert difference.max() < 1e-3, f"{difference.max():.1e} apart at step {int(difference.argmax())}"


def test_bfloat16_final_losses_agree(device: str) -> None:
    plain, fused = _curves(device, torch.bfloat16)
    plain_last, fused_last = plain[-5:].mean(), fused[-5:].mean()
    assert abs(plain_last - fused_last) < 0.03 * plain_last, f"{plain_last:.4f} and {fused_last:.4f}"
