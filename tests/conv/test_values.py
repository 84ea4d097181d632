"""conv2d against torch.nn.functional.conv2d in float64: values, gradients, dtypes, layouts, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tkernels
from tests.tolerance import assert_close
from tkernels.core import activation as activations
from tkernels.functional import conv2d
from tkernels.ops.conv.op import geometry

pytestmark = pytest.mark.gate("torch", "ttsem", "cuda")

CL = torch.channels_last

# name: input shape, weight shape, arguments
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    # channels are no multiple of any block, the image is odd: every tile is partial
    "padded 3x3": ((2, 17, 5, 7), (19, 17, 3, 3), {"padding": 1}),
    # few channels: taps and channels flattened into one axis, 27 of 32
    "rgb stem": ((2, 3, 7, 6), (5, 3, 3, 3), {"padding": 1}),
    # multiples of 8 but not of 16: the unit taken out of the channel count; more outputs than taps x inputs
    "1x1 expanding": ((2, 24, 4, 5), (40, 24, 1, 1), {}),
    "everything asymmetric": (
        (2, 34, 9, 8),
        (6, 17, 3, 2),
        {"stride": (2, 3), "padding": (0, 2), "dilation": (1, 2), "groups": 2},
    ),
    # a stride beyond the window leaves pixels no output touches, whose gradient is 0
    "stride over window": ((1, 16, 9, 7), (4, 16, 2, 1), {"stride": (3, 2)}),
    # stride and dilation share a factor: whole phases without a tap
    "stride 2 dilation 2": ((1, 16, 8, 9), (3, 16, 3, 3), {"stride": 2, "dilation": 2, "padding": 2}),
    "stride 4 dilation 6": ((1, 2, 15, 16), (3, 2, 3, 2), {"stride": 4, "dilation": 6, "padding": (3, 0)}),
    # torch pads the odd row below and the odd column to the right; no padding above, but a halo below
    "same, even window": ((1, 3, 5, 6), (2, 3, 2, 4), {"padding": "same", "dilation": (1, 3)}),
    "same, 16 channels": ((1, 16, 4, 5), (2, 16, 2, 1), {"padding": "same"}),
    "valid": ((1, 4, 4, 6), (2, 4, 3, 1), {"padding": "valid", "stride": 2}),
    "padding over window": ((1, 2, 3, 2), (3, 2, 2, 2), {"padding": (3, 4)}),
    "unbatched": ((3, 6, 5), (4, 3, 3, 3), {"padding": 1}),
    "one output": ((2, 16, 3, 4), (1, 16, 3, 4), {}),
    "one channel": ((2, 1, 4, 4), (1, 1, 2, 2), {"stride": (1,)}),
    "groups of few": ((1, 12, 4, 5), (6, 4, 3, 3), {"groups": 3, "padding": 1}),
    "depthwise": ((2, 10, 6, 5), (10, 1, 3, 3), {"groups": 10, "padding": 1}),
    "depthwise strided": ((1, 5, 7, 8), (5, 1, 3, 2), {"groups": 5, "stride": (2, 3), "padding": (1, 0)}),
    "depthwise multiplied": ((1, 3, 5, 5), (9, 1, 5, 5), {"groups": 3, "padding": 4, "dilation": 2}),
}


def draw(device: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(device).requires_grad_(grad)


def reference(
    x: Tensor, w: Tensor, b: Tensor | None, activation: str | None, arguments: dict[str, Any]
) -> tuple[Tensor, list[Tensor]]:
    """The float64 result, and float64 leaves to differentiate it by."""
    leaves = [t.detach().cpu().double().requires_grad_() for t in (x, w, b) if t is not None]
    y = F.conv2d(leaves[0], leaves[1], leaves[2] if b is not None else None, **arguments)
    return activations.apply(y, activation), leaves


def check(
    x: Tensor, w: Tensor, b: Tensor | None, activation: str | None, arguments: dict[str, Any], dy: Tensor | None = None
) -> Tensor:
    """Compare value and every gradient asked for with float64; inputs must stay as they are. Returns the output."""
    before = [t.detach().clone() for t in (x, w, b) if t is not None]
    y = conv2d(x, w, b, activation=activation, **arguments)
    expected, leaves = reference(x, w, b, activation, arguments)
    reduction = w[0].numel()
    assert y.dtype == x.dtype
    assert_close(y, expected, reduction, name="y")
    if dy is None:
        dy = torch.randn(expected.shape, dtype=torch.float64).to(y.dtype).to(y.device)
    asked = [(i, t) for i, t in enumerate(t for t in (x, w, b) if t is not None) if t.requires_grad]
    if asked:
        gradients = torch.autograd.grad(y, [t for _, t in asked], dy)
        truths = torch.autograd.grad(expected, leaves, dy.detach().cpu().double())
        pixels = expected.numel() // w.shape[0]
        lengths = (w.shape[0] * w[0, 0].numel(), pixels, pixels)
        for (i, t), gradient in zip(asked, gradients):
            assert gradient.dtype == t.dtype
            assert_close(gradient, truths[i], lengths[i], name=("dx", "dw", "db")[i])
    for t, old in zip((t for t in (x, w, b) if t is not None), before):
        assert torch.equal(t.detach(), old), "an input was written to"
    return y


def expected_kernels(case: str, masked: bool) -> set[str]:
    kind = "conv_depthwise" if case.startswith("depthwise") else "conv"
    names = {f"{kind}_{name}_kernel" for name in ("forward", "dgrad", "wgrad")} | {"conv_merge_kernel"}
    if kind == "conv" and case != "1x1 expanding":
        names.add("conv_pack_kernel")  # OIHW weights of a 1x1 window already lie as the kernels want them
    return names | {"conv_mask_kernel"} if masked else names


@pytest.mark.gate("torch", "ttsem", "interp", "cuda")
@pytest.mark.parametrize("case", CASES)
def test_float32(device: str, case: str, launches: list[str], triton_runs: bool) -> None:
    if triton_runs and case in ("valid", "one channel"):
        pytest.skip("what it adds is the geometry, which the PyTorch gate checks")
    x_shape, w_shape, arguments = CASES[case]
    x, w, b = draw(device, x_shape), draw(device, w_shape), draw(device, w_shape[:1])
    check(x, w, b, "relu", arguments)
    read_once = w.shape[2:].numel() == 1  # then backward masks in the prologue, but for a layout to change first
    if triton_runs and not read_once:
        assert set(launches) == expected_kernels(case, masked=True)
    if not triton_runs:
        assert not launches


@pytest.mark.parametrize(
    "case, dtype",
    (
        ("padded 3x3", torch.bfloat16),
        ("padded 3x3", torch.float16),
        ("rgb stem", torch.float16),
        ("1x1 expanding", torch.bfloat16),
        ("everything asymmetric", torch.bfloat16),
        ("depthwise", torch.float16),
    ),
)
def test_half(device: str, case: str, dtype: torch.dtype, launches: list[str], triton_runs: bool) -> None:
    x_shape, w_shape, arguments = CASES[case]
    x = draw(device, x_shape, dtype).detach().contiguous(memory_format=CL).requires_grad_()
    w, b = draw(device, w_shape, dtype), draw(device, w_shape[:1], dtype)
    y = check(x, w, b, None, arguments)
    assert y.is_contiguous(memory_format=CL)
    if triton_runs:
        assert set(launches) == expected_kernels(case, masked=False)


@pytest.mark.parametrize("window", (1, 2))
@pytest.mark.parametrize("activation", activations.ACTIVATIONS[1:])
def test_activations(device: str, activation: str, window: int, launches: list[str], triton_runs: bool) -> None:
    """One tap: derivative in the prologue of both gradient products; several: one pass before them."""
    x = draw(device, (2, 17, 3, 4)).detach().contiguous(memory_format=CL).requires_grad_()
    w, b = draw(device, (5, 17, window, window)), draw(device, (5,))
    dy = torch.randn(2, 5, 4 - window, 5 - window).to(device).contiguous(memory_format=CL)
    check(x, w, b, activation, {}, dy)
    if triton_runs:
        assert ("conv_mask_kernel" in launches) == (window > 1)


@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
@pytest.mark.parametrize("needs", [(i & 1, i & 2, i & 4) for i in range(8)])
def test_only_the_gradients_asked_for(
    device: str, needs: tuple[int, int, int], activation: str | None, launches: list[str], triton_runs: bool
) -> None:
    if triton_runs and activation not in (None, "relu"):
        pytest.skip("the choice does not depend on which activation it is")
    x, w, b = (draw(device, s, grad=bool(n)) for s, n in zip(((1, 16, 4, 3), (4, 16, 2, 2), (4,)), needs))
    y = check(x, w, b, activation, {})
    assert y.requires_grad == any(needs)
    if triton_runs:
        assert ("conv_dgrad_kernel" in launches) == bool(needs[0])
        assert ("conv_wgrad_kernel" in launches) == bool(needs[1] or needs[2])


def test_no_bias(device: str) -> None:
    check(draw(device, (1, 3, 4, 4)), draw(device, (2, 3, 3, 3)), None, "silu", {"padding": 1})


@pytest.mark.parametrize("channels, groups", ((1, 1), (3, 1), (2, 2)))
def test_a_large_bias_is_added_once(device: str, channels: int, groups: int) -> None:
    """Not what the sum starts at: each of its terms would be rounded as a number of the bias's size."""
    x, w = draw(device, (3, channels, 7, 5)), draw(device, (4, channels // groups, 3, 3))
    bias = draw(device, (4,)) * 1e4
    y = conv2d(x, w, bias, groups=groups)
    exact = F.conv2d(x.cpu().double(), w.cpu().double(), bias.cpu().double(), groups=groups)
    once = (exact.float() - exact).norm()
    assert (y.detach().cpu() - exact).norm() < 1.25 * once


FORMATS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=CL),
    "sliced": lambda t: F.pad(t, (1, 2, 1, 0))[..., 1:, 1:-2],
    "sliced channels": lambda t: F.pad(t.contiguous(memory_format=CL), (0, 0, 0, 0, 1, 1))[:, 1:-1],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "offset": lambda t: torch.cat((t.new_zeros(3), t.flatten()))[3:].view(t.shape),
    "channels_last offset": lambda t: (
        torch.cat((t.new_zeros(3), t.permute(0, 2, 3, 1).flatten()))[3:]
        .view(t.shape[0], *t.shape[2:], t.shape[1])
        .permute(0, 3, 1, 2)
    ),
    "expanded": lambda t: t[:, :1].expand(t.shape),
}


