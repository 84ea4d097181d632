"""Launch functions as torch.library operators, for whoever traces: torch.compile, export, fake tensors, FLOP counts.

What is registered is the launch, not the operator: a function that writes into tensors it is given (``mutates``), whose
fake does nothing. The operator around it (checks, autograd, allocations) is traced as it is written. A pass that is too
long to be traced, or whose workspaces depend on the batch, is registered as a whole (``whole_pass``).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tkernels.core import _torch, late, mode
from tkernels.core.plan import Planned, Slot

Launches = Callable[..., None]
Results = Callable[..., list[Tensor]]

NAMESPACE = __name__.partition(".")[0]  # a build of the package under another name has operators of its own
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_operators = getattr(torch.ops, NAMESPACE)
_defined: set[str] = set()


def _define(name: str) -> None:
    """Most operators are defined where kernels are, which run late: a program that torch.export.load reads asks for
    them by name. (So does torch, as it defines one.)"""
    if name not in _defined and mode.HAS_TRITON:
        late.run_all()


_torch.when_operator_is_missing(NAMESPACE, _define)


def launches(name: str, mutates: str, flops: Callable[..., int] | None = None) -> Callable[[Launches], Launches]:
    """Decorator of a launch function, torch.ops.tkernels.``name``; it writes into the arguments named in ``mutates``.

    Called on slots it adds to their plan; on tensors it makes and runs a plan of its own; in a trace it is the
    registered operator. Keyword-only arguments (a configuration) are for tests and tuning and no part of it.
    ``flops``: of the arguments, tensors as shapes.
    """

    def decorate(function: Launches) -> Launches:
        signature = inspect.signature(function)
        parameters = signature.parameters
        places = [i for i, p in enumerate(parameters.values()) if "Tensor" in str(p.annotation)]
        positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]

        @Planned
        def planned(tensors: tuple[Tensor | None, ...], rest: tuple[Any, ...], keywords: Any) -> tuple[()]:
            arguments = list(rest)
            for place, t in zip(places, tensors):
                arguments[place] = t
            function(*arguments, **dict(keywords))
            return ()

        def run(*arguments: Any, **keywords: Any) -> None:
            # (the dispatcher makes lists of tuples)
            rest = [None if i in places else tuple(a) if isinstance(a, list) else a for i, a in enumerate(arguments)]
            planned(tuple([arguments[i] for i in places]), tuple(rest), tuple(keywords.items()))

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> None:
            if any(isinstance(a, Slot) for a in args):
                function(*args, **kwargs)
            elif mode.traced():
                registered(*args)
            else:
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                run(*bound.args, **bound.kwargs)

        schema = _schema(function, positional, mutates.split())
        registered = _register(name, schema, run, lambda *args, **kwargs: None, flops)
        return wrapper

    return decorate


def whole_pass(name: str, fake: Results, flops: Callable[..., int]) -> Callable[[Results], Results]:
    """Decorator of a function for traces alone, which becomes torch.ops.tkernels.``name``: it returns tensors of
    storage of their own, as many as ``fake`` makes of the same arguments and laid out as there."""

    def decorate(function: Results) -> Results:
        schema = _schema(function, list(inspect.signature(function).parameters), [])
        registered: Results = _register(name, schema, function, fake, flops)
        return registered

    return decorate


def _register(
    name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any], flops: Callable[..., int] | None
) -> Any:
    if name not in _defined:  # else it is a copy of the module
        _defined.add(name)
        _library.define(f"{name}{schema}")
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        if flops is not None:
            counted = lambda *args, out_shape=None, **kwargs: flops(*args, **kwargs)  # noqa: E731
            register_flop_formula(getattr(_operators, name))(counted)
            _torch.tell_flop_counters(getattr(_operators, name))
    return getattr(_operators, name)


def no_flops(*args: Any, **kwargs: Any) -> int:
    """Of what forms no products, as torch counts none for its own."""
    return 0


def _schema(function: Callable[..., Any], positional: list[str], mutated: list[str]) -> str:
    signature = inspect.signature(function, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name in positional]

    def stub(*args: Any) -> None: ...

    stub.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    stub.__annotations__ = {p.name: p.annotation for p in own} | {"return": signature.return_annotation}
    return str(torch.library.infer_schema(stub, mutates_args=mutated))
