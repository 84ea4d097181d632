"""batch_norm against float64: values, gradients, running statistics, layouts, errors, and which kernels ran."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tkernels
from tests import tolerance
from tests.batch_norm.cases import BACKWARD, BF16, F16, F32, F64, FORWARD, Case, arrange, evaluate, operands
from tkernels.core import activation as activations
from tkernels.core.records import BatchNorm
from tkernels.functional import batch_norm
from tkernels.ops.batch_norm.op import counted_batch_norm

pytestmark = pytest.mark.gate("torch", "ttsem", "cuda")

CASES = [
    # (N, C): rows as they are; one channel, one column; channels a multiple of 8 but not of 16
    Case((9, 4)),
    Case((33, 1), dtype=BF16),
    Case((6, 24), dtype=F16, activation="relu"),
    # every rank, both native layouts
    Case((2, 5, 12)),
    Case((2, 5, 7, 9), "channels_last"),
    Case((2, 5, 7, 9), activation="relu"),
    Case((2, 5, 2, 2, 3), "channels_last", activation="relu"),
    Case((2, 5, 2, 2, 3)),
    Case((2, 5, 1, 2, 2, 3)),
    # contiguous planes too small for a tile of their own: columns share a channel
    Case((5, 6, 2, 2), activation="relu", residual="contiguous"),
    Case((3, 5, 7), dtype=BF16),
    Case((9, 4, 1, 1), "channels_last"),
    # strides of the input: converted once
    Case((2, 5, 4, 3), "sliced", activation="relu"),
    Case((2, 5, 4, 3), "sliced channels_last"),
    Case((2, 5, 12), "transposed"),
    Case((2, 5, 4, 3), "offset", dtype=BF16),
    Case((2, 5, 4, 3), "expanded"),
    # strides of the gradient
    Case((2, 5, 4, 3), "channels_last", dy="expanded"),
    Case((2, 5, 4, 3), "contiguous", dy="channels_last", activation="relu"),
    Case((2, 5, 4, 3), "channels_last", dy="contiguous"),
    Case((2, 5, 4, 3), "channels_last", dy="sliced", activation="leaky_relu"),
    Case((2, 5, 4, 3), dy="transposed"),
    # evaluation: running statistics in both passes
    Case((2, 5, 4, 3), "channels_last", training=False, activation="relu"),
    Case((2, 5, 4, 3), training=False, dtype=BF16, frozen=("weight", "bias"), activation="relu"),
    Case((2, 5, 4, 3), "channels_last", training=False, frozen=("weight", "bias"), activation="silu"),
    Case((2, 5, 4, 3), "channels_last", training=False, frozen=("weight", "bias", "input"), residual="channels_last"),
    Case((2, 5, 4, 3), training=False, frozen=("weight", "bias"), residual="contiguous", activation="relu"),
    Case((9, 4), training=False, weight=False, bias=False),
    # residual: its gradient, other layout than the input's
    Case((2, 5, 4, 3), "channels_last", residual="channels_last", activation="relu", dtype=BF16),
    Case((2, 5, 4, 3), "channels_last", residual="contiguous", activation="gelu"),
    Case((2, 5, 4, 3), residual="sliced", activation="silu", dtype=F16),
    Case((2, 5, 4, 3), residual="expanded", activation="leaky_relu"),
    Case((2, 5, 4, 3), residual="contiguous", activation="relu6"),
    Case((2, 5, 4, 3), "channels_last", residual="channels_last", activation="hardswish", dtype=BF16),
    Case((2, 5, 4, 3), residual="contiguous", activation="relu", frozen=("residual",)),
    Case((2, 5, 4, 3), residual="contiguous", activation="relu", frozen=("input", "weight", "bias")),
    Case((2, 5, 4, 3), "channels_last", residual="channels_last"),
    # parts of the affine map, frozen parts, no statistics kept
    Case((9, 4), weight=False, activation="gelu"),
    Case((9, 4), bias=False, running=False),
    Case((9, 4), weight=False, bias=False, running=False, dtype=BF16),
    Case((9, 4), frozen=("weight", "bias")),
    Case((9, 4), frozen=("input", "bias")),
    Case((9, 4), frozen=("input", "weight")),
    Case((9, 4), frozen=("bias",), activation="silu"),
    # parameters and statistics in the input's own 16 bits
    Case((9, 4), dtype=BF16, half_parameters=True),
    Case((2, 5, 4, 3), "channels_last", dtype=F16, half_parameters=True, training=False, activation="relu"),
    # mean far from 0 against the deviation
    Case((2, 5, 4, 3), "channels_last", ratio=1e4),
    Case((2, 5, 4, 3), ratio=1e4, activation="relu"),
    Case((2, 5, 4, 3), "channels_last", ratio=1e2, dtype=BF16),
    # float64 stays with PyTorch everywhere
    Case((2, 5, 4, 3), "channels_last", dtype=F64, activation="relu", residual="channels_last"),
]


def expected_launches(case: Case) -> list[str]:
    """The kernels a case needs and no others: what is frozen costs nothing."""
    wants = {k for k in ("input", "weight", "bias") if k not in case.frozen}
    if not case.weight:
        wants -= {"weight"}
    if not case.bias:
        wants -= {"bias"}
    names = list(FORWARD) if case.training else FORWARD[2:]
    if wants & {"weight", "bias"} or (case.training and "input" in wants):
        names += BACKWARD[:2]
        summed = True
    else:
        summed = False
    masked_residual = case.residual and case.activation and "residual" not in case.frozen
    if "input" in wants or (masked_residual and not summed):
        names.append(BACKWARD[2])
    return names


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case: Case, device: str, triton_runs: bool, launches: list[str]) -> None:
    made = operands(case)
    ours = made.like(None, device)
    # moving drops strides of expanded and sliced tensors: arrange again where the test's tensors live
    ours.input, ours.dy = arrange(ours.input, case.layout), arrange(ours.dy, case.dy)
    before = {k: v.clone() for k, v in vars(ours).items() if v is not None and not k.startswith("running")}
    launches.clear()
    with tkernels.backend("auto"):
        got = evaluate(case, ours, reference=False)
    on_triton = triton_runs and case.dtype != F64
    assert launches == (expected_launches(case) if on_triton else [])
    for name, value in before.items():
        assert torch.equal(value, getattr(ours, name)), f"{name} was written to"

    torch_own = made.like(None, "cpu" if on_triton else device)
    torch_own.input, torch_own.dy = arrange(torch_own.input, case.layout), arrange(torch_own.dy, case.dy)
    theirs = evaluate(case, torch_own, reference=True)
    want = evaluate(case, made.like(F64, "cpu"), reference=True)
    assert got.keys() == want.keys() == theirs.keys()
    assert got["output"].stride() == theirs["output"].stride()
    values = ours.input.numel() // case.shape[1]
    for name, value in got.items():
        assert value.dtype == theirs[name].dtype, name
        if not on_triton:
            assert torch.equal(value, theirs[name].to(value.device)), f"{name} is not torch's own"
            continue
        # dz is rounded to the residual's dtype before it is summed, as in torch
        rounded = case.residual is not None and case.activation not in (None, "relu")
        scale = 1.0 if name in ("dinput", "dweight", "dbias") else None
        tolerance.assert_close(value, want[name], values, dtype=case.dtype if rounded else None, scale=scale, name=name)


@pytest.mark.gate("ttsem", "cuda")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("ratio", [1.0, 1e2, 1e4])
def test_no_less_exact_than_torch(ratio: float, layout: str, dtype: torch.dtype, device: str) -> None:
    case = Case((6, 5, 4, 3), layout, dtype, ratio=ratio)
    made = operands(case)
    want = evaluate(case, made.like(F64, "cpu"), reference=True)
    theirs = evaluate(case, made.like(None, "cpu"), reference=True)
    got = evaluate(case, made.like(None, device), reference=False)
    for name, reference in want.items():
        ours, torchs = (t[name].cpu().double() - reference for t in (got, theirs))
        # where torch happens to be exact, one rounding of the result is still allowed
        floor = torch.finfo(got[name].dtype).eps / 4
        norm, largest = reference.norm(), reference.abs().max()
        assert ours.norm() <= 1.25 * max(torchs.norm(), floor * norm), name
        assert ours.abs().max() <= 2 * max(torchs.abs().max(), floor * largest), name


def test_sum_backward(device: str) -> None:
    # a gradient of stride 0 everywhere; that of the input is 0, that of the bias the count
    x = torch.randn(3, 5, 4, 3).to(device).requires_grad_()
    bias = torch.zeros(5).to(device).requires_grad_()
    batch_norm(x, None, None, None, bias, training=True).sum().backward()
    assert x.grad.abs().max().item() < 1e-5
    assert bias.grad.tolist() == [36.0] * 5


def test_deterministic(device: str) -> None:
    case = Case((2, 5, 4, 3), "channels_last", activation="relu")
    first, second = (evaluate(case, operands(case).like(None, device), reference=False) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_constant_channel(device: str, triton_runs: bool) -> None:
    # variance 0: exactly the bias comes out, nothing negative under the root
    x = torch.full((4, 2, 4, 3), 1e4).to(device)
    y = batch_norm(x, None, None, None, torch.tensor([1.0, -2.0]).to(device), training=True, eps=1e-12)
    if triton_runs:
        assert torch.equal(y.cpu(), torch.tensor([1.0, -2.0]).view(1, 2, 1, 1).expand(4, 2, 4, 3))
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("activation", [None, "relu"])
def test_nan_and_inf_pass(activation: str | None, device: str) -> None:
    x = torch.randn(6, 4)
    x[0, 0], x[1, 1], x[2, 2] = float("nan"), float("inf"), float("-inf")
    mean, var = torch.zeros(4), torch.ones(4)
    want = activations.apply(torch.nn.functional.batch_norm(x, mean, var, training=True), activation)
    ours_mean, ours_var = torch.zeros(4).to(device), torch.ones(4).to(device)
    y = batch_norm(x.to(device), ours_mean, ours_var, training=True, activation=activation)
    for ours, theirs in ((y, want), (ours_mean, mean), (ours_var, var)):
        torch.testing.assert_close(ours.cpu(), theirs, equal_nan=True)
    y = batch_norm(x.to(device), torch.zeros(4).to(device), torch.ones(4).to(device), activation=activation)
    want = activations.apply(torch.nn.functional.batch_norm(x, torch.zeros(4), torch.ones(4)), activation)
    torch.testing.assert_close(y.cpu(), want, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0)])
@pytest.mark.parametrize("training", [True, False])
def test_empty(shape: tuple[int, ...], training: bool, device: str) -> None:
    x = torch.empty(shape).to(device).requires_grad_()
    weight, bias = (torch.ones(3).to(device).requires_grad_() for _ in range(2))
    mean, var, counter = torch.zeros(3).to(device), torch.ones(3).to(device), torch.tensor(4).to(device)
    y = counted_batch_norm(x, BatchNorm(mean, var, weight, bias, training, None, 1e-5, counter), "relu", x.detach())
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert weight.grad.tolist() == bias.grad.tolist() == mean.tolist() == [0.0] * 3
    assert var.tolist() == [1.0] * 3
    assert counter.item() == 4 + training


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 3, 1, 1, 1)])
def test_one_value_per_channel(shape: tuple[int, ...], device: str) -> None:
    mean, var, counter = torch.zeros(3).to(device), torch.ones(3).to(device), torch.tensor(0).to(device)
    bn = BatchNorm(mean, var, None, None, True, 0.1, 1e-5, counter)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        counted_batch_norm(torch.ones(shape).to(device), bn, None, None)
    assert (mean.tolist(), var.tolist(), counter.item()) == ([0.0] * 3, [1.0] * 3, 0)
    assert batch_norm(torch.ones(shape).to(device), mean, var).shape == shape


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("momentum", [None, 0.3])
def test_running_statistics_over_batches(
    momentum: float | None, backend: str, device: str, triton_runs: bool, launches: list[str]
) -> None:
    theirs = torch.nn.BatchNorm2d(5, momentum=momentum)
    ours = tkernels.nn.BatchNorm2d(5, momentum=momentum).to(device)
    launches.clear()
    for step, batch in enumerate((2, 3, 1)):
        x = torch.randn(batch, 5, 4, 3) * (step + 1) + step
        with tkernels.backend(backend):
            ours(x.to(device))
        theirs(x)
    assert launches == (FORWARD * 3 if triton_runs and backend == "auto" else [])
    assert ours.num_batches_tracked.item() == 3
    if not triton_runs:
        assert torch.equal(ours.running_mean, theirs.running_mean)
        assert torch.equal(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.running_mean.cpu(), theirs.running_mean)
    torch.testing.assert_close(ours.running_var.cpu(), theirs.running_var)


def test_strided_parameters_and_statistics(device: str) -> None:
    def every_other(t: Tensor) -> Tensor:
        return torch.stack([t, torch.full_like(t, 9.0)], 1).to(device)[:, 0]

    x, weight, bias = torch.randn(7, 4), torch.rand(4) + 0.5, torch.randn(4)
    strided = [every_other(t) for t in (torch.zeros(4), torch.ones(4), weight, bias)]
    strided[2].requires_grad_()
    y = batch_norm(x.to(device), *strided, training=True)
    y.square().sum().backward()
    mean, var = torch.zeros(4), torch.ones(4)
    leaf = weight.clone().requires_grad_()
    want = torch.nn.functional.batch_norm(x, mean, var, leaf, bias, training=True)
    want.square().sum().backward()
    torch.testing.assert_close(y.detach().cpu(), want.detach())
    torch.testing.assert_close(strided[0].cpu(), mean)
    torch.testing.assert_close(strided[1].cpu(), var)
    torch.testing.assert_close(strided[2].grad.cpu(), leaf.grad)


def test_autocast_keeps_the_input_dtype(device: str) -> None:
    x, residual = torch.randn(4, 3, 5).to(device), torch.randn(4, 3, 5).to(device)
    mean, var = torch.zeros(3).to(device), torch.ones(3).to(device)
    with torch.autocast(device, torch.bfloat16):
        assert batch_norm(x, mean, var, training=True).dtype == F32
        assert batch_norm(x.bfloat16(), mean, var, training=True, residual=residual).dtype == BF16
    with pytest.raises(RuntimeError, match="same dtype"):
        batch_norm(x.bfloat16(), mean, var, training=True, residual=residual)


def test_no_grad_and_inference_mode(device: str) -> None:
    for mode in (torch.no_grad(), torch.inference_mode()):
        module = tkernels.nn.BatchNorm1d(3, activation="relu").to(device)
        with mode:
            y = module(torch.randn(4, 3).to(device))
        assert not y.requires_grad
        assert module.num_batches_tracked.item() == 1


@pytest.mark.gate("ttsem", "cuda")
def test_double_backward_is_refused(device: str) -> None:
    x = torch.randn(4, 3).to(device).requires_grad_()
    (gradient,) = torch.autograd.grad(batch_norm(x, None, None, training=True).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.gate("ttsem", "cuda")
def test_writing_running_statistics_is_noticed(device: str) -> None:
    x = torch.randn(4, 3).to(device).requires_grad_()
    mean, var = torch.zeros(3).to(device), torch.ones(3).to(device)
    y = batch_norm(x, mean, var)
    batch_norm(x, mean, var, training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.gate("ttsem", "cuda")
@pytest.mark.parametrize(
    "case, kept",
    [
        (Case((4, 3), activation="relu"), "x"),
        (Case((4, 3), activation="gelu"), "x"),
        (Case((4, 3), activation="relu", residual="contiguous"), "x y"),
        (Case((4, 3), activation="silu", residual="contiguous"), "x residual"),
        (Case((4, 3), training=False, activation="relu", frozen=("weight", "bias")), "y"),
        (Case((4, 3), training=False, frozen=("weight", "bias")), ""),
        (Case((4, 3), residual="contiguous", frozen=("weight", "bias", "input")), ""),
    ],
    ids=str,
)
def test_saves_the_least(case: Case, kept: str, device: str) -> None:
    o = operands(case).like(None, device)
    for name in ("input", "weight", "bias", "residual"):
        t = getattr(o, name)
        if t is not None and name not in case.frozen:
            t.requires_grad_()
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = batch_norm(
            o.input, o.running_mean, o.running_var, o.weight, o.bias, case.training, 0.1, 1e-5, case.activation,
            o.residual,
        )  # fmt: skip
    names = {o.input.data_ptr(): "x", y.data_ptr(): "y"}
    if o.residual is not None:
        names[o.residual.data_ptr()] = "residual"
    assert {names[t.data_ptr()] for t in saved if t.data_ptr() in names} == set(kept.split())


@pytest.mark.gate("torch")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
def test_gradcheck(activation: str | None, training: bool) -> None:
    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        mean, var = torch.full((3,), 0.2, dtype=F64), torch.full((3,), 1.5, dtype=F64)
        return batch_norm(x, mean, var, weight, bias, training, 0.1, 1e-5, activation, residual)

    inputs = [torch.randn(s, dtype=F64).requires_grad_() for s in ((3, 3, 2, 2), (3,), (3,), (3, 3, 2, 2))]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.gate("torch")
@pytest.mark.parametrize("ratio", [1.0, 1e2, 1e4])
def test_a_million_values_per_channel(ratio: float) -> None:
    x = (torch.randn(2, 2, 500_000, dtype=F64) + ratio).float()
    mean, var = torch.zeros(2), torch.ones(2)
    y = batch_norm(x, mean, var, training=True)
    want = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    # torch folds the mean into a shift, which rounds at the mean's size
    tolerance.assert_close(y, want, 1_000_000, scale=ratio, name="output")
    tolerance.assert_close(mean, 0.1 * x.double().mean((0, 2)), name="running_mean")
    tolerance.assert_close(var, 0.9 + 0.1 * x.double().var((0, 2)), name="running_var")
