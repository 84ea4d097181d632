"""The other registered operators: opcheck, torch.compile, dynamic batches, FLOPs, a network of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import tkernels
import tkernels.functional as F
import tkernels.nn as tnn
from models.cifar_cnn import CNNClassifier, FusedCNNClassifier
from tests.core.tracing import check_dropout_in_compile, compare_compiled, operators
from tkernels.core import mode
from tkernels.nn.conv_stage import layer_of
from tkernels.ops.conv.op import geometry

pytestmark = [pytest.mark.gate("torch", "interp", "cuda"), pytest.mark.usefixtures("tracing")]
ops = torch.ops.tkernels
# the interpreter takes seconds a convolution
slow_there = pytest.mark.extended("interp")


def draw(device: str, *shape: int, channels_last: bool = False) -> Tensor:
    t = torch.randn(*shape, device=device)
    return (t.to(memory_format=torch.channels_last) if channels_last else t).requires_grad_()


def compare(ours: Tensor, expected: Tensor, tensors: list[Tensor]) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    dy = torch.randn_like(ours)
    found = torch.autograd.grad(ours, tensors, dy)
    torch.testing.assert_close(found, torch.autograd.grad(expected, tensors, dy), rtol=1e-3, atol=1e-4)


@pytest.mark.gate("interp", "cuda")
@pytest.mark.parametrize("activation, groups, channels_last", [(None, 1, False), ("relu", 4, True), ("gelu", 2, True)])
def test_conv2ds_launches(activation: str | None, groups: int, channels_last: bool, device: str) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 4, 4, 5, device=device).to(memory_format=layout)
    w, b = torch.randn(8, 4 // groups, 3, 3, device=device), torch.randn(8, device=device)
    g = geometry(tuple(x.shape), tuple(w.shape), (1, 2), (1, 1), (1, 1), groups)
    y = torch.empty(2, 8, g.out_h, g.out_w, device=device).to(memory_format=layout)
    z = torch.empty_like(y) if activation == "gelu" else None
    packed = None if g.depthwise else torch.empty(8, g.row_pitch, device=device)
    options = list(g), activation, channels_last
    torch.library.opcheck(ops.conv2d_forward, (x, w, b, y, z, packed, *options))
    ops.conv2d_forward(x, w, b, y, z, packed, *options)
    torch.testing.assert_close(y, F.conv2d(x, w, b, (1, 2), 1, 1, groups, activation))
    dy, saved = torch.randn_like(y), None if activation is None else y if z is None else z
    for needed, dx, dw, db in (
        (x, None, torch.empty_like(w), None), (None, torch.empty_like(x), None, torch.empty_like(b)),
        (x, torch.empty_like(x), torch.empty_like(w), torch.empty_like(b)),
    ):  # fmt: skip
        torch.library.opcheck(ops.conv2d_gradients, (dy, needed, w, packed, saved, dx, dw, db, *options))


@pytest.mark.gate("interp", "cuda")
@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False), (False, False)])
def test_conv2ds_flops(needs: tuple[bool, bool], device: str) -> None:
    x, w = torch.randn(2, 4, 5, 5, device=device), torch.randn(8, 4, 3, 3, device=device)
    b = torch.randn(8, device=device, requires_grad=True)
    x.requires_grad_(needs[0])
    w.requires_grad_(needs[1])
    totals = []
    for call in (F.conv2d, torch.nn.functional.conv2d):
        with FlopCounterMode(display=False) as counter:
            call(x, w, b, 2, 1).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] == 2 * (2 * 8 * 3 * 3) * (4 * 3 * 3) * (1 + sum(needs))


@pytest.mark.gate("interp")
@pytest.mark.parametrize("channels, left", [(8, False), (256, True)])
def test_a_trace_leaves_conv2d_to_pytorch_whatever_the_batch(
    channels: int, left: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under 'auto', as an H100 would have it for many large maps: the batch is a symbol from the second one on."""
    # (in the interpreter, which stands for the GPU here, all would be ours)
    monkeypatch.setattr(mode, "asks_choosers", lambda cudnn=False: True)
    model = tnn.Conv2d(channels, channels, 3, padding=1, activation="relu", dtype=torch.bfloat16)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with tkernels.backend("auto"):
        for n in (2, 3, 4):
            compiled(torch.randn(n, channels, 4, 4, dtype=torch.bfloat16))
    assert counter.frame_count == 2
    assert operators(counter.graphs[-1]) == (set() if left else {"conv2d"})


