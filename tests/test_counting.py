"""How the cuda gate counts launches: once each, by name, whichever way they take, and without closing a way."""

from __future__ import annotations

import collections
import contextlib
import cProfile
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from perf import host, traffic
from tests.gates.launches import counting_driver_calls
from tkernels.core import launch, replay
from tkernels.functional import linear
from tkernels.ops.conv_stage import kernels as conv_stage

pytestmark = pytest.mark.gate("torch")

X, W = torch.zeros(8, 32), torch.zeros(16, 32)
PLAIN, SHORTCUT = JITFunction.run.__code__, launch.Shortcut.launch.__code__


@pytest.fixture
def made() -> Iterator[list[host.Made]]:
    """What the driver's launch call was given."""
    calls: list[host.Made] = []
    with host.stubbed_driver(lambda *given: calls.append(given)):
        yield calls


@pytest.fixture
def counted(made: list[host.Made]) -> Iterator[list[str]]:
    """What the cuda gate's fixture ``launches`` would hold."""
    names: list[str] = []
    with counting_driver_calls(names):
        yield names


@contextlib.contextmanager
def deterministic(on: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)


def called(body: Callable[[], object]) -> collections.Counter[object]:
    """How often ``body`` calls each function, by its code, and each C function, by its name. (A patch would show which
    way a launch takes too, but the fast ones are closed to whoever patches.)"""
    profile = cProfile.Profile()
    profile.runcall(body)
    counts: collections.Counter[object] = collections.Counter()
    for entry in profile.getstats():
        name = entry.code.partition(".")[2].rstrip(">") if isinstance(entry.code, str) else entry.code
        counts[name.rpartition(".")[2] if isinstance(name, str) else name] += entry.callcount
    return counts


def fold(x: Tensor = X) -> None:
    launch.launch(conv_stage.fold_sums_kernel, (1, 1), x, x, 2, 32, BLOCK_R=32, BLOCK_C=32, num_warps=4)


@pytest.mark.parametrize("fast", (False, True))
def test_a_launch_is_counted_once_on_its_way(fast: bool, made: list[host.Made], counted: list[str]) -> None:
    with launch.fast(fast):
        assert launch.is_fast([conv_stage.fold_sums_kernel]) == fast
        fold()
        assert counted == ["fold_sums_kernel"]
        ways = called(fold)
    assert counted == ["fold_sums_kernel"] * 2
    assert len(made) == 2
    assert (ways[PLAIN], ways[SHORTCUT]) == ((0, 1) if fast else (1, 0))


@pytest.mark.parametrize("fast", (False, True))
def test_a_replay_is_recorded_and_counted_once(fast: bool, made: list[host.Made], counted: list[str]) -> None:
    def call() -> None:
        linear(X, W, activation="relu")

    with launch.fast(fast):
        for n in range(1, 5):
            ways = called(call)
            assert counted == ["linear_forward_kernel"] * n
        assert ways[PLAIN] == (not fast)
        assert ways[SHORTCUT] == 0  # a replay takes neither
    programs = [p for f in replay._functions for p in f.kinds.values() if isinstance(p, replay.Program)]
    assert [p.direct is None for p in programs] == [False]
    assert len(made) == 4


def test_a_whole_step_is_counted_alike_in_all_ways(made: list[host.Made], counted: list[str]) -> None:
    step, found = host.step(*traffic.fused(), 8), []
    for fast, replays in ((False, False), (True, False), (False, True), (True, True)):
        with launch.fast(fast), replay.enabled(replays):
            for _ in range(host.WARM_UP):
                made.clear()
                counted.clear()
                step()
        assert [str(call[4]).split()[0] for call in made] == counted
        found.append(list(counted))
    assert len(found[0]) == 56
    assert found[1:] == found[:1] * 3


def test_counting_ends(made: list[host.Made]) -> None:
    """Launchers made after the block are Triton's own again."""
    names: list[str] = []
    with launch.fast(False):
        with counting_driver_calls(names):
            fold()
        conv_stage.fold_sums_kernel.device_caches.clear()
        fold()
    assert names == ["fold_sums_kernel"]
    assert len(made) == 2


@pytest.mark.parametrize("on", (False, True))
def test_deterministic_mode_alone_takes_another_allocator(on: bool, made: list[host.Made]) -> None:
    """The shipped one is what Inductor's code calls; the cuda gate must get it."""
    with deterministic(on):
        calls = [called(lambda: linear(X, W)) for _ in range(4)][-1]
    assert calls["_empty_strided_cpu"] == (not on)
    assert calls["empty_strided"] == on


STATE = """
from types import SimpleNamespace
import torch
from tests import conftest
from triton.runtime.jit import JITFunction
from tkernels.core import launch
conftest.pytest_configure(SimpleNamespace(option=SimpleNamespace()))
with launch.fast(True):
    print(launch.is_fast([]), torch.are_deterministic_algorithms_enabled())
"""


@pytest.mark.parametrize(
    "gate, switch, state",
    [
        ("cuda", "0", "True False"),
        ("cuda", "1", "True True"),
        ("torch", "0", "True True"),
        ("interp", "0", "False True"),
    ],
)
def test_what_a_gate_leaves_open(gate: str, switch: str, state: str) -> None:
    """The fast launch, and deterministic mode."""
    given = {**os.environ, "TK_GATE": gate, "TK_DETERMINISTIC": switch}
    given.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", STATE], env=given, capture_output=True, text=True)
    assert done.stdout.strip() == state, done.stderr
