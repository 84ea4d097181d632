"""Operators record what they allocate and launch and replay it: the same launches, the same values, nothing stale."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tkernels.nn as tnn
from models.cifar_cnn import FusedCNNClassifier
from perf import host, traffic
from tests.test_launch import sorted_out
from tests.watch import AtenWatch
from tkernels.core import autotune, launch, replay, targets
from tkernels.core import mode as runtime
from tkernels.functional import cross_entropy, linear

CALLS = 4  # the first is remembered, the second recorded, the others replayed


@pytest.fixture(autouse=True)
def through_triton() -> Iterator[None]:
    """Unless a test says otherwise, JITFunction.run launches: the driver's own call needs a GPU."""
    with launch.fast(False):
        yield


def programs() -> list[replay.Program]:
    return [p for f in replay._functions for p in f.kinds.values() if isinstance(p, replay.Program)]


def network(device: str) -> FusedCNNClassifier:
    torch.manual_seed(0)
    network = FusedCNNClassifier(5, width=4, image_size=8).to(device=device, memory_format=torch.channels_last)
    return network.requires_grad_()


def trained(device: str, replays: bool) -> dict[str, Tensor]:
    """Logits, gradients and running statistics of a few steps of other values each, then of an evaluation."""
    model, found = network(device), {}
    generator = torch.Generator().manual_seed(1)
    with replay.enabled(replays):
        for step in range(CALLS):
            images = torch.randn(3, 3, 8, 8, generator=generator).to(device)
            target = torch.randint(5, (3,), generator=generator).to(device)
            torch.manual_seed(step)
            logits = model(images)
            model.zero_grad()
            tnn.CrossEntropyLoss()(logits, target).backward()
            found[f"logits {step}"] = logits.detach()
            found |= {f"{name} {step}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found |= {name: t.clone() for name, t in model.state_dict().items()}
        model.eval()
        with torch.no_grad():
            found |= {f"evaluated {i}": model(images) for i in range(CALLS)}
    return found


@pytest.mark.gate("ttsem", "cuda")
def test_replays_give_the_same_bits(device: str, launches: list[str]) -> None:
    """Dropout's draws, running statistics and gradients included; every launch is still made."""
    check_replays(device, launches)


@pytest.mark.gate("cuda")
def test_fast_replays_give_the_same_bits(device: str, launches: list[str]) -> None:
    """With the fast launch a replay calls the driver, which only a GPU has; the allocator is the shipped one."""
    with launch.fast(True):
        check_replays(device, launches)
        assert all(p.direct is not None and launch.is_fast(p.kernels) for p in programs())
    shipped = torch._C._dynamo.guards._empty_strided_cuda
    found = [p.direct.__globals__.values() for p in programs()]
    assert any(value is shipped for values in found for value in values) != torch.are_deterministic_algorithms_enabled()


def check_replays(device: str, launches: list[str]) -> None:
    launches.clear()
    expected = trained(device, False)
    made = list(launches)
    assert not programs()
    launches.clear()
    found = trained(device, True)
    assert len(programs()) == 3 * 3 + 3 * 3 + 2  # forward, backward and evaluation of each stage and layer; the loss
    assert launches == made
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert torch.equal(found[name], t), name


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[host.Made]]:
    """What the driver's launch call was given."""
    calls: list[host.Made] = []
    with host.stubbed_driver(lambda *given: calls.append(given)):
        yield calls


@pytest.mark.gate("torch")
@pytest.mark.parametrize("fast", (False, True), ids=("JITFunction.run", "fast"))
def test_replays_hand_the_driver_the_same(made: list[host.Made], fast: bool) -> None:
    step = host.step(*traffic.fused(), 8)
    with replay.enabled(False):
        step()
    expected = [sorted_out(call) for call in made]
    assert len(expected) > 50
    with launch.fast(fast):
        for _ in range(CALLS):
            made.clear()
            step()
            assert [sorted_out(call) for call in made] == expected
    assert len(programs()) == 6 + 6 + 2
    assert all(p.direct is not None for p in programs())


