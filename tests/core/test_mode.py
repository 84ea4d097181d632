"""The backend decision, precision, autocast, seeds, and life without triton."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tkernels
from tkernels.core import mode, settings, targets

pytestmark = pytest.mark.gate("torch")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def test_backend_as_function_and_context_manager() -> None:
    before = tkernels.get_backend()
    tkernels.backend("torch")
    assert tkernels.get_backend() == "torch"
    with tkernels.backend("triton"):
        assert tkernels.get_backend() == "triton"
        with tkernels.backend("auto"):
            assert tkernels.get_backend() == "auto"
        assert tkernels.get_backend() == "triton"
    assert tkernels.get_backend() == "torch"
    tkernels.backend(before)


def test_backend_is_restored_after_an_exception() -> None:
    before = tkernels.get_backend()
    with pytest.raises(ZeroDivisionError), tkernels.backend("torch"):
        raise ZeroDivisionError
    assert tkernels.get_backend() == before


def test_unknown_backend_is_refused_and_changes_nothing() -> None:
    before = tkernels.get_backend()
    with pytest.raises(ValueError, match=r"'auto', 'triton', 'torch', got 'cuda'"):
        tkernels.backend("cuda")
    assert tkernels.get_backend() == before


def test_environment_variable_sets_the_start_value() -> None:
    show = """
