"""The public functions, with names and arguments as in torch.nn.functional."""

from tkernels.ops.attention.op import scaled_dot_product_attention
from tkernels.ops.batch_norm.op import batch_norm
from tkernels.ops.conv.op import conv2d
from tkernels.ops.conv_stage.op import ConvBNLayer, MaxPool, conv_stage
from tkernels.ops.cross_entropy.op import cross_entropy
from tkernels.ops.linear.op import linear, linear_relu
from tkernels.ops.matmul.op import matmul

__all__ = [
    "ConvBNLayer",
    "MaxPool",
    "batch_norm",
    "conv2d",
    "conv_stage",
    "cross_entropy",
    "linear",
    "linear_relu",
    "matmul",
    "scaled_dot_product_attention",
]
