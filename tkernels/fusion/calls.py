"""What stands for a chain in the rewritten graph: on a CPU what tkernels.cpu planned for its sizes, elsewhere the fused
operators."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx

from tkernels.core import mode, targets
from tkernels.fusion.chains import Chain, disturbed, incomplete
from tkernels.fusion.steps import Step, is_channels_last, sizes, value
from tkernels.ops import cpu
from tkernels.ops.batch_norm.op import batch_norm
from tkernels.ops.conv.op import conv2d, pair
from tkernels.ops.conv_stage.op import ConvBNLayer, MaxPool, conv_stage, residual_stage
from tkernels.ops.cross_entropy.op import cross_entropy
from tkernels.ops.linear.op import linear


class Call(NamedTuple):
    """A function, the nodes or values that it is called with, and the chains it stands for. ``stage``: whether it is a
    conv stage, which others may join; ``shortcut``: the chain of a stage's residual; ``twice``: the function that gives
    a stage's result for two readers."""

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    chains: tuple[Chain, ...]
    stage: bool = False
    shortcut: Chain | None = None
    twice: Callable[..., tuple[Tensor, Tensor]] | None = None

    @property
    def last(self) -> fx.Node:
        return self.chains[-1].last.node

    @property
    def every(self) -> tuple[Chain, ...]:
        """The shortcut's too."""
        return self.chains if self.shortcut is None else (*self.chains, self.shortcut)

    def describe(self) -> str:
        layers = " -> ".join(chain.describe() for chain in self.chains)
        return layers if self.shortcut is None else f"{layers} (shortcut {self.shortcut.describe()})"


def call_of(chain: Chain, eager: bool) -> Call | str:
    """The fused call of a chain, or of as many of its layers as have one; a string says why there is none. ``eager``:
    the graph will run as it is, rather than be compiled further."""
    device = value(chain.last.node).device.type
    if device == "cpu" and eager and not _on_kernels():
        return _cpu_call(chain)
    alone = incomplete(chain)
    if alone is not None:
        return alone
    if device not in ("cpu", "cuda"):
        return f"no kernels for tensors on {device}"
    makers = {"conv": _conv_call, "norm": _norm_call, "linear": _linear_call, "loss": _loss_call}
    return makers[chain.first.kind](chain)


def _on_kernels() -> bool:
    """Whether tensors on a CPU go through kernels: where that is asked for, under Triton's interpreter, or standing for
    those of a GPU that is not there."""
    if mode.get_backend() == "auto":
        return mode.interpreting() or targets.pretending()
    return mode.get_backend() == "triton"


def _cpu_call(chain: Chain) -> Call | str:
    if chain.last.kind in ("pool", "dropout2d"):  # PyTorch's own
        return _cpu_call(chain.without_last())
    if chain.first.kind == "loss":
        return _loss_call(chain)
    if cpu is None:
        return incomplete(chain) or "tkernels.cpu, with what is fast on a CPU, is not there"
    if chain.first.kind == "linear":
        return _cpu_linear(chain)
    run = cpu.plan_chain(_described(chain))
    if not isinstance(run, str):
        return Call(run, (chain.first.input, *_tensors(chain), chain.residual), (chain,))
    return incomplete(chain) or run


def _cpu_linear(chain: Chain) -> Call | str:
    if chain.last.kind == "dropout":  # PyTorch's own
        return _cpu_linear(chain.without_last())
    end, args = value(chain.last.node), chain.first.arguments
    features = sizes(value(args["input"]))[-1]
    run = cpu.plan_linear(sizes(end), features, end.dtype, _activation(chain), end.requires_grad)
    if isinstance(run, str):
        return incomplete(chain) or run
    return Call(run, (args["input"], args["weight"], args["bias"]), (chain,))


def _described(chain: Chain) -> cpu.Chain:
    """What is known of a chain's calls once they are traced."""
    conv, norm = chain.get("conv"), chain.get("norm")
    x: Tensor = value(chain.first.input)
    # the map that batch norm or the activation takes
    inner: Tensor = value(conv.node) if conv is not None else x
    return cpu.Chain(
        input=sizes(x),
        channels_last=inner.dim() == 4 and is_channels_last(inner),
        weight=None if conv is None else sizes(value(conv.arguments["weight"])),
        conv=None if conv is None else cpu.Conv(*_windows(conv), conv.arguments["groups"]),
        norm=None if norm is None else cpu.Norm(*_norm_options(norm)),
        residual=chain.residual is not None,
        activation=_activation(chain),
        dtype=inner.dtype,
        differentiated=value(chain.last.node).requires_grad,
    )


