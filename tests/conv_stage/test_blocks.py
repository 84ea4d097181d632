"""Residual blocks as fuse() calls them: a shortcut within the stage, a result for two readers, signs kept of a ReLU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tkernels
from tests.conv_stage.cases import CL, FIELDS, assert_no_gradient, close, doubled, layers_for, reference
from tests.tolerance import assert_close
from tkernels.core import plan
from tkernels.core.records import Route
from tkernels.functional import ConvBNLayer, conv_stage
from tkernels.ops.conv import routing
from tkernels.ops.conv_stage.op import residual_stage

pytestmark = pytest.mark.gate("torch", "ttsem", "cuda")

SPECS = [(8, 1, {"bias": False}), (64, 3, {"padding": 1, "stride": 2})]
OWN = [(64, 1, {"stride": 2, "bias": False})]


def block(dtype: torch.dtype, device: str, channels: int = 64) -> tuple[list[ConvBNLayer], ConvBNLayer, Tensor]:
    """(layers, shortcut, input)."""
    specs = [SPECS[0], (channels, *SPECS[1][1:])]
    (own,) = layers_for(16, [(channels, *OWN[0][1:])], dtype, device)
    x = torch.randn(3, 16, 7, 5).to(dtype).to(device).contiguous(memory_format=CL).requires_grad_()
    return layers_for(16, specs, dtype, device), own._replace(activation=None), x


def training(*layers: ConvBNLayer) -> list[ConvBNLayer]:
    return [layer._replace(training=True) for layer in layers]


def compare_block(
    device: str, dtype: torch.dtype, trained: bool, channels: int = 64, frozen_shortcut: bool = False
) -> None:
    """Twice read, forward and backward, against float64."""
    layers, own, x = block(dtype, device, channels)
    exact_layers, (exact_own,) = doubled(layers), doubled([own])
    exact_x = x.detach().cpu().double().requires_grad_()
    ours = training(*layers, own) if trained else [*layers, own]
    *given, given_own = ours
    if frozen_shortcut:
        given_own = own
    first, second = residual_stage(x, given, x, given_own, True)
    residual = reference(exact_x, [exact_own], dtype, training=trained and not frozen_shortcut)
    expected = reference(exact_x, exact_layers, dtype, training=trained, residual=residual)
    for y in (first, second):
        assert_close(y, expected, 8 * 9 * 60, name="y")
    assert first.data_ptr() == second.data_ptr() or not first.is_cuda
    dy, more = torch.randn(2, *expected.shape).to(dtype)
    torch.autograd.backward([first, second], [dy.to(device).contiguous(memory_format=CL), more.to(device)])
    expected.backward(dy.double() + more.double())
    assert x.grad is not None
    close(x.grad, exact_x.grad, 8 * 9 * 60, 12, dtype, "input gradient")
    for layer, exact in zip((*layers, own), (*exact_layers, exact_own)):
        measured = trained and not (frozen_shortcut and layer is own)
        for field, t, want in zip(FIELDS, layer, exact):
            if not isinstance(t, Tensor) or not isinstance(want, Tensor):
                continue
            if not t.requires_grad:
                assert_close(t, want, 8 * 9 * 60, dtype=dtype, name=field)
            elif field == "bias" and measured:
                assert_no_gradient(t, dy)
            else:
                close(t.grad, want.grad, 8 * 9 * 60, 12, dtype, field)  # type: ignore[arg-type]


@pytest.mark.parametrize("trained", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_equals_torch(dtype: torch.dtype, trained: bool, device: str) -> None:
    compare_block(device, dtype, trained)


def test_two_groups_of_signs(device: str) -> None:
    compare_block(device, torch.float32, True, channels=128)


def test_channels_that_have_no_signs(device: str) -> None:
    """Not in groups of SIGNS: the output is read instead."""
    compare_block(device, torch.float32, True, channels=20)


def test_a_frozen_shortcut(device: str) -> None:
    compare_block(device, torch.float32, True, frozen_shortcut=True)


def test_nothing_to_differentiate(device: str) -> None:
    """In evaluation a shortcut is a call as any; a stage that trains beside one that does not, too."""
    for trained in ((), (0, 1), (2,), (0, 1, 2)):
        layers, own, x = block(torch.float32, device)
        given = [layer._replace(training=i in trained) for i, layer in enumerate((*layers, own))]
        exact = doubled(given)
        with torch.no_grad():
            y = residual_stage(x, given[:2], x, given[2])
            image = x.detach().cpu().double()
            residual = reference(image, [exact[2]], torch.float32, training=False)
            expected = reference(image, exact[:2], torch.float32, training=False, residual=residual)
        assert_close(y, expected, 8 * 9 * 60, name=f"y, {trained} in training")


@pytest.mark.gate("ttsem", "cuda")
def test_launches(device: str, launches: list[str]) -> None:
    """One pass behind both batch norms, no addition, and the sums of two gradients in the pass that reads them."""
    layers, own, x = block(torch.float32, device)
    first, second = residual_stage(x, training(*layers), x, training(own)[0], True)
    assert launches.count("normalize_kernel") == 2, "behind the first layer, and behind both last ones"
    assert launches.count("conv_stage_kernel") + launches.count("pointwise_forward_kernel") == 3
    launches.clear()
    torch.autograd.backward([first, second], [torch.randn_like(first), torch.randn_like(second)])
    assert launches.count("gradient_sums_kernel") == 2
    assert launches.count("input_gradient_kernel") == 3
    made = [step for each in plan._plans.values.values() for step in each._steps]
    assert not any(step.function in (torch.add, Tensor.add, Tensor.__add__) for step in made)


@pytest.mark.gate("ttsem", "cuda")
@pytest.mark.parametrize(
    "route", (Route(True, True, True), Route(True, False, False), Route(False, True, True)), ids=str
)
def test_by_pytorchs_products(route: Route, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "of_stage", lambda *_: route)
    with tkernels.backend("auto"):
        compare_block(device, torch.bfloat16, True)


@pytest.mark.parametrize("seen", ("input", "weight", "own weight", "own bn_bias"))
def test_only_what_is_asked_for(seen: str, device: str, launches: list[str], triton_runs: bool) -> None:
    layers, own, x = block(torch.float32, device)
    leaves: dict[str, Any] = {"weight": layers[-1].weight, "own weight": own.weight, "own bn_bias": own.bn_bias}
    for t in [x, *(t for layer in (*layers, own) for t in layer[:4] if t is not None)]:
        t.requires_grad_(False)
    leaf = leaves.get(seen, x).requires_grad_()
    exact, (exact_own,), exact_x = doubled(layers), doubled([own]), x.detach().cpu().double()
    exact_leaves: dict[str, Any] = {
        "weight": exact[-1].weight, "own weight": exact_own.weight, "own bn_bias": exact_own.bn_bias
    }  # fmt: skip
    exact_leaf = exact_leaves.get(seen, exact_x).requires_grad_()
    y = residual_stage(x, training(*layers), x, training(own)[0])
    expected = reference(exact_x, exact, torch.float32, residual=reference(exact_x, [exact_own], torch.float32))
    dy = torch.randn(expected.shape)
    launches.clear()
    y.backward(dy.to(device))
    expected.backward(dy.double())
    close(leaf.grad, exact_leaf.grad, 8 * 9 * 60, 12, torch.float32, seen)
    if triton_runs:
        wanted = {"input": 0, "weight": 1, "own weight": 1, "own bn_bias": 0}[seen]
        assert launches.count("conv_wgrad_kernel") == wanted
        assert any("dgrad" in name for name in launches) == (seen == "input")


@pytest.mark.parametrize("values", ("ties", "nan"))
def test_signs_tell_what_the_output_tells(values: str, device: str) -> None:
    """Zero and below block the gradient, NaN lets it through, as torch.relu's derivative."""
    ones = torch.ones(64)
    layer = ConvBNLayer(torch.eye(64)[:, :, None, None], running_mean=torch.zeros(64), running_var=ones, eps=1e-30)
    layer = layer._replace(**{name: getattr(layer, name).to(device) for name in (FIELDS[0], *FIELDS[4:])})
    x = torch.randint(-1, 2, (2, 64, 3, 3)).float()
    residual = torch.randint(-1, 2, (2, 64, 3, 3)).float()
    if values == "nan":
        residual[0, 5, 1, 1] = residual[1, 63, 2, 2] = float("nan")
    given = [t.to(device).contiguous(memory_format=CL).requires_grad_() for t in (x, residual)]
    y = conv_stage(given[0], [layer], residual=given[1])
    expected = torch.relu(x + residual.requires_grad_())
    assert torch.equal(y.detach().cpu().nan_to_num(7.0), expected.detach().nan_to_num(7.0))
    y.backward(torch.ones_like(y))
    expected.backward(torch.ones_like(expected))
    assert given[1].grad is not None
    assert torch.equal(given[1].grad.cpu(), residual.grad)  # type: ignore[arg-type]


