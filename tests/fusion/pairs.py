"""A model and its fused copy, for tests that compare what they compute and count what the fused one ran."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import tkernels
from tkernels.fusion import FusionReport
from tkernels.fusion.in_place import _fused


def both(make: Callable[[], nn.Module], device: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(a model, a fused copy), channels_last."""
    torch.manual_seed(0)
    model: nn.Module = make().to(device=device, memory_format=torch.channels_last)
    return model, tkernels.fuse(copy.deepcopy(model), **options)


def images(device: str, n: int = 4, channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(n, channels, size, size, device=device).to(memory_format=torch.channels_last)


def ran(model: nn.Module) -> int:
    """How many fused chains a model's calls have run."""
    fused = _fused(model)
    assert fused is not None, "the model is not fused"
    return fused.backend.ran


def chains(model: nn.Module) -> list[str]:
    return [what for _, what in report(model).fused]


def in_one(found: Iterable[str]) -> str:
    """Chains one after the other, whether or not they were joined."""
    return " -> ".join(found)


def report(model: nn.Module) -> FusionReport:
    return tkernels.explain(model)


def assert_alike(
    fused: nn.Module, model: nn.Module, *inputs: Any, more: int | None = None, bound: float = 1e-4, **kwargs: Any
) -> None:
    """Both give the same, and move the same buffers. ``more``: how many chains this call is to run; None: some."""
    before = ran(fused)
    results = []
    for network in (fused, model):
        torch.manual_seed(1)
        results.append(network(*inputs, **kwargs))
    found = ran(fused) - before
    assert found > 0 if more is None else found == more, f"{found} chains ran"
    close(*results, "result", bound)
    close(dict(fused.named_buffers()), dict(model.named_buffers()), "buffers", bound)


def close(actual: Any, expected: Any, name: str, bound: float = 1e-4) -> None:
    """Tensors, or containers of them, differ by at most ``bound`` of the largest value among them all."""
    found, wanted = dict(_tensors(actual, name)), dict(_tensors(expected, name))
    assert list(found) == list(wanted)
    scale = max((t.detach().double().abs().max().item() for t in wanted.values() if t.numel()), default=0.0)
    for key, t in wanted.items():
        assert found[key].shape == t.shape, key
        assert found[key].dtype == t.dtype, key
        torch.testing.assert_close(
            found[key].double(),
            t.double(),
            rtol=0,
            atol=bound * max(scale, 1.0),
            msg=lambda text, key=key: f"{key}: {text}",
        )


def _tensors(given: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(given, Tensor):
        yield name, given
        return
    items = given.items() if isinstance(given, dict) else enumerate(given)
    for key, leaf in items:
        yield from _tensors(leaf, f"{name} {key}")


def gradients_alike(fused: nn.Module, model: nn.Module, x: Tensor, bound: float = 1e-4) -> None:
    """One backward of each: gradients of the input and of every parameter."""
    found = []
    for network in (fused, model):
        torch.manual_seed(1)
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        network.zero_grad()
        y = network(leaf)
        (y * torch.linspace(0.5, 1.5, y.numel(), device=y.device).view(y.shape)).sum().backward()
        found.append({"input": leaf.grad, **{k: p.grad for k, p in network.named_parameters() if p.grad is not None}})
    close(*found, "gradient", bound)
