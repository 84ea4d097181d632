"""Finds the chains of layers that have a fused call in Dynamo's graph."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, fx

from tkernels.core import _torch
from tkernels.fusion.steps import Step, step_of, value, writes_over_its_input, written

# what comes after a chain's first layers, each at most once, in this order
_TAIL = ("add", "activation", "pool", "dropout2d")


class Chain(NamedTuple):
    """Layers with one fused call, in the order of their nodes, which use one another's results alone."""

    steps: tuple[Step, ...]

    @property
    def first(self) -> Step:
        return self.steps[0]

    @property
    def last(self) -> Step:
        return self.steps[-1]

    def get(self, kind: str) -> Step | None:
        return next((step for step in self.steps if step.kind == kind), None)

    @property
    def residual(self) -> fx.Node | None:
        """The other operand of its addition, if it has one."""
        addition = self.get("add")
        if addition is None:
            return None
        before = self.steps[self.steps.index(addition) - 1].node
        first: fx.Node = addition.arguments["input"]
        other: fx.Node = addition.arguments["other"]
        return other if first is before else first

    def without_last(self) -> Chain:
        return Chain(self.steps[:-1])

    def beyond(self, part: Chain) -> list[tuple[str, str]]:
        """(layer, why it is left) of the layers behind a part of this chain, its beginning, that has a fused call."""
        names = {"pool": "max pool", "dropout2d": "Dropout2d"}
        rest = self.steps[len(part.steps) :]
        return [
            (_name(step.node), f"{names.get(step.kind, step.kind)}, PyTorch's own behind the fused layers")
            for step in rest
        ]

    def describe(self) -> str:
        """Its layers by name, as a reader of the model knows them."""
        return " -> ".join(_name(step.node).split(".")[-1] or step.kind for step in self.steps)

    def name(self) -> str:
        """Its first layer's."""
        return _name(self.first.node)

    def path(self) -> str:
        """All of its layers, after the module that they are in."""
        return f"{self.where()}.{self.describe()}".lstrip(".")

    def where(self) -> str:
        """The module that its layers are in."""
        paths = [_name(step.node).split(".")[:-1] for step in self.steps if step.kind != "add"]
        common = paths[0]
        for path in paths[1:]:
            while path[: len(common)] != common:
                common = common[:-1]
        return ".".join(common)


def _name(node: fx.Node) -> str:
    """The path of the module whose forward made this call, or of the function within it."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = _path(stack[-1][0]) if stack else ""
    if stack and str(getattr(stack[-1][1], "__module__", "")).startswith("torch.nn.modules."):
        return path
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.target in (operator.add, operator.iadd, "add_"):
        target = "add"
    elif target == "fn":  # how torch names its functions with two signatures
        target = "max_pool2d"
    return f"{path}.{target}" if path else str(target)


def _path(source: str) -> str:
    """layer1.0.conv1 for L['self'].layer1[0]._modules['conv1'] and its kind."""
    parts = re.findall(r"\['?([^'\]]+)'?\]|\.?(\w+)", source)
    names = ["".join(part) for part in parts]
    return ".".join(name for name in names[2:] if name not in _torch.PATH_NOISE)


def find(graph: fx.Graph) -> tuple[list[Chain], list[tuple[str, str]]]:
    """(chains, (layer, why it was left) of those that start like one). A convolution or a linear layer alone is one
    here."""
    chains: list[Chain] = []
    left: list[tuple[str, str]] = []
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        step = None if node in taken else step_of(node)
        if step is None or step.kind not in ("conv", "linear", "norm", "loss"):
            continue
        chain = Chain(tuple(_longest(step, taken)))
        reason = whole = disturbed(chain)
        # what disturbs its end may leave its beginning alone
        while reason is not None and len(chain.steps) > 2:
            chain = chain.without_last()
            reason = disturbed(chain) and whole
        if step.kind not in ("conv", "linear"):
            reason = incomplete(chain) or reason
        if reason is None:
            chains.append(chain)
            taken.update(s.node for s in chain.steps)
        else:
            left.append((chain.name(), reason))
    return chains, left


def _longest(first: Step, taken: set[fx.Node]) -> Iterator[Step]:
    """A chain's steps from its first on."""
    yield first
    if first.kind == "loss":
        return
    step, rest = first, list(_TAIL)
    if first.kind == "linear":
        rest = ["activation", "dropout"]
    elif first.kind == "conv":
        follow = _next(first, taken)
        if follow is not None and follow.kind == "norm":
            yield follow
            step = follow
        else:
            rest = ["activation"]
    while rest and (follow := _next(step, taken)) is not None and follow.kind in rest:
        # pooling comes after an activation, dropout after either
        if follow.kind == "pool" and step.kind != "activation":
            return
        rest = rest[rest.index(follow.kind) + 1 :]
        yield follow
        step = follow


