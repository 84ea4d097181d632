"""What a node of Dynamo's graph is in a chain of layers, whether it was written as a module or as a function."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tkernels.core import _torch
from tkernels.core.activation import ACTIVATIONS, LEAKY_SLOPE

_nn = _torch.nn_functions
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_POOL = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_LOSS = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
_DROPOUT = ("input", "p", "training", "inplace")
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_ADDITIONS_IN_PLACE = (operator.iadd, "add_")
_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
             operator.ipow, operator.iand, operator.ior, operator.ixor, operator.setitem, operator.delitem)  # fmt: skip


class Step(NamedTuple):
    """One layer of a chain. ``kind``: 'conv', 'linear', 'norm', 'add', 'activation', 'pool', 'dropout', 'dropout2d' or
    'loss'; ``arguments``: the call's by torch's names, nodes where they are computed; an addition's 'other'; an
    activation's 'name'."""

    node: fx.Node
    kind: str
    arguments: dict[str, Any]

    @property
    def input(self) -> fx.Node:
        node: fx.Node = self.arguments["input"]
        return node


def value(node: Any) -> Any:
    """What a node computes, as Dynamo saw it: a fake tensor, or something else."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def sizes(t: Tensor) -> tuple[int, ...]:
    """Sizes as they are in this call: where they may change, decisions are made for these. 1 for one that follows from
    values (how many rows a mask takes), of which nothing is known."""
    return _hints(t.shape)


def _hints(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(value.node.hint or 1) if isinstance(value, torch.SymInt) else value for value in values)


def is_channels_last(t: Tensor) -> bool:
    """By its strides: torch 2.11 answers no for a convolution's result of any batch size."""
    as_now = torch.empty_strided(sizes(t), _hints(t.stride()), device="meta")
    return as_now.is_contiguous(memory_format=torch.channels_last)


def step_of(node: fx.Node) -> Step | None:
    """What a node is in a chain, if anything."""
    if node.op not in ("call_function", "call_method") or not isinstance(value(node), Tensor):
        return None
    try:
        reader = _READERS.get(node.target)
    except TypeError:  # a target that cannot be hashed
        return None
    return None if reader is None else reader(node)


def _arguments(node: fx.Node, names: Sequence[str], **defaults: Any) -> dict[str, Any] | None:
    """A call's arguments by name, with defaults; None if it has others."""
    if len(node.args) > len(names) or {*node.kwargs} - {*names}:
        return None
    args = {**defaults, **dict(zip(names, node.args)), **node.kwargs}
    return args if isinstance(args.get("input"), fx.Node) else None


def _constant(args: dict[str, Any], names: Sequence[str]) -> bool:
    """Whether these arguments are plain values."""
    return not any(isinstance(leaf, fx.Node) for name in names for leaf in _leaves(args.get(name)))


def _leaves(argument: Any) -> list[Any]:
    return list(argument) if isinstance(argument, (tuple, list)) else [argument]


def _conv(node: fx.Node) -> Step | None:
    args = _arguments(node, _CONV, bias=None, stride=1, padding=0, dilation=1, groups=1)
    if args is None or not _constant(args, _CONV[3:]) or value(args["input"]).dim() != 4:
        return None
    return Step(node, "conv", args)


def _linear(node: fx.Node) -> Step | None:
    args = _arguments(node, ("input", "weight", "bias"), bias=None)
    return None if args is None else Step(node, "linear", args)


def _norm(node: fx.Node) -> Step | None:
    args = _arguments(node, _NORM, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5)
    if args is None:
        return None
    for name in _NORM[6:]:
        args[name] = _number(args[name])
    if args["momentum"] is None or args["eps"] is None or not _constant(args, ("training",)):
        return None
    return Step(node, "norm", args)


def _number(argument: Any) -> float | None:
    """A number as this graph has it; None for what is none. One that Dynamo keeps open, since it has seen it change,
    becomes a constant that the graph guards."""
    number = value(argument)
    return float(number) if isinstance(number, (int, float, torch.SymFloat, torch.SymInt)) else None


def _addition(node: fx.Node) -> Step | None:
    """Of two tensors of one shape and dtype: neither broadcast nor promoted."""
    if len(node.args) != 2 or node.kwargs or not all(isinstance(argument, fx.Node) for argument in node.args):
        return None
    first, second = (value(argument) for argument in node.args)
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return None
    if first.dtype != second.dtype or first.device != second.device or not _same_shape(first, second):
        return None
    return Step(node, "add", {"input": node.args[0], "other": node.args[1]})


def _same_shape(a: Tensor, b: Tensor) -> bool:
    """Without asking whether symbolic sizes are equal: that would become a guard."""
    return a.dim() == b.dim() and all(str(m) == str(n) for m, n in zip(a.shape, b.shape))


def _activation(
    name: str, names: Sequence[str], fits: Callable[[dict[str, Any]], bool], **defaults: Any
) -> Callable[[fx.Node], Step | None]:
    def read(node: fx.Node) -> Step | None:
        args = _arguments(node, ("input", *names), **defaults)
        if args is None or not _constant(args, names) or not fits(args):
            return None
        return Step(node, "activation", {"input": args["input"], "name": name})

    return read


