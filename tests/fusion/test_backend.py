"""torch.compile(backend="tkernels"), its options and its warning; explain() and the report; how often it compiles."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tkernels
from tests.fusion.cases import CNN_CHAINS, cnn
from tests.fusion.pairs import (
    assert_alike,
    both,
    chains,
    close,
    gradients_alike,
    images,
    in_one,
    ran,
    report,
)
from tkernels.fusion.backend import Backend
from tkernels.fusion.in_place import _CAN_ISOLATE

pytestmark = pytest.mark.gate("torch", "cuda")

# what a user types who has installed the package and read one line about it
UNIMPORTED = """
import torch, sys
from torch import nn
from torch.profiler import profile
assert "tkernels" in torch._dynamo.list_backends()
assert "tkernels" not in sys.modules
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).to(memory_format=torch.channels_last)
x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
compiled = torch.compile(model, backend="tkernels")
y = compiled(x)
assert "tkernels" in sys.modules
torch.testing.assert_close(y, model(x))
with profile() as found:
    compiled(x)
print("batch norms of PyTorch's:", sum(e.count for e in found.key_averages() if e.key == "aten::native_batch_norm"))
"""


INSTALLED = any(point.name == "tkernels" for point in entry_points(group="torch_dynamo_backends"))


@pytest.mark.gate("torch")
@pytest.mark.skipif(not INSTALLED, reason="the package is not installed: it is run from its sources")
def test_found_by_name_without_an_import() -> None:
    done = subprocess.run([sys.executable, "-c", UNIMPORTED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "batch norms of PyTorch's: 0" in done.stdout


@pytest.mark.parametrize("rest", ["eager", pytest.param("inductor", marks=pytest.mark.gate("torch"))])
def test_rest(rest: str, device: str) -> None:
    """What is no chain runs as it was, or is Inductor's: values, gradients, buffers."""
    torch.manual_seed(0)
    model: nn.Module = cnn().to(device=device, memory_format=torch.channels_last)
    twin, backend = copy.deepcopy(model), Backend({"rest": rest})
    compiled, x, bound = torch.compile(twin, backend=backend), images(device), 1e-3
    for _ in range(2):
        results = []
        for network, call in ((twin, compiled), (model, model)):
            network.zero_grad()
            y = call(x)
            y.square().sum().backward()
            results.append([y, *[p.grad for p in network.parameters()]])
        close(*results, "result and gradients", bound)
        close(dict(twin.named_buffers()), dict(model.named_buffers()), "buffers", bound)
    assert backend.ran == 4
    model.eval(), twin.eval()
    with torch.no_grad():
        close([compiled(x)], [model(x)], "evaluation", bound)


@pytest.mark.parametrize("options", [{"rst": "eager"}, {"rest": "nonsense"}, {"rest": "eager", "more": 1}])
def test_unknown_options(options: dict[str, Any], device: str) -> None:
    with pytest.raises(ValueError, match="options of the backend must be"):
        tkernels.fuse(cnn(), options=options)
    compiled = torch.compile(cnn().to(device), backend="tkernels", options=options)
    with pytest.raises(Exception, match="options of the backend must be"):
        compiled(images(device))


def test_not_a_module() -> None:
    for call in (tkernels.fuse, tkernels.unfuse, tkernels.explain, lambda model: tkernels.explain(model, 1)):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got builtin_function"):
            call(torch.relu)  # type: ignore[arg-type, no-untyped-call]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def test_explain_leaves_the_model_alone(device: str) -> None:
    """Buffers, gradients, generators, modes and the call."""
    model = nn.Sequential(cnn(), nn.Dropout(0.5), nn.Tanh()).to(device=device, memory_format=torch.channels_last)
    x, before, drawn = images(device), state(model), torch.random.get_rng_state()
    found = tkernels.explain(model, x)
    assert in_one(what for _, what in found.fused) == CNN_CHAINS
    assert {where for where, _ in found.fused} == {"0"}
    assert found.graphs == 1
    assert found.seconds > 0
    close(state(model), before, "state", 0.0)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert model._compiled_call_impl is None
    with pytest.raises(ValueError, match="not fused"):
        tkernels.explain(model)


def test_explain_of_a_fused_model(device: str) -> None:
    """Without arguments: of its calls so far; with them: of one more, which does not count among them."""
    model, fused = both(cnn, device)
    assert not report(fused).fused
    assert_alike(fused, model, images(device), more=2)
    assert in_one(chains(fused)) == CNN_CHAINS
    before, count = state(fused), ran(fused)
    assert in_one(what for _, what in tkernels.explain(fused, images(device)).fused) == CNN_CHAINS
    assert in_one(chains(fused)) == CNN_CHAINS
    assert ran(fused) == count
    close(state(fused), before, "state", 0.0)
    found = tkernels.explain(torch.compile(model, backend="eager"), images(device))
    assert in_one(what for _, what in found.fused) == CNN_CHAINS
    text = str(report(fused))
    assert "0 -> 1 -> 2" in text
    assert "8: linear layer alone, followed by the end of the graph: nothing to fuse it with" in text