def _next(step: Step, taken: set[fx.Node]) -> Step | None:
    """The step after one, if that is its result's only use."""
    if len(step.node.users) != 1:
        return None
    node = next(iter(step.node.users))
    follow = None if node in taken else step_of(node)
    if follow is None:
        return None
    if follow.kind == "add":
        first, second = follow.arguments["input"], follow.arguments["other"]
        if first is second or (writes_over_its_input(follow) and first is not step.node):
            return None
        return follow
    return follow if follow.arguments["input"] is step.node else None


def incomplete(chain: Chain) -> str | None:
    """Why a chain is none to be fused: it is a layer alone. None if it is one."""
    first = chain.first
    if first.kind == "loss" or len(chain.steps) > 1:
        return None
    names = {"conv": "convolution", "linear": "linear layer", "norm": "batch norm"}
    return f"{names[first.kind]} alone, followed by {_what_follows(first)}: nothing to fuse it with"


def _what_follows(step: Step) -> str:
    users = list(step.node.users)
    if len(users) != 1:
        return f"{len(users)} uses of its result" if users else "nothing"
    return "the end of the graph" if users[0].op == "output" else _name(users[0])


def disturbed(chain: Chain) -> str | None:
    """Why a chain cannot be run in its last layer's place: a layer in between writes to what it reads, reads what it
    writes, or switches a mode. None where nothing is in the way.

    Dynamo's fake tensors share storages where the real ones will: two names of one memory are seen as such.
    """
    inside = {step.node for step in chain.steps}
    reads, writes = set[int](), set[int]()
    for step in chain.steps:
        reads.update(s for node in step.node.all_input_nodes if node not in inside for s in _storages(node))
        writes.update(s for node in written(step.node) if node not in inside for s in _storages(node))
    node, end = chain.first.node, chain.last.node
    while node is not end:
        node = node.next
        if node not in inside and node.op != "placeholder" and not _counts(node):
            if not _computes_tensors(node):
                return f"{_name(node) or node.name} comes between its layers"
            touched = {s for argument in written(node) for s in _storages(argument)}
            if touched & (reads | writes):
                return f"{_name(node)} writes between its layers to what they read"
            if writes & {s for argument in node.all_input_nodes for s in _storages(argument)}:
                return f"{_name(node)} reads between its layers what they write"
    return None


def _storages(node: fx.Node) -> Iterator[int]:
    result = value(node)
    for leaf in result if isinstance(result, (tuple, list)) else (result,):
        if isinstance(leaf, Tensor):
            try:
                yield _torch.storage_address(leaf.untyped_storage())
            except (RuntimeError, NotImplementedError):  # sparse and the like have none
                yield id(leaf)


def _computes_tensors(node: fx.Node) -> bool:
    """Whether a node is arithmetic, rather than a switch of gradients, autocast and the like."""
    result = value(node)
    leaves = result if isinstance(result, (tuple, list)) else (result,)
    return bool(leaves) and all(isinstance(leaf, (Tensor, int, float, torch.SymInt, torch.SymFloat)) for leaf in leaves)


def counter(node: fx.Node) -> fx.Node | None:
    """The counter of batches that a node adds one to, if that is all that it does."""
    if node.op != "call_method" or node.target != "add_" or node.users or len(node.args) != 2 or node.kwargs:
        return None
    count, one = node.args
    if one != 1 or not isinstance(count, fx.Node) or count.op != "placeholder" or len(count.users) != 1:
        return None
    tensor = value(count)
    return count if tensor.dim() == 0 and tensor.dtype == torch.int64 else None


def _counts(node: fx.Node) -> bool:
    return counter(node) is not None or getattr(node.target, "__name__", "") == _torch.LOGS_API_USAGE
