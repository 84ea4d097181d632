"""A small call of each operator."""

from __future__ import annotations

from collections.abc import Callable

import torch

import tkernels.functional as TF

WEIGHT = torch.zeros(16, 32)
LAYER = TF.ConvBNLayer(torch.zeros(16, 16, 3, 3), running_mean=torch.zeros(16), running_var=torch.ones(16))
MAPS, HEADS = (2, 16, 8, 8), (1, 2, 16, 16)
OPERATORS: dict[str, tuple[tuple[int, ...], Callable[[torch.Tensor], torch.Tensor]]] = {
    "linear": ((8, 32), lambda x: TF.linear(x, WEIGHT, activation="relu")),
    "matmul": ((2, 8, 32), lambda x: TF.matmul(x, WEIGHT.t())),
    "conv2d": (MAPS, lambda x: TF.conv2d(x, LAYER.weight, padding=1, activation="relu")),
    "batch_norm": (MAPS, lambda x: TF.batch_norm(x, torch.zeros(16), torch.ones(16), training=True)),
    "cross_entropy": ((8, 32), lambda x: TF.cross_entropy(x, torch.zeros(8, dtype=torch.int64))),
    "conv_stage": (MAPS, lambda x: TF.conv_stage(x, [LAYER], training=True)),
    "attention": (HEADS, lambda x: TF.scaled_dot_product_attention(x, x, x)),
}
