"""The launches of batch norm as torch sees them in a trace (core/library.py).

How many partials there are depends on the batch, and a trace with any batch could not allocate them: a reduction's
two stages are one launch here, which allocates them itself. All maps are dense and laid out alike; ``mean``, ``var``,
``weight``, ``bias`` and ``eps`` are a Norm's.
"""

from __future__ import annotations

from torch import Tensor

from tkernels.core import library, plan
from tkernels.core.geometry import Matrix, matrix_of
from tkernels.core.records import BatchNorm, Norm, Partials
from tkernels.ops.batch_norm import kernels


def merge_statistics(partials: Partials, m: Matrix, bn: BatchNorm, stats: Tensor | None = None) -> Tensor:
    """The batch's statistics [4, C], in ``stats`` where given, from partials whose producer counted the batch; moves
    running statistics of any strides in place."""
    mean, var = (None if t is None else t.contiguous() for t in (bn.running_mean, bn.running_var))
    dense = bn._replace(running_mean=mean, running_var=var)
    stats = kernels.launch_finalize_statistics(partials, m, dense, stats=stats)
    for running, moved in ((bn.running_mean, mean), (bn.running_var, var)):
        if running is not None and moved is not None and running is not moved:
            running.copy_(moved)
    plan.increment_version([t for t in (bn.running_mean, bn.running_var, bn.num_batches_tracked) if t is not None])
    return stats


@library.launches(
    "batch_norm_statistics", mutates="stats running_mean running_var num_batches_tracked", flops=library.no_flops
)
def statistics(
    x: Tensor, stats: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    num_batches_tracked: Tensor | None, momentum: float | None, eps: float,
) -> None:  # fmt: skip
    """Writes the batch's statistics, float32 [4, C]: mean, 1 / std, and what rounding to float32 took from each. Moves
    the running ones and counts the batch, where given."""
    m = matrix_of(x)
    bn = BatchNorm(running_mean, running_var, None, None, True, momentum, eps, num_batches_tracked)
    merge_statistics(kernels.launch_statistics(x, m, num_batches_tracked), m, bn, stats)


@library.launches("batch_norm_forward", mutates="y", flops=library.no_flops)
def forward(
    x: Tensor, residual: Tensor | None, mean: Tensor, var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    y: Tensor, eps: float, activation: str | None,
) -> None:  # fmt: skip
    """Writes y = activation(batch norm of x + residual)."""
    kernels.launch_normalize(x, matrix_of(x), Norm(mean, var, weight, bias, eps), activation, residual, y=y)


@library.launches("batch_norm_gradients", mutates="dz dweight dbias coefficients", flops=library.no_flops)
def gradients(
    dy: Tensor, x: Tensor, saved: Tensor | None, mean: Tensor, var: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, dz: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, coefficients: Tensor | None,
    eps: float, activation: str | None, saved_is: str | None,
) -> None:  # fmt: skip
    """Writes what is given: dz, the gradient of the residual; dweight, dbias; coefficients [2, C] of the input's.

    ``saved``: what the activation's gradient needs beside x, by ``saved_is``: 'output', 'residual' or None.
    """
    m, norm = matrix_of(x), Norm(mean, var, weight, bias, eps)
    partials, _ = kernels.launch_gradient_sums(dy, x, m, norm, activation, saved, saved_is, dz=dz)
    kernels.finalize_gradients(partials, m, norm, dweight, dbias, coefficients)


@library.launches("batch_norm_input_gradient", mutates="dx dz", flops=library.no_flops)
def input_gradient(
    dy: Tensor, x: Tensor, saved: Tensor | None, mean: Tensor, var: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, coefficients: Tensor | None, dx: Tensor | None, dz: Tensor | None, eps: float,
    activation: str | None, saved_is: str | None,
) -> None:  # fmt: skip
    """Writes dx and dz, where given; ``coefficients``: None where the statistics were given (evaluation)."""
    norm = Norm(mean, var, weight, bias, eps)
    kernels.input_gradient(dy, x, matrix_of(x), norm, coefficients, dx, dz, activation, saved, saved_is)
