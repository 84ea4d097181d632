"""What people do to modules with torch's own tools, done to ours: AMP, accumulation, parametrisations, copies, ONNX."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, parametrizations, parametrize

import tkernels.nn as tnn
from models.cifar_cnn import FusedCNNClassifier
from tests.tolerance import assert_close

pytestmark = pytest.mark.gate("torch", "cuda")


def network(device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        tnn.ConvStage([3, 4, 4], 3, padding=1, pool=2), tnn.ConvBNReLU2d(4, 4, 1),
        tnn.Conv2d(4, 4, 3, activation="silu"),
        tnn.BatchNorm2d(4, activation="relu"), nn.Flatten(), tnn.Linear(16, 5, activation="gelu"),
    ).to(device)  # fmt: skip


def draw(device: str, n: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 8, 8, device=device), torch.arange(n, device=device) % 5


def test_autocast_with_grad_scaler(device: str) -> None:
    model, (x, target) = network(device), draw(device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_function = tnn.CrossEntropyLoss()
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16):
            y = model(x)
            loss = loss_function(y, target)
        assert y.dtype == torch.bfloat16
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_gradients_accumulate(device: str) -> None:
    model, (x, target) = network(device).eval(), draw(device)  # batch norm by running statistics: images independent
    loss = tnn.CrossEntropyLoss(reduction="sum")
    loss(model(x), target).backward()
    whole = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        loss(model(x[half]), target[half]).backward()
    for parameter, expected in zip(model.parameters(), whole):
        assert parameter.grad is not None
        assert_close(parameter.grad, expected.double(), 4 * 64, scale=1.0)


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrizations(norm: Any, device: str) -> None:
    ours, theirs = tnn.Conv2d(3, 4, 3, activation="relu").to(device), nn.Conv2d(3, 4, 3).to(device)
    theirs.load_state_dict(ours.state_dict())
    for module in (ours, theirs):
        torch.manual_seed(1)
        norm(module)
    x, _ = draw(device)
    y, expected = ours.eval()(x), torch.relu(theirs.eval()(x))
    assert_close(y, expected.double(), 27)
    y.sum().backward()
    assert all(p.grad is not None for p in ours.parameters())
    parametrize.remove_parametrizations(ours, "weight")
    assert type(ours) is tnn.Conv2d
    assert_close(ours(x), expected.double(), 27)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies(way: str, device: str) -> None:
    model, (x, _) = network(device).eval(), draw(device)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(x), model(x))
    assert str(twin) == str(model)


def test_meta_device_initialisation(device: str) -> None:
    with torch.device("meta"):
        model = FusedCNNClassifier(5, width=4, image_size=8)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device=device)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    y = model(draw(device)[0])
    assert y.device.type == device
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_memory_format(memory_format: torch.memory_format, device: str) -> None:
    model = nn.Sequential(tnn.ConvBNReLU2d(3, 4, 3), tnn.Conv2d(4, 4, 3, activation="relu")).to(device)
    x, _ = draw(device)
    expected = model(x)
    y = model.to(memory_format=memory_format)(x.to(memory_format=memory_format))
    assert y.is_contiguous(memory_format=memory_format)
    assert_close(y, expected.double(), 36)
    y.sum().backward()


def test_conv_bn_folding(device: str) -> None:
    conv, norm = tnn.Conv2d(3, 4, 3, bias=False).to(device), tnn.BatchNorm2d(4).to(device)
    x, _ = draw(device)
    norm(conv(x))
    conv.eval()
    norm.eval()
    folded = nn.utils.fusion.fuse_conv_bn_eval(conv, norm)
    assert type(folded) is tnn.Conv2d
    assert_close(folded(x), norm(conv(x)).double(), 27)


@pytest.mark.gate("torch")
def test_onnx_has_standard_operators() -> None:
    onnx = pytest.importorskip("onnx", reason="install the ecosystem group")
    pytest.importorskip("onnxscript", reason="install the ecosystem group")
    model = network("cpu").eval()
    # export reads cuDNN's float32 switch by its old name, which must agree with the new ones the suite sets
    # (the attribute is frozen once torch.testing was imported)
    torch._C._set_cudnn_allow_tf32(False)
    program = torch.onnx.export(model, draw("cpu")[:1], dynamo=True, verbose=False)
    assert program is not None
    onnx.checker.check_model(program.model_proto)
    assert {node.domain for node in program.model_proto.graph.node} == {""}
    kinds = {node.op_type for node in program.model_proto.graph.node}
    assert {"Conv", "Relu", "MaxPool", "Gemm"} <= kinds
