"""Every autograd function of the project, as a function of leaves that calls it, beside the same in torch's calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tkernels.functional as TF
from tkernels.core.activation import apply
from tkernels.core.records import BatchNorm
from tkernels.cpu import convolution, norm
from tkernels.cpu import loss as cross_entropy_cpu
from tkernels.cpu import product as cpu_linear
from tkernels.cpu import stage as conv_stage_cpu
from tkernels.ops.batch_norm import sync as sync_ops

CL = torch.channels_last


class Function(NamedTuple):
    """``kernels``, ``passes``: the autograd function that ours goes through on a GPU and on a CPU, None: torch's own
    there, "" where there is no such call; ``shapes``: of the leaves."""

    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    kernels: str
    passes: str | None

    def on(self, device: str) -> str | None:
        return self.kernels if device == "cuda" else self.passes

    def leaves(self, device: str) -> list[Tensor]:
        random = torch.Generator().manual_seed(3)
        made = [torch.randn(shape, generator=random) for shape in self.shapes]
        return [(t.contiguous(memory_format=CL) if t.dim() == 4 else t).to(device).requires_grad_() for t in made]


def _classes(x: Tensor) -> Tensor:
    return (torch.arange(len(x)) % x.shape[1]).to(x.device)


def _stage(x: Tensor, *own: Tensor) -> Tensor:
    layers = [TF.ConvBNLayer(*own[4 * i : 4 * i + 4], padding=1) for i in range(len(own) // 4)]
    return TF.conv_stage(x, layers, pool=2, training=True)


def _stage_of_torch(x: Tensor, *own: Tensor) -> Tensor:
    for i in range(len(own) // 4):
        weight, bias, scale, shift = own[4 * i : 4 * i + 4]
        x = F.relu(F.batch_norm(F.conv2d(x, weight, bias, padding=1), None, None, scale, shift, True))
    return F.max_pool2d(x, 2)


def _normed(x: Tensor, weight: Tensor, bias: Tensor, *residual: Tensor, activation: str | None) -> Tensor:
    z = F.batch_norm(x, None, None, weight, bias, True)
    return apply(z + residual[0] if residual else z, activation)


def _norm(activation: str | None) -> Callable[..., Tensor]:
    return lambda x, weight, bias, *residual: TF.batch_norm(
        x, None, None, weight, bias, True, activation=activation, residual=residual[0] if residual else None
    )


def _without_running(weight: Tensor, bias: Tensor) -> BatchNorm:
    return BatchNorm(None, None, weight, bias, True, 0.1, 1e-5)


def _pass_norm(activation: str | None) -> Callable[..., Tensor]:
    return lambda x, weight, bias, residual: norm.normalize(
        x, _without_running(weight, bias), activation, residual, recorded=True
    )


def _sync(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return sync_ops.sync_batch_norm(x, _without_running(weight, bias), "silu", None, None)


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    call = convolution.Call((1, 1), (2, 2), (1, 1), 6, torch.float32, convolution.Ways("torch", "places"))
    return convolution.conv2d(call, x, weight, bias)


_MAP, _VECTOR = (4, 6, 5, 4), (6,)
_LAYER = (_VECTOR, _VECTOR, _VECTOR)
FUNCTIONS = {
    "linear": Function(
        lambda x, w, b: TF.linear(x, w, b, "gelu"), lambda x, w, b: F.gelu(F.linear(x, w, b)),
        ((5, 8), (7, 8), (7,)), "_LinearBackward", None,
    ),
    "conv2d": Function(
        lambda x, w, b: TF.conv2d(x, w, b, padding=1, activation="relu"),
        lambda x, w, b: F.relu(F.conv2d(x, w, b, padding=1)),
        ((2, 3, 5, 4), (4, 3, 3, 3), (4,)), "_Conv2dBackward", None,
    ),
    "depthwise": Function(
        lambda x, w, b: TF.conv2d(x, w, b, padding=1, groups=6, activation="silu"),
        lambda x, w, b: F.silu(F.conv2d(x, w, b, padding=1, groups=6)),
        ((2, 6, 5, 4), (6, 1, 3, 3), (6,)), "_Conv2dBackward", None,
    ),
    "batch_norm": Function(
        _norm("relu"), lambda *t: _normed(*t, activation="relu"),
        (_MAP, _VECTOR, _VECTOR), "_BatchNormBackward", "_BatchNormBackward",
    ),
    "batch_norm, residual": Function(
        _norm("relu"), lambda *t: _normed(*t, activation="relu"),
        (_MAP, _VECTOR, _VECTOR, _MAP), "_BatchNormBackward", None,
    ),
    "batch_norm, silu, residual": Function(
        _norm("silu"), lambda *t: _normed(*t, activation="silu"),
        (_MAP, _VECTOR, _VECTOR, _MAP), "_BatchNormBackward", None,
    ),
    "sync_batch_norm": Function(
        _sync, lambda *t: _normed(*t, activation="silu"),
        (_MAP, _VECTOR, _VECTOR), "_TritonNormBackward", "SiluBackward0",
    ),
    "cross_entropy": Function(
        lambda x: TF.cross_entropy(x, _classes(x), reduction="none", label_smoothing=0.1),
        lambda x: F.cross_entropy(x, _classes(x), reduction="none", label_smoothing=0.1),
        ((9, 40),), "_CrossEntropyBackward", "_CrossEntropyCPUBackward",
    ),
    "cross_entropy, probabilities": Function(
        lambda x, p: TF.cross_entropy(x, p), lambda x, p: F.cross_entropy(x, p),
        ((9, 7), (9, 7)), "_CrossEntropyBackward", None,
    ),
    "conv_stage": Function(
        _stage, _stage_of_torch,
        ((2, 3, 6, 4), (5, 3, 3, 3), *((5,),) * 3, (4, 5, 3, 3), *((4,),) * 3),
        "_ConvStageBackward", "_ConvStageCPUBackward",
    ),
    "conv_stage, one weight": Function(
        lambda x, w, *v: _stage(x, w, *v, w, *v), lambda x, w, *v: _stage_of_torch(x, w, *v, w, *v),
        ((4, 6, 6, 4), (6, 6, 3, 3), *_LAYER), "_ConvStageBackward", "_ConvStageCPUBackward",
    ),
    "matmul": Function(
        lambda a, b: TF.matmul(a, b), torch.matmul, ((2, 5, 8), (8, 7)), "_MatmulBackward", None,
    ),
    "attention": Function(
        lambda q, k, v: TF.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        ((2, 2, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8)), "_AttentionBackward", None,
    ),
    "a linear's activation": Function(
        lambda z: cpu_linear._Activation.apply("gelu", z), F.gelu, ((5, 8),), "", "_ActivationBackward",
    ),
    "a chain's norm": Function(
        _pass_norm("relu"), lambda *t: _normed(*t, activation="relu"),
        (_MAP, _VECTOR, _VECTOR, _MAP), "", "_BatchNormBackward",
    ),
    "a chain's norm, silu": Function(
        _pass_norm("silu"), lambda *t: _normed(*t, activation="silu"),
        (_MAP, _VECTOR, _VECTOR, _MAP), "", "_BatchNormBackward",
    ),
    "a chain's norm, no activation": Function(
        _pass_norm(None), lambda *t: _normed(*t, activation=None),
        (_MAP, _VECTOR, _VECTOR, _MAP), "", "_BatchNormBackward",
    ),
    "a chain's convolution": Function(
        _depthwise, lambda x, w, b: F.conv2d(x, w, b, padding=2, groups=6),
        ((2, 6, 7, 5), (6, 1, 5, 5), _VECTOR), "", "_ConvolutionBackward",
    ),
}  # fmt: skip


@pytest.fixture(params=FUNCTIONS)
def function(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> Function:
    """One of them, with thresholds that let small calls take the compiled passes, in a job of one process."""
    found = FUNCTIONS[request.param]
    if found.on(device) == "":
        pytest.skip("a call of the CPU's")
    take_passes(monkeypatch)
    monkeypatch.setattr(sync_ops, "_gathered", lambda row, group: row[None])
    return found


def take_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small calls take the compiled passes."""
    monkeypatch.setattr(cross_entropy_cpu, "WORTH_IT", 1)
    monkeypatch.setattr(cross_entropy_cpu, "SHORT_WORTH_IT", 1)
    monkeypatch.setattr(norm, "WORTH_IT", 1)
    monkeypatch.setattr(conv_stage_cpu, "WORTH_IT", 1)


def forward(function: Function, leaves: list[Tensor]) -> Tensor:
    """Our function of the leaves, which goes through what it should."""
    y = function.ours(*leaves)
    expected = function.on(leaves[0].device.type)
    assert y.grad_fn is not None
    assert expected is None or y.grad_fn.name() == expected
    return y
