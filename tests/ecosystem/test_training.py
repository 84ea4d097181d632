"""Our modules and fused models in Lightning, Accelerate and timm: two steps of training each."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tkernels
import tkernels.nn as tnn
from models.cifar_cnn import CNNClassifier

pytestmark = pytest.mark.gate("torch")
REASON = "install the ecosystem extra"


def images(n: int = 8, size: int = 16) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(n, 3, size, size), torch.arange(n) % 5), batch_size=n // 2)


def fused_cnn() -> nn.Module:
    return tkernels.fuse(CNNClassifier(5, width=4, image_size=16))


def moved(before: dict[str, Tensor], model: nn.Module) -> bool:
    """Whether every parameter has changed, and stayed finite."""
    return all(
        torch.isfinite(p).all() and not torch.equal(p.cpu(), before[name].cpu()) for name, p in model.named_parameters()
    )


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason=REASON)

    class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = fused_cnn()
            self.loss = tnn.CrossEntropyLoss(label_smoothing=0.1)

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, target = batch
            return self.loss(self.model(x), target)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Classifier()
    # a convolution's bias before batch norm has no gradient but rounding errors
    before = copy.deepcopy(module.state_dict())
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=True, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, images())
    assert trainer.global_step == 2
    weights = {name: t for name, t in before.items() if name.endswith("weight")}
    assert all(not torch.equal(module.state_dict()[name], t) for name, t in weights.items())
    assert module.state_dict()["model.stage1.bn1.num_batches_tracked"] == 2


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate", reason=REASON)

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = fused_cnn()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, images(16))
    before = copy.deepcopy(model.state_dict())
    steps = 0
    for _ in range(2):
        for x, target in loader:
            with accelerator.accumulate(model):
                loss = tkernels.functional.cross_entropy(model(x), target)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                steps += accelerator.sync_gradients
    assert steps == 2
    assert not torch.equal(model.state_dict()["stage1.conv1.weight"], before["stage1.conv1.weight"])
    unwrapped = accelerator.unwrap_model(model)
    assert isinstance(unwrapped, CNNClassifier)


def test_timm() -> None:
    timm = pytest.importorskip("timm", reason=REASON)

    torch.manual_seed(0)
    plain = timm.create_model("resnet18", num_classes=5)
    model = tkernels.fuse(copy.deepcopy(plain))
    found = tkernels.fusion_report(model).fused
    # timm's batch norms with activations are its own classes; its resnets keep torch.nn's
    assert len(found) >= 9
    for network in (plain, model):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        for x, target in images(8, 32):
            optimizer.zero_grad()
            tnn.CrossEntropyLoss()(network(x), target).backward()
            optimizer.step()
        torch.manual_seed(0)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert model.state_dict()["bn1.num_batches_tracked"] == 2
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    ema.update(model)
    torch.testing.assert_close(ema.module.state_dict()["conv1.weight"], model.state_dict()["conv1.weight"])
