"""Runs one call through ours and through torch and compares all a caller can see.

Values must be as near to float64 as torch's own (twice its largest error, rule 11 of the design) or within the bound
of tests/tolerance.py. No sum in these operators is longer than their largest tensor, whose size is therefore
the reduction length. Dtype, layout, which gradients flow, error classes and untouched arguments must be the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import tkernels
from tests import tolerance
from tests.conformance import magnitudes
from tests.conformance.calls import Call, Outcome, of_torch, run
from tkernels.core import activation as activations

Cotangent = Callable[[Tensor], Tensor]
GATE = os.environ.get("TK_GATE", "torch")
IN_TTSEM = GATE == "ttsem"
STATISTICS = ("running_mean", "running_var")


def ours(operator: str) -> Callable[..., Tensor]:
    """Our function, looked up anew: tests replace it to see that the suite can fail."""
    return getattr(tkernels.functional, operator)


def torchs(operator: str) -> Callable[..., Tensor]:
    """torch's function, which takes the arguments ours adds as well and composes them."""

    def composed(*args: Any, activation: str | None = None, residual: Tensor | None = None, **kwargs: Any) -> Tensor:
        if operator == "batch_norm":
            args, kwargs = _with_dense_vectors(args, kwargs)
        y = of_torch(operator)(*args, **kwargs)
        return activations.apply(y if residual is None else y + residual, activation)

    return composed


def _with_dense_vectors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """torch's CPU backward of (N, C) reads strided weights, and in evaluation strided statistics, as if dense."""
    named = Call("batch_norm", args, kwargs).named()
    names = ("weight", "bias") if named.get("training", False) else ("weight", "bias", *STATISTICS)
    dense = {n: named[n].contiguous() for n in names if isinstance(named.get(n), Tensor)}
    return (), {**named, **dense}


def normal_cotangent(output: Tensor) -> Tensor:
    """A random gradient for ``output``, the same draws whatever its device and dtype."""
    generator = torch.Generator().manual_seed(17)
    return torch.randn(output.shape, generator=generator).to(device=output.device, dtype=output.dtype)


def check_call(call: Call, device: str, cotangent: Cotangent = normal_cotangent) -> Outcome:
    """Run ``call`` (CPU tensors) on ``device`` through both; assert that nothing tells them apart. Returns ours."""
    theirs = run(torchs(call.operator), call.on(device), cotangent)
    before = call.on(device)
    mine = run(ours(call.operator), before, cotangent)
    check_errors(mine, theirs, str(call))
    if theirs.error is not None:
        return mine
    assert mine.output is not None
    assert theirs.output is not None
    incoming = cotangent(theirs.output.detach()).cpu().double()
    exact = run(torchs(call.operator), call.on("cpu", torch.float64), lambda _: incoming)
    if exact.error is not None:
        raise exact.error
    assert exact.output is not None
    scales = magnitudes.of(exact.call, incoming if exact.gradients else None, exact.output.detach())
    length = max([t.numel() for t in call.tensors().values()] + [mine.output.numel()])
    # the order in memory of attention's output is torch's own kernels' choice, and they differ in it
    check_output(mine.output, theirs.output, any_order=call.operator == "scaled_dot_product_attention")
    close(mine.output, theirs.output, exact.output, length, scales["output"], "output")
    check_gradients(mine, theirs, exact, length, scales)
    check_arguments(call, mine, theirs, exact, length, scales)
    return mine


def check_errors(mine: Outcome, theirs: Outcome, what: str) -> None:
    """Both raise, and the same class, or neither does. (On a GPU torch's batch norm in evaluation stumbles over a bias
    without a weight.)"""
    if "tensor does not have a device" in str(theirs.error):
        assert mine.error is None, f"{what}: ours raises {mine.error!r}"
        return
    if theirs.error is None:
        if mine.error is not None:
            raise AssertionError(f"{what}: torch accepts it, ours raises {mine.error!r}") from mine.error
        return
    assert mine.error is not None, f"{what}: torch raises {theirs.error!r}, ours nothing"
    if type(mine.error) is not type(theirs.error):
        raise AssertionError(f"{what}: torch raises {theirs.error!r}, ours {mine.error!r}") from mine.error


