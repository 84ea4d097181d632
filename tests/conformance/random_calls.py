"""hypothesis strategies: calls of each operator with any shape, layout, dtype, arguments and gradients asked for.

hypothesis draws the source of randomness of a case and the case is drawn evenly from that: left to draw every choice
itself it repeats earlier cases and keeps to the simplest values, and the combinations that break kernels are rare.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.conformance.calls import Call
from tests.conformance.layouts import LAYOUTS, expanded, laid_out
from tkernels.core import activation as activations

# The derivatives of the others jump away from 0, where the rounding of a 16-bit input decides which side it is on.
SMOOTH = tuple(name for name in activations.ACTIVATIONS if name not in ("relu6", "hardswish"))


@dataclasses.dataclass(frozen=True)
class Grid:
    """How widely to draw. Where each new combination is compiled (ttsem) the grid is small and the tensors tiny."""

    dtypes: tuple[torch.dtype, ...]
    activations: tuple[str | None, ...] = SMOOTH
    size: int = 9
    features: int = 33
    classes: int = 40
    rich: bool = True


@dataclasses.dataclass(frozen=True)
class Case:
    """A call and the layout of the gradient that comes in."""

    call: Call
    gradient_layout: str

    def cotangent(self, output: Tensor) -> Tensor:
        """A random gradient laid out as drawn; 'sum' is what ``y.sum().backward()`` sends: one value, all strides 0."""
        values = torch.randn(output.shape, generator=torch.Generator().manual_seed(23)).to(output.dtype)
        if self.gradient_layout == "sum":
            laid = torch.full((), 0.75, dtype=output.dtype).expand(output.shape)
        elif self.gradient_layout == "expanded" and output.dim():
            laid = expanded(values, output.dim() - 1)
        else:
            laid = laid_out(values, self.gradient_layout)
        # strides of a view do not survive a copy to another device; under ttsem and on the CPU there is none to make
        return laid if output.device.type == "cpu" else laid.to(output.device)

    def __repr__(self) -> str:
        return f"{self.call} <- {self.gradient_layout} gradient"


GRADIENT_LAYOUTS = ("contiguous", "sum", "expanded", "sliced", "transposed", "channels_last", "stepped", "offset")


def _case(rng: Random, call: Call) -> Case:
    """``call`` with some of its differentiable tensors asking for a gradient."""
    tensors = {n: t for n, t in call.tensors().items() if not n.startswith("running_") and t.is_floating_point()}
    for name, t in tensors.items():
        t.requires_grad_(rng.random() < 0.75 if name != "target" else False)
    return Case(call, "contiguous" if rng.random() < 0.25 else rng.choice(GRADIENT_LAYOUTS))


def _size(rng: Random, lowest: int, highest: int, empty: bool = False) -> int:
    """A size from a range, and now and then 0."""
    if empty and rng.random() < 0.07:
        return 0
    return rng.randint(lowest, highest)


def _layout(rng: Random, rank: int) -> str:
    """A layout that a tensor of this rank can have."""
    if rng.random() < 0.3:
        return "contiguous"
    return rng.choice(("offset", "sliced", "stepped", "expanded") if rank < 2 else LAYOUTS)


def _numbers(rng: Random, shape: tuple[int, ...], dtype: torch.dtype, layout: str | None = None) -> Tensor:
    """Normal draws in ``layout`` (by default any)."""
    seed = rng.randrange(2**16)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return laid_out(values, _layout(rng, len(shape)) if layout is None else layout)


def _maybe(rng: Random, make: Callable[[], Tensor]) -> Tensor | None:
    return make() if rng.random() < 0.7 else None


def linear(rng: Random, grid: Grid) -> Case:
    dtype = rng.choice(grid.dtypes)
    n, k = _size(rng, 1, grid.features), _size(rng, 1, grid.features, empty=grid.rich)
    leading = tuple(_size(rng, 1, grid.size, empty=True) for _ in range(rng.choice((1, 0, 2, 3))))
    weight_shape = (k,) if grid.rich and rng.random() < 0.05 else (n, k)
    arguments: dict[str, Any] = {
        "input": _numbers(rng, (*leading, k), dtype),
        "weight": _numbers(rng, weight_shape, dtype),
        "bias": _maybe(rng, lambda: _numbers(rng, (n,), dtype)) if len(weight_shape) == 2 else None,
        "activation": rng.choice(grid.activations),
    }
    return _case(rng, Call("linear", kwargs=arguments))


def _pair(rng: Random, lowest: int, highest: int) -> int | tuple[int, int]:
    first = _size(rng, lowest, highest)
    return (first, _size(rng, lowest, highest)) if rng.random() < 0.5 else first


def conv2d(rng: Random, grid: Grid) -> Case:
    """Groups, depthwise, any stride, padding and dilation; images smaller than the kernel are torch's error."""
    dtype = rng.choice(grid.dtypes)
    groups = rng.choice((1, 1, 1, 2, 3))
    cin, cout = _size(rng, 1, 5), _size(rng, 1, 5)
    batch = (_size(rng, 1, 3, empty=True),) if rng.random() < 0.8 else ()
    kernel = _size(rng, 1, 3), _size(rng, 1, 3)
    image = _size(rng, 1, grid.size), _size(rng, 1, grid.size)
    padding = rng.choice((None, None, None, "same", "valid"))
    stride, dilation = 1 if padding == "same" else _pair(rng, 1, 3), _pair(rng, 1, 2)
    if image[1] == 1 and stride != 1 and dilation != 1:
        # torch itself (2.11, 2.14) crashes on some of these (channels_last, padded, with a bias) on the CPU
        image = (image[0], 2)
    arguments: dict[str, Any] = {
        "input": _numbers(rng, (*batch, cin * groups, *image), dtype),
        "weight": _numbers(rng, (cout * groups, cin, *kernel), dtype),
        "bias": _maybe(rng, lambda: _numbers(rng, (cout * groups,), dtype)),
        "stride": stride,
        "padding": padding or _pair(rng, 0, 3),
        "dilation": dilation,
        "groups": groups,
        "activation": rng.choice(grid.activations),
    }
    return _case(rng, Call("conv2d", kwargs=arguments))


