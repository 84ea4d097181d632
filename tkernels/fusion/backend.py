"""torch.compile(model, backend="tkernels"): Dynamo captures and guards, chains of layers become fused calls, the rest
of the graph runs as it was, or goes on to Inductor."""

from __future__ import annotations

import operator
import types
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from typing import Any

import torch
from torch import fx

from tkernels.core import _torch, hardware
from tkernels.fusion import calls, chains, checkpoint
from tkernels.fusion.calls import Call
from tkernels.fusion.hints import Hints
from tkernels.fusion.report import FusionReport

_RESTS = ("eager", "inductor")
Run = Callable[..., Any]

# the entry point that the package has where it is installed
_NAME = __name__.partition(".")[0]
_torch.register_backend(_NAME, EntryPoint(_NAME, f"{_NAME}.fusion:tkernels", "torch_dynamo_backends"))


def tkernels(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Any = None, mode: Any = None) -> Run:
    """The backend that torch.compile finds by the name "tkernels".

    Args:
        gm: what Dynamo captured
        example_inputs: what it was captured with
        options: ``{"rest": "eager"}`` (the default) runs what is no chain as it was written, ``{"rest": "inductor"}``
            has Inductor compile it
        mode: goes on to Inductor

    Raises:
        ValueError: For other options.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> model = torch.compile(model.eval().to(memory_format=torch.channels_last), backend="tkernels")
        >>> with torch.inference_mode():
        ...     model(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 8, 14, 14])
    """
    backend = Backend(options, mode)
    run = backend(gm, example_inputs)
    report = backend.report
    if report.left and not report.fused:
        layer, why = report.left[0]
        warnings.warn(f'backend "tkernels" fused nothing in a graph; {layer}: {why}', stacklevel=2)
    return run


