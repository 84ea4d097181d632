"""The chains of layers that have a fused call: how they are found in a graph, and run."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from tkernels.nn.batch_norm import normalized
from tkernels.nn.conv_stage import layer_of
from tkernels.ops.conv import conv2d
from tkernels.ops.conv_stage import MaxPool, conv_stage
from tkernels.ops.linear import linear

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ACTIVATIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.leaky_relu: "leaky_relu", F.gelu: "gelu", F.silu: "silu",
}  # fmt: skip
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Step(NamedTuple):
    """One layer of a chain: its node, what it is, the module that does it (None: a function), and ``option``: an
    activation's name, a MaxPool, a function's dropout probability, or an addition's other operand."""

    node: fx.Node
    kind: str
    module: nn.Module | None = None
    option: Any = None


def hooked(module: nn.Module) -> bool:
    """Whether someone wants to see the module being called, or has put another forward in its place."""
    own = module.__dict__
    return "forward" in own or any(own.get(name) for name in _HOOKS)


def step_of(node: fx.Node, modules: dict[str, nn.Module]) -> Step | None:
    """What a node is in a chain, if anything."""
    if node.op == "call_module":
        return _module_step(node, modules[str(node.target)])
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    target = node.target
    if target in _ADDITIONS:
        if len(node.args) == 2 and not node.kwargs and isinstance(node.args[1], fx.Node):
            return Step(node, "add")
        return None
    if target in _ACTIVATIONS and not ({*node.kwargs} - {"inplace"}) and len(node.args) == 1:
        return Step(node, "activation", None, _ACTIVATIONS[target])
    if target is F.max_pool2d:
        return _function_pool(node)
    if target in (F.dropout, F.dropout2d):
        return _function_dropout(node)
    return None


def _module_step(node: fx.Node, module: nn.Module) -> Step | None:
    kind = parametrize.type_before_parametrizations(module)
    if len(node.args) != 1 or node.kwargs:
        return None
    if kind is nn.Conv2d:
        return Step(node, "conv", module) if module.padding_mode == "zeros" else None
    if kind is nn.Linear:
        return Step(node, "linear", module)
    if kind in _NORMS:
        return Step(node, "norm", module)
    name = _activation_of(module)
    if name is not None:
        return Step(node, "activation", module, name)
    if kind is nn.MaxPool2d:
        plain = module.dilation in (1, (1, 1)) and not module.ceil_mode and not module.return_indices
        return Step(node, "pool", module) if plain else None
    if kind is nn.Dropout2d:
        return Step(node, "dropout2d", module)
    if kind is nn.Dropout:
        return Step(node, "dropout", module)
    return None


def _activation_of(module: nn.Module) -> str | None:
    if type(module) is nn.ReLU:
        return "relu"
    if type(module) is nn.LeakyReLU and module.negative_slope == 0.01:
        return "leaky_relu"
    if type(module) is nn.GELU and module.approximate == "none":
        return "gelu"
    return "silu" if type(module) is nn.SiLU else None


def _constants(node: fx.Node, names: Sequence[str]) -> dict[str, Any] | None:
    """A call's arguments after the first by name; None if it has others, or some that are computed."""
    found = dict(zip(names, node.args[1:]), **node.kwargs)
    if {*found} - {*names} or len(node.args) > 1 + len(names):
        return None
    return None if any(isinstance(value, fx.Node) for value in found.values()) else found