@pytest.mark.gate("torch")
def test_buffers_die_in_a_replay_as_they_do_in_the_operator() -> None:
    """What the next launches do not need must not wait for the end of the call."""
    alive: list[int] = []

    def peak(replays: bool) -> int:
        gc.collect()
        gc.freeze()  # what there was before is not looked through
        try:
            step = host.step(*traffic.fused(), 8)
            with replay.enabled(replays), host.stubbed_driver(lambda *given: alive.append(living())):
                for _ in range(CALLS):
                    alive.clear()
                    step()
        finally:
            gc.unfreeze()
        return max(alive)

    def living() -> int:
        tensors = [t for t in gc.get_objects() if type(t) is Tensor]
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())

    assert peak(True) <= peak(False)


def _linear(x: Tensor, **others: Any) -> Tensor:
    return linear(x, others.pop("weight", torch.ones(16, x.shape[1], dtype=x.dtype)), **others)


def strided(x: Tensor) -> Tensor:
    return torch.zeros(8, 64, dtype=x.dtype)[:, :32]


X = torch.zeros(8, 32)
OTHERS: dict[str, Callable[[], object]] = {
    "shape": lambda: _linear(torch.zeros(9, 32)),
    "strides": lambda: _linear(strided(X)),
    "alignment": lambda: _linear(torch.zeros(8 * 32 + 1)[1:].view(8, 32)),
    "dtype": lambda: _linear(X.half()),
    "an argument": lambda: _linear(X, activation="gelu"),
    "a tensor that was none": lambda: _linear(X, bias=torch.zeros(16)),
    "gradients": lambda: _linear(X, weight=torch.ones(16, 32, requires_grad=True)),
}


@pytest.mark.gate("torch")
@pytest.mark.parametrize("other", OTHERS)
def test_another_kind_of_call_is_not_replayed(made: list[host.Made], other: str) -> None:
    for _ in range(CALLS):
        _linear(X)
    with replay.enabled(False):
        made.clear()
        OTHERS[other]()
        expected = [sorted_out(call) for call in made]
    for _ in range(CALLS):
        made.clear()
        OTHERS[other]()
        assert [sorted_out(call) for call in made] == expected
    assert len(programs()) == 2


@pytest.mark.gate("torch")
def test_float32_switches_and_targets_are_told_apart(made: list[host.Made]) -> None:
    def function() -> Any:
        made.clear()
        _linear(X)
        return made[-1][4]

    ieee = [function() for _ in range(CALLS)][-1]
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    tf32 = [function() for _ in range(CALLS)]
    assert set(tf32) == {tf32[0]} != {ieee}
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert function() == ieee
    assert len(programs()) == 2
    with targets.pretend("sm_80"):
        function()
    assert len(programs()) == 2


@contextlib.contextmanager
def autotuning() -> Iterator[None]:
    autotune.enabled = True
    try:
        yield
    finally:
        autotune.enabled = False


WATCHED: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "a dispatch mode": AtenWatch,
    "a profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "autotuning": autotuning,
    "TKERNELS_REPLAY=0": lambda: replay.enabled(False),
}


