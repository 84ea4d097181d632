"""What the numerics table measures: operators' inputs, well and badly conditioned, small and full size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs for one operator. ``make`` draws the float64 arguments; ``fixed`` are those that are no tensors."""

    operator: str
    conditioning: str
    make: Callable[[], dict[str, Tensor]]
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def __str__(self) -> str:
        return f"{self.operator}: {self.conditioning}"


def linear(conditioning: str, rows: int, features: int, outputs: int, shift: float = 0.0, **fixed: Any) -> Case:
    def make() -> dict[str, Tensor]:
        x = torch.randn(rows, features, dtype=torch.float64) + shift
        weight = torch.randn(outputs, features, dtype=torch.float64) / features**0.5
        return {"input": x, "weight": weight, "bias": torch.randn(outputs, dtype=torch.float64)}

    return Case("linear", conditioning, make, fixed)


def matmul(conditioning: str, a: tuple[int, ...], b: tuple[int, ...], shift: float = 0.0) -> Case:
    def make() -> dict[str, Tensor]:
        scale = a[-1] ** 0.5
        return {
            "a": torch.randn(a, dtype=torch.float64) + shift,
            "b": torch.randn(b, dtype=torch.float64) / scale,
        }

    return Case("matmul", conditioning, make)


def attention(conditioning: str, q: tuple[int, ...], keys: int, scale: float = 1.0, **fixed: Any) -> Case:
    """``scale``: of the queries; at 10 the weights of a row are nearly one key's."""

    def make() -> dict[str, Tensor]:
        other = (*q[:-2], keys, q[-1])
        shapes = {"query": q, "key": other, "value": other}
        made = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
        made["query"] *= scale
        return made

    return Case("scaled_dot_product_attention", conditioning, make, fixed)


def conv2d(conditioning: str, image: tuple[int, ...], outputs: int, kernel: int, **fixed: Any) -> Case:
    def make() -> dict[str, Tensor]:
        inputs = image[1] // fixed.get("groups", 1)
        weight = torch.randn(outputs, inputs, kernel, kernel, dtype=torch.float64) / (inputs**0.5 * kernel)
        x = torch.randn(image, dtype=torch.float64)
        return {"input": x, "weight": weight, "bias": torch.randn(outputs, dtype=torch.float64)}

    return Case("conv2d", conditioning, make, fixed)


def batch_norm(conditioning: str, shape: tuple[int, ...], mean: float = 1.0, **fixed: Any) -> Case:
    """``mean``: of every channel, whose standard deviation is 1."""

    def make() -> dict[str, Tensor]:
        channels = shape[1]
        x = torch.randn(shape, dtype=torch.float64) + mean
        vectors = torch.rand(4, channels, dtype=torch.float64) + 0.5
        statistics = {"running_mean": mean * vectors[0], "running_var": vectors[1]}
        return {"input": x, **statistics, "weight": vectors[2], "bias": vectors[3]}

    return Case("batch_norm", conditioning, make, {"training": True, **fixed})


def cross_entropy(
    conditioning: str, shape: tuple[int, ...], shift: float = 0.0, probabilities: bool = False, **fixed: Any
) -> Case:
    def make() -> dict[str, Tensor]:
        logits = 3 * torch.randn(shape, dtype=torch.float64) + shift
        if probabilities:
            target = torch.randn(shape, dtype=torch.float64).softmax(1)
        else:
            target = torch.randint(shape[1], (shape[0], *shape[2:]))
        return {"input": logits, "target": target}

    return Case("cross_entropy", conditioning, make, fixed)


