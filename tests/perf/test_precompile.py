"""The kernels that perf gpu compiles beforehand are those that the run asks for, and are found in Triton's cache."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import triton

import tkernels
from perf import providers, shapes
from perf.bench import measure
from perf.bench.gpu import ab, precompile, problems, tools
from perf.bench.gpu.checks import Checked
from perf.bench.gpu.problems import EXPANDED, Case
from perf.bench.gpu.results import Results
from perf.bench.gpu.session import Block, Request, Run
from perf.bench.gpu.supervisor import Supervisor
from perf.static import aot
from tests.perf import command
from tkernels.core import targets

pytestmark = pytest.mark.gate("torch")

TARGET = targets.TARGETS["sm_90"]
SMALL = {
    "linear_relu": shapes.linear(64, 256, 32),
    "conv2d_relu": shapes.conv(2, 16, 8, 24),
    "conv_stage": {**shapes.image(4, 3, 16), "K": 32},
    "batch_norm_relu": shapes.image(8, 32, 9),
    "cross_entropy": shapes.rows(64, 1000),
    "attention": shapes.heads(1, 2, 64, 80, 32),
    "matmul": shapes.linear(64, 128, 96),
}


def asked_for(call: Callable[[], object]) -> set[str]:
    """What Triton would specialise for, called with real tensors at real addresses."""
    seen = set()

    def launch(kernel: Any, args: Any, kwargs: Any, grid: Any) -> None:
        seen.add(aot.specialisation(aot.Launch(kernel, args, kwargs, grid, {}), TARGET.name))

    tensor = cast(Any, torch.Tensor)
    tensor.is_cuda = property(lambda self: True)
    try:
        with tkernels.backend("triton"), aot.intercepting(TARGET, launch):
            call()
    finally:
        del tensor.is_cuda
    return seen


@pytest.mark.parametrize("variant", ["", "misaligned", "strided", EXPANDED])
@pytest.mark.parametrize("operator", list(SMALL))
def test_what_is_recorded_is_what_a_call_asks_for(operator: str, variant: str) -> None:
    if not problems._takes(operator, variant):
        pytest.skip("says nothing of this operator")
    case = problems.case(operator, SMALL[operator], variant=variant)
    ours = providers.load(providers.OURS)

    def call(mode: Any = None) -> object:
        return measure.evaluate(Checked(case, "cpu", ours))

    found = set(precompile.recorded(call, TARGET))
    assert found == asked_for(call)
    assert len(found) > 1


@pytest.mark.parametrize("operator", ("linear", "matmul", "conv2d"))
def test_products_by_descriptors_are_recorded(operator: str) -> None:
    shape = shapes.conv(2, 16, 8, 24) if operator == "conv2d" else shapes.linear(64, 128, 96)
    case, ours = problems.case(operator, shape), providers.load(providers.OURS)
    found = precompile.recorded(precompile._by_descriptors(ours, case), TARGET)
    with ab.by_descriptors():
        assert set(found) == asked_for(lambda: measure.evaluate(Checked(case, "cpu", ours)))
    assert any("_tma_kernel" in key for key in found)


def test_alignment_is_recorded() -> None:
    """Else the misaligned cases would be compiled while they are measured."""

    def kinds(case: Case) -> set[str]:
        ours = providers.load(providers.OURS)
        return set(precompile.recorded(lambda mode: measure.evaluate(Checked(case, "cpu", ours)), TARGET))

    plain, moved = (problems.case("matmul", SMALL["matmul"], variant=variant) for variant in ("", "misaligned"))
    assert kinds(plain) != kinds(moved)


def test_the_network_under_autocast_is_among_them() -> None:
    run = Run(Request("compile", "cpu", True, providers.OURS, 60.0), lambda kind, what: None)
    names = {launch.kernel.__name__ for launch in precompile.needed(run, TARGET).values()}
    assert {"conv_stage_kernel", "linear_dgrad_kernel", "cross_entropy_forward", "attention_dkv_kernel"} <= names
    calls = dict(precompile._calls(True, TARGET))
    bf16, mixed = (
        precompile.recorded(calls[f"the network in {what}"](), TARGET) for what in ("bf16", "training, batch 4")
    )
    # the same products, but batch norm's vectors and the gradients of the weights are float32
    assert {key for key in mixed if "conv_stage_kernel" in key}
    assert set(mixed) != set(bf16)
    dtypes = {str(arg.dtype) for launch in mixed.values() for arg in launch.args[:1] if hasattr(arg, "dtype")}
    assert "torch.bfloat16" in dtypes


def test_of_a_fused_network_what_is_not_cudnns() -> None:
    """As fuse() sends it under autocast there, at the run's size: of the convolutions the stem's forward alone."""
    made = dict(precompile._calls(False, TARGET))[precompile.RESNET50]
    names = {launch.kernel.__name__ for launch in precompile.recorded(made(), TARGET, "auto").values()}
    assert {"statistics_kernel", "normalize_kernel", "gradient_sums_kernel", "input_gradient_kernel"} <= names
    assert {name for name in names if "conv" in name} == {"conv_stage_kernel", "conv_pack_kernel"}


def test_so_is_what_is_checked_and_watched_of_it() -> None:
    run = Run(Request("compile", "cpu", True, providers.OURS, 60.0), lambda kind, what: None)
    ours, known = providers.load(providers.OURS), set(precompile.needed(run, TARGET))
    exact = problems.case("cnn", {"N": 4})
    assert asked_for(lambda: measure.evaluate(Checked(exact, "cpu", ours))) <= known
    watched = asked_for(lambda: tools.attend("cpu"))
    assert watched
    assert watched <= known
    assert watched <= set(precompile.recorded(lambda mode: tools.attend("cpu"), TARGET))


def test_a_network_is_recorded_where_the_run_sends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Request("compile", "cpu", True, providers.OURS, 60.0), lambda kind, what: None)
    backends = {}

    def build(name: str) -> Any:
        def call(mode: Any) -> None:
            backends[name] = tkernels.get_backend()

        return call

    listed = [(name, lambda name=name: build(name)) for name in (precompile.RESNET50, "a layer")]
    listed.insert(1, ("no such package", lambda: importlib.import_module("no_such_package")))
    monkeypatch.setattr(precompile, "_calls", lambda dry, target: listed)
    assert precompile.needed(run, TARGET) == {}
    assert backends == {precompile.RESNET50: "auto", "a layer": "triton"}


def test_compiled_kernels_are_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = problems.case("batch_norm_relu", SMALL["batch_norm_relu"])
    ours = providers.load(providers.OURS)
    launches = precompile.recorded(lambda mode: measure.evaluate(Checked(case, "cpu", ours)), TARGET)
    assert precompile.compile_all(launches.items(), TARGET, 2) == []
    hits = []
    monkeypatch.setattr(
        triton.knobs.compilation, "listener", lambda *, cache_hit, **_: hits.append(cache_hit), raising=False
    )
    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(aot.StubDriver(aot.gpu_target(TARGET)))
    try:
        for launch in launches.values():
            launch.kernel.device_caches.clear()
            cast(Any, launch.kernel).run(*launch.args, grid=launch.grid, warmup=True, **launch.kwargs)
            launch.kernel.device_caches.clear()
    finally:
        triton.runtime.driver._active = active
    assert hits == [True] * len(launches)


PLANTED = """
import triton
from perf.static import aot
from perf.bench.gpu import precompile, problems
from perf.bench.gpu.session import Item
from tkernels.core import targets

