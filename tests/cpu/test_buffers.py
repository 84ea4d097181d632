"""The pool of memory: never in two hands, whoever looks or interrupts; bounded by what a step needs."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cpu.cases import SIZE, take
from tkernels.cpu import buffers

pytestmark = pytest.mark.gate("torch")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the storages that pools made."""
    sizes: list[int] = []

    class Counted(buffers.Buffer):
        def __init__(self, nbytes: int) -> None:
            sizes.append(nbytes)
            super().__init__(nbytes)

    monkeypatch.setattr(buffers, "Buffer", Counted)
    return sizes


# --- never in two hands ---


def test_counts_of_an_import_under_a_tracer() -> None:
    """A debugger that reads the frames' variables holds what they hold; what it saw must not count for ever."""
    program = """
import importlib, sys, torch
from tkernels.cpu import buffers
def tracer(frame, event, argument):
    frame.f_locals
    return tracer
sys.settrace(tracer)
importlib.reload(buffers)
sys.settrace(None)
pool = buffers.Pool()
take = lambda: pool.take(torch.uint8, (4096,), (1,), 4096)
assert len({take().data_ptr() for _ in range(8)}) == 1
storage = take().untyped_storage()
assert all(take().data_ptr() != storage.data_ptr() for _ in range(8))
sys.settrace(tracer)
assert all(take().data_ptr() != storage.data_ptr() for _ in range(8))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_scale_that_somebody_holds() -> None:
    """As a tool that lists every object does: a buffer's own holders still count."""
    pool = buffers.Pool()
    first = take(pool).untyped_storage()
    held = buffers._SCALE.buffer.storage
    assert take(pool).data_ptr() != first.data_ptr()
    del held


def _interrupted(interrupt: Callable[[], object], call: Callable[[], Tensor]) -> Iterator[Tensor]:
    """Results of ``call``, each with ``interrupt`` run before another of the lines that it executes in the pool."""
    for line in range(64):
        seen = [0]

        def tracer(frame: FrameType, event: str, argument: object, wanted: int = line, seen: list[int] = seen) -> Any:
            if frame.f_code.co_filename != buffers.__file__:
                return None
            if event == "line":
                seen[0] += 1
                if seen[0] == wanted + 1:
                    sys.settrace(None)
                    interrupt()
                    sys.settrace(tracer)
            return tracer

        sys.settrace(tracer)
        try:
            result = call()
        finally:
            sys.settrace(None)
        yield result
        if seen[0] <= line:
            return
    raise AssertionError("the pool executes more lines than were interrupted")


@pytest.mark.parametrize("keeps", ("tensor", "storage", "nothing"))
def test_whoever_interrupts_gets_other_memory(keeps: str) -> None:
    """A signal handler or a finalizer that takes memory while the same thread is in the middle of it."""
    pool, kept, shared = buffers.Pool(), list[Any](), list[int]()

    def interrupt() -> None:
        memory = take(pool)
        if keeps != "nothing":
            kept.append(memory if keeps == "tensor" else memory.untyped_storage())

    def run() -> None:
        for result in _interrupted(interrupt, lambda: take(pool)):
            shared.extend(result.data_ptr() for other in kept if other.data_ptr() == result.data_ptr())
            kept.clear()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "waits for itself"
    assert not shared


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_process_forked_while_threads_take_memory() -> None:
    pool, stop = buffers.Pool(), threading.Event()

    def hammer() -> None:
        while not stop.is_set():
            take(pool)

    threads = [threading.Thread(target=hammer) for _ in range(3)]
    for thread in threads:
        thread.start()
    statuses = []
    try:
        for _ in range(30):
            child = os.fork()
            if child == 0:
                signal.alarm(10)
                take(pool)
                os._exit(0)
            statuses.append(os.waitpid(child, 0)[1])
    finally:
        stop.set()
    for thread in threads:
        thread.join()
    assert not any(statuses)


def test_memory_is_the_processor_s_whatever_the_default_device() -> None:
    pool = buffers.Pool()
    with torch.device("meta"):
        inside = [take(pool), *(f(torch.float32, *size) for size in ((2, 3, 4, 5), (2, 3, 64, 1024)) for f in
                                (buffers.dense, buffers.channels_last))]  # fmt: skip
    assert {t.device.type for t in (*inside, take(pool))} == {"cpu"}


# --- no more than a step needs ---


def test_sizes_that_never_come_back() -> None:
    """Batches of another size at each step: little more than the largest step is held."""
    pool, draw = buffers.Pool(), random.Random(0)
    held = []
    for _ in range(100):
        batch = draw.randint(1000, 3000)
        step = [take(pool, batch * (layer + 1)) for layer in range(12)]
        step += [take(pool, batch * (layer + 1)) for layer in range(12)]
        held.append(pool.held())
    largest = 2 * 3000 * sum(range(1, 13))
    assert max(held) <= 3 * largest


