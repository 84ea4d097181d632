"""MultiheadAttention against torch.nn.MultiheadAttention in float64: layouts, masks, weights, extras, errors."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tkernels.nn as tnn
from tests import tolerance
from tests.watch import AtenWatch

pytestmark = pytest.mark.gate("torch", "ttsem", "cuda")

N, L, S, E, H = 2, 5, 7, 24, 3


@dataclasses.dataclass(frozen=True)
class Case:
    """Constructor arguments, the inputs (self, key-value, all; batched or not), masks and forward arguments."""

    name: str
    module: dict[str, Any] = dataclasses.field(default_factory=dict)
    inputs: str = "self"
    batched: bool = True
    masks: tuple[str, ...] = ()
    forward: dict[str, Any] = dataclasses.field(default_factory=lambda: {"need_weights": False})

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("self-attention"),
    Case("batch first, weights", {"batch_first": True}, forward={}),
    Case("weights of each head, key-value", inputs="key-value", forward={"average_attn_weights": False}),
    Case("three inputs of their own width", {"kdim": 10, "vdim": 14, "batch_first": True}, "all"),
    Case("no bias, one sequence", {"bias": False}, "all", batched=False, masks=("boolean 2", "padding")),
    Case("boolean masks", {"batch_first": True}, "key-value", masks=("boolean 3", "padding")),
    Case("added masks", {}, "all", masks=("added 3", "added padding")),
    Case("added mask, weights", {}, "all", masks=("added 2",), forward={}),
    Case("learnt and zero key", {"add_bias_kv": True, "add_zero_attn": True}, "key-value", masks=("boolean 2",)),
    Case("one mask added, one boolean", {}, "key-value", masks=("added 3", "padding")),
    Case("extra keys and both masks, weights", {"add_bias_kv": True, "add_zero_attn": True}, "key-value",
         masks=("added 3", "padding"), forward={}),
    Case("one sequence, a mask for each head", {"batch_first": True}, "key-value", batched=False,
         masks=("boolean 3", "padding"), forward={"average_attn_weights": False}),
    Case("causal", masks=("causal",), forward={"need_weights": False, "is_causal": True}),
    Case("causal and padding", masks=("causal", "padding"), forward={"need_weights": False, "is_causal": True}),
    Case("causal and a zero key", {"add_zero_attn": True}, masks=("causal",),
         forward={"need_weights": False, "is_causal": True}),
    Case("causal with weights, one sequence", {}, batched=False, masks=("causal",), forward={"is_causal": True}),
]  # fmt: skip


def masks_of(case: Case, n_q: int, n_k: int) -> dict[str, Tensor]:
    """Masks as torch wants them: True leaves out. Every query keeps a key."""
    found: dict[str, Tensor] = {}
    for name in case.masks:
        if name == "causal":
            found["attn_mask"] = torch.ones(n_q, n_k, dtype=torch.bool).triu(1)
        elif "padding" in name:
            padding = torch.rand(N, n_k) > 0.6
            padding[:, 0] = False
            padding = padding if case.batched else padding[0]
            found["key_padding_mask"] = torch.randn(padding.shape) if "added" in name else padding
        else:
            shape = (n_q, n_k) if name.endswith("2") else (N * H if case.batched else H, n_q, n_k)
            mask = torch.rand(shape) > 0.6
            mask[..., 0] = False
            found["attn_mask"] = torch.randn(shape) if "added" in name else mask
    return found


def inputs_of(case: Case, module: nn.MultiheadAttention) -> list[Tensor]:
    """query, key, value; the same tensor where the case says so."""
    lengths = (L, L, L) if case.inputs == "self" else (L, S, S)
    made = []
    for length, width in zip(lengths, (E, module.kdim, module.vdim)):
        size = (length, width) if not case.batched else (N, length, width) if module.batch_first else (length, N, width)
        made.append(torch.randn(size))
    if case.inputs == "self":
        return [made[0]] * 3
    return [made[0], made[1], made[1]] if case.inputs == "key-value" else made


def moved(tensors: list[Tensor], move: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Each distinct tensor moved once, as a leaf: what was one tensor stays one."""
    done = {id(t): move(t).detach().requires_grad_() for t in tensors}
    return [done[id(t)] for t in tensors]


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_torch(case: Case, device: str, triton_runs: bool, launches: list[str]) -> None:
    module = tnn.MultiheadAttention(E, H, **case.module)
    for parameter in module.parameters():  # biases start at 0, where a missing one would not show
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs = nn.MultiheadAttention(E, H, **case.module).double()
    theirs.load_state_dict(module.state_dict())
    inputs = inputs_of(case, module)
    masks = masks_of(case, inputs[0].shape[-2 if module.batch_first or not case.batched else 0],
                     inputs[1].shape[-2 if module.batch_first or not case.batched else 0])  # fmt: skip
    module.to(device)
    mine = moved(inputs, lambda t: t.to(device))
    exact = moved(inputs, lambda t: t.double())
    out, weights = module(*mine, **{k: m.to(device) for k, m in masks.items()}, **case.forward)
    exact_masks = {k: m.double() if m.is_floating_point() else m for k, m in masks.items()}
    out64, weights64 = theirs(*exact, **exact_masks, **case.forward)
    tolerance.assert_close(out, out64.detach(), 4 * E, name="output")
    assert (weights is None) == (weights64 is None)
    if weights is not None:
        tolerance.assert_close(weights, weights64.detach(), 4 * E, name="weights")
    dy = torch.randn(out.shape)
    leaves = [*dict.fromkeys(mine), *module.parameters()]
    leaves64 = [*dict.fromkeys(exact), *theirs.parameters()]
    got = torch.autograd.grad(out, leaves, dy.to(device))
    for t, g, w in zip(leaves, got, torch.autograd.grad(out64, leaves64, dy.double())):
        tolerance.assert_close(g, w, 16 * E, scale=1.0, name=f"gradient of {list(t.shape)}")
    if triton_runs:
        heads = "attention_forward_kernel" if weights is None else "matmul_kernel"
        assert {heads, "linear_forward_kernel"} <= set(launches)


