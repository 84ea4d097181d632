"""Every public name shows an example in its docstring, and each example runs as it is printed."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tkernels
from tests.public import public_names

pytestmark = pytest.mark.gate("torch")


def failures(name: str, value: Any) -> list[str]:
    """What is wrong with the examples of a function or a class and its methods."""
    report: list[str] = []
    tests = doctest.DocTestFinder().find(value, name, globs={"torch": torch, "tkernels": tkernels})
    if not any(test.name == name and test.examples for test in tests):
        report.append(f"{name} has no example in its docstring")
    for test in tests:
        doctest.DocTestRunner().run(test, out=report.append)
    return report


@pytest.mark.parametrize("name, value", [pytest.param(*pair, id=pair[0]) for pair in public_names()])
def test_examples(name: str, value: Any) -> None:
    assert failures(name, value) == []


def undocumented() -> None: ...


def without_example() -> None:
    """Text."""


def with_a_wrong_one() -> None:
    """Text.

    Examples:
        >>> torch.zeros(2).shape
        torch.Size([3])
    """


@pytest.mark.parametrize("function", [undocumented, without_example, with_a_wrong_one])
def test_what_is_missing_or_wrong_is_found(function: Callable[[], None]) -> None:
    assert failures("it", function)
