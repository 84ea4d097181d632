"""A machine without one of the packages: its tests are skipped with the reason, and the others run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.gates import optional

pytestmark = pytest.mark.gate("torch")

# each package, and a module of tests that needs it
NEEDED = {
    "expecttest": "tests/conformance/test_op_db.py",
    "hypothesis": "tests/conformance/test_properties.py",
    "torchvision": "tests/models/test_augment.py",
}
OTHER = "tests/core/test_mode.py"
RUN = f"""
import sys

class Missing:
    @staticmethod
    def find_spec(name, *_):
        if name.partition(".")[0] in {[*NEEDED]}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing)
import pytest
sys.exit(pytest.main([*{[*NEEDED.values(), OTHER]}, "-rs", "--collect-only", "-p", "no:xdist",
                      "-p", "no:hypothesispytest"]))
"""


def test_a_module_that_needs_it_is_skipped() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN], env={**os.environ, "TK_GATE": "torch"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    for missing, skipped in NEEDED.items():
        assert f"{missing} is not installed" in done.stdout
        assert f"{skipped}::" not in done.stdout
    assert f"{OTHER}::" in done.stdout


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
    assert optional.reason(wrapped) == "sklearn is not installed (the train group)"