def test_parameters_are_torchs() -> None:
    for options in ({}, {"kdim": 10, "vdim": 8}, {"add_bias_kv": True, "bias": False}):
        torch.manual_seed(3)
        mine = tnn.MultiheadAttention(E, H, **options)
        torch.manual_seed(3)
        theirs = nn.MultiheadAttention(E, H, **options)
        assert list(mine.state_dict()) == list(theirs.state_dict())
        for a, b in zip(mine.state_dict().values(), theirs.state_dict().values()):
            assert torch.equal(a, b)


def test_dropout_only_in_training(device: str) -> None:
    module = tnn.MultiheadAttention(E, H, dropout=0.5).to(device)
    x = torch.randn(L, N, E, device=device)
    assert not torch.equal(*(module(x, x, x, need_weights=False)[0] for _ in range(2)))
    _, weights = module(x, x, x, average_attn_weights=False)
    assert (weights == 0).any()
    module.eval()
    assert torch.equal(*(module(x, x, x, need_weights=False)[0] for _ in range(2)))


@pytest.mark.gate("ttsem", "cuda")
def test_no_weights_unless_asked_for(device: str) -> None:
    """Without need_weights nothing as large as queries by keys is made, and no product or softmax is torch's."""
    module = tnn.MultiheadAttention(E, H, batch_first=True).to(device)
    x = torch.randn(1, 70, E, device=device, requires_grad=True)
    with AtenWatch() as watch:
        out, weights = module(x, x, x, need_weights=False)
        out.sum().backward()
    assert weights is None
    assert not watch.replaced(), watch.replaced()


@pytest.mark.parametrize("need_weights", (False, True))
def test_autocast(need_weights: bool, device: str, triton_runs: bool) -> None:
    """The dtypes torch gives, of output and weights; masks stay as they are."""
    mine, theirs = tnn.MultiheadAttention(E, H), nn.MultiheadAttention(E, H)
    theirs.load_state_dict(mine.state_dict())
    x, mask = torch.randn(L, N, E), torch.randn(L, L)
    with torch.autocast(device, torch.bfloat16):
        at = [t.to(device) for t in (x, x + 1, x + 1)]
        out, weights = mine.to(device)(*at, need_weights=need_weights, attn_mask=mask.to(device))
    with torch.autocast("cpu", torch.bfloat16):
        out_torch, weights_torch = theirs(x, x + 1, x + 1, need_weights=need_weights, attn_mask=mask)
    assert out.dtype == out_torch.dtype
    tolerance.assert_close(out, out_torch.detach().double(), 4 * E)
    if weights is not None and weights_torch is not None:
        if not triton_runs:  # softmax's on a GPU is float32, but the dispatcher takes ttsem's tensors for a CPU's
            assert weights.dtype == weights_torch.dtype
        tolerance.assert_close(weights, weights_torch.detach().double(), 4 * E, dtype=torch.bfloat16, scale=1.0)
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in mine.parameters())


