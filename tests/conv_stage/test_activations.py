"""conv_stage with activations other than ReLU, and with a residual, against torch's own operators in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conv_stage.cases import CASES, CL, FIELDS, activated, close, compare, doubled, layers_for, reference
from tests.tolerance import assert_close
from tkernels.core import activation as activations
from tkernels.core import plan
from tkernels.functional import ConvBNLayer, conv_stage

pytestmark = pytest.mark.gate("torch", "ttsem", "cuda")

SLOW = pytest.mark.extended("ttsem")


@pytest.mark.parametrize("training", (True, pytest.param(False, marks=SLOW)))
@pytest.mark.parametrize("activation", [name for name in activations.ACTIVATIONS if name != "relu"])
def test_activations(activation: str | None, training: bool, device: str) -> None:
    """In the input gradient's epilogue, and where the end pools: windows' maxima are those of activated values."""
    compare("rgb, 2 layers, pool", device, training=training, change=activated(activation))


@pytest.mark.parametrize("names, case, dtype", [
    # overlapping windows; a stage without end; depthwise layers; dropout
    (("silu",), "stem", torch.float32),
    (("hardswish",), "one layer, no end", torch.float32),
    ((None,), "one layer, no end", torch.float32),
    (("relu6", "gelu", "silu", None), "strided, grouped, depthwise", torch.float32),
    (("leaky_relu", "hardswish", "silu"), "3 layers, dropout", torch.float32),
    # formed in the prologues of 1x1 layers
    (("hardswish", "leaky_relu", "silu", "relu6"), "bottleneck", torch.float32),
    (("silu",), "bottleneck", torch.bfloat16),
    ((None, "hardswish"), "rgb, 2 layers, pool", torch.bfloat16),
])  # fmt: skip
def test_mixed_activations(names: Any, case: str, dtype: torch.dtype, device: str) -> None:
    compare(case, device, dtype, CL, change=activated(*names))


def test_no_activation_before_a_pointwise_layer(device: str) -> None:
    """Batch norm's bias is left out: the next layer's statistics would take it away again."""
    change = activated("relu", None)
    compare("bottleneck", device, change=lambda layers: [layer._replace(bn_bias=None) for layer in change(layers)])


def test_evaluation_with_activations(device: str) -> None:
    """By running statistics, where backward asks for the raw maps and where nothing does."""
    change = activated("silu", "relu6", "hardswish", None)
    compare("strided, grouped, depthwise", device, training=False, change=change)
    for name in ("strided, grouped, depthwise", "stem"):
        shape, specs, arguments = CASES[name]
        layers = change(layers_for(shape[1], specs, torch.float32, device, grad=False))
        x = torch.randn(shape, device=device)
        y = conv_stage(x, layers, **arguments)
        expected = reference(x.cpu().double(), doubled(layers), torch.float32, arguments.get("pool"), training=False)
        assert_close(y, expected, 9 * 20 * 63, name=name)


def test_pooling_comes_after_an_activation_that_falls(device: str) -> None:
    """silu falls below -1.28: the largest raw value is not the largest activation there."""
    ones = torch.ones(1, device=device)
    layer = ConvBNLayer(
        ones[:, None, None, None], running_mean=0 * ones, running_var=ones, eps=1e-30, activation="silu"
    )
    x = torch.tensor([-1.5, -8.0, -7.0, -1.4], device=device).view(1, 1, 2, 2).requires_grad_()
    y = conv_stage(x, [layer], 2)
    y.sum().backward()
    assert_close(y, F.silu(torch.tensor([[[[-8.0]]]]).double()), name="y")
    assert x.grad is not None
    assert x.grad.flatten().nonzero().flatten().tolist() == [1]


ADDED = ("strided, grouped, depthwise", "one layer, no end")


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("name, names", [
    *[(ADDED[1], (activation,)) for activation in ("relu", None, "silu", "relu6")],
    (ADDED[0], ("silu", None, "relu", "hardswish")), (ADDED[0], ("relu",)),
])  # fmt: skip
def test_residual(name: str, names: Any, training: bool, device: str) -> None:
    compare(name, device, training=training, change=activated(*names), adds=True)


@pytest.mark.parametrize("names", (("relu",), (None,), ("hardswish",)))
def test_residual_in_half_precision_and_channels_last(names: Any, device: str) -> None:
    compare("one layer, no end", device, torch.bfloat16, CL, change=activated(*names), adds=True)


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("activation", ("relu", None, "silu"))
@pytest.mark.parametrize("seen", ("residual", "weight", "bn_bias", "nothing"))
def test_residual_and_only_what_is_asked_for(
    seen: str, activation: str | None, training: bool, device: str, launches: list[str], triton_runs: bool
) -> None:
    """One pass more in backward at most, and none forward."""
    layers = layers_for(16, [(8, 3, {"padding": 1}), (16, 1, {})], torch.float32, device, grad=False)
    layers = activated("relu", activation)(layers)
    exact_layers = doubled(layers)
    x = torch.randn(2, 16, 5, 4, device=device).contiguous(memory_format=CL)
    residual = torch.randn(2, 16, 5, 4, device=device).contiguous(memory_format=CL)
    exact_residual = residual.cpu().double()
    for some, added in ((layers, residual), (exact_layers, exact_residual)):
        if seen == "residual":
            added.requires_grad_()
        elif seen != "nothing":
            getattr(some[-1], seen).requires_grad_()
    launches.clear()
    y = conv_stage(x, layers, training=training, residual=residual)
    forward = list(launches)
    expected = reference(x.cpu().double(), exact_layers, torch.float32, None, None, training, exact_residual)
    assert_close(y, expected, 16 * 40, name="y")
    assert y.requires_grad == (seen != "nothing")
    if triton_runs and training:
        product = "pointwise_forward_kernel" if "pointwise_forward_kernel" in forward else "conv_stage_kernel"
        assert forward[-3:] == [product, "finalize_statistics_kernel", "normalize_kernel"]
    elif triton_runs and seen == "nothing":
        assert forward == ["pack_pair_kernel", "conv_stage_kernel", "conv_stage_kernel"]
    if seen == "nothing":
        return
    launches.clear()
    dy = torch.randn(y.shape)
    y.backward(dy.to(device).contiguous(memory_format=CL))
    expected.backward(dy.double())
    got, want = (residual, exact_residual) if seen == "residual" else (
        getattr(some[-1], seen) for some in (layers, exact_layers)
    )  # fmt: skip
    close(got.grad, want.grad, 16 * 40, 8, torch.float32, seen)
    if triton_runs and seen == "residual":
        assert launches == ([] if activation is None else ["input_gradient_kernel"])
    if triton_runs and seen == "bn_bias":
        assert launches == ["gradient_sums_kernel", "finalize_gradients_kernel"]


def test_residual_under_autocast(device: str) -> None:
    """It is rounded to the maps' dtype; its gradient has its own."""
    layers = activated(None)(layers_for(16, [(8, 1, {})], torch.float32, device))
    x = torch.randn(2, 16, 4, 5, device=device)
    residual = torch.randn(2, 8, 4, 5, device=device, requires_grad=True)
    for _ in range(3):
        with torch.autocast("cuda" if x.is_cuda else "cpu", torch.bfloat16):
            y = conv_stage(x, layers, training=True, residual=residual)
        assert y.dtype == torch.bfloat16
        (gradient,) = torch.autograd.grad(y.float().sum(), residual)
        assert torch.equal(gradient, torch.ones_like(residual))


