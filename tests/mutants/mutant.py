"""A mutant: one fault, put into one place of a source file, and the tests that must see it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Mutant(NamedTuple):
    """``before`` stands once in ``file`` and becomes ``after``; ``tests`` (paths, pytest's options) see it in ``gate``.

    ``reason``: why it may live: what it changes cannot be seen by a test without a GPU, or changes no behaviour.
    """

    name: str
    file: str
    before: str
    after: str
    gate: str
    tests: tuple[str, ...]
    reason: str = ""

    def complaint(self) -> str | None:
        """Why this is no mutant of the source as it is; None if it is one."""
        source = (ROOT / self.file).read_text()
        if source.count(self.before) != 1:
            return f"{self.name}: {self.before!r} is {source.count(self.before)} times in {self.file}, not once"
        if self.before == self.after:
            return f"{self.name}: changes nothing"
        missing = [test for test in self.tests if test.startswith("tests") and not (ROOT / test).exists()]
        return f"{self.name}: there is no {missing[0]}" if missing else None

    def put_into(self, root: Path) -> None:
        path = root / self.file
        path.write_text(path.read_text().replace(self.before, self.after))
