"""The adapters to other libraries hand over what those libraries take (stand-ins: the libraries need a GPU)."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from perf import operators, providers
from perf.bench.measure import Problem, Reference, Subject

pytestmark = pytest.mark.gate("torch")
NAMES = ["linear", "linear_relu", "conv2d", "batch_norm", "cross_entropy"]


class Linear:
    """attorch's: weights are [in, out]."""

    @staticmethod
    def apply(input: Any, weight: Any, bias: Any = None, act_func: str | None = None) -> Any:
        out = input @ weight + bias
        return getattr(F, act_func)(out) if act_func else out


class Conv2d:
    @staticmethod
    def apply(
        input: Any, weight: Any, bias: Any, stride_height: int, stride_width: int, padding_height: int,
        padding_width: int, groups: int = 1,
    ) -> Any:  # fmt: skip
        return F.conv2d(input, weight, bias, (stride_height, stride_width), (padding_height, padding_width), 1, groups)


class BatchNorm:
    @staticmethod
    def apply(input: Any, training: bool, weight: Any, bias: Any, running_mean: Any, running_var: Any) -> Any:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training)


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    made = ModuleType(name)
    vars(made).update(members)
    monkeypatch.setitem(sys.modules, name, made)


@pytest.mark.parametrize("name", NAMES)
def test_attorch_is_called_as_it_wants_to_be(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    module(monkeypatch, "attorch", CrossEntropyLoss=torch.nn.CrossEntropyLoss)
    module(monkeypatch, "attorch.linear_layer", LinearAutoGrad=Linear)
    module(monkeypatch, "attorch.conv_layer", Conv2dAutoGrad=Conv2d)
    module(monkeypatch, "attorch.batch_norm_layer", BatchNormAutoGrad=BatchNorm)
    agrees(name, providers.load("attorch"))


def test_liger_is_called_as_it_wants_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "liger_kernel")
    module(monkeypatch, "liger_kernel.transformers")
    module(monkeypatch, "liger_kernel.transformers.functional", liger_cross_entropy=F.cross_entropy)
    agrees("cross_entropy", providers.load("liger-kernel"))


def test_flag_gems_is_switched_on_round_pytorchs_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    class UseGems:
        def __enter__(self) -> None:
            entered.append(True)

        def __exit__(self, *_: Any) -> None:
            entered.append(False)

    module(monkeypatch, "flag_gems", use_gems=UseGems)
    provider = providers.load("flag-gems")
    agrees("conv2d", provider)
    assert entered == []
    # entering registers hundreds of operators: once for a check, never within what is timed
    checked = Reference(problem("conv2d")).check(dataclasses.replace(provider, gpu_only=False))
    assert checked.status == "ok"
    assert entered == [True, False]


def problem(name: str) -> Problem:
    operator = operators.get(name)
    return Problem(operator, operator.complete(dict.fromkeys(operator.required, 4)), torch.float32, "nhwc", "cpu")


def agrees(name: str, provider: providers.Provider) -> None:
    """The provider's function, called as a sweep calls it, gives what PyTorch's gives."""
    both = (providers.load(providers.BASELINE), provider)
    expected, found = (Subject(problem(name), each, exact=True) for each in both)
    torch.testing.assert_close(found.forward(), expected.forward())
