"""Whose code can be measured: for each provider, a function per operator with torch.nn.functional's arguments.

``module:NAME`` makes a provider of any importable module: its functions called as the operators (linear, conv2d,
batch_norm, cross_entropy, ...) are measured, positional arguments as in torch.nn.functional.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import tkernels
from perf.options import Refused
from tkernels.core import hardware

BASELINE, OURS, COMPILED = "torch", "tkernels", "torch.compile"
# a network as most scripts run it on a CPU: float32 without autocast, whatever dtype the others take
USUAL = "torch-fp32"
Function = Callable[..., Any]
# arguments of the network -> (network, loss)
Factory = Callable[[dict[str, Any]], tuple[Callable[..., Any], Callable[..., Any]]]


@dataclasses.dataclass(frozen=True)
class Provider:
    """``functions``: by operator name; what is not there is reported as unsupported. ``context``: entered round
    every call. ``gpu_only``: whether it cannot run on a CPU."""

    name: str
    functions: dict[str, Function]
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    gpu_only: bool = False


def check(names: Iterable[str]) -> list[str]:
    """The names, each once. Raises Refused for one that is unknown or not installed."""
    checked = list(dict.fromkeys(names))
    for name in checked:
        own = name.startswith("module:")
        if not own and name not in PROVIDERS:
            raise Refused(f"unknown provider {name!r}, allowed: {', '.join(PROVIDERS)}, module:NAME")
        needed = name.removeprefix("module:") if own else PROVIDERS[name].module
        try:
            found = importlib.util.find_spec(needed) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            raise Refused(f"provider {name!r} is not installed (there is no module {needed!r})")
    return checked


def load(name: str) -> Provider:
    """The provider of a checked name. Raises ImportError where its module cannot be loaded."""
    if name.startswith("module:"):
        return _from_module(name)
    return PROVIDERS[name].load()


def _torch() -> Provider:
    return Provider(
        BASELINE,
        {
            "linear": F.linear,
            "matmul": torch.matmul,
            "attention": F.scaled_dot_product_attention,
            "linear_relu": lambda *args: F.relu(F.linear(*args)),
            "conv2d": F.conv2d,
            "conv2d_relu": lambda *args: F.relu(F.conv2d(*args)),
            "batch_norm": F.batch_norm,
            "batch_norm_relu": lambda *args: F.relu(F.batch_norm(*args)),
            "cross_entropy": F.cross_entropy,
            "conv_stage": _plain_stage,
            "cnn": _plain_cnn,
        },
    )


def _plain_stage(x: torch.Tensor, layers: Iterable[tuple[torch.Tensor, ...]], pool: int) -> torch.Tensor:
    for weight, bn_weight, bn_bias, mean, var in layers:
        x = F.relu(F.batch_norm(F.conv2d(x, weight, padding=1), mean, var, bn_weight, bn_bias, True))
    return F.max_pool2d(x, pool)


def _plain_cnn(arguments: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    from models.cifar_cnn import CNNClassifier

    return CNNClassifier(**arguments), nn.CrossEntropyLoss()


def _tkernels() -> Provider:
    functional: Any = tkernels.functional

    def conv_stage(x: torch.Tensor, layers: Iterable[tuple[torch.Tensor, ...]], pool: int) -> torch.Tensor:
        stage = [functional.ConvBNLayer(weight, None, *norm, padding=1) for weight, *norm in layers]
        return functional.conv_stage(x, stage, pool, training=True)

    def cnn(arguments: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
        from models.cifar_cnn import FusedCNNClassifier

        modules: Any = tkernels.nn
        return FusedCNNClassifier(**arguments), modules.CrossEntropyLoss()

    own = ("linear", "linear_relu", "matmul", "conv2d", "batch_norm", "cross_entropy")
    functions: dict[str, Function] = {
        **{name: getattr(functional, name) for name in own},
        "attention": functional.scaled_dot_product_attention,
        "batch_norm_relu": functools.partial(functional.batch_norm, activation="relu"),
        "conv2d_relu": functools.partial(functional.conv2d, activation="relu"),
        "conv_stage": conv_stage,
        "cnn": cnn,
    }
    return Provider(OURS, functions)


def _compiled() -> Provider:
    torch._dynamo.reset()
    hardware.find_cuda()
    # bwd mode runs the same backward again and again
    import torch._functorch.config as functorch

    functorch.donated_buffer = False

    def compile(function: Function) -> Function:
        return torch.compile(function, dynamic=False)

    def cnn(arguments: dict[str, Any]) -> tuple[Function, Function]:
        model, loss = _plain_cnn(arguments)
        model.compile(dynamic=False)
        return model, torch.compile(loss, dynamic=False)

    functions = {name: compile(function) for name, function in _torch().functions.items() if name != "cnn"}
    return Provider(COMPILED, {**functions, "cnn": cnn})


def _attorch() -> Provider:
    """attorch's autograd functions; its linear weights are [in, out], its modules take float32 only."""
    bn = importlib.import_module("attorch.batch_norm_layer").BatchNormAutoGrad
    conv = importlib.import_module("attorch.conv_layer").Conv2dAutoGrad
    lin = importlib.import_module("attorch.linear_layer").LinearAutoGrad
    loss = importlib.import_module("attorch").CrossEntropyLoss()

    def linear(x: Any, w: Any, b: Any) -> Any:
        return lin.apply(x, w.t(), b)

    def linear_relu(x: Any, w: Any, b: Any) -> Any:
        return lin.apply(x, w.t(), b, "relu")

    def conv2d(x: Any, w: Any, b: Any, stride: int, padding: int, dilation: int, groups: int) -> Any:
        return conv.apply(x, w, b, stride, stride, padding, padding, groups)

    def batch_norm(x: Any, mean: Any, var: Any, w: Any, b: Any, training: bool) -> Any:
        return bn.apply(x, training, w, b, mean, var)

    functions: dict[str, Function] = {"linear": linear, "linear_relu": linear_relu, "conv2d": conv2d}
    return Provider("attorch", {**functions, "batch_norm": batch_norm, "cross_entropy": loss}, gpu_only=True)


