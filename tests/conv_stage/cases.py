"""Conv stages to test with: random layers, the stage in torch's own operators in float64, and a comparison with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tkernels
from tests.tolerance import assert_close
from tkernels.core import activation as activations
from tkernels.functional import ConvBNLayer, MaxPool, conv_stage

CL = torch.channels_last
FIELDS = ("weight", "bias", "bn_weight", "bn_bias", "running_mean", "running_var")

# name: input shape, each layer's (channels, window, arguments), the stage's arguments. Images are odd and channels no
# multiple of any block: every tile is partial, and pooling leaves a remainder outside every window.
CASES: dict[str, tuple[tuple[int, ...], Sequence[tuple[int, Any, dict[str, Any]]], dict[str, Any]]] = {
    "rgb, 2 layers, pool": ((2, 3, 7, 9), [(20, 3, {"padding": 1}), (17, 3, {"padding": 1})], {"pool": 2}),
    "one layer, no end": ((3, 5, 4, 5), [(6, 3, {"padding": 1})], {}),
    # a window larger than its stride and padded: pixels lie in several windows, some windows reach outside
    "stem": ((2, 3, 9, 8), [(8, 5, {"stride": 2, "padding": 2})], {"pool": MaxPool(3, 2, 1)}),
    # a stride larger than the window leaves gaps that no window covers
    "gaps": ((1, 4, 8, 9), [(5, 1, {})], {"pool": MaxPool((1, 2), (3, 4))}),
    # more than UNROLLED_TAPS pixels a window
    "wide pool": ((2, 2, 11, 12), [(3, 3, {"padding": 1})], {"pool": (5, 4)}),
    # strides give the second layer's input gradient phases of different sizes, some of them without a tap
    "strided, grouped, depthwise": (
        (2, 6, 9, 7),
        [
            (8, 3, {"padding": 1, "groups": 2}),
            (18, (2, 3), {"stride": (2, 3), "padding": (0, 1)}),
            (18, 3, {"groups": 18, "padding": "same"}),
            (5, 1, {"bias": False}),
        ],
        {},
    ),
    # the 1x1 layers but the first form their input from the raw map before; longer side first and second
    "bottleneck": (
        (2, 16, 5, 7),
        [(20, 1, {}), (24, 3, {"padding": 1}), (40, 1, {"bias": False}), (17, 1, {})],
        {"pool": 2},
    ),
    "3 layers, dropout": (
        (2, 16, 5, 4),
        [(8, 1, {}), (24, 3, {"padding": 2, "dilation": 2}), (7, 3, {"padding": 1})],
        {"dropout_p": 0.4},
    ),
    "pool and dropout": ((3, 3, 5, 6), [(9, 3, {"padding": 1})], {"pool": 2, "dropout_p": 0.5}),
}


class _Round(torch.autograd.Function):
    """Rounding to a dtype, as storing a map does: the derivative is that of the unrounded value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).double()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


def layers_for(channels: int, specs: Any, dtype: torch.dtype, device: str, grad: bool = True) -> list[ConvBNLayer]:
    """Random layers; batch norm's tensors are float32."""
    found = []
    for out, window, arguments in specs:
        arguments = dict(arguments)
        kernel = (window, window) if isinstance(window, int) else window
        group_in = channels // arguments.get("groups", 1)
        weight = torch.randn(out, group_in, *kernel) / (group_in * kernel[0] * kernel[1]) ** 0.5
        bias = torch.randn(out) if arguments.pop("bias", True) else None
        vectors = (torch.rand(out) + 0.5, torch.randn(out), torch.randn(out), torch.rand(out) + 0.5)
        tensors: list[Any] = [None if t is None else t.to(dtype).to(device) for t in (weight, bias)]
        tensors += [t.to(device) for t in vectors]
        for t in tensors[:4]:
            if t is not None:
                t.requires_grad_(grad)
        counter = torch.tensor(3, device=device)
        found.append(ConvBNLayer(*tensors, counter, **arguments))
        channels = out
    return found


def doubled(layers: Sequence[ConvBNLayer]) -> list[ConvBNLayer]:
    """The layers in float64 on the CPU, tensors of their own."""
    return [
        layer._replace(
            **{
                name: t.detach().cpu().double().clone().requires_grad_(t.requires_grad)
                for name, t in zip(FIELDS, layer)
                if isinstance(t, Tensor)
            },
            num_batches_tracked=None,
        )
        for layer in layers
    ]


def reference(
    x: Tensor,
    layers: Sequence[ConvBNLayer],
    dtype: torch.dtype,
    pool: Any = None,
    mask: Tensor | None = None,
    training: bool = True,
    residual: Tensor | None = None,
) -> Tensor:
    """The stage in float64, each stored map rounded to ``dtype``, dropout as an explicit mask of factors."""
    for i, layer in enumerate(layers):
        z = F.conv2d(x, layer.weight, layer.bias, *layer[7:11])
        z = _Round.apply(z, dtype)
        batch = layer.measures(training)
        z = F.batch_norm(
            z, layer.running_mean, layer.running_var, layer.bn_weight, layer.bn_bias, batch, 0.1, layer.eps
        )
        if residual is not None and i == len(layers) - 1:
            z = z + residual
        x = _Round.apply(activations.apply(z, layer.activation), dtype)
    if pool is not None:
        x = F.max_pool2d(x, *(pool if isinstance(pool, MaxPool) else (pool,)))
    return x if mask is None else x * mask


