"""tkernels.fuse on networks of torchvision and on forwards of every kind: same results, same state_dict, undone."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tkernels
import tkernels.nn as tnn
from models.cifar_cnn import CNNClassifier, FusedCNNClassifier
from tests.tolerance import assert_close, bound

pytestmark = pytest.mark.gate("torch", "cuda")

# (network, image size, chains: what a reader counts in its source)
NETWORKS = [
    ("resnet18", 32, 17),  # the stem, and two in each of eight blocks
    ("resnet50", 32, 33),  # the stem, and in each of sixteen blocks one of two layers and one with the residual
    ("vgg16_bn", 32, 7),  # five stages, two hidden linear layers
    ("mobilenet_v2", 32, 0),  # ReLU6 is not among the fused activations
    ("densenet121", 32, 120),  # the stem, two in each of 58 layers, a batch norm in each of three transitions
    ("convnext_tiny", 32, 18),  # linear -> GELU in each block
]
QUICK = ("resnet18",)


def networks(name: str, device: str) -> tuple[nn.Module, nn.Module]:
    """The network and a fused copy; without dropout, which would draw differently on a GPU."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0
    model = model.to(device)
    return model, tkernels.fuse(copy.deepcopy(model))


@pytest.mark.parametrize("name, size, chains", NETWORKS)
def test_chains_found(name: str, size: int, chains: int) -> None:
    with torch.device("meta"):
        model = tkernels.fuse(getattr(torchvision.models, name)(weights=None))
    assert len(tkernels.fusion_report(model).fused) == chains


def _train(model: nn.Module, x: Tensor, target: Tensor, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()


@pytest.mark.parametrize("name, size", [(name, size) for name, size, _ in NETWORKS if name in QUICK])
def test_network_equals_the_original(name: str, size: int, device: str) -> None:
    _compare(name, size, device)


@pytest.mark.extended("torch", "cuda")
@pytest.mark.parametrize("name, size", [(name, size) for name, size, _ in NETWORKS if name not in QUICK])
def test_larger_network_equals_the_original(name: str, size: int, device: str) -> None:
    _compare(name, size, device)


def _compare(name: str, size: int, device: str) -> None:
    """Three steps of training, then evaluation: gradients, running statistics and outputs.

    On a GPU the original in float64 is the measure, and PyTorch's own distance from it says how much the network
    amplifies rounding; on a CPU both run the same products.
    """
    model, fused = networks(name, device)
    exact = copy.deepcopy(model).double() if device == "cuda" else model
    x, target = torch.randn(4, 3, size, size, device=device), torch.arange(4, device=device)
    for network in {model, fused, exact}:
        _train(network, x.double() if network is exact is not model else x, target, 3)
    # the longest sum: a weight's gradient over the first map's pixels, through all layers after it
    reduction = x.shape[0] * size * size

    def compare(ours: Tensor, theirs: Tensor, truth: Tensor, name: str) -> None:
        dtype = theirs.dtype if theirs.is_floating_point() else torch.float32  # a counter
        theirs, truth = theirs.detach().double(), truth.detach().double()
        amplified = (theirs - truth).abs().max().item() / bound(dtype, reduction)
        assert_close(ours, truth, reduction, dtype=dtype, scale=max(1e-2, 4 * amplified), name=name)

    ours, truths = dict(fused.named_parameters()), dict(exact.named_parameters())
    for key, parameter in model.named_parameters():
        gradients = [p.grad for p in (ours[key], parameter, truths[key])]
        assert all(g is not None for g in gradients), key
        compare(*gradients, f"gradient of {key}")
    state, truth = fused.state_dict(), exact.state_dict()
    assert list(state) == list(model.state_dict())
    for key, value in model.state_dict().items():
        compare(state[key], value, truth[key], key)
    fused.load_state_dict(model.state_dict())
    model.load_state_dict(fused.state_dict())
    model.eval()
    fused.eval()
    with torch.no_grad():
        assert_close(fused(x), model(x).double(), reduction, name="evaluation")


def test_report_of_resnet18_has_every_conv_bn_relu(capsys: pytest.CaptureFixture[str]) -> None:
    model = tkernels.fuse(torchvision.models.resnet18(weights=None), report=True)
    report = tkernels.fusion_report(model)
    assert str(report) in capsys.readouterr().out
    expected = {("", "conv1 -> bn1 -> relu -> maxpool")}
    for stage in range(1, 5):
        for block in range(2):
            expected.add((f"layer{stage}.{block}", "conv1 -> bn1 -> relu"))
            expected.add((f"layer{stage}.{block}", "conv2 -> bn2 -> add -> relu"))
    assert set(report.fused) == expected
    # what is left has no ReLU after it
    assert {name for name, _ in report.left} == {"fc", *(f"layer{i}.0.downsample.0" for i in (2, 3, 4))}


def test_cifar_cnn_equals_the_hand_fused_one(device: str) -> None:
    torch.manual_seed(0)
    plain = tkernels.fuse(CNNClassifier(width=4).to(device))
    report = tkernels.fusion_report(plain)
    assert ("stage1", "conv1 -> bn1 -> relu1 -> conv2 -> bn2 -> relu2 -> pool -> dropout") in report.fused
    assert len(report.fused) == 5
    by_hand = FusedCNNClassifier(width=4).to(device)
    by_hand.load_state_dict(plain.state_dict())
    x = torch.randn(6, 3, 32, 32, device=device)
    for training in (True, False):
        outputs = []
        for model in (plain, by_hand):
            model.train(training)
            torch.manual_seed(5)  # dropout draws alike: the calls are the same
            outputs.append(model(x))
        # the last layer, which has nothing to be fused with, is PyTorch's in the fused network: its product by cuBLAS
        exactly = {"rtol": 0.0, "atol": 0.0} if device == "cpu" else {}
        torch.testing.assert_close(*outputs, **exactly)


class Block(nn.Module):
    """Functions instead of modules, a residual, a layer used twice, dropout that asks self.training."""

    p = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.norm = nn.BatchNorm2d(4, momentum=None)
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)
        z = (self.norm(y) + y * scale).relu()
        return F.dropout(F.gelu(self.fc(torch.flatten(z, 1))), self.p, self.training)


