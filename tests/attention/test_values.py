"""scaled_dot_product_attention against float64: masks, causal, lengths, heads, dropout, layouts, errors, launches."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as torchs

import tkernels
from tests import tolerance
from tests.attention.cases import factors
from tests.conftest import GATE
from tests.strides import arrange
from tkernels.core import autotune, mode, targets
from tkernels.functional import scaled_dot_product_attention
from tkernels.ops.attention import config as tuning

pytestmark = pytest.mark.gate("torch", "ttsem", "cuda")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FORWARD, DELTA, DQ, DKV = (f"attention_{name}_kernel" for name in ("forward", "delta", "dq", "dkv"))


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of query, key and value, what is masked, and how the tensors lie ('heads': as a projection gives them)."""

    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...] | None = None
    mask: str = ""
    causal: bool = False
    dtype: torch.dtype = F32
    layout: str = "contiguous"
    scale: float | None = None
    gqa: bool = False

    def __str__(self) -> str:
        shown = (v for v in vars(self).values() if v not in ("", "contiguous", None, False))
        return " ".join(str(v).replace("torch.", "") for v in shown)


CASES = [
    # partial tiles on both axes; a tile and a row more
    Case((1, 2, 37, 16), (1, 2, 41, 16)),
    Case((1, 1, 65, 32), (1, 1, 65, 32), dtype=BF16),
    # head sizes: no powers of two, multiples of 8 but not of 16, odd, narrower than a tile, values of another size
    Case((1, 1, 9, 24), (1, 1, 7, 24), dtype=BF16),
    Case((1, 1, 9, 20), (1, 1, 21, 20), dtype=BF16),
    Case((1, 2, 9, 7), (1, 2, 5, 7), (1, 2, 5, 3)),
    Case((1, 1, 20, 80), (1, 1, 33, 80), (1, 1, 33, 40), dtype=F16, causal=True),
    # causal, with fewer and with more keys than queries: row i sees keys 0 to i
    Case((1, 2, 70, 16), (1, 2, 40, 16), causal=True),
    Case((1, 2, 21, 16), (1, 2, 70, 16), causal=True, dtype=BF16),
    # masks: boolean and added, whole and broadcast, with rows that see nothing
    Case((2, 2, 17, 16), (2, 2, 35, 16), mask="boolean (2, 1, 17, 35)", dtype=BF16),
    Case((2, 2, 17, 16), (2, 2, 35, 16), mask="boolean (35,)"),
    Case((2, 2, 17, 16), (2, 2, 35, 16), mask="added (17, 35)"),
    Case((2, 2, 17, 16), (2, 2, 35, 16), mask="float32 (2, 1, 17, 35)", dtype=BF16),
    Case((2, 2, 17, 16), (2, 2, 35, 16), mask="added (2, 2, 17, 1)", dtype=F16),
    # grouped heads, a scale of one's own
    Case((1, 6, 20, 16), (1, 2, 33, 16), gqa=True, scale=0.1),
    Case((4, 20, 16), (2, 20, 16), gqa=True, causal=True, dtype=BF16),
    Case((1, 4, 9, 16), (1, 2, 7, 16), (1, 1, 7, 16), gqa=True),
    Case((2, 1, 4, 9, 16), (1, 3, 2, 5, 16), gqa=True, mask="boolean (3, 1, 9, 5)"),
    # every key alike
    Case((1, 2, 9, 16), (1, 2, 7, 16), scale=0.0),
    # ranks: matrices, one and three leading dimensions, leading dimensions that broadcast
    Case((9, 16), (5, 16)),
    Case((3, 9, 16), (3, 5, 16), mask="boolean (3, 9, 5)"),
    Case((2, 1, 2, 9, 16), (1, 3, 2, 5, 16), mask="added (3, 2, 9, 5)"),
    Case((3, 2, 9, 16), (1, 1, 5, 16)),
    # layouts
    Case((2, 3, 18, 16), (2, 3, 34, 16), layout="heads", dtype=BF16),
    Case((2, 3, 9, 16), (2, 3, 9, 16), layout="packed", causal=True),
    Case((2, 3, 9, 16), (2, 3, 9, 16), layout="strided", scale=-0.5),
]


