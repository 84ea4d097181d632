"""hypothesis draws calls (shapes, strides, dtypes, arguments, gradients asked for and coming in); each is as torch's.

Hundreds an operator on the PyTorch body, tens under ttsem and on a GPU, where every new combination of dtype and flags
is compiled. The draws are the same in every run.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

import tkernels
from tests import tolerance
from tests.conformance import random_calls
from tests.conformance.calls import replica
from tests.conformance.compare import GATE, check_call, ours, same_bits

pytestmark = pytest.mark.gate("torch", "ttsem", "cuda")
ALL_DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
FEW = GATE in ("ttsem", "cuda")
if FEW:
    GRIDS = {
        "linear": random_calls.Grid((torch.float32, torch.bfloat16), (None, "relu", "gelu"), 3, 17, rich=False),
        "conv2d": random_calls.Grid((torch.float32, torch.bfloat16), (None, "relu"), 6, rich=False),
        "batch_norm": random_calls.Grid((torch.float32, torch.bfloat16), (None, "relu", "gelu"), 4, rich=False),
        "cross_entropy": random_calls.Grid((torch.float32, torch.bfloat16), classes=17, rich=False),
    }
else:
    GRIDS = {name: random_calls.Grid(ALL_DTYPES) for name in ("linear", "conv2d", "batch_norm", "cross_entropy")}


def repeatable(examples: int, compiled: int) -> settings:
    """So many examples, or ``compiled`` where each is compiled; the same in every run. A seed has no simpler form, so
    there is nothing to shrink."""
    return settings(
        max_examples=(compiled if FEW else examples) or 1,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )


def check_case(case: random_calls.Case, device: str, triton_runs: bool, launches: list[str]) -> None:
    launches.clear()
    note(str(case))
    mine = check_call(case.call, device, case.cotangent)
    tensors = case.call.tensors()
    if mine.error is not None or not triton_runs:
        return
    if all(t.numel() for t in tensors.values()) and case.call.named()["input"].dtype != torch.float64:
        assert launches, f"{case} ran without Triton"


@repeatable(300, 16)
@given(case=random_calls.cases("linear", GRIDS["linear"]))
def test_linear(case: random_calls.Case, device: str, triton_runs: bool, launches: list[str]) -> None:
    check_case(case, device, triton_runs, launches)


@repeatable(300, 16)
@given(case=random_calls.cases("conv2d", GRIDS["conv2d"]))
def test_conv2d(case: random_calls.Case, device: str, triton_runs: bool, launches: list[str]) -> None:
    check_case(case, device, triton_runs, launches)


@repeatable(300, 16)
@given(case=random_calls.cases("batch_norm", GRIDS["batch_norm"]))
def test_batch_norm(case: random_calls.Case, device: str, triton_runs: bool, launches: list[str]) -> None:
    check_case(case, device, triton_runs, launches)


@repeatable(300, 20)
@given(case=random_calls.cases("cross_entropy", GRIDS["cross_entropy"]))
def test_cross_entropy(case: random_calls.Case, device: str, triton_runs: bool, launches: list[str]) -> None:
    check_case(case, device, triton_runs, launches)


@repeatable(100, 6)
@given(
    case=random_calls.cases("linear", GRIDS["linear"]), p=st.sampled_from((0.0, 0.25, 0.5, 1.0)), training=st.booleans()
)
def test_linear_dropout(case: random_calls.Case, p: float, training: bool, device: str) -> None:
    """What is not dropped is the call without dropout, divided by 1 - p; gradients go through the same mask."""
    arguments = case.call.on(device).named()
    if arguments["input"].dim() == 0 or arguments["weight"].dim() == 1:
        return
    plain = ours("linear")(**arguments)
    torch.manual_seed(11)
    dropped = ours("linear")(**arguments, dropout_p=p, training=training)
    torch.manual_seed(11)
    assert same_bits(dropped, ours("linear")(**arguments, dropout_p=p, training=training)), "one seed, two masks"
    drops = training and p > 0
    mask = (dropped != 0) | (plain == 0) if drops else torch.ones_like(plain, dtype=torch.bool)
    if p == 1 and training:
        assert not dropped.any()
        mask = torch.zeros_like(mask)
    factor = mask.double() / (1 - p if drops and p < 1 else 1)
    terms = max(t.numel() for t in case.call.tensors().values())
    tolerance.assert_close(dropped, plain.double() * factor, terms, name="dropped output")
    leaves = [t for t in arguments.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    if not leaves or any(t.numel() == 0 for t in (plain, *leaves)):
        return
    incoming = case.cotangent(plain.detach())
    got = torch.autograd.grad(dropped, leaves, incoming, allow_unused=True)
    exact = {n: replica(t, "cpu", torch.float64) for n, t in case.call.tensors().items()}
    z = torch.nn.functional.linear(exact["input"], exact["weight"], exact.get("bias"))
    # where a derivative jumps, the rounded value says on which side it is: oneDNN's may have crossed 0
    rounded = ours("linear")(**{**arguments, "activation": None}).detach().cpu().double()
    y = tkernels.core.activation.apply(z + (rounded - z).detach(), arguments["activation"])
    expected = torch.autograd.grad(y, [t for t in exact.values() if t.requires_grad], incoming.cpu() * factor.cpu())
    scale = max(t.abs().max().item() for t in exact.values() if t.numel()) * incoming.abs().max().item() * 4
    for mine, reference in zip(got, expected):
        if mine is not None:
            tolerance.assert_close(mine, reference, terms, dtype=mine.dtype, scale=scale, name="gradient")


@pytest.mark.gate("torch")
@repeatable(60, 0)
@given(case=st.one_of(*(random_calls.cases(name, GRIDS[name]) for name in GRIDS)))
def test_two_runs_are_the_same_to_the_bit(case: random_calls.Case, device: str) -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(4)
        runs.append(check_call(case.call, device, case.cotangent))
    if runs[0].output is not None:
        assert same_bits(runs[0].output, runs[1].output)
    for name, gradient in runs[0].gradients.items():
        assert (gradient is None) == (runs[1].gradients[name] is None)
        if gradient is not None:
            assert same_bits(gradient, runs[1].gradients[name])
