"""Timing on a GPU, with stand-ins for CUDA and for triton's clock: what is called on which stream, in which order."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from triton import testing

from perf import plan, providers
from perf.bench import machine, measure, worker
from perf.bench.measure import Effort, Timing
from perf.bench.rows import Speedups
from perf.shapes import NAMED

pytestmark = pytest.mark.gate("torch")


class Cuda:
    """Streams, graphs and memory of a GPU: notes what happens where."""

    def __init__(self) -> None:
        self.stream, self.capturing, self.events = "main", False, []
        self.reset = False

    def note(self, what: str) -> None:
        self.events.append((what, self.stream, self.capturing))

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, stream.name
        yield
        self.stream = before

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: Any) -> Iterator[None]:
        self.capturing = True
        with self.on(stream):
            yield
        self.capturing = False


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()
    signature = inspect.signature(testing.do_bench)

    def do_bench(*args: Any, **kwargs: Any) -> list[float]:
        given = signature.bind(*args, **kwargs).arguments
        assert given["quantiles"] == [0.2, 0.25, 0.5, 0.75, 0.8]
        assert given["rep"] >= 30 * 0.1
        given["fn"]()
        return [1.0, 1.5, 2.0, 2.5, 3.0]

    def stream() -> Any:
        return SimpleNamespace(name="side", wait_stream=lambda other: None)

    main = SimpleNamespace(name="main", wait_stream=lambda other: None)
    stand_ins: dict[str, Any] = {
        "Stream": stream,
        "stream": made.on,
        "graph": made.graph,
        "current_stream": lambda: main,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: made.note("replay")),
        "synchronize": lambda: None,
        "memory_allocated": lambda: 1_000_000,
        "reset_peak_memory_stats": lambda: setattr(made, "reset", True),
        "max_memory_allocated": lambda: 6_000_000 if made.reset else 99_000_000,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(testing, "do_bench", do_bench)
    return made


def test_a_call_as_it_is(cuda: Cuda) -> None:
    timing = measure.on_gpu(lambda: lambda: cuda.note("call"), "wall", Effort(0.1, 3))
    assert timing.ms == (1.0, 1.5, 2.0, 2.5, 3.0)
    assert timing.peak_memory_mb == 5.0
    assert timing.host_us is not None
    assert set(cuda.events) == {("call", "main", False)}


def test_a_graph_is_captured_on_the_stream_of_the_forward_call(cuda: Cuda) -> None:
    def prepare() -> Any:
        cuda.note("forward")
        return lambda: cuda.note("call")

    timing = measure.on_gpu(prepare, "cudagraph", Effort(0.1, 3))
    assert (timing.ms.p50, timing.peak_memory_mb, timing.host_us) == (2.0, None, None)
    assert cuda.events[0] == ("forward", "side", False)
    captured = cuda.events.index(("call", "side", True))
    assert set(cuda.events[1:captured]) == {("call", "side", False)}
    assert set(cuda.events[captured + 1 :]) == {("replay", "main", False)}


def test_each_provider_has_its_rows_before_the_next_is_compiled(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(name: str) -> providers.Provider:
        loaded.append(name)
        return real(name)

    def on_gpu(prepare: Any, timing: str, effort: Effort) -> Timing:
        prepare()
        if timing == "cudagraph" and loaded[-1] == "tkernels":
            raise RuntimeError("operation not permitted")
        return Timing(measure.percentiles([4.0 if loaded[-1] == "torch" else 2.0]), 1.0, 2.0)

    real = providers.load
    monkeypatch.setattr(providers, "load", load)
    monkeypatch.setattr(measure, "on_gpu", on_gpu)
    monkeypatch.setattr(machine, "facts", lambda device: {})
    monkeypatch.setattr(machine, "peaks", lambda *given: (1.0, 1.0))
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 0)
    given = plan.Wanted(
        ["linear"], ["fwd", "full"], ["fp32"], ["nhwc"], [NAMED["tiny"]], ["tkernels", "torch"], plan.TIMINGS
    )
    todo = list(enumerate(plan.tasks(given)))
    bench = worker._Bench(todo, "cpu", Effort(0.1, 3), lambda number: None)
    bench._device = "cuda"
    speedups = Speedups()
    rows = [speedups.filled(row) for _, row in bench.rows()]
    assert [row.provider for row in rows] == ["torch"] * 4 + ["tkernels"] * 4
    assert {row.speedup_vs_torch for row in rows[:4]} == {1.0}
    wall, graph = ([row for row in rows[4:] if row.timing == timing] for timing in plan.TIMINGS)
    assert [(row.speedup_vs_torch, row.peak_memory_mb, row.status) for row in wall] == [(2.0, 1.0, "ok")] * 2
    assert {row.status for row in graph} == {"error: RuntimeError: operation not permitted"}


@pytest.mark.parametrize("device, index", (("cuda", 0), ("cuda:1", 1)))
def test_a_worker_takes_the_gpu_it_is_given(monkeypatch: pytest.MonkeyPatch, device: str, index: int) -> None:
    taken, sent = [], []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", taken.append, raising=False)
    worker.main(cast(Connection, SimpleNamespace(send=sent.append)), [], device, Effort(0.1, 3))
    assert taken == [index]
    assert sent == [None]
