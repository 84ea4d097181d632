"""What a compiled graph calls for one chain of layers on a CPU:
[convolution ->] [batch norm ->] [+ residual ->] [activation].

:func:`plan` decides once, from shapes, and gives the function to call or the reason why the chain is left to PyTorch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tkernels.core import activation as activations
from tkernels.core.mode import plain_eager
from tkernels.core.records import BatchNorm
from tkernels.cpu import compiler, convolution, norm, packed
from tkernels.cpu.guard import DTYPES

# of input, weight, bias, running mean and variance, batch norm's weight and bias, residual: all given, some as None
Run = Callable[..., Tensor]


class Conv(NamedTuple):
    """torch.conv2d's own arguments."""

    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int


class Norm(NamedTuple):
    """``training``: the batch's statistics normalise, and running ones move where they are given."""

    training: bool
    momentum: float
    eps: float


class Chain(NamedTuple):
    """A chain without its tensors.

    ``input``: the shape that the first layer's input has as the graph is compiled. ``channels_last``: whether the map
    between convolution and batch norm is. ``weight``: the shape of the convolution's. ``dtype``: of the map between
    convolution and batch norm. ``differentiated``: whether autograd records the call.
    """

    input: tuple[int, ...]
    channels_last: bool
    weight: tuple[int, ...] | None
    conv: Conv | None
    norm: Norm | None
    residual: bool
    activation: str | None
    dtype: torch.dtype
    differentiated: bool


def plan(chain: Chain) -> Run | str:
    """The function for such chains, or why they are left to PyTorch."""
    if not compiler.enabled():
        return compiler.NOT_COMPILED
    if chain.dtype not in DTYPES:
        return f"{chain.dtype} has no passes on a CPU"
    if len(chain.input) not in (2, 4):
        return f"batch norm over {len(chain.input)} axes has no passes on a CPU"
    if len(chain.input) == 4 and not chain.channels_last:
        return "its maps are not channels_last"
    if chain.norm is not None and chain.norm.training:
        return _training(chain, chain.norm)
    if not chain.differentiated:
        return _inference(chain)
    if chain.norm is None:
        return _alone(chain) or "there is no batch norm, and nothing to gain from the rest in training"
    return "batch norm by running statistics is left to PyTorch where it is differentiated"


def _training(chain: Chain, given: Norm) -> Run:
    """By the batch's statistics: a convolution, and one pass each way for everything behind it."""
    convolve, composed = _convolution(chain), _composed(chain)

    def run(x: Tensor, weight: Any, bias: Any, *others: Any) -> Tensor:
        if not _as_planned(x, others):
            return composed(x, weight, bias, *others)
        raw = x if convolve is None else convolve(x, weight, bias)
        bn = _with_vectors(given, others)
        if raw.numel() == raw.shape[1]:
            norm.reference(raw, bn, None, None)  # which raises: one value for each channel has no variance
        return norm.normalize(raw, bn, chain.activation, others[4], chain.differentiated)

    return run


def _inference(chain: Chain) -> Run | str:
    """Of what nobody differentiates: the convolution by a weight in oneDNN's order, and one pass over its result."""
    given, convolve, composed = chain.norm, _convolution(chain), _composed(chain)
    finish = None
    if given is None and not isinstance(convolve, packed.Packed):
        return "a convolution without batch norm, whose weight is reordered as fast as it is compared"
    if given is not None or chain.activation is not None:
        finish = norm.finish_of(chain.activation, given is not None, chain.residual, convolve is not None)

    def run(x: Tensor, weight: Any, bias: Any, *others: Any) -> Tensor:
        if not _as_planned(x, others) or not norm.is_nhwc(x):
            return composed(x, weight, bias, *others)
        raw = x if convolve is None else convolve(x, weight, bias)
        bn = None if given is None else _with_vectors(given, others)
        return raw if finish is None else finish(raw, bn, others[4])

    return run


def _alone(chain: Chain) -> Run | None:
    """A convolution in training with no batch norm behind it: worth a call for its gradients at most."""
    convolve, composed = _by_other_gradients(chain), _composed(chain)
    if convolve is None:
        return None

    def run(x: Tensor, weight: Any, bias: Any, *others: Any) -> Tensor:
        if not plain_eager():
            return composed(x, weight, bias, *others)
        return activations.apply(convolve(x, weight, bias), chain.activation)

    return run


def _with_vectors(given: Norm, others: tuple[Tensor | None, ...]) -> BatchNorm:
    """``others``: vectors and residual."""
    running_mean, running_var, weight, bias, _ = others
    return BatchNorm(running_mean, running_var, weight, bias, *given)


def _as_planned(x: Tensor, others: tuple[Tensor | None, ...]) -> bool:
    """Whether passes can take a call: what a graph's guards leave open. ``others``: vectors and residual."""
    return (
        x.numel() > 0
        and plain_eager()
        and all(t is None or t.is_contiguous() for t in others[:4])
        and not (x.is_neg() or any(t is not None and t.is_neg() for t in others))
    )


def _convolution(chain: Chain) -> Callable[[Tensor, Any, Tensor | None], Tensor] | None:
    """The chain's convolution, by the way that is fastest; None without one."""
    conv, weight = chain.conv, chain.weight
    if conv is None or weight is None:
        return None
    stride, padding, dilation, groups = conv
    if chain.differentiated:
        found = _by_other_gradients(chain)
        if found is not None:
            return found
    elif (
        not isinstance(padding, str)
        and math.prod(weight) >= packed.WORTH_IT[chain.dtype]
        and packed.enabled(chain.dtype)
        and packed.is_safe(weight[1] * groups, stride, dilation)
    ):
        return packed.Packed(stride, padding, dilation, groups, chain.dtype, chain.input)
    return lambda x, weight, bias: torch.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _by_other_gradients(chain: Chain) -> Callable[[Tensor, Any, Tensor | None], Tensor] | None:
    """The chain's convolution where PyTorch finds its gradients slowly."""
    conv, weight = chain.conv, chain.weight
    if conv is None or weight is None or isinstance(conv.padding, str):
        return None
    pixels = chain.input[0] * chain.input[2] * chain.input[3]
    arguments = conv.stride, conv.padding, conv.dilation, conv.groups, chain.dtype
    ways = convolution.ways(pixels, weight, *arguments)
    return None if ways is None else functools.partial(convolution.conv2d, convolution.Call(*arguments, ways))


def _composed(chain: Chain) -> Run:
    """The chain in torch's own calls."""
    given, conv = chain.norm, chain.conv
    arguments: Any = conv

    def run(x: Tensor, weight: Any, bias: Any, *others: Any) -> Tensor:
        if conv is not None:
            x = torch.conv2d(x, weight, bias, *arguments)
        if given is not None:
            return norm.reference(x, _with_vectors(given, others), chain.activation, others[4])
        return activations.apply(x if others[-1] is None else x + others[-1], chain.activation)

    return run