def batch_norm(rng: Random, grid: Grid) -> Case:
    """Ranks 2 to 5, means far from 0, statistics given or not, residual before the activation."""
    dtype = rng.choice(grid.dtypes)
    half = dtype in (torch.float16, torch.bfloat16)
    vector_dtype = torch.float32 if half and rng.random() < 0.5 else dtype
    channels = _size(rng, 1, 7)
    rank = rng.choice((2, 3, 4, 5) if grid.rich else (2, 3, 4))
    shape = (_size(rng, 1, 5, empty=True), channels, *(_size(rng, 1, 5) for _ in range(rank - 2)))
    training = rng.random() < 0.5
    has_statistics = not training or rng.random() < 0.5
    x = _numbers(rng, shape, dtype, "contiguous") * rng.choice((1.0, 0.1))
    x = (x + rng.choice((0.0, 0.0, 3.0, 30.0))).to(dtype)
    arguments: dict[str, Any] = {
        "input": laid_out(x, _layout(rng, rank)),
        "running_mean": _numbers(rng, (channels,), vector_dtype) if has_statistics else None,
        "running_var": _variance(rng, channels, vector_dtype) if has_statistics else None,
        "weight": _maybe(rng, lambda: _numbers(rng, (channels,), vector_dtype)),
        "bias": _maybe(rng, lambda: _numbers(rng, (channels,), vector_dtype)),
        "training": training,
        "momentum": rng.choice((0.1, 0.0, 1.0, 0.37)),
        "eps": rng.choice((1e-5, 1e-3)),
        "activation": rng.choice(grid.activations),
        "residual": _maybe(rng, lambda: _numbers(rng, shape, dtype)),
    }
    for name in ("running_mean", "running_var"):
        # torch writes running statistics in place, which a tensor with stride 0 refuses
        if training and arguments[name] is not None and arguments[name].stride() == (0,):
            arguments[name] = arguments[name].contiguous()
    return _case(rng, Call("batch_norm", kwargs=arguments))


def _variance(rng: Random, channels: int, dtype: torch.dtype) -> Tensor:
    seed = rng.randrange(2**16)
    values = torch.rand((channels,), generator=torch.Generator().manual_seed(seed)) + 0.2
    return laid_out(values.to(dtype), rng.choice(("contiguous", "sliced", "stepped")))


def cross_entropy(rng: Random, grid: Grid) -> Case:
    """Indices and probabilities, inputs of rank 1 to 4, shifted logits, and every ignored row."""
    dtype = rng.choice(grid.dtypes)
    classes = _size(rng, 1, grid.classes)
    rank = rng.choice((2, 2, 1, 3, 4))
    outer = () if rank == 1 else (_size(rng, 1, 5, empty=True),)
    inner = tuple(_size(rng, 1, 4) for _ in range(rank - 2))
    shape = (*outer, classes, *inner)
    logits = _numbers(rng, shape, dtype, "contiguous") * rng.choice((1.0, 10.0))
    logits = (logits + rng.choice((0.0, 0.0, 50.0))).to(dtype)
    probabilities = rng.choice((False, False, True))
    ignore_index = rng.choice((-100, 0, 1, -1, 255))
    if probabilities:
        target = _numbers(rng, shape, dtype, "contiguous").double().softmax(len(outer)).to(dtype)
    else:
        seed = rng.randrange(2**16)
        target = torch.randint(classes, (*outer, *inner), generator=torch.Generator().manual_seed(seed))
        if ignore_index not in range(classes) and rng.random() < 0.5:
            every = rng.random() < 0.5
            ignored = torch.rand(target.shape, generator=torch.Generator().manual_seed(seed)) < (2.0 if every else 0.4)
            target = target.masked_fill(ignored, ignore_index)
    weight = _maybe(rng, lambda: _numbers(rng, (classes,), dtype).abs() + 0.1)
    arguments: dict[str, Any] = {
        "input": laid_out(logits, _layout(rng, rank)),
        "target": laid_out(target, _layout(rng, target.dim())),
        "weight": weight,
        "reduction": rng.choice(("mean", "sum", "none")),
        "label_smoothing": rng.choice((0.0, 0.0, 0.1, 1.0)),
    }
    if not probabilities:
        arguments["ignore_index"] = ignore_index
    case = _case(rng, Call("cross_entropy", kwargs=arguments))
    if weight is not None:
        weight.requires_grad_(False)  # torch has no gradient for it
    if probabilities and rng.random() < 0.5:
        case.call.kwargs["target"].requires_grad_()
    return case


def cases(operator: str, grid: Grid) -> st.SearchStrategy[Case]:
    """Calls of one operator, evenly drawn."""
    make = {"linear": linear, "conv2d": conv2d, "batch_norm": batch_norm, "cross_entropy": cross_entropy}[operator]
    return st.integers(0, 2**63).map(lambda seed: make(Random(seed), grid))
