"""What a program sets for all of torch: each operator gives the same, on the same path, and afterwards too.

The constants and the memory that operators keep are made anew under each setting, and used again without it.
"""

from __future__ import annotations

import contextlib
import locale
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tkernels
import tkernels.functional as TF
from tkernels.core import plan
from tkernels.cpu import buffers, compiler, norm, passes
from tkernels.cpu import loss as cross_entropy_cpu
from tkernels.cpu import stage as conv_stage_cpu

pytestmark = pytest.mark.gate("torch", "ttsem", "cuda")
CL = torch.channels_last

# the function, and its tensors; those of floating point want gradients
Made = tuple[Callable[..., Tensor], list[Tensor]]


def linear() -> Made:
    return lambda x, w, b: TF.linear(x, w, b, "relu"), [torch.randn(9, 24), torch.randn(20, 24), torch.randn(20)]


def conv2d() -> Made:
    x, w = torch.randn(2, 8, 6, 5).contiguous(memory_format=CL), torch.randn(12, 8, 3, 3)
    return lambda x, w, b: TF.conv2d(x, w, b, padding=1, activation="relu"), [x, w, torch.randn(12)]


def batch_norm() -> Made:
    x = torch.randn(4, 16, 6, 5).contiguous(memory_format=CL)
    mean, var = torch.zeros(16), torch.ones(16)

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = TF.batch_norm(x, mean.to(x.device), var.to(x.device), w, b, True, activation="relu")
        return y + TF.batch_norm(x, None, None, None, None, True, activation="relu")

    return run, [x, torch.rand(16), torch.randn(16)]


def cross_entropy() -> Made:
    return lambda x, t: TF.cross_entropy(x, t, label_smoothing=0.1), [torch.randn(40, 20), torch.randint(20, (40,))]


def conv_stage() -> Made:
    x, w = torch.randn(2, 8, 6, 4).contiguous(memory_format=CL), torch.randn(16, 8, 3, 3)

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(0)
        layer = TF.ConvBNLayer(w, None, b, None, padding=1)
        return TF.conv_stage(x, [layer], pool=2, dropout_p=0.3, training=True)

    return run, [x, w, torch.rand(16)]


