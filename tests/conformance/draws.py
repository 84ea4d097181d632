"""hypothesis strategies: calls of each operator with any shape, layout, dtype, arguments and gradients asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.conformance.calls import Call
from tests.conformance.layouts import LAYOUTS, expanded, laid_out

ACTIVATIONS = (None, "relu", "leaky_relu", "gelu", "silu")
Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclasses.dataclass(frozen=True)
class Grid:
    """How widely to draw. Where each new combination is compiled (ttsem) the grid is small and the tensors tiny."""

    dtypes: tuple[torch.dtype, ...]
    activations: tuple[str | None, ...] = ACTIVATIONS
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


def _case(draw: Draw, call: Call) -> Case:
    """``call`` with some of its differentiable tensors asking for a gradient."""
    tensors = {n: t for n, t in call.tensors().items() if not n.startswith("running_") and t.is_floating_point()}
    for name, t in tensors.items():
        t.requires_grad_(draw(st.sampled_from((True, True, False))) if name != "target" else False)
    return Case(call, draw(st.sampled_from(GRADIENT_LAYOUTS)))


def _numbers(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype, layout: str | None = None) -> Tensor:
    """Normal draws in ``layout`` (by default any)."""
    seed = draw(st.integers(0, 2**16))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return laid_out(values, draw(st.sampled_from(LAYOUTS)) if layout is None else layout)


def _maybe(draw: Draw, make: Callable[[], Tensor]) -> Tensor | None:
    return make() if draw(st.booleans()) else None


@st.composite
def linear(draw: Draw, grid: Grid) -> Case:
    dtype = draw(st.sampled_from(grid.dtypes))
    n = draw(st.integers(1, grid.features))
    k = draw(st.integers(0 if grid.rich else 1, grid.features))
    leading = tuple(draw(st.lists(st.integers(0, grid.size), max_size=3)))
    weight_shape = (k,) if grid.rich and draw(st.integers(0, 19)) == 0 else (n, k)
    arguments: dict[str, Any] = {
        "input": _numbers(draw, (*leading, k), dtype),
        "weight": _numbers(draw, weight_shape, dtype),
        "bias": _maybe(draw, lambda: _numbers(draw, (n,), dtype)) if len(weight_shape) == 2 else None,
        "activation": draw(st.sampled_from(grid.activations)),
    }
    return _case(draw, Call("linear", kwargs=arguments))


def _pair(draw: Draw, lowest: int, highest: int) -> int | tuple[int, int]:
    values = st.integers(lowest, highest)
    return draw(st.one_of(values, st.tuples(values, values)))


@st.composite
def conv2d(draw: Draw, grid: Grid) -> Case:
    """Groups, depthwise, any stride, padding and dilation; images smaller than the kernel are torch's error."""
    dtype = draw(st.sampled_from(grid.dtypes))
    groups = draw(st.sampled_from((1, 1, 1, 2, 3)))
    cin, cout = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    batch = (draw(st.integers(0, 3)),) if draw(st.integers(0, 4)) else ()
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    image = draw(st.tuples(st.integers(1, grid.size), st.integers(1, grid.size)))
    padding = draw(st.one_of(st.just("same"), st.just("valid"), st.just(None)))
    arguments: dict[str, Any] = {
        "input": _numbers(draw, (*batch, cin * groups, *image), dtype),
        "weight": _numbers(draw, (cout * groups, cin, *kernel), dtype),
        "bias": _maybe(draw, lambda: _numbers(draw, (cout * groups,), dtype)),
        "stride": 1 if padding == "same" else _pair(draw, 1, 3),
        "padding": padding or _pair(draw, 0, 3),
        "dilation": _pair(draw, 1, 2),
        "groups": groups,
        "activation": draw(st.sampled_from(grid.activations)),
    }
    return _case(draw, Call("conv2d", kwargs=arguments))


