"""fuse and unfuse: torch.compile with our backend in place, as torch.nn.Module.compile; explain: what that does."""

from __future__ import annotations

import copy
import itertools
import re
import time
import types
import warnings
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import nn

from tkernels.core import _torch
from tkernels.core._torch import dynamo_counters as counters
from tkernels.core.mode import plain_eager
from tkernels.fusion.backend import Backend
from tkernels.fusion.report import FusionReport
from tkernels.fusion.watch import Watch

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, report: bool = False, options: dict[str, Any] | None = None) -> Model:
    """Let ``model`` call fused operators for the chains of layers they cover.

    The model is compiled in place (:meth:`torch.nn.Module.compile`) with the backend "tkernels": Dynamo captures its
    forward at the first call and guards what it saw, so that layers swapped, hooks registered or modes switched later
    count. Chains, written as modules or functions: convolution -> batch norm -> residual addition -> activation -> max
    pool -> Dropout2d, where all after the convolution is optional; batch norm -> addition or activation; linear ->
    activation -> dropout; cross entropy. Activations: ReLU, ReLU6, LeakyReLU, SiLU, Hardswish, GELU. A chain that does
    not pay at its sizes on a CPU is left to PyTorch.

    Parameters, buffers, state_dict and the class stay; copies and pickles of the model are not compiled. A call that
    fused nothing warns, once. Undone by :func:`tkernels.unfuse`.

    Args:
        model: any module
        report: print, after the first call, what was fused, what was not and why, and what is yours to do (layout,
            precision, size); :func:`tkernels.explain` returns it
        options: of :func:`tkernels.fusion.tkernels`, the backend

    Returns:
        the same object, changed

    Raises:
        TypeError: For what is no module.
        ValueError: For unknown options.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> model = tkernels.fuse(model.eval().to(memory_format=torch.channels_last))
        >>> with torch.inference_mode():
        ...     y = model(torch.randn(2, 3, 16, 16))
        >>> tkernels.explain(model).fused  # of the model itself: its layers 0, 1 and 2 are one call
        [('', '0 -> 1 -> 2')]
    """
    _must_be_module(model)
    model._compiled_call_impl = _Fused(model, Backend(options), report).function()
    return model


def unfuse(model: Model) -> Model:
    """Undo :func:`tkernels.fuse`, of ``model`` and the modules in it. Parameters and buffers stay as they are.

    Args:
        model: any module, fused or not

    Returns:
        the same object, changed

    Raises:
        TypeError: For what is no module.

    Examples:
        >>> model = tkernels.fuse(torch.nn.Sequential(torch.nn.Linear(20, 10), torch.nn.ReLU()))
        >>> tkernels.unfuse(model) is model
        True
    """
    _must_be_module(model)
    for module in model.modules():
        if _fused(module) is not None:
            module._compiled_call_impl = None
    return model


def explain(model: nn.Module, *inputs: Any, **kwargs: Any) -> FusionReport:
    """What :func:`tkernels.fuse` makes of a model: chains fused, layers left and why, what Dynamo ended a graph at.

    With arguments for its forward, of a call with those: a copy of the model is fused and called, in the gradient and
    autocast modes in force, and ``model`` stays as it is. Without, of the calls so far of a fused model.

    Args:
        model: fused or, beside arguments for its forward, any module
        *inputs: for the model's forward
        **kwargs: likewise

    Raises:
        TypeError: For what is no module.
        ValueError: For a model that was not fused, without arguments for its forward.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> model = model.eval().to(memory_format=torch.channels_last)
        >>> with torch.inference_mode():
        ...     report = tkernels.explain(model, torch.randn(2, 3, 16, 16))
        >>> report.fused
        [('', '0 -> 1 -> 2')]
    """
    _must_be_module(model)
    if inputs or kwargs:
        twin = fuse(copy.deepcopy(_torch.uncompiled(model)))
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin(*inputs, **kwargs)
        return explain(twin)
    fused = _fused(model)
    if fused is None:
        raise ValueError("model was not fused: call tkernels.fuse(model) first, or explain(model, *inputs)")
    return fused.backend.report


