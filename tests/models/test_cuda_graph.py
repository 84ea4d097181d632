"""The captured training step, with a stand-in for CUDA's graphs: a capture records ATen calls and executes nothing,
a replay makes the same calls on the same memory. What a real graph would freeze, the stand-in freezes too."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import Subset

from models import checkpoint, data, options, train, trainer
from models.cuda_graph import WARM_UP, GraphedStep
from models.engine import TrainingStep

pytestmark = pytest.mark.gate("torch")

# asks the device for a value: a stream that is being captured refuses
SYNCHRONISING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
Record = tuple[Any, Any, Any, Any]


class StandInGraph:
    def __init__(self) -> None:
        self.calls: list[Record] = []
        self.replays = 0

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, results in self.calls:
            given = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
            for old, new in zip(tensors(results), tensors(func(*args, **kwargs))):
                if old.untyped_storage()._cdata not in given:
                    old.copy_(new)


class Capture(TorchDispatchMode):
    """Records calls; at the end everything they changed, the random numbers' state too, is as it was."""

    def __init__(self, graph: StandInGraph) -> None:
        super().__init__()
        self.graph = graph
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._fresh: set[int] = set()
        self._rng = torch.get_rng_state()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in SYNCHRONISING:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args):
            # batch norm's schema does not say that it writes its running statistics
            if (argument.alias_info is not None and argument.alias_info.is_write) or "running" in argument.name:
                for t in tensors(value):
                    key = t.untyped_storage()._cdata
                    if key not in self._fresh:
                        self._before.setdefault(key, (t, t.clone()))
        given = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
        results = func(*args, **kwargs)
        self._fresh |= {t.untyped_storage()._cdata for t in tensors(results)} - given
        self.graph.calls.append((func, args, kwargs, results))
        return results

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        with torch.no_grad():
            for t, before in self._before.values():
                t.copy_(before)
        torch.set_rng_state(self._rng)


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


class StandInStream:
    def wait_stream(self, other: StandInStream) -> None:
        pass


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[StandInGraph]:
    """The graphs that were made."""
    made: list[StandInGraph] = []

    def new() -> StandInGraph:
        made.append(StandInGraph())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "Stream", StandInStream)
    monkeypatch.setattr(torch.cuda, "current_stream", StandInStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    # torch allows a capturable Adam on accelerators only
    monkeypatch.setattr(
        sys.modules[torch.optim.Adam.__module__], "_get_capturable_supported_devices", lambda *_: ["cpu"]
    )
    return made


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 images: two batches of 16 and one of 8."""

    def few(data_dir: Path, seed: int, val_fraction: float | None) -> data.Data:
        images = data.digits(data_dir, seed)
        return images._replace(train=Subset(images.train, range(40)), val=Subset(images.val, range(16)))

    monkeypatch.setitem(data._LOADERS, "digits", few)
    monkeypatch.setattr(train, "_report", lambda *args: None)


def trained(out: Path, model: str) -> dict[str, Any]:
    """Four epochs with a graph wanted."""
    arguments = ["--device", "cpu", "--batch-size", "16", "--epochs", "4", "--model", model, "--out", str(out)]
    arguments += ["--width", "4"]
    out.mkdir()
    train.run(dataclasses.replace(options.parse(arguments), cuda_graph=True))
    return checkpoint.load(out / "checkpoint.pt")


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("model", ["fused", "plain"])
def test_replayed_steps_train_as_eager_ones(
    graphs: list[StandInGraph], tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout draws anew, the learning rate falls, the partial batch runs eagerly: bit for bit."""
    replayed = trained(tmp_path / "graph", model)
    (graph,) = graphs
    assert graph.replays == 4 * 2 - WARM_UP
    monkeypatch.setattr(trainer, "GraphedStep", lambda step: step)
    eager = trained(tmp_path / "eager", model)
    assert len(graphs) == 1
    for name, value in eager["model_state_dict"].items():
        assert torch.equal(replayed["model_state_dict"][name], value), name
    assert (tmp_path / "graph" / "history.csv").read_text() == (tmp_path / "eager" / "history.csv").read_text()


@pytest.mark.usefixtures("few_digits", "graphs")
def test_checkpoints_do_not_say_that_there_was_a_graph(tmp_path: Path) -> None:
    (group,) = trained(tmp_path / "graph", "plain")["optimizer_state_dict"]["param_groups"]
    assert isinstance(group["lr"], float)
    assert group["capturable"] is False


@pytest.mark.usefixtures("graphs")
def test_without_a_capture_training_goes_on_and_says_so() -> None:
    class Asks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1.0 if x.sum().item() > 0 else 0.5)

    told: list[str] = []
    batches = [(torch.randn(4, 3), torch.arange(4) % 2) for _ in range(6)]

    def weights(graphed: bool) -> Tensor:
        torch.manual_seed(0)
        model = Asks(3, 2)
        step = TrainingStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1))
        step = GraphedStep(step, told.append) if graphed else step
        for batch in batches:
            step(*batch)
        return model.weight.detach()

    assert torch.equal(weights(True), weights(False))
    (line,) = told
    assert line == (
        "note: the step could not be captured as a CUDA graph, training goes on without: "
        "operation not permitted when stream is capturing"
    )


def test_a_graph_on_the_cpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        options.parse(["--device", "cpu", "--cuda-graph"])
    assert stopped.value.code == 2
    assert "argument --cuda-graph: needs a GPU, the device is cpu" in capsys.readouterr().err
    assert not options.parse(["--device", "cpu"]).cuda_graph