@pytest.mark.gate("torch")
@pytest.mark.parametrize("how", WATCHED)
def test_one_who_watches_sees_the_operator(made: list[host.Made], how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(CALLS):
        _linear(X)
    (program,) = programs()
    monkeypatch.setattr(program, "run", None)
    if how == "autotuning":
        monkeypatch.setattr(autotune, "pick", lambda name, batch, shape, first, run, rows="": first)
    with WATCHED[how]():
        _linear(X)
    with pytest.raises(TypeError, match="NoneType"):
        _linear(X)


def toy(body: Callable[..., Any]) -> replay.Replayed:
    return replay.replayed(lambda tensors, *static: body(*tensors, *static))


@pytest.mark.gate("torch")
def test_any_call_of_torch_is_replayed_on_the_tensors_at_hand() -> None:
    """Views of inputs and buffers, calls that compute, that change a tensor, or that give an input back."""

    def body(x: Tensor, y: Tensor | None, factor: float) -> tuple[Tensor | None, ...]:
        buffer = torch.empty_like(x).fill_(factor)
        buffer[1:].mul_(x[1:])
        total = (x.t() + buffer.t()).sum(1, keepdim=True)
        x.add_(1)
        return buffer.t(), total, x, y, x[:, 2:]

    function = toy(body)
    for i in range(CALLS):
        storage = torch.full((40,), float(i))  # each call's begins elsewhere, with one alignment
        x, z = storage[4 * i :][:12].view(3, 4), torch.full((3, 4), float(i))
        found = function((x, None), 2.0)
        expected = body(z, None, 2.0)
        assert found[3] is None
        assert found[2] is x
        for a, b in zip(found, expected):
            assert a is b is None or torch.equal(a, b)
        assert found[4].data_ptr() == x[:, 2:].data_ptr()
    (program,) = function.kinds.values()
    assert isinstance(program, replay.Program)


@pytest.mark.gate("torch")
def test_a_value_that_reaches_the_host_is_never_replayed() -> None:
    function = toy(lambda x: (torch.empty_like(x).fill_(float(x.sum())),))
    for i in range(CALLS):
        (y,) = function((torch.full((4,), float(i)),))
        assert y is not None
        assert y[0] == 4 * i
    assert not any(isinstance(p, replay.Program) for p in function.kinds.values())


@pytest.mark.gate("torch")
def test_memory_of_elsewhere_is_never_replayed() -> None:
    """A tensor that is no argument could be another next time."""
    elsewhere = [torch.zeros(4)]
    function = toy(lambda x: (x + elsewhere[0],))
    for i in range(CALLS):
        elsewhere[0] = torch.full((4,), float(i))
        (y,) = function((torch.zeros(4),))
        assert y is not None
        assert y[0] == i


@pytest.mark.gate("torch")
def test_arguments_that_share_memory_are_told_apart() -> None:
    """Recorded of one tensor given twice, a call must not mix up two; the other way round nothing can go wrong."""
    function = toy(lambda x, y: (x - y,))
    for _ in range(CALLS):
        (one,) = function((torch.ones(4), torch.zeros(4)))
        assert one is not None
        assert one.all()
        same = torch.ones(4)
        (zero,) = function((same, same))
        assert zero is not None
        assert not zero.any()


@pytest.mark.gate("torch")
def test_it_works_in_threads() -> None:
    function = toy(lambda x: ((torch.empty_like(x).copy_(x) * 2),))
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(50):
            x = torch.full((number % 3 + 1,), float(number))
            (y,) = function((x,))
            if y is None or not torch.equal(y, 2 * x):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.gate("torch")
def test_shapes_that_never_come_back_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_MOST_KINDS", 8)
    function = toy(lambda x: (x + 1,))
    for n in range(1, 40):
        function((torch.zeros(n),))
        assert len(function.kinds) <= 8


@pytest.mark.gate("torch")
def test_saved_tensors_may_come_back_as_others(made: list[host.Made]) -> None:
    """Hooks that store them elsewhere: the backward is that of what came back."""
    weight = nn.Parameter(torch.ones(16, 32))

    def step() -> list[Any]:
        made.clear()
        loss = cross_entropy(_linear(X, weight=weight, activation="relu"), torch.zeros(8, dtype=torch.int64))
        loss.backward()
        return [sorted_out(call) for call in made]

    usual = [step() for _ in range(CALLS)][-1]

    def unpack(t: Tensor) -> Tensor:
        moved = torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
        return moved.copy_(t)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        hooked = step()
        with replay.enabled(False):
            assert hooked == step() != usual


@pytest.mark.gate("torch")
def test_refusals_come_on_every_call(made: list[host.Made]) -> None:
    for _ in range(CALLS):
        _linear(X)
        with pytest.raises(RuntimeError, match="in_features"):
            _linear(X, weight=torch.ones(16, 31))
        with pytest.raises(ValueError, match="activation"):
            _linear(X, activation="tanh")
        with runtime.backend("auto"):
            _linear(X)
            made.clear()
            for t in (X.to_sparse(), torch._neg_view(X)):
                assert _linear(t).shape == (8, 16)
            assert not made
        with runtime.backend("torch"):
            made.clear()
            _linear(X)
            assert not made
