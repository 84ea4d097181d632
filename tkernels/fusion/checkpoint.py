"""Activation checkpointing inside a compiled model: Dynamo keeps the checkpointed part as a graph of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from tkernels.core import _torch
from tkernels.fusion.steps import written

_CHECKPOINT: Any = torch.ops.higher_order.tag_activation_checkpoint


def bodies(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """The graphs that ``gm`` checkpoints."""
    return [body for node in gm.graph.nodes if (body := _body(gm, node)) is not None]


def run_eagerly(gm: fx.GraphModule) -> None:
    """Have ``gm`` call torch.utils.checkpoint for its checkpointed graphs.

    The operator that Dynamo put there does so too, but passes batch norm's buffers as arguments, which checkpointing
    takes to stay as they are until backward: it raises for any batch norm in training.
    """
    for node in gm.graph.nodes:
        body = _body(gm, node)
        if body is None:
            continue
        with gm.graph.inserting_before(node):
            call = gm.graph.call_function(_checkpointed(body, node.kwargs), node.args[1:])
        call.meta.update(node.meta)
        node.replace_all_uses_with(call)
        gm.graph.erase_node(node)


def _body(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    if node.target is not _CHECKPOINT or not isinstance(node.args[0], fx.Node):
        return None
    body: Any = getattr(gm, str(node.args[0].target), None)
    # what selective checkpointing keeps is decided operator by operator, which is Dynamo's own affair
    return body if isinstance(body, fx.GraphModule) and _torch.CHECKPOINT_CONTEXT not in body.meta else None


def _checkpointed(body: fx.GraphModule, options: dict[str, Any]) -> Callable[..., Any]:
    changed = _changed(body.graph)
    options = {**options, "use_reentrant": False}

    def checkpointed(*args: Any) -> Any:
        def run(*unchanged: Any) -> Any:
            rest = iter(unchanged)
            return body(*(args[i] if i in changed else next(rest) for i in range(len(args))))

        return checkpoint(run, *(arg for i, arg in enumerate(args) if i not in changed), **options)

    return checkpointed


def _changed(graph: fx.Graph) -> set[int]:
    """Which of a graph's arguments it writes to."""
    places = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    return {places[argument] for node in graph.nodes for argument in written(node) if argument in places}
