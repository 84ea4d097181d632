"""Scaled dot-product attention: checks, autocast, autograd, and the PyTorch body."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor

from tkernels.core import _torch, checks, mode, plan, targets
from tkernels.core.late import late
from tkernels.core.operator import Decision, Operator, Passes
from tkernels.ops.attention import config as tuning

if TYPE_CHECKING:
    from tkernels.ops.attention import kernels
    from tkernels.ops.attention import kernels_backward as backward_kernels
else:
    kernels = late(".kernels", __package__)
    backward_kernels = late(".kernels_backward", __package__)

__all__ = ["scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``dropout(softmax(query @ key^T * scale + attn_mask)) @ value`` as torch has it, without a matrix of queries by
    keys.

    Leading dimensions broadcast. A row that sees no key gives 0. Left to PyTorch on any device (the logger 'tkernels'
    says so once): heads wider than 256, or than 128 in float32 or on AMD's RDNA; an attn_mask that requires grad, whose
    gradient is a matrix of queries by keys itself. Where Triton runs, gradients can't be differentiated again.

    Args:
        query: ``(*, H, L, E)``
        key: ``(*, H, S, E)``
        value: ``(*, H, S, V)``
        attn_mask: broadcasts to ``(*, H, L, S)``; boolean (True takes part) or added to the scores
        dropout_p: the probability of a weight to be zeroed; applied whenever it is above 0, in evaluation too
        is_causal: row i sees keys 0 to i
        scale: 1 / sqrt(E) by default
        enable_gqa: key and value may have fewer heads, each of which serves as many of query's

    Returns:
        ``(*, H, L, V)`` in query's or the autocast dtype

    Raises:
        TypeError: For an argument of another type.
        IndexError: For an attn_mask of one dimension.
        RuntimeError: For shapes, dtypes or devices that do not go together, a ``dropout_p`` outside [0, 1], or a mask
            beside ``is_causal``.

    Examples:
        >>> q, k, v = torch.randn(3, 2, 4, 16, 32)  # three tensors (2, 4, 16, 32): batch, heads, length, width
        >>> y = tkernels.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> y.shape
        torch.Size([2, 4, 16, 32])
        >>> torch.allclose(y[:, :, 0], v[:, :, 0])  # the first row sees the first key alone
        True
    """
    return _operator((query, key, value, attn_mask), dropout_p, is_causal, scale, enable_gqa)


def _check(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, gqa: bool,
) -> Decision | None:  # fmt: skip
    """Integers, complex numbers, sparse and nested tensors are PyTorch's, and what why_not names."""
    checks.tensor(query=query, key=key, value=value)
    checks.optional_tensor(attn_mask=attn_mask)
    if not (checks.are_floats(query, key, value) and mode.use_triton(query, key, value, attn_mask)):
        return None
    _check_options(attn_mask, dropout_p, is_causal, scale)
    _check_shapes(query, key, value, attn_mask, gqa)
    dtype = mode.autocast_dtype(query)
    _check_kinds(query, key, value, attn_mask, dtype)
    reason = why_not(query, value, attn_mask, dropout_p, dtype)
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        reason = "attn_mask requires a gradient, which is a matrix of queries by keys"
    if reason is not None:
        if not torch.compiler.is_compiling():
            mode.log_once(f"scaled_dot_product_attention runs on PyTorch: {reason}")
        return None
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return Decision((float(dropout_p), bool(is_causal), scale, gqa), cast=dtype, dropout=float(dropout_p))


def why_not(
    query: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, autocast: torch.dtype | None
) -> str | None:
    """Why heads of this size are left to PyTorch, or None where they are not."""
    # (index and if make constants of what a trace has as symbols)
    head, v_head = operator.index(query.shape[-1]), operator.index(value.shape[-1])
    extras = True if attn_mask is not None or dropout_p > 0 else False  # noqa: SIM210
    return _why_not(head, v_head, (autocast or query.dtype).itemsize, extras)


@_torch.constant_in_traces  # which has no business with facts of GPUs
def _why_not(head: int, v_head: int, itemsize: int, extras: bool) -> str | None:
    return tuning.why_not(head, v_head, itemsize, extras, targets.current())


def _check_options(attn_mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None) -> None:
    """Raise RuntimeError, TypeError for a scale, for options torch refuses."""
    if scale is not None:
        checks.number("scale", scale)
    if not 0.0 <= dropout_p <= 1.0:
        raise RuntimeError(f"dropout_p must be between 0 and 1, got {dropout_p}")
    if is_causal and attn_mask is not None:
        raise RuntimeError("attn_mask must be None where is_causal is set, got both")


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, gqa: bool) -> None:
    """Raise RuntimeError or IndexError for the shapes torch refuses."""

    def refuse(rule: str) -> NoReturn:
        given = f"got query {checks.shape(query)}, key {checks.shape(key)} and value {checks.shape(value)}"
        raise RuntimeError(f"{rule}, {given}") from None

    if min(query.dim(), key.dim(), value.dim()) < 2:
        refuse("query, key and value must have at least two dimensions")
    if query.shape[-1] != key.shape[-1]:
        refuse("query and key must have heads of one size")
    if key.shape[-2] != value.shape[-2]:
        refuse("key and value must be of one length")
    if gqa:
        if min(query.dim(), key.dim(), value.dim()) < 3:
            refuse("with enable_gqa query, key and value must have at least three dimensions")
        heads = query.shape[-3]
        if any(t.shape[-3] == 0 or heads % t.shape[-3] for t in (key, value)):
            refuse("with enable_gqa the heads of key and value must divide those of query")
    try:
        lead = _lead(query, key, value, gqa)
    except RuntimeError:
        refuse("the leading dimensions of query, key and value must broadcast")
    if attn_mask is None:
        return
    if attn_mask.dim() < 2:
        raise IndexError(f"attn_mask must have at least two dimensions, got {checks.shape(attn_mask)}")
    scores = (*lead, query.shape[-2], key.shape[-2])
    sizes = zip(reversed(attn_mask.shape), reversed(scores))
    if attn_mask.dim() > len(scores) or any(size not in (1, target) for size, target in sizes):
        raise RuntimeError(f"attn_mask must broadcast to {list(scores)}, got {checks.shape(attn_mask)}")


