"""What the operators' autograd functions share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


def once_differentiable(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Decorator of a Function's ``backward``: its gradients can't be differentiated again, and say so when tried; many
    incoming gradients at once (is_grads_batched) are taken one by one.

    torch's decorator of this name marks them only where the incoming gradient requires grad. Without that (the plain
    ``grad(y.sum(), x, create_graph=True)``) the gradients would count as constants, silently.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        for a in args:
            if a is not None and _batched(a):
                return _one_by_one(wrapper, ctx, args)
        if not torch.is_grad_enabled():  # enabled is what create_graph=True does
            return backward(ctx, *args)
        with torch.no_grad():
            gradients = backward(ctx, *args)
        message = b"trying to differentiate twice a function that was marked with @once_differentiable"
        refuse: Any = torch._C._functions.DelayedError(message, len(gradients))
        return refuse(*(None if g is None else g.detach().requires_grad_() for g in gradients))

    return wrapper


def _one_by_one(backward: Callable[..., Any], ctx: Any, args: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    mode: Any = torch._C
    level = mode._vmapmode_increment_nesting() - 1
    mode._vmapmode_decrement_nesting()
    many = [a is not None and _batched(a) for a in args]
    # with memory of their own, the gradients along the first axis
    whole = [torch._remove_batch_dim(a, level, 0, 0) if m else a for a, m in zip(args, many)]
    count = next(len(a) for a, m in zip(whole, many) if m)
    rows = [backward(ctx, *(a[i] if m else a for a, m in zip(whole, many))) for i in range(count)]
    columns = zip(*rows)
    return tuple(None if c[0] is None else torch._add_batch_dim(torch.stack(c), 0, level) for c in columns)
