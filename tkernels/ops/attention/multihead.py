"""Multi-head attention out of the operators: projections by linear, heads by scaled_dot_product_attention."""

from __future__ import annotations

import dataclasses
from typing import NoReturn

import torch
from torch import Tensor

from tkernels.ops.attention.op import scaled_dot_product_attention
from tkernels.ops.linear.op import linear
from tkernels.ops.matmul.op import matmul

__all__ = ["Parameters", "multi_head_attention"]


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Of torch.nn.MultiheadAttention. ``projections``: the weights of query, key and value, one tensor of all three
    where their inputs have one width."""

    heads: int
    projections: Tensor | tuple[Tensor, Tensor, Tensor]
    bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    add_zero_attn: bool
    out_weight: Tensor
    out_bias: Tensor | None

    @property
    def width(self) -> int:
        """embed_dim."""
        return self.out_weight.shape[0]


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parameters: Parameters,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    need_weights: bool,
    average_attn_weights: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor | None]:
    """(output, weights or None), shapes and masks as torch.nn.MultiheadAttention has them.

    Without ``need_weights`` no tensor of queries by keys exists; with it the weights are formed by two products and
    PyTorch's softmax. Raises AssertionError or RuntimeError as torch does.
    """
    _check_shapes(query, key, value, key_padding_mask, attn_mask, parameters)
    if is_causal and attn_mask is None:
        raise RuntimeError("is_causal is a hint about attn_mask: attn_mask must be given too, got None")
    batched = query.dim() == 3
    batch_dim = 0 if batch_first or not batched else 1
    _check_masks(query, key, key_padding_mask, attn_mask, parameters.heads, batch_dim)
    q, k, v = (_heads(t, parameters.heads, batch_dim) for t in _projected(query, key, value, parameters))
    if is_causal and key_padding_mask is None and not need_weights:
        mask = None
    else:
        is_causal = False
        mask = _merged_mask(attn_mask, key_padding_mask, q, k)
    k, v, mask = _with_extra_keys(k, v, mask, parameters)
    if need_weights:
        o, weights = _attention_with_weights(q, k, v, mask, dropout_p)
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        o, weights = scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal), None
    # [N, H, L, D] to the layout of query
    joined = o.transpose(1, 2).flatten(2)
    joined = joined if batch_dim == 0 else joined.transpose(0, 1)
    out = linear(joined if batched else joined.squeeze(0), parameters.out_weight, parameters.out_bias)
    return out, weights if batched or weights is None else weights.squeeze(0)


def _projected(query: Tensor, key: Tensor, value: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value through their projections, in one product where they are one tensor."""
    width, weights, bias = parameters.width, parameters.projections, parameters.bias
    if isinstance(weights, Tensor) and query is key and key is value:
        q, k, v = linear(query, weights, bias).unflatten(-1, (3, width)).unbind(-2)
        return q, k, v
    if isinstance(weights, Tensor) and key is value:
        q = linear(query, weights[:width], None if bias is None else bias[:width])
        both = linear(key, weights[width:], None if bias is None else bias[width:])
        k, v = both.unflatten(-1, (2, width)).unbind(-2)
        return q, k, v
    if isinstance(weights, Tensor):
        weights = weights.chunk(3)  # type: ignore[assignment]
    biases = (None, None, None) if bias is None else bias.chunk(3)
    q, k, v = (linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases))
    return q, k, v


def _heads(t: Tensor, heads: int, batch_dim: int) -> Tensor:
    """[N, H, L, D], a view, of [N, L, E], [L, N, E] or, of one sequence, [L, E]."""
    t = t if t.dim() == 3 else t.unsqueeze(0)
    t = t.unflatten(-1, (heads, -1))
    return t.transpose(1, 2) if batch_dim == 0 else t.permute(1, 2, 0, 3)


