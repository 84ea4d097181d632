"""torch.ops.tkernels.matmul: opcheck, torch.compile, export, autocast, FLOPs, gradients of gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import tkernels
import tkernels.functional as F
from tests.core.tracing import check_autocast_in_compile, compare_compiled, operators

pytestmark = [pytest.mark.gate("torch", "interp", "cuda"), pytest.mark.usefixtures("tracing")]
# the interpreter takes its time
slow_there = pytest.mark.extended("interp")

# matrices, batches, a matrix for all batches, batches broadcast on both sides, nothing
SHAPES = [((5, 7), (7, 3)), ((2, 5, 7), (2, 7, 3)), ((2, 2, 5, 7), (7, 3)), ((2, 1, 5, 7), (3, 7, 4)), ((2, 0), (0, 3))]


def draw(device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, requires_grad=True)


@pytest.mark.gate("interp", "cuda")
@pytest.mark.parametrize("a, b", [SHAPES[2], *(pytest.param(*s, marks=slow_there) for s in SHAPES if s != SHAPES[2])])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_opcheck(a: tuple[int, ...], b: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """The launch writes into a tensor it is given, in that one's dtype."""
    x, y = torch.randn(a, device=device), torch.randn(b, device=device).mT.contiguous().mT
    out = torch.empty_like(x @ y, dtype=dtype)
    torch.library.opcheck(torch.ops.tkernels.matmul, (x, y, out))
    torch.ops.tkernels.matmul(x, y, out)
    torch.testing.assert_close(out, F.matmul(x, y).to(dtype))


class Mix(torch.nn.Module):
    """Rows by a matrix, batches by batches, a matrix for all batches on the left, vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (torch.nn.Parameter(torch.randn(7, 7)) for _ in range(2))
        self.row = torch.nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor) -> Tensor:
        y = F.matmul(x, self.right)
        z = F.matmul(F.matmul(self.left, y.mT).mT, self.left)
        return z + F.matmul(y, self.row).unsqueeze(-1) + F.matmul(self.row, y.mT).unsqueeze(-1)


def test_compile_with_any_batch(device: str, triton_runs: bool) -> None:
    counter = compare_compiled(Mix().to(device), lambda n: torch.randn(n, 3, 7), (2, 4, 5), 7**3, device)
    assert counter.frame_count == 2  # the second size makes the batch dynamic, and that serves the others
    assert operators(counter.graphs[-1]) == ({"matmul"} if triton_runs else set())


@slow_there
def test_autocast_in_compile(device: str) -> None:
    check_autocast_in_compile(Mix().to(device), torch.randn(2, 3, 7, device=device))


@slow_there
def test_export_with_dynamic_batch(device: str, triton_runs: bool) -> None:
    model = Mix().to(device)
    x = torch.randn(4, 3, 7, device=device)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert operators(program.graph_module) == ({"matmul"} if triton_runs else set())
    other = torch.randn(6, 3, 7, device=device)
    torch.testing.assert_close(program.module()(other), model(other))


def test_fake_and_meta_tensors(device: str) -> None:
    with FakeTensorMode(), torch.device(device):
        assert F.matmul(torch.randn(4, 1, 5, 7), torch.randn(2, 7, 3)).shape == (4, 2, 5, 3)
        assert F.matmul(torch.randn(7), torch.randn(7)).shape == ()
    with torch.device("meta"), tkernels.backend("auto"):
        assert F.matmul(torch.randn(5, 7), torch.randn(7)).device.type == "meta"


def test_flops(device: str) -> None:
    """Of batched products, broadcast ones and every gradient: torch's count, which takes them apart into bmm."""
    totals = []
    for product in (F.matmul, torch.matmul):
        a, b, c = draw(device, 3, 1, 5, 7), draw(device, 2, 7, 4), draw(device, 4, 6)
        with FlopCounterMode(display=False) as counter:
            product(product(a, b), c).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] == 3 * 2 * 3 * 2 * (5 * 7 * 4 + 5 * 4 * 6)


def test_counted_gradients_of_gradients(device: str) -> None:
    """The registered operator can be differentiated twice, as the function can."""
    outcomes = []
    for counted in (True, False):
        torch.manual_seed(0)
        a, b = draw(device, 2, 5, 6), draw(device, 6, 7)
        with FlopCounterMode(display=False) if counted else torch.enable_grad():
            (da,) = torch.autograd.grad(F.matmul(a, b).square().sum(), a, create_graph=True)
            outcomes.append(torch.autograd.grad(da.square().sum(), (a, b)))
    torch.testing.assert_close(*outcomes)


def test_traced_with_symbols_and_gradients(device: str, triton_runs: bool) -> None:
    """make_fx's graph of forward and backward, called on other sizes."""

    def call(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.matmul(a, b).square().sum(), (a, b))

    graph = make_fx(call, tracing_mode="symbolic")(draw(device, 3, 2, 4, 5), draw(device, 2, 5, 4))
    assert operators(graph) == ({"matmul"} if triton_runs else set())
    other = draw(device, 4, 3, 2, 6), draw(device, 3, 6, 5)
    torch.testing.assert_close(graph(*other), call(*other))