@st.composite
def batch_norm(draw: Draw, grid: Grid) -> Case:
    """Ranks 2 to 5, means far from 0, statistics given or not, residual before the activation."""
    dtype = draw(st.sampled_from(grid.dtypes))
    half = dtype in (torch.float16, torch.bfloat16)
    vector_dtype = torch.float32 if half and draw(st.booleans()) else dtype
    channels = draw(st.integers(1, 7))
    shape = (draw(st.integers(0, 5)), channels, *draw(st.lists(st.integers(1, 5), max_size=3 if grid.rich else 2)))
    training = draw(st.booleans())
    has_statistics = not training or draw(st.booleans())
    x = _numbers(draw, shape, dtype, "contiguous") * draw(st.sampled_from((1.0, 0.1)))
    x = (x + draw(st.sampled_from((0.0, 0.0, 3.0, 30.0)))).to(dtype)
    arguments: dict[str, Any] = {
        "input": laid_out(x, draw(st.sampled_from(LAYOUTS))),
        "running_mean": _numbers(draw, (channels,), vector_dtype) if has_statistics else None,
        "running_var": _variance(draw, channels, vector_dtype) if has_statistics else None,
        "weight": _maybe(draw, lambda: _numbers(draw, (channels,), vector_dtype)),
        "bias": _maybe(draw, lambda: _numbers(draw, (channels,), vector_dtype)),
        "training": training,
        "momentum": draw(st.sampled_from((0.1, 0.0, 1.0, 0.37))),
        "eps": draw(st.sampled_from((1e-5, 1e-3))),
        "activation": draw(st.sampled_from(grid.activations)),
        "residual": _maybe(draw, lambda: _numbers(draw, shape, dtype)),
    }
    for name in ("running_mean", "running_var"):
        # torch writes running statistics in place, which a tensor with stride 0 refuses
        if training and arguments[name] is not None and arguments[name].stride() == (0,):
            arguments[name] = arguments[name].contiguous()
    return _case(draw, Call("batch_norm", kwargs=arguments))


def _variance(draw: Draw, channels: int, dtype: torch.dtype) -> Tensor:
    seed = draw(st.integers(0, 2**16))
    values = torch.rand((channels,), generator=torch.Generator().manual_seed(seed)) + 0.2
    return laid_out(values.to(dtype), draw(st.sampled_from(("contiguous", "sliced", "stepped"))))


@st.composite
def cross_entropy(draw: Draw, grid: Grid) -> Case:
    """Indices and probabilities, inputs of rank 1 to 4, shifted logits, and every ignored row."""
    dtype = draw(st.sampled_from(grid.dtypes))
    classes = draw(st.integers(1, grid.classes))
    rank = draw(st.integers(1, 4))
    outer = () if rank == 1 else (draw(st.integers(0, 5)),)
    inner = tuple(draw(st.lists(st.integers(1, 4), min_size=max(rank - 2, 0), max_size=max(rank - 2, 0))))
    shape = (*outer, classes, *inner)
    logits = _numbers(draw, shape, dtype, "contiguous") * draw(st.sampled_from((1.0, 10.0)))
    logits = (logits + draw(st.sampled_from((0.0, 0.0, 50.0)))).to(dtype)
    probabilities = draw(st.integers(0, 2)) == 0
    ignore_index = draw(st.sampled_from((-100, 0, 1, -1, 255)))
    if probabilities:
        target = _numbers(draw, shape, dtype, "contiguous").double().softmax(len(outer)).to(dtype)
    else:
        seed = draw(st.integers(0, 2**16))
        target = torch.randint(classes, (*outer, *inner), generator=torch.Generator().manual_seed(seed))
        if ignore_index not in range(classes) and draw(st.booleans()):
            every = draw(st.booleans())
            ignored = torch.rand(target.shape, generator=torch.Generator().manual_seed(seed)) < (2.0 if every else 0.4)
            target = target.masked_fill(ignored, ignore_index)
    weight = _maybe(draw, lambda: _numbers(draw, (classes,), dtype).abs() + 0.1)
    arguments: dict[str, Any] = {
        "input": laid_out(logits, draw(st.sampled_from(LAYOUTS))),
        "target": laid_out(target, draw(st.sampled_from(LAYOUTS))),
        "weight": weight,
        "reduction": draw(st.sampled_from(("mean", "sum", "none"))),
        "label_smoothing": draw(st.sampled_from((0.0, 0.0, 0.1, 1.0))),
    }
    if not probabilities:
        arguments["ignore_index"] = ignore_index
    case = _case(draw, Call("cross_entropy", kwargs=arguments))
    if weight is not None:
        weight.requires_grad_(False)  # torch has no gradient for it
    if probabilities and draw(st.booleans()):
        case.call.kwargs["target"].requires_grad_()
    return case