def _check_block(model: nn.Module, original: nn.Module, device: str, **kwargs: Any) -> None:
    x = torch.randn(3, 3, 8, 8, device=device)
    results = []
    for network in (model, original):
        torch.manual_seed(3)
        results.append(network(x, **kwargs))
    torch.testing.assert_close(*results)


@pytest.fixture
def block(device: str) -> nn.Module:
    torch.manual_seed(0)
    block = Block().to(device)
    if device == "cuda":
        block.p = 0.0  # kernels draw other masks than PyTorch
    return block


def test_functions_and_modes(block: nn.Module, device: str) -> None:
    fused = tkernels.fuse(copy.deepcopy(block))
    assert [what for _, what in tkernels.fusion_report(fused).fused] == [
        "conv -> bn -> relu -> pool", "norm -> add -> relu", "fc -> gelu -> dropout",
    ]  # fmt: skip
    for training in (True, False, True):
        _check_block(fused.train(training), block.train(training), device)
    _check_block(fused, block, device, scale=2.0)  # not what was traced: the model's own forward runs
    torch.testing.assert_close(fused.state_dict(), block.state_dict())


def test_objects_stay_the_same(block: nn.Module) -> None:
    parameters, keys, conv = list(block.parameters()), list(block.state_dict()), block.conv
    fused = tkernels.fuse(block)
    assert fused is block
    assert isinstance(fused, Block)
    assert fused.conv is conv
    assert all(a is b for a, b in zip(fused.parameters(), parameters))
    assert list(fused.state_dict()) == keys
    assert type(fused) is not Block
    assert tkernels.unfuse(fused) is block
    assert type(block) is Block
    with pytest.raises(ValueError, match="not fused"):
        tkernels.fusion_report(block)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "save"])
def test_copies_and_pickles_stay_fused(block: nn.Module, duplicate: Any, device: str) -> None:
    fused = tkernels.fuse(block)
    if duplicate == "save":
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = duplicate(fused)
    assert type(twin).forward is not Block.forward
    assert twin.conv is not fused.conv
    _check_block(twin, fused, device)
    assert type(tkernels.unfuse(twin)) is Block


def test_layers_with_hooks_are_left_alone(block: nn.Module, device: str) -> None:
    calls: list[int] = []
    block.bn.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="hooks on bn"):
        fused = tkernels.fuse(block)
    assert "norm -> add -> relu" in str(tkernels.fusion_report(fused))
    fused(torch.randn(3, 3, 8, 8, device=device))
    assert calls == [1]


