"""Fused Triton kernels for training convolutional networks, with a PyTorch body where there is no GPU."""

__version__ = "0.1.0"

from tkernels import functional, library, nn
from tkernels.fusion import explain, fuse, unfuse
from tkernels.runtime import backend, get_backend

__all__ = ["__version__", "backend", "explain", "functional", "fuse", "get_backend", "library", "nn", "unfuse"]
