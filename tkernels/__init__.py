"""Fused Triton kernels for training convolutional networks, with a PyTorch body where there is no GPU."""

__version__ = "0.1.0"

import contextlib
from typing import Any

from tkernels import functional, nn
from tkernels.core.mode import backend, get_backend

# Dynamo, which fusion rests on, cannot be imported where there is no folder for temporary files: the rest works there
with contextlib.suppress(FileNotFoundError):
    from tkernels.fusion import explain, fuse, unfuse

__all__ = ["__version__", "backend", "explain", "functional", "fuse", "get_backend", "nn", "unfuse"]


def __getattr__(name: str) -> Any:
    if name in ("explain", "fuse", "unfuse"):
        from tkernels import fusion  # says what is in its way

        return getattr(fusion, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
