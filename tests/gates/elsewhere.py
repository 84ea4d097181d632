"""What a gate leaves to others, said of the files on the command line that it leaves out whole, and how to run them."""

from __future__ import annotations

import collections
import shlex
from collections.abc import Iterable
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def lines(
    items: Iterable[pytest.Item], kept: Iterable[pytest.Item], given: Iterable[str], words: str, gates: Iterable[str]
) -> list[str]:
    """A line for each file and each gate that its tests belong to.

    ``items``: what was left out; ``given``: the command line's paths; ``words``: its -k; ``gates``: all there are, the
    one that runs first. Who runs the whole suite wants one gate of it and is told nothing.
    """
    paths = [Path(path.partition("::")[0]).resolve() for path in given]
    if any(TESTS.is_relative_to(path) for path in paths):
        return []
    ran = {item.path for item in kept}
    counts = collections.Counter((item.path, *_belongs(item, gates)) for item in items if item.path not in ran)
    found = []
    for (path, gate, extended), n in counts.items():
        where = path.relative_to(TESTS.parent)
        tests = f"{n} {'extended ' * extended}{'test belongs' if n == 1 else 'tests belong'} to gate {gate}"
        command = f"TK_GATE={gate} {'TK_EXTENDED=1 ' * extended}python -m pytest {where}"
        found.append(f"{where}: {tests}: {command}" + (f" -k {shlex.quote(words)}" if words else ""))
    return found


def _belongs(item: pytest.Item, gates: Iterable[str]) -> tuple[str, bool]:
    """The first gate that runs a test, and whether it is an extended one there."""
    own = next(item.iter_markers("gate")).args
    gate = next(name for name in gates if name in own)
    return gate, any(gate in mark.args for mark in item.iter_markers("extended"))
