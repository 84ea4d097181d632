"""One graph gives one gradient: its bits do not depend on whether it is to be differentiated once more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tkernels.functional as TF
from tkernels.cpu import compiler, convolution, product

pytestmark = [
    pytest.mark.gate("torch"),
    pytest.mark.skipif(not compiler.enabled(), reason="TKERNELS_COMPILE=0 or no C++ compiler"),
]

CL = torch.channels_last


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    t = torch.randn(shape).to(dtype)
    return (t.contiguous(memory_format=CL) if len(shape) == 4 else t).requires_grad_()


def _batch_norm(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    leaves = [_leaf(16, 32, 64, 64, dtype=dtype), _leaf(32), _leaf(32)]
    return TF.batch_norm(leaves[0], None, None, *leaves[1:], training=True, activation="relu"), leaves


def _cross_entropy(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    x = _leaf(40000, 7, dtype=dtype)
    return TF.cross_entropy(x, torch.randint(7, (40000,)), label_smoothing=0.5), [x]


def _stage(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    leaves = [_leaf(8, 8, 64, 64, dtype=dtype), _leaf(16, 8, 3, 3, dtype=dtype), _leaf(16, 16, 3, 3, dtype=dtype)]
    layers = [TF.ConvBNLayer(w, padding=1) for w in leaves[1:]]
    return TF.conv_stage(leaves[0], layers, 2, 0.25, True), leaves


def _depthwise(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    leaves = [_leaf(2, 16, 20, 20, dtype=dtype), _leaf(16, 1, 5, 5, dtype=dtype)]
    ways = convolution.ways(800, (16, 1, 5, 5), (1, 1), (2, 2), (1, 1), 16, dtype)
    assert ways is not None
    return convolution.conv2d(convolution.Call((1, 1), (2, 2), (1, 1), 16, dtype, ways), *leaves, None), leaves


def _gelu(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    leaves = [_leaf(512, 96, dtype=dtype), _leaf(1024, 96, dtype=dtype)]
    run = product.plan((512, 1024), 96, dtype, "gelu", True)
    assert not isinstance(run, str)
    return run(*leaves, None), leaves


EXHAUSTIVE = pytest.mark.extended("torch")  # the same passes as in float32, compiled anew


@pytest.mark.parametrize("dtype", (torch.float32, pytest.param(torch.bfloat16, marks=EXHAUSTIVE)), ids=("fp32", "bf16"))
@pytest.mark.parametrize("make", (_batch_norm, _cross_entropy, _stage, _depthwise, _gelu), ids=lambda f: f.__name__[1:])
def test_differentiated_or_not(make: Callable[[torch.dtype], tuple[Tensor, list[Tensor]]], dtype: torch.dtype) -> None:
    y, leaves = make(dtype)
    d = torch.randn(y.shape).to(y.dtype)
    plain = torch.autograd.grad(y, leaves, d, retain_graph=True)
    again = torch.autograd.grad(y, leaves, d, retain_graph=True, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again))
    assert all(g.requires_grad for g in again)
    torch.autograd.grad(sum(g.float().square().sum() for g in again), leaves, allow_unused=True)


def test_second_derivatives_are_those_of_torch_s_calls() -> None:
    leaves = [_leaf(16, 32, 64, 64), _leaf(32), _leaf(32)]
    found = []
    for call in (
        lambda x, w, b: TF.batch_norm(x, None, None, w, b, training=True, activation="relu"),
        lambda x, w, b: F.relu(F.batch_norm(x, None, None, w, b, training=True)),
    ):
        (g,) = torch.autograd.grad(call(*leaves).square().sum(), leaves[1], create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), leaves[1:]))
    for a, b in zip(*found):
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("padding, groups", [(0, 1), (1, 1), (0, 2)])
def test_what_is_a_product_of_matrices(padding: int, groups: int) -> None:
    """A 1 x 1 convolution without padding or groups; the gradients are torch's."""
    leaves = [_leaf(2, 32, 9, 9, dtype=torch.bfloat16), _leaf(32, 32 // groups, 1, 1, dtype=torch.bfloat16)]
    side = 9 + 2 * padding
    arguments = (1, 1), (padding, padding), (1, 1), groups
    ways = convolution.ways(2 * side * side, tuple(leaves[1].shape), *arguments, torch.bfloat16)
    assert ways == (("product", "product") if (padding, groups) == (0, 1) else None)
    if ways is not None:
        y = convolution.conv2d(convolution.Call(*arguments, torch.bfloat16, ways), *leaves, None)
        d = torch.randn_like(y)
        expected = torch.autograd.grad(F.conv2d(*leaves), leaves, d)
        torch.testing.assert_close(torch.autograd.grad(y, leaves, d), expected, rtol=0.02, atol=0.05)
