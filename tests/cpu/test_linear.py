"""Linear layers with an activation on a CPU: values and gradients against float64 and torch's own error, what ran."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import tkernels
from tests.cpu.profiles import events
from tests.fusion.pairs import ran
from tkernels.core import activation as activations
from tkernels.cpu import buffers, compiler, product

pytestmark = [
    pytest.mark.gate("torch"),
    pytest.mark.skipif(not compiler.enabled(), reason="passes are not compiled here: no C++ compiler, or turned off"),
]
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
NAMED = [name for name in activations.ACTIVATIONS if name is not None]
IN_TRAINING = [name for name in NAMED if name not in activations.FROM_OUTPUT]


def planned(shape: tuple[int, ...], dtype: torch.dtype, name: str | None, training: bool) -> Callable[..., Tensor]:
    run = product.plan(shape, 16, dtype, name, training)
    assert not isinstance(run, str), run
    return run


def composed(name: str | None) -> Callable[..., Tensor]:
    return lambda x, weight, bias: activations.apply(F.linear(x, weight, bias), name)


def results(run: Callable[..., Tensor], given: list[Tensor | None], training: bool) -> list[Tensor]:
    leaves = [t if t is None else t.clone().requires_grad_(training) for t in given]
    y = run(*leaves)
    assert training == (y.grad_fn is not None)
    wanted = [t for t in leaves if t is not None]
    return [y.detach(), *(torch.autograd.grad(y, wanted, torch.cos(y.detach() * 100)) if training else ())]


def _table() -> list[Any]:
    """All activations in float32, in which passes compute; in bfloat16 one, for each is a pass to compile."""
    found = []
    for training, name in (*((True, n) for n in IN_TRAINING), *((False, n) for n in NAMED)):
        marks = () if name == "gelu" else pytest.mark.extended("torch")
        kind = "training" if training else "inference"
        found.append(pytest.param(training, name, torch.float32, id=f"{kind}-{name}-fp32"))
        found.append(pytest.param(training, name, torch.bfloat16, id=f"{kind}-{name}-bf16", marks=marks))
    return found


@pytest.mark.parametrize("training, name, dtype", _table())
def test_values_and_gradients(training: bool, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "SMALLEST", 0)
    monkeypatch.setattr(activations, "IN_PLACE", 0)
    torch.manual_seed(0)
    for shape, bias in (((64, 33), True), ((3, 5, 7, 16), False), ((17, 1), True)):
        given = [torch.randn(shape) * 2, torch.randn(24, shape[-1]) / shape[-1] ** 0.5, torch.randn(24)]
        own: list[Tensor | None] = [t.to(dtype) for t in given]
        if not bias:
            own[2] = None
        run = planned((*shape[:-1], 24), dtype, name, training)
        with torch.set_grad_enabled(training):
            ours, torchs = (results(f, own, training) for f in (run, composed(name)))
            exact = results(composed(name), [t if t is None else t.double() for t in own], training)
        for a, b, reference in zip(ours, torchs, exact):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            eps, scale = torch.finfo(dtype).eps, torch.linalg.vector_norm(reference).item() + 1e-6
            errors = [torch.linalg.vector_norm(t.double() - reference).item() / scale for t in (a, b)]
            # (the gradient that results() draws from a rounded result differs by what that rounding is)
            assert errors[0] <= 1.25 * max(errors[1], eps), (shape, errors)


@DTYPES
@pytest.mark.parametrize("name", NAMED)
def test_nan_and_infinity_stay_where_they_are(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "SMALLEST", 0)
    monkeypatch.setattr(activations, "IN_PLACE", 0)
    # (torch's own vectorised GELU of infinity is NaN, which it is not)
    top = 40.0 if name == "gelu" else float("inf")
    x = torch.tensor([float("nan"), top, -float("inf"), 0.0, -40.0, 40.0] * 8, dtype=dtype)[:, None]
    weight = torch.ones(1, 1, dtype=dtype)
    with torch.no_grad():
        y = planned((48, 1), dtype, name, False)(x, weight, None)
        expected = activations.apply(F.linear(x, weight), name)
    torch.testing.assert_close(y, expected, equal_nan=True)


def passes_of(model: nn.Module, x: Tensor, training: bool) -> list[str]:
    def call() -> None:
        with torch.set_grad_enabled(training):
            y = model(x)
            if training:
                y.sum().backward()

    return events(call, ("aten::gelu", "aten::relu", "aten::silu", "aten::hardswish", "aten::threshold"))


def test_what_runs() -> None:
    """In the place of torch's activations, from a size on; ReLU in evaluation alone."""
    x, small = torch.randn(64, 24, 24, 32), torch.randn(4, 32)
    gelu, relu = (nn.Sequential(nn.Linear(32, 16), act, nn.Dropout(0.0)) for act in (nn.GELU(), nn.ReLU()))
    for model in (gelu, relu):
        tkernels.fuse(model)
    assert passes_of(gelu, x, True) == ["tkernels: activation gelu", "tkernels: activation backward gelu"]
    assert passes_of(gelu, x, False) == ["tkernels: finish gelu in place"]
    assert passes_of(relu, x, False) == ["tkernels: finish relu in place"]
    with torch.autocast("cpu", torch.bfloat16):
        assert passes_of(gelu, x, False) == ["aten::gelu"]
        assert passes_of(gelu, x, True) == ["tkernels: activation gelu", "tkernels: activation backward gelu"]
    assert ran(gelu) == 6
    with pytest.warns(UserWarning, match="torch has this activation in place"):
        assert "tkernels: activation relu" not in passes_of(tkernels.fuse(nn.Sequential(*relu)), x, True)
    with pytest.warns(UserWarning, match="nothing to gain on a CPU from so few values"):
        tkernels.fuse(nn.Sequential(*gelu))(small)


