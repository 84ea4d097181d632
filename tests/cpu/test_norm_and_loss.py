"""The compiled passes of cross entropy and batch norm with ReLU on the CPU: values, gradients, what they leave out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tkernels.functional as TF
from tests.cpu.cases import take
from tests.cpu.profiles import events
from tests.tolerance import assert_close
from tkernels.cpu import buffers, compiler, norm, product
from tkernels.cpu import loss as cross_entropy_cpu

pytestmark = [
    pytest.mark.gate("torch"),
    pytest.mark.skipif(not compiler.enabled(), reason="TKERNELS_COMPILE=0 or no C++ compiler"),
]

N, C = 256, 512
FAST = {"cross_entropy": "_CrossEntropyCPUBackward", "batch_norm": "_BatchNormBackward"}
# relative norm of the error against torch's own, plus the rounding that both may get right by luck
WORSE, LUCK = 1.25, 0.05


@pytest.fixture(autouse=True)
def _small_calls_take_the_passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "small" not in request.node.name:
        monkeypatch.setattr(cross_entropy_cpu, "WORTH_IT", 1)
        monkeypatch.setattr(cross_entropy_cpu, "SHORT_WORTH_IT", 1)
        monkeypatch.setattr(norm, "WORTH_IT", 1)


def _logits(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    target = torch.randint(0, C, (N,))
    target[3] = target[77] = -100
    return (3 * torch.randn(N, C)).to(dtype).requires_grad_(), target


def _batch(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Input, weight, bias."""
    x = (torch.randn(*shape) * 2 + 5).to(dtype)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return [x.requires_grad_(), torch.rand(shape[1]).requires_grad_(), torch.randn(shape[1]).requires_grad_()]


def _no_worse(name: str, ours: Tensor, torchs: Tensor, exact: Tensor) -> None:
    assert (ours.dtype, ours.shape, ours.stride()) == (torchs.dtype, torchs.shape, torchs.stride()), name
    scale = torch.linalg.vector_norm(exact).item()
    a, b = (torch.linalg.vector_norm(t.double() - exact).item() / scale for t in (ours, torchs))
    assert a <= WORSE * b + LUCK * torch.finfo(ours.dtype).eps, f"{name}: {a:.2e} off, torch {b:.2e}"


def _is_fast(y: Tensor, operator: str) -> bool:
    return y.grad_fn is not None and y.grad_fn.name() == FAST[operator]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("smoothing", (0.0, 0.1))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_cross_entropy(dtype: torch.dtype, smoothing: float, reduction: str) -> None:
    x, target = _logits(dtype)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    exact_x = x.detach().double().requires_grad_()
    exact = F.cross_entropy(exact_x, target, **options)
    dy = torch.randn(exact.shape).to(dtype)
    ours, torchs = TF.cross_entropy(x, target, **options), F.cross_entropy(x, target, **options)
    assert _is_fast(ours, "cross_entropy")
    assert ours.dtype == torchs.dtype
    assert_close(ours, exact, C, name="loss")
    gradients = [
        torch.autograd.grad(y, leaf, dy.to(y.dtype))[0] for y, leaf in ((ours, x), (torchs, x), (exact, exact_x))
    ]
    _no_worse("gradient", *gradients)
    with torch.no_grad():
        assert torch.equal(TF.cross_entropy(x, target, **options), ours)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_cross_entropy_of_short_rows_in_a_small_call(dtype: torch.dtype) -> None:
    """Rows below a vector register's length take the passes where there are many of them."""
    lanes = cross_entropy_cpu.VECTOR // dtype.itemsize
    for classes, rows, fast in ((lanes - 1, 1 << 15, True), (lanes - 1, 8, False), (lanes, 1 << 12, False)):
        x = torch.randn(rows, classes).to(dtype).requires_grad_()
        target = torch.randint(classes, (rows,))
        ours, torchs = TF.cross_entropy(x, target), F.cross_entropy(x, target)
        assert _is_fast(ours, "cross_entropy") == fast, (classes, rows)
        exact_x = x.detach().double().requires_grad_()
        gradients = [torch.autograd.grad(y, leaf)[0] for y, leaf in
                     ((ours, x), (torchs, x), (F.cross_entropy(exact_x, target), exact_x))]  # fmt: skip
        _no_worse("gradient", *gradients)


