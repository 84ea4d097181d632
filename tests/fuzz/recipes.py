"""A tensor as data: shape, dtype, layout, values. Made anew for each side of a comparison, written down in a test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.conformance import layouts

# what "again" adds to a seed: other values of the same kind
STEP = 7919


class Subclass(Tensor):
    """A tensor of a user's own class."""


def shown(value: Any) -> str:
    """``repr`` of a dataclass without what it has by default, so that tests are short."""
    parts = []
    for field in dataclasses.fields(value):
        given = getattr(value, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if field.default is dataclasses.MISSING and not callable(field.default_factory):
            parts.append(repr(given))
        elif given != default:
            parts.append(f"{field.name}={given!r}")
    return f"{type(value).__name__}({', '.join(parts)})"


@dataclasses.dataclass(frozen=True)
class T:
    """``values``: a key of VALUES, and its numbers after it ("index 10"). ``layout``: a layout of tests.conformance, or
    one of LAYOUTS with its numbers ("permuted 1 0"). ``special``: (flat index, value) written over values."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    values: str = "normal"
    layout: str = "contiguous"
    seed: int = 0
    special: tuple[tuple[int, float], ...] = ()
    grad: bool = False
    kind: str = "Tensor"

    __repr__ = shown

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def make(self, again: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor; ``again``: with other values. ``dtype``: the same values in it, where they are real numbers."""
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"), _float32_by_default():
            generator = torch.Generator().manual_seed(self.seed + STEP * again)
            name, *numbers = self.values.split()
            made = VALUES[name](self.shape, generator, *map(float, numbers)).to(self.torch_dtype)
            if self.special and made.numel():
                made = made.contiguous()
                for place, value in self.special:
                    made.view(-1)[place % made.numel()] = value
            t = laid_out(made, self.layout, generator)
            if dtype is not None and t.is_floating_point():
                t = t.to(dtype)
        t = t.detach()
        t = torch.nn.Parameter(t, requires_grad=False) if self.kind == "Parameter" else t
        t = t.requires_grad_(self.grad)
        return t.as_subclass(Subclass) if self.kind == "Subclass" and dtype is None else t


class _float32_by_default:
    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)

    def __exit__(self, *exc: object) -> None:
        torch.set_default_dtype(self.before)


def _normal(shape: tuple[int, ...], g: torch.Generator, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64) * scale + shift


def _positive(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=g, dtype=torch.float64) + 0.1


def _integers(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return (_normal(shape, g) * 3).round()


def _complex(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.complex(_normal(shape, g), _normal(shape, g))


def _index(
    shape: tuple[int, ...], g: torch.Generator, classes: float, ignore: float = -100, share: float = 0
) -> Tensor:
    """Classes, a ``share`` of them ``ignore``."""
    found = torch.randint(0, max(int(classes), 1), shape, generator=g)
    return found.masked_fill(torch.rand(shape, generator=g) < share, int(ignore))


def _softmax(shape: tuple[int, ...], g: torch.Generator, dim: float) -> Tensor:
    return _normal(shape, g).softmax(int(dim))


def _mask(shape: tuple[int, ...], g: torch.Generator, kept: float, off: float, whole: float = 0) -> Tensor:
    """1 where ``kept``, else ``off``; ``whole``: a share of rows wholly off."""
    keep = torch.rand(shape, generator=g) < kept
    if len(shape):
        keep &= torch.rand((*shape[:-1], 1), generator=g) >= whole
    return torch.where(keep, *(torch.tensor(value, dtype=torch.float64) for value in (1.0, off)))


def _additive(shape: tuple[int, ...], g: torch.Generator, kept: float, off: float, whole: float = 0) -> Tensor:
    """Normal numbers where ``kept``, else ``off``."""
    on = _mask(shape, g, kept, 0.0, whole) == 1
    return torch.where(on, _normal(shape, g), torch.tensor(off, dtype=torch.float64))


VALUES: dict[str, Callable[..., Tensor]] = {
    "normal": _normal,
    "positive": _positive,
    "integers": _integers,
    "complex": _complex,
    "index": _index,
    "softmax": _softmax,
    "mask": _mask,
    "additive": _additive,
    "zeros": lambda shape, g: torch.zeros(shape, dtype=torch.float64),
    "number": lambda shape, g, value: torch.full(shape, value, dtype=torch.float64),
}


def laid_out(values: Tensor, layout: str, generator: torch.Generator) -> Tensor:
    """``values`` in a layout; one that this rank, size or dtype cannot have is contiguous."""
    name, *words = layout.split()
    numbers = [int(word) for word in words]
    rank = values.dim()
    if name not in LAYOUTS:
        return layouts.laid_out(values, layout)
    if not rank or not values.numel():
        return values.contiguous()
    return LAYOUTS[name](values, numbers, generator)


def _permuted(values: Tensor, order: list[int], generator: torch.Generator) -> Tensor:
    if len(order) != values.dim():
        return values.contiguous()
    return values.permute(order).contiguous().permute([order.index(i) for i in range(len(order))])


def _every(values: Tensor, steps: list[int], generator: torch.Generator) -> Tensor:
    """Every so manyth element of each axis of something larger, after the first."""
    steps = ((steps or [2]) * values.dim())[: values.dim()]
    outside = float("nan") if values.is_floating_point() else 1
    large = torch.full([n * k + 1 for n, k in zip(values.shape, steps)], outside, dtype=values.dtype)
    view = large[tuple(slice(1, 1 + n * k, k) for n, k in zip(values.shape, steps))]
    return view.copy_(values)


def _repeated(values: Tensor, axes: list[int], generator: torch.Generator) -> Tensor:
    shape = values.shape
    for axis in axes or [0]:
        values = values.narrow(axis % len(shape), 0, 1)
    return values.contiguous().expand(shape)


def _overlapping(values: Tensor, numbers: list[int], generator: torch.Generator) -> Tensor:
    """Rows that share elements with the next one."""
    strides = list(values.contiguous().stride())
    if len(strides) < 2 or values.shape[-1] < 2:
        return values.contiguous()
    strides[-2] = max(1, strides[-2] // 2)
    return values.contiguous().as_strided(values.shape, strides)


def _turned(values: Tensor, numbers: list[int], generator: torch.Generator) -> Tensor:
    if values.dim() < 2:
        return values.contiguous()
    return values.transpose(-1, -2).contiguous().transpose(-1, -2)


def _negated(values: Tensor, numbers: list[int], generator: torch.Generator) -> Tensor:
    """Stored with the opposite sign, as the imaginary part of a conjugate is."""
    if values.dtype not in (torch.float32, torch.float64):
        return values.contiguous()
    return torch.complex(torch.zeros_like(values), -values).conj().imag


LAYOUTS: dict[str, Callable[[Tensor, list[int], torch.Generator], Tensor]] = {
    "permuted": _permuted,
    "every": _every,
    "repeated": _repeated,
    "overlapping": _overlapping,
    "turned": _turned,
    "negated": _negated,
}
