"""python -m perf model: who is called, what is written, what fails and what is refused."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import tkernels
from perf import models, schema
from perf.bench.measure import Effort
from perf.bench.model import command, comparison
from perf.bench.model.comparison import ModelMeasurement, Task
from tests.perf.command import module, refused, run
from tkernels.fusion import FusionReport

pytestmark = pytest.mark.gate("torch")

TINY = """
import os

from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))

def fails():
    raise RuntimeError("no such weights")

class Dies(nn.Flatten):
    def forward(self, x):
        os.abort()

def dies():
    return Dies()
"""
QUICK = ("--batch", "4", "--size", "8", "--rounds", "2", "--no-compile")


def _tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))


def _task(**given: Any) -> Task:
    return Task("own:tiny", 4, 8, "fp32", "train", True, "cpu", None)._replace(**given)


def _measured(task: Task, rounds: int) -> dict[str, dict[str, Any]]:
    """The rows of a comparison without torch.compile, by provider."""
    rows = comparison.measured(task, _tiny, Effort(5.0, rounds), compiled=False).rows
    return {row.provider: vars(row) for row in rows}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return module(tmp_path, monkeypatch, "own_models", TINY)


@pytest.fixture
def fused_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[nn.Module], Any]], None]:
    """Puts another function in the place of fuse()."""

    def replace(fuse: Callable[[nn.Module], Any]) -> None:
        monkeypatch.setattr(tkernels, "fuse", fuse)
        monkeypatch.setattr(tkernels, "explain", lambda model: FusionReport([("", "0 -> 1 -> 2")], []))

    return replace


def test_every_comparison_has_its_rows(own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.csv"
    assert run("model", f"{own}:build", *QUICK, "--csv", path, "--report") == 0
    frame = command.read(path)
    assert list(frame.columns) == list(ModelMeasurement.names())
    assert (frame.status == schema.OK).all(), frame.status
    found = list(zip(frame["mode"], frame.dtype, frame.provider))
    assert found == [
        (mode, dtype, provider)
        for dtype in ("fp32", "bf16")
        for mode in ("train", "infer")
        for provider in ("torch", "tkernels", "torch again")
    ]
    for column in ("ms_p50", "speedup_p25", "speedup_vs_torch", "speedup_p75", "ratio_p50", "first_call_s"):
        assert (frame[column] > 0).all(), column
    assert (frame.rounds == 2).all()
    assert (frame[frame.provider == "torch"].speedup_vs_torch == 1).all()
    for column, value in (("N", 4), ("H", 8), ("layout", "nhwc"), ("timing", "wall")):
        assert (frame[column] == value).all(), column
    assert frame[frame["mode"] == "infer"].err_fp64.between(1e-9, 0.1).all()
    printed = capsys.readouterr().out
    for text in ("own_models:build 4x3x8x8 bf16 nhwc, inference", "eager again", "geometric mean", "fused:"):
        assert text in printed, text
    # a sweep's readers take it too
    assert len(schema.read(path)) == len(frame)


def test_the_fused_model_is_what_runs_as_fused(fused_by: Any) -> None:
    calls: list[nn.Module] = []

    def fuse(given: nn.Module) -> nn.Module:
        def spied(x: torch.Tensor) -> torch.Tensor:
            calls.append(given)
            return type(given).forward(given, x)

        given.forward = spied
        return given

    fused_by(fuse)
    rows = _measured(_task(), 3)
    assert len({id(given) for given in calls}) == 1
    # the first call, calls that warm up, a turn or more a round, memory's, the profile's, two other batch sizes
    assert len(calls) >= 1 + comparison.WARM_CALLS + 3 + comparison.PROFILED_CALLS + 2
    assert rows["tkernels"]["fused"] == 1
    assert rows["torch"]["fused"] is None


def test_torchs_time_is_above_the_ratio(fused_by: Any) -> None:
    """What takes longer than eager has ratios below 1."""

    def slower(given: nn.Module) -> None:
        given.register_forward_pre_hook(lambda *_: time.sleep(0.1))

    fused_by(slower)
    rows = _measured(_task(), 5)
    for column in ("speedup_p25", "speedup_vs_torch"):
        assert rows["tkernels"][column] < 0.6, column
    for column in ("ratio_p25", "ratio_p50"):
        assert rows["torch"][column] < 0.6, column
    assert rows["tkernels"]["ms_p50"] > 100


def test_graphs_and_guards_are_dynamos(fused_by: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A static graph, then one for all batch sizes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    fused_by(comparison._compile)
    rows = _measured(_task(), 1)
    fused, eager = rows["tkernels"], rows["torch"]
    assert (fused["graphs"], fused["graphs_second"], fused["graphs_third"]) == (1, 1, 0)
    assert 1 < fused["guard_us"] < 10_000
    assert eager["graphs"] == 0
    assert comparison.guard_us(lambda: _tiny()) == 0


def test_a_wrong_output_is_no_ok_row(fused_by: Any) -> None:
    def wrong(given: nn.Module) -> None:
        forward = given.forward
        given.forward = lambda x: forward(x) * 1.01

    fused_by(wrong)
    rows = _measured(_task(mode="infer"), 1)
    assert rows["tkernels"]["status"].startswith("wrong: output off by 1.0e-02")
    assert rows["torch"]["status"] == schema.OK


def test_what_fails_is_a_row(own: str, tmp_path: Path, fused_by: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.csv"
    assert run("model", f"{own}:fails", *QUICK, "--dtype", "fp32", "--mode", "train", "--csv", path) == 0
    failed = command.read(path)
    assert list(failed.status) == ["error: RuntimeError: no such weights"] * 3
    assert "3 of 3 rows are not ok" in capsys.readouterr().out

    def fuse(given: nn.Module) -> None:
        raise ValueError("cannot fuse")

    fused_by(fuse)
    rows = _measured(_task(), 2)
    assert rows["tkernels"]["status"] == "error: ValueError: cannot fuse"
    assert rows["torch again"]["speedup_vs_torch"] > 0
    assert rows["torch"].get("ratio_p50") is None


def test_a_crash_is_a_row_and_the_others_go_on(own: str, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    quick = (*QUICK, "--dtype", "fp32", "--mode", "infer")
    assert run("model", f"{own}:dies", f"{own}:build", *quick, "--csv", path) == 0
    assert list(command.read(path).status) == [
        "crashed: signal 6",
        "not measured: torch crashed: signal 6",
        "not measured: torch crashed: signal 6",
        *["ok"] * 3,
    ]
    assert run("model", f"{own}:build", *quick, "--csv", path) == 0
    assert len(command.read(path)) == 9, "rows are added"


def test_rows_are_added_to_a_file_of_this_command_only(own: str, tmp_path: Path, capsys: Any) -> None:
    other = tmp_path / "other.csv"
    quick = (*QUICK, "--dtype", "fp32", "--mode", "infer")
    other.write_text("a,b\n1,2\n")
    assert "is not a CSV of perf model" in refused(capsys, "model", f"{own}:build", *quick, "--csv", other)
    assert other.read_text() == "a,b\n1,2\n"


def test_a_training_step_leaves_no_gradients_and_may_have_an_optimizer() -> None:
    plain = comparison.Contender(_task(), _tiny)
    before = [p.clone() for p in plain.model.parameters()]
    plain.step()
    assert all(torch.equal(p, old) for p, old in zip(plain.model.parameters(), before))
    assert all(p.grad is None for p in plain.model.parameters())
    stepped = comparison.Contender(_task(optimizer="sgd"), _tiny)
    stepped.step()
    assert not any(torch.equal(p, old) for p, old in zip(list(stepped.model.parameters())[-2:], before[-2:]))


def test_every_output_with_classes_counts_in_the_loss() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 7, 1)

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {"out": self.a(x), "aux": self.b(x).mean((2, 3)), "none": None}

    contender = comparison.Contender(_task(), TwoHeads)
    graded: list[bool] = []
    for head in (contender.model.a, contender.model.b):  # type: ignore[union-attr]
        head.weight.register_hook(lambda grad: graded.append(bool(grad.abs().sum() > 0)))  # type: ignore[union-attr]
    contender.step()
    assert graded == [True, True]


def test_means_are_geometric_and_of_the_last_row_of_each(tmp_path: Path) -> None:
    def row(name: str, provider: str, ratio: float, dtype: str = "fp32") -> dict[str, Any]:
        head = _task(name=name, dtype=dtype).columns()
        given = {"device": "cpu", "provider": provider, "speedup_vs_torch": ratio, "status": "ok"}
        return vars(ModelMeasurement(**head, **given))

    rows = [
        row("a", "tkernels", 9.0),
        row("a", "tkernels", 2.0),
        row("b", "tkernels", 0.5),
        row("a", "torch again", 1.02),
        row("b", "torch again", 0.95),
        row("a", "torch.compile", 4.0),
    ]
    text = command.summary(pd.DataFrame(rows))
    cells = [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]]
    assert cells == ["training step, fp32", "2", "1.000", "1.10", "0.500", "b 4x3x8x8 fp32", "1", "4.000", "0.984",
                     "0.050", "0"]  # fmt: skip
    assert command.summary(pd.DataFrame(rows[:2])) == ""


def test_a_list_stands_for_its_models() -> None:
    pytest.importorskip("timm", reason="install the ecosystem extra")
    found = list(models.resolve(["torchvision:resnet50", "all", "torchvision:resnet18"]))
    assert found[0] == "torchvision:resnet50"
    assert sorted(found) == sorted(models.LISTED)


@pytest.mark.parametrize(
    ("arguments", "said"),
    (
        (["resnet50"], "unknown model 'resnet50', allowed: torchvision:NAME, timm:NAME, module:function, all"),
        (["torchvision:resnet5"], "torchvision has no model 'resnet5', allowed are such as"),
        (["timm:nothing_like_it"], "timm has no model 'nothing_like_it'"),
        (["no_such_module:build"], "'no_such_module' cannot be imported"),
        (["math:build"], "module 'math' has no function 'build'"),
        (["torchvision:resnet18", "--dtype", "fp8"], "unknown dtype 'fp8', allowed: fp32, bf16"),
        (["torchvision:resnet18", "--mode", "fwd"], "unknown mode 'fwd', allowed: train, infer"),
        (["torchvision:resnet18", "--optimizer", "lion"], "unknown optimizer 'lion', allowed: adam, adamw, sgd"),
        (["torchvision:resnet18", "--batch", "0"], "--batch and --size must be at least 1"),
        (["torchvision:resnet18", "--rounds", "0"], "--rounds must be above 0"),
    ),
)
def test_what_cannot_be_measured_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    if arguments[0].startswith("t"):
        pytest.importorskip(arguments[0].partition(":")[0])
    assert said in refused(capsys, "model", *arguments)
