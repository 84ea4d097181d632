"""Every layer of the networks in perf/shapes, training forward and backward in bf16 NHWC: ResNet-18 and -50, MobileNet
and VGG at 224x224, a 4096-wide MLP, losses over 1,000 to 256,000 classes. A case is an operator over all networks."""

from __future__ import annotations

import torch

from perf.shapes import NAMED, Shape, distinct
from perf.static.aot import Case
from perf.static.cases import batch_norm, conv, conv_stage, cross_entropy, linear, window
from tkernels.core import targets
from tkernels.core.geometry import Geometry
from tkernels.ops.conv_stage import config as stage_tuning

NETWORKS = ("resnet18", "resnet50", "mobilenet", "vgg", "mlp", "vocab")
DTYPE = torch.bfloat16


def layers(operator: str) -> list[Shape]:
    """The shapes an operator has in the networks, each once."""
    return distinct(shape for name in NETWORKS for shape in NAMED[name].get(operator, []))


def geometry(s: Shape) -> Geometry:
    """A convolution's shape as the choosers see it."""
    return window(s["C"], s["K"], s["H"], s["R"], s["stride"], s["groups"])


def convolutions() -> None:
    """conv2d alone."""
    for g in map(geometry, layers("conv2d")):
        if g.depthwise:
            conv.depthwise(g, DTYPE)
            continue
        conv.forward(g, DTYPE)
        conv.wgrad(g, DTYPE)
        if not g.flattened:
            conv.dgrad(g, DTYPE)


def stages() -> None:
    """Convolutions with batch norm and ReLU, in training and in evaluation."""
    for g in map(geometry, layers("conv2d")):
        if g.depthwise:
            continue
        conv_stage.forward(g, DTYPE, True)
        conv_stage.forward(g, DTYPE, False)
        if not g.flattened:
            conv_stage.dgrad(g, DTYPE)
        if stage_tuning.applies_in_prologue(g, DTYPE, targets.current()):
            conv_stage.pointwise(g, DTYPE)


def ends() -> None:
    """A stage's last pass, with pooling and dropout, and its backward."""
    for shape in layers("batch_norm"):
        pool = conv_stage.pooled(shape["H"])
        conv_stage.end(shape["C"], pool, DTYPE)
        conv_stage.end_backward(shape["C"], pool, DTYPE)


def norms() -> None:
    """Batch norm with ReLU, with and without a residual."""
    for shape in layers("batch_norm"):
        for add in (False, True):
            batch_norm.training(shape["C"], shape["H"], DTYPE, add=add)


def linears() -> None:
    """Linear layers with ReLU and dropout."""
    for shape in layers("linear"):
        for run in (linear.forward, linear.dgrad, linear.wgrad):
            run(shape["C"], shape["K"], "relu", 0.5, DTYPE, batch=shape["N"])


def losses() -> None:
    """Cross entropy with class indices."""
    for shape in layers("cross_entropy"):
        cross_entropy.run(cross_entropy.Shape("", (shape["N"], shape["C"])))


def cases() -> list[Case]:
    runs = (convolutions, stages, ends, norms, linears, losses)
    return [Case(f"networks {run.__name__} bf16", run) for run in runs]