@pytest.mark.parametrize("need_weights", (False, True))
@pytest.mark.parametrize("kind", ("boolean", "added"))
def test_queries_that_see_nothing(kind: str, need_weights: bool, device: str) -> None:
    """Zeros into the output's projection, but NaN where weights are asked for: as torch."""
    mine, theirs = tnn.MultiheadAttention(E, H, batch_first=True), nn.MultiheadAttention(E, H, batch_first=True)
    theirs.load_state_dict(mine.state_dict())
    x, mask = torch.randn(N, L, E), torch.zeros(L, L, dtype=torch.bool)
    mask[1] = True
    mask = mask if kind == "boolean" else torch.zeros(L, L).masked_fill(mask, -torch.inf)
    at = x.to(device).requires_grad_()
    x.requires_grad_()
    out, weights = mine.to(device)(at, at, at, need_weights=need_weights, attn_mask=mask.to(device))
    out_torch, weights_torch = theirs(x, x, x, need_weights=need_weights, attn_mask=mask)
    assert bool(out_torch[:, 1].isnan().all()) == need_weights
    tolerance.assert_close(out, out_torch.detach().double(), 4 * E)
    if weights is not None:
        tolerance.assert_close(weights, weights_torch.detach().double(), 4 * E)
    # each projection of its own: what is NaN in one need not be in another
    projections = [(at, *mine.parameters()), (x, *theirs.parameters())]
    got, expected = (torch.autograd.grad(y[:, 1].sum(), leaves) for y, leaves in zip((out, out_torch), projections))
    for g, e in zip(got, expected):
        assert torch.equal(g.isnan().cpu(), e.isnan())


def test_a_float32_mask_beside_a_bf16_module(device: str) -> None:
    """Added as it is, not rounded first."""
    module = tnn.MultiheadAttention(E, H, batch_first=True).to(device, torch.bfloat16)
    x = torch.randn(N, L, E, device=device).bfloat16()
    mask = 100 + torch.randn(L, L, device=device)
    out, _ = module(x, x, x, need_weights=False, attn_mask=mask)
    same, _ = module(x, x, x, need_weights=False, attn_mask=mask - 100)
    tolerance.assert_close(out, same.detach().double(), 4 * E)


@pytest.mark.parametrize("n, length", ((0, L), (N, 0)))
def test_empty(n: int, length: int, device: str) -> None:
    mine, theirs = tnn.MultiheadAttention(E, H, batch_first=True), nn.MultiheadAttention(E, H, batch_first=True)
    theirs.load_state_dict(mine.state_dict())
    mine.to(device)
    x = torch.randn(n, length, E, requires_grad=True)
    for need_weights in (False, True):
        out, weights = mine(*[x.to(device)] * 3, need_weights=need_weights)
        out_torch, weights_torch = theirs(x, x, x, need_weights=need_weights)
        assert out.shape == out_torch.shape
        assert (None if weights is None else weights.shape) == (None if weights is None else weights_torch.shape)
        out.sum().backward()


