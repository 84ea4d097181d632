"""Plans: every call of a kind runs the same plan, gives the same values, and nothing stale."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from triton import knobs

import tkernels.nn as tnn
from models.cifar_cnn import FusedCNNClassifier
from perf.static import host, traffic
from tests.watch import AtenWatch
from tkernels.core import autotune, descriptors, mode, plan, targets
from tkernels.functional import ConvBNLayer, conv_stage, cross_entropy, linear

CALLS = 3  # the first plans and compiles


def plans() -> list[plan.Plan]:
    return list(plan._plans.values.values())


def network(device: str) -> FusedCNNClassifier:
    torch.manual_seed(0)
    network = FusedCNNClassifier(5, width=4, image_size=8).to(device=device, memory_format=torch.channels_last)
    return network.requires_grad_()


def trained(device: str, afresh: bool) -> dict[str, Tensor]:
    """Logits, gradients and running statistics of a few steps of other values each, then of an evaluation. ``afresh``:
    each call makes a plan of its own."""
    model, found = network(device), {}
    generator = torch.Generator().manual_seed(1)
    with contextlib.ExitStack() as stack:
        if afresh:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(plan._plans, "add", lambda key, value: value)
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
def test_the_same_bits_by_a_plan_kept_and_one_made_anew(device: str, launches: list[str]) -> None:
    """Dropout's draws, running statistics and gradients included; every launch is made."""
    launches.clear()
    expected = trained(device, True)
    made = list(launches)
    assert not plans()
    launches.clear()
    found = trained(device, False)
    # forward, backward and evaluation of each stage and layer; the loss
    assert len(plans()) == 3 * 3 + 3 * 3 + 2
    assert launches == made
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert torch.equal(found[name], t), name


@pytest.mark.gate("cuda")
def test_a_gpu_gets_the_shipped_allocator_and_compiled_kernels(device: str) -> None:
    trained(device, False)
    assert plans()
    for made in plans():
        assert made._direct is not None
        assert made._empty is torch._C._dynamo.guards._empty_strided_cuda


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[host.Made]]:
    """What the driver's launch call was given."""
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


@pytest.mark.gate("torch")
def test_every_call_hands_the_driver_what_triton_hands_it(made: list[host.Made]) -> None:
    """The first call's launches are JITFunction.run's."""
    step = host.step(*traffic.fused(), 8)
    step()
    expected = [sorted_out(call) for call in made]
    assert len(expected) > 50
    for _ in range(CALLS):
        made.clear()
        step()
        assert [sorted_out(call) for call in made] == expected
    assert len(plans()) == 6 + 6 + 2
    assert all(p._direct is not None for p in plans())


@pytest.mark.gate("torch")
def test_so_do_calls_with_descriptors(made: list[host.Made], monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor holds an address: each call has its own, and keeps nothing alive."""
    monkeypatch.setattr(descriptors, "enabled", True)
    expected: list[Any] = []
    for _ in range(CALLS):
        x, w = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((128, 64), (32, 64)))
        y = linear(x, w)
        (call,) = made
        assert [a.data_ptr() for a in call[-1] if isinstance(a, Tensor)] == [t.data_ptr() for t in (x, w, y)]
        expected = expected or sorted_out(call)
        assert sorted_out(call) == expected
        made.clear()
        del call
        kept = weakref.ref(x)
        del x
        gc.collect()  # what planned the first call is a cycle
        assert kept() is None
    assert all(p._direct is not None for p in plans())


@pytest.mark.gate("torch")
def test_buffers_die_after_their_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the next launches do not need must not wait for the end of the call."""
    alive: list[int] = []

    def peak() -> int:
        gc.collect()
        gc.freeze()  # what there was before is not looked through
        try:
            step = host.step(*traffic.fused(), 8)
            with host.stubbed_driver(lambda *given: alive.append(living())):
                for _ in range(CALLS):
                    alive.clear()
                    step()
        finally:
            gc.unfreeze()
        return max(alive)

    def living() -> int:
        tensors = [t for t in gc.get_objects() if type(t) is Tensor]
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())

    peak()  # the first step of a process leaves tensors behind for good
    dropped = peak()
    monkeypatch.setattr(plan, "_drop_dead", lambda steps, results: None)
    assert dropped < peak()


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
def test_another_kind_of_call_has_a_plan_of_its_own(made: list[host.Made], other: str) -> None:
    OTHERS[other]()
    expected = [sorted_out(call) for call in made]
    plan.forget()
    for _ in range(CALLS):
        _linear(X)
    for _ in range(CALLS):
        made.clear()
        OTHERS[other]()
        assert [sorted_out(call) for call in made] == expected
    assert len(plans()) == 2


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
    assert len(plans()) == 2
    with targets.pretend("sm_80"):
        function()
    assert len(plans()) == 3


@contextlib.contextmanager
def hooked() -> Iterator[None]:
    def hook(metadata: Any) -> None: ...

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        yield
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)


WATCHED: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "a dispatch mode": AtenWatch,
    "a profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "Triton's hooks": hooked,
}


