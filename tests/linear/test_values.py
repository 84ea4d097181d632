"""linear against float64: values, gradients, dropout, layouts, errors, modules, and which kernels ran."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import tkernels
from tests import tolerance
from tests.strides import arrange
from tkernels.core import activation as activations
from tkernels.core import plan
from tkernels.functional import linear, linear_relu
from tkernels.nn import Linear, LinearReLU

pytestmark = pytest.mark.gate("torch", "ttsem", "cuda")

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
FORWARD, DGRAD, WGRAD, FINISH = (f"linear_{name}_kernel" for name in ("forward", "dgrad", "wgrad", "finish"))


@dataclasses.dataclass(frozen=True)
class Case:
    """One call and its backward. ``x``, ``w``, ``dy`` name the strides (see arrange); ``bias``: its shape or None."""

    lead: tuple[int, ...]
    k: int
    n: int
    bias: tuple[int, ...] | None = None
    activation: str | None = None
    dtype: torch.dtype = F32
    x: str = "contiguous"
    w: str = "contiguous"
    dy: str = "contiguous"

    def __str__(self) -> str:
        return " ".join(str(v).replace("torch.", "") for v in vars(self).values() if v not in ("contiguous", None))


CASES = [
    # every activation; a partial tile on each axis
    Case((70,), 35, 70, (70,)),
    Case((70,), 35, 70, (70,), "relu"),
    *(Case((9,), 7, 5, (5,), name, dtype) for name in activations.ACTIVATIONS[2:] for dtype in (F32, BF16)),
    # leading dimensions: none, one of size 1, several
    Case((), 7, 5, (5,), "relu"),
    Case((1,), 7, 5),
    Case((2, 3, 4), 7, 5, (5,)),
    # single features, the CNN's ten classes, multiples of 8 but not of 16
    Case((5,), 1, 1, (1,)),
    Case((6,), 128, 10, (10,)),
    Case((6,), 1, 9, dtype=BF16),
    Case((6,), 9, 1, (1,), "relu", F16),
    Case((17,), 24, 40, (40,), "relu", BF16),
    Case((17,), 24, 40, (40,), "gelu", F16),
    # biases that broadcast: one element, none of the dimensions, a row for each result
    Case((4,), 3, 5, (1,), "relu"),
    Case((4,), 3, 5, ()),
    Case((4,), 3, 5, (4, 5), "relu"),
    Case((4,), 3, 5, (4, 1)),
    Case((2, 3), 4, 5, (2, 1, 5)),
    # reductions long enough to be shared by programs
    Case((4,), 1030, 20, (20,), "gelu", BF16),
    Case((3,), 20, 1030, (1030,), "relu"),
    # strides
    Case((6,), 7, 5, (5,), "relu", x="transposed", dy="transposed"),
    Case((6,), 8, 5, (5,), "gelu", x="sliced", w="sliced", dy="sliced"),
    Case((6,), 7, 5, (5,), "relu", x="expanded", w="transposed", dy="expanded"),
    Case((6,), 16, 32, dtype=BF16, w="transposed"),
    Case((6,), 7, 5, x="offset", w="expanded", dy="offset"),
    Case((2, 3), 7, 5, (5,), "leaky_relu", x="permuted", dy="permuted"),
    Case((2, 3), 7, 5, x="sliced", dy="sliced"),
    Case((6,), 7, 5, (5,), "silu", x="strided", w="strided", dy="strided"),
]


def leaf(t: Tensor) -> Tensor:
    """A leaf with the values and strides of ``t``."""
    return t.detach().requires_grad_()


def reference(x: Tensor, w: Tensor, b: Tensor | None, activation: str | None, dy: Tensor, factor: Tensor | None = None):
    """y and the gradients of x, w and b in float64 on the CPU. ``factor``: dropout's."""
    inputs = [leaf(t.detach().cpu().double()) for t in (x, w, b) if t is not None]
    y = activations.apply(torch.nn.functional.linear(*inputs), activation)
    if factor is not None:
        y = y * factor.cpu().double()
    return y.detach(), torch.autograd.grad(y, inputs, dy.detach().cpu().double())


