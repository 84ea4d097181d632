"""fuse and unfuse: a module whose forward has chains gets a subclass of its own class, with a forward that calls them.

The module stays the object it was, with its parameters, buffers, submodules, names and hooks; isinstance holds; copies
and pickles are traced anew when they are made.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tkernels.nn as tnn
from tkernels.fusion import chains, tracing
from tkernels.fusion.chains import Chain
from tkernels.ops.cross_entropy import cross_entropy

Model = TypeVar("Model", bound=nn.Module)
_REPORT = "_tkernels_fusion_report"


@dataclasses.dataclass
class FusionReport:
    """What :func:`fuse` did to a model. ``fused``: (module, chain); ``left``: (module, why it stays as it was)."""

    fused: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    left: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"fused: {len(self.fused)} chains"]
        lines += [f"  {name or '(model)'}: {what}" for name, what in self.fused]
        lines.append(f"left as it was: {len(self.left)}")
        lines += [f"  {name or '(model)'}: {why}" for name, why in self.left]
        return "\n".join(lines)


def fuse(model: Model, report: bool = False) -> Model:
    """Let ``model`` call fused operators for the chains of layers they cover; returns the same object, changed.

    Chains, in Sequentials and in any forward torch.fx can trace: n x (Conv2d -> BatchNorm2d -> ReLU) -> MaxPool2d ->
    Dropout2d; Conv2d or Linear -> activation, Linear -> Dropout; batch norm -> residual addition -> activation; losses
    by cross entropy. Activations: ReLU, LeakyReLU(0.01), GELU, SiLU. Parameters, buffers and state_dict are untouched,
    train() and eval() go on working, and layers with hooks are left alone, with a warning. An attribute that forward
    reads as a plain Python value (a flag, a rate) counts as it is now.

    ``report``: print what was fused, what was not and why; :func:`fusion_report` returns it. Undone by :func:`unfuse`.
    Raises TypeError for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    unfuse(model)
    found = FusionReport()
    for name, module in model.named_modules():
        _fuse_one(module, name, found)
    model.__dict__[_REPORT] = found
    if report:
        print(found)
    return model


def fusion_report(model: nn.Module) -> FusionReport:
    """What the last :func:`fuse` of ``model`` did. Raises ValueError for a model that was not fused."""
    found = model.__dict__.get(_REPORT)
    if found is None:
        raise ValueError("model was not fused: call tkernels.fuse(model) first")
    result: FusionReport = found
    return result


def unfuse(model: Model) -> Model:
    """Undo :func:`fuse`: every module gets its class back. Returns the same object."""
    for module in model.modules():
        module.__dict__.pop(_REPORT, None)
        if "_tkernels_class" in type(module).__dict__:
            module.__class__ = type(module).__dict__["_tkernels_class"]
        elif module.__dict__.pop("_tkernels_swapped", False):
            module.__class__ = nn.CrossEntropyLoss
    return model


def _fuse_one(module: nn.Module, name: str, report: FusionReport) -> None:
    if type(module) is nn.CrossEntropyLoss:
        module.__class__ = tnn.CrossEntropyLoss
        module.__dict__["_tkernels_swapped"] = True
        report.fused.append((name, "cross entropy"))
        return
    if not _considered(module):
        return
    if "forward" in module.__dict__:
        report.left.append((name, "another forward was put in the place of its class's"))
        return
    try:
        variants = {mode: tracing.trace(module, mode) for mode in (True, False)}
    except tracing.Untraceable as error:
        report.left.append((name, str(error)))
        return
    forwards = {mode: _rewritten(module, traced, name, report if mode else None) for mode, traced in variants.items()}
    if not any(forwards.values()):
        return
    module.__class__ = _subclass(type(module), forwards, variants)


def _considered(module: nn.Module) -> bool:
    """Whether a module's own forward may hold a chain: those of torch.nn, but for Sequential, do not."""
    cls = type(module)
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, torch.jit.ScriptModule, fx.GraphModule)):
        return isinstance(module, fx.GraphModule)
    if cls is nn.Sequential:
        return len(module._modules) > 1
    return cls.forward is not nn.Module.forward and not cls.__module__.startswith(("torch.nn.", "tkernels."))


