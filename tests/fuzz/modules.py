"""Modules of tkernels.nn beside their torch.nn twins, and small models fused beside themselves.

A case's options name them and have what they are made of; both sides are made from one seed, so that what differs at
the start differs at the end. Their parameters and buffers are arguments named "module.weight" and so on.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tkernels
from perf.static.rewritten import Rewritten
from tests.fusion.cases import ACTIVATIONS
from tests.fuzz.bodies import RAN, replaced
from tests.fuzz.operators import OPERATORS, Operator, Side, Tensors
from tkernels.core import activation as activations
from tkernels.functional import MaxPool
from tkernels.fusion import in_place

Options = dict[str, Any]


def _made(make: Callable[[], nn.Module], options: Options) -> nn.Module:
    """A module as the options have it; ``dtype``, ``channels_last``, ``training``, ``seed``."""
    torch.manual_seed(options["seed"])
    with torch.device("cpu"):
        module = make()
    if options.get("channels_last"):
        module = module.to(memory_format=torch.channels_last)
    dtype = getattr(torch, options.get("dtype", "float32"))
    return module.to(dtype).train(options["training"])


def _own(module: nn.Module) -> Tensors:
    return {f"module.{name}": t for name, t in (*module.named_parameters(), *module.named_buffers())}


def _side(module: nn.Module, call: Callable[[nn.Module, Tensors], Any]) -> Side:
    return Side(lambda tensors: call(module, tensors), _own(module), module, lambda other: _side(other, call))


class Layers(nn.Module):
    """convI and bnI, as ConvStage has them, in torch's own calls."""

    def __init__(
        self, channels: Sequence[int], kernel_size: Any = 3, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: int = 1, bias: bool = True, eps: float = 1e-5, momentum: float | None = 0.1, pool: Any = None,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.pool, self.dropout, self.count = pool, dropout, len(channels) - 1
        for i in range(self.count):
            conv = nn.Conv2d(channels[i], channels[i + 1], kernel_size, stride, padding, dilation, groups, bias)
            self.add_module(f"conv{i + 1}", conv)
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(channels[i + 1], eps, momentum))

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self._modules
        for i in range(1, self.count + 1):
            x = F.relu(own[f"bn{i}"](own[f"conv{i}"](x)))
        if self.pool is not None:
            x = F.max_pool2d(x, *(self.pool if isinstance(self.pool, MaxPool) else (self.pool,)))
        return F.dropout2d(x, self.dropout, self.training)


class OneLayer(nn.Module):
    """conv and bn, as ConvBNReLU2d has them."""

    def __init__(self, eps: float = 1e-5, momentum: float | None = 0.1, **arguments: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(**arguments)
        self.bn = nn.BatchNorm2d(arguments["out_channels"], eps, momentum)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


TWINS: dict[str, Callable[..., nn.Module]] = {
    "Linear": nn.Linear,
    "LinearReLU": nn.Linear,
    "Conv2d": nn.Conv2d,
    "BatchNorm1d": nn.BatchNorm1d,
    "BatchNorm2d": nn.BatchNorm2d,
    "BatchNorm3d": nn.BatchNorm3d,
    "SyncBatchNorm": nn.BatchNorm2d,
    "ConvStage": Layers,
    "ConvBNReLU2d": OneLayer,
    "CrossEntropyLoss": nn.CrossEntropyLoss,
    "MultiheadAttention": nn.MultiheadAttention,
}


def _module_ours(options: Options) -> Side:
    make = getattr(tkernels.nn, options["module"])
    module = _made(lambda: make(**copy.deepcopy(options["arguments"])), options)
    return _side(module, lambda m, tensors: m(**tensors, **options.get("call", {})))


def _module_theirs(options: Options, factors: Tensor | None) -> Side:
    arguments, name = dict(options["arguments"]), options["module"]
    stage = name in ("ConvStage", "ConvBNReLU2d")
    activation = "relu" if name == "LinearReLU" else arguments.pop("activation", None)
    p = 0.0 if name in ("ConvStage", "MultiheadAttention") else arguments.pop("dropout", 0.0)
    module = _made(lambda: TWINS[name](**arguments), options)

    def call(m: nn.Module, tensors: Tensors) -> Any:
        given = dict(tensors)
        residual = given.pop("residual", None)
        y = m(*given.values()) if stage else m(**given, **options.get("call", {}))
        if activation is None and residual is None and not p:
            return y
        y = activations.apply(y if residual is None else y + residual, activation)
        return F.dropout(y, p, m.training)

    return _side(module, call)


def _module_dropout(options: Options) -> Any:
    return options["arguments"].get("dropout", 0.0) if options["training"] else 0.0


class Model(nn.Module):
    """``blocks``: each a convolution (its arguments), and what follows: norm, residual, activation, pool, dropout.
    ``head``: the mean over pixels, and linear layers with an activation and dropout each."""

    def __init__(self, blocks: Sequence[Options], head: Sequence[Options] = ()) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_block(b) for b in blocks])
        self.residuals = [b.get("residual") for b in blocks]
        self.head = nn.ModuleList([_hidden(h) for h in head])

    def forward(self, input: Tensor, target: Tensor | None = None) -> Tensor:
        x = input
        for block, residual in zip(self.blocks, self.residuals):
            before, parts = x, list(block)  # type: ignore[call-overload]
            while parts and isinstance(parts[0], (nn.Conv2d, nn.BatchNorm2d)):
                x = parts.pop(0)(x)
            if residual == "add":
                x = x + before
            elif residual == "iadd":
                x += before
            for part in parts:
                x = part(x)
        if len(self.head):
            x = x.mean((2, 3))
        for layer in self.head:
            x = layer(x)
        return x if target is None else F.cross_entropy(x, target)