def _function_pool(node: fx.Node) -> Step | None:
    found = _constants(node, ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"))
    if found is None or found.pop("dilation", 1) not in (1, (1, 1)):
        return None
    if found.pop("ceil_mode", False) or found.pop("return_indices", False):
        return None
    return Step(node, "pool", None, MaxPool(**found))


def _function_dropout(node: fx.Node) -> Step | None:
    found = _constants(node, ("p", "training", "inplace"))
    if found is None:
        return None
    p = found.get("p", 0.5) if found.get("training", True) else 0.0
    return Step(node, "dropout" if node.target is F.dropout else "dropout2d", None, p)


class Chain:
    """Layers with one fused call, in the order of their nodes."""

    def __init__(self, steps: list[Step], call: Callable[..., Tensor]) -> None:
        self.steps = steps
        self._call = call

    @property
    def modules(self) -> list[nn.Module]:
        return [step.module for step in self.steps if step.module is not None]

    @property
    def residual(self) -> fx.Node | None:
        """The other operand of its addition, if it has one."""
        return next((step.option for step in self.steps if step.kind == "add"), None)

    def describe(self) -> str:
        """Its layers by name, as a reader of the model knows them."""
        names = []
        for step in self.steps:
            function = step.option if step.kind == "activation" else step.kind
            names.append(str(function if step.module is None else step.node.target))
        return " -> ".join(names)

    def run(self, x: Tensor, residual: Tensor | None, modules: Sequence[nn.Module]) -> Tensor:
        """The chain's result. ``modules``: those of its steps that have one, as they are now."""
        for module in modules:
            if hooked(module):  # registered after fuse()
                return self._one_by_one(x, residual, modules)
        found = iter(modules)
        steps = [step if step.module is None else step._replace(module=next(found)) for step in self.steps]
        return self._call(self, x, residual, steps)

    def _one_by_one(self, x: Tensor, residual: Tensor | None, modules: Sequence[nn.Module]) -> Tensor:
        found = iter(modules)
        for step in self.steps:
            x = _alone(step if step.module is None else step._replace(module=next(found)), x, residual)
        return x


def _alone(step: Step, x: Tensor, residual: Any) -> Tensor:
    """One layer as the model had it."""
    if step.module is not None:
        result: Tensor = step.module(x)
        return result
    if step.kind == "add":
        return x + residual
    if step.kind == "activation":
        return getattr(F, step.option)(x)
    if step.kind == "pool":
        return F.max_pool2d(x, *step.option)
    return (F.dropout if step.kind == "dropout" else F.dropout2d)(x, step.option)


def _dropout(step: Step | None) -> float:
    """The probability of a dropout as its module stands."""
    if step is None:
        return 0.0
    if step.module is None:
        return float(step.option)
    return float(step.module.p) if step.module.training else 0.0  # type: ignore[arg-type]


def _last(steps: list[Step], kind: str) -> Step | None:
    return steps[-1] if steps and steps[-1].kind == kind else None


def _run_stage(chain: Chain, x: Tensor, residual: Tensor | None, steps: list[Step]) -> Tensor:
    layers = [
        layer_of(cast(Any, conv.module), cast(Any, norm.module))
        for conv, norm in itertools.pairwise(steps)
        if conv.kind == "conv" and norm.kind == "norm"
    ]
    p = _dropout(_last(steps, "dropout2d"))
    pool = None
    for step in steps[-2:]:
        if step.kind == "pool":
            module: Any = step.module
            pool = step.option if module is None else MaxPool(module.kernel_size, module.stride, module.padding)
    return conv_stage(x, layers, pool, p, p > 0)


def _run_conv(chain: Chain, x: Tensor, residual: Tensor | None, steps: list[Step]) -> Tensor:
    conv: Any = steps[0].module
    return conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups, steps[1].option)


def _run_linear(chain: Chain, x: Tensor, residual: Tensor | None, steps: list[Step]) -> Tensor:
    module: Any = steps[0].module
    activation = steps[1].option if steps[1].kind == "activation" else None
    p = _dropout(_last(steps, "dropout"))
    return linear(x, module.weight, module.bias, activation, p, p > 0)


def _run_conv_norm(chain: Chain, x: Tensor, residual: Tensor | None, steps: list[Step]) -> Tensor:
    conv: Any = steps[0].module
    raw = conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return _run_norm(chain, raw, residual, steps[1:])


def _run_norm(chain: Chain, x: Tensor, residual: Tensor | None, steps: list[Step]) -> Tensor:
    norm: Any = steps[0].module
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        # broadcast or promoted, which the fused addition is not
        x = norm(x) + residual
        return getattr(F, steps[-1].option)(x)
    return normalized(norm, x, steps[-1].option, residual)


