"""Passes that do not compile or meet what they cannot take; what else is compiled or set meanwhile."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from tkernels.core import _torch, settings
from tkernels.cpu import cache, compiler
from tkernels.cpu.compiler import Pass

pytestmark = [
    pytest.mark.gate("torch"),
    pytest.mark.skipif(not compiler.enabled(), reason="TKERNELS_COMPILE=0 or no C++ compiler"),
]


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """The passes compiled in this test."""
    found: dict[Any, Any] = {}
    monkeypatch.setattr(compiler, "_compiled", found)
    monkeypatch.setattr(compiler, "_broken", False)
    return found


def twice(x: Tensor, out: Tensor) -> tuple[()]:
    out.copy_(x + x)
    return ()


def instead(monkeypatch: pytest.MonkeyPatch, compile: Callable[[Callable[..., Any]], Callable[..., Any]]) -> list[str]:
    """``compile`` for Inductor, told of the function; the names of what it was asked for."""
    asked: list[str] = []

    def by_inductor(function: Callable[..., Any], tensors: tuple[Tensor, ...], channels: bool) -> Callable[..., Any]:
        asked.append(function.__name__)
        return compile(function)

    monkeypatch.setattr(compiler, "_by_inductor", by_inductor)
    return asked


def doubled(run: Pass, x: Tensor) -> Tensor:
    out = torch.full_like(x, -1)
    run(x, out)
    return out


def test_a_pass_that_does_not_compile_is_the_only_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compile(function: Callable[..., Any]) -> Callable[..., Any]:
        if function is twice:
            raise ValueError("no such\nloop")
        return function

    asked = instead(monkeypatch, compile)
    with caplog.at_level(logging.WARNING, "tkernels"), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert torch.equal(doubled(Pass(twice), torch.ones(8)), torch.full((8,), 2.0))
            assert torch.equal(doubled(run := Pass(twice), torch.ones(8).double()), torch.full((8,), 2.0).double())
    assert compiler.enabled()
    assert asked == ["twice", "<lambda>"] * 2  # once for each dtype, and each time whether anything compiles
    told = [record.getMessage() for record in caplog.records if "does not compile" in record.getMessage()]
    assert told
    assert all("'twice' does not compile: no such loop; PyTorch runs it" in line for line in told)
    assert run.function is twice


def test_a_compiler_that_does_not_work_turns_all_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(function: Callable[..., Any]) -> Callable[..., Any]:
        raise OSError("no such compiler")

    asked = instead(monkeypatch, compile)
    run = Pass(twice)
    with pytest.warns(RuntimeWarning, match="without compiled passes on this CPU: no such compiler; they need"):
        assert torch.equal(doubled(run, torch.ones(8)), torch.full((8,), 2.0))
    assert not compiler.enabled()
    doubled(run, torch.ones(8).double())
    assert asked == ["twice", "<lambda>"]


class Other(torch.Tensor):
    pass


def test_tensors_that_a_pass_cannot_take(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, compiled: dict[Any, Any]
) -> None:
    """They go to PyTorch for that call, before anything was compiled for their like and after."""
    calls: list[str] = []

    def compile(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Tensor, out: Tensor) -> Any:
            if type(x) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(x):
                raise RuntimeError("no storage")
            assert x.is_contiguous(), "wrong strides"
            calls.append("compiled")
            return function(x, out)

        return run

    instead(monkeypatch, compile)
    run, x = Pass(twice), torch.arange(8.0)
    odd: tuple[Callable[[], Tensor], ...] = (
        lambda: doubled(run, x.as_subclass(Other)),
        lambda: torch.func.vmap(lambda row: doubled(run, row))(x.view(2, 4)).flatten(),
    )
    for when in ("before", "after"):
        for call in odd:
            assert torch.equal(call().as_subclass(torch.Tensor), 2 * x), when
        assert (when == "after") == bool(compiled)
        doubled(run, x)
    assert torch.equal(doubled(run, x.view(2, 4).t()), 2 * x.view(2, 4).t())
    assert calls == ["compiled"] * 2
    assert compiler.enabled()
    assert sum("takes no such tensors" in record.getMessage() for record in caplog.records) == 1


def test_an_error_of_a_plain_call_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ran half-way is not run again."""

    def compile(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Tensor, out: Tensor) -> Any:
            out.add_(1)
            raise MemoryError("no memory")

        return run

    instead(monkeypatch, compile)
    out = torch.zeros(8)
    with pytest.raises(MemoryError):
        Pass(twice)(torch.ones(8), out)
    assert torch.equal(out, torch.ones(8))