def check(x: Tensor, w: Tensor, b: Tensor | None, activation: str | None, y: Tensor, dy: Tensor,
          factor: Tensor | None = None) -> None:  # fmt: skip
    """Compare y, dtype, strides and all gradients with float64."""
    inputs = [t for t in (x, w, b) if t is not None]
    before = [t.detach().clone() for t in (*inputs, dy)]
    gradients = torch.autograd.grad(y, inputs, dy)
    y64, gradients64 = reference(x, w, b, activation, dy, factor)
    (n, k), rows = (w.shape if w.dim() == 2 else (1, w.shape[0])), max(x[..., 0].numel(), 1)
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    tolerance.assert_close(y, y64, k, scale=float(k) ** 0.5, name="y")
    for t, got, want, terms in zip(inputs, gradients, gradients64, (n, rows, rows)):
        assert got.dtype == t.dtype
        # a gradient of a rounded activation, times a rounded factor: terms as large as dy and the other factor
        scale = terms**0.5 * max(dy.detach().abs().max().item(), 1.0)
        tolerance.assert_close(got, want, terms, scale=scale, name=f"gradient of {list(t.shape)}")
    for t, copy in zip((*inputs, dy), before):
        assert torch.equal(t.detach(), copy), "an input was written to"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case, device: str, triton_runs: bool, launches: list[str]) -> None:
    x = leaf(arrange(torch.randn(*case.lead, case.k, device=device, dtype=case.dtype), case.x))
    w = leaf(arrange(torch.randn(case.n, case.k, device=device, dtype=case.dtype), case.w))
    b = None if case.bias is None else leaf(torch.randn(case.bias, device=device, dtype=case.dtype))
    if case.bias is not None and len(case.bias) > 2:
        try:
            torch.nn.functional.linear(*(t.detach().cpu() for t in (x, w, b)))
        except RuntimeError:
            pytest.skip("this version of torch refuses a bias of three dimensions")
    y = linear(x, w, b, case.activation)
    dy = arrange(torch.randn(y.shape, device=device, dtype=case.dtype), case.dy)
    check(x, w, b, case.activation, y, dy)
    ran = [name for name in launches if name != FINISH]
    assert ran == ([FORWARD, DGRAD, WGRAD] if triton_runs else [])
    if case.k > 1000 and triton_runs:
        assert launches.count(FINISH) >= 1


@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
def test_stride_0_gradient_and_linear_relu(activation: str | None, device: str) -> None:
    x, w = leaf(torch.randn(5, 7, device=device)), leaf(torch.randn(3, 7, device=device))
    b = leaf(torch.randn(3, device=device))
    linear(x, w, b, activation).sum().backward()
    _, wanted = reference(x, w, b, activation, torch.ones(5, 3))
    for t, want in zip((x, w, b), wanted):
        tolerance.assert_close(t.grad, want, 5, scale=5.0)
    if activation == "relu":
        assert torch.equal(linear_relu(x, w, b), linear(x, w, b, "relu"))


def test_weight_of_one_dimension(device: str, triton_runs: bool, launches: list[str]) -> None:
    for shape in ((7,), (4, 7), (2, 3, 7)):
        x, w = leaf(torch.randn(shape, device=device)), leaf(torch.randn(7, device=device))
        y = linear(x, w, None, "relu")
        assert y.shape == shape[:-1]
        check(x, w, None, "relu", y, torch.randn(y.shape, device=device))
    x, b = torch.randn(7, device=device), torch.randn((), device=device)
    tolerance.assert_close(linear(x, w, b), reference(x, w.detach(), b, None, torch.ones(()))[0], 7, scale=3.0)
    assert bool(launches) == triton_runs


# gradients are asked for one by one: nothing else may be computed, nor saved
@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("activation", ("relu", "gelu"))
def test_only_the_gradients_asked_for(
    needs: tuple[bool, ...], activation: str, device: str, triton_runs: bool, launches: list[str]
) -> None:
    tensors = [torch.randn(shape, device=device).requires_grad_(need) for shape, need in
               zip(((6, 7), (5, 7), (5,)), needs)]  # fmt: skip
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = linear(*tensors, activation)
    assert y.requires_grad == any(needs)
    if not any(needs):
        assert not saved
        return
    dy = torch.randn(6, 5, device=device)
    y.backward(dy)
    _, wanted = reference(*tensors, activation, dy)
    for t, want, need in zip(tensors, wanted, needs):
        assert (t.grad is not None) == need
        if need:
            tolerance.assert_close(t.grad, want, 7, scale=3.0)
    if triton_runs:
        assert launches == [FORWARD, *[DGRAD] * needs[0], *[n for n in launches if n not in (FORWARD, DGRAD)]]
        assert launches.count(WGRAD) == (needs[1] or needs[2])
        assert launches.count(FINISH) == 0  # a program takes so few rows alone
        # x for dw, w for dx, and one tensor of y's shape for the activation
        assert sorted(t.numel() for t in saved) == sorted([30] + [42] * needs[1] + [35] * needs[0])


