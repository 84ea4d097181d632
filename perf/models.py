"""Names of models: torchvision:NAME, timm:NAME, module:function of one's own, and the list called 'all'."""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from perf.options import Refused

Build = Callable[[], nn.Module]
ALL = "all"
# one of each kind of convolutional network, and how timm writes some of them
LISTED = (
    *(f"torchvision:{name}" for name in (
        "resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "efficientnet_b0", "densenet121", "convnext_tiny",
        "regnet_y_400mf",
    )),
    *(f"timm:{name}" for name in ("resnet26d", "efficientnet_b0", "mobilenetv3_large_100", "repvgg_a0")),
)  # fmt: skip


def resolve(given: Sequence[str]) -> dict[str, Build]:
    """What builds each model named, in the order given. Raises Refused for a name that there is not."""
    names = [listed for name in given for listed in (LISTED if name == ALL else (name,))]
    return {name: _build(name) for name in dict.fromkeys(names)}


def _build(name: str) -> Build:
    origin, _, rest = name.partition(":")
    if not origin or not rest:
        raise Refused(f"unknown model {name!r}, allowed: torchvision:NAME, timm:NAME, module:function, {ALL}")
    if origin not in ("torchvision", "timm"):
        return _own(origin, rest)
    library: Any = _module(origin, name)
    listed = library.models.list_models() if origin == "torchvision" else library.list_models()
    if rest not in listed:
        raise Refused(f"{origin} has no model {rest!r}{_near(rest, listed)}")
    if origin == "torchvision":
        return functools.partial(library.models.get_model, rest, weights=None)
    return functools.partial(library.create_model, rest)


def _own(module: str, function: str) -> Build:
    found = getattr(_module(module, f"{module}:{function}"), function, None)
    if not callable(found):
        raise Refused(f"module {module!r} has no function {function!r} that returns a model")
    build: Build = found
    return build


def _module(name: str, model: str) -> object:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refused(f"model {model!r}: {name!r} cannot be imported: {error}") from error


def _near(name: str, listed: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(listed), 4)
    return f", allowed are such as {', '.join(near)}" if near else ""
