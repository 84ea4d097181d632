"""What is done to gradients: many at once, one more derivative, tangents, hooks on what was saved for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tests.conformance.functions import Function, forward
from tests.conformance.functions import function as function  # a fixture

pytestmark = pytest.mark.gate("torch", "ttsem", "cuda")
ROWS = 3


def rows_of(y: Tensor) -> Tensor:
    return torch.randn(ROWS, *y.shape, generator=torch.Generator().manual_seed(5)).to(y.device)


def by_autograd(y: Tensor, leaves: list[Tensor], rows: Tensor) -> Any:
    return torch.autograd.grad(y, leaves, rows, is_grads_batched=True)


def by_vmap(y: Tensor, leaves: list[Tensor], rows: Tensor) -> Any:
    return torch.func.vmap(lambda row: torch.autograd.grad(y, leaves, row, retain_graph=True))(rows)


def by_two_vmaps(y: Tensor, leaves: list[Tensor], rows: Tensor) -> Any:
    found = torch.func.vmap(torch.func.vmap(lambda row: torch.autograd.grad(y, leaves, row, retain_graph=True)))(
        torch.stack((rows, 2 * rows), -1).movedim(-1, 0)
    )
    return [t[0] for t in found]


@pytest.mark.parametrize("way", (by_autograd, by_vmap, by_two_vmaps))
def test_many_at_once(way: Callable[..., Any], function: Function, device: str) -> None:
    leaves = function.leaves(device)
    y = forward(function, leaves)
    rows = rows_of(y)
    one_by_one = [torch.autograd.grad(y, leaves, row, retain_graph=True) for row in rows]
    found = way(y, leaves, rows)
    exact = function.theirs(*leaves)
    reference = [torch.autograd.grad(exact, leaves, row, retain_graph=True) for row in rows]
    for got, single, expected in zip(found, zip(*one_by_one), zip(*reference)):
        if function.on(device) not in (None, "SiluBackward0"):  # torch's own batches may sum in another order
            assert torch.equal(got, torch.stack(single))
        torch.testing.assert_close(got, torch.stack(expected), atol=1e-4, rtol=1e-3)


def test_a_jacobian_at_once(function: Function, device: str) -> None:
    leaves = function.leaves(device)

    def jacobian(f: Callable[..., Tensor]) -> Any:
        def first(*own: Tensor) -> Tensor:
            return f(*own).flatten()[:4]

        return torch.autograd.functional.jacobian(first, tuple(leaves), vectorize=True)

    for got, expected in zip(jacobian(function.ours), jacobian(function.theirs)):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


DIFFERENTIABLE_KERNELS = ("_MatmulBackward",)


def second(f: Callable[..., Tensor], leaves: list[Tensor], batched: bool) -> Any:
    """Derivatives of what the gradients come to."""
    y = f(*leaves)
    rows = rows_of(y) if batched else rows_of(y)[0]
    first = torch.autograd.grad(y, leaves, rows, create_graph=True, is_grads_batched=batched, allow_unused=True)
    total: Any = sum(t.square().sum() for t in first if t is not None)
    return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("batched", (False, True), ids=("one", "many"))
def test_once_more(batched: bool, function: Function, device: str) -> None:
    """Through torch's own calls, or refused: never a constant."""
    leaves = function.leaves(device)
    refused = device == "cuda" and function.kernels not in DIFFERENTIABLE_KERNELS
    if refused or function.passes == "SiluBackward0":  # the synchronised norm
        with pytest.raises(RuntimeError, match="once_differentiable"):
            second(function.ours, leaves, batched)
        return
    for got, expected in zip(second(function.ours, leaves, batched), second(function.theirs, leaves, batched)):
        torch.testing.assert_close(got, expected, atol=1e-3 * (1 + expected.abs().max().item()), rtol=1e-3)


def test_a_tangent_of_the_gradient(function: Function, device: str) -> None:
    """Of a graph made before: kept, or refused."""
    leaves = function.leaves(device)

    def tangents(f: Callable[..., Tensor]) -> list[Tensor | None]:
        y = f(*leaves)
        row, along, _ = rows_of(y)
        with forward_ad.dual_level():
            found = torch.autograd.grad(y, leaves, forward_ad.make_dual(row, along))
            return [forward_ad.unpack_dual(t).tangent for t in found]

    if device == "cuda" or function.passes == "SiluBackward0":
        with pytest.raises(RuntimeError, match=r"forward(-mode)? AD"):
            tangents(function.ours)
        return
    try:
        reference = tangents(function.theirs)
    except NotImplementedError:  # silu's gradient has none in torch
        with pytest.raises(NotImplementedError, match="silu"):
            tangents(function.ours)
        return
    for got, expected in zip(tangents(function.ours), reference):
        assert got is not None
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


def test_a_hessian_of_kernels_is_refused(function: Function, device: str, triton_runs: bool) -> None:
    """torch.autograd.functional takes what autograd does not reach for a zero."""
    leaves = function.leaves(device)

    def hessian(f: Callable[..., Tensor]) -> Any:
        rest = [t.detach() for t in leaves[1:]]
        return torch.autograd.functional.hessian(lambda x: f(x, *rest).square().sum(), leaves[0].detach())

    if triton_runs and function.kernels not in DIFFERENTIABLE_KERNELS:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            hessian(function.ours)
    elif function.passes != "SiluBackward0":
        torch.testing.assert_close(hessian(function.ours), hessian(function.theirs), atol=1e-3, rtol=1e-3)


def test_stored_with_the_opposite_sign(function: Function, device: str) -> None:
    """As autograd may hand on what went through complex numbers."""
    leaves = function.leaves(device)
    y = forward(function, leaves)
    row = rows_of(y)[0]
    negated = torch._neg_view(-row)  # type: ignore[attr-defined]
    expected = torch.autograd.grad(y, leaves, row, retain_graph=True)
    found = torch.autograd.grad(y, leaves, negated)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