def _lead(query: Tensor, key: Tensor, value: Tensor, gqa: bool) -> torch.Size:
    """The leading dimensions of the result, heads among them."""
    if not gqa:
        return torch.broadcast_shapes(*(t.shape[:-2] for t in (query, key, value)))
    return torch.Size((*torch.broadcast_shapes(*(t.shape[:-3] for t in (query, key, value))), query.shape[-3]))


def _check_kinds(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, autocast: torch.dtype | None
) -> None:
    """Raise RuntimeError for devices or dtypes that do not go together (autocast makes floating dtypes agree)."""
    checks.same_device(query=query, key=key, value=value, attn_mask=attn_mask)
    if autocast is None:
        checks.same_dtype(query=query, key=key, value=value)
    if attn_mask is None or (autocast is not None and attn_mask.is_floating_point()):
        return
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(f"attn_mask must be bool, float32 or of query's dtype {query.dtype}, got {attn_mask.dtype}")


def _reference(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, gqa: bool,
) -> Tensor:  # fmt: skip
    try:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=gqa
        )
    except checks.REFUSALS as error:

        def check() -> None:
            checks.tensor(query=query, key=key, value=value)
            checks.optional_tensor(attn_mask=attn_mask)
            _check_options(attn_mask, dropout_p, is_causal, scale)
            _check_shapes(query, key, value, attn_mask, gqa)
            if mode.autocast_dtype(query) is None:
                _check_kinds(query, key, value, attn_mask, None)

        checks.explain(error, check)


def _run(call: plan.KnownCall | None, tensors: plan.Tensors, static: tuple[Any, ...]) -> Tensor:
    """The kernels, which take four dimensions."""
    query, key, value, mask, seed = cast(Any, tensors)
    *options, gqa = static
    lead = _lead(query, key, value, gqa)
    q = _four_dimensions(query.expand(*lead, *query.shape[-2:]))
    k, v = (_four_dimensions(_broadcast_heads(t, lead, gqa)) for t in (key, value))
    if k.shape[1] != v.shape[1]:  # a number of heads for each: no kernel for that
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    if mask is not None and len(lead) > 2:
        mask = _four_dimensions(mask.expand(*lead, *mask.shape[-2:]))
    o = _passes(call, (q, k, v, mask, seed), tuple(options))
    return o if len(lead) == 2 else o.reshape(*lead, *o.shape[-2:])


def _broadcast_heads(t: Tensor, lead: torch.Size, gqa: bool) -> Tensor:
    """key or value with the leading dimensions of the result; its own heads, where they are shared by groups."""
    return t.expand(*lead[:-1], -1, -1, -1) if gqa else t.expand(*lead, -1, -1)


def _four_dimensions(t: Tensor) -> Tensor:
    """[batch, heads, rows, columns] of a tensor with any number of leading dimensions."""
    if t.dim() > 4:
        return t.flatten(0, -4)
    return t if t.dim() == 4 else t[(None,) * (4 - t.dim())]


@plan.Planned
def _forward(
    tensors: plan.Tensors, p: float, causal: bool, scale: float, needs: tuple[bool, ...] | None
) -> plan.Tensors:
    """The output, and what backward takes."""
    q, k, v, mask, seed = cast(Any, tensors)
    q, k, v = (kernels.dense_heads(t) for t in (q, k, v))
    o, lse = kernels.launch_forward(q, k, v, mask, p, causal, scale, seed, needs is not None)
    return o, q, k, v, mask, o, lse, seed


@plan.Planned
def _backward(
    tensors: plan.Tensors, p: float, causal: bool, scale: float, needs: tuple[bool, ...]
) -> plan.Tensors:  # fmt: skip
    """Gradients of q, k and v."""
    do, q, k, v, mask, o, lse, seed = cast(Any, tensors)
    needs_q, needs_k, needs_v = needs
    do = kernels.dense_heads(do)
    dq = dk = dv = None
    delta = backward_kernels.launch_delta(o, do) if needs_q or needs_k else lse
    given = q, k, v, do, lse, delta, mask, p, causal, scale, seed
    if needs_q:
        dq = backward_kernels.launch_dq(*given)
    if needs_k or needs_v:
        dk, dv = backward_kernels.launch_dkv(*given, needs_k, needs_v, needs_q)
    return dq, dk, dv


_passes = Passes("Attention", 3, _forward, _backward)
_operator = Operator(_reference, _check, _run)
