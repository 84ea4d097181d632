"""Gradients of a lone convolution that PyTorch computes behind our forward: values, and who computed what."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import tkernels
from tests.routes import measured_passes
from tests.tolerance import assert_close
from tkernels.core import activation as activations
from tkernels.core import mode
from tkernels.core.geometry import no_pooling
from tkernels.core.records import Route, StageCall
from tkernels.functional import conv2d
from tkernels.ops.conv import aten, routing
from tkernels.ops.conv import op as conv_op
from tkernels.ops.conv_stage import routes

pytestmark = pytest.mark.gate("ttsem", "cuda")

CL = torch.channels_last
GRADIENTS = [Route(False, *each) for each in itertools.product((False, True), repeat=2)]


@pytest.fixture
def ran(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was launched, and "aten dgrad" and "aten wgrad" for PyTorch's products."""
    gradients = aten._gradients

    def spy(dy: Any, x: Any, weight: Any, g: Any, wanted: Any) -> Any:
        launches.append("aten dgrad" if wanted[0] else "aten wgrad")
        return gradients(dy, x, weight, g, wanted)

    monkeypatch.setattr(aten, "_gradients", spy)
    # plans are run twice and their bits compared
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield launches
    torch.use_deterministic_algorithms(before, warn_only=before)


def check(x: Tensor, w: Tensor, b: Tensor | None, activation: str | None, **window: Any) -> None:
    leaves = [t.requires_grad_() for t in (x, w, b) if t is not None]
    exact = [t.detach().cpu().double().requires_grad_() for t in leaves]
    y = conv2d(x, w, b, activation=activation, **window)
    expected = activations.apply(torch.nn.functional.conv2d(*exact, **window), activation)
    assert_close(y, expected, w[0].numel(), name="y")
    dy = torch.randn(y.shape).to(y.dtype)
    y.backward(dy.to(y.device))
    expected.backward(dy.double())
    for name, t, want in zip(("x", "w", "b"), leaves, exact):
        assert t.grad is not None
        assert want.grad is not None
        assert (t.grad.dtype, t.grad.stride()) == (t.dtype, t.stride()), name
        scale = want.grad.abs().max().item()
        assert_close(t.grad, want.grad, 4 * max(dy.numel() // dy.shape[1], 9 * dy.shape[1]), scale=scale, name=name)


@pytest.mark.parametrize("route", GRADIENTS, ids=lambda route: "".join("-P"[by_pytorch] for by_pytorch in route[1:]))
@pytest.mark.parametrize("activation", (None, "relu", "gelu"))
@pytest.mark.parametrize("layout", (CL, torch.contiguous_format), ids=("nhwc", "nchw"))
def test_each_gradient_by_either(
    layout: torch.memory_format, activation: str | None, route: Route, device: str, ran: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(routing, "of_conv", lambda *_: route)
    x = torch.randn(2, 16, 7, 5, device=device).contiguous(memory_format=layout)
    w, b = torch.randn(24, 8, 3, 3, device=device).contiguous(memory_format=layout), torch.randn(24, device=device)
    with tkernels.backend("auto"):
        check(x, w, b, activation, stride=2, padding=1, groups=2)
    counts = [ran.count(name) for name in ("aten dgrad", "aten wgrad", "conv_dgrad_kernel")]
    assert counts == [route.dgrad, route.wgrad, not route.dgrad]
    # the bias's gradient is ours
    assert ran.count("conv_wgrad_kernel") == 1
    assert ran.count("conv_forward_kernel") == 1


def test_images_half_precision_and_no_bias(device: str, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With few channels forward takes the image as it lies, of any dtype under autocast; PyTorch's gradients do not."""
    monkeypatch.setattr(routing, "of_conv", lambda *_: Route(False, True, True))
    x, w = torch.randn(2, 3, 7, 5, device=device), torch.randn(8, 3, 3, 3, device=device)
    with tkernels.backend("auto"):
        check(x.bfloat16(), w.bfloat16(), None, "relu", padding=1)
        with torch.autocast("cuda" if x.is_cuda else "cpu", torch.bfloat16):
            y = conv2d(x, w.requires_grad_(), padding=1)
        y.float().sum().backward()
    assert (y.dtype, w.grad.dtype if w.grad is not None else None) == (torch.bfloat16, torch.float32)
    assert ran.count("aten wgrad") == 2
    assert ran.count("conv_wgrad_kernel") == 0


@pytest.mark.parametrize("seen", ("x", "w", "b"))
def test_only_what_is_asked_for(seen: str, device: str, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "of_conv", lambda *_: Route(False, True, True))
    tensors = {
        "x": torch.randn(2, 16, 5, 5, device=device), "w": torch.randn(8, 16, 3, 3, device=device),
        "b": torch.randn(8, device=device),
    }  # fmt: skip
    tensors[seen].requires_grad_()
    with tkernels.backend("auto"):
        conv2d(*tensors.values()).sum().backward()
    asked = {"x": "aten dgrad", "w": "aten wgrad", "b": "conv_wgrad_kernel"}
    assert [name for name in ran if name in asked.values()] == [asked[seen]]


def test_forward_by_pytorch_is_all_by_pytorch(
    device: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "of_conv", lambda *_: Route(True, False, False))
    with tkernels.backend("auto"):
        check(torch.randn(2, 8, 5, 5, device=device), torch.randn(8, 8, 3, 3, device=device), None, "relu")
    assert not launches


def test_where_cudnn_is_turned_off_products_are_ours(
    device: str, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own are slow. In calls that are known, in a stage, in traces."""
    monkeypatch.setattr(routing, "of_conv", lambda *_: Route(True, True, True))
    x, w = torch.randn(2, 16, 5, 5, device=device), torch.randn(8, 16, 3, 3, device=device)
    large = torch.empty(256, 256, 14, 14, dtype=torch.bfloat16, device="meta")
    g = conv_op.geometry(tuple(large.shape), (256, 256, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    stage = StageCall((g,), no_pooling(14, 14), large.dtype, 0.0, True, ("relu",))

    def launched() -> int:
        ran.clear()
        for _ in range(2):
            assert_close(conv2d(x, w, padding=1), torch.nn.functional.conv2d(x, w, padding=1).double(), 144)
        return ran.count("conv_forward_kernel")

    # (not by torch.backends.cudnn.flags, which sets how float32 is multiplied too)
    switch = torch._C._set_cudnn_enabled
    try:
        for enabled in (True, False, True):
            switch(enabled)
            with tkernels.backend("auto"):
                assert launched() == (0 if enabled else 2)
                for traced in (False, True):
                    with monkeypatch.context() as patch:
                        patch.setattr(mode, "traced", lambda traced=traced: traced)
                        assert any(conv_op.route(x, w, None, g, x.dtype, None)) == enabled
                        assert any(map(any, routes.of(large, stage, [True]))) == enabled
    finally:
        switch(True)


def test_autotuning_measures_each_pass(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measured_passes(monkeypatch, "wgrad")
    x, w = torch.randn(2, 16, 5, 5, device=device), torch.randn(8, 16, 3, 3, device=device)
    g = conv_op.geometry((2, 16, 5, 5), (8, 16, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    with tkernels.backend("auto"):
        assert conv_op.route(x, w, None, g, x.dtype, "relu") == Route(False, False, True)
    assert asked == ["conv2d forward", "conv2d dgrad", "conv2d wgrad"]


@pytest.mark.parametrize("differentiated", (True, False))
def test_a_large_layer_is_routed_by_the_table(differentiated: bool, device: str, ran: list[str]) -> None:
    """The chooser itself: with a bias PyTorch's forward has a pass more, and its gradients are ahead."""
    g = conv_op.geometry((256, 64, 56, 56), (256, 64, 1, 1), (1, 1), (0, 0), (1, 1), 1)
    x = torch.empty(256, 64, 56, 56, dtype=torch.bfloat16, device="meta")
    w = torch.empty(256, 64, 1, 1, dtype=torch.bfloat16, device="meta", requires_grad=differentiated)
    b = torch.empty(256, dtype=torch.bfloat16, device="meta")
    with tkernels.backend("auto"):
        assert conv_op.route(x, w, b, g, x.dtype, None) == Route(False, differentiated, differentiated)
        assert conv_op.route(x, w, None, g, x.dtype, None) == Route(True, differentiated, differentiated)
    assert conv_op.route(x, w, b, g, x.dtype, None) == Route(), "under 'triton'"


def test_even_windows_that_are_padded_on_one_side_stay_ours(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's products know symmetric padding alone. In traces too, where the chooser is asked about other sizes."""
    monkeypatch.setattr(routing, "of_conv", lambda *_: Route(False, True, True))
    monkeypatch.setattr(routing, "of_stage", lambda *_: Route(True, True, True))
    g = conv_op.geometry((2, 8, 6, 6), (8, 8, 2, 2), (1, 1), "same", (1, 1), 1)
    assert not g.symmetric
    x, w = torch.randn(2, 8, 6, 6, device=device), torch.randn(8, 8, 2, 2, device=device)
    stage = StageCall((g,), no_pooling(6, 6), x.dtype, 0.0, True, ("relu",))
    for traced in (False, True):
        monkeypatch.setattr(mode, "traced", lambda traced=traced: traced)
        with tkernels.backend("auto"):
            assert conv_op.route(x, w, None, g, x.dtype, None) == Route()
            assert not any(by_pytorch for each in routes.of(x, stage, [True]) for by_pytorch in each) or not traced
