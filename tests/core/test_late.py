"""Modules that run late: kernels, which importing tkernels and calls on a CPU leave alone; who asks them by name."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tkernels.core.late import late

pytestmark = pytest.mark.gate("torch")


def run_python(program: str, **variables: str) -> str:
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


# as where the package is installed: run from its sources it has to import Dynamo to tell it of the backend's name
IMPORT = """
import sys
from importlib import metadata
import torch
before, found = set(sys.modules), metadata.entry_points
metadata.entry_points = lambda **group: found(**group) or ["ours"] * ("torch_dynamo_backends" in group.values())
import tkernels
from tkernels import functional as F
from tkernels.core import late


def waiting():
    return {module.__name__ for module in late._waiting}


new = {name for name in sys.modules if name not in before}
kernels = {name for name in new if "kernels" in name.split(".")[-1] and name != "tkernels"}
"""

CPU = """
assert kernels and kernels <= waiting(), kernels - waiting()
assert not any(name.startswith(("torch._dynamo", "torch._inductor")) for name in new)
own, triton = ({name for name in new if name.split(".")[0] == package} for package in ("tkernels", "triton"))
print(len(own - waiting()), len(new - own - triton))
x, weight = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3, requires_grad=True)
F.linear(x, torch.randn(3, 6)).sum()
F.conv2d(x, weight, padding=1, activation="relu").sum().backward()
F.conv_stage(x, [F.ConvBNLayer(weight, padding=1)], 2, training=True).sum().backward()
F.cross_entropy(F.batch_norm(x, None, None, training=True).flatten(1), torch.zeros(2, dtype=torch.int64))
F.scaled_dot_product_attention(x, x, x)
F.matmul(x, x)
assert kernels <= waiting(), kernels - waiting()
"""


def test_importing_the_package_and_calls_on_a_cpu_run_no_kernels_module() -> None:
    """By count, which a busy machine does not change: the package's own modules, and how many of others come along."""
    own, others = map(int, run_python(IMPORT + CPU).split())
    assert own <= 70
    assert others <= 15


BY_NAME = """
assert "tkernels.ops.linear.kernels" in waiting()
assert torch.ops.tkernels.linear_forward.default.name() == "tkernels::linear_forward"
assert not waiting()
assert "linear_forward" in dir(torch.ops.tkernels)
for name in ("no_such_operator", "__wrapped__"):
    assert not hasattr(torch.ops.tkernels, name)
"""


def test_operators_are_there_for_who_asks_by_name() -> None:
    """As torch.export.load does for a program that was exported on a GPU."""
    run_python(IMPORT + BY_NAME)


COUNTED = """
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
tkernels.backend("triton")
with FakeTensorMode(), FlopCounterMode(display=False) as counter:  # which copies the table of formulas
    assert {"tkernels.ops.conv.kernels", "tkernels.ops.linear.kernels"} <= waiting()
    F.conv2d(torch.randn(2, 4, 5, 5), torch.randn(8, 4, 3, 3), None, 2, 1)
    F.linear(torch.ones(8, 8), torch.ones(8, 8))
print(counter.get_total_flops())
"""


def test_a_counter_of_flops_that_is_on_learns_of_operators() -> None:
    assert int(run_python(IMPORT + COUNTED, TRITON_INTERPRET="1")) == 2 * (2 * 8 * 3 * 3) * (4 * 3 * 3) + 2 * 8**3


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of one module, which says when it runs."""
    name = "package_of_" + tmp_path.name.replace("-", "_")
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("runs = []\n")
    (tmp_path / name / "module.py").write_text(
        f"import time\nfrom {name} import runs\nruns.append(1)\ntime.sleep(0.2)\n"
        "def first():\n    return second()\ndef second():\n    return len(runs)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_module_runs_once_when_it_is_asked_for_something(package: str) -> None:
    top = importlib.import_module(package)
    module = late(f"{package}.module")
    assert importlib.import_module(f"{package}.module") is top.module is late(f"{package}.module") is module
    assert late(".module", package) is module is late("..module", f"{package}.neighbour")
    assert module.__file__.endswith("module.py")
    assert not hasattr(module, "__path__")
    assert top.runs == []
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(module.first())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1] * 8
    assert type(module) is type(sys)
    assert not hasattr(module, "third")


def test_a_module_that_fails_says_so_each_time(package: str) -> None:
    top = importlib.import_module(package)
    path = Path(top.__file__ or "").with_name("module.py")
    path.write_text(path.read_text() + "import no_such_module_at_all\n")
    module = late(f"{package}.module")
    for count in (1, 2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
            _ = module.first
        assert len(top.runs) == count
    with pytest.raises(ModuleNotFoundError, match="no_such"):
        late(f"{package}.no_such")
    path.write_text("first = 5\n")
    assert module.first == 5


def test_without_triton_there_are_no_operators() -> None:
    """Asked for by name, as hasattr does: the answer is no, not an import that fails."""
    code = (
        "import sys; sys.modules['triton'] = None; import torch, tkernels; "
        "print(hasattr(torch.ops.tkernels, 'linear'), getattr(torch.ops.tkernels, 'linear', None))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "False None"), done.stderr


def test_operators_are_found_by_their_names() -> None:
    """As torch's own, by Inductor's cache of graphs among others."""
    import torch

    import tkernels  # noqa: F401

    name = torch.ops.tkernels.conv_stage_forward.__module__
    assert name == torch.ops.aten.add.__module__.replace("aten", "tkernels")
