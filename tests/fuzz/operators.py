"""What a case calls, ours and torch's: functions of named tensors.

Ours are looked up anew at each call, so that a planted fault is met. torch's take the arguments that ours add and
compose them; where torch draws dropout, ``factors`` may stand for the draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import tkernels
from tests.conformance.compare import torchs as composed
from tkernels.core import activation as activations
from tkernels.functional import ConvBNLayer, MaxPool

Tensors = dict[str, Tensor]
LAYER = dict(zip("wbghmvn", ConvBNLayer._fields))


class Side(NamedTuple):
    """A function of a case's tensors. Of a module also its parameters and buffers, itself, and the same side of another
    module like it."""

    call: Callable[[Tensors], Any]
    own: Tensors = {}  # noqa: RUF012
    module: Any = None
    rebuilt: Callable[[Any], Any] | None = None


class Operator(NamedTuple):
    """``ours(options)``, ``theirs(options, factors)``; ``dropout(options)``: the probability that something is dropped.
    ``factors_are``: the shape of what dropout multiplies by, "elements" or "channels", where it is the last thing that
    happens to the result and torch draws it once. ``others(options)``: torch's sides by other ways of its own.
    ``sums``: whether each element of the result is a sum of products, but for the activation.
    """

    ours: Callable[[dict[str, Any]], Side]
    theirs: Callable[[dict[str, Any], Tensor | None], Side]
    dropout: Callable[[dict[str, Any]], Any] = lambda options: 0.0
    factors_are: str | None = None
    others: Callable[[dict[str, Any]], list[Side]] = lambda options: []
    sums: bool = False


def _plain(name: str) -> Operator:
    """A function of tensors and options that torch has too, with an activation or a residual of ours at most."""

    # batch norm's only arguments without a default
    absent = {"running_mean": None, "running_var": None} if name == "batch_norm" else {}

    def ours(options: dict[str, Any]) -> Side:
        return Side(lambda tensors: getattr(tkernels.functional, name)(**{**absent, **tensors}, **options))

    def theirs(options: dict[str, Any], factors: Tensor | None) -> Side:
        return Side(lambda tensors: composed(name)(**{**absent, **tensors}, **options))

    return Operator(ours, theirs)


def _linear_theirs(options: dict[str, Any], factors: Tensor | None) -> Side:
    options = dict(options)
    activation = "relu" if options.pop("relu", False) else options.get("activation")
    p = _in_training(options)

    def call(tensors: Tensors) -> Tensor:
        y = F.linear(*(tensors.get(name) for name in ("input", "weight", "bias")))  # type: ignore[arg-type]
        return dropped(activations.apply(y, activation), p, factors, F.dropout)

    return Side(call)


def _linear_ours(options: dict[str, Any]) -> Side:
    """``relu``: by linear_relu."""
    if options.get("relu"):
        return Side(lambda tensors: tkernels.functional.linear_relu(**tensors))
    return Side(lambda tensors: tkernels.functional.linear(**tensors, **options))


def dropped(y: Tensor, p: float, factors: Tensor | None, dropout: Callable[..., Tensor]) -> Tensor:
    if factors is not None:
        return y * factors.to(y.dtype)
    return dropout(y, p) if p > 0 else y


def _layers(options: dict[str, Any], tensors: Tensors) -> list[ConvBNLayer]:
    found = []
    for i, arguments in enumerate(options["layers"]):
        own = {field: tensors[f"{letter}{i}"] for letter, field in LAYER.items() if f"{letter}{i}" in tensors}
        found.append(ConvBNLayer(**own, **arguments))
    return found


def _stage_ours(options: dict[str, Any]) -> Side:
    rest = {name: value for name, value in options.items() if name != "layers"}

    def call(tensors: Tensors) -> Tensor:
        given = {"residual": tensors["residual"]} if "residual" in tensors else {}
        return tkernels.functional.conv_stage(tensors["input"], _layers(options, tensors), **rest, **given)

    return Side(call)


def _stage_theirs(options: dict[str, Any], factors: Tensor | None) -> Side:
    training, pool = options.get("training", False), options.get("pool")
    p = _in_training(options)

    def call(tensors: Tensors) -> Tensor:
        x = tensors["input"]
        layers = _layers(options, tensors)
        for i, layer in enumerate(layers):
            x = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)  # type: ignore[arg-type]
            x = _normalized(layer, x, training)
            if i == len(layers) - 1 and "residual" in tensors:
                x = x + tensors["residual"]
            x = activations.apply(x, layer.activation)
        if pool is not None:
            x = F.max_pool2d(x, *(pool if isinstance(pool, MaxPool) else (pool,)))
        return dropped(x, p, factors, F.dropout2d)

    return Side(call)


def _normalized(layer: ConvBNLayer, x: Tensor, training: bool) -> Tensor:
    """As torch.nn.BatchNorm2d's forward."""
    counts, momentum = layer.counts(training), layer.momentum
    if counts and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(layer.num_batches_tracked)
    return composed("batch_norm")(
        x, layer.running_mean, layer.running_var, layer.bn_weight, layer.bn_bias, layer.measures(training),
        0.0 if momentum is None else momentum, layer.eps,
    )  # fmt: skip


def _flash(options: dict[str, Any]) -> list[Side]:
    """torch's flash attention, which it takes by itself for four dense dimensions alone: softmax on the way, and one
    number a row for backward. No call where it does not go."""

    def call(tensors: Tensors) -> Tensor:
        four = {n: t.contiguous() for n, t in tensors.items()}
        for name in ("query", "key", "value"):
            four[name] = four[name][(None,) * (4 - four[name].dim())]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            y = F.scaled_dot_product_attention(**four, **options)  # type: ignore[arg-type]
        return y.reshape(*tensors["query"].shape[:-1], y.shape[-1])

    return [Side(call)]


def _in_training(options: dict[str, Any]) -> Any:
    return options.get("dropout_p", 0.0) if options.get("training", False) else 0.0


OPERATORS: dict[str, Operator] = {
    "linear": Operator(_linear_ours, _linear_theirs, _in_training, "elements", sums=True),
    "conv2d": _plain("conv2d")._replace(sums=True),
    "batch_norm": _plain("batch_norm"),
    "cross_entropy": _plain("cross_entropy"),
    "conv_stage": Operator(_stage_ours, _stage_theirs, _in_training, "channels"),
    "matmul": _plain("matmul")._replace(sums=True),
    "attention": _plain("scaled_dot_product_attention")._replace(
        dropout=lambda options: options.get("dropout_p", 0.0), others=_flash
    ),
}
