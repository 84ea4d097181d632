"""fuse(resnet50) as a user has it, against the plain model and torch.compile: a training step with its optimizer."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

import tkernels
from perf.bench import measure
from perf.bench.gpu import headline, training
from perf.bench.gpu.session import Item, Run
from perf.bench.gpu.training import Rival, Task


def items(run: Run) -> list[Item]:
    """A row a rival, the compiler last."""
    rivals = (
        Rival("torch", plain, context=headline.tuned),
        Rival("tkernels", _fused, context=headline.tuned),
        Rival("torch.compile", training.compiled(plain, run), context=headline.tuned),
    )
    task = Task(
        "resnet50",
        {"N": 2, "C": 3, "H": 32, "W": 32} if run.request.dry else {"N": 256, "C": 3, "H": 224, "W": 224},
        1000,
    )
    return [Item(rival.name, lambda rival=rival: _timed(run, rival, task)) for rival in rivals]  # type: ignore[misc]


def _timed(run: Run, rival: Rival, task: Task) -> None:
    row: dict[str, Any] = training.measured(run, rival, task)
    if rival.name == "tkernels" and run.on_gpu and row["status"] == "ok":
        with rival.context(), measure.recorded_launches() as launched:
            training.step(run, rival, task)()
        # equal values alone would not tell a model that runs as it was
        row["config"] = f"{len(launched)} launches"
        if not launched:
            row["status"] = "error: fuse() launched none of our kernels: what was timed is PyTorch"
    run.tell_timing(row)


def plain() -> tuple[nn.Module, nn.Module]:
    """The model as its library has it, and its loss."""
    if importlib.util.find_spec("torchvision") is not None:
        import torchvision

        return torchvision.models.resnet50(), nn.CrossEntropyLoss()
    import timm

    return timm.create_model("resnet50"), nn.CrossEntropyLoss()


def _fused() -> tuple[nn.Module, nn.Module]:
    model, loss = plain()
    return tkernels.fuse(model), loss