@pytest.mark.gate("ttsem", "cuda")
@pytest.mark.parametrize("activation", ("relu", "gelu"))
def test_places_of_maxima_that_are_kept_or_found_again(activation: str, device: str) -> None:
    """A byte a window, in eager calls, or another look at it, as traces take: the same, ties and NaN among them."""
    from tkernels.core.records import Norm
    from tkernels.ops.conv_stage import kernels, kernels_backward
    from tkernels.ops.conv_stage.op import described_pooling

    pool = described_pooling(7, 6, (3, 3), (2, 2), (1, 1))
    raw = torch.randint(-2, 3, (2, 20, 7, 6)).float()
    raw[0, 3, 2, 2] = raw[1, 7, 6, 5] = float("nan")
    raw = raw.to(device).contiguous(memory_format=CL)
    dy = torch.randn(2, 20, pool.out_h, pool.out_w).to(device).contiguous(memory_format=CL)
    norm = Norm(*(t.to(device) for t in (torch.zeros(20), torch.ones(20), torch.rand(20) + 0.5, torch.zeros(20))), 1e-5)
    taps = kernels.taps_like(raw, pool)
    assert taps is not None
    pooled = kernels.launch_end(raw, pool, norm, activation=activation, taps=taps)
    assert torch.equal(
        pooled.nan_to_num(7.0), kernels.launch_end(raw, pool, norm, activation=activation).nan_to_num(7.0)
    )
    sums, gradients = [], []
    for known in (taps, None):
        sums.append(kernels_backward.launch_end_sums(dy, raw, pool, norm, activation=activation, taps=known).data)
        gradients.append(
            kernels_backward.launch_end_gradient(dy, raw, pool, norm, None, activation=activation, taps=known)
        )
    assert torch.equal(sums[0].nan_to_num(7.0), sums[1].nan_to_num(7.0))
    assert_close(gradients[0].nan_to_num(7.0), gradients[1].cpu().double().nan_to_num(7.0), 4, name="gradient")


