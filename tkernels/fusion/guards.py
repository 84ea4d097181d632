"""Guards that Dynamo leaves out unless it is told otherwise."""

from __future__ import annotations

import operator
from typing import Any

from torch import nn
from torch._dynamo.guards import GuardBuilder
from torch._guards import Guard, TracingContext


def watch_modules() -> None:
    """Have the graph that is being compiled notice hooks registered on its modules later, and methods replaced on
    their classes.

    Dynamo inlines modules by their hooks as they are, and by default (torch._dynamo.config.skip_nnmodule_hook_guards)
    takes modules without any to stay so; classes it takes to stay as they are in any case.
    """
    context = TracingContext.try_get()
    if context is None:
        return
    guards = context.guards_context.dynamo_guards
    seen: set[type] = set()

    def watch_class(builder: Any, guard: Guard) -> None:
        cls = type(builder.get(guard))
        if cls not in seen:
            seen.add(cls)
            _watch_methods(builder, cls)

    for guard in list(guards):
        if guard.create_fn is GuardBuilder.EMPTY_NN_MODULE_HOOKS_DICT:
            hooks: Any = guard.originating_source
            guards.add(Guard(hooks, GuardBuilder.SEQUENCE_LENGTH))
            guards.add(Guard(hooks.base, watch_class))


def _watch_methods(builder: Any, cls: type) -> None:
    """A guard at the root, since those further down are not looked at while a module's own attributes stay."""
    names = {
        name
        for base in cls.__mro__
        if not issubclass(nn.Module, base)
        for name, attribute in vars(base).items()
        if callable(attribute) or isinstance(attribute, property)
    }
    methods = operator.attrgetter("forward", "__call__", *sorted(names))
    as_compiled = methods(cls)
    builder.guard_manager.root.add_lambda_guard(
        lambda _: methods(cls) == as_compiled, [f"methods of {cls.__name__} are what they were"], None
    )
