"""One module's own forward as a graph, its submodules as single nodes."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx, nn


class Untraceable(Exception):
    """Why a module's forward can't be written down as a graph."""


class Traced(NamedTuple):
    """``required``: how many arguments the graph takes; ``asks_types``: whether forward asked for the type of one, and
    was told that it is no tensor."""

    graph: fx.Graph
    required: int
    asks_types: bool


class _Argument(fx.Proxy):
    """A forward's argument, which notices when isinstance is asked about it."""

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":  # isinstance looks here where the object's type does not decide
            asking = str(sys._getframe(1).f_globals.get("__name__"))
            if not asking.startswith("torch.fx"):
                tracer: Any = object.__getattribute__(self, "tracer")
                tracer.asks_types = True
        return super().__getattribute__(name)


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.asks_types = False
        self.required = 0
        self._modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A graph has no place for what a ``with`` block switches."""
        if _modes() != self._modes:
            raise Untraceable("its forward switches gradients, autocast or checkpointing for some of its layers")
        return super().create_node(*args, **kwargs)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Arguments with a default get it: the graph serves calls that leave them out."""
        args: list[Any] = [self.root]
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise Untraceable(f"forward takes {parameter}")
            if parameter.default is parameter.empty:
                if parameter.kind is parameter.KEYWORD_ONLY:
                    raise Untraceable(f"forward takes the keyword {parameter.name}")
                node = self.create_node("placeholder", parameter.name, (), {})
                args.append(_Argument(node, self))
                self.required += 1
            elif parameter.kind is not parameter.KEYWORD_ONLY:
                args.append(parameter.default)
        return root_fn, args


def _modes() -> tuple[Any, ...]:
    """The switches of torch that a forward may turn for some of its calls."""
    kinds = ("cpu", "cuda")
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
    saving = torch._C._autograd._top_saved_tensors_default_hooks(False)  # what checkpointing works by
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), saving, *autocast


def trace(module: nn.Module, training: bool) -> Traced:
    """The graph of ``module.forward`` in training or evaluation.

    Raises Untraceable where it depends on values, draws random numbers, makes tensors, changes attributes or switches.
    """
    before = dict(module.__dict__)
    draws = random.getstate(), torch.random.get_rng_state()
    module.__dict__["training"] = training
    tracer = _Tracer()
    try:
        graph = tracer.trace(module)
    except Untraceable:
        raise
    except Exception as error:
        raise Untraceable(
            f"its forward can't be traced: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from None
    finally:
        after = dict(module.__dict__)
        module.__dict__.clear()
        module.__dict__.update(before)
    if random.getstate() != draws[0] or not torch.equal(torch.random.get_rng_state(), draws[1]):
        torch.random.set_rng_state(draws[1])
        random.setstate(draws[0])
        raise Untraceable("its forward draws random numbers")
    after["training"] = before["training"]
    if after.keys() != before.keys() or any(after[key] is not before[key] for key in before):
        raise Untraceable("its forward changes attributes or makes tensors of its own")
    return Traced(graph, tracer.required, tracer.asks_types)
