"""Floor 3: modules shaped like their torch.nn twins. Parameters, buffers and one call into an operator."""

from tkernels.nn.conv import Conv2d

__all__ = ["Conv2d"]
