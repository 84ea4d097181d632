"""matmul against float64, torch.mm, torch.bmm and @: ranks, broadcasting, strides, gradients, errors, launches."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

import tkernels
from tests import tolerance
from tests.strides import arrange
from tkernels.functional import matmul

pytestmark = pytest.mark.gate("torch", "ttsem", "cuda")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PRODUCT, VECTOR, FINISH = "matmul_kernel", "vector_matmul_kernel", "linear_finish_kernel"


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of the operands, a dtype, and how each lies (see arrange)."""

    a: tuple[int, ...]
    b: tuple[int, ...]
    dtype: torch.dtype = F32
    la: str = "contiguous"
    lb: str = "contiguous"
    dy: str = "contiguous"

    def __str__(self) -> str:
        return " ".join(str(v).replace("torch.", "") for v in vars(self).values() if v != "contiguous")


CASES = [
    # matrices: partial tiles, multiples of 8 but not of 16, few rows, single rows and columns
    Case((70, 35), (35, 66)),
    Case((24, 40), (40, 24), BF16),
    Case((5, 7), (7, 3), F16),
    Case((1, 40), (40, 24), BF16),
    Case((24, 40), (40, 1), BF16),
    Case((1, 5), (5, 1)),
    # vectors
    Case((37,), (37,)),
    Case((37,), (37, 20)),
    Case((20, 37), (37,)),
    Case((37,), (3, 37, 5)),
    Case((3, 5, 37), (37,), BF16),
    # batches: alone, folded into rows, broadcast on either side and on both, three that do not fold
    Case((3, 17, 9), (3, 9, 18)),
    Case((2, 3, 5, 9), (9, 7)),
    Case((5, 9), (2, 3, 9, 7), BF16),
    Case((2, 1, 5, 9), (3, 9, 7)),
    Case((4, 1, 5, 9), (1, 3, 9, 7), BF16),
    Case((2, 1, 2, 3, 4), (2, 1, 4, 3)),
    # strides: transposed, sliced, expanded; heads taken out of the features, as attention has them
    Case((20, 40), (40, 24), BF16, "transposed", "transposed", "transposed"),
    Case((20, 33), (33, 24), F32, "sliced", "sliced", "sliced"),
    Case((6, 7), (7, 5), F32, "expanded", "strided", "expanded"),
    Case((3, 5, 8), (3, 8, 6), F32, "expanded", "transposed", "expanded"),
    Case((2, 3, 16, 8), (2, 3, 8, 16), BF16, "heads", "heads", "heads"),
    Case((2, 3, 5, 8), (8, 7), F32, "heads", "transposed"),
    Case((2, 5, 8), (8,), F32, "transposed", "strided", "expanded"),
    # reductions shared by programs
    Case((3, 2100), (2100, 5), BF16),
    Case((2100,), (2100, 3)),
]


def operands(case: Case, device: str) -> tuple[Tensor, Tensor]:
    a, b = (torch.randn(shape, device=device).to(case.dtype) for shape in (case.a, case.b))
    return arrange(a, case.la).detach().requires_grad_(), arrange(b, case.lb).detach().requires_grad_()


