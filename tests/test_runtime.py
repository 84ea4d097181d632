"""The ground floor: the backend decision, precision, autocast, seeds, and life without triton."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import tkernels
from tkernels import runtime, targets

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
    show = "import tkernels; print(tkernels.get_backend())"
    assert run_python(show, TKERNELS_BACKEND="torch").stdout.strip() == "torch"
    refused = run_python(show, TKERNELS_BACKEND="gpu")
    assert refused.returncode != 0
    assert "TKERNELS_BACKEND must be one of" in refused.stderr


def test_triton_backend_says_why_it_cannot_run() -> None:
    x = torch.ones(2)
    with tkernels.backend("triton"), pytest.raises(RuntimeError, match=r"'triton' was asked for, but .*on cpu"):
        runtime.use_triton(x)
    with tkernels.backend("auto"):
        assert not runtime.use_triton(x)


def test_float64_goes_to_pytorch_under_every_backend() -> None:
    for name in runtime.BACKENDS:
        with tkernels.backend(name):
            assert not runtime.use_triton(torch.ones(2, dtype=torch.float64), None)


@pytest.mark.parametrize("library, op", (("cuda", "matmul"), ("cudnn", "conv")))
def test_float32_products_follow_torchs_switches(library: str, op: str) -> None:
    switch = getattr(getattr(torch.backends, library), op)
    with targets.pretend("sm_80"):
        switch.fp32_precision = "tf32"
        assert runtime.dot_precision(torch.float32, op) == "tf32"
        assert runtime.dot_precision(torch.bfloat16, op) == "ieee"
        switch.fp32_precision = "ieee"
        assert runtime.dot_precision(torch.float32, op) == "ieee"
    switch.fp32_precision = "tf32"
    with targets.pretend("gfx1100"):  # where tf32 does not compile
        assert runtime.dot_precision(torch.float32, op) == "ieee"


def test_torchs_defaults_are_ieee_products_and_tf32_convolutions() -> None:
    code = (
        "import torch; from tkernels import runtime; "
        "print(runtime.dot_precision(torch.float32, 'conv'), runtime.dot_precision(torch.float32, 'matmul'))"
    )
    assert run_python(code).stdout.split() == ["tf32", "ieee"]


def test_autocast_dtype_and_casts() -> None:
    x, ids, exact = torch.ones(2), torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.float64)
    assert runtime.autocast_dtype(x) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dtype = runtime.autocast_dtype(x)
        cast = runtime.cast_for_autocast(dtype, x, ids, exact, None)
    assert dtype == torch.bfloat16
    assert [t.dtype if t is not None else None for t in cast] == [torch.bfloat16, torch.int64, torch.float64, None]


def test_seeds_follow_torchs_generator() -> None:
    x = torch.ones(1)
    torch.manual_seed(3)
    first, second = runtime.dropout_seed(x), runtime.dropout_seed(x)
    torch.manual_seed(3)
    assert first == runtime.dropout_seed(x)
    assert first != second
    assert first.dtype == torch.int64
    assert first.shape == ()


def test_unlisted_gpus_take_the_nearest_facts() -> None:
    assert targets._of_nvidia(8, 7).shared_memory == targets.TARGETS["sm_86"].shared_memory
    assert targets._of_nvidia(10, 3).shared_memory == targets.TARGETS["sm_100"].shared_memory
    assert targets._of_amd("gfx90a:sramecc+:xnack-").warp_size == 64
    assert not targets._of_amd("gfx1201").has_tf32


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, tkernels
from models.cifar_cnn import FusedCNNClassifier
assert not tkernels.runtime.HAS_TRITON
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


def test_import_touches_no_gpu() -> None:
    code = "import tkernels, tkernels.nn, torch; print(torch.cuda.is_initialized())"
    assert run_python(code).stdout.strip() == "False"
