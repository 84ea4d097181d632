"""Launch functions as torch.library operators, for whoever traces: torch.compile, export, fake tensors, FLOP counts.

What is registered is the launch, not the operator: a function that writes into tensors it is given (``mutates``), whose
fake does nothing. The operator around it (checks, autograd, allocations) is traced as it is written.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tkernels.core import mode
from tkernels.core.plan import Planned, Slot

Launches = Callable[..., None]

_library = torch.library.Library("tkernels", "FRAGMENT")


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

        if not hasattr(torch.ops.tkernels, name):  # else it is a copy of the module
            _library.define(f"{name}{_schema(function, positional, mutates.split())}")
            _library.impl(name, run, "CompositeExplicitAutograd")
            torch.library.register_fake(f"tkernels::{name}", lambda *args, **kwargs: None, lib=_library)
            if flops is not None:
                counted = lambda *args, out_shape=None, **kwargs: flops(*args, **kwargs)  # noqa: E731
                register_flop_formula(getattr(torch.ops.tkernels, name))(counted)
        registered = getattr(torch.ops.tkernels, name)
        return wrapper

    return decorate


def no_flops(*args: Any, **kwargs: Any) -> int:
    """Of what forms no products, as torch counts none for its own."""
    return 0


def _schema(function: Launches, positional: list[str], mutated: list[str]) -> str:
    signature = inspect.signature(function, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name in positional]

    def stub(*args: Any) -> None: ...

    stub.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    stub.__annotations__ = {p.name: p.annotation for p in own} | {"return": None}
    return str(torch.library.infer_schema(stub, mutates_args=mutated))
