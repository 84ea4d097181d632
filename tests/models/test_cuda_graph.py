"""The captured training step on a stand-in for a GPU: what is replayed trains as eager steps do, and what fails leaves
everything as it was."""

from __future__ import annotations

import dataclasses
import gc
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from models import checkpoint, options, recipes, train, trainer
from models.cuda_graph import WARM_UP, CaptureError, GraphedStep
from models.engine import TrainingStep
from models.interrupt import Stopped, StopRequest
from tests.models.stand_in_gpu import MODES, Gpu, Stream

pytestmark = [pytest.mark.gate("torch"), pytest.mark.filterwarnings("ignore:Synchronization debug mode")]

EPOCHS = 4
# of 40 images in batches of 16 two are full and one is not
FULL, BATCHES = 2, 3


@pytest.fixture(autouse=True, scope="module")
def _only_their_own_garbage() -> Iterator[None]:
    """A capture that failed collects garbage, among all objects of a process that has run thousands of tests: 2 seconds
    in place of 0.2."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    made = Gpu()
    made.install(monkeypatch)
    with made:
        yield made


@pytest.fixture
def no_report(few_digits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_report", lambda *args: None)


def chosen(out: Path, *words: str, graph: bool = True) -> options.Options:
    given = ["--device", "cpu", "--batch-size", "16", "--epochs", str(EPOCHS), "--width", "4", "--out", str(out)]
    return dataclasses.replace(options.parse([*given, *words]), cuda_graph=graph)


def trained(out: Path, *words: str, graph: bool = True) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    train.run(chosen(out, *words, graph=graph))
    return checkpoint.load(out / "checkpoint.pt")


def differ(one: Any, other: Any) -> list[str]:
    """Where two trees of tensors and numbers are not the same, bit for bit."""
    if isinstance(one, Tensor):
        return [] if torch.equal(one, other) else [""]
    if isinstance(one, dict):
        return [f"{key}.{where}" for key in one.keys() | other.keys() for where in differ(one.get(key), other.get(key))]
    if isinstance(one, list):
        return [f"{i}.{where}" for i in range(len(one)) for where in differ(one[i], other[i])]
    return [] if one == other else [f"{one} {other}"]


RUNS = {
    "adam": "--optimizer adam",
    "adam plain": "--optimizer adam --model plain",
    "adam clipped": "--optimizer adam --clip 0.5",
    "adam attention": "--optimizer adam --model attention",
    "adamw": "--optimizer adamw --weight-decay 0.1",
    "adamw clipped bf16": "--optimizer adamw --clip 0.5 --amp bf16",
    "sgd": "--optimizer sgd",
    "sgd clipped": "--optimizer sgd --clip 0.5 --schedule constant",
    "sgd without momentum": "--optimizer sgd --momentum 0 --weight-decay 0",
    "fast": "--recipe fast",
    "fast plain": "--recipe fast --model plain",
    "fast bf16": "--recipe fast --amp bf16 --clip 1",
    "fast rows": "--recipe fast --data synthetic --batch-size 512",
    "workers": "--loader workers --workers 1 --recipe fast",
}


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("run", RUNS)
def test_replayed_steps_train_as_eager_ones(
    gpu: Gpu, tmp_path: Path, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout draws anew, the learning rate moves, the partial batch runs eagerly: bit for bit."""
    words = RUNS[run].split()
    replayed = trained(tmp_path / "graph", *words)
    (graph,) = gpu.graphs
    full = EPOCHS * (1 if "synthetic" in words else FULL)
    assert (gpu.beside, gpu.watched, graph.replays) == (WARM_UP, 1, full - WARM_UP)
    assert graph.mode == "thread_local"  # else what a DataLoader's thread does would end the capture
    assert gpu.sound()
    ran = {call[0].__name__ for call in graph.calls}
    assert any(name.startswith("_foreach" if "adam" in run else "_fused_sgd_.tensor_lr") for name in ran), ran
    monkeypatch.setattr(trainer, "GraphedStep", lambda step, *_: step)
    eager = trained(tmp_path / "eager", *words)
    assert len(gpu.graphs) == 1
    for part in ("model_state_dict", "optimizer_state_dict", "processes"):
        assert not differ(replayed[part], eager[part])
    assert (tmp_path / "graph" / "history.csv").read_text() == (tmp_path / "eager" / "history.csv").read_text()


