"""Hooks of every kind on fused models: registered before fuse(), after the first call, and removed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.utils.hooks import RemovableHandle

import tkernels
from tests.fusion.pairs import assert_alike, both, close, gradients_alike, images, ran

pytestmark = [
    pytest.mark.gate("torch", "cuda"),
    pytest.mark.filterwarnings("ignore:tkernels.fuse. a call of .* ran no fused operator"),  # counted, where it matters
]


def cnn() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))


Register = Callable[[nn.Module, list[str]], RemovableHandle]


def forward(module: nn.Module, seen: list[str]) -> RemovableHandle:
    return module.register_forward_hook(lambda m, args, y: (seen.append("forward"), 2.0 * y)[1])


def forward_with_kwargs(module: nn.Module, seen: list[str]) -> RemovableHandle:
    return module.register_forward_hook(lambda m, args, kw, y: (seen.append("forward"), y + 1.0)[1], with_kwargs=True)


def forward_that_looks_on(module: nn.Module, seen: list[str]) -> RemovableHandle:
    return module.register_forward_hook(lambda m, args, y: seen.append(str(tuple(y.shape))))


def forward_pre(module: nn.Module, seen: list[str]) -> RemovableHandle:
    return module.register_forward_pre_hook(lambda m, args: (seen.append("pre"), (args[0] + 1.0,))[1])


def forward_pre_with_kwargs(module: nn.Module, seen: list[str]) -> RemovableHandle:
    def hook(m: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        seen.append("pre")
        return (args[0] * 0.5,), kwargs

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def full_backward(module: nn.Module, seen: list[str]) -> RemovableHandle:
    def hook(m: nn.Module, given: Any, wanted: Any) -> tuple[Tensor | None, ...]:
        seen.append("backward")
        return tuple(None if g is None else 3.0 * g for g in given)

    return module.register_full_backward_hook(hook)


def backward_pre(module: nn.Module, seen: list[str]) -> RemovableHandle:
    return module.register_full_backward_pre_hook(lambda m, g: (seen.append("backward pre"), (2.0 * g[0],))[1])


KINDS = [forward, forward_with_kwargs, forward_that_looks_on, forward_pre, forward_pre_with_kwargs, full_backward,
         backward_pre]  # fmt: skip


def compare(fused: Any, model: Any, seen: dict[str, list[str]], device: str) -> None:
    """Values, gradients, buffers, and how often each hook ran."""
    x = images(device)
    close([fused(x)], [model(x)], "result")
    gradients_alike(fused, model, x)
    close(dict(fused.named_buffers()), dict(model.named_buffers()), "buffers")
    assert seen["fused"] == seen["model"]


@pytest.mark.parametrize("place", ["1", "2", ""], ids=["norm", "activation", "root"])
@pytest.mark.parametrize("register", KINDS, ids=lambda kind: kind.__name__)
def test_registered_after_the_first_call_and_removed(register: Register, place: str, device: str) -> None:
    model, fused = both(cnn, device)
    assert_alike(fused, model, images(device).requires_grad_(), more=2)
    seen: dict[str, list[str]] = {"model": [], "fused": []}
    handles = [register(network.get_submodule(place), seen[name]) for name, network in
               (("model", model), ("fused", fused))]  # fmt: skip
    compare(fused, model, seen, device)
    assert seen["model"]
    count = len(seen["model"])
    for handle in handles:
        handle.remove()
    assert_alike(fused, model, images(device).requires_grad_(), more=2)
    assert len(seen["fused"]) == count


@pytest.mark.parametrize("register", KINDS, ids=lambda kind: kind.__name__)
def test_registered_before_fusing(register: Register, device: str) -> None:
    torch.manual_seed(0)
    networks = [cnn().to(device=device, memory_format=torch.channels_last) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    seen: dict[str, list[str]] = {"model": [], "fused": []}
    for name, network in zip(seen, networks):
        register(network[2], seen[name])
    model, fused = networks[0], tkernels.fuse(networks[1])
    compare(fused, model, seen, device)
    assert seen["model"]
    # Dynamo takes no backward hooks of modules
    assert (ran(fused) > 0) == (register not in (full_backward, backward_pre))


GLOBAL: list[tuple[Callable[..., RemovableHandle], Callable[[list[str]], Any]]] = [
    # (how it is registered, a hook that keeps the names of the modules it is called for)
    (global_hooks.register_module_forward_hook, lambda seen: lambda m, args, y: (seen.append(_name(m)), 2.0 * y)[1]),
    (global_hooks.register_module_forward_pre_hook, lambda seen: lambda m, args: seen.append(_name(m))),
    (global_hooks.register_module_full_backward_hook, lambda seen: lambda m, given, wanted: seen.append(_name(m))),
    (global_hooks.register_module_full_backward_pre_hook, lambda seen: lambda m, wanted: seen.append(_name(m))),
]


def _name(module: nn.Module) -> str:
    return type(module).__name__


@pytest.mark.parametrize("register, hook", GLOBAL, ids=lambda value: getattr(value, "__name__", ""))
def test_global_hooks(register: Any, hook: Any, device: str) -> None:
    """Of all modules: registered after the first call, and removed."""
    model, fused = both(cnn, device)
    x = images(device)
    assert_alike(fused, model, x.clone().requires_grad_(), more=2)
    seen: list[str] = []
    handle = register(hook(seen))
    try:
        found = []
        for network in (fused, model):
            seen.clear()
            leaf = x.clone().requires_grad_()
            y = network(leaf)
            y.square().sum().backward()
            found.append((y, leaf.grad, list(seen)))
    finally:
        handle.remove()
    close(found[0][:2], found[1][:2], "result and gradient")
    assert found[0][2] == found[1][2]
    assert "BatchNorm2d" in seen
    assert_alike(fused, model, x.clone().requires_grad_(), more=2)
    assert len(seen) == len(found[1][2])


def test_hooks_that_keep_activations(device: str) -> None:
    """As for feature maps and Grad-CAM: maps inside a chain, and their gradients."""
    model, fused = both(cnn, device)
    x = images(device)
    assert_alike(fused, model, x, more=2)
    found = []
    for network in (fused, model):
        kept: dict[str, Tensor] = {}

        def keep(module: nn.Module, args: Any, y: Tensor, kept: dict[str, Tensor] = kept) -> None:
            kept["map"] = y
            y.register_hook(lambda g: kept.setdefault("gradient", g))

        handle = network[0].register_forward_hook(keep)
        network(x).square().sum().backward()
        handle.remove()
        found.append(kept)
    close(*found, "kept")
    assert set(found[0]) == {"map", "gradient"}
    assert_alike(fused, model, x, more=2)


def test_hooks_of_parameters_and_results(device: str) -> None:
    model, fused = both(cnn, device)
    x = images(device)
    assert_alike(fused, model, x, more=2)
    seen: dict[nn.Module, list[str]] = {}
    for network in (model, fused):
        seen[network] = []
        for name, p in network.named_parameters():
            p.register_hook(lambda g, name=name, own=seen[network]: (own.append(name), 2.0 * g)[1])
            p.register_post_accumulate_grad_hook(lambda p, own=seen[network]: own.append("accumulated"))
    gradients_alike(fused, model, x)
    assert sorted(seen[fused]) == sorted(seen[model])
    assert len(seen[fused]) == 2 * len(list(model.parameters()))
