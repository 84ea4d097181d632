"""The whole fused CNN on Triton: three SGD steps equal to plain PyTorch, and nothing but our kernels computing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tkernels
from models.cifar_cnn import CNNClassifier, FusedCNNClassifier
from tests.tolerance import assert_close
from tests.watch import AtenWatch

SMALL = {"num_classes": 5, "width": 4, "image_size": 8, "dropout2d": 0.0, "dropout": 0.0}
# images a batch: odd, and a last one that is smaller
BATCHES = (3, 3, 2)


def _data(device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, 3, 8, 8, generator=generator).to(device),
            torch.randint(0, 5, (n,), generator=generator).to(device),
        )
        for n in BATCHES
    ]


def _train(model: nn.Module, criterion: nn.Module, data: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for images, target in data:
        optimizer.zero_grad()
        loss = criterion(model(images), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


# terms summed on the way to a weight: batch, pixels, taps and channels of each step
REDUCTION = len(BATCHES) * max(BATCHES) * 8 * 8 * 9 * 16


@pytest.mark.gate("ttsem", "cuda")
@pytest.mark.parametrize(
    "memory_format, steps",
    (
        pytest.param(torch.contiguous_format, 1, id="nchw", marks=pytest.mark.extended("ttsem")),
        pytest.param(torch.channels_last, len(BATCHES), id="nhwc"),
    ),
)
def test_steps_equal_plain_pytorch(
    device: str, launches: list[str], memory_format: torch.memory_format, steps: int
) -> None:
    """Losses, weights and running statistics after SGD steps, and nothing but our kernels computing them."""
    torch.manual_seed(0)
    plain = CNNClassifier(**SMALL)
    fused = FusedCNNClassifier(**SMALL)
    fused.load_state_dict(plain.state_dict())
    reference = copy.deepcopy(plain).double()
    fused = fused.to(device=device, memory_format=memory_format)
    data = [(images.to(memory_format=memory_format), target) for images, target in _data(device)[:steps]]
    exact = [(images.cpu().double(), target.cpu()) for images, target in data]

    launches.clear()
    with AtenWatch() as watch:
        losses = _train(fused, tkernels.nn.CrossEntropyLoss(), data)
    assert not watch.replaced(), f"PyTorch computed {watch.replaced()}"
    # 5 convolutions with dgrad (but for the image) and wgrad, 5 batch norms, 3 linears, 1 loss
    assert len(launches) >= steps * (5 + 4 + 5 + 5 * 2 + 5 * 2 + 3 * 3 + 2)
    with tkernels.backend("torch"):
        expected = _train(reference, nn.CrossEntropyLoss(), exact)

    for step, (got, want) in enumerate(zip(losses, expected)):
        assert_close(got, want, REDUCTION, name=f"loss of step {step}")
    state = fused.state_dict()
    for name, want in reference.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert state[name] == want == steps
        else:
            # a convolution's bias before batch norm has a zero gradient: what is left is rounding noise on both sides
            scale = 1.0 if ".conv" in name and name.endswith("bias") else None
            assert_close(state[name], want, REDUCTION, scale=scale, name=name)


@pytest.mark.gate("ttsem", "cuda")
def test_only_our_kernels_evaluate(device: str, launches: list[str]) -> None:
    model = FusedCNNClassifier(**SMALL).to(device).eval()
    ((images, target), *_) = _data(device)
    launches.clear()
    with AtenWatch() as watch, torch.no_grad():
        tkernels.nn.CrossEntropyLoss()(model(images), target)
    assert not watch.replaced(), f"PyTorch computed {watch.replaced()}"
    assert len(launches) >= 5 + 5 + 3 + 1


@pytest.mark.gate("torch")
def test_the_watch_sees_pytorch_computing() -> None:
    model = CNNClassifier(**SMALL)
    ((images, target), *_) = _data("cpu")
    with AtenWatch() as watch:
        nn.CrossEntropyLoss()(model(images), target).backward()
    seen = " ".join(watch.replaced())
    for kind in ("convolution", "batch_norm", "addmm", "nll_loss", "softmax"):
        assert kind in seen