@pytest.mark.usefixtures("no_report", "gpu")
@pytest.mark.parametrize("optimizer", recipes.OPTIMIZERS)
def test_checkpoints_do_not_say_that_there_was_a_graph(tmp_path: Path, optimizer: str) -> None:
    with_graph = trained(tmp_path / "graph", "--optimizer", optimizer)["optimizer_state_dict"]
    without = trained(tmp_path / "eager", "--optimizer", optimizer, graph=False)["optimizer_state_dict"]
    assert not differ(with_graph["param_groups"], without["param_groups"])
    assert isinstance(with_graph["param_groups"][0]["lr"], float)
    assert with_graph["state"].keys() == without["state"].keys()


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is told to stop when so many steps are done."""
    asked: list[StopRequest] = []

    def requested(self: StopRequest) -> int:
        asked.append(self)
        return signal.SIGTERM if len(asked) == steps else 0

    monkeypatch.setattr(StopRequest, "requested", requested)


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("steps", [5, 6], ids=["full batch next", "partial batch next"])
@pytest.mark.parametrize("run", ["adam", "adamw", "sgd", "fast"])
def test_goes_on_in_the_middle_of_an_epoch(
    gpu: Gpu, tmp_path: Path, run: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request is looked for after each batch and once more between epochs: step 5 is the second epoch's first."""
    words = RUNS[run].split()
    whole = trained(tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        stop_after(steps, patch)
        with pytest.raises(Stopped, match=f"in epoch 2, after batch {steps - 4} of 3"):
            trained(tmp_path / "parts", *words)
    resumed = trained(tmp_path / "parts", "--resume", *words)
    done = FULL + steps - 4
    assert [graph.replays for graph in gpu.graphs] == [
        EPOCHS * FULL - WARM_UP, *([done - WARM_UP] if done > WARM_UP else []), EPOCHS * FULL - done - WARM_UP
    ]  # fmt: skip
    for part in ("model_state_dict", "optimizer_state_dict"):
        assert not differ(resumed[part], whole[part])


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("first", [True, False], ids=["graph first", "graph last"])
@pytest.mark.parametrize("optimizer", recipes.OPTIMIZERS)
def test_goes_on_without_a_graph_and_with_one(
    gpu: Gpu, tmp_path: Path, optimizer: str, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--optimizer", optimizer]
    whole = trained(tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        stop_after(6, patch)
        with pytest.raises(Stopped, match="in epoch 2, after batch 2"):
            trained(tmp_path / "parts", *words, graph=first)
    resumed = trained(tmp_path / "parts", "--resume", *words, graph=not first)
    assert [graph.replays for graph in gpu.graphs] == [EPOCHS * FULL - WARM_UP, 1]
    # the two forms of an optimizer round differently, and Adam enlarges that
    for part in (lambda state: state["model_state_dict"], lambda state: state["optimizer_state_dict"]["state"]):
        one, other = (torch.cat([t.flatten().double() for t in tree_leaves(part(state))]) for state in (whole, resumed))
        assert (one - other).norm() < 0.03 * one.norm()


class Net(nn.Module):
    """Linear, dropout, linear, dropout; ``fault`` is called between them, forward or backward."""

    def __init__(self, fault: Callable[[Tensor], object] = lambda x: None, place: str = "forward") -> None:
        super().__init__()
        self.first, self.second, self.fault, self.place = nn.Linear(3, 8), nn.Linear(8, 2), fault, place
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = nn.functional.dropout(self.first(x), 0.5, self.training)
        if self.place == "forward":
            self.fault(hidden.detach())
        if self.place == "backward":
            hidden.register_hook(lambda gradient: (self.fault(gradient), None)[1])
        return self.second(nn.functional.dropout(hidden, 0.5, self.training))


BATCH_LIST = [(torch.randn(4, 3, generator=torch.Generator().manual_seed(i)), torch.arange(4) % 2) for i in range(7)]


def weights(
    fault: Callable[[Tensor], object], graphed: bool, optimizer: str = "adam", told: Any = None,
    place: str = "forward", **how: Any,
) -> tuple[dict[str, Any], int]:  # fmt: skip
    """(Network, optimizer and the next random number after seven batches; how often the network was called)."""
    torch.manual_seed(0)
    model = Net(fault, place)
    chosen = recipes.build_optimizer(optimizer, model, torch.tensor(0.1), 0.9, 0.01, True)
    if place == "update":
        chosen.register_step_pre_hook(lambda *_: (fault(model.first.weight), None)[1])
    eager = TrainingStep(model, nn.CrossEntropyLoss(), chosen, **how)
    step: Any = GraphedStep(eager, [].append if told is None else told.append, eager.abandon) if graphed else eager
    for batch in BATCH_LIST:
        step(*batch)
    return {"model": model.state_dict(), "optimizer": chosen.state_dict(), "next": torch.rand(1)}, model.calls


class OnlyWhileCapturing:
    """Does something while the stream is captured."""

    def __init__(self, do: Callable[[Tensor], object]) -> None:
        self.do = do

    def __call__(self, x: Tensor) -> None:
        if torch.cuda.is_current_stream_capturing():
            self.do(x)


def refuse(x: Tensor) -> None:
    raise NotImplementedError("not within a graph")


FORBIDDEN = {
    "driver": (OnlyWhileCapturing(lambda x: torch.cuda.synchronize()), "operation not permitted when stream is captur"),
    "item": (OnlyWhileCapturing(lambda x: x.sum().item()), "operation not permitted when stream is capturing"),
    "python": (OnlyWhileCapturing(refuse), "not within a graph"),
}


@pytest.mark.parametrize("place", ["forward", "backward", "update"])
@pytest.mark.parametrize("optimizer", recipes.OPTIMIZERS)
def test_a_step_that_waits_is_not_captured(gpu: Gpu, optimizer: str, place: str) -> None:
    """The step in which that is seen is a whole one: all is as without a graph."""
    told: list[str] = []
    fault = lambda x: 1.0 if x.sum().item() > 0 else 0.5  # noqa: E731
    found, calls = weights(fault, True, optimizer, told, place)
    assert (len(gpu.graphs), gpu.beside, gpu.watched, calls) == (0, WARM_UP, 1, len(BATCH_LIST))
    assert gpu.sound()
    assert not differ(found, weights(fault, False, optimizer, None, place)[0])
    (line,) = told
    assert line.startswith("note: the step could not be captured as a CUDA graph, training goes on without: it waits ")
    assert "test_cuda_graph.py:" in line


# a loss that is scaled makes the others wait
@pytest.mark.parametrize("how", [*((name, clip) for name in recipes.OPTIMIZERS for clip in (0.0, 0.1)), ("sgd", None)])
@pytest.mark.parametrize("place", ["forward", "backward", "update"])
@pytest.mark.parametrize("fault", FORBIDDEN)
def test_a_failed_capture_changes_nothing(gpu: Gpu, fault: str, place: str, how: tuple[str, float | None]) -> None:
    do, says = FORBIDDEN[fault]
    told: list[str] = []

    def run(graphed: bool) -> tuple[dict[str, Any], int]:
        optimizer, clip = how
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if clip is None else None
        return weights(do, graphed, optimizer, told, place, clip=clip or 0.0, scaler=scaler)

    found, calls = run(True)
    (graph,) = gpu.graphs
    assert (gpu.beside, graph.replays, graph.resets, calls) == (WARM_UP, 0, 1, len(BATCH_LIST) + 1)
    assert gpu.sound()
    # where torch ended the capture its pool is torch's to release
    assert gpu.released == ([] if fault == "python" else [graph.pool])
    assert not differ(found, run(False)[0])
    (line,) = told
    assert line.startswith("note: the step could not be captured as a CUDA graph, training goes on without: ")
    assert says in line


def test_without_a_fault_it_is_replayed(gpu: Gpu) -> None:
    """What the tests of failures compare with: here there is a graph."""
    found, calls = weights(lambda x: None, True)
    (graph,) = gpu.graphs
    assert (graph.replays, graph.resets, calls) == (len(BATCH_LIST) - WARM_UP, 0, WARM_UP + 1)
    assert not differ(found, weights(lambda x: None, False)[0])


def keep_tensors(kept: list[Tensor]) -> OnlyWhileCapturing:
    return OnlyWhileCapturing(lambda x: (kept.append(x * 2), torch.cuda.synchronize()))


def test_a_tensor_kept_of_a_failed_capture_ends_the_run(gpu: Gpu) -> None:
    """It was never computed, and whoever keeps it would use it."""
    kept: list[Tensor] = []
    with pytest.raises(CaptureError, match=r"not permitted when stream is capturing\), and then .* did not compute\)"):
        weights(keep_tensors(kept), True)
    assert kept[0].isnan().all()
    assert gpu.stream is gpu.default_stream


def test_a_device_that_is_lost_ends_the_run(gpu: Gpu) -> None:
    def lose(x: Tensor) -> None:
        gpu.lost = "CUDA error: an illegal memory access was encountered\nlook here"
        torch.cuda.synchronize()

    with pytest.raises(CaptureError, match=r"\(CUDA error: an illegal memory access was encountered look here\)$"):
        weights(OnlyWhileCapturing(lose), True)


def test_a_generator_that_stays_in_its_capture_ends_the_run(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(gpu.generator), "graphsafe_set_state", lambda self, other: None)
    with pytest.raises(CaptureError, match="Offset increment outside graph capture"):
        weights(FORBIDDEN["driver"][0], True)


@pytest.mark.usefixtures("no_report")
def test_the_command_ends_with_one_line(
    gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def backward(self: Tensor, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_current_stream_capturing():
            gpu.lost = "CUDA error: unspecified launch failure"
            torch.cuda.synchronize()
        original(self, *args, **kwargs)

    original = Tensor.backward
    monkeypatch.setattr(Tensor, "backward", backward)
    wanted = chosen(tmp_path, "--recipe", "fast")
    monkeypatch.setattr(options, "parse", lambda argv: wanted)
    assert train.main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{options.PROGRAM}: error: the step could not be captured as a CUDA graph (CUDA error: ")
    assert line.endswith("not as before (CUDA error: unspecified launch failure); --no-cuda-graph does without")
    # the fourth full batch is the second epoch's second
    # (checkpoint.load looks at the weights, which a lost device does not show)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == 1


def test_an_interrupted_capture_gives_the_stream_back(gpu: Gpu) -> None:
    def interrupt(x: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weights(OnlyWhileCapturing(interrupt), True)
    assert gpu.sound()


def test_other_warnings_of_the_watched_step_are_told_and_its_errors_raised(gpu: Gpu) -> None:
    calls: list[int] = []

    def step(images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(gpu.sync_mode)
        warnings.warn(f"of step {len(calls)}", stacklevel=2)
        if len(calls) == 4:
            raise ValueError("of the step")
        return images, target

    gpu.sync_mode = MODES["error"]
    graphed = GraphedStep(step)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for batch in BATCH_LIST[:3]:
            graphed(*batch)
    assert [str(w.message) for w in seen] == ["of step 1", "of step 2", "of step 3"]
    assert calls == [MODES["error"], MODES["error"], MODES["warn"]]
    assert gpu.sync_mode == MODES["error"]
    again = GraphedStep(step)
    calls[:] = [0]
    again(*BATCH_LIST[0])
    again(*BATCH_LIST[1])
    with pytest.raises(ValueError, match="of the step"):
        again(*BATCH_LIST[2])
    assert calls[1:] == [MODES["error"], MODES["error"], MODES["warn"]]
    assert gpu.sync_mode == MODES["error"]


def test_the_largest_batches_are_captured(gpu: Gpu) -> None:
    """A run that is resumed may begin with the last, small batch of an epoch."""
    seen: list[tuple[int, str]] = []

    def step(images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((len(images), "graph" if gpu.capture else gpu.stream.name))
        return images + 1, target + 1

    graphed = GraphedStep(step)
    for size in (2, 4, 2, 4, 4, 4, 2, 8, 4):
        assert graphed(torch.zeros(size, 3), torch.zeros(size))[0].shape == (size, 3)
    assert seen == [
        (2, "side"), (4, "side"), (2, "default"), (4, "side"), (4, "side"), (4, "graph"), (2, "default"), (8, "default")
    ]  # fmt: skip
    assert [graph.replays for graph in gpu.graphs] == [2]


class TestTheStandIn:
    """It fails as torch 2.11 does; without that the tests above would show nothing."""

    def test_a_capture_that_cannot_be_ended_leaves_all_as_it_is(self, gpu: Gpu) -> None:
        graph, side, x = torch.cuda.CUDAGraph(), Stream(), torch.ones(3)
        made: list[Tensor] = []

        def captured() -> None:
            with torch.cuda.graph(graph, pool=(0, 7), stream=side):  # type: ignore[arg-type]
                made.append(x + torch.rand(3))
                x.mul_(2)
                with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
                    x.sum().item()
                with pytest.raises(RuntimeError, match="previous error during capture"):
                    x.mul_(2)

        before = torch.get_rng_state()
        with pytest.raises(RuntimeError, match="previous error during capture"):
            captured()
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(x, torch.ones(3))
        assert made[0].isnan().all()
        assert gpu.stream is side
        assert gpu.serving == [(0, 7)]
        graph.reset()
        with pytest.raises(RuntimeError, match="Offset increment outside graph capture"):
            torch.rand(1)
        assert gpu.graphs[0].alive() == 1
        made.clear()
        assert gpu.graphs[0].alive() == 0

    def test_an_error_of_python_lets_the_capture_end(self, gpu: Gpu) -> None:
        def captured() -> None:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                torch.rand(2)
                raise ValueError("of the step")

        with pytest.raises(ValueError, match="of the step"):
            captured()
        assert gpu.sound()
        torch.rand(1)

    def test_sync_debug_mode(self, gpu: Gpu) -> None:
        assert torch.ones(1).item() == 1
        torch.cuda.set_sync_debug_mode("warn")
        with pytest.warns(UserWarning, match="called a synchronizing CUDA operation"):
            assert torch.ones(1).item() == 1
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
            torch.ones(1).item()
        assert torch.cuda.get_sync_debug_mode() == 2

    @pytest.mark.parametrize("optimizer", recipes.OPTIMIZERS)
    def test_no_optimizer_waits(self, gpu: Gpu, optimizer: str) -> None:
        """Nor does a foreach SGD go unseen, which asks for its learning rate."""
        model = Net()
        made = recipes.build_optimizer(optimizer, model, torch.tensor(0.1), 0.9, 0.01, True)
        step = TrainingStep(model, nn.CrossEntropyLoss(), made, clip=0.1)
        foreach = TrainingStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), torch.tensor(0.1)))
        step(*BATCH_LIST[0])
        torch.cuda.set_sync_debug_mode("error")
        step(*BATCH_LIST[1])
        with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
            foreach(*BATCH_LIST[1])


def test_a_graph_on_the_cpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        options.parse(["--device", "cpu", "--cuda-graph"])
    assert stopped.value.code == 2
    assert "argument --cuda-graph: needs a GPU, the device is cpu" in capsys.readouterr().err
    assert not options.parse(["--device", "cpu"]).cuda_graph
