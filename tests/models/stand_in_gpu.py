"""A stand-in for what CUDA graphs touch of a GPU: streams, graphs, the random generator, the allocator's pools, and
torch's sync debug mode, for tensors of the CPU.

A capture records ATen calls and changes nothing, a replay makes the same calls on the same memory: what a real graph
would freeze is frozen here too. A call that waits for the device, or that no capture permits, invalidates the capture,
and then all is left as torch 2.11 leaves it: the capture's stream is the current one, the generator goes on capturing,
the allocator serves the graph's pool, and what the capture made holds NaN, for it was never computed.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SYNCHRONISING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
MODES = {"default": 0, "warn": 1, "error": 2}
Record = tuple[Any, Any, Any, Any]


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def caller() -> tuple[str, int]:
    """File and line of the code that called torch."""
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename == __file__ or frame.f_globals["__name__"].startswith("torch."):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


class Stream:
    def __init__(self, name: str = "side") -> None:
        self.name = name
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


class Numbers:
    """The state behind a generator, which several can share."""

    def __init__(self) -> None:
        self.capturing = False


class Generator:
    """torch's default one for the CPU, in the clothes of a GPU's."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.numbers, self._clone = Numbers(), torch.get_rng_state()

    def get_state(self) -> Tensor:
        return torch.get_rng_state()

    def set_state(self, state: Tensor) -> None:
        torch.set_rng_state(state)

    def clone_state(self) -> Generator:
        return Generator()

    def graphsafe_set_state(self, other: Generator) -> None:
        self.numbers = other.numbers
        torch.set_rng_state(other._clone)


class Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.calls: list[Record] = []
        self.replays = self.resets = 0
        self.mode = ""
        self.ended = False
        self.pool = (0, 0)
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: dict[int, StorageWeakRef] = {}

    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str) -> None:
        gpu = self._gpu
        assert gpu.capture is None
        self.pool, self.mode, self._rng = pool, capture_error_mode, torch.get_rng_state()
        gpu.capture, gpu.valid, gpu.generator.numbers.capturing = self, True, True
        gpu.serving.append(pool)

    def capture_end(self) -> None:
        gpu = self._gpu
        gpu.capture = None  # whatever comes, the driver's capture is over
        self._restore()
        if not gpu.valid:
            self._never_computed()
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        gpu.serving.remove(self.pool)
        gpu.generator.numbers.capturing = False
        self.ended = True

    @torch.no_grad()
    def replay(self) -> None:
        assert self.ended, "Called CUDAGraph::replay without a preceding successful capture."
        self.replays += 1
        for func, args, kwargs, results in self.calls:
            given = {storage(t) for t in tensors((args, kwargs))}
            for old, new in zip(tensors(results), tensors(func(*args, **kwargs))):
                if storage(old) not in given:
                    old.copy_(new)

    def reset(self) -> None:
        self.resets += 1
        if self.ended:
            self._never_computed()
        self.ended = False

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        for argument, value in zip(func._schema.arguments, args):
            # batch norm's schema does not say that it writes its running statistics
            if (argument.alias_info is not None and argument.alias_info.is_write) or "running" in argument.name:
                for t in tensors(value):
                    if storage(t) not in self._made:
                        self._before.setdefault(storage(t), (t, t.clone()))
        given = {storage(t) for t in tensors((args, kwargs))}
        results = func(*args, **kwargs)
        for t in tensors(results):
            if storage(t) not in given:
                self._made[storage(t)] = StorageWeakRef(t.untyped_storage())
        self.calls.append((func, args, kwargs, results))
        return results

    def alive(self) -> int:
        """How many tensors' memory that the capture made is in use."""
        return sum(not made.expired() for made in self._made.values())

    @torch.no_grad()
    def _restore(self) -> None:
        for t, before in self._before.values():
            t.copy_(before)
        self._before.clear()
        torch.set_rng_state(self._rng)

    def _never_computed(self) -> None:
        for *_, results in self.calls:
            for t in tensors(results):
                if storage(t) in self._made:
                    t.untyped_storage().fill_(0xFF)  # NaN in every format
        self.calls.clear()


