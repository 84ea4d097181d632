"""What fuse() makes of a network on the kernels: values, gradients and running statistics, and every launch counted."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tkernels
from perf.static import meter
from perf.static.rewritten import Rewritten
from tests.conftest import GATE
from tests.tolerance import assert_close
from tkernels.core import targets
from tkernels.fusion.backend import count_up
from tkernels.ops.conv import routing

pytestmark = pytest.mark.gate("ttsem", "cuda")


class Network(nn.Module):
    """A stem with a padded pool, a residual block with a projection, a depthwise block without, pre-activation, a
    hidden linear layer: each kind of chain."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
            nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16),
        )  # fmt: skip
        self.projection = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.Hardswish())
        self.norm = nn.BatchNorm2d(16)
        self.hidden = nn.Sequential(nn.Linear(16, 8), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.block(x)
        y += self.projection(x)
        y = F.relu(y, inplace=True)
        y = y + self.depthwise(y)
        y = F.relu6(self.norm(y))
        result: Tensor = self.hidden(y.mean((2, 3)))
        return result


CHAINS = [
    "0 -> 1 -> 2 -> 3", "0 -> 1 -> 2 -> 3 -> 4 -> add -> relu (shortcut 0 -> 1)", "0 -> 1 -> 2", "norm -> relu6",
    "0 -> 1",
]  # fmt: skip
KINDS = (nn.Conv2d, nn.BatchNorm2d)


def test_every_kind_of_chain(device: str, launches: list[str]) -> None:
    model = Network()
    exact = copy.deepcopy(model).double()
    x = torch.randn(2, 3, 10, 10)
    with pytest.MonkeyPatch.context() as patch:
        if GATE == "ttsem":  # where Dynamo would ask a driver that is only pretended
            patch.setattr(torch.cuda, "is_available", lambda: False)
        rewritten = Rewritten(model, x)
    assert sorted(what for _, what in rewritten.report.fused) == sorted(CHAINS)
    assert not any(node.target in (torch.conv2d, F.batch_norm, F.relu) for node in rewritten.graph.nodes)
    # the counters of all batch norms go up in one call, rather than in a launch each
    assert sum(node.target is count_up for node in rewritten.graph.nodes) == 1
    assert not any(node.target == "add_" for node in rewritten.graph.nodes)
    rewritten.to(device)
    y = rewritten(x.to(device))
    forward = Counter(launches)
    assert forward["conv_stage_kernel"] + forward["pointwise_forward_kernel"] == 4
    assert forward["linear_forward_kernel"] == 1
    assert forward["finalize_statistics_kernel"] == 6, "one for each batch norm"
    (y * torch.linspace(0.5, 1.5, y.numel()).view(y.shape).to(device)).sum().backward()
    expected = exact(x.double())
    (expected * torch.linspace(0.5, 1.5, y.numel()).view(y.shape)).sum().backward()
    assert_close(y, expected, 500, name="result")
    wanted = dict(exact.named_parameters())
    for name, parameter in rewritten.model.named_parameters():
        assert parameter.grad is not None, name
        truth = wanted[name].grad
        assert truth is not None
        assert_close(parameter.grad, truth, 5000, scale=max(1.0, truth.abs().max().item()), name=name)
    for name, buffer in exact.named_buffers():
        if buffer.is_floating_point():
            assert_close(rewritten.model.get_buffer(name), buffer, 500, name=name)
        else:
            assert rewritten.model.get_buffer(name) == buffer


@pytest.mark.gate("interp")
def test_fuse_runs_kernels(launches: list[str]) -> None:
    """From fuse() on, with Dynamo, where kernels run on CPU tensors."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU())
    fused = tkernels.fuse(copy.deepcopy(model))
    x = torch.randn(2, 3, 6, 6)
    y = fused(x)
    assert Counter(launches)["conv_stage_kernel"] == 1
    torch.testing.assert_close(y, model(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fused.state_dict(), model.state_dict())


def steps_launches(model: nn.Module, x: Tensor, target: str) -> tuple[Rewritten, Counter[str]]:
    """What a training step of a fused model launches on a pretended GPU, under backend 'auto'."""
    rewritten = Rewritten(model, x, targets.TARGETS[target])
    launched: Counter[str] = Counter()
    with meter.pretended_gpu(target, lambda kernel, *given: launched.update([kernel.__name__])) as mode:
        meter.make_fake(rewritten, mode)
        rewritten(mode.from_tensor(x)).sum().backward()
    return rewritten, launched


@pytest.mark.gate("torch")
def test_which_convolutions_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On NVIDIA's GPUs all that tensor cores spend their time on, within stages of ours; batch norms are ours."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, bias=False),
        nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 3, groups=64),
        nn.BatchNorm2d(64), nn.SiLU(), nn.Conv2d(64, 128, 3), nn.BatchNorm2d(128), nn.ReLU(),
    ).to(torch.bfloat16, memory_format=torch.channels_last)  # fmt: skip
    x = torch.randn(2, 3, 16, 16).to(torch.bfloat16, memory_format=torch.channels_last)
    monkeypatch.setattr(routing, "SHORT", 0.0)  # these are small
    rewritten, launched = steps_launches(model, x, "sm_90")
    report = rewritten.report
    assert not report.left
    assert [what for _, what in report.fused] == [" -> ".join(map(str, range(14)))]
    assert launched["conv_stage_kernel"] == 2
    assert launched["statistics_kernel"] == 3, "behind PyTorch's two convolutions and the depthwise one"
    assert launched["finalize_statistics_kernel"] == 5
    assert launched["conv_wgrad_kernel"] == 2
    routing.of_stage.cache_clear()
    rewritten, launched = steps_launches(model, x, "gfx942")
    assert not rewritten.report.left
    assert launched["conv_stage_kernel"] + launched["pointwise_forward_kernel"] == 4


class Block(nn.Module):
    """Two convolutions, and the input or what a projection makes of it."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.projection = nn.Sequential()
        if channels != out:
            self.projection = nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.projection(x))