TARGET = targets.TARGETS["sm_90"]

def items(run):
    return [Item("kernels", lambda: {"compile": compile, "later": find}[run.request.block](run))]

def launches(run):
    return list(precompile.needed(run, TARGET).items())[:3]

def compile(run):
    run.tell("compiled", str(precompile.compile_all(launches(run), TARGET, 2)))

def find(run):
    triton.runtime.driver.set_active(aot.StubDriver(aot.gpu_target(TARGET)))
    for _, launch in launches(run):
        launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.kwargs)
    triton.knobs.compilation.listener(src=launch.kernel, cache_hit=False)
"""


def test_another_process_finds_them_and_says_what_it_did_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of the environment are part of the cache's key."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
    name = command.module(tmp_path, monkeypatch, "planted_precompile", PLANTED)
    found = Results(tmp_path, providers.OURS)
    with Supervisor(found, "cpu", dry=True) as processes:
        outcomes = [processes.do(Block(block, 1.0, name, alone=True), 60.0) for block in ("compile", "later")]
    found.close()
    assert [outcome.status for outcome in outcomes] == ["ok", "ok"]
    assert (found.compiled, found.failures) == ("[]", [])
    assert len(found.late) == 1, "but for the one that was made up"


def test_a_kernel_that_cannot_be_compiled_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = problems.case("matmul", SMALL["matmul"])
    ours = providers.load(providers.OURS)
    launches = precompile.recorded(lambda mode: measure.evaluate(Checked(case, "cpu", ours)), TARGET)
    key, launch = next(iter(launches.items()))
    broken = aot.Launch(launch.kernel, launch.args, {**launch.kwargs, "BLOCK_M": 48}, launch.grid, launch.bytes)
    ((name, status),) = precompile.compile_all([(key, broken)], TARGET, 1)
    assert name == launch.kernel.__name__
    assert status.startswith("error: ")


def test_a_compiler_that_crashes_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def into_cache(launch: Any) -> None:
        if launch.kernel.__name__ == "b":
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(precompile, "_into_cache", into_cache)
    launches = [("", cast(Any, SimpleNamespace(kernel=SimpleNamespace(__name__=name)))) for name in "abbcd"]
    failures = precompile.compile_all(launches, TARGET, 2)
    assert failures == [("b", "crashed: signal 9")] * 2