BN = pytest.mark.parametrize("activation, residual, given, channels_last", [
    (None, False, False, False), ("relu", True, False, True), ("gelu", True, False, False), ("relu", False, True, True),
])  # fmt: skip


@pytest.mark.gate("interp", "cuda")
@pytest.mark.parametrize(
    "activation, residual, given",
    [
        pytest.param(None, False, False, marks=pytest.mark.extended("interp")),
        ("gelu", True, False),
        pytest.param("relu", False, True, marks=pytest.mark.extended("interp")),
    ],
)
def test_batch_norms_launches(activation: str | None, residual: bool, given: bool, device: str) -> None:
    # (in the interpreter NCHW takes four times as long)
    x, dy, other, y, dz = [draw(device, 3, 4, 3, 4, channels_last=True).detach() for _ in range(5)]
    added = other if residual else None
    weight, bias = torch.randn(4, device=device), torch.randn(4, device=device)
    # vectors of any strides
    running = torch.randn(4, 2, device=device)[:, 0], torch.rand(4, 2, device=device)[:, 0] + 0.5
    counter, stats = torch.tensor(3, device=device), torch.empty(4, 4, device=device)
    expected = F.batch_norm(x, *(t.clone() for t in running), weight, bias, not given, 0.1, 1e-5, activation, added)
    moved = (None, None) if given else running
    torch.library.opcheck(ops.batch_norm_statistics, (x, stats, *moved, counter, None, 1e-5))
    norm: Any = (*running, weight, bias) if given else (stats, None, weight, bias)
    if given:
        norm = tuple(t.contiguous() for t in norm)
    else:
        ops.batch_norm_statistics(x, stats, None, None, None, 0.1, 1e-5)
    torch.library.opcheck(ops.batch_norm_forward, (x, added, *norm, y, 1e-5, activation))
    ops.batch_norm_forward(x, added, *norm, y, 1e-5, activation)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    saved, saved_is = (other, "residual") if residual else (None, None)
    written = dz if residual else None, torch.empty(4, device=device), None, torch.empty(2, 4, device=device)
    options = 1e-5, activation, saved_is
    torch.library.opcheck(ops.batch_norm_gradients, (dy, x, saved, *norm, *written, *options))
    for coefficients, dx, into in ((written[-1], torch.empty_like(x), None), (None, None, dz)):
        torch.library.opcheck(
            ops.batch_norm_input_gradient, (dy, x, saved, *norm, coefficients, dx, into, *options)
        )  # fmt: skip


class Normalized(torch.nn.Module):
    def __init__(self, activation: str | None, residual: bool, given: bool, momentum: float | None) -> None:
        super().__init__()
        self.norm = tnn.BatchNorm2d(4, activation=activation, momentum=momentum)
        self.residual = residual
        self.train(not given)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x, x.sin() if self.residual else None)
        return y


@slow_there
@pytest.mark.parametrize("momentum", [0.1, None])
@BN
def test_batch_norm_compiles_with_any_batch(
    activation: str | None, residual: bool, given: bool, channels_last: bool, momentum: float | None, device: str,
    triton_runs: bool,
) -> None:  # fmt: skip
    model = Normalized(activation, residual, given, momentum).to(device)
    batches = (2, 3) if triton_runs and device == "cpu" else (2, 3, 4, 6)
    counter = compare_compiled(
        model, lambda n: draw(device, n, 4, 3, 4, channels_last=channels_last).detach(), batches, 72, device
    )
    assert counter.frame_count == 2
    assert operators(counter.graphs[-1]) == ({"batch_norm"} if triton_runs else set())


CE = pytest.mark.parametrize("reduction, probabilities", [("none", False), ("mean", True), ("sum", False)])


