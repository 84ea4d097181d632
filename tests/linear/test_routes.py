"""Products of a linear layer and of matmul that PyTorch computes: values, gradients, and who computed what."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import tkernels
from tests.routes import measured_passes
from tests.tolerance import assert_close
from tkernels.core import activation as activations
from tkernels.core import targets
from tkernels.core.records import OURS, Route
from tkernels.functional import linear, matmul
from tkernels.ops.linear import op as linear_op
from tkernels.ops.linear import routing
from tkernels.ops.matmul import op as matmul_op

pytestmark = pytest.mark.gate("ttsem", "cuda")

EVERY = [Route(*each) for each in itertools.product((False, True), repeat=3)]
OWN = {"forward": "linear_forward_kernel", "dgrad": "linear_dgrad_kernel", "wgrad": "linear_wgrad_kernel"}
PYTORCHS = {"forward": "_product", "dgrad": "_input_gradient", "wgrad": "_weight_gradient"}


@pytest.fixture
def ran(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was launched, and the names of PyTorch's products."""

    def spied(name: str) -> Any:
        product = getattr(linear_op, name)

        def spy(*tensors: Any) -> Any:
            if not tensors[0].is_meta:
                launches.append(name)
            return product(*tensors)

        return spy

    for name in PYTORCHS.values():
        monkeypatch.setattr(linear_op, name, spied(name))
    return launches


def names(route: Route) -> str:
    return "".join(name[0] if by_pytorch else "-" for name, by_pytorch in zip(Route._fields, route))