def mask_of(case: Case, device: str) -> Tensor | None:
    """The mask a case names; its second row of queries, where it has one, sees nothing."""
    if not case.mask:
        return None
    kind, _, shape = case.mask.partition(" ")
    size = eval(shape)
    size = size if len(size) > 1 else (1, *size)
    seen = torch.rand(size) > 0.3
    if size[-2] > 1:
        seen[..., 1, :] = False
    if kind == "boolean":
        return seen.to(device)
    dtype = F32 if kind == "float32" else case.dtype
    return torch.randn(size).masked_fill(~seen, -math.inf).to(device, dtype)


def tensors(case: Case, device: str) -> list[Tensor]:
    shapes = case.q, case.k, case.v or case.k
    made = [torch.randn(shape, device=device).to(case.dtype) for shape in shapes]
    return [arrange(t, case.layout).detach().requires_grad_() for t in made]


def exact(t: Tensor) -> Tensor:
    return t.detach().cpu().double().requires_grad_(t.requires_grad)


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False,
              scale: float | None = None, gqa: bool = False, factor: Tensor | None = None) -> Tensor:  # fmt: skip
    """Attention spelled out: weights of rows that see nothing are 0. ``factor``: dropout's."""
    if gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool)
    if causal:
        seen = seen.tril()
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask.cpu()
    elif mask is not None:
        seen = seen & (mask.cpu() != -math.inf)
        scores = scores + mask.detach().cpu().double().masked_fill(mask.cpu() == -math.inf, 0)
    scores = scores.masked_fill(~seen, -1e300)
    weights = scores.softmax(-1) * seen
    return (weights if factor is None else weights * factor) @ v


