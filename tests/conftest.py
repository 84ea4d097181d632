"""One suite, five gates. TK_GATE chooses which one a pytest process is; each test says which gates it belongs to.

torch   CPU tensors, the PyTorch bodies, models, command lines.
ttsem   device="cuda" tests on a machine without a GPU: every launch's TTIR executed, bounds and races checked.
aot     kernels compiled for GPUs that are not there; facts read off the machine code.
interp  Triton's interpreter on CPU tensors.
cuda    a real GPU, launched as users launch; TK_DETERMINISTIC=1 fills fresh memory with NaN there too.

A module or test is marked ``pytest.mark.gate("ttsem", "cuda")``; the others are not collected. What is marked
``pytest.mark.extended("ttsem")`` too is exhaustive and slow there: it runs with TK_EXTENDED=1, and nothing else then.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterator
from typing import Any

GATES = ("torch", "ttsem", "aot", "interp", "cuda")
OPERATORS = ("linear", "matmul", "conv", "batch_norm", "cross_entropy", "attention", "conv_stage")
GATE = os.environ.get("TK_GATE", "torch")
if GATE not in GATES:
    raise ValueError(f"TK_GATE must be one of {GATES}, got {GATE!r}")
EXTENDED = os.environ.get("TK_EXTENDED") == "1"
# a GPU runs what users run, and torch's deterministic mode takes another allocator than they get
DETERMINISTIC = GATE != "cuda" or os.environ.get("TK_DETERMINISTIC") == "1"
os.environ["OMP_NUM_THREADS"] = "1"  # xdist runs a worker per core; commands under test inherit it
if GATE == "interp":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import pytest
import torch

import tkernels
from tests.gates import elsewhere, interpreter, optional, process, repeats, ttsem
from tests.gates import launches as launch_counts
from tkernels.core import plan

_stack = contextlib.ExitStack()
_ttsem_state: Any = None
_launched: list[str] = []
_left_out: list[str] = []  # lines for the summary


def pytest_configure(config: pytest.Config) -> None:
    global _ttsem_state
    torch.set_num_threads(1)  # xdist runs a worker per core
    if DETERMINISTIC:
        # NaN in whatever torch.empty returns, inside backward() too: unwritten memory must show
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
    if GATE == "torch":
        # autograd starts a thread for each device it sees at its first backward, and forked processes cannot use it
        # then; once fake tensors were made, it sees a GPU where there is none
        torch.ones((), requires_grad=True).backward()
    if GATE == "interp":
        interpreter.patch()
    if GATE == "ttsem":
        _ttsem_state = ttsem.open_session(_stack)
    if GATE in ("ttsem", "interp"):
        launch_counts.count_runs(_launched)
    if GATE == "cuda":
        # minutes on a rented GPU are not to end with one module that cannot be imported
        config.option.continue_on_collection_errors = True
        _stack.enter_context(launch_counts.counting_driver_calls(_launched))


def pytest_unconfigure(config: pytest.Config) -> None:
    _stack.close()


@pytest.hookimpl(trylast=True)  # what -k leaves out is no gate's affair
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, left = [], []
    for item in items:
        marks = list(item.iter_markers("gate"))
        if not marks:
            raise pytest.UsageError(f"{item.nodeid} does not say which gate it belongs to")
        extended = any(GATE in mark.args for mark in item.iter_markers("extended"))
        # the closest mark wins: a test's own over its module's
        (kept if GATE in marks[0].args and extended == EXTENDED else left).append(item)
    if GATE == "cuda":
        kept.sort(key=_turn)
    items[:] = kept
    config.hook.pytest_deselected(items=left)
    _left_out[:] = elsewhere.lines(left, kept, config.args, config.option.keyword, (GATE, *GATES))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left out"] = _left_out


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Workers of xdist collect, and the process that prints does not."""
    _left_out[:] = getattr(node, "workeroutput", {}).get("left out", [])


def _turn(item: pytest.Item) -> int:
    """A GPU is there for minutes: first what trains and each operator, last what is exhaustive under ttsem."""
    if item.get_closest_marker("extended") is not None:
        return 2
    return 0 if {*OPERATORS, "test_plan.py", "test_fused_training.py"} & set(item.path.parts) else 1


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, Any]:
    """A module of tests that imports a package which is not there is skipped."""
    report: Any = yield
    if report.failed:
        reason = optional.reason(report.call.excinfo.value)
        if reason is not None:
            report.outcome, report.longrepr = "skipped", (str(collector.path), 1, f"Skipped: {reason}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """So is a test that imports one as it runs."""
    with optional.skipping():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    with optional.skipping():
        return (yield)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in _left_out:
        terminalreporter.write_line(line)
    if _ttsem_state is not None and _ttsem_state.launches:
        terminalreporter.write_line(
            f"ttsem: {_ttsem_state.launches} launches, {_ttsem_state.races_unchecked} too large for the race check"
        )


@pytest.fixture(scope="session")
def device() -> str:
    """Where this gate's tensors live: 'cuda' under ttsem and on a GPU, else 'cpu'."""
    return "cuda" if GATE in ("ttsem", "cuda") else "cpu"


@pytest.fixture(scope="session")
def triton_runs() -> bool:
    """Whether operators take Triton in this gate."""
    return GATE in ("ttsem", "interp", "cuda")


@pytest.fixture(autouse=True)
def _same_start(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test starts from the same seed, IEEE float32 products and the strict backend of its gate, and no operator
    repeats what it did in a test before, which may have put another choice in its way. It leaves the process as it
    found it."""
    plan.forget()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # whatever a command under test has set
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    unchecked = _ttsem_state.races_unchecked if _ttsem_state is not None else 0
    found = process.state()
    with tkernels.backend("triton" if GATE in ("ttsem", "interp", "cuda") else "auto"):
        yield
    assert process.state() == found, "the test leaves the process changed for those behind it"
    if _ttsem_state is not None and not request.node.get_closest_marker("races_unchecked"):
        assert _ttsem_state.races_unchecked == unchecked, "a launch was too large for the race check: shrink the test"


@pytest.fixture(scope="module")
def _passes_seen() -> set[Any]:
    return set()


@pytest.fixture(autouse=True)
def _plans_run_twice(request: pytest.FixtureRequest, _passes_seen: set[Any]) -> Iterator[None]:
    """Where operators' kernels are tested, later calls give what the first one gave. Under ttsem, where running them
    takes time, it is asked of the first plan of each pass in a file."""

    def wanted(body: Any) -> bool:
        known = GATE == "ttsem" and body in _passes_seen
        _passes_seen.add(body)
        return not known

    # (the fixture monkeypatch, asked for here, would undo a test's changes only after _same_start has looked)
    with pytest.MonkeyPatch.context() as patch:
        if GATE in ("ttsem", "cuda") and request.path.parent.name in OPERATORS:
            repeats.run_plans_twice(patch, _launched, wanted)
        yield


@pytest.fixture
def launches() -> list[str]:
    """Names of the kernels launched since the test asked for this fixture, in order."""
    _launched.clear()
    return _launched


@pytest.fixture
def tracing() -> Iterator[None]:
    """torch.export reads cuDNN's float32 switch by its old name, which must agree with the new ones the suite sets."""
    # (the attribute is frozen once torch.testing was imported)
    torch._C._set_cudnn_allow_tf32(False)
    torch._dynamo.reset()  # what it saw of sizes before
    yield
    torch._dynamo.reset()
