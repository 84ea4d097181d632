"""Masks that are added, as people fill them: the smallest number of a dtype, -1e9, -1e4, infinities and NaN, for some
keys, for all keys of a query or for a whole tile; forward and backward, against softmax spelled out in float32."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.attention.cases import factors
from tkernels.functional import scaled_dot_product_attention
from tkernels.nn import MultiheadAttention

# On a CPU the operator is torch's own
pytestmark = pytest.mark.gate("ttsem", "cuda")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
N_Q, N_K = 37, 70  # a tile and some more of each, whatever the target
FILLS = ("min", -1e9, -1e4, -math.inf, math.inf, math.nan)


def filled(shape: tuple[int, ...], fill: str | float, dtype: torch.dtype) -> Tensor:
    """Zeros, with ``fill`` for every key of query 2, for some keys of query 3, for all but one key of query 4, for the
    first 64 keys of query 5 and for the last of all queries from 6 on; query 0 mixes it with -1."""
    mask = torch.zeros(shape)
    value = torch.finfo(dtype).min if fill == "min" else float(fill)
    mask[..., 2, :] = value
    mask[..., 3, ::3] = value
    mask[..., 4, :-2] = mask[..., 4, -1:] = value
    mask[..., 5, :64] = value
    mask[..., 6:, 65:] = value
    mask[..., 0, ::2], mask[..., 0, 1::2] = value, -1.0
    return mask.to(dtype)


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, group: int, factor: Tensor | None) -> Tensor:
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    weights = torch._safe_softmax(q @ k.mT * q.shape[-1] ** -0.5 + mask, -1)
    return (weights if factor is None else weights * factor) @ v


def close(got: Tensor, expected: Tensor, dtype: torch.dtype, name: str) -> None:
    """NaN in the same places, and near elsewhere: -1e4 leaves scores of float32 three digits behind the point."""
    got, expected = got.detach().cpu().float(), expected.detach()
    assert torch.equal(got.isnan(), expected.isnan()), f"{name}: NaN in other places"
    assert not got.isinf().any()
    got, expected = got.nan_to_num(0), expected.nan_to_num(0)
    bound = 4e-3 if dtype == F32 else 2e-2 if dtype == F16 else 0.1
    worst = (got - expected).abs().max().item()
    assert worst <= bound, f"{name}: {worst}"


def check(mask: Tensor, heads: int, kv_heads: int, head: int, dtype: torch.dtype, p: float, device: str) -> None:
    made = [torch.randn(1, h, n, head).to(dtype) for h, n in ((heads, N_Q), (kv_heads, N_K), (kv_heads, N_K))]
    mine = [t.to(device).requires_grad_() for t in made]
    exact = [t.float().requires_grad_() for t in made]
    factor = None
    gqa = heads != kv_heads
    if p:
        state = torch.get_rng_state()
        factor = factors(*mine[:2], p, enable_gqa=gqa).cpu().float()
        torch.set_rng_state(state)
    o = scaled_dot_product_attention(*mine, mask.to(device), p, enable_gqa=gqa)
    expected = reference(*exact, mask.float(), heads // kv_heads, factor)
    close(o, expected, dtype, "o")
    do = torch.randn(o.shape).to(dtype)
    gradients = torch.autograd.grad(o, mine, do.to(device))
    for name, g, e in zip("qkv", gradients, torch.autograd.grad(expected, exact, do.float())):
        close(g, e, dtype, f"d{name}")


@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
@pytest.mark.parametrize("fill", FILLS, ids=str)
def test_added_masks(fill: str | float, dtype: torch.dtype, device: str, launches: list[str]) -> None:
    check(filled((1, 1, N_Q, N_K), fill, dtype), 2, 2, 16, dtype, 0.0, device)
    assert launches


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@pytest.mark.parametrize("fill", ("min", -math.inf), ids=str)
def test_with_dropout_and_grouped_heads(fill: str | float, dtype: torch.dtype, device: str) -> None:
    """Heads of 20 take products in pieces in float32."""
    check(filled((N_Q, N_K), fill, dtype).expand(1, 4, N_Q, N_K), 4, 2, 20, dtype, 0.4, device)


@pytest.mark.parametrize("fill", ("min", -1e9), ids=str)
def test_float32_mask_beside_16_bits(fill: str | float, device: str) -> None:
    check(filled((1, 2, N_Q, N_K), fill, F32).mT.contiguous().mT, 2, 2, 16, BF16, 0.0, device)


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_one_padding_mask_for_all_queries(dtype: torch.dtype, device: str) -> None:
    """[1, 1, 1, keys] of nothing but the smallest number, and one that leaves keys, read through strides of 0."""
    mask = torch.full((1, 1, 1, N_K), torch.finfo(dtype).min, dtype=dtype)
    check(mask, 2, 1, 16, dtype, 0.0, device)
    mask[..., 5:40] = 0
    check(mask, 2, 1, 16, dtype, 0.0, device)


@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
def test_boolean_masks_that_let_nothing_through(dtype: torch.dtype, device: str) -> None:
    q, k, v = (torch.randn(1, 2, n, 16).to(device, dtype).requires_grad_() for n in (N_Q, N_K, N_K))
    for mask in (torch.zeros(N_Q, N_K, dtype=torch.bool), torch.zeros((), dtype=torch.bool).expand(1, 2, N_Q, N_K)):
        o = scaled_dot_product_attention(q, k, v, mask.to(device), 0.3)
        for t in (o, *torch.autograd.grad(o.sum(), (q, k, v))):
            assert not t.any()


@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
@pytest.mark.parametrize("scale", (0.0, -2.0, 1e4), ids=str)
def test_scales(scale: float, dtype: torch.dtype, device: str) -> None:
    """Scores of 0, of the other sign, and of tens of thousands, beyond float16's largest number."""
    made = [torch.randn(1, 1, n, 16).to(dtype) for n in (N_Q, N_K, N_K)]
    mine, exact = [t.to(device).requires_grad_() for t in made], [t.float().requires_grad_() for t in made]
    o = scaled_dot_product_attention(*mine, scale=scale)
    weights = (exact[0] @ exact[1].mT * scale).softmax(-1)
    close(o, weights @ exact[2], dtype, "o")
    do = torch.randn(o.shape).to(dtype)
    (dv,) = torch.autograd.grad(o, mine[2], do.to(device))
    close(dv, weights.mT @ do.float(), dtype, "dv")


