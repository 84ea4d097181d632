"""The test suite's cuda gate with the time that is left, operators first; what failed is told test by test."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence

from perf.bench.gpu import tools
from perf.bench.gpu.session import Item, Run

# what a dry run tests: a part of the suite that takes a moment
QUICK_TESTS = ("tests/core/test_mode.py",)
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "perf.bench.gpu.outcomes", "--tb", "short",
          "--continue-on-collection-errors", "-rfE")  # fmt: skip
# seconds that pytest has to list what failed when its time is over
LAST_WORDS = 6.0


def items(run: Run) -> list[Item]:
    """Operators, then the rest; in a dry run a moment's worth."""
    if run.request.dry:
        return [Item("tests", functools.partial(_run, run, "tests", QUICK_TESTS))]
    parallel = ("-n", str(min(14, os.cpu_count() or 1)), "--dist", "worksteal")
    operators = [f"tests/{path.parent.name}" for path in sorted(tools.ROOT.glob("tkernels/ops/*/op.py"))]
    others = ("tests", *(f"--ignore={folder}" for folder in operators))
    return [
        Item("operators", functools.partial(_run, run, "operators", (*parallel, *operators))),
        Item("rest", functools.partial(_run, run, "rest", (*parallel, *others))),
    ]


def _run(run: Run, name: str, arguments: Sequence[str]) -> None:
    """Run pytest and tell how it closed. Interrupted by the block's limit it tells what it has."""
    gate = {"TK_GATE": "torch" if run.request.dry else "cuda", "TK_EXTENDED": "0", **_visible(run.device)}
    process = tools.started([*PYTEST, *arguments], gate)
    assert process.stdout is not None
    lines: list[str] = []
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
        process.wait()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # as by Ctrl-C: it lists what failed
            try:
                lines += process.communicate(timeout=LAST_WORDS)[0].splitlines()
            except subprocess.TimeoutExpired:
                lines.append("interrupted")
            tools.end(process)
        run.tell("tool", (f"tests {name}", closing(lines, process.returncode)))


def _visible(device: str) -> dict[str, str]:
    """What makes cuda:1 the only GPU that a process sees: the tests take the first."""
    index = device.partition(":")[2]
    if not index:
        return {}
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": before.split(",")[int(index)] if before else index}


def closing(lines: Sequence[str], status: int | None) -> str:
    """pytest's closing line, what failed first, 'wrong' before it where something did."""
    counts = next(
        (line.strip("= ") for line in reversed(lines) if re.search(r"\d+ (passed|failed|error|skipped)", line)), ""
    )
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if failed:
        return f"wrong: {counts}; first: {failed[0]}"
    return counts or f"error: no test ran (exit status {status})"