def test_printed_after_the_first_call(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, fused = both(cnn, device, report=True)
    assert not capsys.readouterr().out
    fused(images(device))
    assert capsys.readouterr().out == f"{report(fused)}\n"
    fused(images(device))
    fused(images(device, n=3))
    assert not capsys.readouterr().out


def messages(found: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in found if "fused" in str(w.message)]


def test_a_call_that_fused_nothing_warns_once(device: str) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh()).to(device)
    fused, compiled = tkernels.fuse(copy.deepcopy(plain)), torch.compile(plain, backend="tkernels")
    for network in (fused, compiled):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for _ in range(3):
                network(images(device))
        assert len(messages(found)) == 1
        assert "0: convolution alone, followed by 1: nothing" in messages(found)[0]
    assert found[0].filename == __file__ or "fused nothing" in messages(found)[0]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for network in both(cnn, device)[1], torch.compile(cnn().to(device).to(memory_format=torch.channels_last),
                                                           backend="tkernels"):  # fmt: skip
            network(images(device))
    assert not messages(found)


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = cnn()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body[:3](x)
        if y.sum() > 0:
            y = 2.0 * y
        print(end="")
        return self.body[6:](self.body[3:6](y))


def test_graph_breaks_are_reported(device: str) -> None:
    model, fused = both(Breaks, device)
    assert_alike(fused, model, images(device), more=2)
    found = report(fused)
    assert found.breaks
    assert any("control flow" in why or "jump" in why for why in found.breaks)
    assert all(": " in why and "Explanation" not in why and "Hint" not in why for why in found.breaks)
    assert found.graphs >= 2
    assert f"Dynamo ended a graph at: {len(found.breaks)}" in str(found)
    gradients_alike(fused, model, images(device))


@pytest.fixture
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("make", [cnn, Breaks])
def test_the_recompile_limit_is_a_models_own(make: Callable[[], nn.Module], device: str) -> None:
    """Dynamo's holds for a function's code, which models of one class share, above all where a graph ends."""
    if make is Breaks and not _CAN_ISOLATE:
        pytest.skip("before torch 2.14 models share it where Dynamo ends a graph")
    alive = []
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(5):
            model, fused = both(make, device)
            assert_alike(fused, model, images(device), more=2)
            alive.append(fused)


def test_batches_of_any_size(device: str) -> None:
    """Two graphs: for the first size, and for all after it. (Dynamo takes 1 for a size of its own.)"""
    model, fused = both(cnn, device)
    x = images(device, n=9)
    graphs = []
    for n in (4, 6, 3, 9, 2, 4, 1, 7, 1, 8):
        assert_alike(fused, model, x[:n], more=2)
        graphs.append(report(fused).graphs)
    assert graphs == [1, 2, 2, 2, 2, 2, 3, 3, 3, 3]
    gradients_alike(fused, model, x[:5])


def test_images_of_any_size(device: str) -> None:
    model, fused = both(cnn, device)
    for size in (8, 12, 10, 16, 9):
        assert_alike(fused, model, images(device, size=size), more=2)
    assert report(fused).graphs == 2


def test_training_and_evaluation_in_turns(device: str) -> None:
    """A graph each, whatever the order."""
    model, fused = both(cnn, device)
    x = images(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            for training in (True, False):
                model.train(training), fused.train(training)
                with torch.set_grad_enabled(training):
                    close([fused(x)], [model(x)], str(training))
    assert report(fused).graphs == 2
    close(state(fused), state(model), "state")


class Averages(Breaks):
    """Its first norm's factor changes with every call, and is read from the counter, which Dynamo ends a graph at."""

    def __init__(self) -> None:
        super().__init__()
        self.body[1].momentum = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body[3:](self.body[:3](x))
        return y


def test_averages_over_all_batches(device: str) -> None:
    model, fused = both(Averages, device)
    for _ in range(4):
        assert_alike(fused, model, images(device), more=1)
    gradients_alike(fused, model, images(device))
    assert any("item()" in why for why in report(fused).breaks)


@pytest.mark.gate("torch")
def test_a_graph_has_a_chunk_of_frames_of_its_own(device: str) -> None:
    """Whatever the depth it is called from: else each call it makes may map and unmap one."""
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Tanh(), nn.Sigmoid()))
    code = Backend()(graph, ()).__func__.__code__  # type: ignore[attr-defined]
    assert code.co_nlocals + code.co_stacksize > 2048
    x = images(device)
    assert torch.equal(Backend()(graph, ())(x), x.tanh().sigmoid())
