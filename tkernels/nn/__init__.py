"""Modules shaped like their torch.nn twins. Parameters, buffers and one call into an operator."""

from tkernels.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from tkernels.nn.conv import Conv2d
from tkernels.nn.conv_stage import ConvBNReLU2d, ConvStage
from tkernels.nn.cross_entropy import CrossEntropyLoss
from tkernels.nn.linear import Linear, LinearReLU
from tkernels.nn.multihead_attention import MultiheadAttention
from tkernels.nn.sync_batch_norm import SyncBatchNorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv2d",
    "ConvBNReLU2d",
    "ConvStage",
    "CrossEntropyLoss",
    "Linear",
    "LinearReLU",
    "MultiheadAttention",
    "SyncBatchNorm",
]
