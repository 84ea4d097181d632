"""What the PyTorch bodies of single operators do on a CPU for small calls: no more than torch's own functions, and less
memory. Times are measured by ``python -m perf sweep --shapes spread``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tkernels.functional as TF
from tests.tolerance import assert_close
from tkernels.core import activation
from tkernels.cpu import product

pytestmark = pytest.mark.gate("torch")

Call = Callable[[], Tensor]


def _leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def _pairs() -> dict[str, tuple[list[Tensor], Call, Call]]:
    """Of each operator what wants a gradient, our call and torch's."""
    x, w, b = _leaf(5, 4), _leaf(3, 4), _leaf(3)
    image, filters = _leaf(2, 3, 6, 6), _leaf(4, 3, 3, 3)
    mean, var, scale, shift = torch.zeros(3), torch.ones(3), _leaf(3), _leaf(3)
    logits, target = _leaf(6, 5), torch.randint(5, (6,))
    norm = image, mean, var, scale, shift, True
    return {
        "linear_relu": ([x, w, b], lambda: TF.linear_relu(x, w, b), lambda: F.relu(F.linear(x, w, b))),
        "conv2d_relu": (
            [image, filters],
            lambda: TF.conv2d(image, filters, activation="relu"),
            lambda: F.relu(F.conv2d(image, filters)),
        ),
        "batch_norm_relu": (
            [image, scale, shift],
            lambda: TF.batch_norm(*norm, activation="relu"),
            lambda: F.relu(F.batch_norm(*norm)),
        ),
        "cross_entropy": ([logits], lambda: TF.cross_entropy(logits, target), lambda: F.cross_entropy(logits, target)),
    }


def _aten(call: Call, leaves: list[Tensor]) -> list[str]:
    """The ATen calls of forward and backward."""
    torch.autograd.grad(call().sum(), leaves)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(call().sum(), leaves)
    # neither allocations nor what the test run's filling of fresh memory adds
    others = ("aten::empty", "aten::resize_", "aten::fill_")
    return [e.name for e in profile.events() if e.name.startswith("aten::") and not e.name.startswith(others)]


def _saved(call: Call) -> int:
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(kept.values())


@pytest.mark.parametrize("name", _pairs())
def test_a_small_call_is_torch_s_calls(name: str) -> None:
    """Each ATen call torch makes and none besides."""
    leaves, *calls = _pairs()[name]
    ours, torchs = (_aten(call, leaves) for call in calls)
    assert ours == torchs


@pytest.mark.parametrize("name", ("linear_relu", "conv2d_relu", "batch_norm_relu"))
def test_of_a_larger_call_relu_takes_the_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "IN_PLACE", 1)
    leaves, *calls = _pairs()[name]
    ours, torchs = (_aten(call, leaves) for call in calls)
    in_place = {"aten::relu": "aten::relu_", "aten::clamp_min": "aten::clamp_min_"}
    assert ours == [in_place.get(call, call) for call in torchs]
    assert ours != torchs


@pytest.mark.parametrize("name", _pairs())
def test_no_more_is_kept_than_by_torch(name: str) -> None:
    _, *calls = _pairs()[name]
    ours, torchs = (_saved(call) for call in calls)
    assert 0 < ours <= torchs


def test_relu_takes_the_memory_of_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "IN_PLACE", 1)
    x, w, b = torch.randn(5, 4), torch.randn(3, 4, requires_grad=True), torch.randn(3)
    image, filters = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3, requires_grad=True)
    for step in (lambda: TF.linear(x, w, b, "relu"), lambda: TF.conv2d(image, filters, activation="relu")):
        y = step()
        assert y._version == 1  # written once more after it was made
        assert not y._is_view()
    # views keep theirs: their base's history would have to be written again
    assert TF.linear(x.view(1, 5, 4), w, b, "relu")._version == 0
    assert TF.conv2d(image[0], filters, activation="relu")._version == 0


