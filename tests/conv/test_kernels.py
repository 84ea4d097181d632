"""conv2d's launch functions with tiny blocks: several programs on every grid axis, partial tiles everywhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tolerance import assert_close
from tkernels.core.config import Config
from tkernels.core.geometry import Geometry
from tkernels.core.records import Norm
from tkernels.ops.conv.op import geometry

pytestmark = pytest.mark.gate("ttsem", "cuda")

conv = pytest.importorskip("tkernels.ops.conv.kernels")
conv_backward = pytest.importorskip("tkernels.ops.conv.kernels_backward")
conv_depthwise = pytest.importorskip("tkernels.ops.conv.kernels_depthwise")
pointwise = pytest.importorskip("tkernels.ops.conv_stage.kernels_pointwise")
batch_norm = pytest.importorskip("tkernels.ops.batch_norm.kernels")

CL = torch.channels_last
PRODUCT = Config.of(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16)
SUMS = Config.of(BLOCK_M=16, BLOCK_N=16, BLOCK_P=16)
MERGE = Config.of(BLOCK=64, BLOCK_S=2)

# input shape, weight shape, stride, padding, dilation, groups; and whether outputs are NCHW
PROBLEMS = {
    "padded": ((2, 20, 5, 6), (24, 20, 3, 3), (1, 1), (1, 1), (1, 1), 1, False),
    "groups, strides": ((2, 36, 7, 9), (40, 18, 2, 3), (2, 3), (1, 0), (2, 1), 2, True),
    "flat": ((2, 3, 6, 5), (20, 3, 3, 3), (1, 2), (1, 1), (1, 1), 1, True),
    "flat, outputs on rows": ((2, 3, 6, 5), (40, 3, 3, 3), (1, 2), (1, 1), (1, 1), 1, False),
    "outputs on rows": ((2, 17, 5, 4), (40, 17, 1, 1), (1, 1), (0, 0), (1, 1), 1, False),
}
CASES = [("padded", d) for d in (torch.float32, torch.float16, torch.bfloat16)] + [
    ("groups, strides", torch.bfloat16),
    ("groups, strides", torch.float32),
    ("flat", torch.float16),
    ("flat", torch.float32),
    ("outputs on rows", torch.bfloat16),
]


class Problem:
    """One convolution with its operands on the device and its float64 truth; relu follows it."""

    def __init__(self, device: str, name: str, dtype: torch.dtype) -> None:
        x_shape, w_shape, stride, padding, dilation, groups, self.nchw = PROBLEMS[name]
        self.g: Geometry = geometry(x_shape, w_shape, stride, padding, dilation, groups)
        self.x = torch.randn(x_shape).to(dtype).contiguous(memory_format=CL).to(device)
        self.w = torch.randn(w_shape).to(device)
        self.b = torch.randn(w_shape[0]).to(device)
        leaves = [t.cpu().double().requires_grad_() for t in (self.x, self.w.to(dtype), self.b)]
        self.z = F.conv2d(leaves[0], leaves[1], leaves[2], stride, padding, dilation, groups)
        self.dy = torch.randn(self.z.shape).to(dtype).contiguous(memory_format=CL).to(device)
        self.truths = torch.autograd.grad(F.relu(self.z), leaves, self.dy.cpu().double())
        # what autograd would have saved: the output, whose sign says where the gradient passes
        self.saved = F.relu(self.z.detach()).to(dtype).contiguous(memory_format=CL).to(device)
        self.dtype = dtype


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{str(case[1]).removeprefix('torch.')}")
def problem(request: pytest.FixtureRequest, device: str) -> Problem:
    return Problem(device, *request.param)


def test_forward(problem: Problem) -> None:
    p = problem
    packed = conv.launch_pack(p.w, p.g, p.dtype, config=Config.of(BLOCK_R=8, BLOCK_C=16))
    y, z = conv.launch_forward(p.x, packed, p.b, p.g, "relu", True, not p.nchw, PRODUCT)
    assert_close(z, p.z, p.g.reduction, name="z")
    assert_close(y, F.relu(p.z), p.g.reduction, name="y")
    assert y.is_contiguous(memory_format=torch.contiguous_format if p.nchw else CL)


@pytest.mark.parametrize("transposed", (False, True))
def test_input_gradient(problem: Problem, transposed: bool) -> None:
    """The activation's derivative in the prologue, or (transposed weights) in a pass before."""
    p = problem
    packed = conv.launch_pack(p.w, p.g, p.dtype, transposed, config=Config.of(BLOCK_R=8, BLOCK_C=16))
    dy, saved, activation = p.dy, p.saved, "relu"
    if transposed:
        dy = conv_backward.launch_mask(dy, saved, "relu", Config.of(BLOCK_P=16, BLOCK_C=8))
        assert torch.equal(dy, torch.where(saved > 0, p.dy, 0))
        saved = activation = None
    dx = conv_backward.launch_dgrad(dy, packed, p.g, p.dtype, not p.nchw, transposed, saved, activation, PRODUCT)
    assert_close(dx, p.truths[0], p.g.taps * p.g.group_out, name="dx")
    assert dx.is_contiguous(memory_format=torch.contiguous_format if p.nchw else CL)


