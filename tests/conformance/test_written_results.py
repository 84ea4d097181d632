"""What an operator gives may be written to, as torch's results may: ``y += x``, ``loss /= n``, nn.ReLU(inplace=True).

Autograd lets nobody write to a view that a custom Function returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tkernels.functional as TF
import tkernels.nn as tnn

pytestmark = pytest.mark.gate("torch", "ttsem", "cuda")

CL = torch.channels_last
Make = Callable[..., Tensor]


def _conv(t: Make, **options: Any) -> Tensor:
    return TF.conv2d(t(2, 4, 6, 6), t(8, 4 // options.get("groups", 1), 3, 3), **options)


def _stage(t: Make, training: bool, pool: int | None) -> Tensor:
    given = t(8), t(8)
    layer = TF.ConvBNLayer(t(8, 4, 3, 3), None, *given, torch.zeros_like(given[0]), torch.ones_like(given[0]))
    return TF.conv_stage(t(2, 4, 6, 6), [layer], pool, 0.0, training)


def _module(t: Make) -> Tensor:
    x = t(2, 5, 8)
    module = tnn.MultiheadAttention(8, 2, batch_first=True, device=x.device)
    result: Tensor = module(x, x, x, need_weights=False)[0]
    return result


def _loss(t: Make, reduction: str, *shape: int) -> Tensor:
    x = t(*shape)
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64, device=x.device)
    return TF.cross_entropy(x, target, reduction=reduction)


CALLS: dict[str, Callable[[Make], Tensor]] = {
    "conv2d": _conv,
    "conv2d gelu": lambda t: _conv(t, activation="gelu"),
    "conv2d depthwise": lambda t: _conv(t, groups=4),
    "conv2d 1x1": lambda t: TF.conv2d(t(2, 4, 6, 6), t(6, 4, 1, 1)),
    "conv2d of one image": lambda t: TF.conv2d(t(4, 6, 6), t(6, 4, 3, 3)),
    "batch_norm": lambda t: TF.batch_norm(t(2, 4, 6, 6), None, None, training=True),
    "batch_norm (N, C)": lambda t: TF.batch_norm(t(7, 4), None, None, training=True),
    "batch_norm (N, C, L)": lambda t: TF.batch_norm(t(7, 4, 3), None, None, training=True),
    "batch_norm volumes": lambda t: TF.batch_norm(t(2, 4, 3, 2, 2), None, None, training=True),
    "conv_stage": lambda t: _stage(t, True, 2),
    "conv_stage without pool": lambda t: _stage(t, True, None),
    "conv_stage in evaluation": lambda t: _stage(t, False, 2),
    "linear": lambda t: TF.linear(t(5, 4), t(3, 4), t(3)),
    "linear gelu": lambda t: TF.linear(t(2, 5, 4), t(3, 4), t(3), "gelu"),
    "linear dropout": lambda t: TF.linear(t(5, 4), t(3, 4), t(3), "silu", 0.5, True),
    "linear of one row": lambda t: TF.linear(t(4), t(3, 4)),
    "linear to one feature": lambda t: TF.linear(t(5, 4), t(4)),
    "matmul": lambda t: TF.matmul(t(4, 5), t(5, 6)),
    "matmul of rows": lambda t: TF.matmul(t(2, 4, 5), t(5, 6)),
    "matmul of batches": lambda t: TF.matmul(t(2, 1, 4, 5), t(3, 5, 6)),
    "matmul by a vector": lambda t: TF.matmul(t(4, 5), t(5)),
    "matmul of vectors": lambda t: TF.matmul(t(5), t(5)),
    "attention": lambda t: TF.scaled_dot_product_attention(t(2, 4, 5, 8), t(2, 4, 7, 8), t(2, 4, 7, 8)),
    "attention without batch": lambda t: TF.scaled_dot_product_attention(t(4, 5, 8), t(4, 7, 8), t(4, 7, 8)),
    "attention of a head": lambda t: TF.scaled_dot_product_attention(t(5, 8), t(7, 8), t(7, 8)),
    "attention without keys": lambda t: TF.scaled_dot_product_attention(t(2, 4, 5, 8), t(4, 0, 8), t(4, 0, 8)),
    "MultiheadAttention": _module,
    "cross_entropy": lambda t: _loss(t, "mean", 4, 5),
    "cross_entropy of maps": lambda t: _loss(t, "none", 2, 5, 3),
}  # fmt: skip


@pytest.mark.parametrize("differentiated", [True, False])
@pytest.mark.parametrize("layout", [CL, torch.contiguous_format])
@pytest.mark.parametrize("name", CALLS)
def test_in_place(name: str, layout: Any, differentiated: bool, device: str) -> None:
    def make(*shape: int) -> Tensor:
        t = torch.randn(shape, device=device)
        return (t.contiguous(memory_format=layout) if t.dim() == 4 else t).requires_grad_()

    for _ in range(2):  # (calls of a kind may be repeated another way than the first ran)
        torch.manual_seed(0)
        with torch.set_grad_enabled(differentiated):
            y = CALLS[name](make)
            twin = y.detach().clone()
            y *= 2
        torch.testing.assert_close(y.detach(), 2 * twin)
        if differentiated:
            _backward(y)


def _backward(y: Tensor) -> None:
    """Runs, or says that it needs what was written to, as behind torch's ReLU and flash attention."""
    needed = "one of the variables needed for gradient computation has been modified"
    failed: list[str] = []
    try:
        y.sum().backward()
    except RuntimeError as error:
        failed.append(str(error))
    assert all(needed in message for message in failed)