def conv_stage_evaluated() -> Made:
    x, w = torch.randn(2, 8, 6, 4).contiguous(memory_format=CL), torch.randn(16, 8, 3, 3)

    def run(x: Tensor, w: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        layer = TF.ConvBNLayer(w, None, None, None, mean.detach(), var.detach(), padding=1)
        return TF.conv_stage(x, [layer], pool=2)

    return run, [x, w, torch.randn(16), torch.rand(16)]


def matmul() -> Made:
    return TF.matmul, [torch.randn(2, 17, 24), torch.randn(2, 24, 9)]


def attention() -> Made:
    return lambda q, k, v: TF.scaled_dot_product_attention(q, k, v, is_causal=True), [
        torch.randn(2, 2, 17, 16) for _ in range(3)
    ]


OPERATORS = (linear, conv2d, batch_norm, cross_entropy, conv_stage, conv_stage_evaluated, matmul, attention)
# what runs passes on a CPU, with gradients or without
PASSES = (batch_norm, cross_entropy, conv_stage)


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Also whether fresh memory is filled."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(on, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = on
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def german() -> Iterator[None]:
    before = locale.setlocale(locale.LC_ALL)
    try:
        locale.setlocale(locale.LC_ALL, "de_DE.UTF-8")
    except locale.Error:
        pytest.skip("this system knows no numbers with commas")
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


SETTINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "torch.device": lambda: torch.device("meta"),
    "set_default_device": default_device,
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "deterministic": lambda: deterministic(True),
    "not deterministic": lambda: deterministic(False),
    "flush_denormal": flushed,
    "locale": german,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
WITHOUT_GRADIENTS = ("no_grad", "inference_mode")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> list[str]:
    """What runs: passes, oneDNN's post-ops, kernels. Small calls take the fast way."""
    for module in (norm, conv_stage_cpu, cross_entropy_cpu):
        monkeypatch.setattr(module, "WORTH_IT", 1)
    monkeypatch.setattr(cross_entropy_cpu, "SHORT_WORTH_IT", 1)
    monkeypatch.setattr(buffers, "SMALLEST", 1)
    call = compiler.Pass.__call__

    def counting(self: compiler.Pass, *tensors: Tensor) -> Any:
        launches.append(self.name)
        return call(self, *tensors)

    monkeypatch.setattr(compiler.Pass, "__call__", counting)
    return launches


def _forget() -> None:
    buffers.POOL.clear()
    passes.number.cache_clear()
    passes._constant.cache_clear()
    plan.forget()


def _leaves(given: list[Tensor], device: str, backward: bool) -> list[Tensor]:
    return [t.to(device, copy=True).requires_grad_(backward and t.is_floating_point()) for t in given]


def _results(run: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The result and the gradients of what wants any."""
    y = run(*leaves)
    if not y.requires_grad:
        return [y]
    dy = torch.cos(y.detach() * 100)
    return [y.detach(), *(g for g in torch.autograd.grad(y, [t for t in leaves if t.requires_grad], dy,
                                                         allow_unused=True) if g is not None)]  # fmt: skip


def _same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted):
        assert (a.dtype, a.device, a.shape, a.stride()) == (b.dtype, b.device, b.shape, b.stride())
        assert torch.equal(a, b)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda f: f.__name__)
def test_operators(
    operator: Callable[[], Made], setting: str, device: str, triton_runs: bool, counted: list[str]
) -> None:
    (function, given), backward = operator(), setting not in WITHOUT_GRADIENTS

    def run(under: contextlib.AbstractContextManager[Any]) -> tuple[list[Tensor], list[str]]:
        counted.clear()
        leaves = _leaves(given, device, backward)
        with under:
            return _results(function, leaves), list(counted)

    _forget()
    wanted, ran = run(contextlib.nullcontext())
    if triton_runs or operator in PASSES or (operator is conv_stage_evaluated and not backward):
        assert ran
    _forget()
    for under in (SETTINGS[setting](), contextlib.nullcontext()):
        found, runs = run(under)
        _same(found, wanted)
        assert runs == ran


def _network() -> nn.Module:
    layers = (
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, 8),
    )
    return nn.Sequential(*layers, nn.GELU()).to(memory_format=CL)


@pytest.mark.gate("torch")
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_fused_model(setting: str, counted: list[str]) -> None:
    """Compiled under the setting, and called without it."""
    model = _network()
    backward = setting not in WITHOUT_GRADIENTS
    x = torch.randn(4, 3, 8, 8).contiguous(memory_format=CL)

    def step(network: nn.Module) -> list[Tensor]:
        network.zero_grad()
        y = network(x)
        if not backward:
            return [y]
        y.square().sum().backward()
        return [y.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]

    with torch.set_grad_enabled(backward):
        wanted = step(model)
    fused = tkernels.fuse(_network())
    fused.load_state_dict({**model.state_dict(), **{n: t for n, t in _network().state_dict().items() if "running" in n
                                                    or "num" in n}})  # fmt: skip
    with SETTINGS[setting]():
        found = step(fused)
    assert counted
    with torch.set_grad_enabled(backward):
        again = step(fused)
    for results in (found, again):
        for a, b in zip(results, wanted, strict=True):
            assert (a.dtype, a.device) == (b.dtype, b.device)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.mark.gate("torch")
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda f: f.__name__)
def test_threads_changed_between_forward_and_backward(operator: Callable[[], Made], counted: list[str]) -> None:
    """Sums are taken in another order then; nothing else differs."""
    run, given = operator()
    results = []
    for before, after in ((1, 1), (1, 2), (2, 1)):
        counted.clear()
        leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in given]
        torch.set_num_threads(before)
        y = run(*leaves)
        torch.set_num_threads(after)
        y.backward(torch.ones_like(y) / 3)
        results.append(([y.detach(), *(t.grad for t in leaves if t.grad is not None)], list(counted)))
    torch.set_num_threads(1)
    for found, ran in results[1:]:
        assert ran == results[0][1]
        for a, b in zip(found, results[0][0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


@pytest.mark.gate("torch")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda f: f.__name__)
def test_a_forked_process(operator: Callable[[], Made], counted: list[str]) -> None:
    """After first use the child computes what its parent does."""
    run, given = operator()
    with torch.no_grad():
        wanted = _results(run, given)
        ran = list(counted)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.alarm(60)
                counted.clear()
                _same(_results(run, given), wanted)
                status = 0 if counted == ran else 2
            finally:
                os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
