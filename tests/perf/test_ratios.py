"""A network against others on a CPU: who competes, ratios round by round, tables, and those who misbehave."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from perf import plan, schema, shapes
from perf.bench import measure, network, process, ratios
from perf.bench.measure import Sample
from perf.schema import Measurement
from tests.perf.command import refused, row, run, write

pytestmark = pytest.mark.gate("torch")


def _tasks(*names: str, **given: Any) -> list[plan.Task]:
    wanted: dict[str, Any] = {"modes": None, "dtypes": None, "layouts": None, "providers": None, "timings": ["wall"]}
    return plan.tasks(plan.Wanted(names, shapes=shapes.parse(["tiny"]), **{**wanted, **given}))


def test_without_a_mode_the_network_is_trained_and_used_against_everybody() -> None:
    tasks = _tasks("cnn", "linear", allocators=("default", "faultless"))
    calls = [task for task in tasks if task.operator == "linear"]
    assert [(task.mode, task.dtype, task.provider) for task in calls] == [
        (mode, "fp32", provider) for mode in ("fwd", "bwd") for provider in ("torch", "tkernels")
    ]
    assert {task.process for task in calls} == {()}
    comparisons = [task for task in tasks if task.operator == "cnn"]
    assert len(comparisons) == len({task.key() for task in comparisons}) == 2 * 2 * 2 * len(plan.CONTENDERS)
    found = list(dict.fromkeys(task.process for task in comparisons))
    assert len(found) == 8
    for lot in found:
        contenders = [(task.provider, task.layout) for task in comparisons if task.process == lot]
        assert contenders == list(plan.CONTENDERS)


def test_single_calls_of_the_network_and_gpus_are_as_before() -> None:
    assert {task.mode for task in _tasks("cnn", modes=["full"])} == {"full"}
    assert {task.allocator for task in _tasks("cnn", modes=["full"])} == {""}
    assert {(task.mode, task.dtype, task.provider) for task in _tasks("cnn", device="cuda")} == {
        (mode, "bf16", provider) for mode in ("fwd", "bwd") for provider in ("torch", "tkernels")
    }


def test_a_network_s_mode_of_anything_else_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "sweep", "--op", "linear", "--mode", "train", "--device", "cpu")
    assert "mode 'train' is of operator 'cnn' on a CPU" in said
    assert "unknown allocator 'mine'" in refused(capsys, "sweep", "--op", "cnn", "--allocator", "mine")


def test_a_comparison_that_is_not_complete_is_measured_again_whole(tmp_path: Path) -> None:
    tasks = _tasks("cnn", modes=["train"])
    first = [task for task in tasks if task.dtype == "fp32"]
    path = write(tmp_path / "a.csv", *(row(**task.columns(), device="cpu") for task in first[:-1]))
    assert plan.missing(tasks, path, "cpu") == tasks
    path = write(tmp_path / "b.csv", *(row(**task.columns(), device="cpu") for task in first))
    assert plan.missing(tasks, path, "cpu") == [task for task in tasks if task not in first]


def test_ratios_are_taken_round_by_round() -> None:
    """What slows all down in one round leaves no trace in them."""
    ours = iter([1.0, 2.0, 10.0, 4.0, 5.0] * 9)
    theirs = iter([2.0, 4.0, 30.0, 8.0, 15.0] * 9)
    turn = {"tkernels": lambda: Sample(next(ours), True, 3), "torch": lambda: Sample(next(theirs), True, 5)}
    baselines = dict.fromkeys(turn, "torch")
    found = measure.turns(turn, measure.Effort(1.0, 15), cost=1.0, ours="tkernels", baselines=baselines)
    assert found["torch"].rounds == found["tkernels"].rounds == 15
    assert found["torch"].ratio == found["tkernels"].speedup == (2.0, 2.0, 3.0, 0.0)
    assert found["tkernels"].ratio == found["torch"].speedup == (1.0, 1.0, 1.0, 0.0)
    assert (found["torch"].page_faults, found["tkernels"].page_faults) == (5, 3)
    assert found["torch"].columns()["ratio_p75"] == 3.0
    alone = measure.turns({"torch": lambda: Sample(1.0, True)}, measure.Effort(1.0, 15), 1.0, "tkernels", baselines)
    assert alone["torch"].ratio is None


def test_rounds_in_which_either_was_disturbed_do_not_count() -> None:
    ours = [Sample(1.0, True)] * 6 + [Sample(5.0, False)] * 3
    theirs = [Sample(9.0, False)] + [Sample(2.0, True)] * 8
    assert measure.timing(theirs, ours, None).ratio == (2.0, 2.0, 2.0, 0.0)


def _row(provider: str, layout: str, ratio: float | None, **given: Any) -> Measurement:
    named = {"operator": "cnn", "mode": "train", "dtype": "bf16", "allocator": "default", "N": 256, "device": "cpu: X"}
    spread = {} if ratio is None else {"ratio_p25": ratio - 0.1, "ratio_p50": ratio, "ratio_p75": ratio + 0.1}
    return row(**{**named, "provider": provider, "layout": layout, **spread, **given})


def test_the_table_says_what_the_best_other_one_is(tmp_path: Path) -> None:
    rows = [
        _row("tkernels", "nhwc", 1.0, saved_mb=60.0),
        _row("torch", "nhwc", 1.4, saved_mb=100.0),
        _row("torch.compile", "nhwc", 1.7),
        _row("torch.compile", "nchw", 1.3),
        _row("torch-fp32", "nchw", 3.9),
        _row("tkernels", "nhwc", None, mode="infer", status="crashed: signal 6"),
        _row("torch", "nhwc", None, mode="infer"),
    ]
    frame = schema.read(write(tmp_path / "a.csv", _row("torch", "nhwc", 1.1), *rows))
    listed, aims, memory = ratios.network_tables(frame)
    assert "| training step, bf16 | default   | torch nhwc         | 1.0            | 1.40 (1.30 to 1.50)" in listed
    lines = aims.splitlines()
    assert lines[0] == "The fused CNN at batch 256 on cpu: X"
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:4]] for line in lines[4:]}
    # the last row of a repeated measurement counts
    assert cells["training step, bf16"] == ["1.30 (1.20 to 1.40) ! torch.compile nchw", "1.35"]
    assert cells["training step, bf16, against the usual code: eager, NCHW, fp32"] == ["3.90 (3.80 to 4.00)", "3.80"]
    assert cells["inference, bf16"] == ["crashed: signal 6", "1.30"]
    assert cells["training step, fp32"] == ["not measured", "1.40"]
    assert "| saved for backward, bf16 | 60 MB    | 100 MB     | 0.60  | 0.75         |" in memory


def test_the_operators_table_has_geometric_means(tmp_path: Path) -> None:
    def call(operator: str, speedup: float, **given: Any) -> Measurement:
        return row(operator=operator, speedup_vs_torch=speedup, speedup_p25=speedup, **given)

    rows = [call("conv2d_relu", 0.9, N=3, noise="noisy: x"), call("conv2d_relu", 1.6), call("cross_entropy", 1.0),
            call("linear", 1.0, provider="torch"), row(operator="linear")]  # fmt: skip
    table = ratios.operators_table(schema.read(write(tmp_path / "a.csv", *rows)))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert cells[2][:4] == ["conv2d_relu fwd", "2", "1.20", "0.90"]
    assert cells[2][5:] == ["1", "1"]
    assert cells[-1][:4] == ["all", "3", "1.13", "0.90"]
    assert ratios.operators_table(pd.DataFrame(columns=list(schema.NAMES))) == ""


def test_memory_of_a_step() -> None:
    x = torch.randn(1000, 1000)
    w = torch.randn(1000, requires_grad=True)

    def step() -> None:
        y = (x * w).exp()  # keeps x, w and its result
        y.sum().backward()

    assert network.saved_bytes(step, [w, x]) == 4_000_000
    assert network.saved_bytes(step, [w]) == 8_000_000
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system does not tell the largest resident memory")
    peak = network.peak_bytes(lambda: torch.ones(25_000_000).sum())
    assert peak is not None
    assert 90e6 < peak < 130e6


def test_a_process_is_started_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "mine")
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    with process.changed_environment(network.environment("faultless")):
        assert os.environ["MALLOC_MMAP_MAX_"] == "0"
        assert "GLIBC_TUNABLES" not in os.environ
    assert os.environ["GLIBC_TUNABLES"] == "mine"
    assert "MALLOC_MMAP_MAX_" not in os.environ


CONTENDER = """
import os
from models.cifar_cnn import CNNClassifier
from torch import nn