LINEAR = (((256, 2048), 24), ((4096, 8), 40))
CONV: tuple[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]], ...] = (
    ((8, 24, 32, 32), (40, 24, 3, 3), {"padding": 1}),
    ((8, 24, 32, 32), (24, 1, 3, 3), {"padding": 1, "groups": 24, "stride": 2}),
    ((8, 24, 33, 29), (8, 24, 5, 1), {"padding": (2, 0), "dilation": (2, 1), "stride": (1, 3)}),
)


def _without_gradients(dtype: torch.dtype) -> list[tuple[str, Call, Call, Call, int]]:
    """A name, our call, torch's, float64's, and terms of a sum."""
    found: list[tuple[str, Call, Call, Call, int]] = []
    for shape, features in LINEAR:
        args = torch.randn(shape).to(dtype), torch.randn(features, shape[1]).to(dtype), torch.randn(features).to(dtype)
        exact = [t.double() for t in args]
        found.append(("linear", lambda a=args: TF.linear_relu(*a), lambda a=args: F.relu(F.linear(*a)),
                      lambda e=exact: F.relu(F.linear(*e)), shape[1]))  # type: ignore[misc] # fmt: skip
    for shape, window, options in CONV:
        x, w = (torch.randn(size).to(dtype).contiguous(memory_format=torch.channels_last) for size in (shape, window))
        images = x, w, torch.randn(window[0]).to(dtype)
        wide = [t.double() for t in images]
        found.append(("conv", lambda a=images, o=options: TF.conv2d(*a, **o, activation="relu"),
                      lambda a=images, o=options: F.relu(F.conv2d(*a, **o)),
                      lambda e=wide, o=options: F.relu(F.conv2d(*e, **o)), w[0].numel()))  # type: ignore[misc] # fmt: skip
    return found


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_without_gradients_relu_takes_the_product_s_memory(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "onednn_is_ahead", lambda threads: True)
    monkeypatch.setattr(product, "ROWS", 1)
    monkeypatch.setattr(product, "FEATURES", 1)
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no bf16 in oneDNN on this CPU")
    for name, ours, torchs, exact, terms in _without_gradients(dtype):
        with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            y = ours()
        called = [e.name for e in profile.events()]
        by_onednn = "mkldnn::_linear_pointwise" in called
        assert by_onednn == (name == "linear" and dtype == torch.float32), called
        assert [n for n in called if n in ("aten::relu", "aten::relu_", "aten::threshold")] == ["aten::relu_"]
        theirs = torchs()
        assert (y.dtype, y.shape, y.stride()) == (theirs.dtype, theirs.shape, theirs.stride()), name
        assert_close(y, exact(), terms, name=name)


def test_products_are_torch_s_where_they_must_be_seen_or_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "onednn_is_ahead", lambda threads: True)
    x, w, b = torch.randn(256, 2048), torch.randn(24, 2048), torch.randn(24)
    image = torch.randn(8, 24, 32, 32).contiguous(memory_format=torch.channels_last)
    filters = torch.randn(40, 24, 3, 3)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert TF.linear_relu(x, w, b).dtype == torch.bfloat16
        per_row = torch.func.vmap(lambda row: TF.linear_relu(row, w, b))(x.view(256, 1, 2048))
        torch.testing.assert_close(per_row.view(256, 24), F.relu(F.linear(x, w, b)), rtol=1e-4, atol=1e-3)
        for message, call in (
            ("in_features", lambda: TF.linear_relu(x, w[:, :7])),
            ("bias", lambda: TF.linear_relu(x, w, b[:7])),
            ("channels", lambda: TF.conv2d(image, filters[:, :7], activation="relu")),
            ("stride", lambda: TF.conv2d(image, filters, stride=0, activation="relu")),
            ("padded input", lambda: TF.conv2d(image, filters, dilation=40, activation="relu")),
        ):
            with pytest.raises(RuntimeError, match=message):
                call()
