"""The CIFAR network with self-attention on its last feature map: it learns, and Triton runs all of it."""

from __future__ import annotations

from itertools import chain, count, islice
from pathlib import Path

import pytest
import torch

import tkernels.nn as tnn
from models import data
from models.augment import image_transforms
from models.cifar_cnn import AttentionCNN, FusedCNNClassifier
from models.loader import Feed, TrainLoader, ValLoader
from models.networks import Network
from tests.watch import AtenWatch

pytestmark = pytest.mark.gate("torch")


def test_it_learns_digits() -> None:
    """Sixty steps at a quarter of the width, dropout off: ten classes guessed at random give a loss of 2.3."""
    parts = data.load("digits", Path(), seed=0)
    prepare, _ = image_transforms(32, parts.mean or (), parts.std or ())
    feed = Feed(torch.device("cpu"))
    loader, validation = TrainLoader(parts.train, 32, 0, feed, prepare), ValLoader(parts.val, 32, feed, prepare)
    torch.manual_seed(0)
    model = AttentionCNN(width=8, dropout2d=0.0, dropout=0.0)
    start = model.position.detach().clone(), model.attention.in_proj_weight.detach().clone()
    criterion, optimizer = tnn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for images, target in islice(chain.from_iterable(map(loader.epoch, count(1))), 60):
        optimizer.zero_grad()
        loss = criterion(model(images), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[:5]) / 5 > 2.2
    assert sum(losses[-5:]) / 5 < 0.6
    assert not torch.equal(model.position, start[0])
    assert not torch.equal(model.attention.in_proj_weight, start[1])
    model.eval()
    with torch.no_grad():
        correct = sum(int((model(images).argmax(1) == target).sum()) for images, target in validation)
    assert correct > 0.8 * len(parts.val)  # type: ignore[arg-type]


def test_attention_takes_part() -> None:
    """Every pixel's output depends on every other pixel; the rest of the network is the fused one."""
    model = AttentionCNN(width=4, image_size=16).eval()
    fused = FusedCNNClassifier(width=4, image_size=16)
    missing = fused.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys
    assert {key.partition(".")[0] for key in missing.unexpected_keys} == {"attention", "position"}
    images = torch.randn(2, 3, 16, 16)
    assert not torch.equal(model(images), fused.eval()(images))
    with pytest.raises(ValueError, match="heads must divide the 16 channels"):
        AttentionCNN(width=4, heads=3)


def test_the_command_trains_it() -> None:
    parts = data.load("digits", Path(), seed=0)
    network = Network.of_data(parts, "attention", 4, 16)
    assert isinstance(network.build(fused=True), AttentionCNN)
    assert network.differences(Network.of_data(parts, "fused", 4, 16)) == ["kind 'attention' instead of 'cnn'"]


@pytest.mark.gate("ttsem", "cuda")
def test_only_our_kernels_run(device: str, launches: list[str]) -> None:
    model = AttentionCNN(width=4, image_size=16, dropout2d=0.0, dropout=0.0).to(device)
    criterion = tnn.CrossEntropyLoss()
    images, target = torch.randn(2, 3, 16, 16, device=device), torch.tensor([1, 7], device=device)
    with AtenWatch() as watch:
        criterion(model(images), target).backward()
    assert not watch.replaced(), watch.replaced()
    assert {"attention_forward_kernel", "attention_dq_kernel", "attention_dkv_kernel"} <= set(launches)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
