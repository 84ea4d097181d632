"""Bad calls: ours raises the class torch raises on the very same call, before any launch, and says what was wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tkernels
from tests.conformance.bad_calls import FUNCTIONS, MODULES, OWN, Bad, Maker
from tests.conformance.compare import IN_TTSEM, same_bits

pytestmark = pytest.mark.gate("torch", "ttsem", "cuda")


def raised(call: Callable[[Any, Maker], Any], library: Any, maker: Maker) -> Exception | None:
    """What a call raises, or None."""
    try:
        with contextlib.nullcontext() if IN_TTSEM else torch.device(maker.device):  # modules too
            call(library, maker)
    except Exception as error:  # its class is what is tested
        return error
    return None


def check(bad: Bad, expected: type[Exception], library: Any, device: str, launches: list[str]) -> None:
    """Ours raises ``expected``, names what it must, has launched nothing and written to nothing."""
    if bad.cpu_only and device != "cpu":
        pytest.skip("a GPU is not waited for: test_a_target_out_of_range_is_nan_on_a_gpu")
    maker = Maker(device)
    error = raised(bad.call, library, maker)
    assert error is not None, f"{expected.__name__} expected, ours raises nothing"
    if type(error) is not expected:
        raise AssertionError(f"{expected.__name__} expected, ours raises {error!r}") from error
    missing = [word for word in bad.says if word not in str(error)]
    assert not missing, f"the message does not name {missing}: {error}"
    assert not launches, "a kernel was launched before the arguments were checked"
    for t, copy in maker.made:
        assert IN_TTSEM or t._version == 0, f"an argument of shape {list(t.shape)} was written to"
        assert same_bits(t, copy), f"an argument of shape {list(t.shape)} was changed"


def refusal(bad: Bad, library: Any, triton_runs: bool) -> type[Exception]:
    """The class that torch raises or, where the torch at hand takes the call and we say why kernels don't, ours.

    torch is asked on the CPU: on a GPU it would stop the process's every further call for a target out of range.
    """
    theirs = raised(bad.call, library, Maker("cpu"))
    if theirs is not None:
        return type(theirs)
    assert bad.stricter is not None, "torch accepts this call: it does not belong in the table"
    error, why = bad.stricter
    if not triton_runs:
        pytest.skip(f"torch {torch.__version__} takes it, and runs it here; kernels refuse it: {why}")
    return error


@pytest.mark.parametrize("bad", FUNCTIONS, ids=lambda bad: bad.name)
def test_function(bad: Bad, device: str, triton_runs: bool, launches: list[str]) -> None:
    check(bad, refusal(bad, F, triton_runs), tkernels.functional, device, launches)


@pytest.mark.parametrize("bad", MODULES, ids=lambda bad: bad.name)
def test_module(bad: Bad, device: str, triton_runs: bool, launches: list[str]) -> None:
    check(bad, refusal(bad, nn, triton_runs), tkernels.nn, device, launches)


@pytest.mark.parametrize("bad, expected", OWN, ids=lambda value: getattr(value, "name", ""))
def test_argument_of_our_own(bad: Bad, expected: type[Exception], device: str, launches: list[str]) -> None:
    check(bad, expected, tkernels.functional, device, launches)


@pytest.mark.gate("ttsem", "cuda")
@pytest.mark.parametrize("value", [5, -3, 2**40])
def test_a_target_out_of_range_is_nan_on_a_gpu(value: int, device: str, launches: list[str]) -> None:
    """Nothing is read or written out of bounds (ttsem would fault), and the loss shows it."""
    logits = torch.randn(3, 5).to(device).requires_grad_()
    target = torch.tensor([0, value, 1]).to(device)
    loss = tkernels.functional.cross_entropy(logits, target, reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False]
    assert launches


def test_the_table_is_large_enough() -> None:
    """At least 60 calls, each once."""
    names = [bad.name for bad in (*FUNCTIONS, *MODULES, *(bad for bad, _ in OWN))]
    assert len(set(names)) == len(names)
    assert len(names) >= 60
