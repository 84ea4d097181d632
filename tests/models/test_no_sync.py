"""Nothing in a training step on the kernels waits for the device or makes a tensor on the host: it can be captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tkernels.nn as tnn
from models.cifar_cnn import FusedCNNClassifier
from models.engine import Totals, TrainingStep
from models.recipes import OPTIMIZERS, build_optimizer
from perf.static import host
from tests.models.stand_in_gpu import as_on_a_gpu

pytestmark = pytest.mark.gate("torch")

ASK_THE_DEVICE = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique2", "masked_select"}
# methods that are no ATen call, or none where the tensor is on the CPU already
ASKING_METHODS = ("cpu", "numpy", "tolist", "item", "__bool__", "__float__", "__int__", "__len__", "pin_memory")


class Waits(AssertionError):
    """Something in the step would have waited for the device, or made a tensor on the host."""


class Watch(TorchDispatchMode):
    """Tensors made without a device come to the meta device, the stand-in for the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ASK_THE_DEVICE:
            raise Waits(name)
        if of_host((args, kwargs)):
            raise Waits(f"{name} takes a tensor of the host")
        results = func(*args, **(kwargs or {}))
        if of_host(results):
            raise Waits(f"{name} makes a tensor of the host")
        return results


def of_host(tree: Any) -> bool:
    return any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves(tree))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], object]], None]]:
    """Runs a function on the stubbed driver, watched."""

    def raising(name: str) -> Callable[..., None]:
        def method(*args: Any, **kwargs: Any) -> None:
            raise Waits(name)

        return method

    def go(body: Callable[[], object]) -> None:
        with monkeypatch.context() as patch:
            for name in ASKING_METHODS:
                patch.setattr(Tensor, name, raising(name))
            patch.setattr(torch.cuda, "synchronize", raising("synchronize"))
            with torch.device("meta"), Watch():
                body()

    as_on_a_gpu(monkeypatch)
    with host.stubbed_driver(lambda *made: launches.append(made)):
        yield go


launches: list[object] = []


def step_of(model: nn.Module, name: str = "adam", momentum: float = 0.9) -> Callable[[], None]:
    """A training step with loss, clipping, optimizer and the epoch's sums, its kernels compiled and its state made."""
    model = model.to(torch.bfloat16).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(name, model, torch.tensor(1e-3), momentum, 1e-4, True)
    step = TrainingStep(model, tnn.CrossEntropyLoss(label_smoothing=0.1), optimizer, clip=1.0)
    images = torch.zeros(8, 3, 32, 32, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    target, totals = torch.zeros(8, dtype=torch.int64), Totals("cpu")

    def body() -> None:
        totals.add(*step(images, target), target)

    body()
    return body


@pytest.mark.parametrize("how", [*((name, 0.9) for name in OPTIMIZERS), ("sgd", 0.0)])
def test_a_training_step_neither_waits_nor_touches_the_host(
    how: tuple[str, float], watched: Callable[[Callable[[], object]], None]
) -> None:
    body = step_of(FusedCNNClassifier(), *how)
    launches.clear()
    watched(body)
    assert len(launches) > 50


FAULTS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "cpu": lambda x: x.cpu(),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "nonzero": lambda x: torch.nonzero(x),
    "host tensor": lambda x: x + torch.tensor(1.0),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "float": lambda x: float(x.max()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_wait_is_seen(fault: str, watched: Callable[[Callable[[], object]], None]) -> None:
    class Faulty(FusedCNNClassifier):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            if planted:
                FAULTS[fault](logits.detach())
            return logits

    planted: list[bool] = []
    body = step_of(Faulty())
    watched(body)
    planted.append(True)
    with pytest.raises(Waits):
        watched(body)
