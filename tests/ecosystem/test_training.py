"""Fused models in Lightning, Accelerate and timm: steps of training each, beside the plain model's."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tkernels
import tkernels.nn as tnn
from models.cifar_cnn import CNNClassifier
from tests.fusion.pairs import both, close, ran

pytestmark = [
    pytest.mark.gate("torch"),
    pytest.mark.filterwarnings("ignore:tkernels.fuse. a call of .* ran no fused operator"),  # counted, where it matters
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
]
REASON = "install the ecosystem group"


@pytest.fixture(autouse=True)
def _leaves_no_process_group() -> Iterator[None]:
    """Trainers of one process may start a group of it, and name it in the environment."""
    before = dict(os.environ)
    yield
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def network() -> nn.Module:
    return CNNClassifier(5, width=4, image_size=16, dropout2d=0.0, dropout=0.0)


# chains of a CNNClassifier that a CPU fuses: its convolutions
CHAINS = 5


def images(n: int = 8, size: int = 16) -> DataLoader[Any]:
    x = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(2)).to(memory_format=torch.channels_last)
    return DataLoader(TensorDataset(x, torch.arange(n) % 5), batch_size=n // 2, collate_fn=_collated)


def _collated(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, target = (torch.stack(column) for column in zip(*samples))
    return x.contiguous(memory_format=torch.channels_last), target


def assert_trained_alike(fused: nn.Module, model: nn.Module, before: nn.Module) -> None:
    close(fused.state_dict(), model.state_dict(), "state", 1e-3)
    for name, p in fused.named_parameters():
        # a bias before batch norm has no gradient but rounding errors
        if name.endswith("weight"):
            assert not torch.equal(p, before.get_parameter(name)), name


def fit(model: nn.Module, directory: Path, **options: Any) -> Any:
    """Two steps of Lightning's."""
    lightning = pytest.importorskip("lightning", reason=REASON)

    class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.loss = tnn.CrossEntropyLoss(label_smoothing=0.1)
            self.kinds: set[type] = set()

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, target = batch
            self.kinds |= {type(module) for module in self.model.modules()}
            loss: Tensor = self.loss(self.model(x), target)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=True, default_root_dir=directory, **options,
    )  # fmt: skip
    module = Classifier()
    try:
        trainer.fit(module, images())
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert trainer.global_step == 2
    return module


@pytest.mark.parametrize("synchronised", [True, False])
def test_lightning(synchronised: bool, tmp_path: Path) -> None:
    model, fused = both(network, "cpu")
    before = copy.deepcopy(model)
    for each in (model, fused):
        fit(each, tmp_path, sync_batchnorm=synchronised)  # (one process: nothing is converted)
    assert_trained_alike(fused, model, before)
    assert ran(fused) == 2 * CHAINS


def test_lightning_converts_a_fused_model(tmp_path: Path) -> None:
    """sync_batchnorm under DDP, whose conversion comes after fuse(): torch's, which refuses CPUs, and ours."""
    strategies = pytest.importorskip("lightning.pytorch.strategies", reason=REASON)
    plugins = pytest.importorskip("lightning.pytorch.plugins", reason=REASON)

    class Ours(plugins.LayerSync):  # type: ignore[misc, name-defined]
        def apply(self, model: nn.Module) -> nn.Module:
            return tnn.SyncBatchNorm.convert_sync_batchnorm(model)

        def revert(self, model: nn.Module) -> nn.Module:
            return model

    model, fused = both(network, "cpu")
    before = copy.deepcopy(model)
    for each in (model, fused):
        with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
            fit(copy.deepcopy(each), tmp_path, sync_batchnorm=True,
                strategy=strategies.DDPStrategy(process_group_backend="gloo"))  # fmt: skip
        strategy = strategies.DDPStrategy(process_group_backend="gloo")
        module = fit(each, tmp_path, plugins=[Ours()], strategy=strategy)
        assert tnn.SyncBatchNorm in module.kinds
        assert nn.BatchNorm2d not in module.kinds
    assert_trained_alike(fused, model, before)


@pytest.fixture
def accelerate() -> Iterator[Any]:
    """Without the state that it keeps for a process."""
    found = pytest.importorskip("accelerate", reason=REASON)
    found.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield found
    found.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate(accelerate: Any) -> None:
    model, fused = both(network, "cpu")
    before = copy.deepcopy(model)
    for each in (model, fused):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer: Any = torch.optim.SGD(each.parameters(), lr=0.1)
        prepared, optimizer, loader = accelerator.prepare(each, optimizer, images(16))
        steps = 0
        for _ in range(2):
            for x, target in loader:
                with accelerator.accumulate(prepared):
                    loss = tkernels.functional.cross_entropy(
                        prepared(x.contiguous(memory_format=torch.channels_last)), target
                    )
                    accelerator.backward(loss)
                    accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                    steps += accelerator.sync_gradients
        assert steps == 2
        assert accelerator.unwrap_model(prepared) is each
    assert_trained_alike(fused, model, before)
    assert ran(fused) == 4 * CHAINS


def test_accelerate_with_bfloat16(accelerate: Any) -> None:
    """It wraps forward in autocast, on the instance."""
    model, fused = both(network, "cpu")
    before = copy.deepcopy(model)
    for each in (model, fused):
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        optimizer: Any = torch.optim.SGD(each.parameters(), lr=0.01)
        prepared, optimizer = accelerator.prepare(each, optimizer)
        for x, target in images(16):
            accelerator.backward(F.cross_entropy(prepared(x), target))
            optimizer.step()
            optimizer.zero_grad()
    close(fused.state_dict(), model.state_dict(), "state", 3e-2)
    assert not torch.equal(fused.get_parameter("stage1.conv1.weight"), before.get_parameter("stage1.conv1.weight"))
    assert ran(fused) == 2 * CHAINS


def train(model: nn.Module, batches: DataLoader[Any]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for x, target in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()


@pytest.mark.parametrize("name, chains", [
    # (network, chains of a training step on a CPU). timm's norms with activations are classes of its own
    ("resnet18", 20), ("test_efficientnet", 13), ("test_resnet", 15), ("test_byobnet", 14),
])  # fmt: skip
def test_timm(name: str, chains: int) -> None:
    timm = pytest.importorskip("timm", reason=REASON)
    model, fused = both(lambda: timm.create_model(name, num_classes=5), "cpu")
    for each in (model, fused):
        train(each, images(8, 32))
    close(fused.state_dict(), model.state_dict(), "state", 1e-3)
    assert ran(fused) == 2 * chains


def test_timms_tools() -> None:
    """Moving averages, and norms frozen and set free: modules of its own in the place of others."""
    timm = pytest.importorskip("timm", reason=REASON)
    model, fused = both(lambda: timm.create_model("test_efficientnet", num_classes=5), "cpu")
    for each in (model, fused):
        train(each, images(8, 32))
        ema = timm.utils.ModelEmaV3(each, decay=0.5)
        ema.update(each)
        close(ema.module.state_dict(), each.state_dict(), "average")
    before = ran(fused)
    for change, chains in ((timm.layers.freeze_batch_norm_2d, 0), (timm.layers.unfreeze_batch_norm_2d, 13)):
        model, fused = change(model), change(fused)
        for each in (model, fused):
            train(each, images(8, 32))
        close(fused.state_dict(), model.state_dict(), change.__name__, 1e-3)
        assert ran(fused) - before == 2 * chains
