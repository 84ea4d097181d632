"""tkernels.fuse and the torch.compile backend: chains of layers in a user's model become calls of fused operators."""

from tkernels.fusion.backend import tkernels
from tkernels.fusion.in_place import explain, fuse, unfuse
from tkernels.fusion.report import FusionReport

__all__ = ["FusionReport", "explain", "fuse", "tkernels", "unfuse"]