class Backend:
    """A backend that keeps a report of its graphs. ``ran``: how many fused chains its graphs have called."""

    def __init__(self, options: dict[str, Any] | None = None, mode: str | None = None) -> None:
        self.rest = _checked_rest(options)
        self.mode = mode
        self.report = FusionReport()
        self.hints = Hints()
        self.ran = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Run:
        self.hints.look(gm)
        self.report.hints = self.hints.lines()
        count = self._rewrite(gm)
        run = self._finish(gm, example_inputs)
        self.report.graphs += 1
        if count == 0:
            return run

        def counted(*args: Any) -> Any:
            self.ran += count
            return run(*args)

        return counted

    def _rewrite(self, gm: fx.GraphModule) -> int:
        """Put fused calls in the place of a graph's chains, and say so in the report. Returns their number."""
        eager, count = self.rest == "eager", 0
        if eager:
            count = sum(self._rewrite(body) for body in checkpoint.bodies(gm))
            checkpoint.run_eagerly(gm)
        fusible, left = chains.find(gm.graph)
        self.report.left += left
        chosen: list[Call] = []
        for chain in fusible:
            call = calls.call_of(chain, eager)
            if isinstance(call, str):
                self.report.left.append((chain.name() if len(chain.steps) == 1 else chain.path(), call))
            else:
                chosen.append(call)
                self.report.left += chain.beyond(call.chains[0])
        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        replaced: dict[fx.Node, fx.Node] = {}
        made: dict[fx.Node, Call] = {}
        joined = calls.with_shortcuts(calls.joined(chosen), order) if eager else calls.joined(chosen)
        for call in sorted(joined, key=lambda call: order[call.last]):
            self.report.fused.append((call.chains[0].where(), call.describe()))
            made[_replace(gm.graph, call, replaced)] = call
        if eager:
            _give_twice(gm.graph, made)
        count_together(gm.graph)
        gm.graph.lint()
        gm.recompile()
        return count + len(chosen)

    def _finish(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Run:
        if self.rest == "eager":
            # what writes the code down at the first call would stay in the way of all others
            _torch.LazyGraphModule.force_recompile(gm)
            return _roomy(gm.forward)
        hardware.find_cuda()
        inductor: Any = _torch.lookup_backend("inductor")
        mode = {} if self.mode is None else {"mode": self.mode}
        run: Run = inductor(gm, list(example_inputs), **mode)
        return run


# Words of a chunk in which CPython keeps frames (16 KB); one that does not fit has a larger chunk to itself, with 1000
# words to spare.
_CHUNK = 2048


def _roomy(method: Any) -> Run:
    """A graph's code with a frame that has a chunk of its own. Hundreds of locals otherwise fill the caller's chunk to
    where each call that the graph makes has a chunk mapped and unmapped: 20 microseconds more, or not, by how deep the
    caller stands. (regnet_y_400mf's inference: 14.4 ms so, 11.9 otherwise.)"""
    function = method.__func__
    code = function.__code__.replace(co_stacksize=function.__code__.co_stacksize + _CHUNK)
    roomy = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    return types.MethodType(roomy, method.__self__)


def _checked_rest(options: dict[str, Any] | None) -> str:
    others = dict(options or {})
    rest = others.pop("rest", "eager")
    if others or rest not in _RESTS:
        raise ValueError(f"options of the backend must be {{'rest': one of {_RESTS}}}, got {options}")
    return str(rest)


def _replace(graph: fx.Graph, call: Call, replaced: dict[fx.Node, fx.Node]) -> fx.Node:
    """The call's node. ``replaced``: the nodes that calls before this one stand for, and theirs."""
    arguments = tuple(replaced.get(argument, argument) for argument in call.arguments)
    with graph.inserting_before(call.last):
        node = graph.call_function(call.function, arguments)
    node.meta.update(call.last.meta)
    replaced[call.last] = node
    call.last.replace_all_uses_with(node)
    nodes = [step.node for chain in call.every for step in chain.steps]
    for node_of_chain in sorted(nodes, key=list(graph.nodes).index, reverse=True):
        graph.erase_node(node_of_chain)
    return node


def _give_twice(graph: fx.Graph, made: dict[fx.Node, Call]) -> None:
    """Where a residual block's result is read by two calls of conv stages, or twice by one, a tensor for each: their
    gradients are then added where they are read, and by no pass of autograd's. Nobody else may read it: not the graph's
    output, nor a call that has it in a list."""
    for node, call in made.items():
        readers = [user for user in node.users for argument in user.args if argument is node]
        if call.twice is None or len(readers) != 2 or not all(u in made and made[u].stage for u in node.users):
            continue
        node.target = call.twice
        with graph.inserting_after(node):
            second = graph.call_function(operator.getitem, (node, 1))
            first = graph.call_function(operator.getitem, (node, 0))
        parts = iter((first, second))
        for user in dict.fromkeys(readers):
            user.args = tuple([next(parts) if argument is node else argument for argument in user.args])


def count_together(graph: fx.Graph) -> None:
    """Batch norms' counters, of which each would be a launch of its own, go up in one call: the first, since a
    checkpointed graph need not run to its end again."""
    counting = {node: count for node in graph.nodes if (count := chains.counter(node)) is not None}
    if not counting:
        return
    by_device: dict[torch.device, list[fx.Node]] = {}
    for count in counting.values():
        by_device.setdefault(chains.value(count).device, []).append(count)
    # (a part of a graph that DistributedDataParallel had cut has other nodes before some of its inputs)
    *_, last = graph.find_nodes(op="placeholder")
    with graph.inserting_after(last):
        for counts in by_device.values():
            graph.call_function(count_up, (counts,))
    for node in counting:
        graph.erase_node(node)


def count_up(counts: list[torch.Tensor]) -> None:
    """Add one to each. Of a layer that now stands in a second place, which no guard tells, one counter has two names: a
    GPU would read both before it writes either."""
    if len(set(map(id, counts))) == len(counts):
        _torch.foreach_add_(counts, 1)
    else:
        for count in counts:
            count.add_(1)
