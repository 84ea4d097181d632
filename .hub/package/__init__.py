"""Fused Triton kernels for training convolutional networks, with a PyTorch body where there is no GPU."""

import importlib
from typing import Any

from tkernels import _ops as _ops
from tkernels import functional, layers, nn
from tkernels.core.mode import backend, get_backend
from tkernels.functional import (
    batch_norm,
    conv2d,
    conv_stage,
    cross_entropy,
    linear,
    linear_relu,
    matmul,
    scaled_dot_product_attention,
)

__all__ = [
    "backend", "batch_norm", "conv2d", "conv_stage", "cross_entropy", "explain", "functional", "fuse", "get_backend",
    "layers", "linear", "linear_relu", "matmul", "nn", "scaled_dot_product_attention", "unfuse",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("explain", "fuse", "unfuse"):  # they import Dynamo
        return getattr(importlib.import_module(f"{__name__}.fusion"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
