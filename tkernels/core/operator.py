"""An operator's call, in one order for all of them: PyTorch's body, or the checks (once a kind of call), autocast,
dropout's seed, autograd, and the passes by kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from tkernels.core import autograd, autotune, mode, plan

Keep = Callable[..., tuple[Any, ...]] | None


class Decision(NamedTuple):
    """How a call goes to kernels. ``static``: what the passes take beside tensors; ``cast``: autocast's dtype, where
    floating tensors are cast to it first; ``dropout``: its probability, where the passes take a seed behind the other
    tensors (None at 0)."""

    static: tuple[Hashable, ...]
    cast: torch.dtype | None = None
    dropout: float | None = None


class Passes:
    """Forward and backward by kernels, differentiable where that is asked for.

    ``forward(tensors, *static, needs)`` gives (y, *kept). The first ``differentiable`` tensors (a number, or a function
    of how many there are) may want gradients; ``needs`` says which do, None where nothing is differentiated.
    ``backward((dy, *kept), *static, needs)`` gives theirs. ``keep(tensors, static)``: what backward takes as static
    arguments, if not forward's. ``twice(*static)``: whether the result is to be had as two tensors of one memory, whose
    gradients backward takes both, (dy, the other's, *kept), and can add as it reads them; in a trace there is one.
    """

    def __init__(
        self, name: str, differentiable: int | Callable[[int], int], forward: plan.Planned, backward: plan.Planned,
        keep: Keep = None, twice: Callable[..., bool] | None = None,
    ) -> None:  # fmt: skip
        self._forward, self._differentiable = forward, differentiable
        self._function = _function(name, forward, backward, keep, twice)

    def __call__(self, call: plan.KnownCall | None, tensors: plan.Tensors, static: tuple[Any, ...]) -> Any:
        """``call``: whose tensors these are, or are made of in one way only. (Plans are kept by pass, static arguments
        and call.)"""
        if differentiates(tensors) if call is None else call.differentiates:
            count = self._differentiable
            count = count if isinstance(count, int) else count(len(tensors))
            return self._function.apply(call, static, tensors[count:], *autograd.apart(*tensors[:count]))
        return self._forward.of_call(call, tensors, *static, None)[0]


def differentiates(tensors: plan.Tensors) -> bool:
    """Whether autograd records a call with these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _function(
    name: str, forward_pass: plan.Planned, backward_pass: plan.Planned, keep: Keep, twice: Callable[..., bool] | None
) -> Any:
    def forward(
        ctx: Any, call: plan.KnownCall | None, static: tuple[Any, ...], others: plan.Tensors, *tensors: Tensor | None
    ) -> Any:
        tensors = (*tensors, *others)
        y, *kept = forward_pass.of_call(call, tensors, *static, ctx.needs_input_grad[3:])  # of what follows ``others``
        autograd.save(ctx, *kept)
        ctx.static = static if keep is None else keep(tensors, static)
        return y if twice is None or not twice(*static) else (y, cast(Tensor, y).detach())

    @autograd.once_differentiable
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        # (a call says nothing of dy: this plan is looked up by the tensors)
        gradients = backward_pass((*dy, *autograd.saved(ctx)), *ctx.static, ctx.needs_input_grad[3:])
        return None, None, None, *gradients

    # (its name is what grad_fn shows)
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward), "__module__": __name__}
    return type(f"_{name}", (torch.autograd.Function,), methods)


class Operator:
    """A public function of ``tensors`` (Nones among them) and ``arguments``: numbers, names, and tuples of them.

    ``reference(*tensors, *arguments)``: the PyTorch body. ``check(*tensors, *arguments)``: raises what torch raises
    before anything is launched, and gives a Decision, or None for what is PyTorch's. Its answer is kept for all calls
    of one plan.call_key: it may depend on nothing else. ``run(call, tensors, static)``: Passes, or what calls them.
    """

    def __init__(
        self, reference: Callable[..., Tensor], check: Callable[..., Decision | None], run: Callable[..., Tensor]
    ) -> None:
        self.reference, self.check, self.run = reference, check, run
        self._calls = plan.Cache(plan.MOST_PLANS)

    def __call__(self, tensors: tuple[Any, ...], *arguments: Any) -> Tensor:
        if mode.is_torch_call(tensors[0]):
            return self.reference(*tensors, *arguments)
        # (what cannot be measured while a graph is captured is not decided for good)
        key = None if autotune.enabled and autotune.capturing() else plan.call_key(tensors, arguments)
        call = self._calls.get(key)
        if call is not None:
            decision = call.decision
        else:
            decision = self.check(*tensors, *arguments)
            if key is not None:
                call = self._calls.add(key, plan.KnownCall(decision, differentiates(tensors)))
        if decision is None:
            return self.reference(*tensors, *arguments)
        static, dtype, dropout = decision
        if dtype is not None:
            tensors = mode.cast_for_autocast(dtype, *tensors)
        if dropout is not None:
            tensors = (*tensors, mode.dropout_seed(tensors[0]) if dropout > 0 else None)
        return self.run(call, tensors, static)