def _must_be_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _fused(model: nn.Module) -> _Fused | None:
    return getattr(model._compiled_call_impl, "tkernels_fused", None)


class _Fused:
    """A fused model's call."""

    def __init__(self, model: nn.Module, backend: Backend, print_report: bool) -> None:
        self.model = model
        self.backend = backend
        self.print_report = print_report
        self.warned = False
        self.watch = Watch(model)
        # by the hooks that they were compiled with: what Dynamo cannot take under some it may under others
        self.compiled: dict[Hashable, Callable[..., Any]] = {}

    def function(self) -> Callable[..., Any]:
        """As a function: torch.jit.script passes over those it finds among a module's attributes."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return self.call(args, kwargs)

        call.tkernels_fused = self  # type: ignore[attr-defined]
        return call

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # an outer trace, a transform or a mode sees the model that the user wrote
        if torch.compiler.is_compiling() or not plain_eager():
            return self.model._call_impl(*args, **kwargs)
        compiled, backend = self._compiled(), self.backend
        ran, graphs, left = backend.ran, backend.report.graphs, len(backend.report.left)
        start = time.perf_counter()
        breaks = dict(counters["graph_break"])
        try:
            result = compiled(*args, **kwargs)
        except _torch.TorchRuntimeError:
            if backend.report.breaks or counters["graph_break"] != breaks:
                raise
            # an operator refused its arguments before anything ran: in its own words, rather than in Dynamo's
            return self.model._call_impl(*args, **kwargs)
        if counters["graph_break"] != breaks:
            new = (reason for reason, count in counters["graph_break"].items() if breaks.get(reason) != count)
            backend.report.breaks += [_first_lines(reason) for reason in new]
        if backend.report.graphs != graphs:
            backend.report.seconds += time.perf_counter() - start
        if self.print_report:
            self.print_report = False
            print(backend.report)
        if backend.ran == ran and not self.warned:
            self.warned = True
            self._warn(backend.report.left[left:] or backend.report.left)
        return result

    def _compiled(self) -> Callable[..., Any]:
        """The model's call, compiled for its modules as they are."""
        watch = self.watch
        if watch.methods_replaced():
            self.compiled.clear()
            watch.look()
        elif watch.stale():
            watch.look()
        compiled = self.compiled.get(watch.hooks)
        if compiled is None:
            compiled = self.compiled[watch.hooks] = torch.compile(entry(self.model), backend=self.backend, **_ISOLATED)
        return compiled

    def _warn(self, left: list[tuple[str, str]]) -> None:
        """Say that a call fused nothing, and the first reason among what was left, in its own graphs if it has any."""
        breaks = self.backend.report.breaks
        if left:
            why = "{}: {}".format(*left[0])
        else:
            why = breaks[0] if breaks else "Dynamo captured no layer that starts a chain"
        warnings.warn(
            f"tkernels.fuse: a call of {type(self.model).__name__} ran no fused operator ({why}); "
            "tkernels.explain(model) says more",
            stacklevel=5,
        )


def _first_lines(reason: str) -> str:
    """What Dynamo met, why that ends a graph and, where it says so, in which line."""
    what, _, rest = reason.partition("\n")
    explained = re.search(r"Explanation: (.*)", rest)
    place = re.search(r'File "(.*)", line (\d+)', rest)
    said = what.strip() + (f": {explained[1].strip()}" if explained else "")
    return said[:300] + (f" ({place[1]}:{place[2]})" if place else "")


# Where Dynamo ends a graph it goes on with functions of the model's class, whose code and limit all its models share.
_CAN_ISOLATE = "isolate_recompiles" in (torch.compile.__kwdefaults__ or {})  # torch 2.14
_ISOLATED: dict[str, Any] = {"isolate_recompiles": True} if _CAN_ISOLATE else {}
_entries = itertools.count()


def entry(model: nn.Module) -> Callable[..., Any]:
    """The model's call as a function with code of its own: Dynamo keeps what it compiled, and counts it against its
    limit, by code, and what it has seen change by the code's name; all modules share Module._call_impl's."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    code = call.__code__.replace(co_name=f"call_{type(model).__name__}_{next(_entries)}")
    return types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)
