"""Products by descriptors (TKERNELS_TMA=1): values against float64, when they are taken, and their plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tkernels
from tests.tolerance import assert_close
from tkernels.core import activation as activations
from tkernels.core import descriptors, mode, plan, targets
from tkernels.core.config import Config
from tkernels.ops.conv.op import geometry

if not mode.HAS_TRITON:
    pytest.skip("needs triton", allow_module_level=True)

from tkernels.ops.conv import kernels_tma as conv_tma
from tkernels.ops.linear import kernels_tma
from tkernels.ops.linear.kernels_tma import Operand

pytestmark = pytest.mark.gate("ttsem", "cuda")

BF16, F16 = torch.bfloat16, torch.float16
CL = torch.channels_last
# no block like another; the smallest that descriptors take
SMALL = Config.of(4, 2, None, BLOCK_M=32, BLOCK_N=16, BLOCK_K=64)
# partial tiles on every axis, several of them a program, and a step of the reduction that is half outside
M, N, K = 77, 40, 104


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that each takes several tiles."""
    monkeypatch.setattr(descriptors, "enabled", True)
    if not descriptors.on(targets.current()):
        pytest.skip("this GPU takes no descriptors")
    with targets.pretend(dataclasses.replace(targets.current(), multiprocessors=3)):
        plan.forget()
        yield
    plan.forget()


def matrix(rows: int, columns: int, dtype: torch.dtype, transposed: bool, device: str) -> tuple[Tensor, Operand]:
    """Random values, as a part of a larger matrix of 1000s, and how they lie."""
    shape = (columns, rows) if transposed else (rows, columns)
    wide = torch.full((shape[0] + 1, shape[1] + 8), 1e3, device=device, dtype=dtype)
    t = wide[: shape[0], : shape[1]]
    t.copy_(torch.randn(shape, device=device))
    return t.t() if transposed else t, Operand(t, rows, columns, wide.shape[1], transposed)


@pytest.mark.parametrize("a_transposed, b_transposed", ((False, True), (False, False), (True, False), (True, True)))
@pytest.mark.parametrize("dtype", (BF16, F16))
def test_product(a_transposed: bool, b_transposed: bool, dtype: torch.dtype, device: str, launches: list[str]) -> None:
    rows = 80 if a_transposed else M  # what is dense comes in units of 16 bytes
    (a, left), (b, right) = matrix(rows, K, dtype, a_transposed, device), matrix(K, N, dtype, b_transposed, device)
    out = torch.full((rows + 1, N), 7.0, device=device, dtype=dtype)
    assert kernels_tma.product(left, right, out[:rows], launched=SMALL)
    assert_close(out[:rows], a.cpu().double() @ b.cpu().double(), K)
    assert (out[rows:] == 7).all(), "rows behind the result were written"
    assert launches == ["linear_tma_kernel"]
    again = torch.empty_like(out[:rows])
    assert kernels_tma.product(left, right, again, launched=SMALL)
    assert torch.equal(again, out[:rows])


@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
def test_linear_through_its_front_door(activation: str | None, device: str, launches: list[str]) -> None:
    x, w, b = (torch.randn(shape, device=device).to(BF16) for shape in ((2, 150, 72), (264, 72), (264,)))
    for bias in (b, None):
        launches.clear()
        y = tkernels.functional.linear(x, w, bias, activation)
        assert launches == ["linear_tma_kernel"]
        exact = F.linear(x.cpu().double(), w.cpu().double(), None if bias is None else bias.cpu().double())
        assert_close(y, activations.apply(exact, activation), 72)


def test_a_plan_makes_descriptors_of_each_calls_tensors(device: str, launches: list[str]) -> None:
    """Later calls of a kind run a plan that an earlier one made, on other memory."""
    for _ in range(3):
        a, b = (torch.randn(shape, device=device).to(BF16) for shape in ((130, 64), (64, 256)))
        assert_close(tkernels.functional.matmul(a, b), a.cpu().double() @ b.cpu().double(), 64)
    assert launches == 3 * ["linear_tma_kernel"]


def test_gradients_follow(device: str, launches: list[str]) -> None:
    x, w, dy = (torch.randn(shape, device=device).to(BF16) for shape in ((130, 64), (72, 64), (130, 72)))
    leaves = [t.requires_grad_() for t in (x, w)]
    exact = [t.detach().cpu().double().requires_grad_() for t in leaves]
    found = torch.autograd.grad(tkernels.functional.linear(*leaves, activation="relu"), leaves, dy)
    wanted = torch.autograd.grad(F.relu(F.linear(*exact)), exact, dy.cpu().double())
    assert launches[0] == "linear_tma_kernel"
    for got, want in zip(found, wanted):
        assert_close(got, want, 130)


