"""cross_entropy against float64: values, gradients, dtypes, layouts, extreme logits, and which kernels ran."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import tkernels
from tests import tolerance
from tkernels.core.records import LossOptions
from tkernels.functional import cross_entropy

pytestmark = pytest.mark.gate("torch", "ttsem", "cuda")

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
FORWARD, TOTAL, BACKWARD = "cross_entropy_forward", "cross_entropy_total", "cross_entropy_backward"
TARGET_BACKWARD = "cross_entropy_target_backward"


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of cross_entropy and its backward. ``layout`` and ``grad`` name the strides (see arrange)."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    dtype: torch.dtype = F32
    probabilities: torch.dtype | None = None
    uint8: bool = False
    weighted: bool = False
    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    grad: str = "contiguous"
    target_layout: str = ""

    def __str__(self) -> str:
        default = {f.name: f.default for f in dataclasses.fields(self)}
        told = [f"{k}={v}".replace("torch.", "") for k, v in vars(self).items() if k == "shape" or v != default[k]]
        return " ".join(told)

    @property
    def class_dim(self) -> int:
        return 0 if len(self.shape) == 1 else 1

    @property
    def options(self) -> dict[str, Any]:
        return {
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
        }


def arrange(t: Tensor, layout: str) -> Tensor:
    """The same values in other strides; what surrounds them would show."""
    if layout == "contiguous":
        return t.contiguous()
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return torch.stack([t, torch.full_like(t, 99.0)], -1)[..., 0]
    if layout == "padded classes":
        return torch.cat([t, torch.full_like(t, 99.0)], 1)[:, : t.shape[1]]
    if layout == "transposed":
        return t.transpose(1, -1).contiguous().transpose(1, -1) if t.dim() > 2 else t.t().contiguous().t()
    if layout == "offset":
        return torch.cat([torch.full_like(t, 99.0)[:1], t])[1:]
    if layout == "cut picture":
        return torch.nn.functional.pad(t, (1, 1, 1, 1), value=99.0)[:, :, 1:-1, 1:-1]
    if layout == "expanded":
        return t[:1].expand(t.shape)
    raise ValueError(layout)


def target_of(case: Case) -> Tensor:
    if case.probabilities is not None:
        p = torch.randn(case.shape).softmax(case.class_dim).to(case.probabilities)
        return arrange(p, case.target_layout or case.layout)
    rows = case.shape[:1] + case.shape[2:] if len(case.shape) > 1 else ()
    target = torch.randint(case.shape[case.class_dim], rows)
    if target.dim():
        target[..., ::3] = case.ignore_index if case.ignore_index >= 0 or not case.uint8 else 0
    return target.to(torch.uint8) if case.uint8 else target


def incoming(loss: Tensor, layout: str) -> Tensor:
    if layout == "expanded":
        return torch.full((), 0.7, dtype=loss.dtype, device=loss.device).expand(loss.shape)
    grad = torch.randn(loss.shape).to(loss.dtype)
    return arrange(grad, layout).to(loss.device) if loss.dim() else grad.to(loss.device)


def reference(
    x: Tensor, target: Tensor, weight: Tensor | None, grad: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """PyTorch in float64: the loss, the gradient of the logits, that of the probabilities."""
    x = x.detach().cpu().double().requires_grad_()
    target = target.detach().cpu()
    if target.is_floating_point():
        target = target.double().requires_grad_()
    weight = None if weight is None else weight.detach().cpu().double()
    loss = torch.nn.functional.cross_entropy(x, target, weight, **options)
    leaves = [x, target] if target.is_floating_point() else [x]
    grads = torch.autograd.grad(loss, leaves, grad.detach().cpu().double())
    return loss.detach(), grads[0], grads[1] if len(grads) == 2 else None


def check(case: Case, device: str) -> None:
    n_classes = case.shape[case.class_dim]
    x = arrange(torch.randn(case.shape) * 3, case.layout).to(case.dtype).to(device)
    target = target_of(case).to(device)
    weight = (torch.rand(n_classes) + 0.1).to(case.dtype).to(device) if case.weighted else None
    before = x.clone()
    x.requires_grad_()
    if case.probabilities is not None:
        target.requires_grad_()
    loss = cross_entropy(x, target, weight, **case.options)
    grad = incoming(loss, case.grad)
    expected, expected_dx, expected_dp = reference(x, target, weight, grad, **case.options)
    leaves = [x, target] if case.probabilities is not None else [x]
    dx, *rest = torch.autograd.grad(loss, leaves, grad)
    terms = n_classes * max(1, x.numel() // n_classes)
    # PyTorch rounds log softmax to the dtype of the logits on its way to a float32 loss
    tolerance.assert_close(loss, expected, terms, dtype=case.dtype if device == "cpu" else None, name="loss")
    # of one class it is zero, and what rounding leaves is small beside the terms it cancelled from
    tolerance.assert_close(dx, expected_dx, n_classes, dtype=case.dtype, scale=1 / terms, name="gradient")
    assert dx.dtype == case.dtype
    if expected_dp is not None:
        tolerance.assert_close(rest[0], expected_dp, n_classes, dtype=case.dtype, name="target gradient")
    assert torch.equal(x.detach(), before), "the logits were written"


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


@pytest.mark.parametrize("n_classes", [2, 3, 17, 33, 65, 257, 513, 1025, 2049, 4097])
def test_every_tile_the_chooser_gives(n_classes: int, device: str, triton_runs: bool) -> None:
    check(Case((3, n_classes)), device)


@pytest.mark.parametrize(("inner", "n_classes"), [(3, 2), (17, 2), (33, 9), (129, 3), (70, 17), (5, 33)])
def test_every_spatial_tile_the_chooser_gives(inner: int, n_classes: int, device: str) -> None:
    check(Case((2, n_classes, inner)), device)


def test_one_small_batch_is_one_launch(device: str, triton_runs: bool, launches: list[str]) -> None:
    check(Case((256, 2)), device)
    if triton_runs:
        assert launches == [FORWARD, BACKWARD]


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


def by_hand(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    grad: Tensor,
    reduction: str,
    label_smoothing: float,
    splits: int,
    rows: int = 4,
    classes: int = 16,
) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of the logits by kernels launched in tiles so small that there are many."""
    from tkernels.core.config import Config
    from tkernels.ops.cross_entropy import kernels

    config = Config.of(num_warps=1, num_stages=1, BLOCK_ROWS=rows, BLOCK_C=classes)
    options = LossOptions(-100, reduction, label_smoothing)
    saved = kernels.launch_forward(x, target, weight, options, x.dtype, config=config, splits=splits)
    loss, stats, count = saved
    return loss, kernels.launch_backward(grad, x, target, weight, stats, count, options, config=config)


