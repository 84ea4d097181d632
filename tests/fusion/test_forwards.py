"""What forwards of people's models do besides arithmetic, and what is done to fused models as objects."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tkernels
from tests.fusion.cases import CNN_CHAINS, cnn
from tests.fusion.pairs import assert_alike, both, chains, close, gradients_alike, images, in_one, ran

pytestmark = pytest.mark.gate("torch", "cuda")


class Net(nn.Module):
    """Two chains, and what forward does besides."""

    scale = 1.0
    skip = False

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.seen: dict[str, Any] = {}
        self.log: list[Any] = []
        self.calls = 0

    def first(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))

    def second(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(x)))

    def forward(self, x: Any) -> Any:
        return self.second(self.first(x))


class KeepsFeatures(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        self.seen["first"] = y
        self.log.append("call")
        self.calls += 1
        y = self.second(y)
        self.last = y
        return y


class GivesContainers(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        return {"maps": [y, self.second(y)], "sizes": (x.mean(), x)}


class Point(NamedTuple):
    features: Tensor
    image: Tensor


class GivesNamedTuple(Net):
    def forward(self, x: Tensor) -> Point:
        return Point(self.second(self.first(x)), x)


class DrawsTorch(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) * torch.rand(1, device=x.device)
        return F.dropout(self.second(y), 0.5, self.training) + torch.randn_like(y)


class DrawsNumpy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * float(np.random.rand()))  # noqa: NPY002


class DrawsPython(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) if random.random() < 0.5 else y


class Branches(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) if x.sum() > 0 else y.sum((2, 3))


class Loops(Net):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1 + self.calls % 2):
            x = self.first(x)
        self.calls += 1
        return self.second(x)


class UsesFlags(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) * self.scale
        return y if self.skip else self.second(y)


class WritesBuffers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen_mean", torch.zeros(3))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        self.steps += 1
        self.seen_mean = 0.9 * self.seen_mean + 0.1 * y.detach().mean((0, 2, 3))
        return self.second(y)


class WritesItsInput(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        x.mul_(2.0)
        return self.second(y)


class TriesFinally(Net):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.second(self.first(x))
        finally:
            self.log.append(len(self.log))


@pytest.mark.parametrize("cls, fewest", [
    (KeepsFeatures, 2), (GivesContainers, 2), (GivesNamedTuple, 2), (DrawsTorch, 2), (DrawsNumpy, 1), (DrawsPython, 1),
    (Branches, 1), (Loops, 2), (UsesFlags, 2), (WritesBuffers, 2), (WritesItsInput, 1), (TriesFinally, 2),
])  # fmt: skip
def test_forwards_of_every_kind(cls: type[Net], fewest: int, device: str) -> None:
    """Values, buffers, and what they leave on the model, call for call."""
    model, fused = both(cls, device)
    for call in range(4):
        x = images(device) + call % 2
        results, before = [], ran(fused)
        for network in (fused, model):
            torch.manual_seed(call)
            np.random.seed(call)  # noqa: NPY002
            random.seed(call)
            given = x.clone()
            results.append({"result": network(given), "input": given})
            results[-1]["next"] = torch.tensor([torch.rand(1).item(), np.random.rand(), random.random()])  # noqa: NPY002
        close(*results, f"call {call}")
        assert type(results[0]["result"]) is type(results[1]["result"])
        assert ran(fused) - before >= fewest
        close(dict(fused.named_buffers()), dict(model.named_buffers()), "buffers")
        assert (fused.log, fused.calls) == (model.log, model.calls)
        close(fused.seen, model.seen, "kept")
        assert ("last" in vars(fused)) == ("last" in vars(model))


def test_fusing_runs_nothing(device: str) -> None:
    _, fused = both(KeepsFeatures, device)
    assert not fused.log
    assert not fused.seen
    assert fused.bn.num_batches_tracked == 0


def test_flags_that_change(device: str) -> None:
    model, fused = both(UsesFlags, device)
    for scale, skip in ((1.0, False), (2.0, False), (2.0, True), (3.0, False), (4.0, False)):
        for network in (model, fused):
            network.scale, network.skip = scale, skip
        assert_alike(fused, model, images(device), more=1 if skip else 2)


class TakesAnything(Net):
    def forward(self, x: Any, *more: Tensor, skip: Tensor | None = None, **scales: float) -> Tensor:
        if hasattr(x, "features"):
            x = x.features
        if isinstance(x, dict):
            x = x["image"]
        if type(x) is list:
            x = torch.cat(x)
        y = self.first(x)
        for other in more:
            y = y + other
        if skip is not None:
            y = y + skip
        for scale in scales.values():
            y = y * scale
        return self.second(y)


CALLS: list[list[Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]]] = [
    [
        lambda x: ((x,), {}),
        lambda x: (([x, x],), {}),
        lambda x: (({"image": x},), {}),
        lambda x: ((Point(x, x),), {}),
        lambda x: ((x, x, x), {}),
    ],
    [
        lambda x: ((x,), {"skip": None}),
        lambda x: ((x,), {"skip": x}),
        lambda x: ((x,), {"scale": 2.0}),
        lambda x: ((x,), {"scale": 3.0, "other": 2}),
        lambda x: ((), {"x": x}),
    ],
]


@pytest.mark.parametrize("calls", CALLS, ids=["positional", "keywords"])
def test_arguments_of_every_kind(calls: list[Any], device: str) -> None:
    model, fused = both(TakesAnything, device)
    for call in calls + calls:
        args, kwargs = call(images(device))
        assert_alike(fused, model, *args, more=2, **kwargs)


class Shared(nn.Module):
    """One convolution and one norm twice, and a weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)
        self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        return F.relu(self.bn(self.conv(y)) + F.relu(self.bn(self.other(x))))


