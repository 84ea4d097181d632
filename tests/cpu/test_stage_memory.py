"""Memory of conv_stage's fast way on a CPU: never in two hands, used again, and little of it kept; few calls."""

from __future__ import annotations

import os
import resource
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cpu.cases import take
from tests.cpu.stages import always as always  # fixtures
from tests.cpu.stages import leaves, stage
from tkernels.cpu import buffers, compiler
from tkernels.cpu import stage as fast
from tkernels.functional import ConvBNLayer, conv_stage

pytestmark = [
    pytest.mark.gate("torch"),
    pytest.mark.skipif(not compiler.enabled(), reason="passes are not compiled here: no C++ compiler, or turned off"),
]


def storages(*graphs: Tensor) -> set[int]:
    """Addresses of what graphs keep for backward."""
    found = set()
    for y in graphs:
        for t in y.grad_fn.saved_tensors:  # type: ignore[union-attr]
            if t is not None:
                found.add(t.untyped_storage().data_ptr())
    return found


def test_two_graphs_alive_share_nothing() -> None:
    x, layers, arguments = stage()
    shared = {t.untyped_storage().data_ptr() for t in leaves(x, layers)}
    torch.manual_seed(0)
    first = conv_stage(x, layers, **arguments)
    torch.manual_seed(0)
    expected = [g.clone() for g in torch.autograd.grad(first.sum(), leaves(x, layers), retain_graph=True)]
    second = conv_stage(2 * x, layers, **arguments)
    assert not (storages(first) & storages(second)) - shared
    torch.autograd.grad(second.sum(), leaves(x, layers))
    again = torch.autograd.grad(first.sum(), leaves(x, layers))
    assert all(torch.equal(a, b) for a, b in zip(expected, again))


def test_results_are_the_callers_own() -> None:
    """An output and an input's gradient that are kept are not written to by later calls."""
    x, layers, arguments = stage()
    y = conv_stage(x, layers, **arguments)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    kept = y.detach().clone(), dx.clone()
    for _ in range(3):
        conv_stage(x, layers, **arguments).sum().backward()
    assert torch.equal(y, kept[0])
    assert torch.equal(dx, kept[1])


def test_an_exception_on_the_way_back_loses_nothing() -> None:
    x, layers, arguments = stage()

    def interrupt(_: Tensor) -> None:
        raise KeyError("stop")

    y = conv_stage(x * 1.0, layers, **arguments)
    y.register_hook(interrupt)
    with pytest.raises(KeyError):
        y.sum().backward()
    test_two_graphs_alive_share_nothing()


def test_threads_do_not_share_buffers() -> None:
    """Four threads train at once; each gets what it gets alone."""

    def train(seed: int, results: dict[int, Any]) -> None:
        generator = torch.Generator().manual_seed(seed)
        layers = [
            ConvBNLayer(torch.randn(8, 3, 3, 3, generator=generator), None, torch.ones(8), torch.zeros(8), padding=1)
        ]
        layers[0].weight.requires_grad_()
        x = torch.randn(8, 3, 16, 16, generator=generator)
        found = []
        for _ in range(20):
            y = conv_stage(x, layers, 2, training=True)
            found.append(torch.autograd.grad(y.square().sum(), layers[0].weight)[0])
        results[seed] = found

    alone: dict[int, Any] = {}
    together: dict[int, Any] = {}
    for seed in range(4):
        train(seed, alone)
    threads = [threading.Thread(target=train, args=(seed, together)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert all(torch.equal(a, b) for a, b in zip(alone[seed], together[seed]))


def test_a_result_is_nobody_elses_while_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "SMALLEST", 1024)
    wrong: list[int] = []

    def fill(number: int) -> None:
        for _ in range(2000):
            t = buffers.dense(torch.float32, 1024).fill_(number)
            if not bool((t == number).all()):
                wrong.append(number)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=fill, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_buffers_of_its_own() -> None:
    x, layers, arguments = stage()
    torch.manual_seed(0)
    y = conv_stage(x, layers, **arguments)
    kept = [t.detach().clone() for t in y.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            # torch refuses backward in a child of a process that has run it in threads
            for _ in range(3):
                conv_stage(2 * x, layers, **arguments)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    saved = [t for t in y.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(saved, kept))


def test_buffers_that_nobody_wants_are_given_back() -> None:
    pool = buffers.Pool()
    held = take(pool, 4096)
    del held
    kept = take(pool, 8192)
    for _ in range(2 * buffers.SHORTEST):
        take(pool, 1024)
    assert pool.held() == 8192 + 1024
    assert kept.numel() == 8192


# --- what makes it fast ---


def test_a_steady_state_takes_no_fresh_memory() -> None:
    x, layers, arguments = stage(16, 16, 16)

    def step() -> None:
        conv_stage(x, layers, **arguments).sum().backward()

    for _ in range(12):  # sizes that fault are found out
        step()
    held = buffers.POOL.held()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        step()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert buffers.POOL.held() <= held
    # the smallest of the maps is 1 MB, 256 pages
    assert faults < 3 * 200


def test_new_memory_and_memory_used_again_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, layers, arguments = stage(16, 16, 16)

    def results(faulted: bool) -> list[Tensor]:
        monkeypatch.setattr(buffers.FRESH, "faulted", lambda nbytes: faulted)
        torch.manual_seed(0)
        y = conv_stage(x, layers, **arguments)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves(x, layers))]

    for a, b in zip(results(True), results(False)):
        assert torch.equal(a, b)