@pytest.mark.parametrize("channels", (3, 16))  # read through its strides, or made NHWC
@pytest.mark.parametrize("x_format", FORMATS)
def test_layouts(device: str, x_format: str, channels: int) -> None:
    """Any strides of the input and of the incoming gradient; the output's strides are those torch gives."""
    x = FORMATS[x_format](torch.randn(2, channels, 4, 3)).to(device)
    w = torch.randn(4, channels, 2, 2).to(device)
    if x_format == "expanded":
        x = x[:, :1].expand(x.shape)  # copying it to the device made it dense
    check(x.requires_grad_(), w.requires_grad_(), None, None, {"padding": 1})
    y = conv2d(x, w)
    assert y.stride() == F.conv2d(x.detach().cpu(), w.detach().cpu()).stride()


@pytest.mark.parametrize("dy_format", FORMATS)
@pytest.mark.parametrize(
    "activation, x_format", ((None, "contiguous"), ("relu", "contiguous"), ("relu", "channels_last"))
)
def test_gradient_layouts(device: str, dy_format: str, activation: str | None, x_format: str) -> None:
    x = FORMATS[x_format](torch.randn(2, 16, 4, 3)).to(device).requires_grad_()
    w = draw(device, (4, 16, 2, 2))
    dy = FORMATS[dy_format](torch.randn(2, 4, 3, 2)).to(device)
    if dy_format == "expanded":
        dy = dy[:, :1].expand(dy.shape)
    check(x, w, None, activation, {}, dy)


