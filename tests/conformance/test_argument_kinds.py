"""Arguments in every form torch takes: NumPy's numbers, tensors as numbers, lists for pairs, torch's old names.

torch itself says what comes out, so a form it refuses fails here; forms both refuse are in bad_calls.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tkernels
from tests.conformance.bad_calls import LONG, Maker
from tests.tolerance import assert_close

pytestmark = pytest.mark.gate("torch", "ttsem", "cuda")

# a call, given torch's namespace or ours, and a maker of tensors
CALLS: dict[str, Callable[[Any, Maker], Tensor]] = {
    "conv2d: stride of NumPy": lambda f, t: f.conv2d(t(1, 3, 5, 6), t(2, 3, 3, 3), stride=np.int64(2)),
    "conv2d: stride a tensor": lambda f, t: f.conv2d(t(1, 3, 5, 6), t(2, 3, 3, 3), stride=torch.tensor(2)),
    "conv2d: pairs of mixed kinds": lambda f, t: f.conv2d(
        t(1, 3, 5, 6), t(2, 3, 3, 3), None, [torch.tensor(2), 1], (1, np.int32(2)), torch.Size([1, 2])
    ),
    "conv2d: lists of one": lambda f, t: f.conv2d(t(1, 4, 5, 6), t(4, 1, 3, 3), None, [2], [1], [1], np.int64(4)),
    "conv2d: parameters": lambda f, t: f.conv2d(
        nn.Parameter(t(1, 3, 5, 6)), nn.Parameter(t(2, 3, 3, 3)), nn.Parameter(t(2))
    ),
    "batch_norm: momentum a tensor": lambda f, t: moved(f, t, momentum=torch.tensor(0.3)),
    "batch_norm: momentum of NumPy": lambda f, t: moved(f, t, momentum=np.float32(0.25)),
    "batch_norm: momentum 1": lambda f, t: moved(f, t, momentum=1),
    "batch_norm: momentum True": lambda f, t: moved(f, t, momentum=True),
    "batch_norm: momentum below 0": lambda f, t: moved(f, t, momentum=-0.5),
    "batch_norm: eps a tensor": lambda f, t: moved(f, t, eps=torch.tensor(0.25)),
    "batch_norm: eps of NumPy": lambda f, t: moved(f, t, eps=np.float32(0.25)),
    "batch_norm: eps 1": lambda f, t: moved(f, t, eps=1),
    "batch_norm: eps 0 in evaluation": lambda f, t: f.batch_norm(t(4, 3), t(3), t(3, value=9.0), eps=0),
    # torch looks at statistics and dtypes only where there is a value to normalise
    "batch_norm: empty without statistics": lambda f, t: f.batch_norm(t(0, 3, 2), None, None),
    "batch_norm: empty, a mean alone": lambda f, t: f.batch_norm(t(0, 3, 2), t(3), None, training=True),
    "batch_norm: empty integers": lambda f, t: f.batch_norm(t(0, 3, 2, dtype=LONG), t(3), t(3)),
    "cross_entropy: ignore_index of NumPy": lambda f, t: loss(f, t, ignore_index=np.int64(1)),
    "cross_entropy: ignore_index a tensor": lambda f, t: loss(f, t, ignore_index=torch.tensor(1)),
    "cross_entropy: smoothing of NumPy": lambda f, t: loss(f, t, label_smoothing=np.float32(0.25)),
    "cross_entropy: smoothing a tensor": lambda f, t: loss(f, t, label_smoothing=torch.tensor(0.25)),
    "cross_entropy: smoothing True": lambda f, t: loss(f, t, label_smoothing=True),
    "cross_entropy: uint8 target": lambda f, t: f.cross_entropy(t(4, 5), t(4, dtype=torch.uint8)),
    "cross_entropy: size_average": lambda f, t: loss(f, t, size_average=False),
    "cross_entropy: reduce": lambda f, t: loss(f, t, reduce=False),
    "cross_entropy: reduce over reduction": lambda f, t: loss(f, t, size_average=True, reduce=True, reduction="sum"),
    "cross_entropy: elementwise_mean": lambda f, t: loss(f, t, reduction="elementwise_mean"),
}


def moved(f: Any, t: Maker, **arguments: Any) -> Tensor:
    """The output beside the running statistics it moved, (6, 3)."""
    mean, var = t(3), t(3, value=3.0)
    y = f.batch_norm(t(4, 3), mean, var, training=True, **arguments)
    return torch.cat((y, mean[None], var[None]))


def loss(f: Any, t: Maker, **arguments: Any) -> Tensor:
    return f.cross_entropy(t(4, 5), t(4, dtype=LONG), **arguments)


# What torch 2.14 takes and 2.11 refuses for no reason; we take it beside either, so it is compared with a call that
# means the same to float32 where torch refuses it.
LATER = {
    "batch_norm: eps 0 in evaluation": (ValueError, lambda t: F.batch_norm(t(4, 3), t(3), t(3, value=9.0), eps=1e-30)),
}


def expected(name: str, device: str) -> Tensor:
    """What torch gives, the one at hand or a later one."""
    error, same = LATER.get(name, ((), None))
    try:
        return CALLS[name](F, Maker(device)).detach()
    except error:
        return same(Maker(device)).detach()


@pytest.mark.filterwarnings("ignore:.*(size_average|elementwise_mean)")
@pytest.mark.parametrize("name", CALLS)
def test_accepted_as_torch_accepts_it(name: str, device: str, triton_runs: bool, launches: list[str]) -> None:
    theirs = expected(name, device)
    ours = CALLS[name](tkernels.functional, Maker(device)).detach()
    assert ours.dtype == theirs.dtype
    if theirs.numel():
        assert_close(ours, theirs, 100)
    else:
        assert ours.shape == theirs.shape
    assert bool(launches) == (triton_runs and theirs.numel() > 0)


@pytest.mark.gate("torch")
@pytest.mark.parametrize("name, sizes, shape", (("Linear", (3, 2), (4, 3)), ("Conv2d", (3, 2, 1), (1, 3, 4, 4)),
                                                ("BatchNorm2d", (3,), (2, 3, 4, 4))))  # fmt: skip
def test_a_module_of_torch_turned_into_ours(name: str, sizes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """``module.__class__ = ...``, or an unpickled one without our attributes, acts as it did."""
    module, x = getattr(nn, name)(*sizes), torch.randn(shape)
    expected = module(x)
    module.__class__ = getattr(tkernels.nn, name)
    assert_close(module(x), expected.double(), 10)
    assert "activation" not in repr(module)
