"""Matrix products of any rank: checks, autocast, autograd, and the PyTorch body."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor

from tkernels.core import _torch, autograd, autotune, checks, mode, plan, targets
from tkernels.core.late import late
from tkernels.core.operator import Decision, Operator, differentiates
from tkernels.ops.linear import routing

if TYPE_CHECKING:
    from tkernels.ops.matmul import kernels
else:
    kernels = late(".kernels", __package__)

__all__ = ["matmul"]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` as torch.matmul has it. Gradients can be differentiated again.

    Args:
        a: ``(K)`` or ``(*, M, K)``
        b: ``(K)`` or ``(*, K, N)``; batch dimensions broadcast

    Returns:
        ``(*, M, N)`` without the dimensions that a vector lacks, in the operands' or the autocast dtype

    Raises:
        TypeError: For an argument that is not a tensor.
        RuntimeError: For a scalar, and for shapes, dtypes or devices that do not go together.

    Examples:
        >>> a, b = torch.randn(5, 1, 8, 16), torch.randn(3, 16, 4)
        >>> tkernels.functional.matmul(a, b).shape
        torch.Size([5, 3, 8, 4])
    """
    return _operator((a, b))


def _check(a: Tensor, b: Tensor) -> Decision | None:
    """Integers, complex numbers and sparse tensors are PyTorch's."""
    checks.tensor(a=a, b=b)
    if not (checks.are_floats(a, b) and mode.use_triton(a, b)):
        return None
    _check_shapes(a, b)
    dtype = mode.autocast_dtype(a)
    _check_kinds(a, b, dtype)
    return None if _torch_is_faster(a, b, dtype or a.dtype) else Decision((), cast=dtype)


