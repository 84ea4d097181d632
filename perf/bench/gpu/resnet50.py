"""fuse(resnet50) as a user has it, against the plain model and torch.compile: a training step with its optimizer."""

from __future__ import annotations

import functools
import importlib.util

from torch import nn

import tkernels
from perf.bench import measure
from perf.bench.gpu import headline, training
from perf.bench.gpu.session import Item, Run
from perf.bench.gpu.training import Contender, Workload


def items(run: Run) -> list[Item]:
    """A row a contender, the compiler last."""
    contenders = (
        Contender("torch", plain, context=headline.tuned),
        Contender("tkernels", _fused, context=headline.tuned),
        Contender("torch.compile", training.compiled(plain, run), context=headline.tuned),
    )
    shape = {"N": 2, "C": 3, "H": 32, "W": 32} if run.request.dry else {"N": 256, "C": 3, "H": 224, "W": 224}
    workload = Workload("resnet50", shape, 1000)
    return [Item(each.name, functools.partial(_timed, run, each, workload)) for each in contenders]


def _timed(run: Run, contender: Contender, workload: Workload) -> None:
    row = training.measured(run, contender, workload)
    if contender.name == "tkernels" and run.on_gpu and row.status == "ok":
        with contender.context(), measure.recorded_launches() as launched:
            training.step(run, contender, workload)()
        # equal values alone would not tell a model that runs as it was
        row = row.having(config=f"{len(launched)} launches")
        if not launched:
            row = row.having(status="error: fuse() launched none of our kernels: what was timed is PyTorch")
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