def _always(args: dict[str, Any]) -> bool:
    return True


def _pool(node: fx.Node) -> Step | None:
    args = _arguments(node, _POOL, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False)
    if args is None or not _constant(args, _POOL[1:]) or value(args["input"]).dim() != 4:
        return None
    plain = all(d == 1 for d in _leaves(args["dilation"])) and not args["ceil_mode"] and not args["return_indices"]
    return Step(node, "pool", args) if plain else None


def _dropout(kind: str) -> Callable[[fx.Node], Step | None]:
    def read(node: fx.Node) -> Step | None:
        args = _arguments(node, _DROPOUT, p=0.5, training=True, inplace=False)
        if args is None or not _constant(args, _DROPOUT[1:]):
            return None
        if kind == "dropout2d" and value(args["input"]).dim() != 4:
            return None
        return Step(node, kind, args)

    return read


def _loss(node: fx.Node) -> Step | None:
    """Without the arguments that torch has deprecated."""
    args = _arguments(node, _LOSS)
    if args is None or args.pop("size_average", None) is not None or args.pop("reduce", None) is not None:
        return None
    return Step(node, "loss", args)


_relu = _activation("relu", ("inplace",), _always)
_relu6 = _activation(
    "relu6", ("min_val", "max_val", "inplace"), lambda args: (args["min_val"], args["max_val"]) == (0, 6),
    min_val=-1.0, max_val=1.0,
)  # fmt: skip
_leaky_relu = _activation(
    "leaky_relu", ("negative_slope", "inplace"), lambda args: args["negative_slope"] == LEAKY_SLOPE,
    negative_slope=0.01,
)  # fmt: skip
# of the activations whose functions take nothing else (the readers of others come behind these)
_by_name = {getattr(F, name): _activation(name, ("inplace",), _always) for name in ACTIVATIONS if name}
_gelu = _activation("gelu", ("approximate",), lambda args: args["approximate"] == "none", approximate="none")

_READERS: dict[Any, Callable[[fx.Node], Step | None]] = {
    torch.conv2d: _conv, F.conv2d: _conv,
    F.linear: _linear, _nn.linear: _linear,
    F.batch_norm: _norm, **_by_name,
    **dict.fromkeys(_ADDITIONS, _addition),
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, F.relu_, "relu", "relu_"), _relu),
    F.hardtanh: _relu6, F.hardtanh_: _relu6,
    F.leaky_relu: _leaky_relu, F.leaky_relu_: _leaky_relu, _nn.leaky_relu: _leaky_relu,
    _nn.silu: _activation("silu", (), _always),
    F.gelu: _gelu, _nn.gelu: _gelu,
    F.max_pool2d: _pool, torch.max_pool2d: _pool,
    F.dropout: _dropout("dropout"), F.dropout2d: _dropout("dropout2d"),
    F.cross_entropy: _loss,
}  # fmt: skip


def writes_over_its_input(step: Step) -> bool:
    """Whether an addition writes to its first operand."""
    return step.node.target in _ADDITIONS_IN_PLACE


def written(node: fx.Node) -> list[fx.Node]:
    """The arguments that a call may write to; all of them where nothing is known of it."""
    if node.op == "call_function" and node.target is F.batch_norm:
        step = _norm(node)
        args = step.arguments if step is not None else {}
        if step is not None and not args["training"]:
            return []
        statistics = [args.get("running_mean"), args.get("running_var")] if step is not None else node.all_input_nodes
        return [argument for argument in statistics if isinstance(argument, fx.Node)]
    if isinstance(node.target, _torch.OpOverload):
        return node.all_input_nodes if _torch.is_mutable(node.target) else []
    if node.op == "call_module" or (node.op == "call_function" and not _of_torch(node.target)):
        return node.all_input_nodes
    if not _writes(node):
        return []
    args = [node.kwargs["out"]] if "out" in node.kwargs else node.args[:1]  # type: ignore[assignment]
    return [leaf for argument in args for leaf in _leaves(argument) if isinstance(leaf, fx.Node)]


def _of_torch(target: Any) -> bool:
    """Whether a function is one of torch's or Python's, which say by their names and arguments that they write."""
    module = str(getattr(target, "__module__", None) or "")
    if module.startswith(_torch.MODULES_OF_OTHERS_CODE) or isinstance(target, _torch.HigherOrderOperator):
        return False
    return module in ("", "math", "_operator", "operator", "builtins") or module.split(".")[0] == "torch"


def _writes(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.target in _IN_PLACE or "out" in node.kwargs or (name.endswith("_") and not name.endswith("__")):
        return True
    if node.op != "call_function":
        return False
    position = _inplace_position(node.target)
    if position is None:
        return bool(node.kwargs.get("inplace"))
    return bool(node.args[position] if position < len(node.args) else node.kwargs.get("inplace"))


@functools.lru_cache(maxsize=1024)
def _inplace_position(target: Any) -> int | None:
    """Which positional argument of a function is ``inplace``."""
    try:
        return list(inspect.signature(target).parameters).index("inplace")
    except (TypeError, ValueError):
        return None
