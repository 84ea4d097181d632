"""What a run checks and times: shapes from real networks, and how their tensors lie."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import tkernels
from perf import operators, schema, shapes
from perf.bench.gpu.session import Run
from perf.bench.measure import Problem
from perf.shapes import Shape, conv, heads, image, linear, rows

CNN = shapes.NAMED["cnn"]
# two products of a transformer's size, and one whose sides are odd
MLP, ODD = linear(4096, 4096, 4096), linear(250, 203, 77)
# ResNet-50's layers whose products differ most: the stem, 3x3 at each stage, a stride, the 1x1s around them
RESNET50 = (
    conv(256, 3, 224, 64, 7, 2), conv(256, 64, 56, 64, 1), conv(256, 64, 56, 64), conv(256, 64, 56, 256, 1),
    conv(256, 128, 28, 128), conv(256, 256, 14, 256), conv(256, 256, 28, 256, 3, 2), conv(256, 512, 7, 512),
)  # fmt: skip
DEPTHWISE = {**conv(64, 144, 28, 144), "groups": 144}


@dataclasses.dataclass(frozen=True)
class Case:
    """An operator at a shape; ``variant``: how its tensors lie, a name of LAYS, or EXPANDED."""

    operator: str
    shape: tuple[tuple[str, int], ...]
    dtype: str = "bf16"
    layout: str = ""
    variant: str = ""

    def __str__(self) -> str:
        columns = {**dict.fromkeys(schema.SHAPE_COLUMNS), **dict(self.shape), "operator": self.operator}
        parts = (self.operator, schema.shape_label(columns), self.dtype, self.layout, self.variant)
        return " ".join(part for part in parts if part)

    def problem(self, device: str) -> Problem:
        return Problem(
            operators.get(self.operator), dict(self.shape), operators.DTYPES[self.dtype], self.layout, device
        )


def case(operator: str, shape: Shape, dtype: str = "bf16", layout: str = "nhwc", variant: str = "") -> Case:
    """A case with its shape completed; a layout only where there are images."""
    found = operators.get(operator)
    return Case(operator, tuple(found.complete(shape).items()), dtype, layout if found.images else "", variant)


def misaligned(name: str, t: Tensor) -> Tensor:
    """The same values one element behind a 16-byte boundary, in the same strides."""
    if t.dim() == 0:
        return t
    room = t.new_empty(1 + _span(t))
    return room.as_strided(t.shape, t.stride(), 1).copy_(t)


def strided(name: str, t: Tensor) -> Tensor:
    """The same values as a part of a larger tensor: fewer columns of a matrix, fewer channels of an image."""
    if name not in ("input", "a", "b", "weight", "query", "key", "value") or t.dim() < 2:
        return t
    at = 1 if t.dim() == 4 else -1
    wider = list(t.shape)
    wider[at] += 8
    format = torch.channels_last if t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) else None
    room = t.new_empty(wider) if format is None else t.new_empty(wider).contiguous(memory_format=format)
    return room.narrow(at, 0, t.shape[at]).copy_(t)


def _span(t: Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))


LAYS: dict[str, Callable[[str, Tensor], Tensor]] = {
    "": lambda name, t: t,
    "misaligned": misaligned,
    "strided": strided,
}
# the gradient that y.sum() sends back: one value with strides of 0
EXPANDED = "expanded gradient"


def checked(dry: bool) -> list[Case]:
    """What is compared with float64, the most telling first."""
    if dry:
        return _tiny()
    found = [case("cnn", {"N": 256})]
    found += [case("conv_stage", shape) for shape in CNN["conv_stage"]]
    found += [case("linear_relu", shape) for shape in (*CNN["linear"], MLP, ODD)]
    found += [case("conv2d_relu", shape) for shape in (*CNN["conv2d"], *({**s, "N": 64} for s in RESNET50))]
    found += [case("batch_norm_relu", s) for s in (*CNN["batch_norm"], image(64, 64, 112), image(64, 2048, 7))]
    found += [case("cross_entropy", rows(n, c)) for n, c in ((256, 10), (4096, 1000), (4096, 32000), (512, 128256))]
    found += [case("attention", s) for s in (heads(2, 8, 2048, 2048, 64), heads(2, 8, 2048, 2048, 128),
              heads(1, 2, 8192, 8192, 128), heads(64, 12, 197, 197, 64), heads(8, 4, 1, 1024, 64),
              heads(2, 4, 35, 41, 20))]  # fmt: skip
    found += [case("matmul", s) for s in (linear(1024, 1024, 1024), {**linear(1024, 64, 1024), "groups": 96},
              linear(1, 768, 3072), ODD)]  # fmt: skip
    found += [case("conv2d", DEPTHWISE), case("conv_stage", {**image(64, 24, 56), "K": 40})]
    for dtype in ("fp32", "fp16"):
        found += [case(name, shape, dtype) for name, shape in _one_each()]
    found += [case(name, shape, layout="nchw") for name, shape in _one_each() if operators.get(name).images]
    for variant in ("misaligned", "strided", EXPANDED):
        found += [case(name, shape, variant=variant) for name, shape in _one_each() if _takes(name, variant)]
    return found


def _one_each() -> Iterator[tuple[str, Shape]]:
    """A shape of each operator."""
    yield "linear_relu", linear(256, 2048, 256)
    yield "conv2d_relu", conv(256, 64, 8, 128)
    yield "conv_stage", {**image(256, 32, 16), "K": 64}
    yield "batch_norm_relu", image(64, 256, 56)
    yield "cross_entropy", rows(4096, 1000)
    yield "attention", heads(4, 8, 1024, 1024, 64)
    yield "matmul", linear(1024, 1024, 1024)


def _takes(operator: str, variant: str) -> bool:
    """Whether a variant says anything of an operator: a loss has one gradient, batch norm's of a constant is zero."""
    return variant != EXPANDED or operator in ("linear_relu", "conv2d_relu", "attention", "matmul")