@pytest.mark.gate("ttsem", "cuda")
def test_a_stem_keeps_where_its_maxima_are(device: str) -> None:
    from tkernels.functional import MaxPool

    for pool, kept in ((MaxPool(3, 2, 1), 1), (MaxPool(2), 0), (MaxPool(17, 1, 8), 0)):
        plan.forget()
        (layer,) = layers_for(3, [(8, 3, {"padding": 1})], torch.float32, device)
        x = torch.randn(1, 3, 18, 18, device=device)
        conv_stage(x, [layer], pool, training=True)
        buffers = [b for made in plan._plans.values.values() for step in made._steps for b in step.buffers]
        assert [dtype for *_, dtype in buffers].count(torch.uint8) == kept, pool


@pytest.mark.gate("ttsem", "cuda")
@pytest.mark.parametrize("activation", (None, "leaky_relu"))
def test_a_padded_window_of_minus_infinity(activation: str | None, device: str) -> None:
    """Its maximum is its first pixel, none of the padding, as in torch.max_pool2d."""
    from tkernels.core.records import Norm
    from tkernels.ops.conv_stage import kernels, kernels_backward
    from tkernels.ops.conv_stage.op import described_pooling

    pool = described_pooling(7, 6, (3, 3), (2, 2), (1, 1))
    raw = torch.randn(1, 20, 7, 6)
    raw[0, 3] = float("-inf")
    _, places = torch.nn.functional.max_pool2d(raw, 3, 2, 1, return_indices=True)
    vectors = (torch.zeros(20), torch.ones(20), torch.ones(20), torch.zeros(20))
    norm = Norm(*(t.to(device) for t in vectors), 1e-30)
    raw = raw.to(device).contiguous(memory_format=CL)
    taps = kernels.taps_like(raw, pool)
    assert taps is not None
    kernels.launch_end(raw, pool, norm, activation=activation, taps=taps)
    tap = taps.cpu().int()
    rows = torch.arange(pool.out_h)[:, None] * 2 - 1 + tap // 3
    columns = torch.arange(pool.out_w)[None, :] * 2 - 1 + tap % 3
    assert torch.equal(rows * 6 + columns, places.int())
    dy = torch.randn(1, 20, pool.out_h, pool.out_w).to(device).contiguous(memory_format=CL)
    kernels_backward.launch_end_sums(dy, raw, pool, norm, activation=activation, taps=taps)
    found = [
        kernels_backward.launch_end_gradient(dy, raw, pool, norm, None, activation=activation, taps=known).cpu()
        for known in (taps, None)
    ]
    assert_close(found[0], found[1].double(), 4, name="gradient")