SMALL_TILES = [
    # rows, classes, several steps a row; several programs a row; ends; spatial; all with partial tiles
    Case((9, 37)),
    Case((9, 37), dtype=BF16, weighted=True, label_smoothing=0.1),
    Case((9, 37), dtype=F16, probabilities=F16, reduction="none"),
    Case((9, 144), dtype=BF16, probabilities=F32, weighted=True, label_smoothing=0.1),
    Case((5, 137), dtype=BF16),
    Case((5, 137), dtype=F16, weighted=True, label_smoothing=0.1, reduction="sum"),
    Case((5, 137), probabilities=F32, weighted=True, reduction="none"),
    Case((2, 37, 9)),
    Case((2, 37, 16), dtype=BF16, probabilities=F32, weighted=True),
    Case((2, 21, 3, 3), "channels_last", dtype=F16, label_smoothing=0.1, reduction="sum"),
]


@pytest.mark.gate("ttsem", "cuda")
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("case", SMALL_TILES, ids=str)
def test_small_tiles(case: Case, splits: int, device: str, launches: list[str]) -> None:
    x = arrange(torch.randn(case.shape) * 3, case.layout).to(case.dtype).to(device)
    target = target_of(case).to(device)
    weight = (torch.rand(case.shape[1]) + 0.1).to(case.dtype).to(device) if case.weighted else None
    rows = case.shape[:1] + case.shape[2:] if case.reduction == "none" else ()
    grad = torch.randn(rows).to(case.dtype).to(device)
    loss, dx = by_hand(x, target, weight, grad, case.reduction, case.label_smoothing, splits)
    expected, expected_dx, _ = reference(x, target, weight, grad, **case.options)
    tolerance.assert_close(loss, expected, x.numel(), name="loss")
    tolerance.assert_close(dx, expected_dx, case.shape[1], name="gradient")
    first = [FORWARD] if splits == 1 else ["cross_entropy_partial", "cross_entropy_merge"]
    assert [name for name in launches if name != TOTAL] == [*first, BACKWARD]
    if case.reduction == "none":
        assert TOTAL not in launches


