"""Fused Triton kernels for training convolutional networks, with a PyTorch body where there is no GPU."""

__version__ = "0.1.0"

from tkernels import functional, library, nn
from tkernels.fusion import fuse, fusion_report, unfuse
from tkernels.runtime import backend, get_backend

__all__ = ["__version__", "backend", "functional", "fuse", "fusion_report", "get_backend", "library", "nn", "unfuse"]