def factors(y: Tensor, undropped: Tensor, p: float) -> Tensor:
    """Dropout's factors, read off an output: (N, C, 1, 1). Each channel is dropped whole or kept whole."""
    y, undropped = y.detach().cpu().double(), undropped.detach().double()
    kept = y.flatten(2).abs().amax(2) > 0
    alive = undropped.flatten(2).abs().amax(2) > 0
    assert alive.any()
    return (kept & alive)[:, :, None, None].double() / (1 - p)


def compare(
    name: str,
    device: str,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    training: bool = True,
    change: Callable[[list[ConvBNLayer]], list[ConvBNLayer]] = list,
    adds: bool = False,
) -> None:
    """One case, forward and backward, against the reference. ``adds``: a residual, of the other memory format."""
    shape, specs, arguments = CASES[name]
    layers = change(layers_for(shape[1], specs, dtype, device))
    x = torch.randn(shape).to(dtype).to(device).contiguous(memory_format=memory_format).requires_grad_()
    exact_layers, exact_x = doubled(layers), x.detach().cpu().double().contiguous().requires_grad_()
    pool, p = arguments.get("pool"), arguments.get("dropout_p", 0.0)

    residual = exact_residual = None
    if adds:
        with torch.no_grad():
            like = reference(exact_x, doubled(layers_before(layers)), dtype)
        other = CL if memory_format is torch.contiguous_format else torch.contiguous_format
        residual = torch.randn(like.shape).to(dtype).to(device).contiguous(memory_format=other).requires_grad_()
        exact_residual = residual.detach().cpu().double().requires_grad_()
    y = conv_stage(x, layers, training=training, residual=residual, **arguments)
    mask = None
    if p and training:
        with torch.no_grad():
            mask = factors(y, reference(exact_x, doubled(layers_before(layers)), dtype, pool), p)
    expected = reference(exact_x, exact_layers, dtype, pool, mask, training, exact_residual)
    reduction = max(layer.weight[0].numel() for layer in layers) * shape[0] * shape[2] * shape[3]
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    assert_close(y, expected, reduction, name="y")

    dy = torch.randn(expected.shape).to(dtype)
    expected.backward(dy.double())
    y.backward(dy.to(device))
    # rounding the maps moves a gradient once a layer, there and back
    depth = 4 * len(layers)
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=memory_format)
    close(x.grad, exact_x.grad, reduction, depth, dtype, "input gradient")
    if residual is not None and exact_residual is not None:
        assert residual.grad is not None
        close(residual.grad, exact_residual.grad, reduction, depth, dtype, "residual's gradient")
    for i, (layer, exact) in enumerate(zip(layers, exact_layers)):
        measured = layer.measures(training)
        for field, t, want in zip(FIELDS, layer, exact):
            if not isinstance(t, Tensor) or not isinstance(want, Tensor):
                continue
            if not t.requires_grad:
                assert_close(t, want, reduction, dtype=dtype, name=f"{field} of layer {i}")
            elif field == "bias" and measured:
                assert_no_gradient(t, dy)
            else:
                assert t.grad is not None
                assert t.grad.dtype == t.dtype
                close(t.grad, want.grad, reduction, depth, dtype, f"gradient of {field} of layer {i}")
        assert layer.num_batches_tracked is not None
        assert layer.num_batches_tracked.item() == 3 + layer.counts(training)


def assert_no_gradient(bias: Tensor, dy: Tensor) -> None:
    """Batch statistics take a bias away again: its gradient is zero, and ours exactly (torch's is noise)."""
    assert bias.grad is not None
    noise = 0.0 if tkernels.get_backend() == "triton" else 1e-2 * dy.abs().sum().item()
    assert bias.grad.abs().max().item() <= noise


def layers_before(layers: Sequence[ConvBNLayer]) -> list[ConvBNLayer]:
    """The layers without running statistics, so that looking at them moves none."""
    return [layer._replace(running_mean=None, running_var=None) for layer in layers]


def close(a: Tensor, want: Tensor | None, reduction: int, depth: int, dtype: torch.dtype, name: str) -> None:
    assert want is not None
    magnitude = want.abs().max().item() * depth
    assert_close(a, want, reduction * depth, dtype=dtype, scale=magnitude, name=name)


def activated(*names: str | None) -> Callable[[list[ConvBNLayer]], list[ConvBNLayer]]:
    """The layers with these activations, the last one for all that follow."""
    return lambda layers: [
        layer._replace(activation=names[min(i, len(names) - 1)]) for i, layer in enumerate(layers)
    ]  # fmt: skip