def test_weight_gradient(problem: Problem) -> None:
    p = problem
    pixels = p.dy.numel() // p.g.out_channels
    w = p.w if p.nchw else p.w.contiguous(memory_format=CL)
    workspace = conv_backward.launch_wgrad(p.x, p.dy, p.g, True, True, p.saved, "relu", SUMS, runs=3)
    assert workspace.shape[0] > 1
    dw, db = conv_backward.launch_merge(workspace, p.g, w, p.b, MERGE)
    assert dw.stride() == w.stride()
    assert_close(dw, p.truths[1], pixels, dtype=p.dtype, name="dw")
    assert_close(db, p.truths[2], pixels, dtype=p.dtype, name="db")


# no block like another: a tile stored the wrong way round does not even fit
UNEVEN = Config.of(BLOCK_M=64, BLOCK_N=32, BLOCK_K=16)
UNEVEN_SUMS = Config.of(BLOCK_M=64, BLOCK_N=32, BLOCK_P=16)


@pytest.mark.parametrize("name", ("flat", "flat, outputs on rows", "padded", "outputs on rows"))
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("cast", (False, True))
def test_either_operand_or_both_may_be_computed(device: str, name: str, masked: bool, cast: bool) -> None:
    """By the activation's derivative, or by a cast of an image of few channels: which operand of the product is the
    left one depends on it."""
    p = Problem(device, name, torch.bfloat16)
    if cast and not p.g.flattened:
        pytest.skip("only images of few channels are cast in the kernel")
    x = p.x.float() if cast else p.x
    packed = conv.launch_pack(p.w, p.g, p.dtype)
    y, _ = conv.launch_forward(x, packed, p.b, p.g, "relu", config=UNEVEN)
    assert_close(y, F.relu(p.z), p.g.reduction, dtype=p.dtype, name="y")
    dy = p.dy if masked else conv_backward.launch_mask(p.dy, p.saved, "relu")
    through = (p.saved, "relu") if masked else (None, None)
    for transposed in (False, True):
        packed = conv.launch_pack(p.w, p.g, p.dtype, transposed)
        dx = conv_backward.launch_dgrad(dy, packed, p.g, p.dtype, True, transposed, *through, config=UNEVEN)
        assert_close(dx, p.truths[0], p.g.taps * p.g.group_out, name="dx")
    workspace = conv_backward.launch_wgrad(x, dy, p.g, True, False, *through, UNEVEN_SUMS, runs=2)
    assert workspace.shape[0] == 2
    dw, _ = conv_backward.launch_merge(workspace, p.g, p.w, None, MERGE)
    assert_close(dw, p.truths[1], dy.numel() // p.g.out_channels, dtype=p.dtype, name="dw")


def test_no_pixels_have_no_weight_gradient(device: str, launches: list[str]) -> None:
    """Zeros, without the kernel, which takes a run to have some."""
    p = Problem(device, "padded", torch.float32)
    workspace = conv_backward.launch_wgrad(p.x[:0], p.dy[:0], p.g)
    assert "conv_wgrad_kernel" not in launches
    dw, db = conv_backward.launch_merge(workspace, p.g, p.w, p.b, MERGE)
    assert torch.equal(dw.cpu(), torch.zeros(p.w.shape))
    assert torch.equal(db.cpu(), torch.zeros(p.b.shape))


@pytest.mark.parametrize("channels", ((20, 40), (40, 20)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_pointwise_products_normalise_what_they_load(
    device: str, channels: tuple[int, int], dtype: torch.dtype
) -> None:
    """Batch norm and ReLU in the prologue of forward and weight gradient, whichever of the channels are the more."""
    c_in, c_out = channels
    g = geometry((2, c_in, 5, 7), (c_out, c_in, 1, 1), (1, 1), (0, 0), (1, 1), 1)
    x = torch.randn(2, c_in, 5, 7).to(dtype).contiguous(memory_format=CL)
    w = torch.randn(c_out, c_in, 1, 1).to(dtype)
    mean, var, scale, shift = torch.randn(c_in), torch.rand(c_in) + 0.5, torch.randn(c_in), torch.randn(c_in)
    a = F.relu(F.batch_norm(x.double(), *(t.double() for t in (mean, var, scale, shift)), eps=1e-5)).to(dtype).double()
    leaf = w.double().requires_grad_()
    truth = F.conv2d(a, leaf)
    dy = torch.randn(truth.shape).to(dtype).contiguous(memory_format=CL)
    (dw_truth,) = torch.autograd.grad(truth, leaf, dy.double())
    norm = Norm(*(t.to(device) for t in (mean, var, scale, shift)), 1e-5)
    x, w, dy = x.to(device), w.to(device), dy.to(device)
    y, _ = pointwise.launch_forward(x, norm, conv.launch_pack(w, g, dtype), None, g, config=UNEVEN)
    assert_close(y, truth, c_in, name="y")
    workspace = pointwise.launch_wgrad(x, norm, dy, g, config=UNEVEN_SUMS)
    dw, _ = conv_backward.launch_merge(workspace, g, w, None, MERGE)
    assert_close(dw, dw_truth, 70, name="dw")


def test_bias_gradient_alone(device: str) -> None:
    p = Problem(device, "padded", torch.float32)
    workspace = conv_backward.launch_wgrad(p.dy, p.dy, p.g, False, True, p.saved, "relu", SUMS, runs=3)
    assert workspace.shape[1] == p.g.out_channels
    dw, db = conv_backward.launch_merge(workspace, p.g, None, p.b, MERGE)
    assert dw is None
    assert_close(db, p.truths[2], 60, name="db")


def test_mask_changes_layout(device: str) -> None:
    """NCHW output saved, strided gradient: one pass makes dz NHWC."""
    p = Problem(device, "padded", torch.float32)
    dy = F.pad(p.dy.contiguous(), (1, 1))[..., 1:-1]
    dz = conv_backward.launch_mask(dy, p.saved.contiguous(), "relu", Config.of(BLOCK_P=16, BLOCK_C=8))
    assert torch.equal(dz, torch.where(p.saved > 0, p.dy, 0))
    assert dz.is_contiguous(memory_format=CL)


@pytest.mark.parametrize(
    "channels, multiplier, window, stride, padding, dilation, dtype, channels_last",
    (
        (10, 1, (3, 3), (1, 1), (1, 1), (1, 1), torch.float16, True),
        (5, 3, (3, 2), (2, 3), (1, 0), (2, 1), torch.bfloat16, True),
        (10, 2, (2, 3), (2, 1), (0, 2), (1, 2), torch.float32, False),
        (10, 1, (2, 2), (1, 1), (0, 0), (1, 1), torch.float32, False),
    ),
)
def test_depthwise(
    device: str,
    channels: int,
    multiplier: int,
    window: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    dtype: torch.dtype,
    channels_last: bool,
) -> None:
    g = geometry((2, channels, 6, 7), (channels * multiplier, 1, *window), stride, padding, dilation, channels)
    x = torch.randn(2, channels, 6, 7).to(dtype).contiguous(memory_format=CL)
    w, b = torch.randn(g.out_channels, 1, *window), torch.randn(g.out_channels)
    leaves = [t.double().requires_grad_() for t in (x, w, b)]
    truth = F.conv2d(leaves[0], leaves[1], leaves[2], stride, padding, dilation, channels)
    dy = torch.randn(truth.shape).to(dtype).contiguous(memory_format=CL)
    dx_truth, dw_truth, db_truth = torch.autograd.grad(truth, leaves, dy.double())
    x, w, b, dy = (t.to(device) for t in (x, w, b, dy))
    tile = Config.of(BLOCK_P=16, BLOCK_C=4)
    y, z = conv_depthwise.launch_forward(x, w, b, g, "relu", True, channels_last, tile)
    assert_close(z, truth, g.taps, name="z")
    assert_close(y, F.relu(truth), g.taps, name="y")
    dx = conv_depthwise.launch_dgrad(dy, w, g, dtype, channels_last, tile)
    assert_close(dx, dx_truth, g.taps * multiplier, name="dx")
    workspace = conv_depthwise.launch_wgrad(x, dy, g, True, Config.of(BLOCK_T=2, BLOCK_P=4, BLOCK_C=4), runs=3)
    assert workspace.shape[0] > 1
    dw, db = conv_backward.launch_merge(workspace, g, w, b, MERGE)
    pixels = dy.numel() // g.out_channels
    assert_close(dw, dw_truth, pixels, name="dw")
    assert_close(db, db_truth, pixels, name="db")


def images(n: int, channels: int, size: int) -> Tensor:
    return torch.empty(n, size, size, channels, device="cuda", dtype=torch.bfloat16).permute(0, 3, 1, 2)


@pytest.mark.gate("aot")
@pytest.mark.parametrize("shape, groups", (((64, 64), 1), ((256, 256), 1), ((3, 32), 1), ((32, 32), 32)))
def test_batches_share_compiled_kernels(shape: tuple[int, int], groups: int) -> None:
    """Batches of 256, 250, 17 and 1: one specialisation of each kernel."""
    from perf.static import aot

    c_in, c_out = shape
    g = geometry((1, c_in, 16, 16), (c_out, c_in // groups, 3, 3), (1, 1), (1, 1), (1, 1), groups)

    def step(n: int) -> None:
        x, dy = images(n, c_in, 16), images(n, c_out, 16)
        w, b = torch.empty(c_out, c_in // groups, 3, 3, device="cuda"), torch.empty(c_out, device="cuda")
        conv_backward.launch_mask(dy, dy, "relu")
        if groups > 1:
            conv_depthwise.launch_forward(x, w, b, g, "relu")
            conv_depthwise.launch_dgrad(dy, w, g, dy.dtype)
            workspace = conv_depthwise.launch_wgrad(x, dy, g)
        else:
            packed = conv.launch_pack(w, g, x.dtype)
            conv.launch_forward(x, packed, b, g, "relu")
            conv_backward.launch_dgrad(dy, packed, g, dy.dtype)
            workspace = conv_backward.launch_wgrad(x, dy, g)
        conv_backward.launch_merge(workspace, g, w, b)

    keys = []
    for n in (256, 250, 17, 1):
        with aot.recording("sm_90") as launched:
            step(n)
        keys.append([aot.specialisation(launch, "sm_90") for launch in launched])
    assert all(key == keys[0] for key in keys[1:])