def test_cross_entropy_under_autocast() -> None:
    x, target = _logits(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, torchs = TF.cross_entropy(x, target), F.cross_entropy(x, target)
    assert _is_fast(ours, "cross_entropy")
    assert ours.dtype == torchs.dtype == torch.float32
    torch.testing.assert_close(ours, torchs)
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(torchs, x))


@pytest.mark.parametrize("index", (C, -1))
def test_cross_entropy_refuses_a_class_out_of_range(index: int) -> None:
    x, target = _logits(torch.float32)
    target[5] = index
    with pytest.raises(IndexError, match=f"got {index}"):
        TF.cross_entropy(x, target)


def test_cross_entropy_of_extremes() -> None:
    """Rows of NaN and infinities, large logits, and nothing that counts."""
    x, target = _logits(torch.float32)
    with torch.no_grad():
        x[0, 1], x[1, 2], x[2, :] = torch.inf, torch.nan, -torch.inf
        x[4, 5], x[6] = -torch.inf, x[6] + 1e4
    ours, torchs = (f(x, target, reduction="none") for f in (TF.cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, torchs, equal_nan=True)
    a, b = (torch.autograd.grad(y.sum(), x)[0] for y in (ours, torchs))
    torch.testing.assert_close(a, b, equal_nan=True)
    assert TF.cross_entropy(x, torch.full_like(target, -100)).isnan()


def _normalized(f: Callable[..., Tensor], x: Tensor, w: Tensor, b: Tensor, dy: Tensor) -> tuple[list[Tensor], Tensor]:
    mean, var = torch.zeros_like(w), torch.ones_like(w)
    y = f(x, mean, var, w, b)
    return [y.detach(), mean.detach(), var.detach(), *torch.autograd.grad(y, (x, w, b), dy)], y


def _ours(x: Tensor, mean: Tensor | None, var: Tensor | None, w: Tensor, b: Tensor) -> Tensor:
    return TF.batch_norm(x, mean, var, w, b, True, activation="relu")


def _torchs(x: Tensor, mean: Tensor | None, var: Tensor | None, w: Tensor, b: Tensor) -> Tensor:
    return torch.relu(F.batch_norm(x, mean, var, w, b, True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("shape", ((4096, 64), (16, 32, 32, 24)), ids=("rows", "nhwc"))
def test_batch_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, w, b = _batch(shape, dtype)
    dy = torch.empty_like(x).normal_()
    (ours, y), (torchs, _) = _normalized(_ours, x, w, b, dy), _normalized(_torchs, x, w, b, dy)
    exact, _ = _normalized(_torchs, *(t.detach().double().requires_grad_() for t in (x, w, b)), dy.double())
    assert _is_fast(y, "batch_norm")
    for name, *values in zip(("y", "running mean", "running var", "dx", "dw", "db"), ours, torchs, exact):
        _no_worse(name, *values)


def test_batch_norm_gives_only_what_is_asked_for() -> None:
    x, w, b = _batch((4096, 64))
    dy = torch.randn(x.shape[::-1]).t()  # strides of its own
    everything = torch.autograd.grad(_ours(x, None, None, w, b), (x, w, b), dy)
    for i, leaf in enumerate((x, w, b)):
        frozen = [t if t is leaf else t.detach() for t in (x, w, b)]
        assert torch.equal(torch.autograd.grad(_ours(frozen[0], None, None, *frozen[1:]), leaf, dy)[0], everything[i])


def _same_twice(f: Callable[[], tuple[Tensor, ...]]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(f(), f()))


def test_same_bits_from_run_to_run() -> None:
    x, target = _logits(torch.float32)
    assert _same_twice(lambda: torch.autograd.grad(TF.cross_entropy(x, target), x))
    leaves = _batch((4096, 64))
    assert _same_twice(lambda: torch.autograd.grad(_ours(leaves[0], None, None, *leaves[1:]).sum(), leaves))


def test_second_derivatives() -> None:
    """Through torch's own calls, hence to their accuracy."""
    x, target = _logits(torch.float32)
    inputs, *parameters = _batch((4096, 64))
    calls: tuple[tuple[Callable[[], Tensor], Callable[[], Tensor], list[Tensor]], ...] = (
        (lambda: TF.cross_entropy(x, target), lambda: F.cross_entropy(x, target), [x]),
        (
            lambda: _ours(inputs, None, None, *parameters).square().mean(),
            lambda: _torchs(inputs, None, None, *parameters).square().mean(),
            [inputs, *parameters],
        ),
    )
    for ours, torchs, leaves in calls:
        found = []
        for f in (ours, torchs):
            first = torch.autograd.grad(f(), leaves, create_graph=True)
            found.append(torch.autograd.grad(sum(t.square().sum() for t in first), leaves))
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)


def _saved_bytes(f: Callable[[], Tensor], *leaves: Tensor) -> int:
    """Bytes a graph keeps beside its leaves."""
    own = {t.untyped_storage().data_ptr() for t in leaves}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = f()
    assert y.grad_fn is not None
    return sum(kept.values())


def test_what_is_kept_for_backward() -> None:
    """Vectors: no softmax, no output of ReLU."""
    x, target = _logits(torch.float32)
    assert _saved_bytes(lambda: TF.cross_entropy(x, target), x, target) <= 4 * 4 * N
    inputs, *parameters = _batch((4096, 64))
    assert _saved_bytes(lambda: _ours(inputs, None, None, *parameters), inputs, *parameters) <= 4 * 4 * 64


def _aten_calls(f: Callable[[], object]) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        f()
    # neither bookkeeping nor what the test run's filling of fresh memory adds
    others = ("aten::fill_", "aten::empty", "aten::to", "aten::_to_copy", "aten::as_strided", "aten::scalar_tensor")
    names = [event.name for event in profile.events() if event.name.startswith("aten::")]
    return [name for name in names if not name.startswith(others)]


def test_what_is_left_out() -> None:
    """No pass of torch's own over the maps: neither softmax, batch norm nor ReLU, no fill, and few calls."""
    x, target = _logits(torch.float32)
    inputs, *parameters = _batch((4096, 64))
    steps: tuple[tuple[Callable[[], object], int], ...] = (
        (lambda: torch.autograd.grad(TF.cross_entropy(x, target), x), 45),
        (lambda: torch.autograd.grad(_ours(inputs, None, None, *parameters).sum(), [inputs, *parameters]), 60),
    )
    passes = ("softmax", "nll_loss", "cross_entropy", "batch_norm", "relu", "threshold", "zero")
    for step, most in steps:
        step()
        calls = _aten_calls(step)
        assert not [name for name in calls if any(word in name for word in passes) and "zeros_like" not in name]
        assert len(calls) <= most, f"{len(calls)} ATen calls, {most} are enough: {calls}"


def test_memory_is_used_again() -> None:
    inputs, *parameters = _batch((8192, 64))

    def step() -> Tensor:
        return torch.autograd.grad(_ours(inputs, None, None, *parameters).sum(), inputs)[0]

    addresses = {step().data_ptr() for _ in range(4)}
    assert len(addresses) <= 2


def test_memory_that_is_held_is_not_used_again() -> None:
    inputs, *parameters = _batch((8192, 64))
    first = _ours(inputs, None, None, *parameters)
    copy = first.detach().clone()
    view = first.detach()[5:, 3]
    del first
    gc.collect()
    second = _ours(inputs + 1, None, None, *parameters)
    assert torch.equal(view, copy[5:, 3])
    assert second.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()


def test_shared_memory_is_not_used_again() -> None:
    pool = buffers.Pool()
    memory = take(pool, 4096).share_memory_()
    address = memory.data_ptr()
    del memory
    assert take(pool, 4096).data_ptr() != address


def test_a_storage_that_somebody_holds_is_not_used_again() -> None:
    pool = buffers.Pool()
    storage = take(pool, 4096).untyped_storage()
    address = storage.data_ptr()
    assert take(pool, 4096).data_ptr() != address
    del storage
    assert take(pool, 4096).data_ptr() == address


def test_results_may_be_written_to() -> None:
    inputs, *parameters = _batch((8192, 64))
    y = _ours(inputs, None, None, *parameters)
    y += 1.0
    assert not y._is_view()


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own calls, bit for bit."""
    monkeypatch.setattr(compiler, "_wanted", False)
    x, target = _logits(torch.float32)
    assert torch.equal(TF.cross_entropy(x, target), F.cross_entropy(x, target))
    leaves = _batch((4096, 64))
    assert torch.equal(_ours(leaves[0], None, None, *leaves[1:]), _torchs(leaves[0], None, None, *leaves[1:]))


def test_small_calls_take_torch() -> None:
    """Where the calls around the passes cost more than they save."""
    x, target = _logits(torch.float32)
    inputs, *parameters = _batch((4096, 64))
    assert not _is_fast(TF.cross_entropy(x, target), "cross_entropy")
    assert not _is_fast(_ours(inputs, None, None, *parameters), "batch_norm")


def test_calls_that_are_not_plain_take_torch() -> None:
    """What the passes do not do, and what must see ATen calls."""
    x, target = _logits(torch.float32)
    assert not _is_fast(TF.cross_entropy(x, target, torch.ones(C)), "cross_entropy")
    assert not _is_fast(TF.cross_entropy(x.t().contiguous().t(), target), "cross_entropy")
    assert not _is_fast(TF.cross_entropy(x.double(), target), "cross_entropy")
    per_sample = torch.func.vmap(lambda row, t: TF.cross_entropy(row, t))(x.detach(), target.clamp(min=0))
    torch.testing.assert_close(per_sample, F.cross_entropy(x.detach(), target.clamp(min=0), reduction="none"))
    found = torch.func.grad(lambda logits: TF.cross_entropy(logits, target))(x.detach())
    torch.testing.assert_close(found, torch.autograd.grad(F.cross_entropy(x, target), x)[0])


def test_batch_norms_that_the_passes_are_not_for() -> None:
    """A residual, evaluation, vectors that are strided, an input of inference mode: as torch has them."""
    x, weight, bias = (t.detach() for t in _batch((4096, 64)))
    residual, every_other = torch.randn_like(x), torch.randn(4, 128).abs()[:, ::2]
    mean, var, w, b = every_other
    before = mean.clone()
    normed = F.batch_norm(x, mean.clone(), var.clone(), w, b, True, 0.1, 1e-5)

    def ours(x: Tensor, *vectors: Tensor, training: bool = True, residual: Tensor | None = None) -> Tensor:
        return TF.batch_norm(x, *vectors, training, 0.1, 1e-5, "relu", residual)

    plain = [t.contiguous() for t in every_other]
    assert_close(ours(x, *(t.clone() for t in plain)), normed.relu().double(), 1)  # the pass is compiled
    assert_close(ours(x, *(t.clone() for t in plain), residual=residual), (normed + residual).relu().double(), 1)
    evaluated = F.batch_norm(x, mean, var, w, b, False, 0.1, 1e-5)
    assert_close(ours(x, *plain, training=False), evaluated.relu().double(), 1)
    assert torch.equal(plain[0], before)
    moved = every_other.clone()
    F.batch_norm(x, moved[0], moved[1], w, b, True, 0.1, 1e-5)
    assert_close(ours(x, *every_other), normed.relu().double(), 1)
    torch.testing.assert_close(every_other, moved)
    assert not events(lambda: ours(x, *every_other), ())
    with torch.inference_mode():
        inference = x.clone()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        F.batch_norm(inference, None, None, weight.requires_grad_(), bias, True)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        ours(inference, *plain[:2], weight, bias)
    assert torch.equal(plain[0], before)


def test_losses_of_any_smoothing() -> None:
    """torch takes what is below 0 and refuses what is above 1."""
    x, target = _logits(torch.float32)
    ours, torchs = (f.cross_entropy(x, target, label_smoothing=-0.1) for f in (TF, F))
    torch.testing.assert_close(ours, torchs)
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(torchs, x))
    for f in (TF, F):
        with pytest.raises(RuntimeError, match="label_smoothing must be between 0"):
            f.cross_entropy(x, target, label_smoothing=1.5)


def test_large_products_are_onednn_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody differentiates them and it is ahead; small ones take torch's own calls."""
    monkeypatch.setattr(product, "onednn_is_ahead", lambda threads: True)

    def operators(call: Callable[[], Tensor]) -> set[str]:
        with torch.no_grad(), torch.profiler.profile() as profiled:
            call()
        return {event.key for event in profiled.key_averages()}

    x, weight = torch.randn(1024, 256), torch.randn(1024, 256)
    assert "mkldnn::_linear_pointwise" in operators(lambda: TF.linear(x, weight, None, "relu"))
    assert "mkldnn::_linear_pointwise" in operators(lambda: TF.linear(x, weight))
    assert "mkldnn::_linear_pointwise" not in operators(lambda: TF.linear(x[:8], weight, None, "relu"))


def test_what_large_products_are_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, which has another dtype, and where autograd records."""
    monkeypatch.setattr(product, "onednn_is_ahead", lambda threads: True)
    x, weight = torch.randn(1024, 256), torch.randn(1024, 256, requires_grad=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = TF.linear(x, weight)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = F.linear(x, weight)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, expected)
    gradients = [torch.autograd.grad(linear(x, weight).sin().sum(), weight)[0] for linear in (TF.linear, F.linear)]
    assert torch.equal(*gradients)
