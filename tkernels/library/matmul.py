"""torch.ops.tkernels.matmul. Its gradients are products by the same operator, which can be differentiated again: it has
no backward operator."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tkernels.core import autograd
from tkernels.core import mode as runtime
from tkernels.library import common
from tkernels.ops.matmul import op as ops

__all__ = ["matmul"]


@torch.library.custom_op("tkernels::matmul", mutates_args=())
def matmul(a: Tensor, b: Tensor, dtype: torch.dtype | None) -> Tensor:
    """a [*, M, K] @ b [*, K, N], batch dimensions broadcast; contiguous, in ``dtype`` (default: a's)."""
    if runtime.use_triton(a, b):
        return ops.forward(a, b, dtype)
    with common.without_autocast(a.device):
        return torch.matmul(a.to(dtype or a.dtype), b.to(dtype or b.dtype)).contiguous()


@matmul.register_fake
def _(a: Tensor, b: Tensor, dtype: torch.dtype | None) -> Tensor:
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.new_empty((*batch, a.shape[-2], b.shape[-1]), dtype=dtype or a.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, _ = inputs
    needs_a, needs_b = ctx.needs_input_grad[:2]
    ctx.shapes = a.shape, b.shape
    autograd.save(ctx, a if needs_b else None, b if needs_a else None)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (a, b), (a_shape, b_shape) = autograd.saved(ctx), ctx.shapes
    return *ops.gradients(torch.ops.tkernels.matmul, a, b, a_shape, b_shape, dy), None


matmul.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.tkernels.matmul)
def _flops(a_shape: Any, b_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(out_shape) * a_shape[-1]
