"""Runs one side of a case once: the call, gradients, and what else the case asks for. Keeps all that a caller sees."""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.conformance import layouts
from tests.fuzz import bodies
from tests.fuzz.cases import Case
from tests.fuzz.operators import Side, Tensors

Gradients = dict[str, "Tensor | None"]


@dataclasses.dataclass
class Outcome:
    """``at``: what had been reached when ``error`` was raised. ``before``: the outputs as they came, for results that
    backward must not change. ``moved``: versions of arguments that went up, by how much."""

    at: str = "forward"
    error: Exception | None = None
    trace: str = ""
    outputs: list[Tensor] = dataclasses.field(default_factory=list)
    before: list[Tensor] = dataclasses.field(default_factory=list)
    arguments: Tensors = dataclasses.field(default_factory=dict)
    moved: dict[str, int] = dataclasses.field(default_factory=dict)
    views: list[bool] = dataclasses.field(default_factory=list)
    gradients: Gradients = dataclasses.field(default_factory=dict)
    again: Gradients = dataclasses.field(default_factory=dict)
    second: Gradients | None = None


def run(
    case: Case, side: Side, again: int = 0, dtype: torch.dtype | None = None, noise: float = 0.0, plain: bool = False
) -> Outcome:
    """``dtype``: floating tensors are in it. ``noise``: relative changes of their values. ``plain``: without what must
    make no difference (hooks, mutation, defaults, autocast)."""
    found = Outcome()
    tensors = {name: t.make(again, dtype) for name, t in case.tensors.items()}
    if noise:
        _disturb(tensors, noise, again)
    found.arguments = {**tensors, **side.own}
    versions = {n: t._version for n, t in found.arguments.items() if not t.is_inference()}
    try:
        with contextlib.ExitStack() as stack:
            if not plain:
                stack.enter_context(_surroundings(case))
            torch.manual_seed(case.seed)
            with _mode(case, plain), _saving(None if plain else case.hooks):
                y = side.call(tensors)
            found.outputs = [t for t in (y if isinstance(y, tuple) else (y,)) if t is not None]
            found.views = [t._is_view() if not t.is_inference() else False for t in found.outputs]
            moved = {n: found.arguments[n]._version - version for n, version in versions.items()}
            found.moved = {n: by for n, by in moved.items() if by}
            found.before = [t.detach().clone() for t in found.outputs]
            found.at = "backward"
            if case.backward != "none" and any(t.requires_grad for t in found.outputs):
                _backward(case, found, again, plain)
    except Exception as error:  # of any class: it is compared with the other side's
        found.error, found.trace = error, "".join(traceback.format_exception(error)[-4:])
    return found


def _disturb(tensors: Tensors, noise: float, again: int) -> None:
    generator = torch.Generator().manual_seed(again + 1)
    with torch.no_grad():
        for name, t in tensors.items():
            if t.is_floating_point() and t.numel():
                signs = torch.randint(0, 2, t.shape, generator=generator).double() * 2 - 1
                changed = t.double() * (1 + noise * signs)
                tensors[name] = changed.to(t.dtype).requires_grad_(t.requires_grad)


