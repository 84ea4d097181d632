"""The call sequence of core/operator.py: what is asked once a kind of call, and what makes another kind."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tkernels
from perf.static import host
from tests.core.cases import HEADS, LAYER, MAPS, OPERATORS
from tkernels.core import autotune, plan
from tkernels.core.operator import Operator
from tkernels.core.records import Route
from tkernels.functional import batch_norm, conv2d, cross_entropy, linear, scaled_dot_product_attention
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


@pytest.mark.parametrize("asked", ["linear"], indirect=True)
def test_each_dtype_of_autocast_makes_another_kind(asked: list[Any]) -> None:
    x, w = torch.zeros(8, 32), torch.zeros(16, 32)
    before = torch.get_autocast_dtype("cuda")
    try:
        for dtype in (torch.float16, torch.bfloat16, torch.float16):
            torch.set_autocast_dtype("cuda", dtype)
            with autocast(True):
                assert linear(x, w).dtype is dtype
    finally:
        torch.set_autocast_dtype("cuda", before)
    assert len(asked) == 2


def test_a_class_weight_that_comes_to_want_a_gradient_is_refused() -> None:
    x, target, weight = torch.zeros(8, 5), torch.zeros(8, dtype=torch.int64), torch.ones(5)
    cross_entropy(x, target, weight)
    with pytest.raises(RuntimeError, match="weight must not require grad"):
        cross_entropy(x, target, weight.requires_grad_())


@pytest.mark.parametrize("asked", ["conv2d"], indirect=True)
def test_what_goes_to_pytorch_is_remembered(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "of_conv", lambda *_: Route(True, True, True))
    went: list[str] = []
    monkeypatch.setattr(operator_of("conv2d"), "reference", lambda *_: went.append("torch"))
    for backend in ("auto", "triton"):
        with tkernels.backend(backend):
            for _ in range(2):
                conv2d(torch.zeros(MAPS), LAYER.weight, padding=1)
    assert went == ["torch", "torch"]
    assert [answer is None for answer in asked] == [True, False]


@pytest.mark.parametrize("asked", ["conv2d"], indirect=True)
def test_a_tensor_as_an_argument_is_looked_at_each_time(asked: list[Any]) -> None:
    stride: Any = torch.tensor(1)
    for step, size in ((1, 8), (2, 4)):
        stride.fill_(step)
        assert conv2d(torch.zeros(MAPS), LAYER.weight, stride=stride, padding=1).shape[2] == size
        assert conv2d(torch.zeros(MAPS), LAYER.weight, stride=(stride, step), padding=1).shape[2] == size
    assert len(asked) == 4


def test_values_of_tensors_given_as_numbers_count() -> None:
    x, vectors, scale = torch.zeros(HEADS), [torch.zeros(16) for _ in range(2)], torch.tensor(0.5)
    made = []
    for value in (0.5, 2.0):
        scale.fill_(value)
        scaled_dot_product_attention(x, x, x, scale=scale)  # type: ignore[arg-type]
        batch_norm(torch.zeros(MAPS), *vectors, training=True, momentum=scale)  # type: ignore[arg-type]
        made.append(len(plan._plans))
    assert made == [2, 4]


@pytest.mark.parametrize("asked", ["conv2d"], indirect=True)
def test_a_list_is_what_it_holds(asked: list[Any]) -> None:
    padding: Any = [1, 1]
    for _ in range(2):
        assert conv2d(torch.zeros(MAPS), LAYER.weight, padding=padding).shape == MAPS
    padding[:] = [0, 0]
    assert conv2d(torch.zeros(MAPS), LAYER.weight, padding=padding).shape[2] == 6
    assert len(asked) == 2


@pytest.mark.parametrize("asked", ["cross_entropy"], indirect=True)
def test_nan_is_nan(asked: list[Any]) -> None:
    for _ in range(2):
        cross_entropy(torch.zeros(8, 5), torch.zeros(8, dtype=torch.int64), label_smoothing=float("nan"))
    assert len(asked) == 1


def test_equal_arguments_of_another_type_are_refused_whatever_came_before() -> None:
    x, vectors = torch.zeros(MAPS), [torch.zeros(16) for _ in range(2)]
    conv2d(x, LAYER.weight, stride=1, padding=(1, 1))
    batch_norm(x, *vectors, training=True)
    for wrong in ({"stride": 1.0}, {"stride": True}, {"groups": True}, {"padding": (1.0, 1)}):
        with pytest.raises(TypeError):
            conv2d(x, LAYER.weight, **({"padding": (1, 1)} | wrong))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        batch_norm(x, *vectors, training=1)  # type: ignore[arg-type]


def test_float32_products_count_where_autocast_makes_them() -> None:
    """Plans of bfloat16 tensors that are cast to float32 are plans of one way to form its products."""
    x, w = (torch.zeros(32, 32, dtype=torch.bfloat16) for _ in range(2))
    before = torch.get_autocast_dtype("cuda"), torch.backends.cuda.matmul.fp32_precision
    made = []
    try:
        torch.set_autocast_dtype("cuda", torch.float32)
        with autocast(True):
            for precision in ("ieee", "tf32", "ieee"):
                torch.backends.cuda.matmul.fp32_precision = precision
                linear(x, w)
                made.append(len(plan._plans))
    finally:
        torch.set_autocast_dtype("cuda", before[0])
        torch.backends.cuda.matmul.fp32_precision = before[1]
    assert made == [1, 2, 2]


@pytest.mark.parametrize("asked", ["conv2d"], indirect=True)
def test_what_a_capture_cannot_measure_is_asked_again(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "enabled", True)
    monkeypatch.setattr(autotune, "capturing", lambda: True)
    monkeypatch.setattr(autotune, "pick", lambda name, batch, shape, first, *_, **__: first)
    monkeypatch.setattr(autotune, "torch_is_faster", lambda *_: False)
    for capturing in (True, True, False, False):
        monkeypatch.setattr(autotune, "capturing", lambda now=capturing: now)
        conv2d(torch.zeros(MAPS), LAYER.weight, padding=1)
    assert len(asked) == 3


def test_inference_writes_no_input_of_the_activation() -> None:
    with torch.no_grad():
        linear(torch.zeros(8, 32), torch.zeros(16, 32), None, "gelu")
    (made,) = plan._plans.values.values()
    assert sum(len(step.buffers) for step in made._steps) == 1


def test_dropout_behind_a_bias_of_many_axes_draws_once() -> None:
    x, w, bias = torch.ones(4, 32), torch.ones(16, 32), torch.zeros(4, 16)
    torch.manual_seed(0)
    linear(x, w, bias, None, 0.5, True)
    ours = torch.rand(4)
    torch.manual_seed(0)
    torch.nn.functional.dropout(torch.ones(4, 16), 0.5)
    assert torch.equal(ours, torch.rand(4))
