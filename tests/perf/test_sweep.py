"""Sweeps: rows that arrive one by one, kills, resumptions, and providers that misbehave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from perf import operators, providers, schema
from perf.bench import measure
from perf.bench.measure import Problem, Reference, Sample
from perf.providers import Provider
from tests.perf.command import ROOT, environment, refused, run

pytestmark = pytest.mark.gate("torch")

SWEEP = ["--op", "linear", "cross_entropy", "batch_norm", "--shapes", "tiny", "--device", "cpu", "--quick"]
# device, operator, ... as text: what a sweep promises to have a row of
Keys = list[tuple[str, ...]]


def _keys(path: Path) -> Keys:
    frame = schema.read(path)
    assert set(frame.status) == {"ok"}
    return sorted(schema.key(row, schema.KEY) for row in schema.records(frame))


def _children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def _wait(seconds: float, happened: object) -> None:
    end = time.monotonic() + seconds
    while not happened():  # type: ignore[operator]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_a_killed_sweep_resumed_has_the_rows_of_an_unbroken_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, whole = tmp_path / "broken.csv", tmp_path / "whole.csv"
    command = [sys.executable, "-m", "perf", "sweep", *SWEEP, "--csv", str(broken)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    _wait(240, lambda: broken.exists() and broken.read_bytes().count(b"\n") >= 4)
    children = _children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # what it started must not go on by itself
    _wait(60, lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    before = broken.read_bytes()
    rows = before.count(b"\n") - 1
    assert 3 <= rows < 12, f"killed too late: {rows} rows of 12"
    # and if the kill had hit a write
    broken.write_bytes(before + b"2026-01-01,deadbeef,a ro")

    assert "exists: --resume goes on with it" in refused(capsys, "sweep", *SWEEP, "--csv", broken)
    assert run("sweep", *SWEEP, "--csv", broken, "--resume") == 0
    assert broken.read_bytes().startswith(before), "rows that were there are kept as they were"
    assert run("sweep", *SWEEP, "--csv", whole) == 0
    assert _keys(broken) == _keys(whole)
    assert len(_keys(whole)) == 12
    resumed = schema.read(broken)
    assert resumed.speedup_vs_torch.notna().all()
    # nothing is left to do
    before = broken.read_bytes()
    assert run("sweep", *SWEEP, "--csv", broken, "--resume") == 0
    assert broken.read_bytes() == before


BAD = """
import os, time
import torch
from torch.nn import functional as F

def linear(input, weight, bias):
    os.abort()

def cross_entropy(input, target):
    return F.cross_entropy(input, target) * 1.01

def batch_norm(*arguments):
    raise MemoryError("no more")

def conv2d(*arguments):
    time.sleep(1000)

def batch_norm_relu(*arguments):
    raise ValueError("no such thing\\nat all")