@pytest.mark.parametrize("w_format", ("channels_last", "sliced", "transposed", "expanded"))
@pytest.mark.parametrize("channels", (3, 16))
def test_weight_layouts(device: str, w_format: str, channels: int) -> None:
    w = FORMATS[w_format](torch.randn(4, channels, 2, 3)).to(device)
    if w_format == "expanded":
        w = w[:, :1].expand(w.shape)
    x, w = draw(device, (1, channels, 4, 3)), w.requires_grad_()
    y = check(x, w, None, None, {})
    assert y.stride() == F.conv2d(x.detach().cpu(), w.detach().cpu()).stride()


@pytest.mark.parametrize("case", ("rgb stem", "padded 3x3", "depthwise"))
def test_summed_output(device: str, case: str) -> None:
    """y.sum() sends back a gradient of stride 0."""
    x_shape, w_shape, arguments = CASES[case]
    x, w, b = draw(device, x_shape), draw(device, w_shape), draw(device, w_shape[:1])
    conv2d(x, w, b, **arguments).sum().backward()
    expected, leaves = reference(x, w, b, None, arguments)
    for t, truth in zip((x, w, b), torch.autograd.grad(expected.sum(), leaves)):
        assert t.grad is not None
        assert_close(t.grad, truth, 200)


@pytest.mark.parametrize("case", ("rgb stem", "padded 3x3", "depthwise"))
def test_empty_batch(device: str, case: str) -> None:
    x_shape, w_shape, arguments = CASES[case]
    x, w, b = draw(device, (0, *x_shape[1:])), draw(device, w_shape), draw(device, w_shape[:1])
    y = conv2d(x, w, b, activation="relu", **arguments)
    assert y.shape == F.conv2d(x.detach().cpu(), w.detach().cpu(), **arguments).shape
    y.sum().backward()
    for t in (x, w, b):
        assert t.grad is not None
        assert torch.equal(t.grad, torch.zeros_like(t))


