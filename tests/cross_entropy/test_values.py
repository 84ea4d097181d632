"""cross_entropy against float64: values, gradients, dtypes, layouts, extreme logits, and which kernels ran."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tkernels
from tests import tolerance
from tests.cross_entropy.cases import (
    BACKWARD,
    BF16,
    F16,
    F32,
    F64,
    FORWARD,
    TARGET_BACKWARD,
    TOTAL,
    Case,
    by_hand,
    check,
    reference,
)
from tkernels.functional import cross_entropy

pytestmark = pytest.mark.gate("torch", "ttsem", "cuda")

CASES = [
    # ranks; one class; one row
    Case((5,)),
    Case((5,), probabilities=F32, reduction="none", label_smoothing=0.1),
    Case((1, 7), reduction="sum"),
    Case((3, 1)),
    Case((3, 1, 2), weighted=True, label_smoothing=0.1),
    # the CNN's ten classes, all reductions, smoothing, weights, ignored rows
    Case((7, 10)),
    Case((7, 10), dtype=BF16, reduction="sum", weighted=True),
    Case((7, 10), dtype=F16, reduction="none", label_smoothing=0.1, grad="expanded"),
    Case((7, 10), weighted=True, label_smoothing=0.2, ignore_index=3),
    Case((7, 10), uint8=True, ignore_index=200),
    Case((7, 10), label_smoothing=1.0, ignore_index=10**10, reduction="none", grad="sliced"),
    # probabilities, also of another dtype than the logits
    Case((7, 10), probabilities=F32),
    Case((7, 10), probabilities=F32, dtype=BF16, weighted=True, label_smoothing=0.1),
    Case((7, 10), probabilities=F16, dtype=F16, reduction="none", weighted=True, grad="expanded"),
    # strides
    Case((7, 10), "sliced", reduction="none"),
    Case((7, 10), "padded classes", dtype=BF16),
    Case((7, 10), "transposed", label_smoothing=0.1),
    Case((24, 10), "transposed", dtype=F16, probabilities=F32),
    Case((7, 10), "transposed", probabilities=F32, target_layout="contiguous"),
    Case((5, 131), probabilities=F32, target_layout="padded classes"),
    Case((7, 10), "offset", dtype=F16),
    Case((7, 10), "expanded"),
    # rows that are off 16-byte boundaries: an aligned interior between ends
    Case((5, 131), dtype=BF16, weighted=True, label_smoothing=0.1),
    Case((5, 131), "offset", probabilities=F32, weighted=True),
    Case((5, 200), dtype=F16, probabilities=BF16),
    Case((5, 144), "padded classes", dtype=BF16),
    # dimensions after the classes: contiguous, classes last, an inner size that is a multiple of 8, and a copy
    Case((2, 5, 3), reduction="none", grad="sliced"),
    Case((2, 5, 4, 4), weighted=True, dtype=BF16),
    Case((2, 5, 4, 2), "channels_last", label_smoothing=0.1),
    Case((2, 5, 3, 3), "cut picture", reduction="none", grad="expanded"),
    Case((2, 5, 6), "transposed", probabilities=F32, reduction="sum"),
    Case((2, 37, 5), probabilities=F32, label_smoothing=0.1),
    Case((2, 5, 2, 3, 2), ignore_index=4),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case: Case, device: str, triton_runs: bool, launches: list[str]) -> None:
    check(case, device)
    if triton_runs:
        backward = [BACKWARD, TARGET_BACKWARD] if case.probabilities is not None else [BACKWARD]
        assert launches == [FORWARD, *([TOTAL] if TOTAL in launches else []), *backward]


@pytest.mark.gate("interp")
@pytest.mark.parametrize("case", [CASES[5], CASES[12], CASES[22], CASES[28]], ids=str)
def test_matches_float64_interpreted(case: Case, device: str, launches: list[str]) -> None:
    check(case, device)
    assert FORWARD in launches


def extreme(n_classes: int) -> Tensor:
    """Rows that make careless code overflow or lose a NaN; what is special stands early, late and everywhere."""
    inf, nan = float("inf"), float("nan")
    x = torch.randn(13, n_classes)
    x[0] += 1e4
    x[1] -= 1e4
    x[2, 0], x[2, -1] = 1e4, -1e4
    x[3, : n_classes // 2 + 1] = -inf
    x[4, n_classes // 2 :] = -inf
    x[5] = -inf
    x[6, 0] = nan
    x[7, -1] = nan
    x[8] = nan
    x[9, 1] = inf
    x[10, -1] = -inf
    x[11] = 3e38
    x[12, : n_classes - 1] = nan
    return x


@pytest.mark.parametrize("n_classes", [6, 150])
@pytest.mark.parametrize(
    ("reduction", "label_smoothing", "probabilities"),
    [("none", 0.0, False), ("none", 0.1, False), ("none", 0.0, True)],
)
def test_extreme_logits(
    n_classes: int, reduction: str, label_smoothing: float, probabilities: bool, device: str, triton_runs: bool
) -> None:
    x = extreme(n_classes)
    target = torch.randn(x.shape).softmax(1) if probabilities else torch.full((13,), n_classes - 1)
    if not probabilities:
        target[10:] = -100  # an ignored row of NaN: loss 0, gradient NaN, as torch
    grad = torch.randn(13)
    grad[0] = float("nan")
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    expected, expected_dx, _ = reference(x, target, None, grad, **options)
    on = x.to(device).requires_grad_()
    loss = cross_entropy(on, target.to(device), **options)
    dx = torch.autograd.grad(loss, on, grad.to(device))[0]
    tolerance.assert_close(loss, expected, n_classes, name="loss")
    tolerance.assert_close(dx, expected_dx, n_classes, name="gradient")
    if triton_runs:
        # the same through tiles of 16 classes, and through several programs a row
        for splits in (1, 3):
            loss, dx = by_hand(x.to(device), target.to(device), None, grad.to(device), splits=splits, **options)
            tolerance.assert_close(loss, expected, n_classes, name="loss, small tiles")
            tolerance.assert_close(dx, expected_dx, n_classes, name="gradient, small tiles")


def test_all_rows_ignored(device: str) -> None:
    for smoothing in (0.0, 0.1):
        for reduction, expected in (("mean", [float("nan")]), ("sum", [0.0]), ("none", [0.0] * 3)):
            x = torch.randn(3, 4).to(device).requires_grad_()
            target = torch.full((3,), -1).to(device)
            loss = cross_entropy(x, target, None, -1, reduction, smoothing)
            torch.testing.assert_close(loss.detach().cpu().reshape(-1), torch.tensor(expected), equal_nan=True)
            (dx,) = torch.autograd.grad(loss.sum(), x)
            assert not dx.cpu().any(), "an ignored row has no gradient"


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_empty(shape: tuple[int, ...], reduction: str, device: str) -> None:
    x = torch.randn(shape).to(device).requires_grad_()
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64).to(device)
    loss = cross_entropy(x, target, reduction=reduction)
    expected = torch.nn.functional.cross_entropy(x.detach().cpu(), target.cpu(), reduction=reduction)
    torch.testing.assert_close(loss.detach().cpu(), expected, equal_nan=True)
    assert torch.autograd.grad(loss.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("wrong", [-1, 10, 2**40])
def test_target_out_of_range(wrong: int, device: str, triton_runs: bool) -> None:
    x = torch.randn(4, 10).to(device).requires_grad_()
    target = torch.tensor([1, 2, wrong, 3]).to(device)
    weight = torch.rand(10).to(device)
    if not triton_runs:
        with pytest.raises(IndexError, match=rf"target must hold classes from 0 to 9 .* got {wrong} .*\[4, 10\]"):
            cross_entropy(x, target)
        return
    for w in (None, weight):
        loss = cross_entropy(x, target, w, reduction="none")
        assert torch.isnan(loss.detach().cpu()).tolist() == [False, False, True, False]
        (dx,) = torch.autograd.grad(loss.sum(), x)
        assert torch.isnan(dx.cpu()).all(1).tolist() == [False, False, True, False]
        assert not torch.isnan(dx.cpu())[[0, 1, 3]].any()
        assert torch.isnan(cross_entropy(x, target, w).detach().cpu())
        assert torch.isnan(cross_entropy(x, target, w, label_smoothing=0.1).detach().cpu())


def error(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """Relative norm and maximum, of at least one rounding each (as tests/numerics counts them)."""
    difference = actual.detach().cpu().double() - exact
    norm, worst = difference.norm() / exact.norm(), difference.abs().max() / exact.abs().max()
    eps = torch.finfo(actual.dtype).eps
    return max(norm.item(), eps), max(worst.item(), eps)


@pytest.mark.parametrize("shift", [0.0, 1e3])
@pytest.mark.parametrize(("label_smoothing", "probabilities"), [(0.0, False), (0.1, False), (0.0, True)])
def test_no_less_accurate_than_torch(
    shift: float, label_smoothing: float, probabilities: bool, device: str, triton_runs: bool
) -> None:
    """Rule 11, and the reason why a row's maximum and logarithm are kept apart.

    An error below one rounding counts as one, as in tests.numerics: torch's own differs by CPU.
    """
    x = torch.randn(64, 50) + shift
    target = torch.randn(64, 50).softmax(1) if probabilities else torch.randint(50, (64,))
    grad = torch.randn(64)
    options = {"reduction": "none", "label_smoothing": label_smoothing}
    exact, exact_dx, _ = reference(x, target, None, grad, **options)
    plain = x.clone().requires_grad_()
    theirs = torch.nn.functional.cross_entropy(plain, target, **options)
    their_dx = torch.autograd.grad(theirs, plain, grad)[0]
    on = x.to(device).requires_grad_()
    ours = cross_entropy(on, target.to(device), **options)
    our_dx = torch.autograd.grad(ours, on, grad.to(device))[0]
    for name, mine, other, truth in (("loss", ours, theirs, exact), ("gradient", our_dx, their_dx, exact_dx)):
        (norm, worst), (their_norm, their_worst) = error(mine, truth), error(other, truth)
        eps = torch.finfo(torch.float32).eps
        assert norm <= 1.25 * max(their_norm, eps), f"{name}: relative error {norm:.2e}, torch's {their_norm:.2e}"
        largest = truth.abs().max().item()
        assert worst <= 2 * max(their_worst, eps * largest), (
            f"{name}: worst error {worst:.2e}, torch's {their_worst:.2e}"
        )


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_loss_dtype(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(4, 5).to(dtype).to(device).requires_grad_()
    target, p = torch.tensor([0, 1, 2, 3]).to(device), torch.randn(4, 5).softmax(1).to(device)
    weight = torch.rand(5).to(device)
    assert cross_entropy(x, target).dtype == dtype
    assert cross_entropy(x, p.to(dtype)).dtype == dtype
    assert cross_entropy(x, p).dtype == F32
    assert cross_entropy(x, p.to(dtype), weight).dtype == F32
    with torch.autocast(device, dtype=BF16):
        loss = cross_entropy(x, target)
        assert cross_entropy(x, target, weight).dtype == cross_entropy(x, p.to(dtype)).dtype == F32
    assert loss.dtype == F32
    expected, expected_dx, _ = reference(x, target, None, torch.ones(()))
    tolerance.assert_close(loss, expected, 5, dtype=F32)
    (dx,) = torch.autograd.grad(loss, x)
    assert dx.dtype == dtype
    tolerance.assert_close(dx, expected_dx, 5)


def test_only_the_gradients_asked_for(device: str, triton_runs: bool, launches: list[str]) -> None:
    x, p = torch.randn(4, 5).to(device), torch.randn(4, 5).softmax(1).to(device)
    cross_entropy(x, p.clone().requires_grad_()).backward()
    cross_entropy(x.clone().requires_grad_(), p).backward()
    cross_entropy(x, p)
    with torch.no_grad():
        assert not cross_entropy(x.clone().requires_grad_(), p).requires_grad
    if triton_runs:
        assert launches == [FORWARD, TARGET_BACKWARD, FORWARD, BACKWARD, FORWARD, FORWARD]


def test_class_weights_have_the_gradient_torch_gives(device: str) -> None:
    x, p = torch.randn(4, 5).to(device), torch.randn(4, 5).softmax(1).to(device)
    weight = torch.rand(5).to(device).requires_grad_()
    loss = cross_entropy(x, p, weight)
    expected = -(torch.log_softmax(x, 1) * p).sum(0).cpu() / 4
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0].cpu(), expected)
    with pytest.raises(RuntimeError, match="weight"):
        cross_entropy(x, torch.tensor([0, 1, 2, 3]).to(device), weight)


def test_two_runs_give_the_same_bits(device: str) -> None:
    x = torch.randn(300, 12).to(device).requires_grad_()
    target = torch.randint(12, (300,)).to(device)
    runs = []
    for _ in range(2):
        loss = cross_entropy(x, target, label_smoothing=0.1)
        runs.append((loss.detach().cpu(), torch.autograd.grad(loss, x)[0].cpu()))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_saved_for_backward_is_what_is_alive_and_little_more(device: str, triton_runs: bool) -> None:
    if not triton_runs:
        pytest.skip("PyTorch saves for itself")
    saved = []
    x = torch.randn(6, 40).to(device).requires_grad_()
    target = torch.randint(40, (6,)).to(device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        cross_entropy(x, target)
    extra = [t for t in saved if t.data_ptr() not in (x.data_ptr(), target.data_ptr())]
    assert sum(t.numel() for t in extra) == 2 * 6 + 1


def test_a_second_derivative_is_refused_or_right(device: str, triton_runs: bool) -> None:
    x = torch.randn(3, 4, dtype=F32 if triton_runs else F64).to(device).requires_grad_()
    target = torch.tensor([1, 0, 3]).to(device)
    if not triton_runs:
        assert torch.autograd.gradgradcheck(lambda x: cross_entropy(x, target), (x,))
        return
    (dx,) = torch.autograd.grad(cross_entropy(x, target), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.gate("torch")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_gradcheck(reduction: str, label_smoothing: float) -> None:
    x = torch.randn(3, 4, 2, dtype=F64, requires_grad=True)
    p = torch.randn(3, 4, 2, dtype=F64).softmax(1).requires_grad_()
    weight = torch.rand(4, dtype=F64)
    target = torch.tensor([[0, 1], [2, -100], [3, 3]])
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, target, weight, **options), (x,))
    assert torch.autograd.gradcheck(lambda x, p: cross_entropy(x, p, weight, **options), (x, p))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (((3, 5), (2,)), ValueError, r"batch size 3, got input \[3, 5\] and target \[2\]"),
        (((3, 5, 2), (3, 4)), RuntimeError, r"shape \[3, 2\] .* got input \[3, 5, 2\] and target \[3, 4\]"),
        (((5,), (3,)), ValueError, r"1-D input, got input \[5\] and target \[3\]"),
        (((3, 5), (3, 5)), RuntimeError, "floating-point dtype, got torch.int64"),
    ],
)
def test_shapes_that_do_not_go_together(
    arguments: tuple[tuple[int, ...], ...], error: type[Exception], words: str, device: str, launches: list[str]
) -> None:
    x, target = torch.randn(arguments[0]).to(device), torch.zeros(arguments[1], dtype=torch.int64).to(device)
    with pytest.raises(error, match=words):
        cross_entropy(x, target)
    assert not launches


def test_options_that_are_refused(device: str, launches: list[str]) -> None:
    x, target = torch.randn(3, 5).to(device), torch.tensor([0, 1, 2]).to(device)
    for options, kind, words in (
        ({"reduction": "avg"}, ValueError, "reduction must be one of 'none', 'mean', 'sum', got 'avg'"),
        ({"label_smoothing": 1.5}, RuntimeError, "label_smoothing must be between 0.0 and 1.0, got 1.5"),
        ({"weight": torch.rand(4).to(device)}, RuntimeError, r"got weight \[4\] and input \[3, 5\]"),
        ({"weight": torch.rand(5).half().to(device)}, RuntimeError, "weight must have the input's dtype"),
    ):
        with pytest.raises(kind, match=words):
            cross_entropy(x, target, **options)
    with pytest.raises(RuntimeError, match="target must have dtype int64 for class indices"):
        cross_entropy(x, target.int())
    with pytest.raises(RuntimeError, match="ignore_index must be negative"):
        cross_entropy(x, x, ignore_index=2)
    assert not launches


def test_module(device: str, triton_runs: bool, launches: list[str]) -> None:
    x, target = torch.randn(4, 5).to(device), torch.tensor([0, 1, -7, 3]).to(device)
    weight = torch.rand(5)
    for options in ({}, {"weight": weight, "ignore_index": -7, "label_smoothing": 0.1}, {"reduction": "none"}):
        ours, plain = tkernels.nn.CrossEntropyLoss(**options), torch.nn.CrossEntropyLoss(**options)
        assert ours.state_dict().keys() == plain.state_dict().keys()
        assert repr(ours) == repr(plain)
        labels = target if "weight" in options else target.clamp(min=0)
        expected = plain(x.cpu(), labels.cpu())
        tolerance.assert_close(ours.to(device)(x, labels), expected, 20)
    with pytest.warns(UserWarning, match="size_average"):
        assert tkernels.nn.CrossEntropyLoss(size_average=False).reduction == "sum"
    x, labels = x[:, :4], target[:2]
    with pytest.warns(UserWarning, match="elementwise_mean"):
        old_name = cross_entropy(x[:2], labels, reduction="elementwise_mean")
    assert torch.equal(old_name, cross_entropy(x[:2], labels))
    if triton_runs:
        assert launches == [FORWARD] * 5
