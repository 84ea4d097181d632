"""What the command lines share: errors of one line, and numbers within bounds."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line: no usage before them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def shown(text: str) -> str:
    """Text as standard output can show it, whatever bytes are in a file's name."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def one_line(error: BaseException) -> str:
    """What an exception says, or its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


class IntArgument:
    """Type of an option: a whole number within bounds."""

    def __init__(self, low: int, high: int | None = None) -> None:
        self.low, self.high = low, math.inf if high is None else high
        self.bounds = f"at least {low}" if high is None else f"from {low} to {high}"

    def __call__(self, text: str) -> int:
        try:
            value = int(text)
            if self.low <= value <= self.high:
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be a whole number, {self.bounds}, got {text!r}")


class FloatArgument:
    """Type of an option: a finite number that ``accepts`` is true of, which ``bounds`` says in words."""

    def __init__(self, accepts: Callable[[float], bool], bounds: str) -> None:
        self.accepts, self.bounds = accepts, bounds

    def __call__(self, text: str) -> float:
        try:
            value = float(text)
            if math.isfinite(value) and self.accepts(value):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be a finite number, {self.bounds}, got {text!r}")
