"""What the operators' autograd functions share, on a function of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tkernels.core.autograd import once_differentiable

pytestmark = pytest.mark.gate("torch", "cuda")


class Cube(torch.autograd.Function):
    """x**3, whose backward, as a kernel would, asks for the memory of what it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unused: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        assert dy.data_ptr() != 0
        assert dy.shape == x.shape
        return 3 * x * x * dy, None


def test_many_gradients_at_once(device: str) -> None:
    x = torch.randn(2, 3, device=device, requires_grad=True)
    y = Cube.apply(x, x.detach())
    rows = torch.randn(4, 2, 3, device=device)
    (found,) = torch.autograd.grad(y, x, rows, is_grads_batched=True)
    torch.testing.assert_close(found, 3 * x.detach() ** 2 * rows)


class Mine(Tensor):
    """A tensor of a user's own class."""


class Scaled(torch.autograd.Function):
    """x * w as a plain tensor, whose gradients are of the class of w, as torch.empty_like makes them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return (x * w).as_subclass(Tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * dy, None


def test_many_gradients_beside_a_subclass(device: str) -> None:
    x = torch.randn(2, 3, device=device, requires_grad=True)
    w = torch.randn(2, 3, device=device)
    rows = torch.randn(4, 2, 3, device=device)
    (found,) = torch.autograd.grad(Scaled.apply(x, w.as_subclass(Mine)), x, rows, is_grads_batched=True)
    torch.testing.assert_close(found, w * rows)


def test_a_jacobian_at_once(device: str) -> None:
    x = torch.randn(5, device=device)
    found = torch.autograd.functional.jacobian(lambda x: Cube.apply(2 * x, x), x, vectorize=True)
    torch.testing.assert_close(found, torch.diag(24 * x * x))
