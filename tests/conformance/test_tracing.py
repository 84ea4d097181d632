"""torch.jit.trace with its own check, ONNX and torch.export over every module: what was recorded gives the right values
for other inputs, statistics included."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tkernels
import tkernels.nn as tnn

pytestmark = [
    pytest.mark.gate("torch", "ttsem", "cuda"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated", "ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]


def image(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, 3, 8, 8),)


def row(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, 16),)


class WithResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = tnn.BatchNorm2d(3, activation="relu")

    def forward(self, x: Tensor) -> Any:
        return self.norm(x, 2 * x)


# a module and its input for a batch
MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "Linear": (lambda: tnn.Linear(16, 8, activation="relu"), row),
    "LinearReLU": (lambda: tnn.LinearReLU(16, 8, bias=False), row),
    "Linear, dropout": (lambda: tnn.Linear(16, 8, activation="gelu", dropout=0.5), row),
    "Conv2d": (lambda: tnn.Conv2d(3, 4, 3, padding="same", activation="relu"), image),
    "BatchNorm1d": (lambda: tnn.BatchNorm1d(16, activation="relu"), row),
    "BatchNorm2d": (lambda: tnn.BatchNorm2d(3, activation="relu", momentum=None), image),
    "BatchNorm2d, residual": (WithResidual, image),
    "SyncBatchNorm": (lambda: tnn.SyncBatchNorm(3, activation="silu"), image),
    "ConvStage": (lambda: tnn.ConvStage([3, 4, 5], 3, padding=1, pool=2), image),
    "ConvBNReLU2d": (lambda: tnn.ConvBNReLU2d(3, 4, 3), image),
    "CrossEntropyLoss": (
        lambda: tnn.CrossEntropyLoss(), lambda n: (torch.randn(n, 5), torch.arange(n) % 5),
    ),
    "MultiheadAttention": (
        lambda: tnn.MultiheadAttention(8, 2, batch_first=True), lambda n: (torch.randn(n, 5, 8),) * 3,
    ),
}  # fmt: skip
DROPS = ("Linear, dropout",)  # in training no two runs are alike


def drawn(inputs: tuple[Tensor, ...], device: str) -> tuple[Tensor, ...]:
    return tuple(t.to(device) for t in inputs)


@pytest.fixture(params=MODULES)
def case(request: pytest.FixtureRequest, device: str) -> tuple[nn.Module, Callable[[int], tuple[Tensor, ...]]]:
    make, inputs = MODULES[request.param]
    return make().to(device), lambda n: drawn(inputs(n), device)


def first(y: Any) -> Tensor:
    found: Tensor = y[0] if isinstance(y, tuple) else y
    return found


def agree_on_tf32() -> None:
    """Exporters read cuDNN's float32 switch by its old name, which must agree with the new ones that the suite sets."""
    torch._C._set_cudnn_allow_tf32(False)  # (the attribute is frozen once torch.testing was imported)


@pytest.mark.parametrize("grad", (True, False), ids=("grad", "no_grad"))
@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
def test_jit_trace(training: bool, grad: bool, case: Any, request: pytest.FixtureRequest, triton_runs: bool) -> None:
    module, inputs = case
    module.train(training and not any(name in request.node.name for name in DROPS))
    twin = copy.deepcopy(module)
    if triton_runs:
        with pytest.raises(RuntimeError, match=r"torch\.jit\.trace .* record"):
            torch.jit.trace(module, inputs(4))
    with tkernels.backend("auto"), torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, inputs(4))
        # PyTorch's operators alone: what a kernel writes would be a constant
        assert {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()} <= {"aten", "prim"}
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        loaded.load_state_dict(twin.state_dict())
        for n in (7, 2):
            given = inputs(n)
            torch.testing.assert_close(first(loaded(*given)), first(twin(*given)), atol=1e-5, rtol=1e-4)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.gate("torch")
@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
def test_export(training: bool, case: Any, request: pytest.FixtureRequest) -> None:
    module, inputs = case
    module.train(training and not any(name in request.node.name for name in DROPS))
    agree_on_tf32()
    twin, given = copy.deepcopy(module), inputs(4)
    exported = torch.export.export(module, given)
    torch.testing.assert_close(first(exported.module()(*given)), first(twin(*given)), atol=1e-5, rtol=1e-4)


def maps(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, 32, 32, 32).contiguous(memory_format=torch.channels_last),)


# a module, its input for a batch, and a batch for which a CPU has a fast path
LARGE: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]], int]] = {
    "Linear": (lambda: tnn.Linear(128, 128, activation="relu"), lambda n: (torch.randn(n, 128),), 512),
    "BatchNorm2d": (lambda: tnn.BatchNorm2d(32, activation="relu"), maps, 64),
    "ConvStage": (lambda: tnn.ConvStage([32, 32], 3, padding=1, pool=2), maps, 64),
    "CrossEntropyLoss": (
        lambda: tnn.CrossEntropyLoss(), lambda n: (torch.randn(n, 5), torch.arange(n) % 5), 1 << 16,
    ),
}  # fmt: skip


@pytest.mark.gate("torch")
@pytest.mark.parametrize("strict", (True, False), ids=("strict", "not strict"))
@pytest.mark.parametrize("name", LARGE)
def test_export_of_any_batch(name: str, strict: bool) -> None:
    """A size that decides for a fast path is no constraint on the batch."""
    agree_on_tf32()
    make, inputs, large = LARGE[name]
    module, given, few = make(), inputs(large), inputs(2)
    shapes = tuple({0: torch.export.Dim("batch")} for _ in given)
    with torch.no_grad():
        exported = torch.export.export(module, given, dynamic_shapes=shapes, strict=strict)
        torch.testing.assert_close(exported.module()(*few), copy.deepcopy(module)(*few), atol=1e-5, rtol=1e-4)


@pytest.mark.gate("torch")
@pytest.mark.parametrize("dynamo", (True, False), ids=("dynamo", "torchscript"))
def test_onnx(dynamo: bool, case: Any, request: pytest.FixtureRequest) -> None:
    onnx = pytest.importorskip("onnx", reason="install the ecosystem extra")
    pytest.importorskip("onnxscript", reason="install the ecosystem extra")
    reference = pytest.importorskip("onnx.reference", reason="install the ecosystem extra")
    if "MultiheadAttention" in request.node.name:
        pytest.skip("torch.nn's own forward, which has its own tests")
    agree_on_tf32()
    module, inputs = case
    module.eval()
    given = inputs(4)
    file = io.BytesIO()
    if dynamo:
        model = torch.onnx.export(module, given, dynamo=True, verbose=False).model_proto
    else:
        torch.onnx.export(module, given, file, dynamo=False)
        model = onnx.load_from_string(file.getvalue())
    assert {node.domain for node in model.graph.node} == {""}
    names = [i.name for i in model.graph.input]
    (found,) = reference.ReferenceEvaluator(model).run(None, {n: t.numpy() for n, t in zip(names, given)})
    torch.testing.assert_close(torch.from_numpy(found), module(*given).detach(), atol=1e-4, rtol=1e-3)
