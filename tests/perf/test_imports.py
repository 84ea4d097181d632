"""Which file of perf/ may import which: no circles, nothing of bench/ in static/, neither in what both use."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.sources import imports

pytestmark = pytest.mark.gate("torch")

ROOT = Path(__file__).parents[2]
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.read_text()
    for path in (ROOT / "perf").rglob("*.py")
}
Arrows = dict[str, set[str]]


def arrows(sources: Mapping[str, str]) -> Arrows:
    """What each module imports of the others, in functions too."""

    def of(text: str) -> Iterator[str]:
        for _, name in imports(ast.parse(text)):
            found = name if name in sources else name.rpartition(".")[0]
            # a package is executed before what is in it
            parts = found.split(".") if found in sources else []
            yield from (".".join(parts[:n]) for n in range(1, len(parts) + 1))

    return {name: set(of(text)) - {name} for name, text in sources.items()}


def circle(left: Arrows) -> list[str]:
    """The modules that are in a circle, or rest on one."""
    while leaves := {name for name, below in left.items() if not below & left.keys()}:
        left = {name: below for name, below in left.items() if name not in leaves}
    return sorted(left)


def wrong_way(found: Arrows) -> set[tuple[str, str]]:
    """Who imports what stands above it."""

    def room(name: str) -> str:
        return name.split(".")[1] if name.startswith(("perf.bench", "perf.static")) else "top"

    may = {"bench": ("top", "static", "bench"), "static": ("top", "static"), "top": ("top",)}
    return {(name, other) for name, others in found.items() for other in others if room(other) not in may[room(name)]}


def test_no_circles() -> None:
    assert circle(arrows(SOURCES)) == []


def test_what_both_use_and_what_counts_know_nothing_of_what_times() -> None:
    assert wrong_way(arrows(SOURCES)) == set()


def test_what_is_planted_is_found() -> None:
    package = {"perf": "", "perf.bench": "", "perf.static": "from perf.bench import a", "perf.bench.a": ""}
    assert wrong_way(arrows(package)) == {("perf.static", "perf.bench"), ("perf.static", "perf.bench.a")}
    assert circle(arrows(package)) == []
    late = {**package, "perf.bench.a": "def late():\n    import perf.static"}
    assert circle(arrows(late)) == ["perf.bench.a", "perf.static"]
    assert circle(arrows({**package, "perf.bench": "from perf.bench.a import x", "perf.bench.a": "import perf.bench"}))
