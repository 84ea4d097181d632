"""Guards that Dynamo leaves out unless it is told otherwise."""

from __future__ import annotations

from torch._dynamo.guards import GuardBuilder
from torch._guards import Guard, TracingContext


def watch_hooks() -> None:
    """Have the graph that is being compiled notice hooks registered on its modules later.

    Dynamo inlines modules by their hooks as they are, and by default (torch._dynamo.config.skip_nnmodule_hook_guards)
    takes modules without any to stay so.
    """
    context = TracingContext.try_get()
    if context is None:
        return
    guards = context.guards_context.dynamo_guards
    for guard in list(guards):
        if guard.create_fn is GuardBuilder.EMPTY_NN_MODULE_HOOKS_DICT:
            guards.add(Guard(guard.originating_source, GuardBuilder.SEQUENCE_LENGTH))