@pytest.mark.parametrize("channels, groups", ((3, 1), (16, 1), (3, 3)))
def test_nan_and_inf_pass(device: str, channels: int, groups: int) -> None:
    """They reach exactly the outputs whose window holds them; padding does not multiply them."""
    x = torch.randn(1, channels, 5, 6)
    x[0, 0, 1, 1], x[0, 1, 4, 5] = torch.nan, torch.inf
    w = torch.rand(3, channels // groups, 2, 2) + 0.1
    expected = F.relu(F.conv2d(x.double(), w.double(), padding=1, groups=groups))
    assert_close(conv2d(x.to(device), w.to(device), padding=1, groups=groups, activation="relu"), expected, 64)


def test_nan_gradient(device: str) -> None:
    x, w, b = draw(device, (1, 16, 4, 4)), draw(device, (3, 16, 2, 2)), draw(device, (3,))
    dy = torch.randn(1, 3, 3, 3).to(device)
    dy[0, 1, 2, 2] = torch.nan
    check(x, w, b, None, {}, dy)


def test_two_runs_are_bitwise_equal(device: str) -> None:
    x, w, b = draw(device, (2, 17, 9, 7)), draw(device, (5, 17, 3, 3)), draw(device, (5,))
    runs = []
    for _ in range(2):
        y = conv2d(x, w, b, padding=1, activation="gelu")
        runs.append((y, *torch.autograd.grad(y, (x, w, b), torch.ones_like(y))))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("channels, groups, image_grad", ((3, 1, False), (3, 1, True), (16, 1, True), (3, 3, False)))
def test_autocast(device: str, channels: int, groups: int, image_grad: bool) -> None:
    """Lower-precision output, float32 gradients of float32 parameters."""
    x = draw(device, (2, channels, 5, 5), grad=image_grad)
    w, b = draw(device, (6, channels // groups, 3, 3)), draw(device, (6,))
    with torch.autocast(device, dtype=torch.bfloat16):
        y = conv2d(x, w, b, padding=1, groups=groups)
    assert y.dtype == torch.bfloat16
    expected, leaves = reference(x, w, b, None, {"padding": 1, "groups": groups})
    assert_close(y, expected, channels * 9)
    dy = torch.randn(y.shape).to(torch.bfloat16)
    truths = torch.autograd.grad(expected, leaves, dy.double())
    y.backward(dy.to(device))
    for t, truth in zip((x, w, b), truths):
        if t.requires_grad:
            assert t.grad is not None
            assert t.grad.dtype == torch.float32
            assert_close(t.grad, truth, 54, dtype=torch.bfloat16)


def test_a_weight_changed_before_backward_is_noticed(device: str) -> None:
    x, w = draw(device, (1, 16, 4, 4)), draw(device, (3, 16, 2, 2))
    y = conv2d(x, w)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_double_backward_is_right_or_refused(device: str, triton_runs: bool) -> None:
    x, w = draw(device, (1, 2, 3, 3)), draw(device, (2, 2, 2, 2))
    y = conv2d(x, w, activation="silu")
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    if triton_runs:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()
    else:
        double = [t.detach().double().requires_grad_() for t in (x, w)]
        assert torch.autograd.gradgradcheck(lambda a, b: conv2d(a, b, activation="silu"), double)


@pytest.mark.gate("torch")
@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
@pytest.mark.parametrize("case", ("rgb stem", "stride 2 dilation 2", "same, even window", "depthwise strided"))
def test_gradcheck(case: str, activation: str | None) -> None:
    x_shape, w_shape, arguments = CASES[case]
    leaves = [draw("cpu", s, torch.float64) for s in (x_shape, w_shape, w_shape[:1])]
    assert torch.autograd.gradcheck(lambda x, w, b: conv2d(x, w, b, activation=activation, **arguments), leaves)


BAD = {
    "input of rank 2": ((3, 5), (4, 3, 3, 3), {}, "3D"),
    "input of rank 5": ((1, 1, 3, 5, 5), (4, 3, 3, 3), {}, "3D"),
    "weight of rank 3": ((1, 3, 5, 5), (4, 3, 3), {}, "weight"),
    "too few channels": ((1, 2, 5, 5), (4, 3, 3, 3), {}, "channels"),
    "groups do not divide": ((1, 3, 5, 5), (4, 1, 3, 3), {"groups": 3}, "groups=3"),
    "groups 0": ((1, 3, 5, 5), (4, 3, 3, 3), {"groups": 0}, "groups"),
    "groups of float": ((1, 3, 5, 5), (4, 3, 3, 3), {"groups": 1.5}, "groups"),
    "window over input": ((1, 3, 2, 2), (4, 3, 3, 3), {}, "Kernel size"),
    "dilated window over input": ((1, 3, 5, 5), (4, 3, 3, 3), {"dilation": 3}, "Kernel size"),
    "stride 0": ((1, 3, 5, 5), (4, 3, 3, 3), {"stride": 0}, "stride"),
    "stride negative": ((1, 3, 5, 5), (4, 3, 3, 3), {"stride": (1, -1)}, "stride"),
    "three strides": ((1, 3, 5, 5), (4, 3, 3, 3), {"stride": (1, 1, 1)}, "stride"),
    "stride of float": ((1, 3, 5, 5), (4, 3, 3, 3), {"stride": 1.5}, "stride"),
    "stride of bool": ((1, 3, 5, 5), (4, 3, 3, 3), {"stride": True}, "stride"),
    "stride None": ((1, 3, 5, 5), (4, 3, 3, 3), {"stride": None}, "stride"),
    "padding negative": ((1, 3, 5, 5), (4, 3, 3, 3), {"padding": -1}, "padding"),
    "padding unknown": ((1, 3, 5, 5), (4, 3, 3, 3), {"padding": "full"}, "padding"),
    "same with stride": ((1, 3, 5, 5), (4, 3, 3, 3), {"padding": "same", "stride": 2}, "strided"),
    "dilation 0": ((1, 3, 5, 5), (4, 3, 3, 3), {"dilation": 0}, "dilation"),
    "no output channels": ((1, 3, 5, 5), (0, 3, 3, 3), {}, "weight"),
    "empty image": ((1, 3, 0, 5), (4, 3, 3, 3), {"padding": 2}, "input"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(device: str, name: str) -> None:
    x_shape, w_shape, arguments, message = BAD[name]
    x, w = torch.zeros(x_shape), torch.zeros(w_shape)
    with pytest.raises(Exception) as torchs:
        F.conv2d(x, w, **arguments)
    with pytest.raises(type(torchs.value), match=message):
        conv2d(x.to(device), w.to(device), **arguments)


def test_bad_tensors(device: str) -> None:
    x, w = draw(device, (1, 3, 4, 4)), draw(device, (2, 3, 3, 3))
    with pytest.raises(RuntimeError, match=r"bias must have shape \[2\]"):
        conv2d(x, w, draw(device, (3,)))
    with pytest.raises(RuntimeError, match="bias must have shape"):
        conv2d(x, w, draw(device, (2, 1)))
    with pytest.raises(RuntimeError, match="same dtype"):
        conv2d(x, w.half())
    with pytest.raises(RuntimeError, match="same dtype"):
        conv2d(x, w, draw(device, (2,), torch.bfloat16))
    with pytest.raises(TypeError, match="input must be a Tensor"):
        conv2d([1.0], w)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="bias must be a Tensor"):
        conv2d(x, w, [1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="activation must be one of"):
        conv2d(x, w, activation="tanh")


def test_zero_channels_as_torch(device: str) -> None:
    x, w = torch.zeros(2, 0, 4, 4), torch.zeros(3, 0, 2, 2)
    with tkernels.backend("auto"):
        assert conv2d(x.to(device), w.to(device)).shape == F.conv2d(x, w).shape


def test_float64_goes_to_torch(device: str, launches: list[str]) -> None:
    x, w = draw(device, (1, 3, 4, 4), torch.float64), draw(device, (2, 3, 3, 3), torch.float64)
    assert torch.equal(conv2d(x, w), F.conv2d(x, w))
    assert not launches


def test_geometry_of_same_padding() -> None:
    """The odd row goes below: 3 rows of reach put 1 above."""
    g = geometry((1, 3, 8, 8), (2, 3, 4, 2), (1, 1), "same", (1, 1), 1)
    assert (g.pad_h, g.pad_w, g.out_h, g.out_w) == (1, 0, 8, 8)
    assert g.halo


def test_module_is_the_torch_module(device: str) -> None:
    arguments: dict[str, Any] = {"stride": 2, "padding": (1, 0), "dilation": 1, "groups": 2, "bias": True}
    torch.manual_seed(7)
    twin = torch.nn.Conv2d(4, 6, (3, 2), **arguments)
    torch.manual_seed(7)
    module = tkernels.nn.Conv2d(4, 6, (3, 2), **arguments, activation="relu")
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), module.state_dict().values()))
    assert list(twin.state_dict()) == list(module.state_dict())
    assert repr(module) == repr(twin)[:-1] + ", activation='relu')"
    x = torch.randn(2, 4, 6, 5)
    assert_close(module.to(device)(x.to(device)), F.relu(twin.double()(x.double())), 12)
    with pytest.raises(ValueError, match="activation"):
        tkernels.nn.Conv2d(4, 6, 3, activation="tanh")


@pytest.mark.parametrize("mode", ("reflect", "replicate", "circular"))
@pytest.mark.parametrize("padding", (1, "same"))
def test_padding_modes(device: str, mode: str, padding: int | str) -> None:
    module = tkernels.nn.Conv2d(2, 3, (3, 2), padding=padding, padding_mode=mode)  # type: ignore[arg-type]
    twin = torch.nn.Conv2d(2, 3, (3, 2), padding=padding, padding_mode=mode).double()
    twin.load_state_dict(module.state_dict())
    x = torch.randn(1, 2, 5, 4)
    assert_close(module.to(device)(x.to(device)), twin(x.double()), 12)