def check_output(mine: Tensor, theirs: Tensor, any_order: bool = False) -> None:
    assert mine.dtype == theirs.dtype, f"output is {mine.dtype}, torch's {theirs.dtype}"
    assert mine.shape == theirs.shape, f"output is {list(mine.shape)}, torch's {list(theirs.shape)}"
    assert mine.requires_grad == theirs.requires_grad, f"output.requires_grad is {mine.requires_grad}"
    assert any_order or not mine.numel() or memory_formats(mine) == memory_formats(theirs), (
        f"output strides {mine.stride()}, torch's {theirs.stride()}, shape {list(mine.shape)}"
    )


def memory_formats(t: Tensor) -> tuple[bool, bool]:
    """Whether a tensor is dense in row-major order, and whether it is channels-last."""
    channels_last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
    channels_last |= t.dim() == 5 and t.is_contiguous(memory_format=torch.channels_last_3d)
    return t.is_contiguous(), channels_last


def check_gradients(mine: Outcome, theirs: Outcome, exact: Outcome, length: int, scales: dict[str, float]) -> None:
    assert mine.gradients.keys() == theirs.gradients.keys()
    for name, expected in theirs.gradients.items():
        got, reference = mine.gradients[name], exact.gradients[name]
        assert (got is None) == (expected is None), f"gradient of {name}: {got}, torch's {expected}"
        if got is None or expected is None or reference is None:
            continue
        assert got.dtype == expected.dtype, f"gradient of {name} is {got.dtype}, torch's {expected.dtype}"
        close(got, expected, reference, length, scales.get(name), f"gradient of {name}")


def check_arguments(
    given: Call, mine: Outcome, theirs: Outcome, exact: Outcome, length: int, scales: dict[str, float]
) -> None:
    """Running statistics moved as torch's did; every other tensor is what it was, to the bit and by its version."""
    moved, reference = theirs.call.tensors(), exact.call.tensors()
    original = given.on("cpu").tensors()
    for name, t in mine.call.tensors().items():
        if name in STATISTICS and theirs.call.named().get("training", False):
            close(t, moved[name], reference[name], length, scales.get(name), name)
            continue
        # (ttsem copies every operand of a launch back, which counts as a write)
        assert IN_TTSEM or t._version == 0, f"{name} was written to"
        assert same_bits(t, original[name]), f"{name} was changed"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality, NaN equal to NaN."""
    return torch.equal(
        torch.nan_to_num(a.detach().cpu(), 1.5), torch.nan_to_num(b.detach().cpu(), 1.5)
    ) and torch.equal(a.isnan().cpu(), b.isnan().cpu())


def close(mine: Tensor, theirs: Tensor, exact: Tensor, length: int, scale: float | None, name: str) -> None:
    """Assert that ``mine`` is near ``exact``: twice torch's own largest error, or the bound for ``length`` terms."""
    assert mine.shape == exact.shape, f"{name}: shape {list(mine.shape)}, expected {list(exact.shape)}"
    a, t, r = (v.detach().cpu().double() for v in (mine, theirs, exact))
    # what torch overflows in this dtype, or makes NaN of, so must ours
    assert torch.equal(a.isnan(), t.isnan()), f"{name}: NaN in other places than torch\n{a}\n{t}"
    assert torch.equal(a[t.isinf()], t[t.isinf()]), f"{name}: Inf in other places than torch\n{a}\n{t}"
    finite = torch.isfinite(t) & torch.isfinite(r)
    if not finite.any():
        return
    a, t, r = a[finite], t[finite], r[finite]
    magnitude = max(r.abs().max().item(), scale or 0.0)
    torchs_error = (t - r).abs().max().item()
    allowed = max(2 * torchs_error, tolerance.bound(mine.dtype, length) * magnitude)
    worst = (a - r).abs().max().item()
    assert worst <= allowed, (
        f"{name}: error {worst:.3e} over the allowed {allowed:.3e} (torch's own {torchs_error:.3e}, "
        f"magnitude {magnitude:.3e}, {length} terms)\nours {mine}\ntorch {theirs}"
    )
