"""How many operations a launch's products do, read off its TTIR: the loops' trip counts follow from scalar arithmetic
on the arguments and the program's coordinates, which is evaluated here for a sample of the programs.

Counted is what the machine does, padding of partial tiles included. A bound that is not such arithmetic counts as
one trip.
"""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Callable, Mapping

# of each grid axis
_SAMPLES = (12, 8, 4)
_LOC = re.compile(r"\s+loc\(.*$")
_RESULT = re.compile(r"%([\w#-]+)(?::\d+)? = (.*)$")
_VALUE = re.compile(r"%[\w#-]+|-?\b\d+\b")
_DOT = re.compile(r"tensor<([\dx]+)x(\w+)> \* tensor<([\dx]+)x\w+>")
_FOR = re.compile(r"scf\.for (?:unsigned )?%([\w-]+) = (%?[\w#-]+) to (%?[\w#-]+) step (%?[\w#-]+)")
_AXES = {"x": 0, "y": 1, "z": 2}

_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "addi": lambda a, b: a + b,
    "subi": lambda a, b: a - b,
    "muli": lambda a, b: a * b,
    "divsi": lambda a, b: math.trunc(a / b) if abs(a) < 2**52 else a // b,
    "divui": lambda a, b: a // b,
    "remsi": lambda a, b: int(math.fmod(a, b)),
    "remui": lambda a, b: a % b,
    "ceildivsi": lambda a, b: -(-a // b),
    "minsi": min,
    "minui": min,
    "maxsi": max,
    "maxui": max,
    "andi": lambda a, b: a & b,
    "ori": lambda a, b: a | b,
    "xori": lambda a, b: a ^ b,
    "shli": lambda a, b: a << b,
    "shrsi": lambda a, b: a >> b,
    "shrui": lambda a, b: a >> b,
}
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "slt": lambda a, b: a < b,
    "ult": lambda a, b: a < b,
    "sle": lambda a, b: a <= b,
    "ule": lambda a, b: a <= b,
    "sgt": lambda a, b: a > b,
    "ugt": lambda a, b: a > b,
    "sge": lambda a, b: a >= b,
    "uge": lambda a, b: a >= b,
}
_UNCHANGED = ("extsi", "extui", "trunci", "index_cast", "bitcast")

# kind of product ('16-bit', 'tf32', 'ieee') -> operations
Work = collections.Counter[str]


def products(text: str, arguments: Mapping[str, object], grid: tuple[int, int, int]) -> dict[str, float]:
    """Operations of a launch's products by kind ('16-bit', 'tf32', 'ieee'), a multiply-add counted as two."""
    if "tt.dot" not in text:
        return {}
    lines = [_LOC.sub("", line).strip() for line in text.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("tt.func"))
    given = {name: int(value) for name, value in arguments.items() if isinstance(value, (int, bool))}
    sampled = [_spread(size, count) for size, count in zip(grid, _SAMPLES)]
    total: Work = collections.Counter()
    for program in itertools.product(*sampled):
        total += _Program(lines, given, program, grid).work(start + 1)
    share = math.prod(grid) / math.prod(len(axis) for axis in sampled)
    return {kind: operations * share for kind, operations in total.items()}


def _spread(size: int, count: int) -> list[int]:
    """Up to ``count`` indices below ``size``, evenly spread."""
    if size <= count:
        return list(range(size))
    return [round(i * (size - 1) / (count - 1)) for i in range(count)]


