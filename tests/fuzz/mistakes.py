"""Whether an error that only ours raises, or of another class than torch's, is torch's own for the same mistake."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from tests.fuzz.cases import Case
from tests.fuzz.modules import OPERATORS
from tests.fuzz.running import run

# pixels more each way, so that no window is too large
LARGER = 64


def torch_refuses_too(case: Case, error: Exception) -> bool:
    """torch looks at some arguments only when there is something to compute, and at a layer when those before it have
    run: whether it raises an error of this class where that is taken away."""
    for other in _without(case):
        found = run(other, OPERATORS[case.operator].theirs(other.options, None)).error
        if type(found) is type(error):
            return True
    return False


def _without(case: Case) -> Iterator[Case]:
    """The call with a batch where it is empty, with elements on all axes; attention without grouped heads; a stage with
    large images, with several, and without strides."""
    tensors = case.tensors
    if any(0 in t.shape for t in tensors.values()):
        for axes in (1, 9):
            shapes = {n: (*(size or 2 for size in t.shape[:axes]), *t.shape[axes:]) for n, t in tensors.items()}
            filled = {n: dataclasses.replace(t, shape=shapes[n]) for n, t in tensors.items()}
            yield case.changed(tensors=filled, backward="none")
    if case.options.get("enable_gqa"):
        yield case.changed(options={**case.options, "enable_gqa": False}, backward="none")
    if case.operator == "conv_stage":
        n, c, h, w = tensors["input"].shape
        large = dataclasses.replace(tensors["input"], shape=(n, c, h + LARGER, w + LARGER), special=())
        yield case.changed(tensors={**tensors, "input": large}, backward="none")
        several = {
            name: dataclasses.replace(t, shape=(n + 2, *t.shape[1:]), special=())
            for name, t in tensors.items() if name in ("input", "residual")
        }  # fmt: skip
        yield case.changed(tensors={**tensors, **several}, backward="none")
        layers = [{k: v for k, v in layer.items() if k != "stride"} for layer in case.options["layers"]]
        yield case.changed(options={**case.options, "layers": layers}, backward="none")