def test_hooks_registered_later_run(block: nn.Module, device: str) -> None:
    fused = tkernels.fuse(copy.deepcopy(block))
    calls: list[int] = []
    fused.conv.register_forward_pre_hook(lambda *_: calls.append(1))
    _check_block(fused, block, device)
    assert calls == [1]


class Branches(Block):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class Draws(Block):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * torch.rand(())


class Counts(Block):
    calls = 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return super().forward(x)


class SwitchesOff(Block):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        with torch.no_grad():
            y = self.bn(self.conv(x))
        return y.relu()


class Casts(Block):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


class Checkpoints(Block):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return y


class TakesAnything(Block):
    def forward(self, *args: Any) -> Tensor:
        return super().forward(*args)


@pytest.mark.parametrize("cls, reason", [
    (Branches, "can't be traced"), (Draws, "draws random"), (Counts, "changes attributes"), (TakesAnything, "args"),
    (SwitchesOff, "switches"), (Casts, "switches"), (Checkpoints, "checkpointing"),
])  # fmt: skip
def test_what_cannot_be_traced_is_left(cls: type[nn.Module], reason: str, device: str) -> None:
    inner = cls().to(device)
    model = tkernels.fuse(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), inner).to(device))
    report = tkernels.fusion_report(model)
    assert report.fused == [("", "0 -> 1")]
    assert reason in dict(report.left)["2"]
    assert type(inner) is cls
    assert getattr(inner, "calls", 0) == 0
    model(torch.randn(2, 3, 8, 8, device=device))


class TakesEither(nn.Module):
    """As densenet's layers: a tensor or a list of them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Any) -> Tensor:
        parts = [x] if isinstance(x, Tensor) else x
        return F.relu(self.norm(torch.cat(parts, 1)))


def test_a_forward_that_asks_for_types(device: str) -> None:
    model = tkernels.fuse(TakesEither().to(device))
    assert len(tkernels.fusion_report(model).fused) == 1
    x = torch.randn(2, 4, 3, 3, device=device)
    torch.testing.assert_close(model(x), model([x[:, :1], x[:, 1:]]))


def test_in_place_writes_between_layers_prevent_fusion(device: str) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 3, 1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            x.mul_(2.0)
            return self.relu(y) + x

    model = tkernels.fuse(Writes())
    assert tkernels.fusion_report(model).fused == []
    assert "in place" in tkernels.fusion_report(model).left[0][1]


def test_broadcast_residual(device: str) -> None:
    class Broadcasts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return F.relu(self.norm(x) + gate)

    model = Broadcasts().to(device)
    fused = tkernels.fuse(copy.deepcopy(model))
    assert len(tkernels.fusion_report(fused).fused) == 1
    x, gate = torch.randn(2, 4, 3, 3, device=device), torch.randn(2, 4, 1, 1, device=device)
    torch.testing.assert_close(fused(x, gate), model(x, gate))


def test_losses(device: str) -> None:
    class WithLoss(nn.Module):
        def __init__(self, loss: Callable[..., Tensor] | None) -> None:
            super().__init__()
            self.loss = loss

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            if self.loss is None:
                return F.cross_entropy(x, target, label_smoothing=0.1)
            return self.loss(x, target)

    x, target = torch.randn(4, 5, device=device), torch.arange(4, device=device)
    for loss in (None, nn.CrossEntropyLoss(label_smoothing=0.1)):
        model = tkernels.fuse(WithLoss(loss).to(device))
        assert [what for _, what in tkernels.fusion_report(model).fused] == ["cross entropy"]
        torch.testing.assert_close(model(x, target), F.cross_entropy(x, target, label_smoothing=0.1))
        assert loss is None or type(loss) is tnn.CrossEntropyLoss
        tkernels.unfuse(model)
        assert loss is None or type(loss) is nn.CrossEntropyLoss


def test_compile_and_export(block: nn.Module, device: str) -> None:
    fused = tkernels.fuse(copy.deepcopy(block)).eval()
    x = torch.randn(3, 3, 8, 8, device=device)
    # export reads cuDNN's float32 switch by its old name, which must agree with the new ones the suite sets
    # (the attribute is frozen once torch.testing was imported)
    torch._C._set_cudnn_allow_tf32(False)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), block.eval()(x))
    torch.testing.assert_close(torch.export.export(fused, (x,)).module()(x), block(x))


def test_not_a_module() -> None:
    with pytest.raises(TypeError, match="model must be"):
        tkernels.fuse(torch.relu)  # type: ignore[type-var]