class Watching(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def _ramp(x: Tensor, out: Tensor) -> tuple[Tensor]:
    out.copy_(torch.where(x > 0, x, 0.5) * torch.arange(x.shape[0]))
    return (x.sum(),)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_what_is_set_in_a_thread_has_no_part_in_what_is_compiled(dtype: torch.dtype, compiled: dict[Any, Any]) -> None:
    x = torch.linspace(-1, 1, 40)
    want = torch.where(x > 0, x, 0.5) * torch.arange(40)
    out, watching = torch.empty(40), Watching()
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"), watching, torch.autocast("cpu"), torch.inference_mode():
            modes = _get_current_function_mode_stack()
            (total,) = Pass(_ramp, f"ramp {dtype}", channels=False)(x, out)
            assert _get_current_function_mode_stack() == modes
    finally:
        torch.set_default_dtype(default)
    assert not {"arange", "where"} & set(watching.seen)
    assert all(run.__name__ != "_function" for run in compiled.values())
    assert total.dtype is torch.float32
    torch.testing.assert_close(out, want)


def _notices(caplog: pytest.LogCaptureFixture) -> int:
    return sum("tkernels compiles its passes" in record.getMessage() for record in caplog.records)


def test_the_notice_comes_where_something_is_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, compiled: dict[Any, Any]
) -> None:
    """Once with an empty cache, however many passes; never where the cache has them."""
    monkeypatch.setenv("TKERNELS_CACHE_DIR", str(tmp_path))
    for want in (1, 0):
        compiled.clear()
        caplog.clear()
        monkeypatch.setattr(compiler, "_announced", False)
        for dtype in (torch.float32, torch.float64):
            assert torch.equal(doubled(Pass(twice), torch.ones(8, dtype=dtype)), torch.full((8,), 2.0, dtype=dtype))
        assert len(compiled) == 2
        assert all(run.__name__ != "_function" for run in compiled.values())
        assert _notices(caplog) == want


def test_the_notice_of_an_inductor_of_other_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may then come though the cache has the pass."""
    from torch._inductor import compile_fx

    monkeypatch.delattr(compile_fx, "fx_codegen_and_compile")
    monkeypatch.setattr(compiler, "_announced", False)
    for _ in range(2):
        with _torch.telling_of_compilation(lambda: compiler._announce(tmp_path)):
            assert _notices(caplog) == 1


def test_the_notice_comes_again_after_a_while(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another process with the same cache: not within minutes of the first, which it may belong to."""
    for age, want in ((0, 1), (cache.LATELY - 60, 1), (cache.LATELY + 60, 2)):
        monkeypatch.setattr(compiler, "_announced", False)
        if age:
            os.utime(tmp_path / "announced", (time.time() - age,) * 2)
        compiler._announce(tmp_path)
        assert _notices(caplog) == want
    monkeypatch.setattr(compiler, "_announced", False)
    compiler._announce(tmp_path / "a folder that is not there")
    assert _notices(caplog) == 3


def test_the_loggers_level_hides_the_notice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiler, "_announced", False)
    assert "logging.getLogger('tkernels').setLevel('ERROR') hides this line" in compiler.NOTICE
    with caplog.at_level("ERROR", "tkernels"):
        compiler._announce(tmp_path)
    assert _notices(caplog) == 0


PLAIN = """
import torch
import tkernels.functional as F
x = torch.randn(16, 64, 32, 32).to(memory_format=torch.channels_last)
F.batch_norm(x, torch.zeros(64), torch.ones(64), training=True, activation="relu")
"""


def test_a_plain_script_is_told_once(tmp_path: Path) -> None:
    """With nothing set up: two processes that start together have one line between them, and torch says nothing of a
    CUDA that nobody uses. With a warm cache there is none."""

    def said(folder: str, *codes: str) -> list[str]:
        environment = {**os.environ, "TKERNELS_CACHE_DIR": str(tmp_path / folder), "CUDA_HOME": str(tmp_path)}
        started = [
            subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)
            for code in codes
        ]
        told = [process.communicate(timeout=300)[1] for process in started]
        assert [process.returncode for process in started] == [0] * len(codes), told
        return "".join(told).splitlines()

    (line,) = said("cache", PLAIN, PLAIN)
    assert line == compiler.NOTICE % settings.tilde(str(tmp_path / "cache"))
    assert said("cache", PLAIN) == []


def test_compiles_by_dynamos_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor is not to be entered by two threads, of which one may be a user's torch.compile."""
    from torch._dynamo.convert_frame import compile_lock

    asked = instead(monkeypatch, lambda function: function)
    done = threading.Thread(target=lambda: doubled(Pass(twice), torch.ones(8)))
    with compile_lock:
        done.start()
        done.join(0.3)
        assert done.is_alive()
        assert not asked
    done.join(30)
    assert asked == ["twice"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("busy", (False, True), ids=("idle", "while another thread compiles"))
def test_a_forked_process(busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.convert_frame import compile_lock

    asked = instead(monkeypatch, lambda function: function)
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with compile_lock:
            held.set()
            over.wait()

    thread = threading.Thread(target=hold)
    if busy:
        thread.start()
        held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        right = torch.equal(doubled(Pass(twice), torch.ones(8)), torch.full((8,), 2.0))
        os._exit(0 if right and asked == ([] if busy else ["twice"]) else 1)
    over.set()
    assert os.waitpid(child, 0)[1] == 0