@pytest.mark.gate("ttsem", "cuda")
def test_few_long_rows_are_split_by_the_chooser(device: str, launches: list[str]) -> None:
    check(Case((2, 9001), dtype=BF16, reduction="none"), device)
    assert launches == ["cross_entropy_partial", "cross_entropy_merge", BACKWARD]


@pytest.mark.gate("ttsem", "cuda")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_sum_takes_as_many_rounds_as_needed(reduction: str, device: str, launches: list[str]) -> None:
    from tkernels.core.config import Config
    from tkernels.ops.cross_entropy import kernels

    pairs = torch.rand(2, 37).to(device)
    loss, count = pairs.new_empty(()), pairs.new_empty(()) if reduction == "mean" else None
    kernels.launch_total(pairs, loss, count, reduction, Config.of(num_warps=1, num_stages=1, BLOCK=4, LENGTH=8))
    losses, counts = pairs.cpu().double().sum(1)
    tolerance.assert_close(loss, losses / counts if reduction == "mean" else losses, 37)
    assert launches == [TOTAL] * 2


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


def test_logits_are_read_where_they_lie(device: str, triton_runs: bool) -> None:
    if not triton_runs:
        pytest.skip("PyTorch chooses for itself")
    from tkernels.ops.cross_entropy.layout import readable

    batch = torch.randn(2, 3, 4, 5).to(device)
    layouts = (
        batch,
        batch.contiguous(memory_format=torch.channels_last),
        batch[:, 1:],
        batch[..., 0],
        batch[:, :, 1:3],
        batch.flatten(2).transpose(1, 2),
        batch[:1].expand(2, 3, 4, 5),
    )
    for t in layouts:
        assert readable(t) is t
    cut = batch[..., 1:3]
    assert readable(cut) is not cut


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


@pytest.mark.gate("aot")
@pytest.mark.parametrize("shape", [(10,), (1000,), (5, 16, 16)])
def test_batches_share_their_compiled_kernels(shape: tuple[int, ...]) -> None:
    from perf.static import aot
    from tkernels.ops.cross_entropy import kernels

    def keys(batch: int) -> set[str]:
        with aot.recording("sm_90") as launches:
            x = torch.empty(batch, *shape, dtype=BF16, device="cuda")
            target = torch.empty(batch, *shape[1:], dtype=torch.int64, device="cuda")
            options = LossOptions(-100, "mean", 0.0)
            loss, stats, count = kernels.launch_forward(x, target, None, options, BF16)
            kernels.launch_backward(loss, x, target, None, stats, count, options)
        # one program has no second stage
        return {aot.specialisation(each, "sm_90") for each in launches if each.kernel.__name__ != TOTAL}

    assert keys(256) == keys(250) == keys(17) == keys(2)
