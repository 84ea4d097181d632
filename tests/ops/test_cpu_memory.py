"""What the PyTorch bodies of single operators do on a CPU for small calls: no more than torch's own functions, and less
memory. Times are measured by ``python -m perf sweep --shapes spread``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tkernels.functional as TF

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
    """Each ATen call torch makes, but for ReLU's, which writes over what is below it, and none besides."""
    leaves, *calls = _pairs()[name]
    ours, torchs = (_aten(call, leaves) for call in calls)
    in_place = {"aten::relu": "aten::relu_", "aten::clamp_min": "aten::clamp_min_"}
    assert ours == [in_place.get(call, call) for call in torchs]


@pytest.mark.parametrize("name", _pairs())
def test_no_more_is_kept_than_by_torch(name: str) -> None:
    _, *calls = _pairs()[name]
    ours, torchs = (_saved(call) for call in calls)
    assert 0 < ours <= torchs


def test_relu_takes_the_memory_of_the_product() -> None:
    x, w, b = torch.randn(5, 4), torch.randn(3, 4, requires_grad=True), torch.randn(3)
    image, filters = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3, requires_grad=True)
    for step in (lambda: TF.linear(x, w, b, "relu"), lambda: TF.conv2d(image, filters, activation="relu")):
        y = step()
        assert y._version == 1  # written once more after it was made
        assert not y._is_view()
    # views keep theirs: their base's history would have to be written again
    assert TF.linear(x.view(1, 5, 4), w, b, "relu")._version == 0
    assert TF.conv2d(image[0], filters, activation="relu")._version == 0
