"""Which calls of batch norm with ReLU go through tkernels.cpu.norm's passes, and how.

``ops.batch_norm`` takes this in training where maps are large and pixels stand together ((N, C) or channels_last).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from tkernels.core.records import BatchNorm
from tkernels.cpu import compiler, norm

PLAIN = (Tensor, torch.nn.Parameter)
DTYPES = (torch.float32, torch.bfloat16)
# Bytes of the input from which on the passes pay for the calls around them. (Measured: 0.7 of torch's speed at 1 MB,
# 0.9 to 1.2 times it at 2 MB, 1.2 to 5 times from 4 MB on.)
WORTH_IT = 1 << 22


def takes(x: Tensor, bn: BatchNorm) -> bool:
    """Whether this call (in training, with ReLU) goes the fast way; one that torch refuses does not. Nothing depends on
    what ran before."""
    # a trace must not learn of sizes: Dynamo is gone after the first line, fake tensors after the second
    return (
        not is_dynamo_compiling()
        and type(x) in PLAIN
        and x.nbytes >= WORTH_IT
        and x.dtype in DTYPES
        and x.device.type == "cpu"
        and not x.is_cuda
        and x.layout is torch.strided
        and (x.is_contiguous() if x.dim() == 2 else x.dim() == 4 and _channels_last(x))
        and x.numel() > x.shape[1]  # torch refuses one value a channel
        and not (x.is_neg() or x.is_inference())
        and all(t is None or _vector_as_expected(t, x.shape[1]) for t in bn.vectors)
        and (bn.running_mean is None) == (bn.running_var is None)
        and not any(t is not None and t.requires_grad for t in (bn.running_mean, bn.running_var))
        and (type(bn.momentum) is float or (bn.momentum is None and bn.num_batches_tracked is not None))
        and type(bn.eps) is float
        and bn.eps > 0.0
        and compiler.enabled()
        and compiler.plain_eager()
    )


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _vector_as_expected(t: Tensor, channels: int) -> bool:
    return (
        type(t) in PLAIN
        and t.dtype is torch.float32
        and t.device.type == "cpu"
        and t.shape == (channels,)
        and t.is_contiguous()
        and not t.is_neg()
    )


def batch_norm_relu(x: Tensor, bn: BatchNorm) -> Tensor:
    """relu(batch norm of ``x``) by the batch's statistics, of a call that ``takes`` agreed to.

    Moves running statistics and counter.
    """
    counter = bn.num_batches_tracked
    if counter is not None:
        counter.add_(1)
        if bn.momentum is None:
            bn = bn._replace(momentum=1.0 / float(counter))
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bn.weight, bn.bias))
    run = norm.batch_norm if recorded else norm.batch_norm_alone
    return run(x, bn, "relu", None)
