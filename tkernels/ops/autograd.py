"""What the operators' autograd functions share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def once_differentiable(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Decorator of a Function's ``backward``: its gradients can't be differentiated again, and say so when tried.

    torch's decorator of this name marks them only where the incoming gradient requires grad. Without that (the plain
    ``grad(y.sum(), x, create_graph=True)``) the gradients would count as constants, silently.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():  # enabled is what create_graph=True does
            return backward(ctx, *args)
        with torch.no_grad():
            gradients = backward(ctx, *args)
        message = b"trying to differentiate twice a function that was marked with @once_differentiable"
        refuse: Any = torch._C._functions.DelayedError(message, len(gradients))
        return refuse(*(None if g is None else g.detach().requires_grad_() for g in gradients))

    return wrapper
