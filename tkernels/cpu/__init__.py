"""Everything that only CPUs need: passes over activations compiled by Inductor, oneDNN by name, buffers used again.

One entry an operator, each of which gives its result or None: then PyTorch does it. Nothing else in tkernels depends on
this folder; without it (:data:`tkernels.ops.cpu` is None) every call on a CPU is PyTorch's.
"""

from tkernels.cpu.cache import chosen as cache_folder
from tkernels.cpu.chain import Chain, Conv, Norm
from tkernels.cpu.chain import plan as plan_chain
from tkernels.cpu.describe import describe
from tkernels.cpu.loss import cross_entropy
from tkernels.cpu.norm import batch_norm
from tkernels.cpu.product import linear
from tkernels.cpu.product import plan as plan_linear
from tkernels.cpu.stage import conv_stage

__all__ = [
    "Chain", "Conv", "Norm", "batch_norm", "cache_folder", "conv_stage", "cross_entropy", "describe", "linear",
    "plan_chain", "plan_linear",
]  # fmt: skip
