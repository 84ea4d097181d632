"""Batch norm whose statistics are those of all processes: Chan-merged (mean, M2, count), forward and backward.

Each process reduces its own part (Triton kernels or PyTorch), 2C + 1 numbers forward and 2C backward cross the
processes, and every process merges them in float64 in the same order: all get the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from tkernels.core import activation as activations
from tkernels.core import autograd, mode
from tkernels.core.late import late
from tkernels.core.records import BatchNorm
from tkernels.ops.batch_norm import op as bn_ops

Group: TypeAlias = "dist.ProcessGroup | None"

if TYPE_CHECKING:
    from tkernels.ops.batch_norm import kernels, launches
else:
    kernels = late(".kernels", __package__)
    launches = late(".launches", __package__)


class Statistics(NamedTuple):
    """Of all processes together, float64: mean and biased variance (C), number of values a channel ()."""

    mean: Tensor
    var: Tensor
    values: Tensor


def sync_batch_norm(
    input: Tensor, bn: BatchNorm, activation: str | None, residual: Tensor | None, group: Group
) -> Tensor:
    """batch_norm in training over the inputs of all processes of ``group``, all of which must call it (backward too).

    Arguments as for counted_batch_norm; processes may have different numbers of values, none included. The gradients
    of weight and bias are this process's own, as torch.nn.SyncBatchNorm's. Errors as batch_norm's, but a single value
    per channel is enough where the others have some.
    """
    _check(input, bn)
    activations.check(activation)
    if residual is not None:
        residual = bn_ops.checked_residual(input, residual)
    layout = bn_ops.memory_format(input)
    x = input.contiguous(memory_format=layout)
    weight, bias = bn_ops.dense(bn.weight), bn_ops.dense(bn.bias)
    triton = input.numel() > 0 and mode.use_triton(input, *bn.vectors, residual)
    with torch.no_grad():
        local = _triton_statistics(x) if triton else _torch_statistics(x)
        statistics = merge(_gathered(local, group))
        bn_ops.move_running(bn, *statistics)
    if triton:
        if residual is not None:
            residual = residual.contiguous(memory_format=layout)
        y: Tensor = _TritonNorm.apply(x, residual, weight, bias, statistics, bn.eps, activation, layout, group)
        return y
    y = _TorchNorm.apply(x, weight, bias, statistics, bn.eps, group)
    if residual is not None:
        y = bn_ops.add_to_own(y, residual)
    return torch.relu_(y) if activation == "relu" else activations.apply(y, activation)


def _check(input: Tensor, bn: BatchNorm) -> None:
    """Raise what batch_norm raises in training."""
    # few values are enough here: to the check they are two rows of them
    two = input.expand(2, *input.shape[1:]) if isinstance(input, Tensor) and input.shape[:1] == (1,) else input
    bn_ops.check(two, bn)


def merge(parts: Tensor) -> Statistics:
    """Statistics from the processes' rows (processes, 2C + 1) of mean, M2 and count: Chan, Golub and LeVeque (1983)."""
    channels = parts.shape[1] // 2
    mean, m2, count = parts[:, :channels], parts[:, channels:-1], parts[:, -1:]
    total = count.sum()
    # what a process without values calls its mean counts for nothing, NaN included
    mean, m2 = mean.where(count > 0, 0.0), m2.where(count > 0, 0.0)
    # differences of means, not means, are squared
    centre = mean.index_select(0, count.argmax().view(1))[0]
    centre = centre.where(centre.isfinite(), 0.0)
    d = mean - centre
    offset = (count * d).sum(0) / total
    squares = (m2 + count * d * d).sum(0) - offset * offset * total
    return Statistics(centre + offset, squares.clamp(min=0.0) / total, total)


def _gathered(row: Tensor, group: Group) -> Tensor:
    """The processes' rows, (processes, len(row))."""
    rows = row.new_empty(dist.get_world_size(group), len(row))
    dist.all_gather(list(rows.unbind(0)), row, group=group)
    return rows


def _torch_statistics(x: Tensor) -> Tensor:
    """(2C + 1) of this process: mean, M2, count, in float64."""
    axes = [axis for axis in range(x.ndim) if axis != 1]
    count = x.numel() // max(x.shape[1], 1)
    if count == 0:
        return x.new_zeros(2 * x.shape[1] + 1, dtype=torch.float64)
    wide = x if x.dtype == torch.float64 else x.float()
    # means of processes are subtracted from each other: one rounded to float32 would not do where it is large
    shift = wide.mean(axes)
    var, rest = torch.var_mean(wide - _across(shift, x, wide.dtype), axes, correction=0)
    return _row(shift.double() + rest, var.double() * count, count)


