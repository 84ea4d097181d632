"""A conv stage to test with on a CPU, and fixtures that send it the fast way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conv_stage import cases as general
from tkernels.cpu import buffers, compiler
from tkernels.cpu import stage as fast

CL = torch.channels_last
PADDED = {"padding": 1}
# of the fast way's kind, as tests/conv_stage/test_values.py has them
CASES: dict[str, Any] = {
    "rgb, 2 layers, pool": ((2, 3, 8, 6), [(20, 3, PADDED), (17, 3, PADDED)], {"pool": 2}),
    "no end": ((3, 5, 4, 5), [(6, 3, PADDED)], {}),
    "dropout alone": ((40, 4, 5, 5), [(6, 3, PADDED)], {"dropout_p": 0.4}),
    "strided, grouped, depthwise": (
        (2, 6, 9, 7),
        [(8, 3, {"padding": 1, "groups": 2}), (18, (2, 3), {"stride": (2, 3), "padding": (0, 1)}),
         (18, 3, {"groups": 18, "padding": 1}), (5, 1, {"bias": False})],
        {},
    ),
    "dilation, padding past the window": (
        (2, 7, 5, 4), [(8, 1, {"padding": 2}), (24, 3, {"padding": 2, "dilation": 2}), (7, 3, PADDED)],
        {"dropout_p": 0.4},
    ),
    "one image, one channel": ((1, 1, 6, 6), [(1, 3, PADDED)], {"pool": 2}),
    "large images": ((2, 3, 48, 46), [(4, 3, PADDED)], {"pool": 2, "dropout_p": 0.5}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fast way for maps of any size; buffers of any size come from the pool."""
    monkeypatch.setattr(fast, "WORTH_IT", 0)
    monkeypatch.setattr(buffers, "SMALLEST", 0)
    monkeypatch.setattr(general, "CASES", {**general.CASES, **CASES})
    yield
    assert compiler.enabled(), "a pass did not compile"


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ran of the fast way since the test began."""
    found: list[str] = []
    for name in ("train", "evaluate"):
        monkeypatch.setattr(fast, name, _noting(found, name, getattr(fast, name)))
    return found


def _noting(found: list[str], name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def noted(*args: Any) -> Tensor:
        found.append(name)
        return function(*args)

    return noted


def stage(
    channels: int = 8, size: int = 8, batch: int = 6, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Any, dict[str, Any]]:
    """(input, two layers, arguments) of a stage with everything."""
    layers = general.layers_for(3, [(channels, 3, PADDED), (channels, 3, PADDED)], torch.float32, "cpu")
    x = torch.randn(batch, 3, size, size).to(dtype).contiguous(memory_format=CL)
    return x.requires_grad_(), layers, {"pool": 2, "dropout_p": 0.25, "training": True}


def leaves(x: Tensor, layers: Any) -> list[Tensor]:
    return [x, *(t for layer in layers for t in layer[:4])]
