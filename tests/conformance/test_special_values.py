"""NaN and Inf are where torch has them, forward and backward, in every operator on both bodies.

A rule of thumb for whoever reads a failure: an operator must neither lose a NaN (a diverged network would look
healthy) nor make one (0 times Inf where there is nothing to multiply). Sizes on the PyTorch body are those that its
compiled passes take; under the executor every axis is a partial tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tkernels.functional as ours
from tests.conftest import GATE
from tkernels.core import activation as activations
from tkernels.functional import ConvBNLayer, conv_stage

pytestmark = pytest.mark.gate("torch", "ttsem", "cuda")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CL = torch.channels_last
INF, NAN = math.inf, math.nan
LARGE = GATE == "torch"
NONE_TO_ALL = activations.ACTIVATIONS


class _Elementwise(torch.autograd.Function):
    """torch's activation of one element at a time: its vectors on a CPU make NaN of GELU(inf) and, in backward, other
    things of NaN than its scalars and its CUDA kernels do."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, activation: str) -> Tensor:
        with torch.enable_grad():
            leaves = [e.detach().reshape(1).requires_grad_() for e in z.flatten()]
            results = [activations.apply(e, activation) for e in leaves]
        ctx.elements, ctx.shape = (leaves, results), z.shape
        return torch.cat([e.detach() for e in results]).view(z.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        leaves, results = ctx.elements
        found = torch.autograd.grad(results, leaves, [e.reshape(1) for e in dy.flatten()])
        return torch.cat(found).view(ctx.shape), None


def activated(z: Tensor, activation: str | None) -> Tensor:
    if activation in (None, "relu") or LARGE:
        return activations.apply(z, activation)
    return _Elementwise.apply(z, activation)


def specials(activation: str | None) -> tuple[float, ...]:
    """What to plant. Without the values of which torch's vectors and scalars make different things, where its vectors
    are what there is to compare with."""
    if LARGE and activation == "gelu":
        return -INF, NAN
    if LARGE and activation in ("relu6", "hardswish"):
        return INF, -INF
    return INF, -INF, NAN


def plant(t: Tensor, values: Sequence[float]) -> Tensor:
    """``t`` with ``values`` spread over it, the first and the last element among them."""
    flat = t.reshape(-1)
    for i, value in enumerate(values):
        flat[i * (flat.numel() - 1) // max(len(values) - 1, 1)] = value
    return flat.view(t.shape)


def alike(mine: Tensor | None, theirs: Tensor | None, name: str) -> None:
    if theirs is None or mine is None:
        assert mine is theirs, name
        return
    a, b = mine.detach().cpu().float(), theirs.detach().float()
    counts = [f"{int(t.isnan().sum())} NaN, {int(t.isinf().sum())} Inf" for t in (a, b)]
    for what in (torch.isnan, torch.isposinf, torch.isneginf):
        equal = torch.equal(what(a), what(b))  # not in the assert, which would print both
        assert equal, f"{name}: {counts[0]}, torch {counts[1]} of {a.numel()}"
    finite = a.isfinite()
    torch.testing.assert_close(a[finite], b[finite], rtol=5e-2, atol=0.1, msg=lambda text: f"{name}: {text}")


def check(
    mine: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
    device: str,
    incoming: Sequence[float] = (),
) -> None:
    """Output and gradients of all ``inputs``; ``incoming``: planted in the gradient that comes in."""
    given = {name: t.to(dtype) for name, t in inputs.items()}
    a = {name: t.to(device).clone().requires_grad_() for name, t in given.items()}
    b = {name: t.clone().requires_grad_() for name, t in given.items()}
    y, expected = mine(**a), theirs(**b)
    alike(y, expected, "output")
    dy = plant(torch.randn(expected.shape), incoming).to(dtype)
    got = torch.autograd.grad(y, list(a.values()), dy.to(device))
    for name, g, e in zip(a, got, torch.autograd.grad(expected, list(b.values()), dy)):
        alike(g, e, f"gradient of {name}")


DTYPES = pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)


@DTYPES
@pytest.mark.parametrize("activation", NONE_TO_ALL)
def test_linear(activation: str | None, dtype: torch.dtype, device: str, launches: list[str]) -> None:
    rows, width, out = (1024, 256, 8192) if LARGE and dtype == F32 else (9, 20, 7)
    x, w, b = torch.randn(rows, width), torch.randn(out, width) / 16, torch.randn(out)
    plant(x[: rows // 2], specials(activation))
    b[1] = specials(activation)[0]

    def mine(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ours.linear(x, w, b, activation)

    check(mine, lambda x, w, b: activated(F.linear(x, w, b), activation), {"x": x, "w": w, "b": b}, dtype, device)
    assert launches or LARGE


@pytest.mark.parametrize("activation", (None, "relu", "silu"))
def test_linear_in_evaluation(activation: str | None, device: str) -> None:
    rows, width, out = (1024, 256, 8192) if LARGE else (9, 20, 7)
    x, w, b = plant(torch.randn(rows, width), specials(activation)), torch.randn(out, width) / 16, torch.randn(out)
    with torch.no_grad():
        y = ours.linear(*(t.to(device) for t in (x, w, b)), activation)
        alike(y, activated(F.linear(x, w, b), activation), "output")


def test_linear_drops_infinities_to_nan(device: str) -> None:
    """0 times Inf is NaN in torch's dropout too."""
    x, w = plant(torch.randn(9, 20), (INF, NAN)), torch.randn(7, 20)
    inputs = {"x": x, "w": w}

    def mine(x: Tensor, w: Tensor) -> Tensor:
        return ours.linear(x, w, None, "relu", 1.0, True)

    with torch.no_grad():
        expected = F.dropout(torch.relu(F.linear(x, w)), 1.0)
        alike(mine(**{name: t.to(device) for name, t in inputs.items()}), expected, "output")


@DTYPES
@pytest.mark.parametrize("splits", ("one", "many"))
def test_matmul(splits: str, dtype: torch.dtype, device: str) -> None:
    """``many``: so long a sum that programs share it; its parts are added up afterwards."""
    m, k, n = (5, 21, 9) if splits == "one" else (3, 1100, 2)
    a, b = plant(torch.randn(m, k), (INF, NAN)), torch.randn(k, n) / k**0.5
    check(ours.matmul, lambda a, b: a @ b, {"a": a, "b": b}, dtype, device, (NAN,))


# name: image, weight, options. No image is padded here: see test_padding_takes_part
CONVS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((2, 5, 6, 7), (8, 5, 3, 3), {"padding": 1}),
    "strided": ((2, 5, 7, 7), (8, 5, 3, 3), {"stride": 2}),
    "few channels": ((2, 3, 6, 5), (7, 3, 3, 3), {"padding": 1}),
    "pointwise": ((2, 16, 5, 5), (20, 16, 1, 1), {}),
    "grouped": ((2, 16, 5, 5), (8, 8, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((2, 8, 6, 6), (8, 1, 3, 3), {"groups": 8, "padding": 1}),
}
if LARGE:
    CONVS = {"large": ((8, 16, 64, 64), (16, 16, 3, 3), {"padding": 1})}


@pytest.mark.parametrize("dtype", (F32, F16), ids=str)
@pytest.mark.parametrize("activation", NONE_TO_ALL)
@pytest.mark.parametrize("name", CONVS)
def test_conv2d_of_special_pixels(
    name: str, activation: str | None, dtype: torch.dtype, device: str, launches: list[str]
) -> None:
    image, weight, options = CONVS[name]
    if activation not in (None, "relu", "silu") and name not in ("3x3", "large"):
        pytest.skip("the epilogue is the same")
    x, w, b = torch.randn(image).contiguous(memory_format=CL), torch.randn(weight) / 8, torch.randn(weight[0])
    for i, value in enumerate(specials(activation)):  # from the middle: dw of border pixels is the padding's affair
        x[i % 2, 2 * i % image[1], image[2] // 2, image[3] // 2] = value

    def mine(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ours.conv2d(x, w, b, **options, activation=activation)

    def theirs(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return activated(F.conv2d(x, w, b, **options), activation)

    with torch.no_grad():
        given = [t.to(dtype) for t in (x, w, b)]
        alike(mine(*(t.to(device) for t in given)), theirs(*given), "output in evaluation")
    # dz is NaN at pixels by the border as well, whose taps outside the image are zeros that take part
    inputs = {"x": x, "w": w, "b": b} if activation in (None, "relu", "leaky_relu") else {"x": x, "b": b}
    w = w.to(dtype)
    if "w" in inputs:
        check(mine, theirs, inputs, dtype, device)
    else:
        check(lambda x, b: mine(x, w.to(device), b), lambda x, b: theirs(x, w, b), inputs, dtype, device)
    assert launches or LARGE


@pytest.mark.gate("ttsem", "cuda")
@pytest.mark.parametrize("name", ("3x3", "few channels", "grouped", "depthwise"))
@pytest.mark.parametrize("where", ("weight", "incoming gradient"))
def test_padding_takes_part(where: str, name: str, device: str) -> None:
    """Padding is zeros, and 0 times an infinite weight or gradient is NaN, as where one pads by hand. (torch's kernels
    are of two minds: some skip the taps outside.)"""
    image, weight, options = CONVS[name]
    x, w = torch.randn(image), torch.randn(weight)
    if where == "weight":
        w[0, 0, 0, 0] = INF

    def by_hand(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), w, groups=options.get("groups", 1))

    if where == "weight":
        with torch.no_grad():
            alike(ours.conv2d(x.to(device), w.to(device), **options), by_hand(x, w), "output")
        return

    def mine(w: Tensor) -> Tensor:
        return ours.conv2d(x.to(device), w, **options)

    check(mine, lambda w: by_hand(x, w), {"w": w}, F32, device, (INF,))


NORM_SHAPE = (64, 32, 32, 32) if LARGE else (3, 5, 4, 5)


def norm_input(kind: str, shape: tuple[int, ...] = NORM_SHAPE) -> Tensor:
    """Of a kind in channel 1 (and of another sign in 2), normal elsewhere."""
    x = torch.randn(shape)
    if kind in ("inf", "-inf", "nan"):
        x[0, 1, 0, 1] = float(kind)
        x[-1, 2, -1, -1] = -float(kind)
    elif kind == "constant":
        x[:, 1] = 3.0
        x[:, 2] = 0.0
    elif kind == "denormal":
        x[:, 1] *= 1e-40
    elif kind == "large":
        x[:, 1] *= 1e17
        x[:, 2] += 100.0
    return x


@DTYPES
@pytest.mark.parametrize("activation", (None, "relu", "silu"))
@pytest.mark.parametrize("kind", ("inf", "-inf", "nan", "constant", "denormal", "large"))
@pytest.mark.parametrize("training", (True, False))
def test_batch_norm(training: bool, kind: str, activation: str | None, dtype: torch.dtype, device: str) -> None:
    if dtype == F16 and kind == "large":
        pytest.skip("no numbers of float16")
    if LARGE and (activation != "relu" or not training) and kind != "inf":
        pytest.skip("torch's own")
    channels = NORM_SHAPE[1]
    x = norm_input(kind)
    x = x.contiguous(memory_format=CL) if LARGE else x
    w, b = torch.rand(channels) + 0.5, torch.randn(channels)
    running = [torch.zeros(channels), torch.ones(channels)]
    moved = [t.to(device) for t in running]
    b[3] = specials(activation)[0]

    def mine(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ours.batch_norm(x, *moved, w.float() if dtype != F32 else w, b.float() if dtype != F32 else b, training,
                               activation=activation)  # fmt: skip

    def theirs(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = F.batch_norm(x, *running, w.float() if dtype != F32 else w, b.float() if dtype != F32 else b, training)
        return activated(y, activation)

    check(mine, theirs, {"x": x, "w": w, "b": b}, dtype, device)
    for name, t, e in zip(("running_mean", "running_var"), moved, running):
        scale = max(e[e.isfinite()].abs().max().item(), 1.0)
        alike(t.cpu() / scale, e / scale, name)


@pytest.mark.parametrize("value", (1e17, 1e30, 1e36), ids=str)
@pytest.mark.parametrize("layout", ("NCHW", "NHWC"))
def test_statistics_of_numbers_whose_squares_overflow(value: float, layout: str, device: str) -> None:
    """Neither the output nor what is kept of it for ever is NaN; a variance that no float32 holds is infinite."""
    if LARGE and layout == "NHWC" and value == 1e36:
        pytest.skip("torch's own sums of channels_last maps overflow on a CPU")
    x = torch.randn(NORM_SHAPE)
    x[:, 1] *= value
    x[:, 2] = value
    x = x.contiguous(memory_format=CL if layout == "NHWC" else torch.contiguous_format)
    running = [torch.zeros(NORM_SHAPE[1], device=device), torch.ones(NORM_SHAPE[1], device=device)]
    x = x.to(device).requires_grad_()
    y = ours.batch_norm(x, *running, training=True, activation="relu")
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    for name, t in (("y", y), ("dx", dx), ("running_mean", running[0]), ("running_var", running[1])):
        assert not t.isnan().any(), f"{name}: {int(t.isnan().sum())} NaN"
    assert running[0].isfinite().all()


@pytest.mark.parametrize("activation", (None, "relu", "silu"))
def test_batch_norm_with_an_infinite_residual(activation: str | None, device: str) -> None:
    channels = NORM_SHAPE[1]
    w, b = torch.rand(channels) + 0.5, torch.randn(channels)
    inputs = {"x": torch.randn(NORM_SHAPE), "r": plant(torch.randn(NORM_SHAPE), specials(activation)), "w": w, "b": b}

    def mine(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ours.batch_norm(x, None, None, w, b, True, activation=activation, residual=r)

    def theirs(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return activated(F.batch_norm(x, None, None, w, b, True) + r, activation)

    check(mine, theirs, inputs, F32, device)


def logits(classes: int) -> tuple[Tensor, Tensor]:
    """Rows: plain; Inf; impossible classes, the target among them; nothing possible; NaN; one possible class; two Inf;
    one ignored that holds NaN; one ignored."""
    x, t = torch.randn(9, classes), torch.randint(3, classes, (9,))
    x[1, 2] = INF
    x[2, :4], t[2] = -INF, 3
    x[3] = -INF
    x[4, 1] = NAN
    x[5, : classes - 1], t[5] = -INF, classes - 1
    x[6, :2], t[6] = INF, 0
    x[7, 4], t[7] = NAN, -100
    t[8] = -100
    return x, t


@DTYPES
@pytest.mark.parametrize("rows", ("special", "masked classes", "all ignored"))
@pytest.mark.parametrize("target", ("index", "probability"))
@pytest.mark.parametrize("weight", (None, 1.0, 0.0), ids=str)
@pytest.mark.parametrize("smoothing", (0.0, 0.2))
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_cross_entropy(
    reduction: str, smoothing: float, weight: float | None, target: str, rows: str, dtype: torch.dtype, device: str
) -> None:
    x, t = logits(11)
    if rows == "masked classes":
        x = torch.randn(9, 11)
        x[:, :3] = -INF
    if rows == "all ignored":
        x, t = torch.randn(9, 11), torch.full((9,), -100)
    if LARGE:
        repeats = 7800
        x, t = x.repeat(repeats, 1), t.repeat(repeats)
    if target == "probability":
        t = torch.zeros(x.shape).scatter(1, t.clamp(min=0)[:, None], 1.0).to(dtype)
    w = None if weight is None else (torch.rand(11) * weight).to(dtype)

    def mine(x: Tensor) -> Tensor:
        return ours.cross_entropy(x, t.to(device), None if w is None else w.to(device), reduction=reduction,
                                  label_smoothing=smoothing)  # fmt: skip

    def theirs(x: Tensor) -> Tensor:
        return F.cross_entropy(x, t, w, reduction=reduction, label_smoothing=smoothing)

    if LARGE and dtype != F32:
        pytest.skip("torch's own")
    check(mine, theirs, {"x": x}, dtype, device)


def test_cross_entropy_of_rows_shared_by_programs(device: str, launches: list[str], triton_runs: bool) -> None:
    """Whole parts of a row are impossible, or all of it."""
    classes = 40_003
    x, t = torch.randn(4, classes), torch.tensor([classes - 1, 5, 7, 9])
    x[0, : classes // 2] = x[1, classes // 2 :] = x[2] = -INF
    x[3, classes - 2] = INF
    for smoothing in (0.0, 0.1):
        check(lambda x, s=smoothing: ours.cross_entropy(x, t.to(device), reduction="none", label_smoothing=s),
              lambda x, s=smoothing: F.cross_entropy(x, t, reduction="none", label_smoothing=s), {"x": x}, F32,
              device)  # fmt: skip
    assert "cross_entropy_merge" in launches or not triton_runs


def stage(
    x: Tensor, w: Tensor, b: Tensor, bn_w: Tensor, bn_b: Tensor, stats: list[Tensor], activation: str, training: bool
) -> Tensor:
    """A layer, torch's own operators."""
    y = F.batch_norm(F.conv2d(x, w, b, padding=w.shape[2] // 2), *stats, bn_w, bn_b, training)
    return activated(y, activation)


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("activation", ("relu", "silu", "relu6", "hardswish"))
@pytest.mark.parametrize("window", (None, (2, 2, 0), (3, 2, 1)), ids=str)
@pytest.mark.parametrize("special", (INF, -INF, NAN), ids=str)
def test_conv_stage(
    special: float, window: tuple[int, int, int] | None, activation: str, training: bool, device: str
) -> None:
    """One layer and a pooling: a special value in a pixel in evaluation, in a channel's bias in training (of a pixel it
    would take everything along), and in batch norm's bias, so that windows hold NaN and -Inf.

    In evaluation a pooling's gradient of 0 times an infinite pixel that it did not choose is NaN in torch; the kernels
    have nothing to multiply there."""
    if special not in specials(activation):
        pytest.skip("torch's own vectors and scalars differ")
    n, size = (8, 64) if LARGE else (2, 6)
    channels = 16 if LARGE else 5
    x, w, b = torch.randn(n, 4, size, size), torch.randn(channels, 4, 3, 3) / 6, torch.randn(channels)
    bn_w, bn_b = torch.rand(channels) + 0.5, torch.randn(channels)
    stats = [torch.zeros(channels), torch.ones(channels)]
    bn_b[2] = special
    if training:
        b[1] = special
    else:
        x[0, 1, 2, 3] = special
    moved = [t.to(device) for t in stats]
    pool = None if window is None else ours.MaxPool(*window)

    def mine(x: Tensor, bn_w: Tensor, bn_b: Tensor) -> Tensor:
        layer = ConvBNLayer(weight=w.to(device), bias=b.to(device), bn_weight=bn_w, bn_bias=bn_b,
                            running_mean=moved[0], running_var=moved[1], activation=activation, padding=1)  # fmt: skip
        return conv_stage(x, [layer], pool=pool, training=training)

    def theirs(x: Tensor, bn_w: Tensor, bn_b: Tensor) -> Tensor:
        y = stage(x, w, b, bn_w, bn_b, stats, activation, training)
        return y if window is None else F.max_pool2d(y, *window)

    if not training and window is not None:
        with torch.no_grad():
            alike(mine(*(t.to(device) for t in (x, bn_w, bn_b))), theirs(x, bn_w, bn_b), "output")
        return
    check(mine, theirs, {"x": x.contiguous(memory_format=CL), "bn_w": bn_w, "bn_b": bn_b}, F32, device)
    for name, t, e in zip(("running_mean", "running_var"), moved, stats):
        alike(t, e, name)


@pytest.mark.parametrize("kernel", (1, 3))
def test_conv_stage_of_two_layers(kernel: int, device: str) -> None:
    """NaN that the first layer makes in one channel reaches all of the second; 1x1 layers read the raw map before."""
    n, size = (8, 64) if LARGE else (2, 6)
    first, second = torch.randn(8, 4, 3, 3) / 6, torch.randn(6, 8, kernel, kernel) / 8
    x = torch.randn(n, 4, size, size).contiguous(memory_format=CL)
    vectors = [(torch.rand(c) + 0.5, torch.randn(c)) for c in (8, 6)]
    for special in (NAN, INF):
        vectors[0][1][3] = special

        def mine(x: Tensor, w: Tensor) -> Tensor:
            layers = [
                ConvBNLayer(weight=v, bias=None, bn_weight=a.to(device), bn_bias=b.to(device), running_mean=None,
                            running_var=None, activation="relu", padding=v.shape[2] // 2)
                for v, (a, b) in zip((first.to(device), w), vectors)
            ]  # fmt: skip
            return conv_stage(x, layers, training=True)

        def theirs(x: Tensor, w: Tensor) -> Tensor:
            for v, (a, b) in zip((first, w), vectors):
                x = torch.relu(F.batch_norm(F.conv2d(x, v, None, padding=v.shape[2] // 2), None, None, a, b, True))
            return x

        check(mine, theirs, {"x": x, "w": second}, F32, device)
