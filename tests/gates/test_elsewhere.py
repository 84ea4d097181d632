"""A file that another gate runs says so, and how; the whole suite, of which every gate leaves most out, does not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.gates import elsewhere

pytestmark = pytest.mark.gate("torch")
HERE, GATES = Path(__file__), ("torch", "torch", "ttsem", "aot", "interp", "cuda")
NAME = "tests/gates/test_elsewhere.py"


def item(*gates: str, extended: tuple[str, ...] = (), path: Path = HERE) -> Any:
    marks = {"gate": [SimpleNamespace(args=gates)], "extended": [SimpleNamespace(args=extended)]}
    return SimpleNamespace(path=path, iter_markers=lambda name: iter(marks[name]))


def said(items: list[Any], kept: tuple[Any, ...] = (), given: str = str(HERE), words: str = "") -> list[str]:
    return elsewhere.lines(items, kept, [given], words, GATES)


def test_a_line_for_each_gate() -> None:
    assert said([item("ttsem", "cuda"), item("ttsem"), item("aot")]) == [
        f"{NAME}: 2 tests belong to gate ttsem: TK_GATE=ttsem python -m pytest {NAME}",
        f"{NAME}: 1 test belongs to gate aot: TK_GATE=aot python -m pytest {NAME}",
    ]


def test_extended_tests_and_words() -> None:
    """Of the gate that runs too: it left them out as extended."""
    (line,) = said([item("torch", "ttsem", extended=("torch",))], words="a or b")
    assert line.endswith(f"1 extended test belongs to gate torch: TK_GATE=torch TK_EXTENDED=1 python -m pytest {NAME}"
                         " -k 'a or b'")  # fmt: skip
    assert "extended" not in said([item("interp", extended=("ttsem",))])[0]


def test_where_nothing_is_said() -> None:
    other = item("ttsem")
    assert not said([other], kept=(item("torch"),)), "a file of which something runs"
    assert said([other], kept=(item("torch", path=HERE.with_name("test_launches.py")),))
    assert said([other], given=f"{HERE}::test_other")
    for whole in (HERE.parents[1], HERE.parents[2]):
        assert not said([other], given=str(whole)), "the whole suite"


def test_the_summary_says_it() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/linear/test_kernels.py"]
    done = subprocess.run(command, env={**os.environ, "TK_GATE": "torch"}, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    line = r"^(tests/linear/test_kernels.py): \d+ tests belong to gate ttsem: TK_GATE=ttsem python -m pytest \1$"
    assert re.search(line, done.stdout, re.MULTILINE), done.stdout