class Block(nn.Module):
    """torch's encoder and decoder layers with attention of a given class dropped in."""

    def __init__(self, attention: type[nn.MultiheadAttention]) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(E, H, 2 * E, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(E, H, 2 * E, dropout=0.0, batch_first=True)
        for layer, names in ((self.encoder, ("self_attn",)), (self.decoder, ("self_attn", "multihead_attn"))):
            for name in names:
                module = attention(E, H, batch_first=True)
                module.load_state_dict(getattr(layer, name).state_dict())
                setattr(layer, name, module)

    def forward(self, source: Tensor, target: Tensor, padding: Tensor, causal: Tensor) -> Tensor:
        memory = self.encoder(source, src_key_padding_mask=padding)
        return self.decoder(target, memory, causal, memory_key_padding_mask=padding, tgt_is_causal=True)


def test_dropped_into_torchs_transformer(device: str, triton_runs: bool, launches: list[str]) -> None:
    """In place of torch's in its encoder and decoder layers: training, and evaluation without gradients."""
    torch.manual_seed(0)
    mine = Block(tnn.MultiheadAttention)
    theirs = Block(nn.MultiheadAttention).double()
    theirs.load_state_dict(mine.state_dict())
    source, target = torch.randn(N, S, E), torch.randn(N, L, E)
    padding, causal = torch.zeros(N, S, dtype=torch.bool), torch.ones(L, L).triu(1).bool()
    padding[0, -2:] = True
    mine.to(device)
    at = [t.to(device) for t in (source, target, padding, causal)]
    exact = [source.double(), target.double(), padding, causal]
    out, want = mine(*at), theirs(*exact)
    tolerance.assert_close(out, want.detach(), 16 * E)
    dy = torch.randn(out.shape)
    got = torch.autograd.grad(out, list(mine.parameters()), dy.to(device))
    for (name, _), g, w in zip(mine.named_parameters(), got, torch.autograd.grad(want, list(theirs.parameters()),
                                                                                 dy.double())):  # fmt: skip
        tolerance.assert_close(g, w, 64 * E, scale=1.0, name=name)
    if triton_runs:
        assert launches.count("attention_forward_kernel") == 3
        assert launches.count("attention_dq_kernel") == 3
    mine.eval()
    theirs.eval()
    if device == "cpu":  # torch's encoder then leaves its attention module out and calls a kernel for both
        with torch.no_grad():
            tolerance.assert_close(mine(*at), theirs(*exact), 16 * E)


@pytest.mark.parametrize("way", ("deepcopy", "pickle", "state_dict"))
def test_copies(way: str, device: str) -> None:
    module = tnn.MultiheadAttention(E, H, kdim=10, vdim=E, add_bias_kv=True, batch_first=True).to(device)
    if way == "deepcopy":
        twin = copy.deepcopy(module)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    else:
        twin = tnn.MultiheadAttention(E, H, kdim=10, vdim=E, add_bias_kv=True, batch_first=True, device=device)
        twin.load_state_dict(module.state_dict())
    assert str(twin) == str(module)
    x, key, value = (torch.randn(N, L, width, device=device) for width in (E, 10, E))
    for ours, copied in zip(module(x, key, value), twin(x, key, value)):
        assert torch.equal(ours, copied)


def test_frozen_parameters_get_no_gradient(device: str) -> None:
    module = tnn.MultiheadAttention(E, H, batch_first=True).to(device)
    module.in_proj_weight.requires_grad_(False)
    x = torch.randn(N, L, E, device=device)
    module(x, x, x, need_weights=False)[0].sum().backward()
    assert module.in_proj_weight.grad is None
    assert module.out_proj.weight.grad is not None
    assert module.in_proj_bias.grad is not None


def _x(*shape: int) -> Tensor:
    return torch.zeros(shape)


BAD = {
    "embed_dim": lambda m: m(_x(L, N, E + 1), _x(L, N, E + 1), _x(L, N, E + 1)),
    "rank": lambda m: m(_x(1, L, N, E), _x(1, L, N, E), _x(1, L, N, E)),
    "key rank": lambda m: m(_x(L, N, E), _x(L, E), _x(L, E)),
    "value length": lambda m: m(_x(L, N, E), _x(S, N, E), _x(L, N, E)),
    "mask rank": lambda m: m(_x(L, N, E), _x(L, N, E), _x(L, N, E), attn_mask=_x(L)),
    "mask size": lambda m: m(_x(L, N, E), _x(L, N, E), _x(L, N, E), attn_mask=_x(L, S)),
    "mask heads": lambda m: m(_x(L, N, E), _x(L, N, E), _x(L, N, E), attn_mask=_x(N, L, L)),
    "mask heads, one sequence": lambda m: m(_x(L, E), _x(L, E), _x(L, E), attn_mask=_x(N, L, L)),
    "mask dtype": lambda m: m(_x(L, N, E), _x(L, N, E), _x(L, N, E), attn_mask=_x(L, L).long()),
    "padding rank": lambda m: m(_x(L, N, E), _x(L, N, E), _x(L, N, E), key_padding_mask=_x(L)),
    "padding size": lambda m: m(_x(L, N, E), _x(L, N, E), _x(L, N, E), key_padding_mask=_x(N, S)),
    "padding transposed": lambda m: m(_x(L, N, E), _x(L, N, E), _x(L, N, E), key_padding_mask=_x(L, N)),
    "causal without a mask": lambda m: m(_x(L, N, E), _x(L, N, E), _x(L, N, E), is_causal=True),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(name: str, device: str, launches: list[str]) -> None:
    """torch's exception class, before any launch."""
    module = tnn.MultiheadAttention(E, H)
    with pytest.raises(Exception) as theirs:
        BAD[name](nn.MultiheadAttention(E, H))
    module = copy.deepcopy(module).to(device)
    with torch.device(device) if device == "cpu" else torch.device("cpu"), pytest.raises(type(theirs.value)) as mine:
        BAD[name](lambda *a, **k: module(*(t.to(device) for t in a), **{n: _to(v, device) for n, v in k.items()}))
    assert type(mine.value) is type(theirs.value)
    assert not launches


def _to(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("options", ({"embed_dim": 0}, {"num_heads": 5}, {"num_heads": 0}))
def test_bad_constructors(options: dict[str, int]) -> None:
    arguments = {"embed_dim": E, "num_heads": H, **options}
    with pytest.raises(Exception) as theirs:
        nn.MultiheadAttention(**arguments)
    with pytest.raises(type(theirs.value)):
        tnn.MultiheadAttention(**arguments)