def _windows(conv: Step) -> tuple[Any, Any, Any]:
    padding = conv.arguments["padding"]
    if padding == "valid":
        padding = 0
    padding = padding if isinstance(padding, str) else pair("padding", padding)
    return pair("stride", conv.arguments["stride"]), padding, pair("dilation", conv.arguments["dilation"])


def _norm_options(norm: Step) -> tuple[bool, float, float]:
    """Whether it is in training, momentum, eps."""
    return norm.arguments["training"], norm.arguments["momentum"], norm.arguments["eps"]


def _activation(chain: Chain) -> str | None:
    activation = chain.get("activation")
    return None if activation is None else activation.arguments["name"]


def _max_pool(step: Step) -> MaxPool:
    return MaxPool(step.arguments["kernel_size"], step.arguments["stride"] or None, step.arguments["padding"])


def _tensors(chain: Chain) -> list[Any]:
    """Weight and bias of the convolution; running mean and variance, weight and bias of the batch norm."""
    conv, norm = chain.get("conv"), chain.get("norm")
    weights = [None, None] if conv is None else [conv.arguments["weight"], conv.arguments["bias"]]
    names = ("running_mean", "running_var", "weight", "bias")
    return weights + [None if norm is None else norm.arguments[name] for name in names]


def _conv_call(chain: Chain) -> Call | str:
    conv, norm = chain.first, chain.get("norm")
    if norm is not None:
        if chain.residual is not None and chain.last.kind in ("pool", "dropout2d"):
            return _conv_call(chain.without_last())
        return _stage((chain,))
    stride, padding, dilation = _windows(conv)
    groups, activation = conv.arguments["groups"], _activation(chain)

    def conv_activation(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return conv2d(x, weight, bias, stride, padding, dilation, groups, activation)

    return Call(conv_activation, (conv.input, conv.arguments["weight"], conv.arguments["bias"]), (chain,))


def _stage(chains: Sequence[Chain], shortcut: Chain | None = None) -> Call:
    """Chains of convolution and batch norm, each of which feeds the next, as one conv stage. ``shortcut``: the chain
    that makes its residual."""
    if chains[-1].residual is not None and chains[-1].last.kind not in ("pool", "dropout2d"):
        return _residual_stage(chains, shortcut)
    make_layer, parameters = [_layer(chain) for chain in chains], [_tensors(chain) for chain in chains]
    last, count = chains[-1], len(parameters[0])
    pool = last.get("pool")
    window = None if pool is None else _max_pool(pool)
    p = _probability(last.get("dropout2d"))

    def conv_norm_stage(x: Tensor, *tensors: Tensor | None) -> Tensor:
        layers = [layer(*tensors[count * i : count * i + count]) for i, layer in enumerate(make_layer)]
        return conv_stage(x, layers, window, p, p > 0)

    tensors = itertools.chain.from_iterable(parameters)
    return Call(conv_norm_stage, (chains[0].first.input, *tensors), tuple(chains), stage=True)


def _residual_stage(chains: Sequence[Chain], shortcut: Chain | None) -> Call:
    """One that adds a residual, or what a shortcut makes of it, before its last activation."""
    every = (*chains, *([] if shortcut is None else [shortcut]))
    make_layer, parameters = [_layer(chain) for chain in every], [_tensors(chain) for chain in every]
    last, count = chains[-1], len(parameters[0])

    def call(twice: bool, x: Tensor, residual: Tensor, *tensors: Tensor | None) -> Any:
        layers = [layer(*tensors[count * i : count * i + count]) for i, layer in enumerate(make_layer)]
        own = None if shortcut is None else layers.pop()
        return residual_stage(x, layers, residual, own, twice)

    def residual_block(*arguments: Any) -> Tensor:
        y: Tensor = call(False, *arguments)
        return y

    def residual_block_twice(*arguments: Any) -> tuple[Tensor, Tensor]:
        both: tuple[Tensor, Tensor] = call(True, *arguments)
        return both

    added = last.residual if shortcut is None else shortcut.first.input
    arguments = chains[0].first.input, added, *itertools.chain.from_iterable(parameters)
    twice = residual_block_twice if last.last.kind == "activation" else None
    return Call(residual_block, arguments, tuple(chains), stage=True, shortcut=shortcut, twice=twice)


def _layer(chain: Chain) -> Callable[..., ConvBNLayer]:
    conv, norm = chain.get("conv"), chain.get("norm")
    assert conv is not None and norm is not None  # noqa: PT018
    stride, padding, dilation = _windows(conv)
    groups, activation = conv.arguments["groups"], _activation(chain)
    training, momentum, eps = _norm_options(norm)

    def layer(
        weight: Tensor, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, bn_weight: Tensor | None,
        bn_bias: Tensor | None,
    ) -> ConvBNLayer:  # fmt: skip
        return ConvBNLayer(weight, bias, bn_weight, bn_bias, mean, var, None, stride, padding, dilation, groups,
                           momentum, eps, training, activation)  # fmt: skip

    return layer


def _probability(dropout: Step | None) -> float:
    return float(dropout.arguments["p"]) if dropout is not None and dropout.arguments["training"] else 0.0


def joined(calls: Sequence[Call]) -> list[Call]:
    """Conv stages of which one alone feeds the next, as one."""
    result: list[Call] = []
    for call in calls:
        before = next((c for c in result if c.last is call.chains[0].first.input), None)
        if before is not None and call.stage and before.stage and _can_go_on(before):
            whole = (*before.chains, *call.chains)
            if disturbed(Chain(tuple(step for chain in whole for step in chain.steps))) is None:
                result.remove(before)
                call = _stage(whole)
        result.append(call)
    return result


def with_shortcuts(calls: Sequence[Call], order: dict[fx.Node, int]) -> list[Call]:
    """Residual blocks whose residual is a convolution and batch norm that nobody else reads, with those inside."""
    result = list(calls)
    for call in calls:
        residual = call.chains[-1].residual if call.stage else None
        own = next((c for c in calls if c.last is residual), None)
        if own is None or not (own.stage and _is_shortcut(own) and _activation(call.chains[-1]) == "relu"):
            continue
        whole = [step for chain in (*call.chains, own.chains[0]) for step in chain.steps]
        if call.twice is not None and disturbed(Chain(tuple(sorted(whole, key=lambda s: order[s.node])))) is None:
            result.remove(own)
            result[result.index(call)] = _stage(call.chains, own.chains[0])
    return result


def _is_shortcut(call: Call) -> bool:
    return len(call.chains) == 1 and call.chains[0].last.kind == "norm" and len(call.last.users) == 1


def _can_go_on(call: Call) -> bool:
    last = call.chains[-1]
    return last.last.kind in ("norm", "activation") and last.residual is None and len(call.last.users) == 1


def _norm_call(chain: Chain) -> Call:
    if chain.last.kind in ("pool", "dropout2d"):
        return _norm_call(chain.without_last())
    args = chain.first.arguments
    training, momentum, eps, activation = args["training"], args["momentum"], args["eps"], _activation(chain)

    def norm_activation(
        x: Tensor, residual: Tensor | None, mean: Tensor | None, var: Tensor | None, weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        return batch_norm(x, mean, var, weight, bias, training, momentum, eps, activation, residual)

    return Call(norm_activation, (chain.first.input, chain.residual, *_tensors(chain)[2:]), (chain,))


def _linear_call(chain: Chain) -> Call | str:
    args, activation, p = chain.first.arguments, _activation(chain), _probability(chain.get("dropout"))

    def linear_activation(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias, activation, p, p > 0)

    return Call(linear_activation, (args["input"], args["weight"], args["bias"]), (chain,))


def _loss_call(chain: Chain) -> Call | str:
    args = dict(chain.first.arguments)
    tensors = args.pop("input"), args.pop("target"), args.pop("weight", None)

    def loss(input: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        return cross_entropy(input, target, weight, **args)

    return Call(loss, tensors, (chain,))
