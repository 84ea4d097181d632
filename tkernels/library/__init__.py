"""The registered operators, torch.ops.tkernels.*: what torch.compile, torch.export, fake tensors and FlopCounterMode
see of the kernels. Eager calls go straight to the autograd functions in ops. One file an operator: its body, its
backward as an operator of its own, their fakes, autograd, FLOP formulas."""

from tkernels.library import conv_stage

__all__ = ["conv_stage"]
