"""A pytest plugin that tells each failure as it happens, and the counts at an interrupt: the tests' processes, busy
with a compiler, may not end in time for pytest's own summary."""

from __future__ import annotations

import collections
import os

import pytest

_counts: collections.Counter[str] = collections.Counter()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test's setup, call and teardown; the process that the others report to prints."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        why = str(getattr(crash, "message", "")).partition("\n")[0] or f"in its {report.when}"
        print(f"\nFAILED {report.nodeid} - {why}\n{report.longreprtext}", flush=True)
    if report.when == "call" or not report.passed:
        _counts[report.outcome] += 1


def pytest_keyboard_interrupt() -> None:
    """The time is over."""
    print("\ninterrupted after " + ", ".join(f"{n} {outcome}" for outcome, n in sorted(_counts.items())), flush=True)
