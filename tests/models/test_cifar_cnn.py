"""The two networks: the same parameters, state_dict and initial weights, and the same training with dropout off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tkernels
import tkernels.nn as tnn
from models.cifar_cnn import CNNClassifier, FusedCNNClassifier
from tests.fusion.pairs import close, gradients_alike, ran
from tests.tolerance import assert_close

pytestmark = pytest.mark.gate("torch")

NETWORKS = (CNNClassifier, FusedCNNClassifier)
SMALL: dict[str, Any] = {"num_classes": 5, "width": 4, "image_size": 8}
NO_DROPOUT = {"dropout2d": 0.0, "dropout": 0.0}


def _made(network: type[nn.Module], seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return network(**kwargs)


@pytest.mark.parametrize("network", NETWORKS)
def test_parameter_count(network: type[nn.Module]) -> None:
    assert sum(p.numel() for p in network().parameters()) == 698_794


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("classes, width, size", [(10, 32, 32), (3, 4, 8), (7, 5, 30), (1, 1, 64)])
def test_output_shape(network: type[nn.Module], classes: int, width: int, size: int) -> None:
    model = network(classes, width=width, image_size=size)
    assert model(torch.randn(2, 3, size, size)).shape == (2, classes)


@pytest.mark.parametrize("kwargs", [{}, SMALL])
def test_same_seed_same_state(kwargs: dict[str, Any]) -> None:
    plain, fused = (_made(network, seed=3, **kwargs).state_dict() for network in NETWORKS)
    assert list(plain) == list(fused)
    for name, value in plain.items():
        assert fused[name].dtype == value.dtype
        assert torch.equal(fused[name], value), name
    # and the same amount was drawn: what comes after is the same too
    after = []
    for network in NETWORKS:
        _made(network, seed=3, **kwargs)
        after.append(torch.rand(4))
    assert torch.equal(*after)


@pytest.mark.parametrize("source, destination", [NETWORKS, NETWORKS[::-1]])
def test_state_loads_either_way(source: type[nn.Module], destination: type[nn.Module]) -> None:
    trained = _made(source, seed=1, **SMALL)
    images = torch.randn(6, 3, 8, 8)
    trained(images)  # running statistics that are not the initial ones
    other = _made(destination, seed=2, **SMALL)
    other.load_state_dict(trained.state_dict())
    with torch.no_grad():
        assert_close(other.eval()(images), trained.eval()(images).double(), reduction=16 * 9 * 8)


def test_fused_network_has_only_fused_layers() -> None:
    children = list(FusedCNNClassifier().children())
    assert [type(m) for m in children] == [tnn.ConvStage] * 3 + [nn.Sequential]
    assert [type(m) for m in children[-1]] == [tnn.Linear] * 3


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_same_loss_curve_without_dropout(memory_format: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(n, 3, 8, 8, generator=generator), torch.randint(5, (n,), generator=generator))
        for n in (7, 7, 7, 3)
    ]
    curves, states = [], []
    for network, criterion in zip(NETWORKS, (nn.CrossEntropyLoss(), tnn.CrossEntropyLoss())):
        model = _made(network, **SMALL, **NO_DROPOUT).to(memory_format=memory_format)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses = []
        for images, target in batches:
            optimizer.zero_grad()
            loss = criterion(model(images.to(memory_format=memory_format)), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
        states.append(model.state_dict())
    assert_close(curves[1], curves[0].double(), reduction=8 * 8 * 9 * 16)
    for name, value in states[0].items():
        assert_close(states[1][name].float(), value.double(), reduction=8 * 8 * 9 * 16, scale=1.0, name=name)


@pytest.mark.parametrize("network", NETWORKS)
def test_dropout_knobs(network: type[nn.Module]) -> None:
    images = torch.randn(4, 3, 8, 8)
    for knobs, same in ((NO_DROPOUT, True), ({"dropout": 0.0}, False), ({"dropout2d": 0.0}, False)):
        model = _made(network, width=16, image_size=8, **knobs)
        with torch.no_grad():
            assert torch.equal(model(images), model(images)) is same, knobs
    model = _made(network, **SMALL).eval()
    with torch.no_grad():
        assert torch.equal(model(images), model(images))


@pytest.mark.parametrize("network", NETWORKS)
def test_dropout_follows_the_seed(network: type[nn.Module]) -> None:
    images, model = torch.randn(4, 3, 8, 8), _made(network, **SMALL)
    outputs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outputs.append(model(images).detach())
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_classes": 0}, "num_classes and width must be positive, got 0 and 32"),
        ({"width": -1}, "num_classes and width must be positive, got 10 and -1"),
        ({"image_size": 7}, "image_size must be at least 8, got 7"),
        ({"dropout2d": 1.5}, "1.5"),
        ({"dropout": -0.1}, "-0.1"),
    ],
)
def test_absurd_arguments(network: type[nn.Module], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(**kwargs)


def test_backends_agree_on_the_cpu() -> None:
    """'auto' on the CPU is PyTorch, and 'triton' refuses where it cannot run instead of falling back."""
    model, images = _made(FusedCNNClassifier, **SMALL).eval(), torch.randn(2, 3, 8, 8)
    with tkernels.backend("torch"):
        expected = model(images)
    with tkernels.backend("auto"):
        assert torch.equal(model(images), expected)
    with tkernels.backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' was asked for"):
        model(images)


def test_fuse_makes_of_one_what_the_other_is() -> None:
    """The plain network under fuse() and the one fused by hand: every convolution in a chain, and the same training."""
    plain, by_hand = (_made(network, seed=1, **SMALL, **NO_DROPOUT) for network in NETWORKS)
    fused = tkernels.fuse(plain.to(memory_format=torch.channels_last))
    by_hand.to(memory_format=torch.channels_last)
    images = torch.randn(6, 3, 8, 8).to(memory_format=torch.channels_last)
    for _ in range(2):
        close([fused(images)], [by_hand(images)], "result")
    close(dict(fused.named_buffers()), dict(by_hand.named_buffers()), "buffers")
    gradients_alike(fused, by_hand, images, 1e-3)
    assert ran(fused) == 3 * sum(isinstance(module, nn.Conv2d) for module in fused.modules())
