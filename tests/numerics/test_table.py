"""The numerics table keeps its bounds, on the PyTorch body and on the Triton path."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
import torch

import tkernels
from tests.numerics import __main__ as command
from tests.numerics import cases, table

pytestmark = pytest.mark.gate("torch", "ttsem", "cuda")
GATE = os.environ.get("TK_GATE", "torch")
# Under ttsem a dtype costs its compilation: in 16 bits these stand for the others, which make test-extended runs.
IN_16_BITS = ("well", "3x3", "mean/std 1e4", "mean/std 1e2, relu", "many classes", "probabilities")
CASES = [
    pytest.param(
        case,
        dtype,
        id=f"{case}-{str(dtype).removeprefix('torch.')}",
        marks=() if dtype.itemsize == 4 or case.conditioning in IN_16_BITS else pytest.mark.extended("ttsem"),
    )
    for case in (cases.cases(GATE) if GATE in table.BODIES else ())
    for dtype in case.dtypes
]


@pytest.mark.parametrize("case, dtype", CASES)
def test_no_worse_than_torch(case: cases.Case, dtype: torch.dtype, triton_runs: bool, launches: list[str]) -> None:
    rows = table.measure(case, dtype, GATE)
    assert rows
    if triton_runs:
        assert launches, "measured without Triton"
    over = [str(row) for row in rows if not row.holds]
    assert not over, "\n".join([table.HEADER, *over])


@pytest.mark.gate("torch")
def test_a_worse_operator_is_over_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three eps of error, in value or gradient, break the bound."""
    true = tkernels.functional.batch_norm
    case = cases.batch_norm("mean/std 1", (8, 4, 5, 5))

    def worse(*args: object, **kwargs: object) -> torch.Tensor:
        y = true(*args, **kwargs)
        y.register_hook(lambda g: g * (1 + 4e-7))
        return y * (1 + 4e-7)

    monkeypatch.setattr(tkernels.functional, "batch_norm", worse)
    broken = {row.result for row in table.measure(case, torch.float32, GATE) if not row.holds}
    assert {"forward", "d input", "d weight", "d bias"} <= broken


@pytest.mark.gate("torch")
def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The table is printed and written, and --gate turns a broken bound into the exit status."""
    monkeypatch.setattr(cases, "FULL", (cases.cross_entropy("well", (8, 5)),))
    out = tmp_path / "sub" / "numerics.csv"
    assert command.main(["--csv", str(out), "--gate"]) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["operator"], r["result"]) for r in rows[:2]] == [
        ("cross_entropy", "forward"),
        ("cross_entropy", "d input"),
    ]
    assert "The Triton path is not measured here" in capsys.readouterr().out
    monkeypatch.setattr(table, "NORM_BOUND", 0.5)
    assert command.main(["--gate"]) == 1
    assert command.main([]) == 0
