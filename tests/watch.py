"""Watch what torch really dispatches, so that a fallback to PyTorch's own operators cannot hide."""

from __future__ import annotations

import collections
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# PyTorch's operators for the things tkernels computes itself, by the first words of their ATen names
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "einsum", "mkldnn_linear", "addmv", "mv", "dot")
CONVOLUTIONS = ("convolution", "conv2d", "cudnn_convolution", "mkldnn_convolution", "thnn_conv2d", "im2col", "col2im")
NORMS = (
    "batch_norm",
    "native_batch_norm",
    "cudnn_batch_norm",
    "_native_batch_norm",
    "_batch_norm",
    "miopen_batch_norm",
)
LOSSES = ("nll_loss", "_log_softmax", "log_softmax", "_softmax", "softmax", "cross_entropy_loss", "logsumexp")
REPLACED = PRODUCTS + CONVOLUTIONS + NORMS + LOSSES


class AtenWatch(TorchDispatchMode):
    """Counts the ATen operators dispatched inside the block, forward and backward, by name without overload."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def replaced(self) -> dict[str, int]:
        """Calls of operators that tkernels computes itself."""
        return {
            name: count
            for name, count in self.calls.items()
            if name in REPLACED or any(name.startswith(prefix + "_") for prefix in CONVOLUTIONS + NORMS + LOSSES)
        }
