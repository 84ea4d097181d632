"""torch.ops.tkernels.attention: opcheck, torch.compile, export, autocast, FLOPs, dropout; and what is built on it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import tkernels
import tkernels.functional as F
import tkernels.nn as tnn
from models.cifar_cnn import AttentionCNN
from tests.core.tracing import check_autocast_in_compile, check_dropout_in_compile, compare_compiled, operators
from tests.strides import arrange

pytestmark = [pytest.mark.gate("torch", "interp", "cuda"), pytest.mark.usefixtures("tracing")]
# the interpreter takes its time
slow_there, slow = pytest.mark.extended("interp"), pytest.mark.extended("torch", "interp")
ops = torch.ops.tkernels


@dataclasses.dataclass(frozen=True)
class Case:
    """Heads of queries and of keys, head sizes, a mask, causal, and how the tensors lie."""

    name: str
    heads: tuple[int, int] = (2, 2)
    sizes: tuple[int, int] = (8, 8)
    mask: str = ""
    causal: bool = False
    layout: str = "contiguous"

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("plain"),
    Case("grouped, causal, heads side by side", heads=(4, 2), causal=True, layout="heads"),
    Case("boolean mask, values narrower", sizes=(8, 3), mask="boolean"),
    Case("added mask, strided", mask="added", layout="strided"),
]
N, L, S = 2, 5, 6


def tensors(case: Case, device: str) -> tuple[list[Tensor], Tensor | None]:
    (h, g), (e, v) = case.heads, case.sizes
    shapes = (N, h, L, e), (N, g, S, e), (N, g, S, v)
    made = [arrange(torch.randn(shape, device=device), case.layout).detach().requires_grad_() for shape in shapes]
    mask = torch.rand(N, 1, L, S, device=device) > 0.3 if case.mask == "boolean" else torch.randn(L, S, device=device)
    return made, mask if case.mask else None


@pytest.mark.gate("interp", "cuda")
@pytest.mark.parametrize("p", (0.0, 0.5))
@pytest.mark.parametrize("case", [CASES[0], *(pytest.param(c, marks=slow_there) for c in CASES[1:])], ids=str)
def test_opcheck(case: Case, p: float, device: str) -> None:
    """The launches write into tensors they are given."""
    inputs, mask = tensors(case, device)
    q, k, v = (t.detach() if t.stride(-1) == 1 else t.detach().contiguous() for t in inputs)
    seed = torch.tensor(7, device=device) if p else None
    options = p, case.causal, 0.3
    o = torch.empty(N, case.heads[0], L, case.sizes[1], device=device)
    lse = torch.empty((N, case.heads[0], *((2,) if case.mask == "added" else ()), L), device=device)
    torch.library.opcheck(ops.attention_forward, (q, k, v, mask, seed, o, lse, *options))
    ops.attention_forward(q, k, v, mask, seed, o, lse, *options)
    if not p:
        grouped = case.heads[0] > case.heads[1]
        expected = F.scaled_dot_product_attention(q, k, v, mask, is_causal=case.causal, scale=0.3, enable_gqa=grouped)
        torch.testing.assert_close(o, expected)
    do, delta = torch.randn_like(o), torch.empty(o.shape[:-1], device=device)
    torch.library.opcheck(ops.attention_row_sums, (o, do, delta))
    given = q, k, v, do, mask, seed, lse, delta
    torch.library.opcheck(ops.attention_query_gradient, (*given, torch.empty_like(q), *options))
    for dk, dv in ((torch.empty_like(k), torch.empty_like(v)), (None, torch.empty_like(v))):
        torch.library.opcheck(ops.attention_key_value_gradients, (*given, dk, dv, *options, True))


class Heads(torch.nn.Module):
    """Grouped causal attention between projections, as a language model has it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.project, self.dropout = tnn.Linear(8, 16), dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).split((8, 4, 4), -1)
        q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, None, self.dropout, is_causal=True, enable_gqa=True)
        return o.transpose(1, 2).flatten(2)


class Masked(torch.nn.Module):
    """Self-attention behind a boolean mask of its input's."""

    def forward(self, x: Tensor) -> Tensor:
        seen = (x[..., 0] > 0).unsqueeze(-2).expand(-1, x.shape[1], -1)
        return F.scaled_dot_product_attention(x, x, x, seen, scale=0.2)


@pytest.mark.parametrize("model", (Heads, pytest.param(Masked, marks=slow_there)))
def test_compile_with_any_batch_and_length(model: type[torch.nn.Module], device: str, triton_runs: bool) -> None:
    lengths = {2: 5, 3: 6, 4: 3}
    counter = compare_compiled(model().to(device), lambda n: torch.randn(n, lengths[n], 8), list(lengths), 64, device)
    assert counter.frame_count == 2  # the second size makes both dynamic, and that serves the others
    expected = {"attention", "linear"} if model is Heads else {"attention"}
    assert operators(counter.graphs[-1]) == (expected if triton_runs else set())


