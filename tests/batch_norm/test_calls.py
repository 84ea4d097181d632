"""batch_norm's bad calls against torch's exceptions, and the modules against their torch.nn twins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tkernels
from tkernels.functional import batch_norm

F32, F64 = torch.float32, torch.float64


def bad_calls() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    x, ones, zeros = torch.randn(4, 3, 2), torch.ones(3), torch.zeros(3)
    return {
        "rank 0": ((torch.tensor(1.0), zeros, ones), {}),
        "rank 0 in training": ((torch.tensor(1.0), None, None), {"training": True}),
        "rank 1": ((torch.randn(3), zeros, ones), {}),
        "rank 1 without statistics": ((torch.randn(3), None, None), {"training": True}),
        "rank 1 with a weight": ((torch.randn(3), None, None, ones), {"training": True}),
        "rank 1, one value": ((torch.randn(1), zeros, ones), {"training": True}),
        "one value per channel": ((torch.randn(1, 3, 1), zeros, ones), {"training": True}),
        "no statistics": ((x, None, None), {}),
        "mean alone": ((x, zeros, None), {}),
        "variance alone": ((x, None, ones), {}),
        "mean alone in training": ((x, zeros, None), {"training": True}),
        "variance alone in training": ((x, None, ones), {"training": True}),
        "short mean": ((x, zeros[:2], ones), {}),
        "long variance": ((x, zeros, torch.ones(4)), {}),
        "weight of other length": ((x, zeros, ones, torch.ones(4)), {}),
        "bias of other length": ((x, zeros, ones, None, torch.ones(2)), {"training": True}),
        "two-dimensional mean": ((x, zeros[None], ones), {}),
        "integers": ((x.long(), zeros, ones), {}),
        "integer weight": ((x, zeros, ones, ones.long()), {}),
        "integer statistics": ((x, zeros.long(), ones.long()), {"training": True}),
        "complex": ((x.to(torch.complex64), zeros, ones), {}),
        "double statistics": ((x, zeros.double(), ones.double()), {}),
        "half parameters, float input": ((x, zeros, ones, ones.half()), {}),
        "half and float parameters": ((x.half(), zeros, ones, ones.half()), {}),
        "mixed statistics": ((x.bfloat16(), zeros.bfloat16(), ones), {"training": True}),
        "float parameters, double input": ((x.double(), None, None, ones), {"training": True}),
        "eps of text": ((x, zeros, ones), {"eps": "1"}),
        "weight and bias of other length": ((x, zeros, ones, torch.ones(4), torch.ones(4)), {}),
        "half vectors, float input": ((x, *(t.half() for t in (zeros, ones, ones, zeros))), {}),
        "integers, float vectors": ((x.long(), zeros, ones, ones, zeros), {}),
        "integers everywhere": (tuple(t.long() for t in (x, zeros, ones, ones, zeros)), {}),
        "momentum of text": ((x, zeros, ones), {"momentum": "0.1"}),
        "momentum None": ((x, zeros, ones), {"momentum": None}),
        "mean with a gradient": ((x, zeros.clone().requires_grad_(), ones), {"training": True}),
        "a list for the weight": ((x, zeros, ones, [1.0, 1.0, 1.0]), {}),
        "a list for the mean": ((x, [0.0] * 3, ones), {}),
        "a list for the input": (([[1.0]], zeros, ones), {}),
        "weight on another device": ((x, zeros, ones, torch.ones(3, device="meta")), {}),
    }


@pytest.mark.gate("torch")
@pytest.mark.parametrize("name", bad_calls())
def test_bad_calls_raise_what_torch_raises(name: str) -> None:
    arguments, options = bad_calls()[name]
    with pytest.raises(Exception) as theirs:
        torch.nn.functional.batch_norm(*arguments, **options)
    with pytest.raises(Exception) as ours:
        batch_norm(*arguments, **options)
    assert type(ours.value) is type(theirs.value), f"torch: {theirs.value!r}, ours: {ours.value!r}"
    assert str(ours.value)


@pytest.mark.gate("torch", "ttsem")
def test_bad_extras(device: str) -> None:
    x, mean, var = torch.randn(4, 3).to(device), torch.zeros(3).to(device), torch.ones(3).to(device)
    with pytest.raises(ValueError, match="activation"):
        batch_norm(x, mean, var, activation="tanh")
    # torch 2.9 accepts these two, 2.14 does not
    with pytest.raises(ValueError, match="eps"):
        batch_norm(x, mean, var, eps=-1.0)
    with pytest.raises(ValueError, match="eps"):
        batch_norm(x, mean, var, training=True, eps=0.0)
    with pytest.raises(TypeError, match="residual"):
        batch_norm(x, mean, var, residual=1.0)
    with pytest.raises(RuntimeError, match=r"residual .*\[4, 3\].*\[4, 1\]"):
        batch_norm(x, mean, var, residual=x[:, :1])
    with pytest.raises(ValueError, match="activation"):
        tkernels.nn.BatchNorm1d(3, activation="tanh")


MODULES = [
    (torch.nn.BatchNorm1d, tkernels.nn.BatchNorm1d, (6, 4)),
    (torch.nn.BatchNorm1d, tkernels.nn.BatchNorm1d, (3, 4, 5)),
    (torch.nn.BatchNorm2d, tkernels.nn.BatchNorm2d, (3, 4, 3, 2)),
    (torch.nn.BatchNorm3d, tkernels.nn.BatchNorm3d, (3, 4, 2, 1, 2)),
]


@pytest.mark.gate("torch")
@pytest.mark.parametrize("theirs_type, ours_type, shape", MODULES)
@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None, "eps": 1e-2}, {"dtype": F64}],
    ids=str,
)
def test_modules_are_their_twins(theirs_type: Any, ours_type: Any, shape: tuple[int, ...], options: Any) -> None:
    theirs, ours = theirs_type(4, **options), ours_type(4, **options)
    assert isinstance(ours, theirs_type)
    assert repr(ours) == repr(theirs)
    for step in range(3):
        x = torch.randn(shape, dtype=options.get("dtype", F32)) + step
        assert torch.equal(ours(x), theirs(x))
    for a, b in ((ours, theirs), (theirs, ours)):
        b.load_state_dict(a.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    # statistics switched off after the fact: the batch's own in training, the old ones in evaluation
    theirs.track_running_stats = ours.track_running_stats = False
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.train()(x), theirs.train()(x))
    with pytest.raises(ValueError, match="expected"):
        ours(torch.randn(4))


@pytest.mark.gate("torch", "ttsem", "cuda")
def test_module_adds_residual_then_activation(device: str) -> None:
    module = tkernels.nn.BatchNorm2d(5, activation="relu").to(device)
    x, residual = torch.randn(2, 5, 4, 3).to(device), torch.randn(2, 5, 4, 3).to(device)
    want = torch.relu(torch.nn.functional.batch_norm(x.cpu(), None, None, training=True) + residual.cpu())
    torch.testing.assert_close(module(x, residual).detach().cpu(), want)
    assert "activation='relu'" in repr(module)


@pytest.mark.gate("torch")
@pytest.mark.parametrize("training", [True, False])
def test_a_residual_of_another_layout_beside_a_subclass(training: bool) -> None:
    """A sum in place of what is a view of a plain tensor would lay the residual's gradient out as the residual."""
    torch.manual_seed(0)
    x = torch.randn(8, 4, 5, 6).to(memory_format=torch.channels_last)
    residual = torch.randn(8, 4, 5, 6, requires_grad=True)
    bias = torch.randn(4).as_subclass(type("Mine", (Tensor,), {}))
    dy = torch.randn(8, 4, 5, 6)
    given = torch.zeros(4), torch.ones(4), None, bias, training
    (mine,) = torch.autograd.grad(batch_norm(x, *given, activation="relu", residual=residual), residual, dy)
    theirs = torch.relu(torch.nn.functional.batch_norm(x, *given) + residual)
    (exact,) = torch.autograd.grad(theirs, residual, dy)
    assert mine.stride() == exact.stride()
    torch.testing.assert_close(mine.as_subclass(Tensor), exact.as_subclass(Tensor))
