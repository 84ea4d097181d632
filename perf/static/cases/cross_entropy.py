"""Cross entropy: the CNN's 256 x 10 loss, ImageNet's classes, a language model's vocabulary, a segmentation map."""

from __future__ import annotations

from typing import NamedTuple

import torch

from perf.static.aot import Case
from perf.static.cases import case, empty
from tkernels.core.records import LossOptions
from tkernels.ops.cross_entropy import kernels


class Shape(NamedTuple):
    name: str
    input: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    probabilities: bool = False
    weighted: bool = False
    label_smoothing: float = 0.0


# the CNN's loss; rows off 16-byte boundaries, several and one a program; a row split over programs; classes that are
# not contiguous
SHAPES = (
    Shape("cnn", (256, 10)),
    Shape("cnn", (256, 10), torch.float32),
    Shape("cnn smoothed", (256, 10), torch.float32, weighted=True, label_smoothing=0.1),
    Shape("hundred classes", (256, 100), weighted=True, label_smoothing=0.1),
    Shape("imagenet", (256, 1000), label_smoothing=0.1),
    Shape("odd vocabulary", (8192, 50257)),
    Shape("few rows, probabilities", (8, 50257), probabilities=True, weighted=True),
    Shape("segmentation", (8, 21, 512, 512), weighted=True),
)


def run(shape: Shape) -> None:
    """Forward, merge, total and gradients."""
    x = empty(*shape.input, dtype=shape.dtype)
    target = torch.empty_like(x) if shape.probabilities else torch.empty_like(x.select(1, 0), dtype=torch.int64)
    weight = x.new_empty(shape.input[1]) if shape.weighted else None
    options = LossOptions(-100, "mean", shape.label_smoothing)
    loss, stats, count = kernels.launch_forward(x, target, weight, options, shape.dtype)
    grad = torch.empty_like(loss)
    kernels.launch_backward(grad, x, target, weight, stats, count, options)
    if shape.probabilities:
        kernels.launch_target_backward(grad, x, target, weight, stats, count, options)


def cases() -> list[Case]:
    return [case(f"{s.name} {list(s.input)} {str(s.dtype).split('.')[1]}", run, s) for s in SHAPES]
