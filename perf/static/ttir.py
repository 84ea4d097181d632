"""How many operations a launch's products do, read off its TTIR: the loops' trip counts follow from scalar arithmetic
on the arguments and the program's coordinates, which is evaluated here for a sample of the programs.

Counted is what the machine does, padding of partial tiles included. A bound that is not such arithmetic counts as
one trip.
"""

from __future__ import annotations

import collections
import itertools
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

# of each grid axis
_SAMPLES = (12, 8, 4)
_SHARERS = 256
_LOC = re.compile(r"\s+loc\(.*$")
_RESULT = re.compile(r"%([\w#-]+)(?::\d+)? = (.*)$")
_VALUE = re.compile(r"%[\w#-]+|-?\b\d+\b")
_DOT = re.compile(r"tensor<([\dx]+)x(\w+)> \* tensor<([\dx]+)x\w+>")
_FOR = re.compile(r"scf\.for (?:unsigned )?%([\w-]+) = (%?[\w#-]+) to (%?[\w#-]+) step (%?[\w#-]+)")

_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "addi": operator.add, "subi": operator.sub, "muli": operator.mul, "remui": operator.mod,
    "divsi": lambda a, b: math.trunc(a / b) if abs(a) < 2**52 else a // b, "divui": operator.floordiv,
    "remsi": lambda a, b: int(math.fmod(a, b)), "ceildivsi": lambda a, b: -(-a // b),
    "minsi": min, "minui": min, "maxsi": max, "maxui": max,
    "andi": operator.and_, "ori": operator.or_, "xori": operator.xor,
    "shli": operator.lshift, "shrsi": operator.rshift, "shrui": operator.rshift,
}  # fmt: skip
_UNCHANGED = ("extsi", "extui", "trunci", "index_cast", "bitcast")

# kind of product ('16-bit', 'tf32', 'ieee') -> operations
Work = collections.Counter[str]


class Operation(NamedTuple):
    """An operation's line, and the operations of its regions."""

    text: str
    regions: list[list[Operation]]


def products(text: str, arguments: Mapping[str, object], grid: tuple[int, int, int]) -> dict[str, float]:
    """Operations of a launch's products by kind ('16-bit', 'tf32', 'ieee'), a multiply-add counted as two."""
    if "tt.dot" not in text:
        return {}
    lines = (_LOC.sub("", line).strip() for line in text.splitlines())
    next(line for line in lines if line.startswith("tt.func"))
    body, _ = _region(lines)
    given = {name: int(value) for name, value in arguments.items() if isinstance(value, (int, bool))}
    # programs that share tiles out among them have unequal numbers of them: a multiprocessor's each counts
    first = _SHARERS if "tt.get_num_programs" in text else _SAMPLES[0]
    sampled = [_spread(size, count) for size, count in zip(grid, (first, *_SAMPLES[1:]))]
    total: Work = collections.Counter()
    for program in itertools.product(*sampled):
        total += _Program(given, program, grid).work(body)
    share = math.prod(grid) / math.prod(len(axis) for axis in sampled)
    return {kind: operations * share for kind, operations in total.items()}


def tile(text: str) -> tuple[int, int]:
    """Rows and columns of the accumulator of the first product in a listing that has one."""
    first = next(_DOT.finditer(text))
    return int(first[1].split("x")[0]), int(first[3].split("x")[-1])


def _region(lines: Iterator[str]) -> tuple[list[Operation], str]:
    """The operations up to the line that closes their region, and that line."""
    found: list[Operation] = []
    for line in lines:
        if line.startswith("}"):
            return found, line
        regions, last = [], line
        while last.endswith("{"):  # "} else {" closes one and opens another
            region, last = _region(lines)
            regions.append(region)
        found.append(Operation(line, regions))
    raise ValueError("the listing ends within a region")


def _spread(size: int, count: int) -> list[int]:
    """Up to ``count`` indices below ``size``, evenly spread."""
    if size <= count:
        return list(range(size))
    return [round(i * (size - 1) / (count - 1)) for i in range(count)]