def _liger() -> Provider:
    """Liger computes the gradient in forward and writes it over the logits: its forward is timed with it, and only
    the first call sees the values it was given."""
    function = importlib.import_module("liger_kernel.transformers.functional").liger_cross_entropy
    return Provider("liger-kernel", {"cross_entropy": function}, gpu_only=True)


def _flag_gems() -> Provider:
    """PyTorch's functions with the ATen operators that FlagGems replaces."""
    use_gems = importlib.import_module("flag_gems").use_gems
    functions = {name: function for name, function in _torch().functions.items() if name != "cnn"}
    return Provider("flag-gems", functions, context=use_gems, gpu_only=True)


def _from_module(name: str) -> Provider:
    module = importlib.import_module(name.removeprefix("module:"))
    names = _torch().functions
    return Provider(name, {key: getattr(module, key) for key in names if callable(getattr(module, key, None))})


@functools.cache
def versions() -> dict[str, str]:
    """torch's and triton's versions; triton's is empty where it is not installed."""
    from importlib import metadata

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return ""

    return {"torch": torch.__version__, "triton": version("triton")}


class Known(NamedTuple):
    """A provider by name: the module it needs, how it is loaded, and its colour in every picture."""

    module: str
    load: Callable[[], Provider]
    colour: str


# (colours are distinguishable with the common colour blindnesses: Okabe and Ito's palette, grey and Tol's wine)
PROVIDERS = {
    OURS: Known("tkernels", _tkernels, "#0072B2"),
    BASELINE: Known("torch", _torch, "#999999"),
    COMPILED: Known("torch", _compiled, "#E69F00"),
    USUAL: Known("torch", lambda: Provider(USUAL, {"cnn": _plain_cnn}), "#CC79A7"),
    "attorch": Known("attorch", _attorch, "#009E73"),
    "liger-kernel": Known("liger_kernel", _liger, "#D55E00"),
    "flag-gems": Known("flag_gems", _flag_gems, "#882255"),
}
# of everybody else, as they come
OTHER_COLOURS = ("#56B4E9", "#332288", "#117733", "#CC6677", "#44AA99", "#AA4499", "#661100")


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each provider of a file: its own, or one of those that are left, again and again."""
    left = itertools.cycle(OTHER_COLOURS)
    return {name: PROVIDERS[name].colour if name in PROVIDERS else next(left) for name in dict.fromkeys(names)}
