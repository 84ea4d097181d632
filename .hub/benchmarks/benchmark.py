"""Fused functions beside PyTorch's, eager: forward, and forward with backward.

    kernels benchmark FOLDER         (the folder that holds build/ and benchmarks/)

The command compares a forward's result, and of a backward the first gradient, to 1e-2: so values are drawn small. It
calls for the device of this PyTorch; on a CPU the batches are small, and say that it works, not how fast it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark
from torch import Tensor


class Operator:
    """What is the same for all: ``ours`` and ``theirs`` make one result, ``leaves`` are what wants gradients."""

    seed = 0
    kernel: Any
    device: str
    leaves: tuple[Tensor, ...]
    gradient: Tensor | None = None  # of the result; None: it is a scalar

    def ours(self) -> Tensor:
        raise NotImplementedError

    def theirs(self) -> Tensor:
        raise NotImplementedError

    def benchmark_forward(self) -> None:
        with torch.no_grad():
            self.out = self.ours()

    def verify_forward(self) -> Tensor:
        with torch.no_grad():
            return self.theirs()

    def benchmark_training(self) -> None:
        self.out = torch.autograd.grad(self.ours(), self.leaves, self.gradient)[0]

    def verify_training(self) -> Tensor:
        return torch.autograd.grad(self.theirs(), self.leaves, self.gradient)[0]

    def batch(self, of_a_gpu: int) -> int:
        return of_a_gpu if self.device != "cpu" else 4

    def leaf(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or (torch.float32 if self.device == "cpu" else torch.bfloat16)
        t = (scale * torch.randn(shape, device=self.device)).to(dtype)
        return (t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t).requires_grad_()

    def norm(self, channels: int) -> tuple[Tensor, Tensor]:
        """A batch norm's weight and bias, which are float32 beside maps of any dtype."""
        scale, shift = (torch.full((channels,), value, device=self.device) for value in (0.1, 0.05))
        return scale.requires_grad_(), shift.requires_grad_()


class LinearReLU(Operator, Benchmark):
    """relu(x @ weight.T + bias): the activation in the product's kernel, its gradient in backward's."""

    def setup(self) -> None:
        rows, width = self.batch(4096), 1024
        x, bias = self.leaf(rows, width), self.leaf(width, scale=0.1)
        weight = self.leaf(width, width, scale=0.2 / width**0.5)
        self.arguments, self.leaves = (x, weight, bias), (weight, bias, x)
        self.gradient = self.leaf(rows, width, scale=0.2 / rows**0.5).detach()

    def ours(self) -> Tensor:
        return self.kernel.linear(*self.arguments, "relu")

    def theirs(self) -> Tensor:
        return F.linear(*self.arguments).relu_()


class ConvStage(Operator, Benchmark):
    """2 x (3x3 convolution -> batch norm -> ReLU), then max pooling, channels_last: one call."""

    def setup(self) -> None:
        batch, channels, size = self.batch(256), 64, 32
        self.x = self.leaf(batch, channels, size, size)
        self.weights = [self.leaf(channels, channels, 3, 3, scale=(9 * channels) ** -0.5) for _ in range(2)]
        self.scale, self.shift = self.norm(channels)
        self.leaves = (*self.weights, self.scale, self.shift, self.x)
        half = size // 2
        self.gradient = self.leaf(batch, channels, half, half, scale=0.05 / half / batch**0.5).detach()

    def ours(self) -> Tensor:
        layer = self.kernel.functional.ConvBNLayer
        layers = [layer(w, None, self.scale, self.shift, padding=1) for w in self.weights]
        return self.kernel.conv_stage(self.x, layers, pool=2, training=True)

    def theirs(self) -> Tensor:
        y = self.x
        for weight in self.weights:
            y = F.conv2d(y, weight, padding=1)
            y = F.batch_norm(y, None, None, self.scale, self.shift, training=True).relu_()
        return F.max_pool2d(y, 2)


class BatchNormReLU(Operator, Benchmark):
    """relu(batch norm of x + residual) in training, channels_last: x is read twice, and the result written once."""

    def setup(self) -> None:
        batch, channels, size = self.batch(256), 256, 14
        self.x, self.residual = (self.leaf(batch, channels, size, size, scale=scale) for scale in (1.0, 0.1))
        self.scale, self.shift = self.norm(channels)
        self.leaves = (self.scale, self.shift, self.x, self.residual)
        self.gradient = self.leaf(batch, channels, size, size, scale=0.05 / size / batch**0.5).detach()

    def ours(self) -> Tensor:
        return self.kernel.batch_norm(
            self.x, None, None, self.scale, self.shift, training=True, activation="relu", residual=self.residual
        )

    def theirs(self) -> Tensor:
        y = F.batch_norm(self.x, None, None, self.scale, self.shift, training=True)
        return (y + self.residual).relu_()


class CrossEntropy(Operator, Benchmark):
    """Of 32,768 classes, with label smoothing; the sum, whose gradients are of the size of 1."""

    def setup(self) -> None:
        rows, classes = self.batch(4096), 32768
        self.logits = self.leaf(rows, classes, dtype=torch.float32)
        self.target = torch.randint(classes, (rows,), device=self.device)
        self.leaves = (self.logits,)

    def ours(self) -> Tensor:
        return self.kernel.cross_entropy(self.logits, self.target, reduction="sum", label_smoothing=0.1)

    def theirs(self) -> Tensor:
        return F.cross_entropy(self.logits, self.target, reduction="sum", label_smoothing=0.1)