def _torch_is_faster(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether backend 'auto' leaves this product to PyTorch: by estimate, or as measured where autotuning is on. (In a
    trace sizes may be symbols: ours.)"""
    if not mode.asks_choosers() or mode.traced() or a.numel() * b.numel() == 0:
        return False
    k = a.shape[-1]
    n = b.shape[-1] if b.dim() > 1 else 1
    batches = math.prod(torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]))
    m = batches * (a.shape[-2] if a.dim() > 1 else 1)
    precision, target = mode.dot_precision(dtype, "matmul"), targets.current()
    if not (autotune.enabled and routing.cublas_competes(dtype, precision, target)):
        return routing.of_matmul(m, n, k, dtype, precision, target)
    x, y = a.detach().to(dtype), b.detach().to(dtype)
    with torch.no_grad():
        return autotune.torch_is_faster(
            "matmul", m, (n, k, dtype, precision, batches), lambda: _run(None, (x, y), ()), lambda: torch.matmul(x, y)
        )


def _check_shapes(a: Tensor, b: Tensor) -> None:
    """Raise RuntimeError for the shapes torch refuses."""

    def refuse(rule: str) -> NoReturn:
        raise RuntimeError(f"{rule}, got a {checks.shape(a)} and b {checks.shape(b)}") from None

    if a.dim() == 0 or b.dim() == 0:
        refuse("a and b must have at least one dimension")
    if a.shape[-1] != b.shape[-2 if b.dim() > 1 else 0]:
        refuse(f"the last dimension of a must be b's {'second to ' if b.dim() > 1 else ''}last")
    try:
        torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except RuntimeError:
        refuse("the batch dimensions of a and b must broadcast")


def _check_kinds(a: Tensor, b: Tensor, autocast: torch.dtype | None) -> None:
    """Raise RuntimeError for devices or dtypes that do not go together (autocast makes dtypes agree)."""
    checks.same_device(a=a, b=b)
    if autocast is None:
        checks.same_dtype(a=a, b=b)


def _reference(a: Tensor, b: Tensor) -> Tensor:
    try:
        return torch.matmul(a, b)
    except checks.REFUSALS as error:

        def check() -> None:
            checks.tensor(a=a, b=b)
            _check_shapes(a, b)
            _check_kinds(a, b, None)

        checks.explain(error, check)


def _run(call: plan.KnownCall | None, tensors: plan.Tensors, static: tuple[Any, ...]) -> Tensor:
    """Vectors as matrices of one row or column."""
    a, b = cast(Any, tensors)
    if b.dim() == 1:
        return _run(call, (a, b.unsqueeze(1)), static).squeeze(-1)
    if a.dim() == 1:
        return _apply(a.unsqueeze(0), b).squeeze(-2)
    return _apply(a, b)


def forward(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """a [*, M, K] @ b [*, K, N] by kernels, in ``dtype`` (default: theirs)."""
    if b.dim() == 2 and a.dim() > 2:
        # one tall product, where the rows of all batches follow each other
        folded = _as_rows(a)
        if folded is not None:
            # (no view of the product: autograd would let nobody write to it)
            rows = forward(folded, b, dtype)
            return cast(Tensor, _torch.unsafe_view(rows, (*a.shape[:-1], b.shape[-1])))
    return cast(Tensor, _product((a, b), dtype)[0])


@plan.Planned
def _product(tensors: plan.Tensors, dtype: torch.dtype | None) -> plan.Tensors:
    a, b = cast(Any, tensors)
    return (kernels.launch_matmul(kernels.dense_matrices(a), kernels.dense_matrices(b), dtype),)


def _as_rows(a: Tensor) -> Tensor | None:
    """[*, M, K] as a matrix without a copy, or None where its rows do not fold."""
    if a.numel() == 0:
        return None
    sizes, (strides,) = kernels.fold_batches(a.shape[:-1], [a.stride()[:-1]])
    if len(sizes) > 1:
        return None
    return a.as_strided((sizes[0], a.shape[-1]), (strides[0], a.stride(-1))) if sizes else a.view(1, -1)


def _apply(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """a [*, M, K] @ b [*, K, N], differentiable where that is asked for, in ``dtype`` (default: theirs)."""
    if differentiates((a, b)):
        return _Matmul.apply(*autograd.apart(a, b), dtype)
    return forward(a, b, dtype)


class _Matmul(torch.autograd.Function):
    """Its gradients are products by the same function, so that they can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, dtype: torch.dtype | None) -> Tensor:
        needs_a, needs_b, _ = ctx.needs_input_grad
        ctx.shapes = a.shape, b.shape
        autograd.save(ctx, a if needs_b else None, b if needs_a else None)
        return forward(a, b, dtype)

    @staticmethod
    @autograd.by_kernels
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (a, b), (a_shape, b_shape) = autograd.saved(ctx), ctx.shapes
        return *gradients(_apply, a, b, a_shape, b_shape, dy), None


def gradients(
    product: Callable[..., Tensor], a: Tensor | None, b: Tensor | None, a_shape: torch.Size, b_shape: torch.Size,
    dy: Tensor,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients by ``product``: a's where ``b`` is given, b's where ``a`` is."""
    da = None if b is None else _summed(product, dy.to(b.dtype), b.mT, a_shape)
    db = None if a is None else _summed(product, a.mT, dy.to(a.dtype), b_shape)
    return da, db


def _summed(product: Callable[..., Tensor], a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """a @ b summed over the batch dimensions that ``shape`` lacks: the gradient of an operand that was broadcast."""
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    if batch == shape[:-2]:
        return product(a, b, None)
    if batch == a.shape[:-2] == b.shape[:-2] and math.prod(shape[:-2]) == 1:
        # sums over all batches: one longer reduction
        (m, k), n = a.shape[-2:], b.shape[-1]
        terms = math.prod(batch) * k  # Size.numel would make symbolic sizes constants
        return product(a.movedim(-2, 0).reshape(m, terms), b.reshape(terms, n), None).reshape(shape)
    # added in float32, as the terms of a product are
    return product(a, b, torch.float32).sum_to_size(shape).to(a.dtype)


_operator = Operator(_reference, _check, _run)
