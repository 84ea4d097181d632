"""The fast launch: the shortcut past JITFunction.run hands the driver what Triton would hand it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

from perf import host, traffic
from tkernels.core import launch
from tkernels.ops.conv_stage import kernels as conv_stage
from tkernels.ops.linear import kernels as linear

pytestmark = pytest.mark.gate("torch")

BATCH = 8


@pytest.fixture
def triton_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that went through JITFunction.run."""
    names: list[str] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.__name__)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", run)
    return names


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, triton_runs: list[str]) -> Iterator[list[host.Made]]:
    """What the driver's launch call was given."""
    # the suite counts launches in a run of its own
    monkeypatch.setattr(launch, "_RUN", JITFunction.run)
    calls: list[host.Made] = []
    with host.stubbed_driver(lambda *given: calls.append(given)):
        yield calls


def sorted_out(call: host.Made) -> list[Any]:
    """A launch without what differs from call to call: pointers become their dtype, shape and alignment."""
    *head, arguments = call
    plain = [a if isinstance(a, (int, str, tuple, bool)) else ... for a in head]  # hooks may be empty or None
    described = [
        (a.dtype, tuple(a.shape), a.stride(), a.data_ptr() % 16) if isinstance(a, Tensor) else (type(a), a)
        for a in arguments
    ]
    return [*plain, *described]


def test_both_ways_hand_the_driver_the_same(triton_runs: list[str], made: list[host.Made]) -> None:
    step = host.step(*traffic.fused(), BATCH)
    torch.manual_seed(0)
    with launch.fast(False):
        step()
    slow = [sorted_out(call) for call in made]
    assert len(triton_runs) == len(slow) > 50
    with launch.fast(True):
        step()  # fills the shortcut
        made.clear()
        triton_runs.clear()
        step()
    assert [sorted_out(call) for call in made] == slow
    assert not triton_runs


def fold(x: Tensor, count: int = 2, channels: int = 32) -> None:
    launch.launch(conv_stage.fold_sums_kernel, (1, 1), x, x, count, channels, BLOCK_R=32, BLOCK_C=32, num_warps=4)


def finish(x: Tensor, p: float | int) -> None:
    launch.launch(linear.linear_finish_kernel, (1,), x, None, x, None, None, 4, 16, 0, p, 2, ACTIVATION=None,
                  BLOCK_M=4, BLOCK_N=16, num_warps=4)  # fmt: skip


storage = torch.zeros(1024)
CHANGES: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
    "dtype": (lambda: fold(storage), lambda: fold(storage.half())),
    "alignment": (lambda: fold(storage), lambda: fold(storage[1:])),
    "divisibility": (lambda: fold(storage, 2, 32), lambda: fold(storage, 2, 33)),
    "one": (lambda: fold(storage, 2, 32), lambda: fold(storage, 2, 1)),
    "width of an integer": (lambda: fold(storage, 2), lambda: fold(storage, 2**31)),
    "kind of a number": (lambda: finish(storage, 0.5), lambda: finish(storage, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_triton_specialises_for_is_told_apart(change: str, made: list[host.Made]) -> None:
    first, second = CHANGES[change]
    functions = []
    with launch.fast(True):
        for call in (first, second, first, second):
            call()
            functions.append(made[-1][4])
    first()
    second()
    expected = [call[4] for call in made[-2:]]
    assert expected[0] != expected[1]
    assert functions == expected * 2


def test_a_batch_of_another_size_is_no_other_kernel(triton_runs: list[str], made: list[host.Made]) -> None:
    with launch.fast(True):
        fold(storage, 2)
        triton_runs.clear()
        fold(storage, 3)
    assert not triton_runs


def test_one_who_patched_or_hooked_launches_sees_them(
    made: list[host.Made], triton_runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with launch.fast(True):
        fold(storage)
        fold(storage)
        assert len(triton_runs) == 1
        hooks = knobs.runtime.launch_enter_hook
        seen = []

        def hook(metadata: Any) -> None:
            seen.append(metadata)

        hooks.add(hook)
        try:
            fold(storage)
        finally:
            hooks.remove(hook)
        assert len(triton_runs) == 2
        monkeypatch.setattr(launch, "_RUN", None)
        fold(storage)
        assert len(triton_runs) == 3


def test_pointers_are_named_as_the_shortcut_expects(made: list[host.Made], triton_runs: list[str]) -> None:
    """A tensor in a parameter of another name would be told apart by identity."""
    launched: list[JITFunction] = []
    host.step(*traffic.fused(), BATCH)()
    for call in made:
        names = [p.name for p in kernel_of(call).params if not p.is_constexpr]
        values = [a for a, p in zip(call[-1], kernel_of(call).params) if not p.is_constexpr]
        launched.append(kernel_of(call))
        for name, value in zip(names, values):
            assert isinstance(value, Tensor) <= name.endswith("_ptr"), (kernel_of(call).__name__, name)
    assert launched


def kernel_of(call: host.Made) -> JITFunction:
    name = str(call[4]).split()[0]
    modules = [module for key, module in sys.modules.items() if key.startswith("tkernels.ops.")]
    return next(vars(module)[name] for module in modules if name in vars(module))


@pytest.mark.parametrize(("given", "expected"), [(None, "True"), ("0", "False")])
def test_it_is_the_default(given: str | None, expected: str) -> None:
    """In a process that nobody has told otherwise."""
    environment = {name: value for name, value in os.environ.items() if name != "TKERNELS_FAST_LAUNCH"}
    environment |= {} if given is None else {"TKERNELS_FAST_LAUNCH": given}
    command = [sys.executable, "-c", "from tkernels.core import launch; print(launch._fast)"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