class Blocks(nn.Module):
    """Two of them, and another reader of what is between."""

    def __init__(self, read: Any) -> None:
        super().__init__()
        self.first, self.second, self.read = Block(8, 16), Block(16, 16), read

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        return self.read(self.second(y), y)


READERS = {
    "nobody else": (lambda z, y: z, 1),
    "the caller": (lambda z, y: (z, y), 0),
    "a dictionary": (lambda z, y: (z, {"between": y}), 0),
    "a list": (lambda z, y: torch.cat([z, y], 1), 0),
    "a keyword": (lambda z, y: z + F.interpolate(input=y, scale_factor=1), 0),
    "an addition": (lambda z, y: z + y, 0),
}


@pytest.mark.gate("torch")
@pytest.mark.parametrize("reader", READERS)
def test_whose_two_readers_get_a_tensor_each(reader: str) -> None:
    """Two conv stages and nobody else: others would be given a pair."""
    read, twice = READERS[reader]
    rewritten = Rewritten(Blocks(read), torch.randn(2, 8, 6, 6), targets.TARGETS["sm_90"])
    names = Counter(getattr(node.target, "__name__", "") for node in rewritten.graph.nodes)
    assert names["residual_block_twice"] == twice
    assert names["residual_block_twice"] + names["residual_block"] == 2
    assert next(what for _, what in rewritten.report.fused).endswith("(shortcut 0 -> 1)")


@pytest.mark.parametrize("reader", ("nobody else", "a list"))
def test_gradients_of_two_readers_are_added(reader: str, device: str, launches: list[str]) -> None:
    model = Blocks(READERS[reader][0])
    exact = copy.deepcopy(model).double()
    x = torch.randn(2, 8, 6, 6)
    with pytest.MonkeyPatch.context() as patch:
        if GATE == "ttsem":  # where Dynamo would ask a driver that is only pretended
            patch.setattr(torch.cuda, "is_available", lambda: False)
        rewritten = Rewritten(model, x)
    rewritten.to(device)
    factors = torch.linspace(0.5, 1.5, 2 * 36)
    (rewritten(x.to(device)).sum(1).flatten() * factors.to(device)).sum().backward()
    (exact(x.double()).sum(1).flatten() * factors).sum().backward()
    for name, parameter in exact.named_parameters():
        got = rewritten.model.get_parameter(name).grad
        assert got is not None
        assert parameter.grad is not None
        scale = max(1.0, parameter.grad.abs().max().item())
        assert_close(got, parameter.grad, 5000, scale=scale, name=name)
    assert launches.count("gradient_sums_kernel") >= 2