def _rewritten(
    module: nn.Module, traced: tracing.Traced, name: str, report: FusionReport | None
) -> Callable[..., Any] | None:
    """The forward that calls the fused operators; None if there is nothing to fuse."""
    graph = traced.graph
    modules = dict(module.named_modules(remove_duplicate=False))
    found, left = chains.find(graph, modules)
    prefix = f"{name}." if name else ""
    losses = _replace_losses(graph)
    kept = []
    for chain in found:
        hooks = [step for step in chain.steps if step.module is not None and chains.hooked(step.module)]
        if not hooks:
            kept.append(chain)
            _replace(graph, chain)
        elif report is not None:
            why = f"{chain.describe()}: hooks on {', '.join(str(step.node.target) for step in hooks)}"
            report.left.append((name, why))
            warnings.warn(f"tkernels.fuse leaves {prefix}{chain.steps[0].node.target} alone: {why}", stacklevel=4)
    if report is not None:
        report.fused += [(name, chain.describe()) for chain in kept] + [(name, "cross entropy")] * losses
        report.left += [(prefix + layer, why) for layer, why in left]
    if not kept and not losses:
        return None
    code = graph.python_code("self")
    space: dict[str, Any] = dict(code.globals)
    exec(code.src, space)
    forward: Callable[..., Any] = space["forward"]
    return forward


def _replace(graph: fx.Graph, chain: Chain) -> None:
    first, last = chain.steps[0].node, chain.steps[-1].node
    with graph.inserting_before(last):
        modules = [graph.create_node("get_attr", str(step.node.target), (), {}, None) for step in chain.steps
                   if step.module is not None]  # fmt: skip
        call = graph.call_function(chain.run, (first.args[0], chain.residual, modules))
    last.replace_all_uses_with(call)
    for step in reversed(chain.steps):
        graph.erase_node(step.node)


def _replace_losses(graph: fx.Graph) -> int:
    """F.cross_entropy by ours, where it is called without the arguments torch has deprecated."""
    count = 0
    for node in graph.nodes:
        if node.op != "call_function" or node.target is not F.cross_entropy or len(node.args) > 3:
            continue
        if node.kwargs.get("size_average") is None and node.kwargs.get("reduce") is None:
            node.target = cross_entropy
            node.kwargs = {key: t for key, t in node.kwargs.items() if key not in ("size_average", "reduce")}
            count += 1
    return count


class _Fused(nn.Module):
    """What the subclasses fuse makes have in common."""

    _tkernels_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        return _restored, (self._tkernels_class,), *reduced[2:]


def _restored(cls: type[nn.Module]) -> nn.Module:
    return _Restored.__new__(type(cls.__name__, (_Restored, cls), {"_tkernels_class": cls}))


class _Restored(nn.Module):
    """A copy or a pickle on its way back: traced anew once its submodules are there."""

    _tkernels_class: type[nn.Module]

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.__class__ = self._tkernels_class  # type: ignore[assignment]
        _fuse_one(self, "", FusionReport())


def _subclass(cls: type[nn.Module], forwards: dict[bool, Any], variants: dict[bool, tracing.Traced]) -> type[nn.Module]:
    """``cls`` with a forward that takes the rewritten one of its mode, for calls of the kind that was traced."""
    original: Any = cls.forward
    required = variants[True].required
    signature = inspect.signature(original)
    asks_types = variants[True].asks_types or variants[False].asks_types

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        fused = forwards[self.training]
        if fused is None:
            return original(self, *args, **kwargs)
        if kwargs or len(args) != required:
            given = _as_traced(signature, required, self, args, kwargs)
            if given is None:
                return original(self, *args, **kwargs)
            args = given
        if asks_types and any(isinstance(value, Tensor) for value in args):
            return original(self, *args, **kwargs)
        return fused(self, *args)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = original.__doc__
    body = {"forward": forward, "_tkernels_class": cls, "__module__": cls.__module__, "__doc__": cls.__doc__,
            "__qualname__": cls.__qualname__}  # fmt: skip
    return type(cls.__name__, (_Fused, cls), body)


def _as_traced(
    signature: inspect.Signature, required: int, module: Any, args: Any, kwargs: Any
) -> tuple[Any, ...] | None:
    """The required arguments, or None where one with a default got another value."""
    bound = signature.bind(module, *args, **kwargs).arguments
    values = []
    for i, (name, parameter) in enumerate(list(signature.parameters.items())[1:]):
        if i < required and parameter.default is parameter.empty:
            values.append(bound[name])
        elif name in bound and bound[name] is not parameter.default:
            return None
    return tuple(values)
