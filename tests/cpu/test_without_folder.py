"""Without tkernels.cpu, as where a deployment on GPUs has deleted the folder: every call on a CPU is PyTorch's own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gate("torch")

ABSENT = """
import sys

class Absent:
    @staticmethod
    def find_spec(name, *_):
        if name.partition(".")[2].partition(".")[0] == "cpu" and name.startswith("tkernels."):
            raise ModuleNotFoundError(f"No module named {name!r}", name="tkernels.cpu")

sys.meta_path.insert(0, Absent)
"""

# each operator at a size that takes a fast way where there is one, beside torch's own calls: the same bits
OPERATORS = """
import torch, torch.nn.functional as F
import tkernels, tkernels.functional as TF
from tkernels.ops import cpu

assert cpu is None
assert not [name for name in sys.modules if name.startswith("tkernels.cpu")]

x, weight, bias = torch.randn(1024, 256), torch.randn(1024, 256), torch.randn(1024)
image = torch.randn(16, 32, 64, 64).contiguous(memory_format=torch.channels_last)
filters, vectors = torch.randn(32, 32, 3, 3), [torch.rand(32) + 0.5, torch.randn(32)]
logits, target = torch.randn(1 << 16, 10), torch.randint(10, (1 << 16,))


def stage(x, filters, scale, shift):
    layer = TF.ConvBNLayer(filters, None, scale, shift, padding=1)
    return TF.conv_stage(x, [layer], 2, training=True)


def torch_stage(x, filters, scale, shift):
    return F.max_pool2d(F.relu(F.batch_norm(F.conv2d(x, filters, padding=1), None, None, scale, shift, True)), 2)


calls = {
    "linear": (lambda *t: TF.linear(*t, "gelu"), lambda *t: F.gelu(F.linear(*t)), (x, weight, bias)),
    "conv2d": (lambda *t: TF.conv2d(*t, activation="relu"), lambda *t: F.relu(F.conv2d(*t)), (image, filters)),
    "batch_norm": (
        lambda x, *t: TF.batch_norm(x, None, None, *t, True, activation="relu"),
        lambda x, *t: F.relu(F.batch_norm(x, None, None, *t, True)), (image, *vectors),
    ),
    "cross_entropy": (lambda x: TF.cross_entropy(x, target), lambda x: F.cross_entropy(x, target), (logits,)),
    "conv_stage": (stage, torch_stage, (image, filters, *vectors)),
}
for name, (ours, theirs, given) in calls.items():
    results = []
    for call in (ours, theirs):
        leaves = [t.clone().requires_grad_() for t in given]
        with torch.no_grad():
            plain = call(*leaves)
        y = call(*leaves)
        results.append([plain, y, *torch.autograd.grad(y.sin().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride(), name

model = torch.nn.Sequential(torch.nn.Conv2d(32, 32, 3), torch.nn.BatchNorm2d(32), torch.nn.ReLU()).eval()
with torch.no_grad():
    wanted = model(image)
    report = tkernels.explain(model, image)
    assert any("tkernels.cpu" in why for _, why in report.left), report
    assert torch.equal(tkernels.fuse(model)(image), wanted)
"""

TESTS = (
    "linear/test_values",
    "batch_norm/test_calls",
    "cross_entropy/test_values",
    "cross_entropy/test_kernels",
    "conv_stage/test_values",
)
SUITE = """
import pytest
code = pytest.main([*{tests!r}, "-p", "no:xdist"])
assert not [name for name in sys.modules if name.startswith("tkernels.cpu")]
sys.exit(code)
"""


def _run(program: str) -> str:
    given = {**os.environ, "TK_GATE": "torch"}
    done = subprocess.run([sys.executable, "-c", program], env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_operators_are_torch_s() -> None:
    _run(ABSENT + OPERATORS)


def test_the_operators_tests_pass() -> None:
    out = _run(ABSENT + SUITE.format(tests=[f"tests/{name}.py" for name in TESTS]))
    assert " passed" in out