def test_dropped_memory_is_given_back() -> None:
    """150 results that were kept and then deleted."""
    pool = buffers.Pool()
    kept = [take(pool) for _ in range(150)]
    for _ in range(100):
        take(pool)
    assert pool.held() == 151 * SIZE  # (so many are found again when they are free)
    del kept
    for _ in range(2 * buffers.SHORTEST):
        take(pool)
    assert pool.held() == SIZE


def test_memory_held_for_long_is_its_holder_s() -> None:
    pool = buffers.Pool()
    kept = take(pool, 2 * SIZE)
    for _ in range(2 * buffers.LONGEST):
        take(pool)
    assert pool.held() == SIZE
    assert kept.numel() == 2 * SIZE


def deep(pool: buffers.Pool, layers: int, sizes: int) -> None:
    """A step of training that takes four storages a layer: two are held from its forward pass to its backward one."""
    saved = []
    for layer in range(layers):
        saved += [take(pool, SIZE + 64 * (layer % sizes)) for _ in range(2)]
    for layer in reversed(range(layers)):
        gradients = [take(pool, SIZE + 64 * (layer % sizes)) for _ in range(2)]
        del saved[-2:], gradients


@pytest.mark.parametrize("sizes", (1, 4, 1000))
@pytest.mark.parametrize("layers", (130, 160, 300, 600))
def test_deep_networks_find_their_memory_again(layers: int, sizes: int, made: list[int]) -> None:
    """Up to 2,400 requests a step, and maps that are held for as many."""
    pool = buffers.Pool()
    for _ in range(14):
        deep(pool, layers, sizes)
    made.clear()
    for _ in range(10):
        deep(pool, layers, sizes)
    assert not made


def test_long_steps_make_no_memory_for_batches_of_all_sizes() -> None:
    """What was learnt from a deep network does not hold for 96 sizes of batches in turn, of 20 requests each: 1,920."""
    pool = buffers.Pool()
    for _ in range(14):
        deep(pool, 300, 4)
    assert pool.patience.requests > buffers.WASTEFUL
    held = []
    for i in range(10 * 96):
        step = [take(pool, (33 + i % 96) * (layer + 1)) for layer in range(20)]
        del step
        held.append(pool.held())
    every = sum(range(33, 129)) * sum(range(1, 21))
    assert max(held[-96:]) < 0.6 * every  # (what 2 * WASTEFUL of 1,920 requests take)
    assert pool.patience.requests <= buffers.WASTEFUL


@pytest.mark.parametrize("kinds", (1, 2, 3))
def test_a_long_step_finds_its_memory_again(kinds: int, made: list[int]) -> None:
    """Steps of more requests than free memory is kept for at first; kinds of steps that take turns."""
    pool = buffers.Pool()

    def step(kind: int) -> None:
        saved = [take(pool, SIZE * (kind * 100 + layer + 1)) for layer in range(60)]
        for layer in reversed(range(60)):
            take(pool, SIZE * (kind * 100 + layer + 1) + 64)
            saved.pop()

    for i in range(24):
        step(i % kinds)
    made.clear()
    for i in range(24):
        step(i % kinds)
    assert not made


def test_a_steady_program_holds_the_same_for_ever(made: list[int]) -> None:
    pool = buffers.Pool()
    held = []
    for _ in range(2000):
        step = [take(pool, SIZE * (layer + 1)) for layer in range(10)]
        del step
        held.append(pool.held())
    assert len(made) == 10
    assert set(held) == {held[0]}


def test_patience_ends_with_what_needed_it() -> None:
    patience = buffers.Patience()
    for now in range(4 * buffers.JUDGED):
        patience.forgot(now, 1)
        patience.missed(now, now)
    assert patience.requests == min(buffers.LONGEST, 16 * buffers.SHORTEST)
    for now in range(1000, 1000 + 8 * buffers.LONGEST, buffers.LONGEST):
        patience.forgot(now, buffers.JUDGED)
        patience.look_back(now)
    assert patience.requests == buffers.SHORTEST


def test_what_is_known_of_sizes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [0]

    def make() -> Tensor:
        faults[0] += 1 << 20
        return torch.empty(0)

    monkeypatch.setattr(buffers, "_faults", lambda: faults[0])
    fresh = buffers.Fresh()
    for nbytes in range(1, 2 * buffers.MOST_SIZES):
        fresh.watch(nbytes * 4096, make)
    assert len(fresh._rest) <= buffers.MOST_SIZES + 1