def check(x: Tensor, w: Tensor, b: Tensor | None, activation: str | None, p: float = 0.0) -> None:
    """Values and gradients against float64, dropout's factors read off the result."""
    leaves = [t.requires_grad_() for t in (x, w, b) if t is not None]
    exact = [t.detach().cpu().double().requires_grad_() for t in leaves]
    y = linear(x, w, b, activation, p, p > 0)
    z = torch.nn.functional.linear(*exact)
    expected = activations.apply(z, activation)
    if p:
        kept = y.detach().cpu() != 0
        share = (kept & (expected != 0)).sum() / (expected != 0).sum()
        assert 0.2 < share < 0.8
        expected = expected * kept / (1 - p)
    assert_close(y, expected, x.shape[-1], name="y")
    dy = torch.randn(y.shape).to(y.dtype)
    y.backward(dy.to(y.device))
    expected.backward(dy.double())
    for name, t, want in zip(("x", "w", "b"), leaves, exact):
        assert t.grad is not None
        assert want.grad is not None
        scale = want.grad.abs().max().item()
        assert_close(t.grad, want.grad, 4 * max(x.numel() // x.shape[-1], w.shape[0]), scale=scale, name=name)


@pytest.mark.parametrize("route", EVERY, ids=names)
@pytest.mark.parametrize(
    "activation, p, dtype",
    [
        ("relu", 0.0, torch.float32),
        ("gelu", 0.0, torch.bfloat16),
        (None, 0.5, torch.float32),
        ("relu", 0.5, torch.float32),
    ],
)
def test_each_pass_by_either(
    activation: str | None, p: float, dtype: torch.dtype, route: Route, device: str, ran: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(routing, "of_linear", lambda *_: route)
    x, w, b = (torch.randn(shape).to(dtype).to(device) for shape in ((5, 7, 24), (40, 24), (40,)))
    with tkernels.backend("auto"):
        check(x, w, b, activation, p)
    for field, theirs in route._asdict().items():
        # the bias's gradient is a launch of its own where the weight's is PyTorch's
        own = 1 if not theirs or field == "wgrad" else 0
        assert (ran.count(PYTORCHS[field]), ran.count(OWN[field])) == (int(theirs), own), field
    assert ran.count("linear_end_kernel") == route.forward
    assert ran.count("linear_mask_kernel") == (route.dgrad or route.wgrad)


def test_strided_operands_and_no_bias(device: str, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "of_linear", lambda *_: Route(True, True, True))
    x, w = torch.randn(3, 9, 24, device=device)[:, 1:7, 3:19], torch.randn(16, 40, device=device).t()
    with tkernels.backend("auto"):
        check(x.detach(), w.detach(), None, "silu")
    assert ran.count("linear_wgrad_kernel") == 0, "there is no bias to sum for"


def test_a_large_gradient_is_formed_once(device: str, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind an activation, where many tiles would each form it: under 'triton' too."""
    monkeypatch.setattr(routing, "LARGE_GRADIENT", 5 * 40)
    monkeypatch.setattr(routing, "MANY_TIMES", 0)
    x, w, b = (torch.randn(shape).to(device) for shape in ((5, 24), (40, 24), (40,)))
    check(x, w, b, "relu")
    assert launches.count("linear_mask_kernel") == launches.count("linear_dgrad_kernel") == 1
    launches.clear()
    check(x.detach(), w.detach(), b.detach(), None)
    assert not launches.count("linear_mask_kernel"), "nothing is fused"


def test_what_is_routed() -> None:
    hopper, bf16 = targets.TARGETS["sm_90"], (torch.bfloat16, "ieee")
    assert routing.of_linear(4096, 4096, 4096, *bf16, True, hopper) == Route(True, True, True)
    assert routing.of_linear(256, 256, 2048, *bf16, True, hopper) == OURS, "the CIFAR CNN's"
    assert routing.of_linear(4096, 4096, 4096, torch.float32, "ieee", True, hopper) == OURS
    assert routing.of_linear(4096, 4096, 4096, *bf16, True, targets.TARGETS["gfx942"]) == OURS
    assert routing.of_matmul(4096, 4096, 4096, *bf16, hopper)
    assert not routing.of_matmul(256, 256, 256, *bf16, hopper)
    assert not routing.of_matmul(4096, 4096, 4096, *bf16, targets.TARGETS["gfx1100"])
    for target in targets.TARGETS.values():
        found = routing.shares(target)
        assert found.source == "estimated" or found.source.startswith("measured: perf/results/")
        assert all(0 < share < 1 for share in found[1:])


def test_matmul_goes_whole(device: str, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "of_matmul", lambda *_: True)
    a, b = torch.randn(2, 5, 24, device=device), torch.randn(24, 16, device=device)
    matmul(a, b)
    assert launches == ["matmul_kernel"], "under 'triton' it is ours"
    launches.clear()
    went: list[str] = []
    monkeypatch.setattr(matmul_op._operator, "reference", lambda *_: went.append("torch"))
    with tkernels.backend("auto"):
        for _ in range(2):
            matmul(a, b)
    assert (went, launches) == (["torch", "torch"], [])


def test_autotuning_measures_each_product(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measured_passes(monkeypatch, "dgrad")
    x, w = torch.randn(8, 24, device=device), torch.randn(16, 24, device=device)
    with tkernels.backend("auto"):
        assert linear_op._route(x, w, x.dtype, True) == Route(False, True, False)
        assert not matmul_op._torch_is_faster(x, w.t(), x.dtype)
    assert asked == ["linear forward", "linear dgrad", "linear wgrad", "matmul"]


def test_backward_within_autocast_that_forward_did_not_see(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products stay in the dtype that forward chose."""
    monkeypatch.setattr(routing, "of_linear", lambda *_: Route(False, True, True))
    x, w = torch.randn(8, 32, device=device, requires_grad=True), torch.randn(16, 32, device=device, requires_grad=True)
    dy = torch.randn(8, 16)
    with tkernels.backend("auto"):
        y = linear(x, w)
    with torch.autocast("cuda", torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
        dx, dw = torch.autograd.grad(y, (x, w), dy.to(device))
    assert_close(dx, dy.double() @ w.detach().cpu().double(), 16, name="dx")
    assert_close(dw, dy.double().t() @ x.detach().cpu().double(), 8, name="dw")
