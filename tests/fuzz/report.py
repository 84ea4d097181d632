"""A failure as a test that can be pasted into a file, and the line that says what ran."""

from __future__ import annotations

import collections
import textwrap
from collections.abc import Sequence

from tests.fuzz.cases import Case

GATES = {"cpu": "torch", "kernels": "ttsem"}
HEAD = """\
import pytest
from tests.fuzz.check import Case, MaxPool, T, check, inf, nan


"""


def test_of(case: Case, name: str, command: str, found: Sequence[tuple[str, str]]) -> str:
    """The text of a test that fails as the case did; it goes below HEAD, which is in it."""
    said = "\n".join(f"{kind}: {text}" for kind, text in found)
    comment = textwrap.indent("\n".join(line[:160] for line in said.splitlines()[:12]), "    # ")
    tensors = "".join(f'            "{key}": {t!r},\n' for key, t in case.tensors.items())
    rest = repr(case.changed(tensors={}))
    start = f"Case({case.operator!r}, {case.body!r}, {{}}"
    assert rest.startswith(start)
    after = rest[len(start) : -1].lstrip(", ")
    options = f"        {after},\n" if after else ""
    return (
        f"{HEAD}# {command}\n"
        f'@pytest.mark.gate("{GATES[case.body]}")\n'
        f"def test_{name}() -> None:\n{comment}\n"
        f"    case = Case(\n        {case.operator!r}, {case.body!r}, {{\n{tensors}        }},\n{options}    )\n"
        "    check(case)\n"
    )


def summary(counts: collections.Counter[str], ran: collections.Counter[str], seconds: float, body: str) -> str:
    """One line of what ran."""
    draws = ", ".join(f"{key[5:]} {n}" for key, n in sorted(counts.items()) if key.startswith("draw "))
    kinds = collections.Counter[str]()
    for name, n in ran.items():
        kinds[name.partition(" ")[0]] += n
    fast = ", ".join(f"{n} {plural}" for kind, plural in (("kernel", "launches"), ("pass", "passes"),
                     ("product", "products of oneDNN"), ("chain", "fused chains")) if (n := kinds[kind]))  # fmt: skip
    return (
        f"{body}: {counts['calls']} calls in {seconds:.0f} s ({draws}); {counts['both raised']} both raised, "
        f"{counts['with gradients']} with gradients, {counts['double backward']} twice differentiated, "
        f"{counts['meant']} meant, {counts['by chance']} by chance; {fast or 'NO FAST PATH'}; "
        f"{counts['failures']} failures"
    )