@pytest.mark.parametrize("where", ("query", "key", "value"))
@pytest.mark.parametrize("special", (math.inf, -math.inf, math.nan), ids=str)
@pytest.mark.parametrize("dtype", (F32, F16), ids=str)
def test_special_inputs(dtype: torch.dtype, special: float, where: str, device: str) -> None:
    """NaN where softmax spelled out has it: infinite scores of one sign are a weight of 0, of the other NaN."""
    made = {name: torch.randn(1, 1, n, 16).to(dtype) for name, n in (("query", N_Q), ("key", N_K), ("value", N_K))}
    made[where][0, 0, 3, 5] = special
    mine = [t.to(device).requires_grad_() for t in made.values()]
    exact = [t.float().requires_grad_() for t in made.values()]
    o = scaled_dot_product_attention(*mine)
    expected = reference(*exact, torch.zeros(1, 1), 1, None)
    do = torch.randn(o.shape).to(dtype)
    outcomes = zip((o, *torch.autograd.grad(o, mine, do.to(device))),
                   (expected, *torch.autograd.grad(expected, exact, do.float())), ("o", "dq", "dk", "dv"))  # fmt: skip
    for got, want, name in outcomes:
        got = got.detach().cpu().float()
        assert torch.equal(got.isnan(), want.isnan()), f"{name}: NaN in other places"
        assert torch.equal(got.isinf(), want.isinf()), f"{name}: Inf in other places"


@pytest.mark.parametrize("need_weights", (False, True))
@pytest.mark.parametrize("fill", ("min", -math.inf, True), ids=str)
def test_masks_of_multihead_attention(fill: str | float | bool, need_weights: bool, device: str) -> None:
    """Both masks at once, as torch merges them: twice the smallest number is -inf."""
    ours = MultiheadAttention(16, 2, batch_first=True)
    theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, 16)
    dtype = torch.bool if fill is True else F32
    value = torch.finfo(F32).min if fill == "min" else fill
    padding, mask = torch.zeros(2, 7, dtype=dtype), torch.zeros(7, 7, dtype=dtype)
    padding[0, 4:] = padding[1, 1:] = value
    mask[2] = mask[3, :5] = value
    expected, weights = theirs(x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=need_weights)
    ours.to(device)
    got, mine = ours(*[x.to(device)] * 3, key_padding_mask=padding.to(device), attn_mask=mask.to(device),
                     need_weights=need_weights)  # fmt: skip
    close(got, expected, F32, "output")
    if need_weights:
        close(mine, weights, F32, "weights")
