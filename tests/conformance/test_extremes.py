"""The ends of the ranges that operators promise: the most classes, channels and values a channel, and the fewest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.conformance.calls import Call
from tests.conformance.compare import check_call

pytestmark = [pytest.mark.gate("torch", "ttsem", "cuda"), pytest.mark.extended("ttsem")]
F32, BF16 = torch.float32, torch.bfloat16


def check(call: Call, device: str, triton_runs: bool, launches: list[str]) -> None:
    mine = check_call(call, device)
    assert mine.error is None
    if triton_runs:
        assert launches


def logits(rows: int, classes: int, dtype: torch.dtype) -> Tensor:
    """Normal logits; the first row reaches from -1e4 to 1e4 and holds an impossible class."""
    x = torch.randn(rows, classes) * 3
    x[0, 0], x[0, -1] = 1e4, -1e4
    x[0, classes // 2] = float("-inf") if classes > 2 else -1e4
    return x.to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows, classes", [(1, 256_000), (3, 256_000), (2, 50_257), (700, 2), (1, 2), (4, 1)])
def test_cross_entropy_by_index(
    rows: int, classes: int, label_smoothing: float, dtype: torch.dtype, device: str, triton_runs: bool,
    launches: list[str],
) -> None:  # fmt: skip
    x = logits(rows, classes, dtype) if classes > 1 else torch.randn(rows, 1).to(dtype).requires_grad_()
    target = torch.randint(classes, (rows,))
    target[-1] = classes - 1
    options = {"input": x, "target": target, "label_smoothing": label_smoothing}
    if label_smoothing and classes > 1:
        options["input"] = x.detach().nan_to_num(neginf=-1e4).requires_grad_()  # an infinite loss says little
    check(Call("cross_entropy", kwargs=options), device, triton_runs, launches)


def test_cross_entropy_by_probabilities(device: str, triton_runs: bool, launches: list[str]) -> None:
    x, p = torch.randn(2, 100_001), torch.randn(2, 100_001).softmax(1)
    call = Call("cross_entropy", kwargs={"input": x.requires_grad_(), "target": p.requires_grad_()})
    check(call, device, triton_runs, launches)


TEN_MILLION = (pytest.mark.races_unchecked("ten million values a channel"), pytest.mark.extended("torch", "ttsem"))


@pytest.mark.parametrize(
    "shape, channels_last",
    [
        ((2, 4096, 1, 1), False),  # two values a channel
        ((2, 4096, 3, 3), True),
        ((1, 1, 1, 2), False),
        pytest.param((10, 1, 1000, 1000), False, marks=TEN_MILLION),
    ],
    ids=str,
)
def test_batch_norm(
    shape: tuple[int, ...], channels_last: bool, device: str, triton_runs: bool, launches: list[str]
) -> None:
    x = torch.randn(shape) * 2 + 5
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    channels = shape[1]
    vectors = {name: torch.rand(channels) + 0.5 for name in ("weight", "bias", "running_mean", "running_var")}
    for name in ("weight", "bias"):
        vectors[name].requires_grad_()
    call = Call("batch_norm", kwargs={"input": x.requires_grad_(), **vectors, "training": True, "activation": "relu"})
    check(call, device, triton_runs, launches)


@pytest.mark.parametrize("rows, features, outputs", [(2, 20_003, 3), (1, 1, 1), (3, 2, 20_000), (10_001, 1, 2)])
def test_linear(rows: int, features: int, outputs: int, device: str, triton_runs: bool, launches: list[str]) -> None:
    x, weight = torch.randn(rows, features).requires_grad_(), torch.randn(outputs, features).requires_grad_()
    arguments = {"input": x, "weight": weight, "bias": torch.randn(outputs).requires_grad_()}
    check(Call("linear", kwargs=arguments), device, triton_runs, launches)


@pytest.mark.parametrize(
    "image, weight, options",
    [
        ((1, 4096, 2, 2), (8, 4096, 1, 1), {}),
        ((1, 3, 130, 131), (4, 3, 11, 11), {"stride": 4, "padding": 12}),  # padding larger than the kernel
        ((2, 512, 3, 3), (512, 1, 3, 3), {"padding": 1, "groups": 512}),
        ((1, 2, 1, 3000), (3, 2, 1, 31), {"dilation": (1, 40), "padding": (0, 600)}),
    ],
    ids=str,
)
def test_conv2d(
    image: tuple[int, ...], weight: tuple[int, ...], options: dict[str, object], device: str, triton_runs: bool,
    launches: list[str],
) -> None:  # fmt: skip
    x, w = torch.randn(image).requires_grad_(), torch.randn(weight).requires_grad_()
    check(Call("conv2d", kwargs={"input": x, "weight": w, **options}), device, triton_runs, launches)