def _merged_mask(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """One mask for scaled_dot_product_attention: boolean (True takes part) where both are, else one to add."""
    (batch, heads, n_q, _), n_k = q.shape, k.shape[-2]
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.view(batch, heads, n_q, n_k)
    if padding is not None:
        padding = padding.reshape(batch, 1, 1, n_k)
    given = [mask for mask in (attn_mask, padding) if mask is not None]
    if all(mask.dtype == torch.bool for mask in given):
        seen = [~mask for mask in given]
        return None if not seen else seen[0] if len(seen) == 1 else seen[0] & seen[1]
    added = [_added(mask, q.dtype) for mask in given]
    return added[0] if len(added) == 1 else added[0] + added[1]


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to the scores: -inf where a boolean one leaves out. Float32 ones keep their precision."""
    if mask.dtype != torch.bool:
        return mask if mask.dtype == torch.float32 else mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def _with_extra_keys(
    k: Tensor, v: Tensor, mask: Tensor | None, parameters: Parameters
) -> tuple[Tensor, Tensor, Tensor | None]:
    """k and v with the learnt key and the zero one behind the others, which every mask lets through."""
    batch, heads, _, head = k.shape
    extra = 0
    if parameters.bias_k is not None and parameters.bias_v is not None:
        learnt = (t.view(1, heads, 1, head).expand(batch, -1, -1, -1) for t in (parameters.bias_k, parameters.bias_v))
        k, v = (torch.cat([t, row.to(t.dtype)], 2) for t, row in zip((k, v), learnt))
        extra += 1
    if parameters.add_zero_attn:
        k, v = (torch.nn.functional.pad(t, (0, 0, 0, 1)) for t in (k, v))
        extra += 1
    if mask is not None and extra:
        mask = torch.nn.functional.pad(mask, (0, extra), value=mask.dtype == torch.bool)
    return k, v, mask


def _attention_with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Attention with its weights [N, H, L, S]; a row that sees no key is NaN, as torch's is here."""
    scores = matmul(q * q.shape[-1] ** -0.5, k.mT)
    if mask is not None:
        # added, boolean ones too: the gradient of a row of NaN is NaN, which masked_fill would stop
        scores = scores + _added(~mask if mask.dtype == torch.bool else mask, scores.dtype).to(scores.dtype)
    weights = torch.nn.functional.dropout(torch.softmax(scores, -1), dropout_p)
    return matmul(weights, v), weights


def _check_shapes(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, mask: Tensor | None, parameters: Parameters
) -> None:
    """Raise AssertionError for ranks and widths, RuntimeError for sizes of a mask, as torch does."""

    def refuse(rule: str) -> NoReturn:
        given = f"got query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)}"
        raise AssertionError(f"{rule}, {given}")

    rank = query.dim()
    if rank not in (2, 3) or key.dim() != rank or value.dim() != rank:
        refuse("query, key and value must all have 3 dimensions (batched) or 2")
    if query.shape[-1] != parameters.width:
        refuse(f"the last dimension of query must be embed_dim = {parameters.width}")
    if isinstance(parameters.projections, Tensor) and key.shape != value.shape:
        refuse("key and value must have one shape")
    if key.shape[:-1] != value.shape[:-1]:
        refuse("key and value must be of one length and batch")
    for name, t in (("key_padding_mask", padding), ("attn_mask", mask)):
        if t is not None and t.dtype != torch.bool and not t.is_floating_point():
            raise AssertionError(f"{name} must be bool or floating-point, got {t.dtype}")
    if padding is not None and padding.dim() != rank - 1:
        raise AssertionError(f"key_padding_mask must have {rank - 1} dimensions, got {list(padding.shape)}")
    if mask is not None and mask.dim() not in (2, 3):
        raise AssertionError(f"attn_mask must have 2 or 3 dimensions, got {list(mask.shape)}")


def _check_masks(
    query: Tensor, key: Tensor, padding: Tensor | None, mask: Tensor | None, heads: int, batch_dim: int
) -> None:
    """Raise RuntimeError for an attn_mask and AssertionError for a key_padding_mask of other sizes, as torch does."""
    batched = query.dim() == 3
    batch = query.shape[batch_dim] if batched else 1
    n_q, n_k = (t.shape[1 - batch_dim if batched else 0] for t in (query, key))
    whole = (batch, n_k) if batched else (n_k,)
    if padding is not None and padding.shape != whole:
        raise AssertionError(f"key_padding_mask must have shape {list(whole)}, got {list(padding.shape)}")
    if mask is None:
        return
    allowed = (n_q, n_k) if mask.dim() == 2 else (batch * heads, n_q, n_k)
    if tuple(mask.shape) != allowed:
        error = RuntimeError if batched or mask.dim() == 2 else AssertionError
        raise error(f"attn_mask must have shape {list(allowed)}, got {list(mask.shape)}")