SMALL = (
    linear("well", 37, 200, 24),
    linear("mean/std 100", 37, 200, 24, shift=100.0),
    linear("relu", 37, 200, 24, activation="relu"),
    linear("gelu", 37, 200, 24, activation="gelu"),
    matmul("well", (37, 200), (200, 24)),
    matmul("batches, mean/std 100", (3, 20, 72), (3, 72, 19), shift=100.0),
    matmul("vector", (1, 700), (700, 40)),
    attention("well", (1, 2, 40, 32), 70),
    attention("causal, scores of 10", (1, 2, 40, 20), 40, 10.0, is_causal=True),
    attention("many keys", (1, 1, 16, 16), 2000),
    attention("many queries", (1, 1, 2000, 16), 16),
    conv2d("3x3", (2, 20, 7, 6), 18, 3, padding=1),
    conv2d("stem 3x3", (2, 3, 9, 9), 18, 3, padding=1),
    conv2d("stride 2", (2, 20, 9, 7), 18, 3, padding=1, stride=2),
    conv2d("depthwise", (2, 20, 7, 6), 20, 3, padding=1, groups=20),
    conv2d("many channels", (1, 512, 4, 4), 32, 3, padding=1),
    conv2d("many channels out", (1, 32, 4, 4), 512, 3, padding=1),
    conv2d("many pixels", (2, 16, 64, 64), 8, 1),
    batch_norm("mean/std 1", (4, 6, 8, 7)),
    batch_norm("mean/std 1e2", (4, 6, 8, 7), 1e2),
    batch_norm("mean/std 1e4", (4, 6, 8, 7), 1e4),
    batch_norm("mean/std 1e2, relu", (4, 6, 8, 7), 1e2, activation="relu"),
    batch_norm("evaluation, mean/std 1e2", (4, 6, 8, 7), 1e2, training=False),
    batch_norm("(N, C), mean/std 1e2", (250, 12), 1e2),
    cross_entropy("well", (60, 10)),
    cross_entropy("logits + 1e3", (60, 10), 1e3),
    cross_entropy("logits + 1e3, rows", (60, 10), 1e3, reduction="none"),
    cross_entropy("smoothing 0.1", (60, 10), label_smoothing=0.1),
    cross_entropy("probabilities", (60, 10), probabilities=True),
    cross_entropy("many classes", (3, 5000)),
    cross_entropy("pixels", (3, 7, 5, 6)),
)
FULL = (
    linear("well", 128, 1024, 96),
    linear("mean/std 100", 128, 1024, 96, shift=100.0),
    linear("relu", 128, 1024, 96, activation="relu"),
    linear("gelu", 256, 512, 256, activation="gelu"),
    linear("features 1e6", 3, 1_000_000, 2),
    linear("rows 1e6", 1_000_000, 3, 2),
    matmul("well", (128, 1024), (1024, 96)),
    matmul("batches, mean/std 100", (8, 64, 200), (8, 200, 48), shift=100.0),
    matmul("vector", (1, 100_000), (100_000, 40)),
    attention("well", (4, 8, 256, 64), 256),
    attention("causal, scores of 10", (4, 8, 256, 64), 256, 10.0, is_causal=True),
    attention("many keys", (1, 2, 64, 64), 8192),
    attention("many queries", (1, 2, 8192, 64), 64),
    conv2d("3x3", (8, 64, 16, 16), 64, 3, padding=1),
    conv2d("stem 3x3", (16, 3, 32, 32), 32, 3, padding=1),
    conv2d("stride 2", (8, 32, 17, 17), 48, 3, padding=1, stride=2),
    conv2d("depthwise", (8, 48, 16, 16), 48, 3, padding=1, groups=48),
    conv2d("many channels", (2, 512, 14, 14), 512, 3, padding=1),
    conv2d("pixels 1e6", (1, 2, 1000, 1000), 2, 3, padding=1),
    batch_norm("mean/std 1", (16, 32, 16, 16)),
    batch_norm("mean/std 1e2", (16, 32, 16, 16), 1e2),
    batch_norm("mean/std 1e4", (16, 32, 16, 16), 1e4),
    batch_norm("mean/std 1e2, relu", (16, 32, 16, 16), 1e2, activation="relu"),
    batch_norm("evaluation, mean/std 1e2", (16, 32, 16, 16), 1e2, training=False),
    batch_norm("(N, C), mean/std 1e2", (512, 96), 1e2),
    batch_norm("values 1e6, mean/std 1e2", (1, 2, 1000, 1000), 1e2),
    cross_entropy("well", (256, 10)),
    cross_entropy("logits + 1e3", (256, 10), 1e3),
    cross_entropy("logits + 1e3, rows", (256, 10), 1e3, reduction="none"),
    cross_entropy("smoothing 0.1", (256, 10), label_smoothing=0.1),
    cross_entropy("probabilities", (256, 10), probabilities=True),
    cross_entropy("many classes", (8, 100_000)),
    cross_entropy("pixels", (8, 21, 32, 32)),
    # float16 cannot count to a million: torch's loss on the CPU is NaN
    dataclasses.replace(cross_entropy("rows 1e6", (1_000_000, 3)), dtypes=(torch.float32, torch.bfloat16)),
)


def cases(gate: str) -> tuple[Case, ...]:
    """What a gate measures. Under ttsem every dtype is compiled anew, so bfloat16 stands for both of 16 bits."""
    if gate != "ttsem":
        return FULL
    return tuple(dataclasses.replace(case, dtypes=(torch.float32, torch.bfloat16)) for case in SMALL)
