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
from triton.runtime.jit import JITFunction

from perf.static import host, traffic
from tests.core.cases import MAPS, OPERATORS
from tests.gates.launches import counting_driver_calls
from tkernels.core.records import BatchNorm
from tkernels.functional import linear
from tkernels.ops.batch_norm import sync
from tkernels.ops.conv_stage import kernels as conv_stage

pytestmark = pytest.mark.gate("torch")

X, W = torch.zeros(8, 32), torch.zeros(16, 32)
PLAIN = JITFunction.run.__code__


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
        name: object = entry.code
        if isinstance(entry.code, str):  # <built-in method torch.x.y>, <method 'y' of 'Tensor' objects>
            name = entry.code.split()[2 if "built-in" in entry.code else 1].strip("'>").rpartition(".")[2]
        counts[name] += entry.callcount
    return counts


def test_a_launch_is_counted_once_by_triton_and_by_a_plan(made: list[host.Made], counted: list[str]) -> None:
    for n in range(1, 4):
        ways = called(lambda: linear(X, W, activation="relu"))
        assert counted == ["linear_forward_kernel"] * n
        assert len(made) == n
        assert ways[PLAIN] == (n == 1)  # which compiles


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_runs_by_plans_forward_and_backward(operator: str, made: list[host.Made]) -> None:
    """Triton's own Python launches at the first call alone, which compiles."""
    shape, function = OPERATORS[operator]
    launched = []
    for n in range(3):
        made.clear()
        ways = called(lambda: function(torch.zeros(shape, requires_grad=True)).sum().backward())
        launched.append(len(made))
        assert (ways[PLAIN] > 0) == (n == 0)
    assert launched == launched[:1] * 3
    assert launched[0] >= 2, "forward and backward launch something each"


def test_sync_batch_norm_runs_by_plans_forward_and_backward(
    made: list[host.Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its launches are batch_norm's, by the same plans, with the exchange between processes in their middle."""
    monkeypatch.setattr(sync, "_gathered", lambda row, group: row.expand(2, -1))
    norm = BatchNorm(torch.zeros(16), torch.ones(16), torch.ones(16), torch.zeros(16), True, 0.1, 1e-5)
    x, residual = torch.zeros(2, *MAPS, requires_grad=True)
    launched = []
    for n in range(3):
        made.clear()
        ways = called(lambda: sync.sync_batch_norm(x, norm, "relu", residual, None).sum().backward())
        launched.append([str(call[4]).split()[0] for call in made])
        assert (ways[PLAIN] > 0) == (n == 0)
    assert launched == launched[:1] * 3
    kernels = {"statistics_kernel", "normalize_kernel", "gradient_sums_kernel", "input_gradient_kernel"}
    assert kernels <= set(launched[0])


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_backward_that_a_tensor_class_calls(operator: str, made: list[host.Made]) -> None:
    """Functions of tensor classes are off within it, and on for what stands for tensors while a plan is made."""
    shape, function = OPERATORS[operator]
    x = torch.zeros(shape, requires_grad=True)
    y = function(x)
    made.clear()
    y.as_subclass(type("Mine", (torch.Tensor,), {})).sum().backward()
    assert made
    assert x.grad is not None


def test_a_whole_step_is_counted_alike_in_all_calls(made: list[host.Made], counted: list[str]) -> None:
    step, found = host.step(*traffic.fused(), 8), []
    for _ in range(3):
        made.clear()
        counted.clear()
        step()
        assert [str(call[4]).split()[0] for call in made] == counted
        found.append(list(counted))
    assert len(found[0]) == 52
    assert found[1:] == found[:1] * 2


def test_counting_ends(made: list[host.Made]) -> None:
    """Launchers made after the block are Triton's own again."""
    names: list[str] = []
    with counting_driver_calls(names):
        host.fold(X)
    conv_stage.fold_sums_kernel.device_caches.clear()
    host.fold(X)
    assert names == ["fold_sums_kernel"]
    assert len(made) == 2


@pytest.mark.parametrize("on", (False, True))
def test_deterministic_mode_alone_takes_another_allocator(on: bool, made: list[host.Made]) -> None:
    """The shipped one is what Inductor's code calls; the cuda gate must get it."""
    with deterministic(on):
        calls = [called(lambda: linear(X, W)) for _ in range(4)][-1]
    assert calls["_empty_strided_cpu"] == (not on)
    assert calls["new_empty_strided"] == on


# gate, TK_DETERMINISTIC, what is found: Triton's own launch, torch's deterministic mode
STATES = {
    ("cuda", "0"): "True False", ("cuda", "1"): "True True", ("torch", "0"): "True True", ("interp", "0"): "False True",
}  # fmt: skip
STATE = f"""
import os
from types import SimpleNamespace
import torch
for gate, switch in {[*STATES]}:
    if os.fork() == 0:
        os.environ |= {{"TK_GATE": gate, "TK_DETERMINISTIC": switch}}
        from tests import conftest
        from triton.runtime.jit import JITFunction
        conftest.pytest_configure(SimpleNamespace(option=SimpleNamespace()))
        kept = JITFunction.run.__module__ == "triton.runtime.jit"
        print(kept, torch.are_deterministic_algorithms_enabled(), flush=True)
        os._exit(0)
    os.wait()
"""


def test_what_a_gate_leaves_open() -> None:
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", STATE], env=given, capture_output=True, text=True)
    assert done.stdout.splitlines() == [*STATES.values()], done.stderr