def test_differentiated_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "SMALLEST", 0)
    monkeypatch.setattr(activations, "IN_PLACE", 0)
    for name in IN_TRAINING:
        given: list[Any] = [torch.randn(6, 5), torch.randn(3, 5), torch.randn(3)]
        for t in given:
            t.requires_grad_()
        found = []
        for run in (planned((6, 3), torch.float32, name, True), composed(name)):
            first = torch.autograd.grad(run(*given).sum(), given, create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in first), given))
            # (several gradients at once: tensors without memory that passes could read)
            y = run(*given)
            found[-1] += torch.autograd.grad(y, given, torch.eye(18).view(18, 6, 3), is_grads_batched=True)
        torch.testing.assert_close(found[0], found[1])


PRODUCT, ONEDNN = "aten::addmm", "mkldnn::_linear_pointwise"


@pytest.mark.parametrize("name", [None, "relu", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_faster_product(name: str | None, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 in inference: as exact as torch's, the same values that are not finite, and it is what runs."""
    monkeypatch.setattr(product, "onednn_is_ahead", lambda threads: True)
    torch.manual_seed(0)
    x, weight = torch.randn(3, 100, 96), torch.randn(80, 96) / 96**0.5
    given: list[Tensor | None] = [x, weight, torch.randn(80) if bias else None]
    run = product.plan((3, 100, 80), 96, torch.float32, name, False)
    assert not isinstance(run, str)
    with torch.no_grad():
        ours, torchs = run(*given), composed(name)(*given)  # type: ignore[arg-type]
        exact = composed(name)(*[t if t is None else t.double() for t in given])
        assert (ours.dtype, ours.shape, ours.stride()) == (torchs.dtype, torchs.shape, torchs.stride())
        errors = [torch.linalg.vector_norm(t.double() - exact) for t in (ours, torchs)]
        assert errors[0] <= 1.25 * errors[1]
        x[0, 1, 2], x[1, 5, 7] = float("nan"), float("inf")
        ours, torchs = run(*given), composed(name)(*given)  # type: ignore[arg-type]
        assert torch.equal(ours.isfinite(), torchs.isfinite())
        across = x.transpose(0, 1)
        torch.testing.assert_close(run(across, *given[1:]), composed(name)(across, *given[1:]), equal_nan=True)


def products(model: nn.Module, x: Tensor) -> list[str]:
    def call() -> None:
        with torch.no_grad():
            model(x)

    return [found for found in events(call, (PRODUCT, ONEDNN, "aten::linear")) if found in (PRODUCT, ONEDNN)]


def test_which_product_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def ahead(threads: int) -> bool:
        asked.append(threads)
        return answer

    monkeypatch.setattr(product, "onednn_is_ahead", ahead)
    model = nn.Sequential(nn.Linear(96, 80), nn.Linear(80, 64), nn.Tanh()).eval()
    many, few = torch.randn(300, 96), torch.randn(8, 96)
    answer = True
    fused = tkernels.fuse(nn.Sequential(*model))
    assert products(fused, many) == [ONEDNN] * 2
    assert ran(fused) == 4
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="ran no fused operator"):
        assert ONEDNN not in products(tkernels.fuse(nn.Sequential(*model)), many)
    with pytest.warns(UserWarning, match="linear layer alone, followed by"):
        assert products(tkernels.fuse(nn.Sequential(*model)), few) == [PRODUCT] * 2
    assert set(asked) == {torch.get_num_threads()}
    answer = False
    with pytest.warns(UserWarning, match="linear layer alone, followed by"):
        assert products(tkernels.fuse(nn.Sequential(*model)), many) == [PRODUCT] * 2


@pytest.mark.parametrize("onednn, ahead", ((0.99, True), (1.0, False), (1.01, False)))
def test_the_faster_one_is_taken(onednn: float, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By any margin: one that CPUs happen to stand at would decide by chance."""
    now = 0.0

    def takes(seconds: float) -> Callable[..., None]:
        def run(*_: Any) -> None:
            nonlocal now
            now += seconds

        return run

    monkeypatch.setattr(product, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(product, "F", SimpleNamespace(linear=takes(1.0)))
    monkeypatch.setattr(product, "_onednn", takes(onednn))
    assert product._is_measured_ahead.__wrapped__(1) is ahead


def test_it_is_measured_once() -> None:
    product._is_measured_ahead.cache_clear()
    torch.use_deterministic_algorithms(False)
    try:
        with profile(activities=[ProfilerActivity.CPU]) as found:
            answers = {product.onednn_is_ahead(torch.get_num_threads()) for _ in range(3)}
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)  # as all of these tests run
    assert not product.onednn_is_ahead(torch.get_num_threads())
    assert len(answers) == 1
    names = [event.name for event in found.events()]
    assert names.count(ONEDNN) == names.count("aten::linear") == product.TURNS