@pytest.mark.parametrize("lead, k, n", (((0,), 4, 3), ((2, 0), 4, 3), ((3,), 0, 4), ((3,), 4, 0), ((0,), 0, 0)))
@pytest.mark.parametrize("activation", (None, "gelu"))
def test_empty(lead: tuple[int, ...], k: int, n: int, activation: str | None, device: str) -> None:
    x, w = leaf(torch.randn(*lead, k, device=device)), leaf(torch.randn(n, k, device=device))
    b = leaf(torch.randn(n, device=device))
    y = linear(x, w, b, activation)
    dy = torch.randn(y.shape, device=device)
    gradients = torch.autograd.grad(y, (x, w, b), dy)
    y64, wanted = reference(x, w, b, activation, dy)
    for got, want in zip((y, *gradients), (y64, *wanted)):
        tolerance.assert_close(got, want, scale=1.0)


@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
def test_nan_and_inf_stand_where_torch_puts_them(activation: str | None, device: str, triton_runs: bool) -> None:
    """Kernels as float64 has it; the PyTorch body as PyTorch, whose float32 gelu(inf) is NaN on some CPUs."""
    x, w = torch.randn(6, 7, device=device), torch.randn(5, 7, device=device)
    x[1, 2], x[3, 0], x[4, 1] = float("nan"), float("inf"), -float("inf")
    x.requires_grad_()
    y = linear(x, w, None, activation)
    dy = torch.randn(6, 5, device=device)
    dy[0, 1] = float("nan")
    (dx,) = torch.autograd.grad(y, x, dy)
    want, (dx_want, _) = reference(x, w, None, activation, dy)
    if not triton_runs:
        want = activations.apply(torch.nn.functional.linear(x, w), activation)
        (dx_want,) = torch.autograd.grad(want, x, dy)
    elif activation == "hardswish":
        dx_want[1] = 0.0  # torch's CUDA kernels pass the gradient where z is NaN, as scalars do on a CPU, not vectors
    tolerance.assert_close(y, want, 7, scale=3.0)
    assert torch.equal(dx.cpu().isnan(), dx_want.isnan())


@pytest.mark.parametrize("dtype", (F32, BF16))
@pytest.mark.parametrize("activation", activations.ACTIVATIONS[1:])
def test_the_ends_of_activations(activation: str, dtype: torch.dtype, device: str) -> None:
    """Values and derivatives at and beside the points where a formula changes are torch's."""
    values = [end + step for end in (-6.0, -3.0, 0.0, 3.0, 6.0) for step in (-0.0625, 0.0, 0.0625)]
    x = torch.tensor(values, dtype=dtype)[:, None]
    ours, theirs = (x.clone().to(place).requires_grad_() for place in (device, "cpu"))
    y, want = (
        linear(ours, torch.ones(1, 1, dtype=dtype, device=device), None, activation),
        activations.apply(theirs, activation),
    )
    tolerance.assert_close(y, want.double(), 1, scale=6.0)
    y.backward(torch.ones_like(y))
    want.backward(torch.ones_like(want))
    assert ours.grad is not None
    assert theirs.grad is not None
    tolerance.assert_close(ours.grad, theirs.grad.double(), 1, scale=1.5)


def test_dropout_leaves_the_upper_end_of_relu6(device: str) -> None:
    """Kept values from 3 on are 6 and more after a division by 1 - p = 0.5, and still pass their gradient on."""
    x = torch.linspace(-1, 8, 90, device=device)[:, None].requires_grad_()
    y = linear(x, torch.ones(1, 1, device=device), None, "relu6", 0.5, True)
    y.sum().backward()
    kept = y != 0
    assert kept[(x > 3) & (x < 6)].any()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(kept & (x < 6), 2.0, 0.0))