def _activation(name: str | None, inplace: bool) -> list[nn.Module]:
    if name is None:
        return []
    return [nn.GELU()] if name == "gelu" else [ACTIVATIONS[name](inplace=inplace)]


def _block(b: Options) -> nn.Sequential:
    parts: list[nn.Module] = []
    if "conv" in b:
        parts.append(nn.Conv2d(**b["conv"]))
    if "norm" in b:
        parts.append(nn.BatchNorm2d(**b["norm"]))
    parts += _activation(b.get("activation"), b.get("inplace", False))
    if "pool" in b:
        parts.append(nn.MaxPool2d(*b["pool"]))
    if b.get("dropout"):
        parts.append(nn.Dropout2d(b["dropout"]))
    return nn.Sequential(*parts)


def _hidden(h: Options) -> nn.Sequential:
    parts = [nn.Linear(**h["linear"]), *_activation(h.get("activation"), h.get("inplace", False))]
    return nn.Sequential(*parts, *([nn.Dropout(h["dropout"])] if h.get("dropout") else []))


def _model(options: Options) -> nn.Module:
    return _made(lambda: Model(options["blocks"], options.get("head", ())), options)


def _fused_ours(options: Options) -> Side:
    """``how``: "fuse" or "compile"."""
    torch._dynamo.reset()
    module = _model(options)
    if torch.empty(0).is_cuda:
        return _rewritten(module)
    if options.get("how", "fuse") == "compile":
        compiled = torch.compile(module, backend="tkernels")
        return _side(module, lambda m, tensors: compiled(**tensors))
    module, ran = tkernels.fuse(module), [0]

    def call(m: nn.Module, tensors: Tensors) -> Tensor:
        y: Tensor = m(**tensors)
        fused: Any = in_place._fused(m)
        RAN["chain"] += fused.backend.ran - ran[0]
        ran[0] = fused.backend.ran
        return y

    return _side(module, call)


def _rewritten(module: nn.Module) -> Side:
    """Under the executor, whose GPU has no driver that Dynamo could ask: the graph that a fused model runs."""
    made: list[Rewritten] = []

    def call(m: nn.Module, tensors: Tensors) -> Tensor:
        if not made:
            with replaced(torch.cuda, "is_available", lambda: False):
                made.append(Rewritten(m, tensors["input"]))
        y: Tensor = made[0](tensors["input"])
        return y

    return _side(module, call)


@contextlib.contextmanager
def dropping_as(dtype: torch.dtype) -> Iterator[None]:
    """Within the block torch's dropout of other tensors draws as that of ``dtype`` does on a CPU."""

    def dropped(shape: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
        def call(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
            if not training or not p or not x.numel():
                return x
            drawn = torch.empty(shape(x), dtype=dtype).bernoulli_(1 - p)
            return x * (drawn.double() / (1 - p)).to(x.dtype)

        return call

    channels = dropped(lambda x: (*x.shape[:2], 1, 1))
    with replaced(F, "dropout", dropped(lambda x: x.shape)), replaced(F, "dropout2d", channels):
        yield


def _fused_dropout(options: Options) -> float:
    parts = (*options["blocks"], *options.get("head", ()))
    return max(part.get("dropout", 0.0) for part in parts) if options["training"] else 0.0


OPERATORS["module"] = Operator(_module_ours, _module_theirs, _module_dropout)
OPERATORS["fused"] = Operator(
    _fused_ours, lambda options, factors: _side(_model(options), lambda m, tensors: m(**tensors)), _fused_dropout
)