# input, output channels, window, padding, dilation, tile of images, rows and columns
CONVOLUTIONS = {
    "64 channels": ((3, 64, 9, 7), 64, (3, 3), (1, 1), (1, 1), (2, 4, 4)),
    "128 channels": ((1, 128, 5, 6), 136, (3, 3), (1, 1), (1, 1), (1, 4, 8)),
    "24 channels": ((5, 24, 4, 11), 40, (3, 3), (1, 1), (1, 1), (4, 2, 2)),
    "one pixel of many images": ((9, 16, 3, 3), 16, (3, 3), (1, 1), (1, 1), (8, 1, 1)),
    "no padding": ((2, 16, 6, 7), 24, (3, 3), (0, 0), (1, 1), (1, 4, 4)),
    "5x3, dilated": ((2, 32, 9, 8), 24, (5, 3), (4, 2), (2, 2), (2, 2, 4)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("activation", (None, "relu"))
def test_convolution(name: str, activation: str | None, device: str, launches: list[str]) -> None:
    shape, out, window, padding, dilation, (images, rows, cols) = CONVOLUTIONS[name]
    dtype = F16 if "24" in name else BF16
    x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=CL)
    w = torch.randn((out, shape[1], *window), device=device).to(dtype).contiguous(memory_format=CL)
    bias = torch.randn(out, device=device).to(dtype) if activation else None
    g = geometry(tuple(x.shape), tuple(w.shape), (1, 1), padding, dilation, 1)
    room = torch.full((shape[0] + 1, g.out_h, g.out_w, out), 7.0, device=device, dtype=dtype)
    y = room[: shape[0]].permute(0, 3, 1, 2)
    small = Config.of(4, 2, None, BLOCK_I=images, BLOCK_H=rows, BLOCK_W=cols, BLOCK_N=32, BLOCK_K=32)
    assert conv_tma.forward(x, w, bias, y, g, activation, small)
    exact = F.conv2d(*(None if t is None else t.cpu().double() for t in (x, w, bias)), 1, padding, dilation)
    assert_close(y, activations.apply(exact, activation), g.reduction)
    assert (room[shape[0] :] == 7).all(), "pixels behind the result were written"
    assert launches == ["conv_tma_kernel"]
    again = torch.empty_like(y)
    conv_tma.forward(x, w, bias, again, g, activation, small)
    assert torch.equal(again, y)


def test_an_infinite_weight_stays_with_its_tap(device: str) -> None:
    """What is fetched beside the last channels of a tap is zeros, not the next tap's weights."""
    x, w = torch.randn(1, 24, 4, 4, device=device).to(BF16), torch.randn(16, 24, 3, 3, device=device).to(BF16)
    w[3, 0, 1, 1] = torch.inf  # of the tap that never meets the padding
    x, w = (t.contiguous(memory_format=CL) for t in (x, w))
    y = tkernels.functional.conv2d(x, w, padding=1)
    assert_close(y, F.conv2d(x.cpu().double(), w.cpu().double(), padding=1), 9 * 24)


def test_convolution_through_its_front_door(device: str, launches: list[str]) -> None:
    """A contiguous float32 weight under autocast is packed as for other kernels."""
    x = torch.randn(2, 64, 6, 5, device=device).to(BF16).contiguous(memory_format=CL)
    w, b = torch.randn(72, 64, 3, 3, device=device), torch.randn(72, device=device)
    with torch.autocast("cuda", BF16):
        y = tkernels.functional.conv2d(x, w, b, padding=1, activation="relu")
    assert launches == ["conv_pack_kernel", "conv_tma_kernel"]
    exact = F.conv2d(x.cpu().double(), w.to(BF16).cpu().double(), b.cpu().double(), padding=1)
    assert_close(y, F.relu(exact), 9 * 64)


def test_what_descriptors_cannot_describe_is_launched_as_ever(device: str, launches: list[str]) -> None:
    def product(m: int, n: int, k: int, dtype: torch.dtype = BF16, first: int = 0) -> None:
        a = torch.randn(m * k + first, device=device).to(dtype)[first:].view(m, k)
        b = torch.randn(k, n, device=device).to(dtype)
        assert_close(tkernels.functional.matmul(a, b), a.cpu().double() @ b.cpu().double(), k)

    product(40, 20, 64)  # rows of 40 bytes
    product(40, 24, 36)
    product(40, 24, 64, torch.float32)
    product(40, 24, 64, first=1)  # starts between two multiples of 16 bytes
    for older in ("sm_80", "gfx942"):
        with targets.pretend(older):
            product(40, 24, 64)
    x = torch.randn(1, 64, 8, 8, device=device).to(BF16)
    w = torch.randn(64, 64, 3, 3, device=device).to(BF16).contiguous(memory_format=CL)
    tkernels.functional.conv2d(x.contiguous(memory_format=CL), w, stride=2, padding=1)
    tkernels.functional.conv2d(x[:, :32].contiguous(memory_format=CL), w[:, :32].contiguous(memory_format=CL), groups=1)
    assert [name for name in launches if "tma" in name] == ["conv_tma_kernel"], launches
    assert launches.count("matmul_kernel") == 6


def test_without_the_option_nothing_is_described(
    device: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors, "enabled", False)
    tkernels.functional.matmul(*(torch.randn(64, 64, device=device).to(BF16) for _ in range(2)))
    assert launches == ["matmul_kernel"]


@pytest.mark.parametrize("height, width, tile", ((56, 56, (4, 8, 8)), (28, 28, (16, 4, 4)), (14, 14, (64, 2, 2))))
def test_tiles_cover_maps_without_a_rest(height: int, width: int, tile: tuple[int, int, int]) -> None:
    assert conv_tma.pixels(height, width, 256) == tile


def test_sizes_are_not_compiled_for() -> None:
    for kernel in (kernels_tma.linear_tma_kernel, conv_tma.conv_tma_kernel):
        left = {p.name for p in kernel.params if p.do_not_specialize}
        assert {"tiles_m", "tiles_n", "steps"} <= left