def test_two_runs_give_the_same_bits(device: str) -> None:
    x, w = torch.randn(70, 8, device=device), torch.randn(9, 8, device=device)
    b, dy = torch.randn(9, device=device), torch.randn(70, 9, device=device)

    def run() -> list[Tensor]:
        torch.manual_seed(5)
        inputs = [leaf(t) for t in (x, w, b)]
        y = linear(*inputs, "gelu", 0.5, True)
        return [y, *torch.autograd.grad(y, inputs, dy)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


# ---- dropout


def keep_factor(lead: tuple[int, ...], n: int, p: float, device: str, dtype: torch.dtype = F32) -> Tensor:
    """Dropout's factors for a result of shape (*lead, n), from the generator as it stands."""
    zero = torch.zeros(*lead, 1, device=device, dtype=dtype)
    return linear(zero, zero.new_zeros(n, 1), zero.new_ones(n), None, p, True)


@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
@pytest.mark.parametrize("p", (0.0, 0.3, 1.0))
def test_dropout_is_replayed_in_backward(activation: str | None, p: float, device: str) -> None:
    torch.manual_seed(3)
    factor = keep_factor((2, 9), 21, p, device)
    torch.manual_seed(3)
    x, w = leaf(torch.randn(2, 9, 8, device=device)), leaf(torch.randn(21, 8, device=device))
    b = leaf(torch.randn(21, device=device))
    torch.manual_seed(3)
    y = linear(x, w, b, activation, p, True)
    check(x, w, b, activation, y, torch.randn(2, 9, 21, device=device), factor)


def test_dropout_in_half_precision_and_over_splits(device: str) -> None:
    for dtype, k in ((BF16, 24), (F32, 1030)):
        torch.manual_seed(4)
        factor = keep_factor((20,), 40, 0.5, device, dtype)
        x, w = (
            leaf(torch.randn(20, k, device=device, dtype=dtype)),
            leaf(torch.randn(40, k, device=device, dtype=dtype)),
        )
        torch.manual_seed(4)
        y = linear(x, w, None, "relu", 0.5, True)
        check(x, w, None, "relu", y, torch.randn(20, 40, device=device, dtype=dtype), factor)


def test_dropout_rate_seed_and_training(device: str) -> None:
    torch.manual_seed(0)
    first = keep_factor((100,), 50, 0.25, device)
    again = keep_factor((100,), 50, 0.25, device)
    torch.manual_seed(0)
    assert torch.equal(first, keep_factor((100,), 50, 0.25, device)), "torch.manual_seed does not govern the mask"
    assert not torch.equal(first, again), "two calls drew one mask"
    kept = (first != 0).double().cpu()
    assert torch.allclose(first.cpu(), (kept / 0.75).float())
    deviation = (0.25 * 0.75 / kept.numel()) ** 0.5
    assert abs(kept.mean().item() - 0.75) < 5 * deviation
    # neither rows nor columns share draws
    assert (kept.mean(0) - 0.75).abs().max() < 5 * (0.1875 / 100) ** 0.5
    assert (kept.mean(1) - 0.75).abs().max() < 5 * (0.1875 / 50) ** 0.5
    assert len(torch.unique(kept, dim=0)) == 100
    assert torch.unique(kept, dim=1).shape[1] == 50
    x, w = torch.randn(4, 3, device=device), torch.randn(5, 3, device=device)
    state = torch.get_rng_state()
    assert torch.equal(linear(x, w, dropout_p=0.9), linear(x, w))
    assert torch.equal(torch.get_rng_state(), state), "evaluation drew from the generator"


def test_dropout_keeps_nan(device: str) -> None:
    x = torch.full((3, 2), float("nan"), device=device)
    for p in (0.5, 1.0):
        assert linear(x, torch.ones(4, 2, device=device), None, "relu", p, True).isnan().all()


@pytest.mark.gate("torch")
@pytest.mark.parametrize("activation, module", ((None, torch.nn.Identity), ("relu", torch.nn.ReLU),
                                               ("gelu", torch.nn.GELU)))  # fmt: skip
def test_cpu_draws_are_torch_nns(activation: str | None, module: Any) -> None:
    torch.manual_seed(1)
    ours = Linear(6, 9, activation=activation, dropout=0.5)
    torch.manual_seed(1)
    theirs = torch.nn.Sequential(torch.nn.Linear(6, 9), module(), torch.nn.Dropout(0.5))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    x = torch.randn(11, 6)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(2)
        y = layer(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


# ---- dtypes and autocast


@pytest.mark.parametrize("cast", (BF16, F16))
def test_autocast(cast: torch.dtype, device: str, triton_runs: bool, launches: list[str]) -> None:
    x, w = leaf(torch.randn(6, 8, device=device)), leaf(torch.randn(16, 8, device=device))
    b = leaf(torch.randn(16, device=device))
    with torch.autocast(device, dtype=cast):
        y = linear(x, w, b, "relu")
        doubled = linear(x.double(), w.double())
    assert (y.dtype, doubled.dtype) == (cast, F64)
    dy = torch.randn(6, 16, device=device, dtype=cast)
    gradients = torch.autograd.grad(y, (x, w, b), dy)
    rounded = [t.detach().to(cast) for t in (x, w, b)]
    y64, wanted = reference(*rounded, "relu", dy)
    tolerance.assert_close(y, y64, 8, scale=3.0)
    for got, want in zip(gradients, wanted):
        assert got.dtype == F32
        tolerance.assert_close(got, want, 16, dtype=cast, scale=4.0)
    assert launches.count(FORWARD) == triton_runs


def test_float64_and_integers_are_pytorchs(device: str, launches: list[str]) -> None:
    x, w = torch.randn(3, 4, device=device, dtype=F64), torch.randn(5, 4, device=device, dtype=F64)
    assert torch.equal(linear(x, w), torch.nn.functional.linear(x, w))
    if not torch.cuda.is_available():  # torch has no integer product on a GPU
        x, w = x.long(), w.long()
        assert torch.equal(linear(x, w), torch.nn.functional.linear(x, w))
    assert not launches


@pytest.mark.gate("torch")
@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
def test_gradcheck(activation: str | None) -> None:
    inputs = [leaf(torch.randn(shape, dtype=F64)) for shape in ((2, 3, 4), (5, 4), (5,))]

    def run(*tensors: Tensor) -> Tensor:
        torch.manual_seed(7)
        return linear(*tensors, activation, 0.4, True)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.gate("ttsem", "interp", "cuda")
def test_double_backward_is_refused(device: str) -> None:
    x, w = leaf(torch.randn(3, 4, device=device)), leaf(torch.randn(5, 4, device=device))
    (dx,) = torch.autograd.grad(linear(x, w, None, "gelu").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.gate("ttsem", "cuda")
def test_saved_output_changed_in_place_is_refused(device: str) -> None:
    x, w = leaf(torch.randn(3, 4, device=device)), leaf(torch.randn(5, 4, device=device))
    y = linear_relu(x, w)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    linear(x, w).add_(1).sum().backward()  # nothing of it was saved
    tolerance.assert_close(x.grad, w.detach().cpu().double().sum(0).expand(3, 4), 5)


# ---- bad calls


def bad_calls(t: Any) -> list[tuple[str, tuple[Any, ...], tuple[str, ...]]]:
    """(name, arguments, what the message must hold). ``t`` makes a tensor."""
    return [
        ("features differ", (t(2, 5), t(3, 4)), ("input", "[2, 5]", "weight", "[3, 4]")),
        ("input of no dimension", (t(), t(3, 4)), ("input", "[]")),
        ("weight of none", (t(2, 4), t()), ("weight", "[]")),
        ("weight of three", (t(2, 4), t(2, 3, 4)), ("weight", "[2, 3, 4]")),
        ("bias length", (t(2, 4), t(3, 4), t(2)), ("bias", "[2]", "[3, 4]")),
        ("bias of too many rows", (t(2, 4), t(3, 4), t(5, 3)), ("bias", "[5, 3]")),
        ("bias of too many dimensions", (t(2, 4), t(3, 4), t(1, 1, 3)), ("bias", "[1, 1, 3]")),
        ("bias with a weight of one dimension", (t(2, 4), t(4), t(1)), ("bias", "[1]", "[4]")),
        ("weight dtype", (t(2, 4), t(3, 4).to(BF16)), ("float32", "bfloat16", "weight")),
        ("bias dtype", (t(2, 4), t(3, 4), t(3).to(F16)), ("float32", "float16", "bias")),
        ("integer weight", (t(2, 4), t(3, 4).long()), ("int64", "weight")),
        ("list", ([1.0], t(3, 1)), ("input", "list")),
        ("no weight", (t(2, 4), None), ("weight", "NoneType")),
        ("number for a bias", (t(2, 4), t(3, 4), 1.0), ("bias", "float")),
    ]


@pytest.mark.parametrize("index", range(14), ids=[name for name, *_ in bad_calls(lambda *shape: torch.ones(shape))])
def test_bad_calls_raise_as_torch(index: int, device: str, launches: list[str]) -> None:
    with pytest.raises((RuntimeError, TypeError)) as theirs:  # on a CPU: a GPU's own libraries check less
        torch.nn.functional.linear(*bad_calls(lambda *shape: torch.ones(shape))[index][1])
    _, arguments, says = bad_calls(lambda *shape: torch.ones(shape, device=device))[index]
    with pytest.raises(theirs.type) as ours:
        linear(*arguments)
    assert ours.type is theirs.type
    assert all(text in str(ours.value) for text in says), str(ours.value)
    assert not launches


def test_bad_options(device: str) -> None:
    x, w = torch.ones(2, 3, device=device), torch.ones(4, 3, device=device)
    with pytest.raises(ValueError, match=r"activation must be one of None, 'relu'.* got 'tanh'"):
        linear(x, w, None, "tanh")
    for p in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"dropout_p must be between 0 and 1, got {p}"):
            linear(x, w, None, None, p)
        with pytest.raises(ValueError, match="dropout must be between 0 and 1"):
            Linear(3, 4, dropout=p)
    with pytest.raises(ValueError, match="activation must be"):
        Linear(3, 4, activation="tanh")


# ---- modules


def test_modules_are_torch_nns_twins(device: str, triton_runs: bool, launches: list[str]) -> None:
    torch.manual_seed(0)
    twin = torch.nn.Linear(7, 5, device=device)
    torch.manual_seed(0)
    ours = LinearReLU(7, 5, device=device)
    x = torch.randn(3, 7, device=device)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), twin.parameters()))
    assert list(ours.state_dict()) == list(twin.state_dict()) == ["weight", "bias"]
    twin.load_state_dict(ours.state_dict())
    tolerance.assert_close(ours(x), reference(x, twin.weight, twin.bias, "relu", torch.ones(3, 5))[0], 7)
    assert repr(ours) == "LinearReLU(in_features=7, out_features=5, bias=True, activation='relu')"
    plain = Linear(7, 5, bias=False, dropout=0.5, device=device, dtype=BF16)
    assert repr(plain) == "Linear(in_features=7, out_features=5, bias=False, dropout=0.5)"
    assert (plain.bias, plain.weight.dtype) == (None, BF16)
    assert (plain(x.to(BF16)) == 0).any()
    assert torch.equal(plain.eval()(x.to(BF16)), linear(x.to(BF16), plain.weight))
    assert launches == [FORWARD] * 4 * triton_runs