@pytest.mark.gate("ttsem", "cuda")
@pytest.mark.parametrize("activation", ("relu", None, "silu"))
def test_residual_by_one_plan(activation: str | None, device: str) -> None:
    """Other values are right at every call of a kind."""
    layers = activated(activation)(layers_for(6, [(6, 1, {})], torch.float32, device))
    for _ in range(4):
        x, residual = (torch.randn(2, 6, 5, 4, device=device, requires_grad=True) for _ in range(2))
        exact_x, exact_residual = (t.detach().cpu().double().requires_grad_() for t in (x, residual))
        y = conv_stage(x, layers, training=True, residual=residual)
        expected = reference(exact_x, doubled(layers), torch.float32, residual=exact_residual)
        assert_close(y, expected, 6 * 40, name="y")
        found = torch.autograd.grad(y.square().sum(), (x, residual))
        for t, want in zip(found, torch.autograd.grad(expected.square().sum(), (exact_x, exact_residual))):
            close(t, want, 6 * 40, 8, torch.float32, "gradient")
    assert len(plan._plans.values) == 2


def test_residual_that_is_the_input(device: str) -> None:
    """An identity block adds what it was given."""
    (layer,) = layers_for(6, [(6, 3, {"padding": 1})], torch.float32, device)
    (exact,) = doubled([layer])
    for _ in range(4):
        x = torch.randn(2, 6, 5, 4, device=device, requires_grad=True)
        exact_x = x.detach().cpu().double().requires_grad_()
        y = conv_stage(x, [layer], training=True, residual=x)
        expected = reference(exact_x, [exact], torch.float32, residual=exact_x)
        assert_close(y, expected, 9 * 6 * 40, name="y")
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        (want,) = torch.autograd.grad(expected.square().sum(), exact_x)
        close(dx, want, 9 * 6 * 40, 8, torch.float32, "input gradient")


@pytest.mark.gate("torch")
@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("names, adds", [(("relu",), False), (("silu", "hardswish"), True), ((None, "relu6"), True)])
def test_gradcheck(names: Any, adds: bool, training: bool) -> None:
    layers = doubled(activated(*names)(layers_for(2, [(3, 3, {"padding": 1}), (2, 1, {})], torch.float32, "cpu")))
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True) if adds else None
    leaves = [t for layer in layers for t in layer[:4] if t is not None]

    def call(x: Tensor, residual: Tensor | None, *rest: Tensor) -> Tensor:
        taken = iter(rest)
        some = [layer._replace(**{name: next(taken) for name in FIELDS[:4]}) for layer in layers]
        return conv_stage(x, some, None if adds else 2, training=training, residual=residual)

    assert torch.autograd.gradcheck(call, (x, residual, *leaves))
    if adds:
        assert torch.autograd.gradgradcheck(call, (x, residual, *leaves))


@pytest.mark.gate("torch")
def test_a_float64_stage_under_autocast() -> None:
    """Autocast leaves float64 as it is; a residual of it in a smaller stage comes to the maps' dtype."""
    (small,) = layers_for(3, [(4, 1, {})], torch.float32, "cpu")
    (layer,) = doubled([small])
    x, residual = (torch.randn(2, c, 5, 5, dtype=torch.float64) for c in (3, 4))
    want = conv_stage(x, [layer], training=True, residual=residual)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(conv_stage(x, [layer], training=True, residual=residual), want)
        assert conv_stage(x.float(), [small], training=True, residual=residual).dtype is torch.bfloat16