def test_layers_and_weights_used_twice(device: str) -> None:
    model, fused = both(Shared, device)
    # between conv -> bn and its addition stands the other call of the norm, which moves the same statistics: cut there
    assert_alike(fused, model, images(device), more=3)
    assert fused.bn.num_batches_tracked == 3
    gradients_alike(fused, model, images(device))


def test_lazy_layers(device: str) -> None:
    """Their parameters come with the first call."""
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        networks.append(nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU()).to(device))
    model, fused = networks[0], tkernels.fuse(networks[1])
    x = images(device)
    for _ in range(2):
        found = []
        for network in (fused, model):
            torch.manual_seed(1)
            found.append(network(x))
        close(*[[y] for y in found], "result")
    assert_alike(fused, model, x, more=1)


def save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), save],
                         ids=["deepcopy", "copy", "pickle", "save"])  # fmt: skip
@pytest.mark.parametrize("called", [True, False])
def test_copies(duplicate: Callable[[Any], Any], called: bool, device: str) -> None:
    """They are the plain model, with a life of their own, and can be fused."""
    model, fused = both(cnn, device)
    x = images(device)
    if called:
        assert_alike(fused, model, x, more=2)
    twin = duplicate(fused)
    assert type(twin) is nn.Sequential
    assert list(twin.state_dict()) == list(model.state_dict())
    if duplicate is not copy.copy:  # which shares its layers
        twin[2] = nn.GELU()
        before = ran(fused)
        twin(x)
        assert ran(fused) == before
    assert_alike(fused, model, x, more=2)
    twin = duplicate(fused)
    other = copy.deepcopy(model)
    assert_alike(tkernels.fuse(twin), other, x, more=2)


def test_exponential_moving_average(device: str) -> None:
    model, fused = both(cnn, device)
    x = images(device)
    averages = [AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True) for m in (fused, model)]
    tkernels.fuse(averages[0])
    for _ in range(2):
        for network, average in zip((fused, model), averages):
            network(x).square().sum().backward()
            torch.optim.SGD(network.parameters(), lr=0.01).step()
            average.update_parameters(network)
    close(averages[0].state_dict(), averages[1].state_dict(), "averages", 1e-3)
    assert_alike(*averages, x, more=2)


def test_unfused_models_are_as_before(device: str) -> None:
    model, fused = both(cnn, device)
    x = images(device)
    assert_alike(fused, model, x, more=2)
    assert tkernels.unfuse(fused) is fused
    assert fused._compiled_call_impl is None
    close([fused(x)], [model(x)], "unfused")
    with pytest.raises(ValueError, match="not fused"):
        tkernels.explain(fused)
    assert tkernels.unfuse(fused) is fused  # nothing to undo
    assert_alike(tkernels.fuse(fused), model, x, more=2)


def test_objects_stay_the_same(device: str) -> None:
    model = cnn().to(device)
    parameters, keys = list(model.parameters()), list(model.state_dict())
    assert tkernels.fuse(model) is model
    model(images(device))
    assert type(model) is nn.Sequential
    assert all(a is b for a, b in zip(model.parameters(), parameters))
    assert list(model.state_dict()) == keys


def test_fused_twice(device: str) -> None:
    model, fused = both(cnn, device)
    x = images(device)
    assert_alike(fused, model, x, more=2)
    assert tkernels.fuse(fused) is fused
    assert ran(fused) == 0  # a report of its own
    assert_alike(fused, model, x, more=2)


@pytest.mark.parametrize("part_first", [True, False])
def test_a_part_and_the_whole(part_first: bool, device: str) -> None:
    """The whole runs its chains itself; the part goes on by itself where it is called alone."""
    model, plain = (nn.Sequential(cnn(), nn.Tanh()).to(device=device, memory_format=torch.channels_last) for _ in "ab")
    model.load_state_dict(plain.state_dict())
    x = images(device)
    if part_first:
        tkernels.fuse(model[0])
        assert_alike(model[0], plain[0], x, more=2)
    tkernels.fuse(model)
    assert_alike(model, plain, x, more=2)
    tkernels.fuse(model[0])
    assert_alike(model, plain, x, more=2)
    assert_alike(model[0], plain[0], x, more=2)
    tkernels.unfuse(model)
    with pytest.raises(ValueError, match="not fused"):
        tkernels.explain(model[0])


def test_without_data(device: str) -> None:
    """Fused and called on the meta device, then given storage and called."""
    with torch.device("meta"):
        fused = tkernels.fuse(cnn())
    with pytest.warns(UserWarning, match="ran no fused operator"):
        assert fused(images("meta")).shape == (4, 5)
    model = cnn().to(device=device, memory_format=torch.channels_last)
    fused.to_empty(device=device).to(memory_format=torch.channels_last)
    fused.load_state_dict(model.state_dict())
    assert_alike(fused, model, images(device), more=2)


def test_under_fake_tensors(device: str) -> None:
    """As for estimating memory: a trace of somebody else's sees the plain model."""
    with FakeTensorMode():
        fused = tkernels.fuse(cnn())
        assert fused(torch.randn(4, 3, 8, 8)).shape == (4, 5)
    fused = tkernels.fuse(cnn().to(device=device, memory_format=torch.channels_last))
    fused(images(device))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert fused(mode.from_tensor(images(device))).shape == (4, 5)
    before = ran(fused)
    fused(images(device))
    assert ran(fused) == before + 2
    assert in_one(chains(fused)).startswith(CNN_CHAINS)