@pytest.mark.gate("interp", "cuda")
@CE
def test_cross_entropys_launches(reduction: str, probabilities: bool, device: str) -> None:
    x, weight = torch.randn(4, 5, 3, device=device), torch.rand(5, device=device)
    target = torch.rand(4, 5, 3, device=device) if probabilities else torch.randint(0, 5, (4, 3), device=device)
    loss = torch.empty((4, 3) if reduction == "none" else (), device=device)
    stats = torch.empty(3, 12, device=device)
    count = torch.empty((), device=device) if reduction == "mean" else None
    options = -100, reduction, 0.1
    torch.library.opcheck(ops.cross_entropy_forward, (x, target, weight, loss, stats, count, *options))
    ops.cross_entropy_forward(x, target, weight, loss, stats, count, *options)
    torch.testing.assert_close(loss, F.cross_entropy(x, target, weight, *options))
    given = loss, x, target, weight, stats, count
    torch.library.opcheck(ops.cross_entropy_gradient, (*given, torch.empty_like(x), *options))
    if probabilities:
        given = loss, x, weight, stats, count
        torch.library.opcheck(ops.cross_entropy_target_gradient, (*given, torch.empty_like(x), reduction, 0.1))


class Loss(torch.nn.Module):
    def __init__(self, reduction: str, probabilities: bool) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(7, 5)
        self.options: Any = -100, reduction, 0.1
        self.probabilities = probabilities
        self.register_buffer("weight", torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        target = y.softmax(1) if self.probabilities else torch.arange(x.shape[0], device=x.device).remainder(5)
        return F.cross_entropy(y, target, self.weight, *self.options)


@CE
def test_cross_entropy_compiles_with_any_batch(
    reduction: str, probabilities: bool, device: str, triton_runs: bool
) -> None:
    model = Loss(reduction, probabilities).to(device)
    counter = compare_compiled(model, lambda n: torch.randn(n, 7), (2, 3, 4, 6), 35, device)
    # (PyTorch 2.11 compiles its own mean over probabilities anew for each batch)
    old = tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 14)
    assert counter.frame_count == 2 or (old and not triton_runs and probabilities)
    assert operators(counter.graphs[-1]) == ({"cross_entropy"} if triton_runs else set())


class Calls(TorchDispatchMode):
    """Notes the calls of registered operators, which a FLOP counter has passes go through."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "tkernels":
            self.seen.append((func, tree_map_only(Tensor, lambda t: t.detach().clone(), args)))
        return func(*args, **(kwargs or {}))


@pytest.mark.gate("interp", "cuda")
@slow_there
@pytest.mark.parametrize("given, pool, kernel, names, adds", [
    (False, True, 3, ("relu", "relu"), False), (True, False, 1, ("silu", "relu"), True),
    (False, False, 1, ("relu", "hardswish"), True), (False, False, 3, (None, None), True),
    (False, True, 1, ("relu6", "silu"), False),
])  # fmt: skip
def test_conv_stages_passes(
    given: bool, pool: bool, kernel: int, names: tuple[str | None, ...], adds: bool, device: str
) -> None:
    x = draw(device, 2, 3, 4, 4)
    layers = []
    for c_in, c_out, size, name, eps in ((3, 8, 3, names[0], 1e-5), (8, 4, kernel, names[1], 1e-4)):
        running = torch.randn(c_out, device=device), torch.rand(c_out, device=device) + 0.5
        counter = torch.tensor(3, device=device)
        layers.append(
            F.ConvBNLayer(draw(device, c_out, c_in, size, size), *(draw(device, c_out) for _ in range(3)), *running,
                          counter, padding="same", momentum=None if size == 1 else 0.1, eps=eps, activation=name)
        )  # fmt: skip
    residual = draw(device, 2, 4, 4, 4) if adds else None
    moved = [t for layer in layers for t in layer[4:7] if t is not None]
    before = [t.clone() for t in moved]
    leaves = [x, *(t for layer in layers for t in layer[:4] if t is not None)]
    leaves += [] if residual is None else [residual]

    def run(differentiates: bool) -> list[Tensor]:
        for t, value in zip(moved, before):
            t.copy_(value)
        torch.manual_seed(0)
        with torch.set_grad_enabled(differentiates):
            y = F.conv_stage(x, layers, 2 if pool else None, 0.5 if pool else 0.0, not given, residual)
        gradients = torch.autograd.grad(y, leaves, torch.randn_like(y)) if differentiates else ()
        return [y, *gradients, *(t.clone() for t in moved)]

    forward, backward = ops.conv_stage_forward.default, ops.conv_stage_backward.default
    seen = []
    for differentiates, expected_calls in ((True, [forward, backward]), (False, [forward])):
        expected = run(differentiates)
        with FlopCounterMode(display=False), Calls() as calls:
            torch.testing.assert_close(run(differentiates), expected)
        assert [call[0] for call in calls.seen] == expected_calls
        seen += calls.seen
    for operator, arguments in seen:
        torch.library.opcheck(operator, arguments)


class Everything(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage = tnn.ConvStage([3, 4, 4], 3, padding=1, pool=2)
        self.conv = tnn.Conv2d(4, 6, 2, padding="same", activation="relu")
        self.norm = tnn.BatchNorm2d(6, activation="relu", momentum=None)
        self.fc = tnn.Linear(6, 5)
        self.loss = tnn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.stage(x))
        target = torch.arange(x.shape[0], device=x.device).remainder(5)
        return self.loss(self.fc(self.norm(y, y).mean((2, 3))), target)


@slow_there
@pytest.mark.parametrize("training", [True, False])
def test_compile_with_any_batch(training: bool, device: str, triton_runs: bool) -> None:
    model = Everything().to(device).train(training)
    batches = (2, 3) if triton_runs and device == "cpu" else (2, 3, 4, 6)
    counter = compare_compiled(model, lambda n: torch.randn(n, 3, 4, 4), batches, 900, device)
    assert counter.frame_count == 2  # the second size makes the batch dynamic, and that serves the others
    expected = {"conv_stage", "conv2d", "batch_norm", "linear", "cross_entropy"} if triton_runs else set()
    assert operators(counter.graphs[-1]) == expected


class Block(torch.nn.Module):
    """The end of a residual block, another activation than ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        layer = layer_of(self.conv, self.norm)._replace(activation="silu")
        return F.conv_stage(x, [layer], training=self.training, residual=x)