@pytest.mark.gate("torch")
@pytest.mark.parametrize("how", WATCHED)
def test_one_who_watches_sees_the_same_plan(made: list[host.Made], how: str) -> None:
    for _ in range(CALLS):
        _linear(X)
    (expected,) = {str(sorted_out(call)) for call in made}
    made.clear()
    with WATCHED[how]() as watch:
        _linear(X)
    assert [str(sorted_out(call)) for call in made] == [expected]
    assert len(plans()) == 1
    if how == "a dispatch mode":
        assert watch.calls["new_empty_strided"] == 1
    if how == "Triton's hooks":
        metadata, enter = made[0][8:10]
        assert metadata.get()["name"] == "linear_forward_kernel"
        assert enter is knobs.runtime.launch_enter_hook
    if how == "a profiler":
        assert {"tkernels::linear.linear_forward_kernel"} <= {event.key for event in watch.key_averages()}


@pytest.mark.gate("torch")
def test_autotuning_times_plans_of_the_candidates(made: list[host.Made], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on the call's own input, with buffers of its own, and the one that won is planned."""
    timed: list[str] = []

    def best(key: str, calls: dict[str, Callable[[], object]]) -> str:
        for call in calls.values():
            made.clear()
            call()
            call()
            (first,) = {str(c[4]) for c in made}
            assert len(made) == 2
            assert made[0][-1][0] is X
            timed.append(first)
        made.clear()
        return list(calls)[-1]

    monkeypatch.setattr(autotune, "enabled", True)
    monkeypatch.setattr(autotune, "tuner", lambda: type("Tuner", (), {"best": staticmethod(best)}))
    for _ in range(CALLS):
        _linear(X)
    assert len(set(timed)) == len(timed) > 2
    assert [str(c[4]) for c in made] == timed[-1:] * CALLS


def toy(body: Callable[..., Any]) -> plan.Planned:
    return plan.Planned(lambda tensors, *static: body(*tensors, *static))


@pytest.mark.gate("torch")
def test_any_call_of_torch_is_made_on_the_tensors_at_hand() -> None:
    """Views of inputs and buffers, calls that compute, that change a tensor, or that give an input back."""

    def body(x: Tensor, y: Tensor | None, factor: float) -> tuple[Tensor | None, ...]:
        buffer = torch.empty_like(x).fill_(factor)
        buffer.mul_(x)
        total = torch.add(x.t(), buffer.t()).sum(1, keepdim=True)
        x.add_(1)
        return buffer.t(), total, x, y, x.narrow(1, 2, 2)

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
    assert len(plans()) == 1


@pytest.mark.gate("torch")
def test_buffers_before_a_view_that_nobody_takes_are_made() -> None:
    def body(x: Tensor) -> tuple[Tensor]:
        y = x.new_empty(2, 3)
        x.t()  # asked for its strides alone, and the last call of all
        return (y,)

    for _ in range(CALLS):
        (y,) = toy(body)((torch.ones(4, 5),))
        assert y is not None
        assert y.shape == (2, 3)


@pytest.mark.gate("torch")
def test_a_plan_cannot_depend_on_values_or_memory() -> None:
    for body in (lambda x: (x.sum().item(),), lambda x: (x.data_ptr(),), lambda x: (x.is_cuda,)):
        with pytest.raises((RuntimeError, AttributeError)):
            toy(body)((torch.ones(4),))


@pytest.mark.gate("torch")
def test_arguments_that_share_memory_are_told_apart() -> None:
    function = toy(lambda x, y: (torch.sub(x, y),))
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
    function = toy(lambda x: (torch.empty_like(x).copy_(x).mul_(2),))
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
def test_the_oldest_plans_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan._plans, "_most", 8)
    function = toy(lambda x: (torch.neg(x),))
    for n in range(1, 40):
        function((torch.zeros(n),))
        assert len(plans()) == min(n, 8)
    last = plans()
    function((torch.zeros(39),))
    assert plans() == last


@pytest.mark.gate("torch")
def test_running_statistics_have_a_new_version_after_every_call(made: list[host.Made]) -> None:
    """A graph that saved the old ones must notice."""
    layer = ConvBNLayer(torch.zeros(16, 16, 3, 3), running_mean=torch.zeros(16), running_var=torch.ones(16),
                        num_batches_tracked=torch.tensor(0))  # fmt: skip
    moved = layer.running_mean, layer.running_var, layer.num_batches_tracked
    for _ in range(CALLS):
        before = [t._version for t in moved if t is not None]
        conv_stage(torch.zeros(2, 16, 8, 8), [layer], training=True)
        assert [t._version for t in moved if t is not None] == [version + 1 for version in before]


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
        plan.forget()
        assert hooked == step() != usual


@pytest.mark.gate("torch")
def test_refusals_come_on_every_call(made: list[host.Made]) -> None:
    for _ in range(CALLS):
        _linear(X)
        with pytest.raises(RuntimeError, match="in_features"):
            _linear(X, weight=torch.ones(16, 31))
        with pytest.raises(ValueError, match="activation"):
            _linear(X, activation="tanh")
        with mode.backend("auto"):
            _linear(X)
            made.clear()
            for t in (X.to_sparse(), torch._neg_view(X)):
                assert _linear(t).shape == (8, 16)
            assert not made
        with mode.backend("torch"):
            made.clear()
            _linear(X)
            assert not made