def exact(t: Tensor) -> Tensor:
    return t.detach().cpu().double().requires_grad_()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case, device: str, triton_runs: bool, launches: list[str]) -> None:
    a, b = operands(case, device)
    y = matmul(a, b)
    a64, b64 = exact(a), exact(b)
    y64 = a64 @ b64
    dy = arrange(torch.randn(y.shape, device=device).to(case.dtype), case.dy if y.dim() else "contiguous")
    gradients = torch.autograd.grad(y, (a, b), dy)
    k = a.shape[-1]
    assert y.dtype == case.dtype
    assert y.is_contiguous()
    tolerance.assert_close(y, y64.detach(), k, scale=k**0.5, name="y")
    for t, got, want in zip((a, b), gradients, torch.autograd.grad(y64, (a64, b64), exact(dy))):
        terms = max(y.numel() * k // t.numel(), 1)
        tolerance.assert_close(got, want, terms, scale=terms**0.5, name=f"gradient of {list(t.shape)}")
        assert got.dtype == t.dtype
    if triton_runs:
        assert set(launches) <= {PRODUCT, VECTOR, FINISH}
        assert len([name for name in launches if name != FINISH]) >= 3
        assert (FINISH in launches) == (k > 1000)


@pytest.mark.parametrize("dtype", (F32, BF16))
def test_as_mm_bmm_and_at(dtype: torch.dtype, device: str) -> None:
    a, b = (torch.randn(3, 17, 17, device=device).to(dtype) for _ in range(2))
    for mine, theirs in (
        (matmul(a, b), torch.bmm(a, b)),
        (matmul(a[0], b[0]), torch.mm(a[0], b[0])),
        (matmul(a, b[1]), a @ b[1]),
        (matmul(a[:, 0], b[0, 0]), a[:, 0] @ b[0, 0]),
    ):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        tolerance.assert_close(mine, theirs.cpu().double(), 2 * 17)


@pytest.mark.parametrize(
    "a, b", (((0, 4), (4, 3)), ((3, 0), (0, 4)), ((2, 0, 3), (3, 1)), ((0,), (0,)), ((2, 0), (0,)), ((0, 0), (5, 0, 0)))
)
def test_empty(a: tuple[int, ...], b: tuple[int, ...], device: str) -> None:
    x, y = torch.randn(a, device=device, requires_grad=True), torch.randn(b, device=device, requires_grad=True)
    out, want = matmul(x, y), torch.matmul(x, y)
    assert torch.equal(out, want)
    for got, expected in zip(torch.autograd.grad(out.sum(), (x, y)), torch.autograd.grad(want.sum(), (x, y))):
        assert torch.equal(got, expected)


def test_only_the_gradients_asked_for(device: str, triton_runs: bool, launches: list[str]) -> None:
    a, b = torch.randn(5, 6, device=device, requires_grad=True), torch.randn(6, 7, device=device)
    matmul(a, b).sum().backward()
    assert a.grad is not None
    if triton_runs:
        assert launches == [PRODUCT, PRODUCT]


@pytest.mark.parametrize("shapes", (((5, 6), (6, 7)), ((6,), (2, 6, 3)), ((2, 5, 6), (6,)), ((2, 5, 6), (6, 3))))
def test_only_b_wants_a_gradient(shapes: tuple[tuple[int, ...], ...], device: str, launches: list[str]) -> None:
    a, b = torch.randn(shapes[0], device=device), torch.randn(shapes[1], device=device, requires_grad=True)
    y = matmul(a, b)
    made = len(launches)
    y.sum().backward()
    assert a.grad is None
    assert b.grad is not None
    b64 = exact(b)
    (want,) = torch.autograd.grad((exact(a).detach() @ b64).sum(), b64)
    tolerance.assert_close(b.grad, want, 10, scale=3.0)
    assert len(launches) - made <= 1


def test_gradients_of_gradients(device: str) -> None:
    """Differentiable twice, as torch's: the gradient of a gradient's square, against float64."""
    a, b = (torch.randn(shape, device=device, requires_grad=True) for shape in ((2, 5, 6), (6, 7)))

    def twice(product, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        (dx,) = torch.autograd.grad(product(x, y).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, y))

    for got, want in zip(twice(matmul, a, b), twice(torch.matmul, exact(a), exact(b))):
        tolerance.assert_close(got, want, 4 * 6 * 7 * 10)


@pytest.mark.gate("torch")
@pytest.mark.parametrize("a, b", (((2, 3), (3, 4)), ((3,), (2, 3, 4)), ((2, 1, 3, 2), (2, 2, 2))))
def test_gradcheck(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    x, y = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (a, b))
    assert torch.autograd.gradcheck(matmul, (x, y))
    assert torch.autograd.gradgradcheck(matmul, (x, y))


def test_nan_and_inf_pass(device: str) -> None:
    a, b = torch.randn(4, 20), torch.randn(20, 5)
    a[1, 3], a[2, 4], b[7, 1] = float("nan"), float("inf"), -float("inf")
    got, want = matmul(a.to(device), b.to(device)).cpu(), a @ b
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[want.isinf()], want[want.isinf()])


def test_autocast(device: str, triton_runs: bool) -> None:
    a, b = torch.randn(8, 9, device=device, requires_grad=True), torch.randn(9, 5, device=device)
    with torch.autocast("cuda" if triton_runs else "cpu", torch.bfloat16):
        y = matmul(a, b)
    assert y.dtype == BF16
    y.float().sum().backward()
    assert a.grad is not None
    assert a.grad.dtype == F32


def test_same_bits_twice(device: str) -> None:
    a, b = torch.randn(3, 2100, device=device), torch.randn(2100, 20, device=device)
    assert torch.equal(matmul(a, b), matmul(a, b))


@pytest.mark.parametrize("dtype", (torch.int64, torch.complex64, torch.float64))
def test_other_dtypes_are_pytorchs(dtype: torch.dtype, device: str, launches: list[str]) -> None:
    if dtype == torch.int64 and torch.cuda.is_available():
        pytest.skip("torch has no integer product on a GPU")
    a, b = torch.ones(3, 4, device=device).to(dtype), torch.ones(4, 5, device=device).to(dtype)
    assert torch.equal(matmul(a, b), torch.matmul(a, b))
    assert not launches


@pytest.mark.gate("ttsem", "cuda")
def test_small_tiles(device: str) -> None:
    """Several programs on each axis, partial tiles, splits, in every combination of layouts."""
    from tkernels.core.config import Config
    from tkernels.ops.matmul import kernels

    config = Config.of(num_warps=4, num_stages=2, BLOCK_M=16, BLOCK_N=16, BLOCK_K=16)
    for (la, lb), dtype in zip(itertools.product(("contiguous", "transposed"), repeat=2), (F32, BF16, F16, BF16)):
        a, b = (torch.randn(s, device=device).to(dtype) for s in ((2, 2, 33, 40), (2, 1, 40, 35)))
        want = a.cpu().double() @ b.cpu().double()
        for splits in (0, 2):
            got = kernels.launch_matmul(arrange(a, la), arrange(b, lb), config=config, splits=splits)
            tolerance.assert_close(got, want, 40)
    with pytest.raises(ValueError, match="neither matrix dimension"):
        kernels.launch_matmul(a[..., ::2], b[..., ::2, :])


@pytest.mark.gate("ttsem", "cuda")
def test_float64_beside_triton_goes_to_pytorch(device: str) -> None:
    with tkernels.backend("auto"):
        a = torch.randn(3, 3, device=device, dtype=torch.float64)
        assert matmul(a, a).dtype == torch.float64
