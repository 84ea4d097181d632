"""Batch norm with ReLU on the CPU in the passes of the conv stage: two reads of the input and one write each way.

torch passes over the map once more for ReLU in either direction, and maps its results anew at every step.
``ops.batch_norm`` takes this in training where maps are large and pixels stand together ((N, C) or channels_last).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from tkernels.cpu import buffers, compiler, passes

PLAIN = (Tensor, torch.nn.Parameter)
DTYPES = (torch.float32, torch.bfloat16)
# Bytes of the input from which on the passes pay for the calls around them. (Measured: 0.7 of torch's speed at 1 MB,
# 0.9 to 1.2 times it at 2 MB, 1.2 to 5 times from 4 MB on.)
WORTH_IT = 1 << 22
# Pixels in a group: sums are taken group by group first.
GROUPS = (64, 32, 16, 8)


def takes(
    x: Tensor,
    vectors: Sequence[Tensor | None],
    momentum: Any,
    eps: Any,
    counter: Tensor | None,
    residual: Tensor | None,
) -> bool:
    """Whether this call (in training, with ReLU) goes the fast way; one that torch refuses does not.

    ``vectors``: running mean and variance, weight, bias. Nothing depends on what ran before.
    """
    # a trace must not learn of sizes: Dynamo is gone after the first line, fake tensors after the second
    return (
        not is_dynamo_compiling()
        and type(x) in PLAIN
        and x.nbytes >= WORTH_IT
        and residual is None
        and x.dtype in DTYPES
        and x.device.type == "cpu"
        and not x.is_cuda
        and x.layout is torch.strided
        and (x.is_contiguous() if x.dim() == 2 else x.dim() == 4 and _channels_last(x))
        and not (x.is_neg() or x.is_inference())
        and (x.numel() // x.shape[1]) % GROUPS[-1] == 0
        and all(t is None or _vector_as_expected(t, x.shape[1]) for t in vectors)
        and (vectors[0] is None) == (vectors[1] is None)
        and not any(t is not None and t.requires_grad for t in vectors[:2])
        and (type(momentum) is float or (momentum is None and counter is not None))
        and type(eps) is float
        and eps > 0.0
        and compiler.enabled()
        and compiler.plain_eager()
    )


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _vector_as_expected(t: Any, channels: int) -> bool:
    return type(t) in PLAIN and t.dtype is torch.float32 and t.device.type == "cpu" and t.shape == (channels,)


def batch_norm_relu(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    momentum: float | None, eps: float, counter: Tensor | None,
) -> Tensor:  # fmt: skip
    """relu(batch norm of ``x``) by the batch's statistics, of a call that ``takes`` agreed to.

    Moves running statistics and counter.
    """
    arguments = x, weight, bias, running_mean, running_var, momentum, eps, counter
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _BatchNormReLU.apply(*arguments)
    return _forward(*arguments)[0]


def _groups(x: Tensor) -> Tensor:
    """The pixels of ``x`` as [groups, rows, C], in its memory; densely where it is laid out otherwise."""
    channels = x.shape[1]
    dense = x.contiguous() if x.dim() == 2 else x.permute(0, 2, 3, 1).contiguous()
    count = x.numel() // channels
    rows = next(rows for rows in GROUPS if count % rows == 0)
    return dense.view(count // rows, rows, channels)


@torch.no_grad()
def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    momentum: float | None, eps: float, counter: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The result; the batch's mean, 1 / sqrt(var + eps), that times the weight, and the bias."""
    pixels, channels = _groups(x), x.shape[1]
    mean, inverse, scale, _, var = passes.statistics(
        pixels, passes.vector(None, channels, 0.0), passes.vector(weight, channels, 1.0), passes.number(eps)
    )
    if counter is not None:
        counter.add_(1)
    if running_mean is not None and running_var is not None:
        factor = 1.0 / float(counter) if momentum is None and counter is not None else momentum
        for running, batch in ((running_mean, mean), (running_var, var)):
            running.mul_(1.0 - factor).add_(batch, alpha=factor)  # type: ignore[operator]
    shift = passes.vector(bias, channels, 0.0)
    y = buffers.empty(x)
    passes.normalize(pixels, mean, scale, shift, _groups(y))
    return y, [mean, inverse, scale, shift]


class _BatchNormReLU(torch.autograd.Function):
    """Saved are the input and vectors with a value for each channel: what ReLU let through is computed again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
        running_var: Tensor | None, momentum: float | None, eps: float, counter: Tensor | None,
    ) -> Tensor:  # fmt: skip
        y, vectors = _forward(x, weight, bias, running_mean, running_var, momentum, eps, counter)
        # the parameters themselves too: autograd then notices if one is written to
        ctx.save_for_backward(x, weight, bias, *vectors)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse, scale, shift = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # to be differentiated once more: through torch's own calls
            y = torch.relu(torch.nn.functional.batch_norm(x, None, None, weight, bias, True, 0.0, ctx.eps))
            wanted = [t for t, need in zip((x, weight, bias), needs) if need]
            found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
            return *(next(found) if need else None for need in needs), None, None, None, None, None
        d, pixels = _groups(dy), _groups(x)
        dbias, dweight, a, b = passes.sums(d, pixels, mean, scale, shift, inverse)
        dx = None
        if needs[0]:
            dx = buffers.empty(x)
            passes.gradient(d, pixels, mean, scale, shift, a, b, _groups(dx))
        return dx, dweight if needs[1] else None, dbias if needs[2] else None, None, None, None, None, None