def _tiny() -> list[Case]:
    tiny = shapes.NAMED["tiny"]
    names = ("cnn", "conv_stage", "linear", "linear_relu", "conv2d", "batch_norm", "cross_entropy", "attention",
             "matmul")  # fmt: skip
    found = [case(name, shape, "fp32") for name in names for shape in operators.get(name).of_named(tiny)]
    found += [case("linear", tiny["linear"][0], "fp32", variant="misaligned"),
              case("conv2d", tiny["conv2d"][0], "fp32", variant="strided"),
              case("matmul", tiny["matmul"][0], "fp32", variant=EXPANDED)]  # fmt: skip
    return found


def repeated(dry: bool) -> list[tuple[Case, int]]:
    """What is run again and again beside a busy stream, and how often."""
    if dry:
        return [(case("linear_relu", linear(8, 32, 16), "fp32"), 20)]
    found = [(case("linear_relu", shape), 1000) for shape in CNN["linear"][:2]]
    found += [(case("linear_relu", MLP), 200), (case("attention", heads(4, 8, 1024, 1024, 64)), 200)]
    found += [(case("attention", heads(4, 8, 1024, 1024, 128)), 100)]
    found += [(case("conv_stage", CNN["conv_stage"][1]), 200), (case("conv2d_relu", RESNET50[1]), 50)]
    return found


# passes timed of an operator
PASSES = {"linear": ("fwd", "dgrad", "wgrad"), "conv2d": ("fwd", "dgrad", "wgrad")}
OTHER_PASSES = ("fwd", "bwd")


def timed(dry: bool) -> list[Case]:
    """Single products and passes to time against the vendor's."""
    if dry:
        tiny = shapes.NAMED["tiny"]
        names = ("conv2d", "linear", "matmul", "cross_entropy", "batch_norm_relu", "attention")
        return [case(name, shape, "fp32") for name in names for shape in operators.get(name).of_named(tiny)]
    found = [case("conv2d", shape) for shape in (*CNN["conv2d"], *RESNET50)]
    found += [case("linear", shape) for shape in (MLP, *CNN["linear"])]
    found += [case("matmul", linear(4096, 4096, 4096))]
    found += [case("cross_entropy", rows(4096, classes)) for classes in (32000, 128256)]
    found += [case("batch_norm_relu", s) for s in (image(256, 64, 56), image(256, 256, 56), image(256, 2048, 7))]
    found += [case("attention", heads(n, 16, length, length, head))
              for length, n in ((2048, 8), (8192, 2)) for head in (64, 128)]  # fmt: skip
    found += [case("conv_stage", {**image(256, 64, 56), "K": 64}), case("linear_relu", MLP)]
    return found


def compared(dry: bool) -> list[Case]:
    """Products to compute with and without descriptors: a transformer's, and ResNet-50's 3x3 convolutions."""
    if dry:
        tiny = shapes.NAMED["tiny"]
        return [case(name, tiny[name][0], "fp32") for name in ("linear", "matmul", "conv2d")]
    windows = [case("conv2d", shape) for shape in RESNET50 if (shape["R"], shape["stride"]) == (3, 1)]
    return [case("linear", MLP), case("matmul", MLP), *windows]


def passes(operator: str) -> tuple[str, ...]:
    """The modes in which an operator is timed."""
    return PASSES.get(operator, OTHER_PASSES)


def triton_only(run: Run) -> contextlib.AbstractContextManager[object]:
    """On a GPU our own kernels, whatever the chooser would hand to cuDNN, which would be compared with itself."""
    return tkernels.backend("triton") if run.on_gpu else contextlib.nullcontext()