@slow_there
@pytest.mark.parametrize("training", [True, False])
def test_compile_a_residual_block(training: bool, device: str, triton_runs: bool) -> None:
    model = Block().to(device).train(training)
    counter = compare_compiled(model, lambda n: torch.randn(n, 4, 4, 5), (2, 3), 900, device)
    assert operators(counter.graphs[-1]) == ({"conv_stage"} if triton_runs else set())


def _twice(x: Tensor) -> Tensor:
    return F.conv2d(x, x)


TWICE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "batch_norm": lambda x, weight: F.batch_norm(x, None, None, weight, weight, True, residual=x).square(),
    "linear": lambda x, weight: F.linear(x, x, weight),
    "conv2d": lambda x, weight: _twice(x[:, :, None, None]).flatten(1) * weight,
    "matmul": lambda x, weight: F.matmul(x, x) * weight,
    "cross_entropy": lambda x, weight: F.cross_entropy(x, x) * weight,
}


@pytest.mark.parametrize(
    "name", [pytest.param("batch_norm", marks=slow_there), "linear", "conv2d", "matmul", "cross_entropy"]
)
def test_compile_with_the_same_tensor_twice(name: str, device: str) -> None:
    x = torch.rand(4, 4, device=device, requires_grad=True)
    weight = torch.rand(4, device=device, requires_grad=True)
    call = TWICE[name]
    compare(torch.compile(call, backend="aot_eager", fullgraph=True)(x, weight), call(x, weight), [x, weight])


@slow_there
def test_conv_stage_draws_dropout_anew_in_compile(device: str) -> None:
    check_dropout_in_compile(tnn.ConvStage([3, 16], 1, dropout=0.5).to(device), torch.randn(8, 3, 2, 2, device=device))


@slow_there
def test_autocast_in_compile(device: str) -> None:
    model = Everything().to(device)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 4, 4, device=device)
    with torch.autocast(device, dtype=torch.float16 if device == "cuda" else torch.bfloat16):
        loss = compiled(x)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@slow_there
def test_inductor(device: str) -> None:
    model = FusedCNNClassifier(width=2, image_size=8, dropout2d=0.0).to(device)
    x = torch.randn(3, 3, 8, 8, device=device)
    y = torch.compile(model.eval(), fullgraph=True)(x)
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)


@slow_there
def test_flops_are_those_of_the_plain_network(device: str) -> None:
    plain, fused = (cls(width=4, image_size=8).to(device) for cls in (CNNClassifier, FusedCNNClassifier))
    totals = []
    for model in (plain, fused):
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(2, 3, 8, 8, device=device)).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0
