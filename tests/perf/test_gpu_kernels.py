"""perf gpu's blocks on tensors of device cuda, our kernels executed: what is checked and timed is what is launched.

A GPU's streams, graphs and clock have stand-ins: a graph's replay is the call once more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton import testing

from perf import providers, shapes
from perf.bench import machine, measure
from perf.bench.gpu import ab, checks, problems, products, training
from perf.bench.gpu.problems import EXPANDED
from perf.bench.gpu.results import CheckRow
from perf.bench.gpu.session import Request, Run
from perf.bench.gpu.training import Contender, Workload
from perf.static import traffic

pytestmark = pytest.mark.gate("ttsem")

CASES = {
    "linear_relu": shapes.linear(9, 24, 17),
    "conv2d_relu": shapes.conv(2, 8, 5, 8),
    "batch_norm_relu": shapes.image(2, 8, 5),
    "cross_entropy": shapes.rows(9, 10),
    "matmul": shapes.linear(9, 24, 17),
    "attention": shapes.heads(1, 2, 9, 11, 16),
}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What the blocks tell, on a GPU that has no streams of its own."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins: dict[str, Any] = {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda given: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 5_000_000,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    generator, capturing = torch.Generator, [False]

    def made(device: Any) -> torch.Generator:
        assert not capturing[0], "torch refuses to seed a generator, and to draw from one of its own, in a capture"
        return generator()

    monkeypatch.setattr(torch, "Generator", made)
    monkeypatch.setattr(testing, "do_bench", lambda fn, **given: (fn(), [1.0] * len(given["quantiles"]))[1])
    monkeypatch.setattr(measure, "host_us", lambda call: (call(), 5.0)[1])
    monkeypatch.setattr(machine, "facts", lambda device: {})
    # what other tests import from torch.testing forbids to set cudnn.benchmark
    frozen: Any = torch.backends.flags_frozen
    monkeypatch.setitem(frozen.__globals__, "__allow_nonbracketed_mutation_flag", True)
    monkeypatch.setattr(checks, "BUSY_SIZE", 8)
    monkeypatch.setattr(training, "WINDOWS", 1)
    monkeypatch.setattr(training, "WINDOW", 0.0)
    monkeypatch.setattr(training, "WARM_UP", 1)

    def graphed(prepare: Callable[[], Callable[[], object]]) -> Callable[[], object]:
        call = prepare()
        call()
        capturing[0] = True
        call()
        capturing[0] = False
        return call

    monkeypatch.setattr(measure, "graphed", graphed)
    return []


def run(told: list[tuple[str, Any]]) -> Run:
    request = Request("checks", "cuda", False, providers.OURS, 60.0)
    return Run(request, lambda kind, what: told.append((kind, what)))


@pytest.mark.parametrize(
    "variant",
    ["", *(pytest.param(v, marks=pytest.mark.extended("ttsem")) for v in ("misaligned", "strided", EXPANDED))],
)
@pytest.mark.parametrize("operator", list(CASES))
def test_our_kernels_are_what_is_checked(
    operator: str, variant: str, told: list[tuple[str, Any]], launches: list[str]
) -> None:
    if not problems._takes(operator, variant):
        pytest.skip("says nothing of this operator")
    case = problems.case(operator, CASES[operator], variant=variant)
    checks.check(run(told), providers.load(providers.OURS), case)
    rows = [what for kind, what in told if kind == "check"]
    assert {row.status for row in rows} == {"ok"}
    ways = {"again", "side stream", "profiled", "CUDA graph"}
    assert ways < {row.what for row in rows}
    # the first run, three more as called, and the graph's three, of which one is its replay
    calls = 1 + 3 + 3
    assert len(launches) % calls == 0
    assert len(launches) // calls >= 2, "forward and backward launch something each"


def test_a_kernel_that_writes_something_else_each_time_is_seen(
    told: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, turns = measure.evaluate, iter(range(100))

    def noisy(subject: Any) -> Any:
        results = evaluate(subject)
        results["output"] = results["output"] * (1 + next(turns) * 2**-7)
        return results

    monkeypatch.setattr(measure, "evaluate", noisy)
    case = problems.case("matmul", CASES["matmul"])
    checks.check(run(told), providers.load(providers.OURS), case)
    statuses = {what.what: what.status for kind, what in told if kind == "check"}
    assert all(statuses[way].startswith("differs: ") for way in ("again", "side stream", "CUDA graph"))


def test_backward_alone_is_repeated(
    told: list[tuple[str, Any]], launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = problems.case("linear_relu", CASES["linear_relu"])
    here, waits = run(told), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(len(told)))
    checks.repeat(here, "a", 3, providers.load(providers.OURS), lambda: checks._with_dropout(here, case))
    assert told[-1] == ("check", CheckRow(check="a", what="beside a busy stream", status="ok"))
    assert launches.count("linear_forward_kernel") == 1
    assert launches.count("linear_dgrad_kernel") == 1 + 3
    assert waits == [0], "the busy stream still writes to memory that is given back"


def test_each_gradient_is_timed_alone_on_our_kernels(
    told: list[tuple[str, Any]], launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = problems.case("linear", CASES["linear_relu"])
    launched = {}
    for mode in ("fwd", "dgrad", "wgrad"):
        prepared = products._prepared(run(told), case, mode, providers.load(providers.OURS))
        with problems.triton_only(run(told)):
            call = prepared()
            launches.clear()
            call()
        launched[mode] = [name for name in launches if "finish" not in name]
    assert launched == {
        "fwd": ["linear_forward_kernel"], "dgrad": ["linear_dgrad_kernel"], "wgrad": ["linear_wgrad_kernel"],
    }  # fmt: skip
    benchmark, on_gpu = [], measure.on_gpu
    monkeypatch.setattr(
        measure, "on_gpu", lambda *given: (benchmark.append(torch.backends.cudnn.benchmark), on_gpu(*given))[1]
    )
    products.compare(run(told), case, providers.load(providers.OURS))
    assert benchmark == [True, False] * 3, "cuDNN takes its fastest algorithm, and nothing of it is left to others"
    assert not torch.backends.cudnn.benchmark
    rows = [what for kind, what in told if kind == "timing"]
    assert [(row.provider, row.mode) for row in rows] == [
        (provider, mode) for mode in ("fwd", "dgrad", "wgrad") for provider in ("torch", "tkernels")
    ]
    assert {row.status for row in rows} == {"ok"}
    assert {row.timing for row in rows} == {"cudagraph"}


@pytest.mark.parametrize("operator, kernel", (("linear", "linear_tma_kernel"), ("conv2d", "conv_tma_kernel")))
def test_kernels_with_and_without_descriptors(
    operator: str, kernel: str, told: list[tuple[str, Any]], launches: list[str]
) -> None:
    case = problems.case(operator, shapes.conv(2, 16, 5, 24) if operator == "conv2d" else shapes.linear(32, 64, 24))
    ab._compare(run(told), case)
    assert {kernel, kernel.replace("tma", "forward")} <= set(launches)
    found = [what for kind, what in told if kind == "check"]
    assert {row.status for row in found} == {"ok"}
    assert all("by descriptors" in row.check for row in found)
    rows = [what for kind, what in told if kind == "timing"]
    assert [(row.provider, row.mode, row.status) for row in rows] == [
        (provider, "fwd", "ok") for provider in ("torch", "tkernels", "tkernels by descriptors")
    ]


@pytest.mark.parametrize("graph", [pytest.param(False, marks=pytest.mark.extended("ttsem")), True])
def test_the_training_step_is_of_our_kernels(graph: bool, told: list[tuple[str, Any]], launches: list[str]) -> None:
    from models.cifar_cnn import FusedCNNClassifier

    def small() -> Any:
        return FusedCNNClassifier(width=2, image_size=8), traffic.fused()[1]

    contender = Contender("tkernels", small, graph=graph, optimizer="sgd")
    row = training.measured(run(told), contender, Workload("cnn", {"N": 2, "C": 3, "H": 8, "W": 8}, 10))
    assert (row.status, row.timing) == ("ok", "cudagraph" if graph else "wall")
    assert row.peak_memory_mb == 5.0
    assert {"conv_stage_kernel", "linear_dgrad_kernel", "cross_entropy_backward"} <= set(launches)
