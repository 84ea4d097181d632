"""The simplest case that still fails as one did, by leaving out one thing after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from tests.fuzz.cases import Case
from tests.fuzz.recipes import T

SIMPLE = Case("", "", {})
STATE = ("between", "times", "default", "hooks", "mutate", "threads", "deterministic", "fresh", "wanted", "gradient",
         "backward", "mode", "patched", "seed")  # fmt: skip

# options without which a case is none
STRUCTURE = ("layers", "module", "arguments", "blocks", "seed", "training")


def simplified(case: Case, fails: Callable[[Case], bool], tries: int = 60) -> Case:
    """``fails``: whether a case fails in the same way."""
    progress = True
    while progress and tries > 0:
        progress = False
        for simpler in _simpler(case):
            tries -= 1
            if tries <= 0:
                break
            if fails(simpler):
                case, progress = simpler, True
                break
    return case


def _simpler(case: Case) -> Iterator[Case]:
    for name in STATE:
        value = getattr(SIMPLE, name)
        if getattr(case, name) != value:
            yield case.changed(**{name: value})
    if case.backward != "none":
        yield case.changed(backward="none")
    for name in list(case.options):
        if name not in STRUCTURE:
            yield case.changed(options={key: value for key, value in case.options.items() if key != name})
    for name, t in case.tensors.items():
        if name not in ("input", "weight", "w0", "query", "key", "value", "a", "b", "target"):
            yield case.changed(tensors={key: value for key, value in case.tensors.items() if key != name})
        for changed in _plainer(t):
            yield case.changed(tensors={**case.tensors, name: changed})


def _plainer(t: T) -> Iterator[T]:
    for field in ("kind", "special", "grad", "layout"):
        value = getattr(T(()), field)
        if getattr(t, field) != value:
            yield dataclasses.replace(t, **{field: value})
    if t.values.startswith("normal ") or t.values == "zeros":
        yield dataclasses.replace(t, values="normal")
