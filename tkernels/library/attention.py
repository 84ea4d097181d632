"""torch.ops.tkernels.attention and attention_backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tkernels.core import autograd
from tkernels.core import mode as runtime
from tkernels.library import common
from tkernels.ops.attention import config as tuning
from tkernels.ops.attention import op as ops

if runtime.HAS_TRITON:
    from tkernels.ops.attention import kernels

__all__ = ["attention", "attention_backward"]


def _takes_triton(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> bool:
    return runtime.use_triton(q, k, v, mask) and ops.why_not(q, v, mask, p) is None


def _torch_body(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, causal: bool, scale: float, seed: Tensor | None
) -> Tensor:
    group = q.shape[1] // max(k.shape[1], 1)
    if seed is None:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=group > 1
        )
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (t.repeat_interleave(group, 1) if group > 1 else t for t in (k, v))
    scores = q.to(wide) @ k.mT.to(wide) * scale
    seen = torch.ones_like(scores, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + mask
        seen = seen & (mask != float("-inf"))
    # rows that see nothing: 0 times what softmax makes of equal scores
    weights = scores.masked_fill(~seen, torch.finfo(wide).min).softmax(-1) * seen
    return (weights * common.dropout_factors(weights, p, seed) @ v.to(wide)).to(q.dtype)


def _like_flash(q: Tensor, head: int) -> Tensor:
    """As the kernels' output lies: heads of one position side by side."""
    batch, heads, length, _ = q.shape
    return q.new_empty_strided((batch, heads, length, head), (length * heads * head, head, heads * head, 1))


def _lse(q: Tensor, mask: Tensor | None) -> Tensor:
    """As what the kernels keep of their rows lies."""
    added = mask is not None and mask.dtype != torch.bool
    return q.new_empty(tuning.lse_shape(q.shape, added), dtype=torch.float32)


def _like(t: Tensor) -> Tensor:
    """As the kernels' gradient of ``t`` lies."""
    return torch.empty_like(t if t.shape[-1] == 1 or t.stride(-1) == 1 else t.contiguous())


@torch.library.custom_op("tkernels::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    p: float,
    causal: bool,
    scale: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(o, LSE): dropout(softmax(q @ k^T * scale + mask)) @ v, and per row what the kernels' backward needs, which
    PyTorch's body, whose backward does not, leaves zero.

    q: (B, H, L, E); k: (B, G, S, E); v: (B, G, S, V), G a divisor of H; o: (B, H, L, V); LSE: float32 (B, H, L),
    with an added mask (B, H, 2, L).
    ``mask``: broadcasts to (B, H, L, S), boolean or added. ``seed``: int64 (), dropout's, None for none.
    """
    if _takes_triton(q, k, v, mask, p):
        q, k, v = (kernels.dense_heads(t) for t in (q, k, v))
        return cast(Any, kernels.launch_forward(q, k, v, mask, p, causal, scale, seed))
    with common.without_autocast(q.device):
        o = _torch_body(q, k, v, mask, p, causal, scale, seed)
    return _like_flash(q, v.shape[-1]).copy_(o), _lse(q, mask).zero_()


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, causal: bool, scale: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _like_flash(q, v.shape[-1]), _lse(q, mask)


@torch.library.custom_op("tkernels::attention_backward", mutates_args=())
def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    p: float,
    causal: bool,
    scale: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each where ``needs`` says so; ``o`` and ``lse``: attention's results."""
    if _takes_triton(q, k, v, mask, p):
        q, k, v = (kernels.dense_heads(t) for t in (q, k, v))
        return cast(Any, common.results(ops.backward(do, q, k, v, mask, o, lse, p, causal, scale, seed, needs), do))

    def body(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _torch_body(q, k, v, mask, p, causal, scale, seed)

    gradients = common.gradients(body, (q, k, v), needs, do)
    placed = [None if g is None else _like(t).copy_(g) for t, g in zip((q, k, v), gradients)]
    return cast(Any, common.results(placed, do))


@attention_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, o: Tensor, lse: Tensor, p: float, causal: bool,
    scale: float, seed: Tensor | None, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return cast(Any, common.results([_like(t) if need else None for t, need in zip((q, k, v), needs)], do))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, p, causal, scale, seed = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    autograd.save(ctx, q, k, v, mask, o, lse, seed)
    ctx.options = p, causal, scale


def _backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = autograd.saved(ctx)
    needs = list(ctx.needs_input_grad[:3])
    found = torch.ops.tkernels.attention_backward(do, *tensors, *ctx.options, seed, needs)
    return *(t if need else None for t, need in zip(found, needs)), None, None, None, None, None


attention.register_autograd(_backward, setup_context=_setup_context)


def _product(q_shape: Any, k_shape: Any, width: int) -> int:
    """FLOPs of one product over all queries and keys; as in torch's count, a causal mask spares none."""
    batch, heads, n_q, _ = q_shape
    return 2 * batch * heads * n_q * k_shape[-2] * width


@register_flop_formula(torch.ops.tkernels.attention)
def _flops(q_shape: Any, k_shape: Any, v_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return _product(q_shape, k_shape, q_shape[-1] + v_shape[-1])


@register_flop_formula(torch.ops.tkernels.attention_backward)
def _backward_flops(
    do_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, mask_shape: Any, o_shape: Any, lse_shape: Any, p: float,
    causal: bool, scale: float, seed_shape: Any, needs: Sequence[bool], *_: Any, out_shape: Any = None, **__: Any,
) -> int:  # fmt: skip
    """Scores, once more; the gradients of the scores, of q and of k over its heads, of v over v's."""
    needs_q, needs_k, needs_v = needs
    head, v_head = q_shape[-1], v_shape[-1]
    width = head + v_head * (needs_q or needs_k) + head * needs_q + head * needs_k + v_head * needs_v
    return _product(q_shape, k_shape, width)
