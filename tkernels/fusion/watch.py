"""What Dynamo's guards leave out of a model: hooks registered on its modules, and the methods of their classes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from itertools import chain
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from tkernels.core import _torch


class Watch:
    """A model's modules, hooks and methods as they were last seen.

    Dynamo takes modules without hooks to stay so (torch._dynamo.config.skip_nnmodule_hook_guards), and classes too. It
    can guard hooks, by six guards a module: those took a quarter of the time from a call to its graph, 0.14 ms of
    resnet18 and 0.3 ms of mobilenet_v2. Every hook gets a number of torch's, so a call only has to see that none was
    given since, and that the modules are those that were looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.look()

    def look(self) -> None:
        """Take the model as it is now."""
        modules = list(self._model.modules())
        self._handles = RemovableHandle.next_id
        self._containers: list[Any] = [module._modules for module in modules if module._modules]
        self._children = self._now()
        self._modules, self._types = modules, [type(module) for module in modules]
        self._classes = [(cls, _methods(cls)) for cls in set(self._types)]
        self._as_seen = self._methods_now()
        self.hooks = _hooks(modules)

    def stale(self) -> bool:
        """Whether to look again: something may have changed. (Removing a hook leaves no trace.)"""
        return bool(self.hooks) or self._handles != RemovableHandle.next_id or self._now() != self._children

    def methods_replaced(self) -> bool:
        """Whether a module got another class (which torch 2.11 does not guard), or a class another method."""
        return self._methods_now() != self._as_seen or list(map(type, self._modules)) != self._types

    def _methods_now(self) -> list[Any]:
        return [methods(cls) for cls, methods in self._classes]

    def _now(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._containers)))


def _methods(cls: type[nn.Module]) -> Callable[[type[nn.Module]], Any]:
    """What reads the methods that a class has more than nn.Module."""
    bases = (base for base in cls.__mro__ if not issubclass(nn.Module, base))
    names = {name for base in bases for name, attribute in vars(base).items() if callable(attribute)}
    return operator.attrgetter("forward", "__call__", *sorted(names))


def _hooks(modules: list[nn.Module]) -> Hashable:
    """Which modules have hooks of which kind, and how many; -1 for all modules."""
    places = [(-1, _torch.global_hooks()), *enumerate(map(vars, modules))]
    return tuple(
        (i, kind, len(hooks)) for i, attributes in places for kind in _torch.MODULE_HOOKS if (hooks := attributes[kind])
    )
