"""The call sequence of core/operator.py: what is asked once a kind of call, and what makes another kind."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tkernels
from perf import host
from tests.test_counting import LAYER, MAPS, OPERATORS
from tkernels.core.operator import Operator
from tkernels.functional import conv2d, cross_entropy, linear
from tkernels.ops.conv import routing

pytestmark = pytest.mark.gate("torch")
FOLDERS = {name: name for name in OPERATORS} | {"conv2d": "conv"}


@pytest.fixture(autouse=True)
def on_a_gpu() -> Iterator[None]:
    with host.stubbed_driver(lambda *given: None):
        yield


def operator_of(name: str) -> Operator:
    found: Operator = importlib.import_module(f"tkernels.ops.{FOLDERS[name]}.op")._operator
    return found


@pytest.fixture
def asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the checks of the operator ``request.param`` answered."""
    answers: list[Any] = []
    operator = operator_of(request.param)
    check = operator.check

    def counting(*arguments: Any) -> Any:
        answers.append(check(*arguments))
        return answers[-1]

    monkeypatch.setattr(operator, "check", counting)
    return answers


@contextlib.contextmanager
def autocast(on: bool) -> Iterator[None]:
    torch.set_autocast_enabled("cuda", on)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("cast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize(("asked", "name"), [(name, name) for name in OPERATORS], indirect=["asked"], ids=OPERATORS)
def test_a_kind_of_call_is_checked_once(asked: list[Any], name: str, cast: bool) -> None:
    shape, function = OPERATORS[name]
    with autocast(cast):
        for _ in range(3):
            x = torch.zeros(shape, requires_grad=True)
            function(x).sum().backward()
        assert len(asked) == 1
        assert asked[0] is not None
        function(torch.zeros((2 * shape[0], *shape[1:]), requires_grad=True) if name != "cross_entropy" else x.detach())
        assert len(asked) == 2


@pytest.mark.parametrize("asked", ["linear"], indirect=True)
def test_who_wants_gradients_makes_another_kind(asked: list[Any]) -> None:
    x, w = torch.zeros(8, 32), torch.zeros(16, 32)
    for needs_input, needs_weight in ((False, False), (True, False), (False, True), (True, True)):
        for _ in range(2):
            y = linear(x.clone().requires_grad_(needs_input), w.clone().requires_grad_(needs_weight))
            assert y.requires_grad == (needs_input or needs_weight)
    with torch.no_grad():
        assert not linear(x.clone().requires_grad_(), w).requires_grad
    assert len(asked) == 5


def test_a_class_weight_that_comes_to_want_a_gradient_is_refused() -> None:
    x, target, weight = torch.zeros(8, 5), torch.zeros(8, dtype=torch.int64), torch.ones(5)
    cross_entropy(x, target, weight)
    with pytest.raises(RuntimeError, match="weight must not require grad"):
        cross_entropy(x, target, weight.requires_grad_())


@pytest.mark.parametrize("asked", ["conv2d"], indirect=True)
def test_what_goes_to_pytorch_is_remembered(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "compute_bound", lambda *_: True)
    went: list[str] = []
    monkeypatch.setattr(operator_of("conv2d"), "reference", lambda *_: went.append("torch"))
    for backend in ("auto", "triton"):
        with tkernels.backend(backend):
            for _ in range(2):
                conv2d(torch.zeros(MAPS), LAYER.weight, padding=1)
    assert went == ["torch", "torch"]
    assert [answer is None for answer in asked] == [True, False]


@pytest.mark.parametrize("asked", ["conv2d"], indirect=True)
def test_arguments_without_a_hash_are_checked_each_time(asked: list[Any]) -> None:
    padding: Any = [1, 1]
    for _ in range(2):
        assert conv2d(torch.zeros(MAPS), LAYER.weight, padding=padding).shape == MAPS
    assert len(asked) == 2
