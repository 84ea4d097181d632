"""Products of a conv stage that PyTorch computes inside our passes: values, gradients, and who computed what."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tkernels
from perf.static.cases import window
from tests.conv_stage.cases import CL, activated, compare, layers_for
from tests.routes import measured_passes
from tkernels.core.records import Route
from tkernels.functional import conv_stage
from tkernels.ops.conv import aten, routing
from tkernels.ops.conv_stage import routes

pytestmark = pytest.mark.gate("ttsem", "cuda")

EVERY = [Route(*each) for each in itertools.product((False, True), repeat=3)]
OWN = {
    "forward": ("conv_stage_kernel", "conv_forward_kernel", "pointwise_forward_kernel"),
    "dgrad": ("conv_dgrad_kernel", "conv_stage_dgrad_kernel"),
    "wgrad": ("conv_wgrad_kernel", "pointwise_wgrad_kernel"),
}


@pytest.fixture
def ran(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was launched, and "aten forward", "aten dgrad" and "aten wgrad" for PyTorch's products."""
    forward, gradients = aten._forward, aten._gradients

    def spy_forward(x: Any, *rest: Any) -> Any:
        if not x.is_meta:
            launches.append("aten forward")
        return forward(x, *rest)

    def spy_gradients(dy: Any, x: Any, weight: Any, g: Any, wanted: Any) -> Any:
        launches.append("aten dgrad" if wanted[0] else "aten wgrad")
        return gradients(dy, x, weight, g, wanted)

    monkeypatch.setattr(aten, "_forward", spy_forward)
    monkeypatch.setattr(aten, "_gradients", spy_gradients)
    # plans are run twice and their bits compared
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield launches
    torch.use_deterministic_algorithms(before, warn_only=before)


def by_pytorch(ran: list[str]) -> list[str]:
    return [name.removeprefix("aten ") for name in ran if name.startswith("aten")]


def names(route: Route) -> str:
    return "".join(name[0] if by_pytorch else "-" for name, by_pytorch in zip(Route._fields, route))


@pytest.mark.parametrize("route", EVERY, ids=names)
@pytest.mark.parametrize(
    "name, training, dtype",
    [
        ("rgb, 2 layers, pool", True, torch.float32),
        ("rgb, 2 layers, pool", False, torch.float32),
        ("bottleneck", True, torch.bfloat16),
    ],
)
def test_each_pass_by_either(
    name: str, training: bool, dtype: torch.dtype, route: Route, device: str, ran: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """All layers' by one route: the values are float64's, and each product has been computed once, by whom it says."""
    monkeypatch.setattr(routing, "of_stage", lambda *_: route)
    layers = 4 if name == "bottleneck" else 2
    with tkernels.backend("auto"):
        compare(name, device, dtype, training=training, memory_format=CL)
    for field, theirs in route._asdict().items():
        own = sum(ran.count(kernel) for kernel in OWN[field])
        # where running statistics normalise, biases have a gradient, which is ours
        sums = layers if theirs and field == "wgrad" and not training else 0
        assert (ran.count(f"aten {field}"), own) == ((layers, sums) if theirs else (0, layers)), field


@pytest.mark.parametrize("training", (True, False))
def test_a_route_of_its_own_for_each_layer(
    training: bool, device: str, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = iter([Route(True, False, True), Route(False, True, False)])
    monkeypatch.setattr(routing, "of_stage", lambda *_: next(mixed))
    with tkernels.backend("auto"):
        compare("rgb, 2 layers, pool", device, training=training)
    assert by_pytorch(ran) == ["forward", "dgrad", "wgrad"]
    dgrads = ran.count("conv_dgrad_kernel") + ran.count("conv_stage_dgrad_kernel")
    assert (ran.count("conv_wgrad_kernel"), dgrads) == (1 if training else 2, 1)


def test_with_a_residual_grouped_and_strided(device: str, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Depthwise layers stay ours whatever a route says of others."""
    real = routing.of_stage
    monkeypatch.setattr(
        routing, "of_stage", lambda g, *rest: real(g, *rest) if g.depthwise else Route(True, True, True)
    )
    with tkernels.backend("auto"):
        compare("strided, grouped, depthwise", device, adds=True, change=activated("relu", "silu"))
    assert sorted(by_pytorch(ran)) == ["dgrad"] * 3 + ["forward"] * 3 + ["wgrad"] * 3


def test_gradients_lie_as_parameters_do(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 parameters beside 16-bit maps, contiguous ones beside maps in NHWC."""
    monkeypatch.setattr(routing, "of_stage", lambda *_: Route(True, True, True))
    layers = layers_for(16, [(8, 3, {"padding": 1})], torch.float32, device)
    x = torch.randn(2, 16, 5, 4, device=device).contiguous(memory_format=CL)
    with tkernels.backend("auto"), torch.autocast("cuda" if x.is_cuda else "cpu", torch.bfloat16):
        y = conv_stage(x, layers, training=True)
    y.float().sum().backward()
    gradient = layers[0].weight.grad
    assert gradient is not None
    assert (gradient.dtype, gradient.stride()) == (torch.float32, layers[0].weight.stride())


def test_under_triton_all_are_ours(device: str, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "of_stage", lambda *_: Route(True, True, True))
    compare("one layer, no end", device)
    assert not by_pytorch(ran)


def test_autotuning_measures_each_pass(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both bodies of each pass run for the clock, once a shape."""
    asked = measured_passes(monkeypatch, "wgrad")
    (layer,) = layers_for(16, [(8, 3, {"padding": 1})], torch.float32, device)
    x = torch.randn(2, 16, 5, 4, device=device)
    from tkernels.ops.conv_stage.op import _geometries

    (g,) = _geometries(x, [layer])
    with tkernels.backend("auto"):
        assert routes._of_layer(x, g, torch.float32, True) == Route(False, False, True)
    assert asked == ["conv_stage forward", "conv_stage dgrad", "conv_stage wgrad"]


def test_what_autotuning_times_computes_the_product(device: str, ran: list[str]) -> None:
    """A plan leaves out what nobody takes: the clock must not be shown an empty one."""
    g = window(16, 8, 5)
    for (ours, theirs), name in zip(routes._calls(torch.randn(2, 16, 5, 5, device=device), g, torch.float32), OWN):
        ran.clear()
        ours()
        assert any(kernel in ran for kernel in OWN[name]), name
        ran.clear()
        theirs()
        assert f"aten {name}" in ran


def test_the_image_of_a_stem_under_autocast(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept as it lies for our weight's gradient; PyTorch's product of the input's gets none of another dtype."""
    given: list[torch.dtype] = []
    real = aten._gradients

    def spy(dy: Any, x: Any, weight: Any, g: Any, wanted: Any) -> Any:
        given.extend(t.dtype for t in (dy, x, weight))
        return real(dy, x, weight, g, wanted)

    monkeypatch.setattr(aten, "_gradients", spy)
    monkeypatch.setattr(routing, "of_stage", lambda *_: Route(False, True, False))
    layers = layers_for(4, [(8, 3, {"padding": 1})], torch.float32, device)
    x = torch.randn(2, 4, 6, 6, device=device, requires_grad=True)
    with tkernels.backend("auto"), torch.autocast("cuda" if x.is_cuda else "cpu", torch.bfloat16):
        y = conv_stage(x, layers, training=True)
    y.float().sum().backward()
    assert set(given) == {torch.bfloat16}
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