def check(o: Tensor, inputs: list[Tensor], o64: Tensor, inputs64: list[Tensor], n_k: int) -> None:
    """Output and gradients, for one incoming gradient."""
    do = torch.randn(o.shape).to(o.device, o.dtype)
    got = torch.autograd.grad(o, inputs, do)
    want = torch.autograd.grad(o64, inputs64, do.detach().cpu().double())
    # weights are rounded to the dtype before they are multiplied
    tolerance.assert_close(o, o64.detach(), n_k, scale=1.0, name="o")
    for name, t, g, w in zip("qkv", inputs, got, want):
        assert g.dtype == t.dtype
        tolerance.assert_close(g, w, 4 * n_k * t.shape[-1], scale=2.0, name=f"d{name}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case, device: str, triton_runs: bool, launches: list[str]) -> None:
    inputs, mask = tensors(case, device), mask_of(case, device)
    before = [t.detach().clone() for t in inputs]
    o = scaled_dot_product_attention(*inputs, mask, 0.0, case.causal, scale=case.scale, enable_gqa=case.gqa)
    inputs64 = [exact(t) for t in inputs]
    o64 = reference(*inputs64, mask, case.causal, case.scale, case.gqa)
    assert o.dtype == case.dtype
    check(o, inputs, o64, inputs64, case.k[-2])
    for t, copy in zip(inputs, before):
        assert torch.equal(t.detach(), copy), "an input was written to"
    # float32 takes a launch each for dk and dv
    assert launches == ([FORWARD, DELTA, DQ, *[DKV] * (1 + (case.dtype == F32))] if triton_runs else [])


def test_rows_that_see_nothing_are_zero(device: str) -> None:
    q, k = (torch.randn(1, 1, n, 16, device=device, requires_grad=True) for n in (5, 7))
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    o = scaled_dot_product_attention(q, k, k, mask.to(device))
    assert torch.equal(o[0, 0, 2].cpu(), torch.zeros(16))
    o.sum().backward()
    assert q.grad is not None
    assert torch.equal(q.grad[0, 0, 2].cpu(), torch.zeros(16))
    assert k.grad is not None
    assert k.grad.isfinite().all()


@pytest.mark.parametrize("dtype, causal, p", ((F32, False, 0.3), (BF16, True, 0.5), (F32, True, 1.0)))
def test_dropout(dtype: torch.dtype, causal: bool, p: float, device: str, triton_runs: bool) -> None:
    """The mask depends on the seed and the place in the matrix only, and backward replays it."""
    q, k, v = (torch.randn(2, 2, n, 16, device=device).to(dtype).requires_grad_() for n in (35, 37, 37))
    if not triton_runs and not q.is_cuda:
        # PyTorch's own masks are its own affair: only how many
        o = scaled_dot_product_attention(q, k, v, None, p, causal)
        assert o.shape == q.shape
        assert bool((o == 0).all()) == (p == 1)
        return
    torch.manual_seed(5)
    factor = factors(q, k, p)
    torch.manual_seed(5)
    o = scaled_dot_product_attention(q, k, v, None, p, causal)
    kept = (factor > 0).float().mean().item()
    assert abs(kept - (1 - p)) < 0.04
    exact_factor = (factor > 0).cpu().double() / (1 - p if p < 1 else 1)
    inputs64 = [exact(t) for t in (q, k, v)]
    check(o, [q, k, v], reference(*inputs64, causal=causal, factor=exact_factor), inputs64, 4 * 37)
    again = scaled_dot_product_attention(q, k, v, None, p, causal)
    assert p == 1 or not torch.equal(o, again)


@pytest.mark.gate("ttsem", "cuda")
def test_mask_does_not_depend_on_tiles(device: str) -> None:
    from tkernels.core.config import Config
    from tkernels.ops.attention import kernels

    q, k = (torch.zeros(1, 2, n, 16, device=device) for n in (33, 39))
    v = torch.eye(39, device=device).expand(1, 2, 39, 39)
    seed = torch.tensor(2**40 + 3, device=device)
    masks = []
    for rows, keys in ((16, 16), (32, 64)):
        config = Config.of(num_warps=4, BLOCK_M=rows, BLOCK_N=keys, BLOCK_D=16, BLOCK_V=64, CHUNK=16)
        masks.append(kernels.launch_forward(q, k, v, None, 0.4, False, 1.0, seed, config=config)[0] > 0)
    assert torch.equal(*masks)


@pytest.mark.gate("ttsem", "cuda")
@pytest.mark.parametrize(
    "dtype, chunk",
    (
        (BF16, 32),
        pytest.param(F32, 16, marks=pytest.mark.extended("ttsem")),
        pytest.param(BF16, 16, marks=pytest.mark.extended("ttsem")),
    ),
)
def test_small_tiles(dtype: torch.dtype, chunk: int, device: str) -> None:
    """Several programs, more keys than a tile, features at once and in chunks, everything at a time."""
    from tkernels.core.config import Config
    from tkernels.ops.attention import kernels as attention
    from tkernels.ops.attention import kernels_backward as attention_backward

    if dtype != F32 and GATE == "cuda" and torch.cuda.get_device_capability()[0] == 9:
        pytest.skip("16 rows for 4 warps: an H200 gave wrong values and an illegal access, see test_rows_on_hopper")
    case = Case((2, 4, 35, 24), (2, 2, 41, 24), (2, 2, 41, 20), "boolean (2, 1, 35, 41)", dtype=dtype, gqa=True)
    (q, k, v), mask = tensors(case, device), mask_of(case, device)
    config = Config.of(num_warps=4, BLOCK_M=16, BLOCK_N=16, BLOCK_D=32, BLOCK_V=32, CHUNK=chunk)
    seed = torch.tensor(77, device=device)
    unit = torch.eye(41, device=device).expand(2, 4, 41, 41)
    wide = Config.of(num_warps=4, BLOCK_M=16, BLOCK_N=16, BLOCK_D=32, BLOCK_V=64, CHUNK=32)
    zero_q, zero_k = torch.zeros(2, 4, 35, 24, device=device), torch.zeros(2, 4, 41, 24, device=device)
    kept = attention.launch_forward(zero_q, zero_k, unit, None, 0.3, False, 1.0, seed, config=wide)[0] > 0
    q, k, v = (t.detach() for t in (q, k, v))
    options = mask, 0.3, False, 0.2, seed
    o, lse = attention.launch_forward(q, k, v, *options, config=config)
    do = torch.randn(o.shape).to(device, dtype)
    delta = attention_backward.launch_delta(o, do)
    assert lse is not None
    dq = attention_backward.launch_dq(q, k, v, do, lse, delta, *options, config=config)
    dk, dv = attention_backward.launch_dkv(q, k, v, do, lse, delta, *options, config=config)
    inputs64 = [exact(t).requires_grad_() for t in (q, k, v)]
    o64 = reference(*inputs64, mask, scale=0.2, gqa=True, factor=kept.cpu().double() / 0.7)
    want = torch.autograd.grad(o64, inputs64, do.cpu().double())
    for name, got, expected in zip(("o", "dq", "dk", "dv"), (o, dq, dk, dv), (o64.detach(), *want)):
        assert got is not None
        tolerance.assert_close(got, expected, 4 * 41, scale=2.0, name=name)
    only_k = attention_backward.launch_dkv(q, k, v, do, lse, delta, *options, True, False, config=config)
    only_v = attention_backward.launch_dkv(q, k, v, do, lse, lse, *options, False, True, config=config)
    assert only_k[1] is None
    assert only_v[0] is None
    assert torch.equal(only_k[0], dk)
    assert torch.equal(only_v[1], dv)


@pytest.mark.gate("ttsem", "cuda")
@pytest.mark.parametrize(
    "n_q, n_k, rows, keys", ((70, 70, 16, 32), (75, 90, 32, 16), (90, 41, 16, 16), (20, 90, 16, 32))
)
def test_tiles_on_and_off_the_diagonal(n_q: int, n_k: int, rows: int, keys: int, device: str) -> None:
    """Causal, tiles that the mask cuts, that it leaves whole, and that end beyond the queries or the keys; what keys
    hold that no query sees does not matter."""
    from tkernels.core.config import Config
    from tkernels.ops.attention import kernels as attention
    from tkernels.ops.attention import kernels_backward as attention_backward

    case = Case((1, 4, n_q, 16), (1, 2, n_k, 16), causal=True, gqa=True)
    q, k, v = (t.detach() for t in tensors(case, device))
    config = Config.of(num_warps=4, BLOCK_M=rows, BLOCK_N=keys, BLOCK_D=16, BLOCK_V=16, CHUNK=16)
    options = None, 0.0, True, 0.3, None
    o, lse = attention.launch_forward(q, k, v, *options, config=config)
    do = torch.randn(o.shape).to(device)
    delta = attention_backward.launch_delta(o, do)
    assert lse is not None
    dq = attention_backward.launch_dq(q, k, v, do, lse, delta, *options, config=config)
    dk, dv = attention_backward.launch_dkv(q, k, v, do, lse, delta, *options, config=config)
    inputs64 = [exact(t).requires_grad_() for t in (q, k, v)]
    o64 = reference(*inputs64, causal=True, scale=0.3, gqa=True)
    want = torch.autograd.grad(o64, inputs64, do.cpu().double())
    for name, got, expected in zip(("o", "dq", "dk", "dv"), (o, dq, dk, dv), (o64.detach(), *want)):
        assert got is not None
        tolerance.assert_close(got, expected, 4 * n_k, scale=2.0, name=name)
    k[:, :, n_q:] = math.inf
    again = attention_backward.launch_dkv(q, k, v, do, lse, delta, *options, config=config)
    for got, expected in zip(again, (dk, dv)):
        assert torch.equal(got, expected)


@pytest.mark.gate("torch")
def test_rows_on_hopper() -> None:
    """No 16-bit configuration has products of fewer than 64 rows, of which an H200 computed wrong values, nor has one
    that autotuning tries."""
    hopper = targets.TARGETS["sm_90"]
    least = tuning.least_rows(2, hopper)
    for head, extras in itertools.product((16, 32, 64, 128, 256), (False, True)):
        given = head, head, 2, "ieee", extras, hopper
        for config in (tuning.forward(*given), tuning.dq(*given)):
            assert all(each["BLOCK_M"] >= 64 for each in autotune.neighbours(config, least=least))
        assert tuning.dkv(*given)["BLOCK_N"] >= 64


def test_only_the_gradients_asked_for(device: str, triton_runs: bool, launches: list[str]) -> None:
    q, k, v = (torch.randn(1, 1, 9, 16, device=device) for _ in range(3))
    scaled_dot_product_attention(q.requires_grad_(), k, v).sum().backward()
    scaled_dot_product_attention(q.detach(), k, v.requires_grad_()).sum().backward()
    scaled_dot_product_attention(q.detach(), k, v.detach())
    assert launches == ([FORWARD, DELTA, DQ, FORWARD, DKV, FORWARD] if triton_runs else [])


@pytest.mark.gate("ttsem", "cuda")
def test_nan_and_inf(device: str) -> None:
    """A NaN or infinite score makes NaN of its row and no other. (torch's kernel for CPUs loses a NaN query.)"""
    q, k, v = (torch.randn(1, 1, 9, 16) for _ in range(3))
    q[0, 0, 2, 0], q[0, 0, 4, 3] = math.nan, math.inf
    got = scaled_dot_product_attention(*(t.to(device) for t in (q, k, v))).cpu()
    assert got.isnan().all(-1)[0, 0].tolist() == [i in (2, 4) for i in range(9)]
    k[0, 0, 5] = math.nan
    causal = scaled_dot_product_attention(*(t.to(device) for t in (k, k, v)), is_causal=True).cpu()
    assert causal.isnan().all(-1)[0, 0].tolist() == [i >= 5 for i in range(9)]


@pytest.mark.parametrize("batch, n_q, n_k, head, v_head", ((2, 0, 3, 16, 16), (2, 3, 0, 16, 16), (0, 3, 3, 16, 16),
                                                           (1, 3, 3, 16, 0), (1, 3, 3, 0, 16)))  # fmt: skip
def test_empty(batch: int, n_q: int, n_k: int, head: int, v_head: int, device: str) -> None:
    shapes = (batch, 1, n_q, head), (batch, 1, n_k, head), (batch, 1, n_k, v_head)
    inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    o, want = scaled_dot_product_attention(*inputs), torchs(*inputs)
    assert o.shape == want.shape
    assert torch.equal(o.isnan(), want.isnan())
    assert torch.equal(o.nan_to_num(0), want.nan_to_num(0))
    for g, t in zip(torch.autograd.grad(o.sum(), inputs, allow_unused=True), inputs):
        assert g is None or g.shape == t.shape


def test_a_gradient_of_a_gradient_is_refused(device: str, triton_runs: bool) -> None:
    if not triton_runs:
        pytest.skip("PyTorch's body differentiates twice where PyTorch does")
    q = torch.randn(1, 1, 5, 16, device=device, requires_grad=True)
    (dq,) = torch.autograd.grad(scaled_dot_product_attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_autocast(device: str, triton_runs: bool, launches: list[str]) -> None:
    q, k, v = (torch.randn(1, 2, 9, 16, device=device, requires_grad=True) for _ in range(3))
    mask = torch.randn(9, 9, device=device)
    with torch.autocast("cuda" if triton_runs else "cpu", BF16):
        o = scaled_dot_product_attention(q, k, v, mask)
    assert o.dtype == BF16
    o.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == F32
    assert bool(launches) == triton_runs


@pytest.mark.parametrize("why", ("wide", "mask gradient", "float64"))
def test_left_to_pytorch(
    why: str, device: str, triton_runs: bool, launches: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The same results, no kernel, and the reason once in the log."""
    mode.log_once.cache_clear()
    dtype = torch.float64 if why == "float64" else F32
    q = torch.randn(1, 1, 5, 300 if why == "wide" else 16, device=device, dtype=dtype)
    mask = torch.randn(5, 5, device=device, dtype=dtype, requires_grad=why == "mask gradient")
    with caplog.at_level(logging.INFO, "tkernels"):
        for _ in range(2):
            o = scaled_dot_product_attention(q, q, q, mask)
    assert torch.equal(o, torchs(q, q, q, mask))
    assert not launches
    if triton_runs and why != "float64":
        assert len(caplog.records) == 1
        assert "runs on PyTorch" in caplog.text
    if why == "mask gradient":
        o.sum().backward()
        assert mask.grad is not None


@pytest.mark.gate("torch")
@pytest.mark.parametrize("causal", (False, True))
def test_gradcheck(causal: bool) -> None:
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 4, 4))
    assert torch.autograd.gradcheck(lambda *t: scaled_dot_product_attention(*t, is_causal=causal), (q, k, v))


def test_same_bits_twice(device: str) -> None:
    q, k, v = (torch.randn(1, 4, 40, 16, device=device, requires_grad=True) for _ in range(3))

    def once() -> tuple[Tensor, ...]:
        o = scaled_dot_product_attention(q, k, v, is_causal=True)
        return o, *torch.autograd.grad(o.square().sum(), (q, k, v))

    for first, second in zip(once(), once()):
        assert torch.equal(first, second)


def test_backend_of_the_users_choice(device: str, launches: list[str]) -> None:
    q = torch.randn(1, 1, 5, 16, device=device)
    with tkernels.backend("torch"):
        scaled_dot_product_attention(q, q, q)
    assert not launches


@pytest.mark.gate("aot")
@pytest.mark.parametrize("target", sorted(targets.TARGETS))
def test_a_tile_or_a_reason(target: str) -> None:
    """Every head, dtype and option has configurations on every target, or is left to PyTorch for a reason."""
    gpu = targets.TARGETS[target]
    heads = itertools.product((1, 16, 24, 64, 80, 128, 192, 256), (16, 64, 256))
    for (head, v_head), itemsize, extras in itertools.product(heads, (2, 4), (False, True)):
        reason = tuning.why_not(head, v_head, itemsize, extras, gpu)
        if reason is not None:
            assert max(head, v_head) > 128
            continue
        for chooser in (tuning.forward, tuning.dq, tuning.dkv):
            config = chooser(head, v_head, itemsize, "ieee", extras, gpu)
            assert config["BLOCK_D"] >= head
            assert config["BLOCK_V"] >= v_head
            # a chunk never reaches past either head
            assert config["CHUNK"] == config["BLOCK_D"] or config["CHUNK"] <= config["BLOCK_V"]
    assert tuning.why_not(0, 16, 2, False, gpu) is not None


@pytest.mark.gate("ttsem", "cuda")
def test_rows_that_overlap_in_memory(device: str) -> None:
    """Their gradients have memory of their own: an empty tensor like such rows may not have dense heads."""
    memory = torch.randn(3, 40)
    shape = (1, 2, 4, 8)
    given = [
        t.to(device).as_strided(shape, strides)
        for t, strides in zip(memory, ((20, 10, 1, 1), (20, 8, 2, 1), (20, 9, 0, 1)))
    ]
    q, k, v = (t.detach().requires_grad_() for t in given)
    exact = [t.detach().cpu().double().contiguous().requires_grad_() for t in (q, k, v)]
    dy = torch.randn(shape)
    found = torch.autograd.grad(scaled_dot_product_attention(q, k, v), (q, k, v), dy.to(device))
    expected = torch.autograd.grad(torchs(*exact), exact, dy.double())
    for got, want in zip(found, expected):
        torch.testing.assert_close(got.cpu().double(), want, atol=1e-5, rtol=1e-4)