@slow_there
def test_compile_draws_dropout_anew(device: str) -> None:
    check_dropout_in_compile(Heads(0.5).to(device), torch.randn(2, 6, 8, device=device))


@slow_there
def test_autocast_in_compile(device: str) -> None:
    check_autocast_in_compile(Heads().to(device), torch.randn(2, 5, 8, device=device))


@slow_there
def test_export_with_dynamic_shapes(device: str, triton_runs: bool) -> None:
    model = Heads().to(device).eval()
    x = torch.randn(4, 5, 8, device=device)
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(model, (x,), dynamic_shapes=({0: dynamic, 1: dynamic},))
    assert operators(program.graph_module) == ({"attention", "linear"} if triton_runs else set())
    other = torch.randn(2, 7, 8, device=device)
    torch.testing.assert_close(program.module()(other), model(other))


def test_fake_and_meta_tensors(device: str) -> None:
    with FakeTensorMode(), torch.device(device):
        q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 3)
        o = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        assert o.shape == (2, 4, 5, 3)
    with torch.device("meta"), tkernels.backend("auto"):
        q = torch.randn(2, 4, 5, 8)
        assert F.scaled_dot_product_attention(q, q, q).device.type == "meta"


def test_flops(device: str, triton_runs: bool) -> None:
    """As torch counts its fused kernels: two products forward; the scores again and four gradients backward."""
    if not triton_runs:
        pytest.skip("PyTorch's kernel for CPUs is not in torch's count")
    (q, k, v), _ = tensors(Case("", heads=(4, 2), sizes=(8, 4)), device)
    product = 2 * N * 4 * L * S
    with FlopCounterMode(display=False) as counter:
        o = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert counter.get_total_flops() == product * (8 + 4)
    with counter:
        o.sum().backward(retain_graph=True)
    assert counter.get_total_flops() == product * (3 * 8 + 2 * 4)
    with counter:
        F.scaled_dot_product_attention(q.detach(), k.detach(), v, enable_gqa=True).sum().backward()
    assert counter.get_total_flops() == product * (8 + 4) + product * (8 + 4)


class Module(torch.nn.Module):
    """nn.MultiheadAttention, used in one of three ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.attention, self.way = tnn.MultiheadAttention(8, 2, batch_first=True), way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "alone":
            return self.attention(x, x, x, need_weights=False)[0]
        if self.way == "masks":
            padding, causal = x[..., 0] > 1, torch.ones(x.shape[1], x.shape[1], device=x.device).triu(1).bool()
            return self.attention(x, x, x, padding, need_weights=False, attn_mask=causal)[0]
        o, weights = self.attention(x, x + 1, x + 2)
        return o + weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("way", (pytest.param("alone", marks=slow), pytest.param("masks", marks=slow_there),
                                 pytest.param("weights", marks=slow)))  # fmt: skip
def test_module_compiles(way: str, device: str, triton_runs: bool) -> None:
    counter = compare_compiled(Module(way).to(device), lambda n: torch.randn(n, 4, 8), (2, 3, 5), 64, device)
    assert counter.frame_count == 2
    expected = {"linear", "matmul" if way == "weights" else "attention"}
    assert operators(counter.graphs[-1]) == (expected if triton_runs else set())


@slow
def test_module_under_autocast_and_export(device: str, triton_runs: bool) -> None:
    model, x = Module("weights").to(device), torch.randn(2, 4, 8, device=device)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        y, expected = compiled(x), model(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert operators(program.graph_module) == ({"linear", "matmul"} if triton_runs else set())
    other = torch.randn(3, 4, 8, device=device)
    torch.testing.assert_close(program.module()(other), model(other))


@slow_there
@pytest.mark.filterwarnings("error:.*lru_cache")
def test_compile_with_any_head(device: str) -> None:
    """Head sizes are constants of a trace, also one that is left to PyTorch; scales and dropout vary."""
    compiled: Any = torch.compile(F.scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
    for head, scale in ((8, 0.1), (4, 0.2), (300, 0.3)):
        q = torch.randn(1, 1, 3, head, device=device, requires_grad=True)
        o = compiled(q, q, q, scale=scale)
        torch.testing.assert_close(o, F.scaled_dot_product_attention(q, q, q, scale=scale))
        o.sum().backward()
        assert not torch.equal(compiled(q, q, q, None, scale), o)


@slow
def test_network_compiles(device: str, triton_runs: bool) -> None:
    model = AttentionCNN(width=2, image_size=16, heads=2, dropout2d=0.0, dropout=0.0).to(device)
    counter = compare_compiled(model, lambda n: torch.randn(n, 3, 16, 16), (2,), 900, device)
    assert operators(counter.graphs[-1]) == ({"attention", "conv_stage", "linear"} if triton_runs else set())