def _triton_statistics(x: Tensor) -> Tensor:
    """The same by the kernels of batch_norm."""
    count = x.numel() // x.shape[1]
    stats = x.new_empty((4, x.shape[1]), dtype=torch.float32)
    # without eps 1 / std and its remainder hold the variance to more than float32
    launches.statistics(x, stats, None, None, None, momentum=0.0, eps=0.0)
    mean, var = bn_ops.unpacked(stats, 0.0)
    # a variance of 0: 1 / std is infinite and its remainder NaN
    return _row(mean, var.where(stats[1].isfinite() | stats[1].isnan(), 0.0) * count, count)


def _row(mean: Tensor, m2: Tensor, count: int) -> Tensor:
    return torch.cat([mean, m2, mean.new_full((1,), count)])


def _merged_sums(dz: Tensor, dz_x: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """The sums over all processes, float64, added in the order of the processes."""
    total = _gathered(torch.cat([dz, dz_x]).double(), group).sum(0)
    dz, dz_x = total.split(len(dz))
    return dz, dz_x


class _TorchNorm(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias in PyTorch."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Statistics,
        eps: float,
        group: Group,
    ) -> Tensor:
        mean, var, count = statistics
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        # torch's own normalisation by given statistics, all vectors in one dtype as it asks for
        affine = [None if t is None else t.to(wide) for t in (weight, bias)]
        given = mean.to(wide), var.to(wide)
        y = torch.batch_norm(x, affine[0], affine[1], *given, False, 0.0, eps, torch.backends.cudnn.enabled)
        autograd.save(ctx, x, weight, bias, mean, (var + eps).rsqrt(), count)
        ctx.group, ctx.wide = group, wide
        return y

    @staticmethod
    @autograd.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, invstd, count = autograd.saved(ctx)
        wide = ctx.wide
        axes = [axis for axis in range(x.ndim) if axis != 1]
        dz = dy.to(wide)
        d = x.to(wide) - _across(mean, x, wide)
        sum_dz, sum_dz_x = dz.sum(axes), (dz * d).sum(axes)
        dweight = (sum_dz_x * invstd).to(weight.dtype) if ctx.needs_input_grad[1] else None
        dbias = sum_dz.to(bias.dtype) if ctx.needs_input_grad[2] else None
        # all processes take part, whatever each of them needs
        total, total_x = _merged_sums(sum_dz, sum_dz_x, ctx.group)
        if not ctx.needs_input_grad[0]:
            return None, dweight, dbias, None, None, None
        scale = invstd if weight is None else invstd * weight.double()
        first, second = total / count, total_x * invstd.square() / count
        dx = (dz - _across(first, x, wide) - d * _across(second, x, wide)) * _across(scale, x, wide)
        return dx.to(x.dtype), dweight, dbias, None, None, None


def _across(vector: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A value per channel, to be combined with ``x``."""
    return vector.to(dtype).view(-1, *[1] * (x.ndim - 2))


class _TritonNorm(torch.autograd.Function):
    """The kernels of batch_norm, with what crosses the processes between their two stages.

    Saved as there: the activation's input is computed again from x, or a sign is read off the output.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
        statistics: Statistics, eps: float, activation: str | None, layout: torch.memory_format, group: Group,
    ) -> Tensor:  # fmt: skip
        invstd = (statistics.var + eps).rsqrt()
        pairs = torch.stack([statistics.mean, invstd])
        stats = pairs.float()
        stats = torch.cat([stats, (pairs - stats).float()])
        y = kernels.like(x)
        launches.forward(x, residual, stats, None, weight, bias, y, eps, activation)
        saved, saved_is = None, None
        if residual is not None and activation is not None:
            saved, saved_is = (y, "output") if activation in activations.FROM_OUTPUT else (residual, "residual")
        autograd.save(ctx, x, saved, stats, weight, bias, invstd, statistics.values)
        ctx.options = eps, activation, saved_is, layout, group
        return y

    @staticmethod
    @autograd.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, saved, stats, weight, bias, invstd, count = autograd.saved(ctx)
        needs_input, needs_residual, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        eps, activation, saved_is, layout, group = ctx.options
        norm = stats, None, weight, bias
        dy = dy.contiguous(memory_format=layout)
        dz = kernels.like(x) if needs_residual and activation is not None else None
        # the sums in float32: weight and bias may be of another dtype, or not there
        scaled, plain = torch.empty_like(stats[0]), torch.empty_like(stats[0])
        launches.gradients(dy, x, saved, *norm, dz, scaled, plain, None, eps, activation, saved_is)
        total, total_x = _merged_sums(plain, scaled, group)
        dx = None
        if needs_input:
            second = total_x * invstd / count
            coefficients = torch.stack([total / count - stats[2] * second, second]).float()
            dx = kernels.like(x)
            behind = (dy, saved, activation, saved_is) if dz is None else (dz, None, None, None)
            launches.input_gradient(behind[0], x, behind[1], *norm, coefficients, dx, None, eps, *behind[2:])
        dweight = scaled.to(weight.dtype) if needs_weight else None
        dbias = plain.to(bias.dtype) if needs_bias else None
        dresidual = (dy if dz is None else dz) if needs_residual else None
        return dx, dresidual, dweight, dbias, None, None, None, None, None