class _Program:
    """One program's walk through the listing, with the scalars that can be known."""

    def __init__(
        self, lines: list[str], given: dict[str, int], program: tuple[int, ...], grid: tuple[int, ...]
    ) -> None:
        self._lines, self._program, self._grid = lines, program, grid
        self._values = dict(given)
        self._labels = {line.split(":")[0].split("(")[0]: i for i, line in enumerate(lines) if line.startswith("^")}

    def work(self, first: int) -> Work:
        """What a region does, from its first line to its closing brace."""
        found: Work = collections.Counter()
        i = first
        while True:
            line = self._lines[i]
            if line.startswith(("}", "tt.return")):
                return found
            if line.startswith(("cf.br", "cf.cond_br")):
                i = self._labels[self._goal(line)]
            elif _FOR.search(line):
                found += self._loop(line, i)
                i = self._end(i)
            elif "scf.if " in line:
                found += self._branch(line, i)
                i = self._end(i)
            elif "scf.while" in line:
                middle = self._close(i)
                found += self.work(i + 1) + self.work(middle + 1)
                i = self._end(i)
            elif line.endswith("{"):
                i = self._end(i)
            elif "tt.dot " in line:
                found += _dot(line)
            else:
                self._evaluate(line)
            i += 1

    def _loop(self, line: str, at: int) -> Work:
        match = _FOR.search(line)
        assert match is not None
        low, high, step = (self._value(match[i]) for i in (2, 3, 4))
        trips = 1
        if low is not None and high is not None and step:
            trips = max(0, -(-(high - low) // step))
        if not trips:
            return collections.Counter()
        if low is not None:
            self._values[match[1]] = low
        return collections.Counter({kind: trips * n for kind, n in self.work(at + 1).items()})

    def _branch(self, line: str, at: int) -> Work:
        condition = self._value(line.split("scf.if ")[1].split()[0])
        middle = self._close(at)
        otherwise = self._lines[middle].startswith("} else")
        if condition is None or condition:
            return self.work(at + 1)
        return self.work(middle + 1) if otherwise else collections.Counter()

    def _goal(self, line: str) -> str:
        goals = re.findall(r"\^\w+", line)
        if line.startswith("cf.br"):
            return goals[0]
        condition = self._value(line.split()[1].rstrip(","))
        return goals[0] if condition else goals[1]

    def _close(self, at: int) -> int:
        """The line that closes the region opened at the end of a line."""
        depth = 1
        for i in range(at + 1, len(self._lines)):
            line = self._lines[i]
            if line.startswith("}"):
                depth -= 1
                if not depth:
                    return i
            if line.endswith("{"):
                depth += 1
        raise ValueError("the listing ends within a region")

    def _end(self, at: int) -> int:
        """The last line of an operation with regions."""
        end = self._close(at)
        while self._lines[end].endswith("{"):
            end = self._close(end)
        return end

    def _value(self, text: str) -> int | None:
        if text.startswith("%"):
            return self._values.get(text[1:])
        return int(text) if text.lstrip("-").isdigit() else None

    def _evaluate(self, line: str) -> None:
        match = _RESULT.match(line)
        if match is None or "tensor<" in line:
            return
        value = self._scalar(match[2])
        if value is None:
            self._values.pop(match[1], None)
        else:
            self._values[match[1]] = value

    def _scalar(self, text: str) -> int | None:
        operation, _, rest = text.partition(" ")
        if operation == "tt.get_program_id":
            return self._program[_AXES[rest[0]]]
        if operation == "tt.get_num_programs":
            return self._grid[_AXES[rest[0]]]
        if not operation.startswith("arith."):
            return None
        name = operation.removeprefix("arith.")
        if name == "constant":
            return {"true": 1, "false": 0}.get(rest.split()[0], self._value(rest.split()[0]))
        operands = [self._value(text) for text in _VALUE.findall(rest.split(" : ")[0])]
        if name == "select" and len(operands) == 3 and operands[0] is not None:
            return operands[1] if operands[0] else operands[2]
        if not operands or None in operands:
            return None
        known = [operand for operand in operands if operand is not None]
        if name in _UNCHANGED:
            return known[0]
        if name == "cmpi":
            return int(_COMPARISONS[rest.split(",")[0].strip()](*known))
        if name not in _OPERATIONS or (name.startswith(("div", "rem")) and known[1] == 0):
            return None
        return _OPERATIONS[name](*known)


def _dot(line: str) -> Work:
    match = _DOT.search(line)
    if match is None:
        return collections.Counter()
    left, right = ([int(n) for n in match[i].split("x")] for i in (1, 3))
    kind = "16-bit" if match[2] in ("bf16", "f16") else "tf32" if "tf32" in line else "ieee"
    return collections.Counter({kind: 2 * math.prod(left) * right[-1]})
