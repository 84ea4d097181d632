"""What the registered operators share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_AUTOGRAD = [getattr(torch._C.DispatchKey, key) for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther")]


def nothing(like: Tensor) -> Tensor:
    """What an operator returns in place of None: operators return tensors only."""
    return like.new_empty(0)


def something(t: Tensor) -> Tensor | None:
    """None for what stands for it."""
    return None if t.dim() == 1 and t.shape[0] == 0 else t


def torch_statistics(x: Tensor, eps: float) -> Tensor:
    """A batch's statistics as batch_norm's kernels give them: float32 [4, C]."""
    axes = [0, *range(2, x.dim())]
    exact = torch.stack([x.double().mean(axes), (x.double().var(axes, correction=0) + eps).rsqrt()])
    rounded = exact.float()
    return torch.cat([rounded, (exact - rounded.double()).float()])


def dropout_factors(y: Tensor, p: float, seed: Tensor) -> Tensor:
    """0 with probability p, else 1 / (1 - p), of the shape of ``y`` and by ``seed``: the PyTorch bodies' draws, other
    than the kernels'. Waits for the device of ``seed``."""
    generator = torch.Generator(y.device).manual_seed(int(seed))
    return torch.empty_like(y).bernoulli_(1.0 - p, generator=generator).div_(1.0 - p if p < 1.0 else 1.0)


@contextlib.contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Bodies get their dtypes from arguments: autocast, if on, has done its part before the operator was called."""
    with torch.autocast(device.type, enabled=False):
        yield


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Autograd records within an operator's body, where torch excludes it."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD:
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def gradients(
    body: Callable[..., Tensor], tensors: Sequence[Tensor | None], needs: Sequence[bool], dy: Tensor
) -> list[Tensor | None]:
    """The PyTorch body's gradients by torch: ``body(*tensors)`` once more, differentiated where ``needs`` says so."""
    leaves = [t if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, needs)]
    with without_autocast(dy.device), _recording():
        y = body(*leaves)
        wanted: Any = [t for t, need in zip(leaves, needs) if t is not None and need]
        found = iter(torch.autograd.grad(y, wanted, dy, allow_unused=True))
    given = [next(found) if t is not None and need else None for t, need in zip(leaves, needs)]
    return [
        torch.zeros_like(t) if t is not None and need and g is None else g for t, need, g in zip(leaves, needs, given)
    ]


def results(found: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """An operator's results, each of storage of its own."""
    return tuple(nothing(like) if t is None else t for t in found)


def layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def empty(shape: Sequence[Any], like: Tensor, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """An empty tensor on the device of ``like``."""
    return torch.empty(tuple(shape), dtype=dtype, device=like.device, memory_format=memory_format)
