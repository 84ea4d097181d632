"""Floor 3: tkernels.fuse, which finds chains of layers in a user's model and calls the fused operators for them."""

from tkernels.fusion.rewrite import FusionReport, fuse, fusion_report, unfuse

__all__ = ["FusionReport", "fuse", "fusion_report", "unfuse"]
