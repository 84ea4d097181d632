"""PyTorch's own sample inputs and error inputs for our functions go through ours."""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import pytest
import torch

from tests.conformance.calls import Call, run
from tests.conformance.compare import check_call, check_errors, ours, torchs

GATES = ("torch", "ttsem", "cuda")
pytestmark = pytest.mark.gate(*GATES)
OPERATORS = ("linear", "conv2d", "batch_norm", "cross_entropy", "matmul", "scaled_dot_product_attention")


@functools.cache
def info(operator: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    name = operator if operator == "matmul" else f"nn.functional.{operator}"
    return next(op for op in op_db if op.name == name)


@functools.cache
def sample_calls(operator: str, kind: str, dtype: torch.dtype) -> list[Call]:
    """The calls of op_db's ``kind`` inputs ('sample' or 'reference') for one operator, but for those that draw dropout:
    tests/attention/test_values.py has them."""
    torch.manual_seed(0)
    samples = getattr(info(operator), f"{kind}_inputs")("cpu", dtype, requires_grad=True)
    return [Call(operator, (s.input, *s.args), dict(s.kwargs)) for s in samples if not s.kwargs.get("dropout_p")]


@functools.cache
def error_calls(operator: str) -> list[Call]:
    if info(operator).error_inputs_func is None:
        return []
    samples = [e.sample_input for e in info(operator).error_inputs("cpu")]
    return [Call(operator, (s.input, *s.args), dict(s.kwargs)) for s in samples]


# op_db takes seconds to import: the other gates, which only deselect, leave it alone
HERE = OPERATORS if os.environ.get("TK_GATE", "torch") in GATES else ()
SAMPLES = [(name, i) for name in HERE for i in range(len(sample_calls(name, "sample", torch.float32)))]
ERRORS = [(name, i) for name in HERE for i in range(len(error_calls(name)))]


def expects_launch(call: Call) -> bool:
    """Whether there is anything to compute, and nothing that attention leaves to PyTorch."""
    mask = call.tensors().get("attn_mask")
    return all(t.numel() for t in call.tensors().values()) and not (mask is not None and mask.requires_grad)


@pytest.mark.parametrize("operator, index", SAMPLES)
def test_sample(operator: str, index: int, device: str, triton_runs: bool, launches: list[str]) -> None:
    """Values and every gradient of one sample, float32."""
    call = sample_calls(operator, "sample", torch.float32)[index]
    mine = check_call(call, device)
    if triton_runs and mine.error is None and expects_launch(call):
        assert launches, f"{call} ran without Triton"


@pytest.mark.gate("torch")
@pytest.mark.parametrize("operator", OPERATORS)
def test_samples_float64(operator: str) -> None:
    """All samples in float64, the dtype that PyTorch runs on any device."""
    for call in sample_calls(operator, "sample", torch.float64):
        check_call(call, "cpu")


@pytest.mark.gate("torch")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operator", OPERATORS)
def test_samples_half(operator: str, dtype: torch.dtype) -> None:
    for call in sample_calls(operator, "sample", dtype):
        check_call(call, "cpu")


def test_there_are_samples() -> None:
    """torch 2.14 has 20, 30, 12 and 21; a list gone empty must not pass by doing nothing."""
    counts = {name: sum(operator == name for operator, _ in SAMPLES) for name in OPERATORS}
    least = {"linear": 10, "conv2d": 20, "batch_norm": 10, "cross_entropy": 15}
    assert all(counts[name] >= n for name, n in least.items()), counts


@pytest.mark.parametrize("operator", OPERATORS)
def test_reference_inputs_are_the_samples(operator: str) -> None:
    """op_db has no further reference inputs for these functions; should a new torch add some, they must be run too."""
    assert info(operator).reference_inputs_func is None


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("operator, index", ERRORS)
def test_error_input(operator: str, index: int, dtype: torch.dtype | None, device: str, launches: list[str]) -> None:
    """torch's exception class, before any launch; as op_db gives it (float64) and in float32, which Triton takes."""
    call = error_calls(operator)[index]
    if dtype is not None and any(t.is_complex() for t in call.tensors().values()):
        pytest.skip("the error is in the complex dtype itself, which the other parameter runs")
    theirs = run(torchs(operator), call.on("cpu", dtype), None)
    mine = run(ours(operator), call.on(device, dtype), None)
    assert theirs.error is not None
    check_errors(mine, theirs, str(call))
    assert not launches


def test_a_small_error_is_found(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The comparison itself: a relative error of 1e-4 in the value, or in one gradient, fails every operator."""
    import tkernels

    for operator in OPERATORS:
        call = sample_calls(operator, "sample", torch.float32)[0]
        true = ours(operator)
        for spoil in (_spoil_value, _spoil_gradient):
            monkeypatch.setattr(tkernels.functional, operator, lambda *a, _s=spoil, _f=true, **k: _s(_f(*a, **k)))
            with pytest.raises(AssertionError, match=r"over the allowed"):
                check_call(call, device)
        monkeypatch.setattr(tkernels.functional, operator, true)


def _spoil_value(y: Any) -> Any:
    return y * (1 + 1e-4)


def _spoil_gradient(y: Any) -> Any:
    y.register_hook(lambda g: g * (1 + 1e-4))
    return y