import importlib, os, tkernels
print(tkernels.get_backend())
os.environ["TKERNELS_BACKEND"] = ""
print(importlib.reload(tkernels.core.mode).get_backend())
"""
    assert run_python(show, TKERNELS_BACKEND="torch").stdout.split() == ["torch", "auto"], "empty is not set"


WRONG_BACKEND = """
import torch, tkernels
import tkernels.functional as F
x, image, target = torch.ones(2, 2), torch.ones(1, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
calls = [tkernels.get_backend, lambda: F.linear(x, x), lambda: F.linear_relu(x, x), lambda: F.matmul(x, x),
         lambda: F.conv2d(image, image), lambda: F.batch_norm(x, None, None, training=True),
         lambda: F.cross_entropy(x, target), lambda: F.scaled_dot_product_attention(x, x, x),
         lambda: F.conv_stage(image, [F.ConvBNLayer(image[..., :1, :1])], training=True)]
for call in calls:
    try:
        call()
        print("taken")
    except ValueError as error:
        print(error)
with tkernels.backend("torch"):
    F.linear(x, x)
"""


def test_a_wrong_backend_is_refused_by_whatever_asks_for_it() -> None:
    ran = run_python(WRONG_BACKEND, TKERNELS_BACKEND="TORCH")
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    message = "environment variable TKERNELS_BACKEND must be one of 'auto', 'triton', 'torch', got 'TORCH'"
    assert lines == [message] * 9


@pytest.mark.parametrize(
    "command", ["tkernels", "models.train --epochs 0", "perf sweep --op linear --device cpu --quick"]
)
def test_commands_say_in_a_line_that_a_backend_is_wrong(command: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", *command.split()], capture_output=True, text=True, timeout=120,
        env={**os.environ, "TKERNELS_BACKEND": "gpu"},
    )  # fmt: skip
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert line.endswith(
        "error: environment variable TKERNELS_BACKEND must be one of 'auto', 'triton', 'torch', got 'gpu'"
    )


def test_a_first_call_under_the_environments_triton_says_what_is_missing() -> None:
    """One operator of each kind of sequence: all name the command."""
    code = WRONG_BACKEND.replace("except ValueError", "except RuntimeError").replace("tkernels.get_backend, ", "")
    ran = run_python(code, TKERNELS_BACKEND="triton", CUDA_VISIBLE_DEVICES="")
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) == 8
    for line in lines:
        assert line.startswith(
            "backend 'triton' was asked for, but a tensor is on cpu, not on a GPU (torch finds no GPU"
        )
        assert line.endswith(mode.ADVICE)


def test_paths_are_shown_without_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    for text, shown in (
        ("/home/ann/.cache: 3 files", "~/.cache: 3 files"), ("in /home/ann", "in ~"), ("/home/anna/x", "/home/anna/x"),
        ("/mnt/home/ann/x", "/mnt/home/ann/x"), ("a:/home/ann/b:/home/ann", "a:~/b:~"), ("", ""),
    ):  # fmt: skip
        assert settings.tilde(text) == shown
    monkeypatch.setenv("HOME", "/")
    assert settings.tilde("/etc/x") == "/etc/x"


def test_a_flag_says_yes_or_no(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, given in (("1", True), ("ON", True), ("yes", True), ("0", False), ("False", False), ("off", False)):
        monkeypatch.setenv("TKERNELS_COMPILE", text)
        assert (settings.COMPILE.is_on(), settings.COMPILE.is_on("0")) == (given, given)
    monkeypatch.setenv("TKERNELS_COMPILE", "")
    assert settings.COMPILE.is_on(), "empty is not set"
    monkeypatch.setenv("TKERNELS_COMPILE", "flase")
    for default in ("0", "1"):
        with pytest.warns(
            RuntimeWarning, match=rf"TKERNELS_COMPILE must be one of 1, .* got 'flase': {default} is taken"
        ):
            assert settings.COMPILE.is_on(default) == (default == "1")


def test_triton_backend_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2)
    reason = (
        r"'triton' was asked for, but a tensor is on cpu, not on a GPU{}; `python -m tkernels` says what is missing"
    )
    for there, found in ((False, r" \(torch finds no GPU here\)"), (True, "")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        with tkernels.backend("triton"), pytest.raises(RuntimeError, match=reason.format(found)):
            mode.use_triton(x)
    with tkernels.backend("auto"):
        assert not mode.use_triton(x)


def test_float64_goes_to_pytorch_under_every_backend() -> None:
    for name in mode.BACKENDS:
        with tkernels.backend(name):
            assert not mode.use_triton(torch.ones(2, dtype=torch.float64), None)


@pytest.mark.parametrize("library, op", (("cuda", "matmul"), ("cudnn", "conv")))
def test_float32_products_follow_torchs_switches(library: str, op: str) -> None:
    switch = getattr(getattr(torch.backends, library), op)
    with targets.pretend("sm_80"):
        switch.fp32_precision = "tf32"
        assert mode.dot_precision(torch.float32, op) == "tf32"
        assert mode.dot_precision(torch.bfloat16, op) == "ieee"
        switch.fp32_precision = "ieee"
        assert mode.dot_precision(torch.float32, op) == "ieee"
    switch.fp32_precision = "tf32"
    with targets.pretend("gfx1100"):  # where tf32 does not compile
        assert mode.dot_precision(torch.float32, op) == "ieee"


def test_torchs_defaults_are_ieee_products_and_tf32_convolutions() -> None:
    code = (
        "import torch; from tkernels.core import mode; "
        "print(mode.dot_precision(torch.float32, 'conv'), mode.dot_precision(torch.float32, 'matmul'))"
    )
    assert run_python(code).stdout.split() == ["tf32", "ieee"]


def test_autocast_dtype_and_casts() -> None:
    x, ids, exact = torch.ones(2), torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.float64)
    assert mode.autocast_dtype(x) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dtype = mode.autocast_dtype(x)
        cast = mode.cast_for_autocast(dtype, x, ids, exact, None)
    assert dtype == torch.bfloat16
    assert [t.dtype if t is not None else None for t in cast] == [torch.bfloat16, torch.int64, torch.float64, None]


def test_seeds_follow_torchs_generator() -> None:
    x = torch.ones(1)
    torch.manual_seed(3)
    first, second = mode.dropout_seed(x), mode.dropout_seed(x)
    torch.manual_seed(3)
    assert first == mode.dropout_seed(x)
    assert first != second
    assert first.dtype == torch.int64
    assert first.shape == ()


def test_unlisted_gpus_take_the_nearest_facts() -> None:
    assert targets.of_arch(87).shared_memory == targets.TARGETS["sm_86"].shared_memory
    assert targets.of_arch(103).shared_memory == targets.TARGETS["sm_100"].shared_memory
    assert targets.of_arch("gfx90a").warp_size == 64
    assert not targets.of_arch("gfx1201").has_tf32


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, tkernels
from models.cifar_cnn import FusedCNNClassifier
assert not tkernels.core.mode.HAS_TRITON
torch.manual_seed(0)
model = FusedCNNClassifier(num_classes=3, width=4, image_size=8)
criterion = tkernels.nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
images, target = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
losses = []
for _ in range(20):
    optimizer.zero_grad()
    loss = criterion(model(images), target)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
try:
    with tkernels.backend("triton"):
        model(images)
except RuntimeError as error:
    print(error)
"""


def test_imports_and_trains_without_triton() -> None:
    ran = run_python(WITHOUT_TRITON)
    assert ran.returncode == 0, ran.stderr
    assert "triton is not installed" in ran.stdout


def test_the_versions_that_were_tested_are_written_down() -> None:
    root = Path(__file__).parents[2]
    pins = re.findall(r'"(?:torch|triton)==([\d.]+)', (root / "pyproject.toml").read_text())
    bounds = re.findall(r'"(?:torch|triton)>=([\d.]+)', (root / "pyproject.toml").read_text())
    table = (root / "tests" / "README.md").read_text().partition("## Versions it was tested with")[2]
    rows = [line.split(" | ")[:2] for line in table.splitlines() if line[:3].strip("| ").isdigit()]
    assert [rows[0][0].strip("| "), rows[0][1]] == pins
    assert re.findall(r"^(?:torch|triton)==([\d.]+)", (root / "constraints.txt").read_text(), re.MULTILINE) == pins
    for found, bound in zip((rows[-1][0].strip("| "), rows[-1][1]), bounds):
        assert found.startswith(bound)


def test_import_touches_no_gpu() -> None:
    code = "import tkernels, tkernels.nn, torch; print(torch.cuda.is_initialized())"
    assert run_python(code).stdout.strip() == "False"


def test_import_waits_for_dynamo_until_something_is_fused() -> None:
    """Its import takes as long as torch's. From sources, without an entry point, the backend's name needs it."""
    code = """
import importlib.metadata, sys
points = importlib.metadata.entry_points
importlib.metadata.entry_points = lambda **given: INSTALLED if "name" in given else points(**given)
import tkernels
assert {"fuse", "explain", "unfuse"} <= set(dir(tkernels))
print("torch._dynamo" in sys.modules)
import torch
print(tkernels.fusion.__name__, "tkernels" in torch._dynamo.list_backends())
tkernels.fuse(torch.nn.Linear(2, 2))
"""
    shown = [run_python(code.replace("INSTALLED", found)).stdout.split() for found in ("['a point']", "[]")]
    assert shown[0][0] == "False"
    assert shown[1] == ["True", "tkernels.fusion", "True"]


WITHOUT_TEMPORARY_FILES = """
import tempfile
def none():
    raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp', '/var/tmp', '/usr/tmp', '/']")
tempfile._get_default_tempdir = none
import sys, torch, tkernels
import tkernels.functional as F
x = torch.ones(64, 3, requires_grad=True)
F.linear_relu(x, torch.ones(5, 3)).sum().backward()
F.batch_norm(x, None, None, training=True).sum().backward()
F.cross_entropy(x, torch.zeros(64, dtype=torch.int64)).backward()
F.scaled_dot_product_attention(x, x, x).sum().backward()
print("works", "torch._dynamo" in sys.modules)
try:
    tkernels.fuse(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()))(torch.ones(2, 2))
except FileNotFoundError as error:
    print(error)
assert not hasattr(tkernels, "nonsense")
"""


def test_imports_without_a_folder_for_temporary_files() -> None:
    """As torch does. Dynamo needs one, so that fusing a model says what is missing."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_TEMPORARY_FILES], capture_output=True, text=True, env=environment, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    works, reason = ran.stdout.splitlines()
    assert works == "works False"
    assert "No usable temporary directory" in reason