def find(graph: fx.Graph, modules: dict[str, nn.Module]) -> tuple[list[Chain], list[tuple[str, str]]]:
    """(chains with a fused call, (layer, why it was left) of those that start like one)."""
    chains: list[Chain] = []
    left: list[tuple[str, str]] = []
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        step = step_of(node, modules)
        if node in taken or step is None or step.kind not in ("conv", "linear", "norm"):
            continue
        steps, call, reason = _longest(step, modules)
        if call is None:
            left.append((str(node.target), reason))
            taken.update(s.node for s in steps)
            continue
        if _disturbed(steps, graph, modules):
            left.append((str(node.target), "something is changed in place between its layers"))
            continue
        taken.update(s.node for s in steps)
        chains.append(Chain(steps, call))
    return chains, left


def _next(step: Step, modules: dict[str, nn.Module]) -> Step | None:
    """The step after one, if it is its only user."""
    if len(step.node.users) != 1:
        return None
    node = next(iter(step.node.users))
    follow = step_of(node, modules)
    if follow is None:
        return None
    if follow.kind == "add":
        first, second = node.args
        other = second if first is step.node else first
        return follow._replace(option=other) if other is not step.node else None
    return follow if node.args[0] is step.node else None


def _longest(first: Step, modules: dict[str, nn.Module]) -> tuple[list[Step], Any, str]:
    """(steps, how they are run or None, why not)."""
    second = _next(first, modules)
    if first.kind == "conv":
        if second is not None and second.kind == "activation":
            return [first, second], _run_conv, ""
        if second is None or second.kind != "norm":
            return [], None, f"convolution, then {_what_follows(first, modules)}"
        third = _next(second, modules)
        if third is not None and third.kind == "activation":
            steps = [first, second, third]
            return (_stage(steps, modules), _run_stage, "") if third.option == "relu" else (steps, _run_conv_norm, "")
        if third is not None and third.kind == "add":
            fourth = _next(third, modules)
            if fourth is not None and fourth.kind == "activation":
                return [first, second, third, fourth], _run_conv_norm, ""
        return (
            [first, second],
            None,
            f"convolution, batch norm {second.node.target}, then {_what_follows(third or second, modules)}",
        )
    if first.kind == "linear":
        steps = [first]
        while (step := _next(steps[-1], modules)) is not None and step.kind in ("activation", "dropout"):
            steps.append(step)
            if step.kind == "dropout" or len(steps) == 3:
                break
        if steps[-1].kind == "activation" and len(steps) == 3:
            steps.pop()
        return (steps, _run_linear, "") if len(steps) > 1 else ([], None, f"then {_what_follows(first, modules)}")
    steps = [first]
    if second is not None and second.kind == "add":
        steps.append(second)
        second = _next(second, modules)
    if second is not None and second.kind == "activation":
        return [*steps, second], _run_norm, ""
    return [], None, f"batch norm, then {_what_follows(steps[-1], modules)}"


def _stage(steps: list[Step], modules: dict[str, nn.Module]) -> list[Step]:
    """conv -> norm -> ReLU with the layers after it that are such too, then pooling and Dropout2d."""
    while True:
        more: list[Step] = []
        for kind in ("conv", "norm", "activation"):
            step = _next((more or steps)[-1], modules)
            if step is None or step.kind != kind or (kind == "activation" and step.option != "relu"):
                break
            more.append(step)
        if len(more) < 3:
            break
        steps = steps + more
    for kind in ("pool", "dropout2d"):
        step = _next(steps[-1], modules)
        if step is not None and step.kind == kind:
            steps = [*steps, step]
    return steps


def _what_follows(step: Step, modules: dict[str, nn.Module]) -> str:
    users = list(step.node.users)
    if len(users) != 1:
        return f"{len(users)} places that use the result"
    node = users[0]
    if node.op == "call_module":
        return f"{type(modules[str(node.target)]).__name__} {node.target}"
    return "the end" if node.op == "output" else getattr(node.target, "__name__", str(node.target))


def _disturbed(steps: list[Step], graph: fx.Graph, modules: dict[str, nn.Module]) -> bool:
    """Whether a node of others between the chain's first and last writes to a tensor: the fused call comes last."""
    own = {step.node for step in steps}
    inside = False
    for node in graph.nodes:
        inside = inside or node is steps[0].node
        if node is steps[-1].node:
            return False
        if inside and node not in own and _writes(node, modules):
            return True
    return False


def _writes(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return node.target in _IN_PLACE or in_place or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
