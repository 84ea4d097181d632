"""Under torch.func, forward-mode AD and tensors made of tensors PyTorch computes, or the strict backend says why not.

A kernel sees neither tangents nor batches, and a wrapper has no storage: what it returned would be silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import tkernels
from tests.conformance.compare import IN_TTSEM

pytestmark = pytest.mark.gate("torch", "ttsem", "cuda")


def draw(device: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)


def attention(functions: Any, x: Tensor) -> Tensor:
    """By the one kernel of torch's that knows forward-mode AD."""
    with sdpa_kernel(SDPBackend.MATH):
        return functions.scaled_dot_product_attention(x, draw(x.device.type, 2, 5, 8), x)


# a function of one tensor, given torch's namespace or ours and the device, and that tensor's shape
CALLS: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...]]] = {
    "linear": (lambda f, x: f.linear(x, draw(x.device.type, 5, 8), draw(x.device.type, 5)), (4, 8)),
    "conv2d": (lambda f, x: f.conv2d(x, draw(x.device.type, 4, 3, 3, 3), padding=1), (2, 3, 5, 4)),
    "batch_norm": (lambda f, x: f.batch_norm(x, None, None, training=True), (4, 3, 5)),
    "cross_entropy": (lambda f, x: f.cross_entropy(x, torch.tensor([0, 4, 2]).to(x.device)), (3, 5)),
    "matmul": (lambda f, x: getattr(f, "matmul", torch.matmul)(x, draw(x.device.type, 8, 5)), (3, 4, 8)),
    "attention": (lambda f, x: attention(f, x), (2, 5, 8)),
}


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest) -> tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...]]:
    return CALLS[request.param]


def with_tangent(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The directional derivative along x itself."""
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(function(forward_ad.make_dual(x, x.clone())))
    assert y.tangent is not None, "the tangent was lost"
    return y.tangent


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "forward mode": with_tangent,
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.clone(),))[1],
    "grad": lambda f, x: torch.func.grad(lambda t: f(t).sin().sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f, randomness="same")(torch.stack((x, x + 1))),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform: str, call: Any, device: str, triton_runs: bool, launches: list[str]) -> None:
    function, shape = call
    x = draw(device, *shape)
    if triton_runs:
        with pytest.raises(RuntimeError, match=r"torch\.func transforms .* and forward-mode AD"):
            TRANSFORMS[transform](lambda t: function(tkernels.functional, t), x)
    with tkernels.backend("auto"):
        ours = TRANSFORMS[transform](lambda t: function(tkernels.functional, t), x)
    torch.testing.assert_close(ours, TRANSFORMS[transform](lambda t: function(F, t), x))
    assert not launches


class Wrapper(Tensor):
    """Holds a tensor and has no storage of its own; every operator runs on what it holds."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Wrapper:
        self: Wrapper = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=held.device
        )
        self.held = held
        return self

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def held(t: Any) -> Any:
            return t.held if isinstance(t, Wrapper) else t

        return func(*(held(a) for a in args), **{k: held(v) for k, v in (kwargs or {}).items()})


def test_tensors_made_of_tensors(call: Any, device: str, triton_runs: bool, launches: list[str]) -> None:
    function, shape = call
    if IN_TTSEM and function is CALLS["batch_norm"][0]:
        pytest.skip("torch's own batch norm asks for the driver of the pretended GPU here")
    x = draw(device, *shape)
    if triton_runs:
        with pytest.raises(RuntimeError, match="Wrapper has no storage"):
            function(tkernels.functional, Wrapper(x))
    with tkernels.backend("auto"), torch.no_grad():
        ours = function(tkernels.functional, Wrapper(x))
    torch.testing.assert_close(ours, function(F, x))
    assert not launches


def test_what_is_stored_with_the_opposite_sign(call: Any, device: str, triton_runs: bool, launches: list[str]) -> None:
    function, shape = call
    x = torch.complex(draw(device, *shape), draw(device, *shape)).conj().imag
    assert x.is_neg()
    if triton_runs:
        with pytest.raises(RuntimeError, match="opposite sign"):
            function(tkernels.functional, x)
    with tkernels.backend("auto"):
        ours = function(tkernels.functional, x)
    torch.testing.assert_close(ours, function(F, x.resolve_neg()))
    assert not launches