@pytest.mark.gate("interp")
@pytest.mark.parametrize("activation, p", ((None, 0.0), ("relu", 0.5), ("gelu", 0.5)))
@pytest.mark.parametrize("dtype", (F32, BF16))
def test_interpreter(activation: str | None, p: float, dtype: torch.dtype, launches: list[str]) -> None:
    torch.manual_seed(3)
    factor = keep_factor((9,), 21, p, "cpu")
    x, w = leaf(torch.randn(9, 8, dtype=dtype)), leaf(torch.randn(21, 8, dtype=dtype))
    b = leaf(torch.randn(21, dtype=dtype))
    torch.manual_seed(3)
    y = linear(x, w, b, activation, p, True)
    check(x, w, b, activation, y, torch.randn(9, 21, dtype=dtype), factor)
    assert launches[1:4] == [FORWARD, DGRAD, WGRAD]


def test_backend_torch_launches_nothing(device: str, launches: list[str]) -> None:
    x, w = torch.randn(3, 4, device=device), torch.randn(5, 4, device=device)
    with tkernels.backend("torch"):
        assert torch.equal(linear(x, w), torch.nn.functional.linear(x, w))
    assert not launches


@pytest.mark.gate("ttsem", "cuda")
def test_autocast_casts_input_and_weight_alone(device: str) -> None:
    """Biases are read and parameters' gradients written in their own dtype: no passes over them."""
    x, w, b = (leaf(torch.randn(shape, device=device)) for shape in ((6, 8), (16, 8), (16,)))
    with torch.autocast(device, dtype=BF16):
        y = linear(x, w, b, "relu")
    y.sum().backward()
    casts = [[step for step in made._steps if step.function is Tensor.to] for made in plan._plans.values.values()]
    assert [len(steps) for steps in casts] == [2, 1]
    assert {t.grad.dtype for t in (x, w, b) if t.grad is not None} == {F32}
