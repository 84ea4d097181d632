"""What the operators' autograd functions share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from tkernels.core import _torch

Gradients = tuple[Tensor | None, ...]
Backward = Callable[..., Gradients]


def once_differentiable(backward: Backward) -> Backward:
    """Decorator of a Function's ``backward`` by kernels: its gradients can't be differentiated again, and say so when
    tried; many incoming gradients at once (is_grads_batched, vmap) are taken one by one.

    torch's decorator of this name marks them only where the incoming gradient requires grad, and apart from the graph
    they came from. So the plain ``grad(y.sum(), x, create_graph=True)`` would give constants, and a Hessian zeros.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *args: Any) -> Gradients:
        if is_dynamo_compiling():  # what it makes cannot be differentiated twice, and says so
            return backward(ctx, *args)
        args = _as_stored(args)
        if not _are_plain(args):
            return _of_kernels(wrapper, ctx, args)
        if not torch.is_grad_enabled():  # enabled is what create_graph=True does
            return backward(ctx, *args)
        with torch.no_grad():
            gradients = backward(ctx, *args)
        inputs = [None if g is None else g.detach().requires_grad_() for g in gradients]
        # what the gradients depend on: autograd goes only where it gets to what it is asked for
        inputs += [a for a in args if a is not None and a.requires_grad] + _leaves(ctx)
        message = b"trying to differentiate twice a function that was marked with @once_differentiable"
        refuse = _torch.DelayedError(message, len(inputs))
        refused: Gradients = refuse(*inputs)[: len(gradients)]
        return refused

    return wrapper


def _leaves(node: Any) -> list[Tensor | None]:
    """The leaves that the inputs of an autograd function are made of."""
    leaves: list[Tensor | None] = []
    seen, ahead = {node}, [node]
    while ahead:
        for below, _ in ahead.pop().next_functions:
            if below is None or below in seen:
                continue
            seen.add(below)
            ahead.append(below)
            if hasattr(below, "variable"):
                leaves.append(below.variable)
    return leaves


def by_kernels(backward: Backward) -> Backward:
    """Decorator of a ``backward`` by kernels that can be differentiated again; many gradients are taken one by one."""

    @functools.wraps(backward)
    def wrapper(ctx: Any, *args: Any) -> Gradients:
        if is_dynamo_compiling():
            return backward(ctx, *args)
        args = _as_stored(args)
        return backward(ctx, *args) if _are_plain(args) else _of_kernels(wrapper, ctx, args)

    return wrapper


def composed_where_differentiated(composed: Backward) -> Callable[[Backward], Backward]:
    """Decorator of a ``backward`` by compiled passes. ``composed``, the same in torch's own calls, takes its place
    where the gradients are to be differentiated, backward or forward, and where forward has set ``ctx.composed``; many
    gradients at once are taken one by one. One graph gives one gradient: what is to be differentiated backward has the
    values of the passes."""

    def decorator(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *args: Any) -> Gradients:
            args = _as_stored(args)
            if getattr(ctx, "composed", False):
                return composed(ctx, *args)
            plain = _are_plain(args)
            if torch.is_grad_enabled():
                ctx = _Unpacked(ctx)
                graph = composed(ctx, *args)
                return _with_values(graph, backward, ctx, args) if plain else graph
            if plain:
                return backward(ctx, *args)
            if not _are_many(args):
                return composed(ctx, *args)
            return _one_by_one(wrapper, ctx, args)

        return wrapper

    return decorator


class _Unpacked:
    """A node of the graph whose saved tensors are unpacked once: checkpointing allows no second time."""

    def __init__(self, ctx: Any) -> None:
        self.ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)


def _with_values(graph: Gradients, backward: Backward, ctx: Any, args: tuple[Any, ...]) -> Gradients:
    with torch.no_grad():
        values = backward(ctx, *args)
    return tuple(v if g is None or v is None else _Valued.apply(g, v) for g, v in zip(graph, values))


class _Valued(torch.autograd.Function):
    """A tensor with the history of one and the value of another."""

    @staticmethod
    def forward(ctx: Any, history: Tensor, value: Tensor) -> Tensor:
        return value.data  # (what is returned as it came would be a view, which nobody may write to)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        return d, None


def gradients_of(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool], dy: Tensor
) -> list[Tensor | None]:
    """Of ``function(*inputs)`` in torch's own calls: the gradients as functions of everything, where ``needs`` says."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # names of their own: what is given in two places has a gradient in each
        views = [t.view_as(t) if t is not None and need else t for t, need in zip(inputs, needs)]
        wanted = [t for t, need in zip(views, needs) if t is not None and need]
        if not wanted:
            return [None] * len(views)
        gradients = iter(torch.autograd.grad(function(*views), wanted, dy, create_graph=again, allow_unused=True))
    return [next(gradients) if t is not None and need else None for t, need in zip(views, needs)]


def apart(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors, to be given to an autograd function: torch.compile takes none that is given the same one twice, and
    there the second is a view."""
    if not is_dynamo_compiling():
        return tensors
    found: list[Tensor | None] = []
    for t in tensors:
        found.append(t.view_as(t) if t is not None and any(t is other for other in found) else t)
    return tuple(found)


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """ctx.save_for_backward, and what :func:`saved` goes by: strides, for hooks may come later
    (SavedTensor.register_hooks); where hooks are on already, all that there is. A trace keeps nothing."""
    ctx.save_for_backward(*tensors)
    ctx.kinds = ctx.strides = None
    if is_dynamo_compiling() or _torch.count_dispatch_modes() > 0:
        return
    if _torch.hooks_on_saved(True) is None:
        ctx.strides = _strides(tensors)
    else:
        ctx.kinds = [_kind(t) for t in tensors]


