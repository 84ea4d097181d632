"""Multi-head attention."""

from __future__ import annotations

import torch
from torch import Tensor

from tkernels.core import mode
from tkernels.ops.attention.multihead import Parameters, multi_head_attention


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: the same constructor, parameters, initial weights, state_dict and semantics.

    query: ``(L, N, E)``, or ``(N, L, E)`` with ``batch_first``, or ``(L, E)``; key and value likewise of length S.
    Masks, weights and errors are torch's. Pass ``need_weights=False`` where the weights are not looked at: only then is
    no tensor of queries by keys formed. On Triton nested tensors are refused (AssertionError); elsewhere torch's
    forward runs.

    It can take the place of ``self_attn`` in torch's transformer layers. In evaluation without gradients, torch's
    TransformerEncoderLayer does not call it: it hands the parameters to a kernel of PyTorch's.

    Examples:
        >>> attention = tkernels.nn.MultiheadAttention(embed_dim=32, num_heads=4, batch_first=True)
        >>> x = torch.randn(2, 10, 32)
        >>> y, weights = attention(x, x, x, need_weights=False)
        >>> y.shape, weights
        (torch.Size([2, 10, 32]), None)
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not mode.use_triton(query, key, value, key_padding_mask, attn_mask, *self.parameters()):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if any(t.is_nested for t in (query, key, value)):
            raise AssertionError("query, key and value must not be nested tensors")
        return multi_head_attention(
            query,
            key,
            value,
            self._parameters_of_attention(),
            key_padding_mask,
            attn_mask,
            is_causal,
            self.dropout if self.training else 0.0,
            need_weights,
            average_attn_weights,
            self.batch_first,
        )

    def _parameters_of_attention(self) -> Parameters:
        apart = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        return Parameters(
            self.num_heads,
            self.in_proj_weight if self._qkv_same_embed_dim else apart,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.out_proj.weight,
            self.out_proj.bias,
        )