class _Program:
    """One program's walk through the operations, with the scalars that can be known."""

    def __init__(self, given: Mapping[str, int], program: tuple[int, ...], grid: tuple[int, ...]) -> None:
        self._values = dict(given)
        self._coordinates = {"tt.get_program_id": program, "tt.get_num_programs": grid}

    def work(self, region: list[Operation]) -> Work:
        """What a region's products do."""
        found: Work = collections.Counter()
        labels = {operation.text.split(":")[0].split("(")[0]: i for i, operation in enumerate(region)}
        at = 0
        while at < len(region) and not region[at].text.startswith("tt.return"):
            text, inner = region[at]
            at = labels[self._goal(text)] if text.startswith(("cf.br", "cf.cond_br")) else at + 1
            if inner:
                found += self._nested(text, inner)
            elif "tt.dot " in text:
                found += _dot(text)
            else:
                self._evaluate(text)
        return found

    def _nested(self, text: str, regions: list[list[Operation]]) -> Work:
        """What an operation with regions does: a loop, a branch; of reductions and scans nothing counts."""
        if loop := _FOR.search(text):
            return self._loop(loop, regions[0])
        if "scf.if " in text:
            holds = self._value(text.split("scf.if ")[1].split()[0])
            taken = regions[1:] if holds == 0 else regions[:1]
        else:
            taken = regions if "scf.while" in text else []
        return sum(map(self.work, taken), collections.Counter())

    def _loop(self, loop: re.Match[str], body: list[Operation]) -> Work:
        index, *bounds = loop.groups()
        low, high, step = map(self._value, bounds)
        trips = 1
        if low is not None and high is not None and step:
            trips = max(0, -(-(high - low) // step))
        if not trips:
            return collections.Counter()
        if low is not None:
            self._values[index] = low
        return collections.Counter({kind: trips * n for kind, n in self.work(body).items()})

    def _goal(self, text: str) -> str:
        """The label that a jump goes to."""
        goals = re.findall(r"\^\w+", text)
        taken = text.startswith("cf.br") or self._value(text.split()[1].rstrip(","))
        return goals[0] if taken else goals[1]

    def _evaluate(self, text: str) -> None:
        match = _RESULT.match(text)
        if match is None or "tensor<" in text:
            return
        value = self._scalar(*match[2].partition(" ")[::2])
        if value is None:
            self._values.pop(match[1], None)
        else:
            self._values[match[1]] = value

    def _scalar(self, name: str, rest: str) -> int | None:
        """What an operation on scalars gives, None where that is not known."""
        if name in self._coordinates:
            return self._coordinates[name]["xyz".index(rest[0])]
        if not name.startswith("arith."):
            return None
        name = name.removeprefix("arith.")
        if name == "constant":
            return {"true": 1, "false": 0}.get(rest.split()[0], self._value(rest.split()[0]))
        operands = [self._value(text) for text in _VALUE.findall(rest.split(" : ")[0])]
        if name == "select" and len(operands) == 3 and operands[0] is not None:
            return operands[1] if operands[0] else operands[2]
        known = [operand for operand in operands if operand is not None]
        if not known or len(known) < len(operands):
            return None
        if name in _UNCHANGED:
            return known[0]
        if name == "cmpi":  # slt, ult, eq, ...
            return int(getattr(operator, rest.split(",")[0].strip()[-2:])(*known))
        if name not in _ARITHMETIC or (name.startswith(("div", "rem")) and known[1] == 0):
            return None
        return _ARITHMETIC[name](*known)

    def _value(self, text: str) -> int | None:
        if text.startswith("%"):
            return self._values.get(text[1:])
        return int(text) if text.lstrip("-").isdigit() else None


def _dot(text: str) -> Work:
    match = _DOT.search(text)
    if match is None:
        return collections.Counter()
    left, right = ([int(n) for n in match[i].split("x")] for i in (1, 3))
    kind = "16-bit" if match[2] in ("bf16", "f16") else "tf32" if "tf32" in text else "ieee"
    return collections.Counter({kind: 2 * math.prod(left) * right[-1]})