def saved(ctx: Any) -> tuple[Any, ...]:
    """What :func:`save` was given, laid out as it was: kernels and passes rely on that, and hooks (save_on_cpu, ...)
    may give back another layout. Raises RuntimeError for another shape, dtype or device."""
    tensors: tuple[Any, ...] = ctx.saved_tensors
    if ctx.kinds is not None:
        return tuple(t if _kind(t) == kind else _restored(t, kind) for t, kind in zip(tensors, ctx.kinds))
    if ctx.strides is None or ctx.strides == _strides(tensors):
        return tensors
    return tuple(
        t if t is None or t.stride() == strides else _restored(t, (t.shape, t.dtype, _place(t), strides))
        for t, strides in zip(tensors, ctx.strides)
    )


def _strides(tensors: Sequence[Tensor | None]) -> list[tuple[int, ...] | None]:
    return [None if t is None else t.stride() for t in tensors]


def _kind(t: Tensor | None) -> tuple[Any, ...] | None:
    return None if t is None else (t.shape, t.dtype, _place(t), t.stride())


def _place(t: Tensor) -> int | None:
    return None if t.is_meta else t.get_device()


def _restored(t: Tensor, kind: tuple[Any, ...]) -> Tensor:
    shape, dtype, place, strides = kind
    if (t.shape, t.dtype, _place(t)) != (shape, dtype, place):
        device = "meta" if place is None else "the CPU" if place < 0 else f"GPU {place}"
        was = f"{dtype} {list(shape)} on {device}"
        now = f"{t.dtype} {list(t.shape)} on {t.device}"
        raise RuntimeError(f"a tensor that was saved for backward as {was} came back from its hooks as {now}")
    once = t.as_strided([min(n, 1) if s == 0 else n for n, s in zip(shape, strides)], t.stride())
    return torch.empty_strided(once.shape, strides, dtype=dtype, device=t.device).copy_(once).expand(shape)


def _as_stored(gradients: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same without what is stored with the opposite sign, as the imaginary part of a conjugate is: kernels and
    passes read memory."""
    return tuple([g.resolve_neg() if g is not None and g.is_neg() else g for g in gradients])


def _are_plain(gradients: tuple[Any, ...]) -> bool:
    """Whether each has memory that says all there is to say: no batch of many, no wrapper, no tangent."""
    tangents = _torch.forward_ad_level() >= 0
    for g in gradients:
        if g is None:
            continue
        if _torch.is_legacy_batched(g) or _torch.is_wrapped(g):
            return False
        if tangents and torch.autograd.forward_ad.unpack_dual(g).tangent is not None:
            return False
    return True


def _are_many(gradients: tuple[Any, ...]) -> bool:
    """Whether those that are not plain are batches."""
    return all(_torch.is_legacy_batched(g) or _torch.is_batched(g) for g in gradients if not _are_plain((g,)))


def _of_kernels(backward: Backward, ctx: Any, args: tuple[Any, ...]) -> Gradients:
    if not _are_many(args):
        raise RuntimeError(
            "gradients by kernels are not defined under torch.func transforms (grad, jvp, ...) and forward-mode AD: "
            "run the forward pass there too, or under tkernels.backend('torch')"
        )
    return _one_by_one(backward, ctx, args)


def _one_by_one(backward: Backward, ctx: Any, args: tuple[Any, ...]) -> Gradients:
    """The gradients of each row of a batch, by calls of their own, as a batch again."""
    whole, add_batch_dim = _unwrapped(args)
    many = [w is not a for w, a in zip(whole, args)]
    count = next(len(w) for w, m in zip(whole, many) if m)
    # what allocates memory for kernels and passes must not meet a transform
    plain = _torch.without_transforms() if _are_plain(whole) else contextlib.nullcontext()
    with plain:
        rows = [backward(ctx, *(w[i] if m else w for w, m in zip(whole, many))) for i in range(count)]
        columns = [None if c[0] is None else torch.stack(c) for c in zip(*rows)]
    # (no view of a user's own class can be made within vmap)
    with _torch.without_torch_function():
        return tuple(None if c is None else add_batch_dim(c) for c in columns)


def _unwrapped(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Callable[[Tensor], Tensor]]:
    """The batches, their rows along the first axis, and what makes a batch of such a tensor again."""
    if any(a is not None and _torch.is_legacy_batched(a) for a in args):
        level = _torch.legacy_batch_level()
        whole = tuple(
            _torch.unwrap_legacy_batch(a, level, 0, 0) if a is not None and _torch.is_legacy_batched(a) else a
            for a in args
        )
        return whole, lambda t: _torch.wrap_legacy_batch(t, 0, level)
    innermost = max(_torch.level_of(a) for a in args if a is not None)

    def rows(a: Any) -> Any:
        if a is None or _torch.level_of(a) != innermost:
            return a
        value, axis = _torch.unwrap_batch(a, innermost)
        return value.movedim(axis, 0)

    return tuple(rows(a) for a in args), lambda t: _torch.wrap_batch(t, 0, innermost)
