"""Saved tensors that come back different: in another layout, as copies, from elsewhere. Gradients are right, or an
error says why not. Every autograd function, on both bodies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import allow_mutation_on_saved_tensors, save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from tests.conformance.functions import CL, Function, forward
from tests.conformance.functions import function as function  # a fixture

pytestmark = pytest.mark.gate("torch", "ttsem", "cuda")


def strided(t: Tensor) -> Tensor:
    """The same values with gaps between them, at an odd offset."""
    whole = torch.full((t.numel() * 2 + 1,), 7, dtype=t.dtype, device=t.device)
    found = whole[1:].as_strided(t.shape, [2 * s for s in torch.empty(t.shape).stride()], 1)
    return found.copy_(t)


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else strided(t)


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=CL) if t.dim() == 4 else t.clone()


def expanded(t: Tensor) -> Tensor:
    """Of stride 0 where that says the same."""
    same = t.numel() > 0 and bool((t == t.flatten()[0]).all())
    return t.flatten()[:1].expand(t.shape) if same and t.dim() else t.clone()


def flipped_inside(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 2 else t.clone()


UNPACK: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "channels_last": channels_last,
    "strided": strided,
    "transposed": transposed,
    "expanded": expanded,
    "channels last of any rank": flipped_inside,
    "through NumPy": lambda t: torch.from_numpy(t.cpu().numpy().copy()).to(t.device),
    "a slice of something larger": lambda t: torch.cat([t.unsqueeze(0), t.unsqueeze(0)])[1],
}


def gradients(
    function: Function, leaves: list[Tensor], context: Any, run: Callable[..., Tensor] | None = None
) -> tuple[Tensor, ...]:
    with context:
        y = forward(function, leaves) if run is None else run(*leaves)
    row = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.device)
    return torch.autograd.grad(y, leaves, row)


def alike(found: tuple[Tensor, ...], function: Function, leaves: list[Tensor]) -> None:
    expected = gradients(function, leaves, torch.enable_grad(), function.theirs)
    for got, want in zip(found, expected):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


@pytest.fixture(autouse=True)
def _memory_is_poisoned() -> Iterator[None]:
    """What is read without having been written is NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]


@pytest.mark.parametrize("way", UNPACK)
def test_another_layout(way: str, function: Function, device: str) -> None:
    leaves = function.leaves(device)
    alike(gradients(function, leaves, saved_tensors_hooks(lambda t: t, UNPACK[way])), function, leaves)


@pytest.mark.parametrize("way", UNPACK)
def test_hooks_on_single_tensors_after_the_call(way: str, function: Function, device: str) -> None:
    leaves = function.leaves(device)
    y = forward(function, leaves)
    hooked, ahead, seen = 0, [y.grad_fn], set()
    while ahead:
        node: Any = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        ahead += [below for below, _ in node.next_functions]
        for tensor in getattr(node, "_raw_saved_tensors", ()):
            if tensor.data is not None:
                tensor.register_hooks(lambda t: t, UNPACK[way])
                hooked += 1
    if not hooked:
        pytest.skip("PyTorch's own nodes")
    row = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.device)
    alike(torch.autograd.grad(y, leaves, row), function, leaves)


@pytest.mark.gate("torch", "cuda")  # torch asks the driver for the device
@pytest.mark.parametrize("pinned", (False, True), ids=("", "pinned"))
def test_offloaded(pinned: bool, function: Function, device: str) -> None:
    leaves = function.leaves(device)
    alike(gradients(function, leaves, save_on_cpu(pin_memory=pinned and torch.cuda.is_available())), function, leaves)


@pytest.mark.gate("torch", "cuda")  # torch compares devices, which a pretended GPU tells from Python alone
@pytest.mark.parametrize("reentrant", (False, True), ids=("", "reentrant"))
@pytest.mark.parametrize("keep_rng", (False, True), ids=("", "rng state"))
def test_checkpointed(reentrant: bool, keep_rng: bool, function: Function, device: str) -> None:
    def run(*leaves: Tensor) -> Tensor:
        y: Any = checkpoint(function.ours, *leaves, use_reentrant=reentrant, preserve_rng_state=keep_rng)
        return (y * 2).sum() if reentrant else y  # (the reentrant kind knows no autograd.grad)

    leaves = function.leaves(device)
    if not reentrant:
        alike(gradients(function, leaves, torch.enable_grad(), run), function, leaves)
        return
    run(*leaves).backward()
    expected = torch.autograd.grad((function.theirs(*leaves) * 2).sum(), leaves)
    for leaf, want in zip(leaves, expected):
        torch.testing.assert_close(leaf.grad, want, atol=1e-4, rtol=1e-3)


@pytest.mark.gate("torch")
def test_checkpointed_and_differentiated_again(function: Function, device: str) -> None:
    """Each saved tensor is unpacked once."""
    leaves = function.leaves(device)
    y: Any = checkpoint(function.ours, *leaves, use_reentrant=False)
    found = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    expected = torch.autograd.grad(function.theirs(*leaves).square().sum(), leaves)
    for got, want in zip(found, expected):
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


def test_changed_after_forward(function: Function, device: str) -> None:
    """Refused; where torch is told to allow it, gradients are those of the values before."""
    leaves = function.leaves(device)
    expected = gradients(function, leaves, torch.enable_grad(), function.theirs)
    with allow_mutation_on_saved_tensors():
        y = function.ours(*leaves)
        row = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(device)
        with torch.no_grad():
            leaves[0].mul_(3)
        found = torch.autograd.grad(y, leaves, row)
    for got, want in zip(found, expected):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


@pytest.mark.gate("torch")
def test_elsewhere(function: Function, device: str) -> None:
    """What does not come back to the CPU is not read there."""
    leaves = function.leaves(device)
    with pytest.raises((RuntimeError, NotImplementedError)):
        gradients(function, leaves, saved_tensors_hooks(lambda t: t, lambda t: t.to("meta")))


def test_another_dtype_or_shape(function: Function, device: str) -> None:
    """Refused."""
    leaves = function.leaves(device)
    if function.on(device) in (None, "SiluBackward0"):
        pytest.skip("torch's own function")

    def rounded(t: Tensor) -> Tensor:
        return t.to(torch.bfloat16) if t.is_floating_point() else t

    for unpack in (rounded, lambda t: t.flatten()[:-1]):
        with pytest.raises(RuntimeError, match="came back from its hooks as"):
            gradients(function, leaves, saved_tensors_hooks(lambda t: t, unpack))


def test_nothing_is_kept_past_the_hooks(function: Function, device: str) -> None:
    y = forward(function, function.leaves(device))

    def tensors(value: Any, depth: int = 4) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        if depth and isinstance(value, (list, tuple, dict)):
            items = value.values() if isinstance(value, dict) else value
            return [t for item in items for t in tensors(item, depth - 1)]
        return tensors(vars(value), depth - 1) if depth and hasattr(value, "__dict__") else []

    node: Any = y.grad_fn
    assert tensors(getattr(node, "__dict__", {})) == []