"""


@pytest.mark.extended("torch")
def test_providers_that_misbehave_get_rows_that_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "misbehaving.py").write_text(BAD)
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "a.csv"
    names = ["linear", "linear_relu", "cross_entropy", "batch_norm", "batch_norm_relu", "conv2d"]
    options = ["--mode", "fwd", "--shapes", "tiny", "--device", "cpu", "--quick", "--limit", "10", "--csv", path]
    assert run("sweep", "--op", *names, "--provider", "torch", "module:misbehaving", *options) == 0
    frame = schema.read(path)
    assert len(frame) == 12
    status = frame[frame.provider != "torch"].set_index("operator").status
    assert status.linear == "crashed: signal 6"
    assert status.linear_relu == "unsupported: module:misbehaving has no linear_relu"
    assert status.cross_entropy.startswith("wrong: output off by 1.0e-02 in relative norm, PyTorch by ")
    assert status.batch_norm == "out of memory: no more"
    assert status.batch_norm_relu == "error: ValueError: no such thing at all"
    assert status.conv2d == "timeout: no answer in 10 s"
    # who shares a problem with them is measured all the same
    others = frame[frame.provider == "torch"]
    assert set(others.status) == {"ok"}
    assert (others.ms_p50 > 0).all()
    assert frame[frame.provider != "torch"].ms_p50.isna().all()


@pytest.mark.extended("torch")
def test_cuda_graphs_have_rows_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    options = ["--mode", "full", "--dtype", "fp32", "bf16", "--shapes", "tiny", "--device", "cpu", "--quick"]
    assert run("sweep", "--op", "linear", "cnn", *options, "--cudagraph", "--csv", path) == 0
    frame = schema.read(path)
    wall, graph = (frame[frame.timing == timing] for timing in ("wall", "cudagraph"))
    assert len(wall) == len(graph) == 8
    assert set(wall.status) == {"ok"}
    assert set(graph.status) == {"unsupported: a CPU has no CUDA graphs"}
    assert (wall.ms_p20 <= wall.ms_p50).all()
    assert (wall.ms_p50 <= wall.ms_p80).all()
    assert (wall[wall.provider == "torch"].speedup_vs_torch == 1).all()
    assert (wall.bytes > 0).all()
    assert (wall.roofline_pct > 0).all()
    assert wall.torch.eq(torch.__version__).all()
    assert wall.peak_memory_mb.isna().all()
    assert wall.err_fp64.le(4 * wall.torch_err_fp64 + 0.2).all()
    pd.testing.assert_series_equal(
        wall.tflops, wall.flops / wall.ms_p50 / 1e9, check_names=False, check_exact=False, rtol=1e-6
    )


def _problem(name: str, dtype: torch.dtype = torch.float32) -> Problem:
    operator = operators.get(name)
    from perf.shapes import NAMED

    return Problem(operator, operator.complete(operator.of_named(NAMED["tiny"])[0]), dtype, "nhwc", "cpu")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", operators.OPERATORS)
def test_tkernels_passes_its_check(name: str, dtype: torch.dtype) -> None:
    assert Reference(_problem(name, dtype)).check(providers.load("tkernels")).status == "ok"


def test_wrong_gradients_are_seen() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w, b):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x, w)
            return torch.nn.functional.linear(x, w, b)

        @staticmethod
        def backward(ctx, dy):  # type: ignore[no-untyped-def]
            x, w = ctx.saved_tensors
            return dy @ w, dy.t() @ x * 1.001, dy.sum(0)

    reference = Reference(_problem("linear"))
    assert reference.check(Provider("p", {"linear": Wrong.apply})).status.startswith("wrong: gradients off by 1.0e-03")
    shape = reference.check(Provider("p", {"linear": lambda x, w, b: x @ w.t() + b + x.sum() * float("nan")})).status
    assert shape.startswith("wrong: output off by inf")
    gpu_only = Provider("p", {"linear": torch.nn.functional.linear}, gpu_only=True)
    assert reference.check(gpu_only).status == "unsupported: p runs on GPUs only"


@pytest.mark.parametrize(
    "error, status",
    (
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB"), "out of memory: CUDA out"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "out of memory: Triton"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory: Default"),
        (RuntimeError("out of resource: shared memory, Required: 300000"), "error: RuntimeError: out of resource"),
        (ValueError(), "error: ValueError: ValueError"),
    ),
)
def test_what_a_provider_raises_becomes_a_status(error: Exception, status: str) -> None:
    assert measure.failure(error).startswith(status)


def test_providers_take_turns() -> None:
    order: list[str] = []

    def call(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    calls = {"a": lambda: call("a", 0.003), "b": lambda: call("b", 0.001)}
    timings = measure.interleaved(calls, measure.Effort(0.01, 6))
    assert timings["a"].ms.p50 > 2.5 > timings["b"].ms.p50 > 0.9
    # after one call and one clocked call of each
    timed = order[4:]
    assert timed.count("a") == timed.count("b") >= measure.LEAST_ROUNDS
    assert timed[:4] == ["a", "b", "b", "a"]


def test_slow_calls_are_repeated_less() -> None:
    calls: list[float] = []
    timings = measure.interleaved({"slow": lambda: calls.append(time.sleep(0.02))}, measure.Effort(0.001, 1000))  # type: ignore[func-returns-value]
    assert len(calls) == 2 + measure.LEAST_ROUNDS
    assert timings["slow"].ms.p20 > 19


def test_disturbed_repetitions_are_left_out_where_enough_remain() -> None:
    clean, disturbed = [Sample(1.0, True)] * 5, [Sample(9.0, False)] * 5
    assert measure._undisturbed(clean + disturbed) == clean
    assert measure._undisturbed(clean[:4] + disturbed) == clean[:4] + disturbed


class _Kinks(operators.Linear):
    """Products of which the first, of 1024, is one rounding above 0."""

    def tensors(self, shape: operators.Shape, source: operators.Sources) -> operators.Tensors:
        x = source.normal(1024, 1)
        x[0] = 1 + torch.finfo(torch.float32).eps
        return {"input": x, "weight": torch.ones(1, 1), "bias": -torch.ones(1)}


def test_a_gradient_may_take_either_side_of_a_kink_within_roundings_and_no_other() -> None:
    """One element of a million on the other side of a ReLU is 1e-3 of a gradient's norm, and rightly so."""
    reference = Reference(Problem(_Kinks("linear_relu"), {"N": 1024, "C": 1, "K": 1}, torch.float32, "nhwc", "cpu"))
    linear = torch.nn.functional.linear

    def other_side(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return (linear(x, w, b) - 2 * torch.finfo(torch.float32).eps).relu()

    def another(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = linear(x, w, b)
        return torch.where(z > 0.5, z.detach(), z.relu())

    for function, status in ((other_side, "ok"), (another, "wrong: gradients off by")):
        check = reference.check(Provider("p", {"linear_relu": function}))
        assert check.status.startswith(status)
        assert check.errors["bwd"] > 0.01
