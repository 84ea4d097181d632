"""Products by descriptors (TKERNELS_TMA=1): linear's forward, matmul and convolutions, at batch 256."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from perf.static.aot import Case
from perf.static.cases import empty, image, label, window
from perf.static.cases import matmul as products
from tkernels.core import activation as activations
from tkernels.core import descriptors, targets
from tkernels.ops.conv import kernels as conv
from tkernels.ops.linear import kernels as linear

BF16 = torch.bfloat16
# channels in and out, image size
CONVOLUTIONS = ((64, 64, 56), (128, 128, 28), (256, 256, 14), (512, 512, 7), (24, 40, 28))
TRANSPOSED = ("", "a", "b", "ab")


@contextlib.contextmanager
def taken() -> Iterator[None]:
    """Within the block descriptors are taken where they can be."""
    with mock.patch.object(descriptors, "enabled", True):
        yield


def _product(transposed: str) -> None:
    products.product((4096, 4096), (4096, 4096), transposed, BF16)


def _linear(activation: str | None) -> None:
    linear.launch_forward(
        empty(4096, 4096, dtype=BF16), empty(4096, 4096, dtype=BF16), empty(4096, dtype=BF16), activation
    )


def _convolution(c_in: int, c_out: int, size: int, activation: str | None) -> None:
    g = window(c_in, c_out, size)
    bias = None if activation is None else empty(c_out, dtype=BF16)
    conv.launch_forward(image(c_in, size, BF16), empty(c_out, g.row_pitch, dtype=BF16), bias, g, activation)


def _case(name: str, run: Callable[..., None], *args: object) -> Case:
    def made() -> None:
        with taken():
            run(*args)

    return Case(f"{name} by descriptors", made, True, _older)


def _older() -> str | None:
    with taken():
        return None if descriptors.on(targets.current()) else "its GPUs take no descriptors"


def cases() -> list[Case]:
    found = [_case(f"matmul {which or 'as they lie'}", _product, which) for which in TRANSPOSED]
    found += [_case(f"linear {name or 'plain'}", _linear, name) for name in activations.ACTIVATIONS]
    for layer in CONVOLUTIONS:
        for name in (None, "relu", "gelu"):
            found.append(_case(f"conv {label(window(*layer), 'bf16')} {name or 'plain'}", _convolution, *layer, name))
    return found
