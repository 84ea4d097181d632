"""The list of mutants keeps up with the source; what becomes of them ``make mutants`` says, which takes long."""

from __future__ import annotations

import shutil

import pytest

from tests.mutants import MUTANTS, __main__
from tests.mutants.mutant import ROOT, Mutant

pytestmark = pytest.mark.gate("torch")


def test_each_is_one_place_of_the_source() -> None:
    assert [complaint for mutant in MUTANTS if (complaint := mutant.complaint()) is not None] == []


def test_names_differ() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"before": "no such line"}, "0 times"),
        ({"before": "\n"}, "times"),
        ({"after": MUTANTS[0].before}, "changes nothing"),
        ({"tests": ("tests/none",)}, "no tests/none"),
    ],
)
def test_one_that_is_left_behind_is_told(change: dict[str, str], said: str) -> None:
    left: Mutant = MUTANTS[0]._replace(**change)
    assert said in (left.complaint() or "")


@pytest.mark.skipif(not (shutil.which("git") and (ROOT / ".git").exists()), reason="copies are of what git keeps")
def test_a_fault_that_changes_nothing_lives() -> None:
    """A copy has every file that tests read: else each mutant would die of those that are missing."""
    tests = "tests/core/test_mode.py", "-k", "versions"
    harmless = Mutant("a comment", "constraints.txt", "# What everything", "# All that", "torch", tests)
    assert __main__._verdict(harmless, timeout=300.0)[0] == "LIVES"
