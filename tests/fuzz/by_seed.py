"""The draw of a seed and an index: the same in every process."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from tests.fuzz import models
from tests.fuzz.calls import CALLS
from tests.fuzz.cases import Case
from tests.fuzz.draws import Draw

SHARES = {
    "linear": 18, "conv2d": 18, "batch_norm": 18, "cross_entropy": 16, "conv_stage": 16, "matmul": 8, "attention": 10,
    "module": 10, "fused": 2,
}  # fmt: skip
MAKERS = {**CALLS, "module": models.module, "fused": models.fused}
# the share of draws whose sizes pass the natural thresholds, of the CPU's that are not patched
BIG = 0.15


def case_of(seed: int, index: int, body: str, operators: Sequence[str] = ()) -> Case:
    """``operators``: from which to draw, all of SHARES where there are none."""
    rng = Random(f"{seed} {index} {body}")
    shares = {name: SHARES[name] for name in operators or SHARES}
    operator = rng.choices(list(shares), list(shares.values()))[0]
    patched = body == "cpu" and rng.random() < 0.6
    d = Draw(rng, body, patched, body == "cpu" and not patched and rng.random() < BIG)
    case = d.around(MAKERS[operator](d))
    if d.big:
        case = case.changed(times=min(case.times, 2), backward=case.backward if case.backward == "twice" else "once")
    if case.times > 1 and operator != "fused" and rng.random() < 0.5:
        other = Draw(rng, body, patched, False)
        case = case.changed(between=other.around(MAKERS[operator](other)).changed(times=1))
    return case
