"""A machine without one of the packages: its tests are skipped with the reason, and the others run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.gates import optional

pytestmark = pytest.mark.gate("torch")

RUN = """
import sys

class Missing:
    @staticmethod
    def find_spec(name, *_):
        if name.partition(".")[0] == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing)
import pytest
sys.exit(pytest.main([*{tests!r}, "-rs", "--collect-only", "-p", "no:xdist", "-p", "no:hypothesispytest"]))
"""


@pytest.mark.parametrize("missing, skipped, others", [
    ("expecttest", "tests/conformance/test_op_db.py", "tests/conformance/test_bad_calls.py"),
    ("hypothesis", "tests/conformance/test_properties.py", "tests/conformance/test_bad_calls.py"),
    ("torchvision", "tests/models/test_augment.py", "tests/core/test_mode.py"),
])  # fmt: skip
def test_a_module_that_needs_it_is_skipped(missing: str, skipped: str, others: str) -> None:
    given = {**os.environ, "TK_GATE": "cuda"} | ({"TK_GATE": "torch"} if "runtime" in others else {})
    command = [sys.executable, "-c", RUN.format(missing=missing, tests=[skipped, others])]
    done = subprocess.run(command, env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert f"{missing} is not installed" in done.stdout
    assert f"{others}::" in done.stdout
    assert f"{skipped}::" not in done.stdout


def test_a_test_that_imports_it_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(pytest.skip.Exception, match="timm is not installed"), optional.skipping():
        import timm  # noqa: F401
    with pytest.raises(ModuleNotFoundError), optional.skipping():
        import tkernels.absent  # noqa: F401


def test_other_errors_stay_errors() -> None:
    assert optional.reason(ModuleNotFoundError("no", name="tkernels.absent")) is None
    assert optional.reason(ImportError("no", name="timm")) is None
    assert optional.reason(ValueError("no")) is None
    wrapped = RuntimeError("no")
    wrapped.__cause__ = ModuleNotFoundError("no", name="sklearn.datasets")
    assert optional.reason(wrapped) == "sklearn is not installed (the train extra)"