class Gpu(TorchDispatchMode):
    """The device; every ATen call while it is entered is a call on it."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = self.default_stream = Stream("default")
        self.capture_stream: Stream | None = None
        self.generator = Generator()
        self.graphs: list[Graph] = []
        self.capture: Graph | None = None
        self.valid = True
        self.serving: list[tuple[int, int]] = []  # pools that the allocator serves
        self.released: list[tuple[int, int]] = []
        self.pools = itertools.count(1)
        self.sync_mode = 0
        self.watched = 0  # times that it was set to warn or fail
        self.beside = 0  # times that work went to a side stream outside a capture
        self.lost = ""  # the error that every synchronisation ends in

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "profiler":  # nothing of the device's
            return func(*args, **kwargs)
        if func in SYNCHRONISING:
            self.wait()
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            self._draw()
        if self.capture is None:
            return func(*args, **kwargs)
        if not self.valid:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        return self.capture.record(func, args, kwargs)

    def wait(self) -> None:
        """Something waits for the stream, as .item() does."""
        if self.sync_mode == MODES["error"]:
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.sync_mode == MODES["warn"]:
            warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, *caller())
        self.synchronize()

    def synchronize(self) -> None:
        """Waits for the device, which sync debug mode does not see."""
        if self.capture is not None:
            self.valid = False
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        if self.lost:
            raise RuntimeError(self.lost)

    def _draw(self) -> None:
        if self.generator.numbers.capturing and self.capture is None:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        if self.capture is not None and not self.generator.numbers.capturing:
            raise RuntimeError("Attempt to increase offset for a CUDA generator not in capture mode.")

    def new_graph(self) -> Graph:
        self.graphs.append(Graph(self))
        return self.graphs[-1]

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """torch.cuda.stream."""
        before, self.stream = self.stream, stream
        self.beside += stream is not self.default_stream
        try:
            yield
        finally:
            self.stream = before

    @contextlib.contextmanager
    def capturing(
        self, graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        """torch.cuda.graph, which in torch 2.11 leaves the stream where the capture cannot be ended."""
        self.synchronize()
        before, self.stream = self.stream, stream or Stream("capture")
        graph.capture_begin(pool or (next(self.pools), 0), capture_error_mode)
        try:
            yield
        finally:
            graph.capture_end()
            self.stream = before

    def set_stream(self, stream: Stream) -> None:
        self.stream = stream

    def set_sync_debug_mode(self, mode: int | str) -> None:
        warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all", stacklevel=2)
        self.sync_mode = MODES[mode] if isinstance(mode, str) else mode
        self.watched += self.sync_mode > 0

    def end_allocation(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self.serving:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.serving.remove(pool)

    def snapshot(self) -> list[dict[str, Any]]:
        """Segments of two blocks; of a graph's pool the first is in use if what was made in it is."""
        segments: list[dict[str, Any]] = [{"segment_pool_id": (0, 0), "blocks": [{"state": "active_allocated"}]}]
        for graph in self.graphs:
            states = ["active_allocated" if graph.alive() else "inactive", "inactive"]
            segments.append({"segment_pool_id": graph.pool, "blocks": [{"state": state} for state in states]})
        return segments

    def sound(self) -> bool:
        """Whether it is as if nothing had been captured."""
        return (
            self.stream is self.default_stream
            and not self.generator.numbers.capturing
            and not self.serving
            and self.capture is None
            and self.sync_mode == 0
        )

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {
            "CUDAGraph": self.new_graph, "graph": self.capturing, "Stream": Stream, "stream": self.on,
            "current_stream": lambda: self.stream, "set_stream": self.set_stream, "synchronize": self.synchronize,
            "current_device": lambda: 0, "default_generators": (self.generator,), "memory_snapshot": self.snapshot,
            "graph_pool_handle": lambda: (0, next(self.pools)), "get_sync_debug_mode": lambda: self.sync_mode,
            "set_sync_debug_mode": self.set_sync_debug_mode,
            "is_current_stream_capturing": lambda: self.capture is not None,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocation, raising=False)
        release = lambda device, pool: self.released.append(pool)  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
        as_on_a_gpu(monkeypatch)


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizers take on the CPU the code they take on a GPU: capturable ones are allowed, many tensors go at once."""
    supported = "_get_foreach_kernels_supported_devices"
    for module in ("torch.utils._foreach_utils", "torch.optim.optimizer"):
        monkeypatch.setattr(sys.modules[module], supported, lambda: ["cpu"])
    adam = sys.modules[torch.optim.Adam.__module__]
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])