@contextlib.contextmanager
def _surroundings(case: Case) -> Iterator[None]:
    """The process as the case wants it, and as it was afterwards."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    fill, strict = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(case.threads)
    # NaN in whatever torch.empty returns: what nobody wrote must show
    torch.use_deterministic_algorithms(case.deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = case.deterministic
    with bodies.sizes(case), contextlib.ExitStack() as stack:
        kind, _, value = (case.default or "").partition(" ")
        try:
            if kind == "device":
                stack.enter_context(torch.device(value))
            elif kind == "dtype":
                torch.set_default_dtype(getattr(torch, value))
            elif kind == "flush":
                torch.set_flush_denormal(True)
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_flush_denormal(False)
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(strict, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = fill


@contextlib.contextmanager
def _mode(case: Case, plain: bool) -> Iterator[None]:
    words = case.mode.split()
    with contextlib.ExitStack() as stack:
        if "no_grad" in words:
            stack.enter_context(torch.no_grad())
        if "inference" in words:
            stack.enter_context(torch.inference_mode())
        if "autocast" in words and not plain:
            outer, *inner = words[words.index("autocast") + 1 :]
            stack.enter_context(bodies.autocast(case.body, getattr(torch, outer)))
            for word in inner:
                dtype = torch.bfloat16 if word == "off" else getattr(torch, word)
                stack.enter_context(bodies.autocast(case.body, dtype, word != "off"))
        yield


def _saving(hooks: str | None) -> contextlib.AbstractContextManager[Any]:
    """Saved tensors that come back as other tensors of the same values."""
    if hooks is None:
        return contextlib.nullcontext()
    ways: dict[str, tuple[Any, Any]] = {
        "copies": (lambda t: t.detach().clone(), lambda t: t),
        "other layout": (_turned, lambda t: t),
        "numpy": (lambda t: (t.detach().reshape(-1).contiguous().view(torch.uint8).numpy().copy(), t.dtype, t.shape)
                  if t.numel() else t.detach().clone(),
                  lambda kept: kept if isinstance(kept, Tensor)
                  else torch.from_numpy(kept[0]).view(kept[1]).reshape(kept[2])),
        "float64 and back": (lambda t: (t.detach().double() if t.is_floating_point() else t.detach(), t.dtype),
                             lambda kept: kept[0].to(kept[1])),
    }  # fmt: skip
    return torch.autograd.graph.saved_tensors_hooks(*ways[hooks])


def _turned(t: Tensor) -> Tensor:
    """A copy whose axes lie in the opposite order in memory."""
    t = t.detach()
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).clone(memory_format=torch.contiguous_format).permute(order)


def cotangent(case: Case, y: Tensor, again: int, many: int = 0) -> Tensor:
    """A random gradient of ``y`` as the case has it laid out; ``many`` of them."""
    generator = torch.Generator().manual_seed(case.seed + 17 + again)
    shape = (many, *y.shape) if many else tuple(y.shape)
    with torch.device("cpu"):
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(y.dtype)
        if many:
            return values
        if case.gradient == "sum":
            return torch.full((), 0.75, dtype=y.dtype).expand(y.shape)
        if case.gradient == "expanded" and y.dim():
            return layouts.expanded(values, y.dim() - 1)
        return layouts.laid_out(values, case.gradient)


def _backward(case: Case, found: Outcome, again: int, plain: bool) -> None:
    asked = case.wanted
    wanted = {n: t for n, t in found.arguments.items() if t.requires_grad and (asked is None or n in asked)}
    outputs = [t for t in found.outputs if t.requires_grad]
    if case.mutate is not None and not plain:
        _mutate(case.mutate, found)
    many = 3 if case.backward == "batched" else 0
    incoming = [cotangent(case, y, again, many) for y in outputs]
    options = {"allow_unused": True, "is_grads_batched": bool(many)}
    keep = case.backward in ("twice", "double")
    leaves, double = list(wanted.values()), case.backward == "double"
    if not leaves:
        return
    got = torch.autograd.grad(outputs, leaves, incoming, retain_graph=keep, create_graph=double, **options)
    found.gradients = dict(zip(wanted, got))
    if case.backward == "twice":
        found.again = dict(zip(wanted, torch.autograd.grad(outputs, leaves, incoming, **options)))
    if double:
        found.at = "second backward"
        found.second = _second(case, got, wanted)


def _second(case: Case, got: tuple[Tensor | None, ...], wanted: Tensors) -> Gradients | None:
    total = None
    for i, g in enumerate(got):
        if g is not None and g.requires_grad:
            generator = torch.Generator().manual_seed(case.seed + 31 + i)
            with torch.device("cpu"):
                factors = torch.randn(g.shape, generator=generator, dtype=torch.float64)
            term = (g.double() * factors).sum()
            total = term if total is None else total + term
    if total is None:
        return None
    return dict(zip(wanted, torch.autograd.grad(total, list(wanted.values()), allow_unused=True)))


def _mutate(name: str, found: Outcome) -> None:
    t = found.outputs[0] if name == "output" else found.arguments.get(name)
    if t is not None and t.numel():
        with torch.no_grad():
            t.add_(1)