def test_memory_that_faults_is_tried_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [0]
    monkeypatch.setattr(buffers, "_faults", lambda: faults[0])
    fresh, mapped = buffers.Fresh(), [True]

    def call() -> bool:
        """Whether memory was made anew."""
        if fresh.faulted(1 << 20):
            return False

        def make() -> Tensor:
            faults[0] += 256 if mapped[0] else 0
            return torch.empty(0)

        fresh.watch(1 << 20, make)
        return True

    made = [call() for _ in range(64)]
    assert [i for i, new in enumerate(made) if new] == [0, 5, 14, 31]
    assert not fresh.faulted(1 << 21)  # another size
    mapped[0] = False
    later = [call() for _ in range(64)]
    assert all(later[later.index(True) :])


def test_memory_that_does_not_fault_is_never_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_faults", lambda: 0)
    fresh = buffers.Fresh()
    for _ in range(8):
        assert not fresh.faulted(1 << 20)
        fresh.watch(1 << 20, lambda: torch.empty(0))


def saved_bytes(call: Callable[[], Tensor], owned: list[Tensor]) -> tuple[int, list[torch.dtype]]:
    """Bytes of distinct storages kept for backward, beside the leaves', and the dtypes of what is kept."""
    found: dict[int, int] = {}
    dtypes: list[torch.dtype] = []
    own = {t.untyped_storage().data_ptr() for t in owned}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            dtypes.append(t.dtype)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    del y
    return sum(found.values()), dtypes


@pytest.mark.parametrize("dtype", (torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.extended("torch"))))
def test_bytes_kept_and_calls_made(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 0.75 of what torch keeps, no integers among it, and fewer ATen calls over maps."""
    x, layers, arguments = stage(32, 16, 16)

    def call() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return conv_stage(x, layers, **arguments)

    ours, dtypes = saved_bytes(call, leaves(x, layers))
    call().sum().backward()  # compiles what it needs
    called = _calls(lambda: call().sum().backward())
    assert [name for name in called if name.startswith("tkernels: ")] == [f"tkernels: {name}" for name in COMPILED]
    assert not [name for name in called if "AOTDispatcher" in name]  # autograd's wrappers round a pass
    # no arithmetic besides: statistics move, a counter counts, a draw is scaled, gradients are added up
    assert {name for name in called if name in ARITHMETIC} == {"aten::lerp_", "aten::add_", "aten::div", "aten::sum"}
    assert called.count("aten::sum") == 1  # the test's own
    monkeypatch.setattr(fast, "WORTH_IT", 1 << 60)
    theirs, _ = saved_bytes(call, leaves(x, layers))
    assert ours <= 0.75 * theirs
    assert all(kept.is_floating_point for kept in dtypes)
    assert set(_calls(lambda: call().sum().backward())) >= PASSES
    assert not PASSES & set(called)
    # two layers: forward, the weights' gradients, and the input gradients as convolutions
    assert called.count("aten::convolution_backward") == 2
    assert sum(name.startswith("mkldnn::_convolution_pointwise") for name in called) == 4


# torch's passes over maps between convolutions; the pooling's make int64 indices and fill maps with zeros
PASSES = {
    "aten::native_batch_norm", "aten::native_batch_norm_backward", "aten::threshold_backward", "aten::feature_dropout",
    "aten::max_pool2d_with_indices", "aten::max_pool2d_with_indices_backward",
}  # fmt: skip


# ours, of two layers
COMPILED = (
    *("statistics", "normalize", "statistics", "end 2x2"),
    *("winners 2x2", "end sums 2x2", "end gradient 2x2", "sums", "gradient_in_place"),
)


ARITHMETIC = {f"aten::{name}{end}" for end in ("", "_") for name in (
    "add", "sub", "mul", "div", "pow", "rsqrt", "sqrt", "reciprocal", "lerp", "addcmul", "addcdiv", "sum", "mean",
    "relu", "clamp_min", "where", "maximum",
)}  # fmt: skip


def _calls(call: Callable[[], object]) -> list[str]:
    """Names of all calls, nested ones too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return [event.name for event in profile.events()]