class Dies(CNNClassifier):
    def forward(self, images):
        os.abort()

def cnn(arguments):
    return Dies(**arguments), nn.CrossEntropyLoss()
"""
WRONG = CONTENDER.replace("os.abort()", "return super().forward(images * 1.1)")


def test_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command to the table, with a rival that dies and one that is wrong."""
    for name, text in (("dying", CONTENDER), ("wrong", WRONG)):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "a.csv"
    names = ["torch", "tkernels", "module:dying", "module:wrong"]
    options = ["--mode", "infer", "--dtype", "fp32", "--shapes", "tiny", "--quick", "--allocator", "default"]
    start = time.monotonic()
    assert run("sweep", "--op", "cnn", "--device", "cpu", "--provider", *names, *options, "--csv", path) == 0
    frame = schema.read(path).set_index("provider")
    assert frame.status["torch"] == frame.status["tkernels"] == "ok", frame.status
    assert frame.status["module:dying"] == "crashed: signal 6"
    assert frame.status["module:wrong"].startswith("wrong: output off by ")
    timed = frame.loc[["torch", "tkernels"]]
    assert (timed.rounds >= measure.QUICK.repetitions).all()
    assert (timed.ratio_p25 <= timed.ratio_p50).all()
    assert (timed.ratio_p50 <= timed.ratio_p75).all()
    assert timed.ratio_p50["tkernels"] == 1
    # the median of ratios is near the ratio of medians
    assert timed.ratio_p50["torch"] == pytest.approx(timed.ms_p50["torch"] / timed.ms_p50["tkernels"], rel=0.5)
    assert (timed.err_fp64 < 1e-5).all(), "float32 is computed as such"
    assert "| inference, fp32 " in capsys.readouterr().out
    assert time.monotonic() - start < 120


@pytest.mark.extended("torch")
@pytest.mark.parametrize("allocator", ("default", "faultless", "shared"))
def test_training_comparisons(allocator: str, tmp_path: Path) -> None:
    """All contenders, torch.compile too."""
    path = tmp_path / "a.csv"
    options = ["--mode", "train", "--dtype", "bf16", "--shapes", "tiny", "--quick", "--allocator", allocator]
    assert run("sweep", "--op", "cnn", "--device", "cpu", *options, "--csv", path) == 0
    frame = schema.read(path)
    assert list(zip(frame.provider, frame.layout)) == list(plan.CONTENDERS)
    assert set(frame.status) == {"ok"}
    assert frame.ratio_p50.notna().all()
    compiled = frame.provider == "torch.compile"
    assert frame.saved_mb[~compiled].notna().all() == (allocator == "default")
    assert frame.err_fp64[~compiled].notna().all()
