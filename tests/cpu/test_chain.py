"""Chains of layers on a CPU: values and gradients against float64 and torch's own error, and which passes ran."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import config as inductor
from torch._inductor.graph import GraphLowering

from tests.cpu.profiles import events
from tkernels.core import activation as activations
from tkernels.cpu import buffers, chain, compiler, convolution, norm, packed
from tkernels.cpu.chain import Chain, Conv, Norm

pytestmark = [
    pytest.mark.gate("torch"),
    pytest.mark.skipif(not compiler.enabled(), reason="passes are not compiled here: no C++ compiler, or turned off"),
]

CL = torch.channels_last
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
NAMES = ("input", "weight", "bias", "bn_weight", "bn_bias", "residual")
# relative norm of the error against torch's own, both at least one eps, plus what one draw may be off by luck
WORSE, LUCK = 1.25, 0.25
PLAIN = Conv((1, 1), (1, 1), (1, 1), 1)
# weight, convolution, and how its gradients are found in float32 and in bfloat16
CONVOLUTIONS: dict[str, Any] = {
    "3x3": ((16, 24, 3, 3), PLAIN, None, None),
    "1x1": ((16, 24, 1, 1), Conv((1, 1), (0, 0), (1, 1), 1), None, ("product", "product")),
    "1x1, strided": ((16, 24, 1, 1), Conv((2, 2), (0, 0), (1, 1), 1), None, None),
    "1x1 of an image, strided": (
        (48, 3, 1, 1), Conv((2, 2), (0, 0), (1, 1), 1), ("torch", "product"), ("torch", "product")
    ),
    "grouped": ((16, 12, 3, 3), PLAIN._replace(groups=2), None, None),
    "grouped, dilated": (
        (16, 12, 3, 3), PLAIN._replace(padding=(2, 2), dilation=(2, 2), groups=2), None, ("torch", "float32")
    ),
    "depthwise": ((24, 1, 3, 3), PLAIN._replace(groups=24), None, None),
    "depthwise, strided": ((24, 1, 3, 3), Conv((2, 2), (1, 1), (1, 1), 24), None, ("float32", "float32")),
    "depthwise 5x5": ((24, 1, 5, 5), Conv((1, 1), (2, 2), (1, 1), 24), ("torch", "places"), ("torch", "places")),
    "depthwise 5x3, strided": (
        (24, 1, 5, 3), Conv((2, 1), (2, 0), (1, 1), 24), ("torch", "places"), ("float32", "places")
    ),
    "same": ((16, 24, 3, 3), PLAIN._replace(padding="same"), None, None),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _compiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Buffers of any size come from the pool, and weights of any size are kept."""
    monkeypatch.setattr(buffers, "SMALLEST", 0)
    monkeypatch.setattr(packed, "WORTH_IT", dict.fromkeys(packed.WORTH_IT, 0))
    yield
    assert compiler.enabled(), "a pass did not compile"


def table(residuals: tuple[bool, ...] = ()) -> list[Any]:
    """Activations, each in both dtypes, and with and without residual where asked for. A pass computes in float32
    whatever it reads, and each compiles for seconds: all activations are taken in one way, two in every way, and what
    remains is exhaustive."""
    found = []
    dtypes = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    for given in itertools.product(activations.ACTIVATIONS, dtypes, *[residuals] * bool(residuals)):
        activation, dtype, *residual = given
        everyday = activation in ("relu", "gelu") or (dtype is torch.float32 and residual != [True])
        name = f"{activation}-{dtypes[dtype]}{'-residual' * (residual == [True])}"
        found.append(pytest.param(*given, id=name, marks=() if everyday else pytest.mark.extended("torch")))
    return found


def described(
    shape: tuple[int, ...], weight: tuple[int, ...] | None = None, conv: Conv | None = None, training: bool = True,
    residual: bool = False, activation: str | None = "relu", dtype: torch.dtype = torch.float32,
) -> Chain:  # fmt: skip
    return Chain(shape, True, weight, conv, Norm(training, 0.1, 1e-5), residual, activation, dtype, training)


def tensors(given: Chain, bias: bool = False) -> dict[str, Tensor]:
    """What a call of the chain takes; maps in its dtype, parameters in float32."""
    torch.manual_seed(0)
    channels = given.weight[0] if given.weight is not None else given.input[1]
    x = torch.randn(given.input) * 2 + 1
    found = {"input": x.to(given.dtype)}
    if given.weight is not None:
        found["weight"] = torch.randn(given.weight) / 3
        if bias:
            found["bias"] = torch.randn(channels)
    found |= {"running_mean": torch.randn(channels), "running_var": torch.rand(channels) + 0.5}
    found |= {"bn_weight": torch.rand(channels) + 0.5, "bn_bias": torch.randn(channels)}
    if given.residual:
        found["residual"] = torch.randn(given.input).to(given.dtype)
    return {k: t.contiguous(memory_format=CL) if t.dim() == 4 else t for k, t in found.items()}


def called(run: Any, own: dict[str, Tensor], given: Chain, exact: bool = False) -> Tensor:
    names = ("input", "weight", "bias", "running_mean", "running_var", "bn_weight", "bn_bias", "residual")
    with torch.autocast("cpu", torch.bfloat16, enabled=given.dtype is torch.bfloat16 and not exact):
        y: Tensor = run(*(own.get(name) for name in names))
    return y


def results(run: Any, own: dict[str, Tensor], given: Chain, dy: Tensor, exact: bool = False) -> dict[str, Tensor]:
    """The result, moved statistics and all gradients."""
    own = {k: t.double() if exact else t.clone() for k, t in own.items()}
    leaves = {k: own[k].requires_grad_() for k in NAMES if k in own}
    y = called(run, own, given, exact)
    assert given.differentiated == (y.grad_fn is not None)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype)) if given.differentiated else ()
    return {"result": y.detach(), "mean": own["running_mean"], "var": own["running_var"],
            **dict(zip(leaves, gradients))}  # fmt: skip


def compare(given: Chain, bias: bool = False) -> None:
    run, composed = chain.plan(given), chain._composed(given)
    assert not isinstance(run, str), run
    own = tensors(given, bias)
    with torch.set_grad_enabled(given.differentiated):
        dy = torch.randn(called(composed, own, given).shape)
        ours, torchs = (results(f, own, given, dy) for f in (run, composed))
        exact = results(composed, own, given, dy.to(given.dtype), exact=True)
    for name, reference in exact.items():
        a, b = ours[name], torchs[name]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        if name in ("result", "input"):
            assert a.is_contiguous(memory_format=CL) == b.is_contiguous(memory_format=CL) or a.dim() == 2, name
        # (a bias before batch norm has no gradient but rounding)
        scale = max(torch.linalg.vector_norm(reference).item(), 1e-2 * reference.numel() if name == "bias" else 0.0)
        errors = [torch.linalg.vector_norm(t.double() - reference).item() / scale for t in (a, b)]
        eps = torch.finfo(given.dtype if name != "mean" and name != "var" else torch.float32).eps
        assert max(errors[0], eps) <= WORSE * max(errors[1], eps) + LUCK * eps, (name, errors)


def passes_in(given: Chain, backward: bool = False) -> list[str]:
    """The names of the passes that a call goes through, and what torch's own batch norms and activations it makes."""
    own = {k: t.requires_grad_(backward and k in NAMES) for k, t in tensors(given).items()}
    run = chain.plan(given)

    def call() -> None:
        with torch.set_grad_enabled(backward):
            y = called(run, own, given)
            if backward:
                y.backward(torch.ones_like(y))

    found = events(call, ("batch_norm", "relu", "silu", "threshold", "hardtanh"))
    return [name.removeprefix("tkernels: ") for name in found]


@pytest.mark.parametrize("activation, dtype, residual", table((False, True)))
def test_batch_norm_in_training(activation: str | None, dtype: torch.dtype, residual: bool) -> None:
    for shape in ((5, 24, 7, 9), (1, 8, 6, 6)):
        compare(described(shape, residual=residual, activation=activation, dtype=dtype))


@DTYPES
@pytest.mark.parametrize(
    "shape", ((48, 24), (13, 5), (1009, 3), (17, 33, 1, 1), (8, 3, 16, 8), (16, 24, 6, 6), (2, 4, 64, 64)), ids=str
)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(described(shape, dtype=dtype))
    compare(described(shape, training=False, residual=True, dtype=dtype))


def test_rows_are_whole_vectors() -> None:
    """Pixels side by side, where a power of two divides them: the values of every channel still meet."""
    sizes = {c: norm._layout(16 * 28 * 28, c, 2, norm.WHOLE)[0] for c in (16, 24, 32, 40, 3, 480)}
    assert sizes == {
        c: (16 * 28 * 28 // rows // lanes, rows, lanes, c)
        for c, rows, lanes in ((16, 128, 2), (24, 112, 4), (32, 128, 1), (40, 112, 4), (3, 49, 32), (480, 128, 1))
    }  # fmt: skip
    assert norm._layout(49, 24, 2, norm.WHOLE) == ((1, 49, 1, 24), (49 * 24, 24, 24, 1))
    assert norm._layout(1 << 12, 16, 4, norm.LONG)[0] == (8, 16, 32, 16)
    for pixels in (*range(1, 70), 3136, 12544, 1 << 20):
        for channels in (1, 3, 8, 17, 24, 96, 1000):
            for least in (norm.WHOLE, norm.LONG):
                shape, strides = norm._layout(pixels, channels, 4, least)
                assert math.prod(shape[:3]) == pixels
                assert torch.empty(shape, device="meta").stride() == strides


@pytest.fixture
def code_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The code that Inductor writes for a pass and arguments of these kinds."""
    written: list[str] = []
    monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(written.append))

    def compiled(run: compiler.Pass, *arguments: Tensor) -> str:
        with inductor.patch(force_disable_caches=True), compiler._compiling():
            compiler._by_inductor(run.function, arguments, run.channels)
        return written.pop()

    return compiled


def test_loops_run_over_pixels_and_channels_as_one(code_of: Callable[..., str]) -> None:
    """Equal values come from loops over each pixel's channels too."""
    pixels, vectors = torch.randn(16, 8, 4, 24), [torch.rand(24) for _ in range(4)]
    number, out = torch.tensor(0.1), torch.empty(16, 8, 4, 24)
    finish, batch_norm = norm.Finish("relu", True, False, True), norm.Passes("relu", False)
    for loops, code in (
        (1, code_of(finish.run, pixels, *vectors, number)),
        # the first group's means, the groups' sums, the result
        (3, code_of(batch_norm.forward, pixels, *vectors, number, number, out)),
        # the sums, the result
        (2, code_of(batch_norm.backward, pixels, pixels, vectors[0], *(torch.rand(4, 24) for _ in range(3)), out)),
    ):
        wide = r"x\d<static_cast<int64_t>\(ks\d\*ks\d\); x\d\+=static_cast<int64_t>\((?:8|16|32)L\)"
        assert len(re.findall(wide, code)) >= loops, code


def test_the_first_call_decides_nothing(code_of: Callable[..., str]) -> None:
    """Inductor vectorises by the sizes that it sees: a few channels would leave slow code for all."""

    def loops(channels: int) -> list[str]:
        pixels, vectors = torch.randn(16, 8, 4, channels).bfloat16(), [torch.rand(channels) for _ in range(4)]
        code = code_of(norm.Finish("hardswish", True, False, True).run, pixels, *vectors, torch.tensor(0.1))
        return [line.strip() for line in code.splitlines() if "for(int64_t" in line or "loadu" in line]

    assert len(loops(256)) > 2
    assert loops(2) == loops(16) == loops(256)


@DTYPES
def test_far_from_zero(dtype: torch.dtype) -> None:
    """Variances of large values: rows of several pixels, whose sums are taken about means of their own."""
    given = described((8, 8, 16, 16), dtype=dtype, activation=None)
    own = tensors(given)
    own["input"] = (torch.randn(8, 8, 16, 16) + 1000.0).to(dtype).contiguous(memory_format=CL)
    y = chain.plan(given)(own["input"], None, None, own["running_mean"], own["running_var"], own["bn_weight"],
                          own["bn_bias"], None)  # type: ignore[operator]  # fmt: skip
    exact = F.batch_norm(own["input"].double(), None, None, own["bn_weight"].double(), own["bn_bias"].double(), True)
    torch.testing.assert_close(y.double(), exact, rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-3)


@DTYPES
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_in_training(name: str, dtype: torch.dtype) -> None:
    weight, conv, *ways = CONVOLUTIONS[name]
    given = described((4, weight[1] * conv.groups, 9, 8), weight, conv, dtype=dtype)
    if conv.padding != "same":
        found = convolution.ways(4 * 72, weight, conv.stride, conv.padding, conv.dilation, conv.groups, dtype)
        assert found == ways[dtype is torch.bfloat16]
    compare(given)
    if name in ("1x1", "depthwise 5x5"):
        compare(given, bias=True)


@pytest.mark.parametrize("activation, dtype", table())
def test_inference(activation: str | None, dtype: torch.dtype) -> None:
    for residual in (False, True):
        shape = (3, 24, 8, 7)
        compare(described(shape, None, None, False, residual, activation, dtype))
        compare(described(shape, (24, 24, 3, 3), PLAIN, False, residual, activation, dtype))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_in_inference(name: str) -> None:
    weight, conv, *_ = CONVOLUTIONS[name]
    for dtype in (torch.float32, torch.bfloat16):
        shape = (4, weight[1] * conv.groups, 9, 8)
        compare(described(shape, weight, conv, training=False, dtype=dtype), bias=True)


def test_convolution_and_activation_alone() -> None:
    given = described((4, 24, 9, 8), (16, 24, 3, 3), PLAIN, training=False)._replace(norm=None)
    own = tensors(given, bias=True)
    with torch.no_grad():
        y = called(chain.plan(given), own, given)
    torch.testing.assert_close(y, torch.relu(F.conv2d(own["input"], own["weight"], own["bias"], padding=1)))


def test_what_runs() -> None:
    residual = described((4, 16, 6, 6), (16, 16, 3, 3), PLAIN, residual=True)
    assert passes_in(residual, backward=True) == ["batch norm relu residual", "batch norm backward relu residual"]
    assert passes_in(described((4, 16, 6, 6), activation=None), backward=True) == [
        "batch norm linear", "batch norm backward linear",
    ]  # fmt: skip
    inference = described((4, 16, 6, 6), (16, 16, 3, 3), PLAIN, training=False, activation="silu")
    assert passes_in(inference) == ["weight fingerprint", "finish norm silu in place"]
    depthwise = described((4, 16, 6, 6), (16, 1, 5, 5), Conv((1, 1), (2, 2), (1, 1), 16))
    assert passes_in(depthwise, backward=True) == [
        "batch norm relu", "batch norm backward relu", "depthwise weight gradient 5x5 stride 1x1",
    ]  # fmt: skip


@pytest.mark.parametrize("write", ("data", "in place", "storage", "swapped", "layout", "sign"))
def test_a_kept_weight_notices_what_is_written(write: str) -> None:
    given = described((2, 24, 6, 6), (16, 24, 3, 3), PLAIN, training=False)
    run, composed, own = chain.plan(given), chain._composed(given), tensors(given)
    with torch.no_grad():
        called(run, own, given)
        weight = own["weight"]
        if write == "data":
            weight.data.mul_(0.5)
        elif write == "in place":
            weight[3, 4, 1, 2] += 1e-3
        elif write == "storage":
            weight.numpy()[:] = 0.25
        elif write == "swapped":
            weight.copy_(weight.flip(2))
        elif write == "layout":
            weight.data = weight.data.contiguous()
        else:
            weight[:, :2].neg_()
        torch.testing.assert_close(called(run, own, given), called(composed, own, given))


def test_a_kept_weight_serves_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    given = described((2, 24, 6, 6), (16, 24, 3, 3), PLAIN, training=False)
    kept = packed.Packed((1, 1), (1, 1), (1, 1), 1, torch.float32, given.input)
    own, made = tensors(given), []
    monkeypatch.setattr(packed, "Copy", lambda *args: made.append(args) or packed_copy(*args))
    for _ in range(3):
        kept(own["input"], own["weight"], None)
    assert len(made) == 1
    own["weight"][0, 0, 0, 0] += 1
    kept(own["input"], own["weight"], None)
    assert len(made) == 2
    for _ in range(2 * packed.KEPT):
        kept(own["input"], torch.randn(16, 24, 3, 3), None)
    assert len(kept.copies) <= packed.KEPT


packed_copy = packed.Copy


def test_one_graph_serves_other_batches_and_layouts() -> None:
    for training in (True, False):
        given = described((4, 24, 6, 6), (16, 24, 3, 3), PLAIN, training=training)
        run, composed = chain.plan(given), chain._composed(given)
        for batch, layout in ((1, CL), (7, CL), (33, CL), (4, torch.contiguous_format), (0, CL)):
            own = tensors(given)
            own["input"] = torch.randn(batch, 24, 6, 6).contiguous(memory_format=layout)
            if batch == 0 and training:
                continue
            with torch.set_grad_enabled(training):
                a, b = (called(f, {k: t.clone() for k, t in own.items()}, given) for f in (run, composed))
            torch.testing.assert_close(a, b)
            assert a.stride() == b.stride()


def test_one_channel() -> None:
    given = described((2, 1, 5, 4))
    own, dy = tensors(given), torch.randn(2, 1, 5, 4)
    ours, torchs = (results(f, own, given, dy) for f in (chain.plan(given), chain._composed(given)))
    for name, expected in torchs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=1e-5)


def test_a_single_value_for_each_channel_is_refused() -> None:
    given = described((2, 8, 1, 1))
    own = tensors(given) | {"input": torch.randn(1, 8, 1, 1)}
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        called(chain.plan(given), own, given)


@pytest.mark.parametrize("activation", ("relu", "silu"))
def test_nan_and_infinity_go_through(activation: str) -> None:
    for training in (True, False):
        given = described((3, 8, 5, 5), (8, 8, 3, 3), PLAIN, training, residual=True, activation=activation)
        own = tensors(given)
        own["residual"][0, 1, 2, 3], own["residual"][1, 2, 3, 4] = torch.nan, torch.inf
        own["residual"][2, 3, 4, 0] = -torch.inf
        with torch.set_grad_enabled(training):
            a, b = (called(f, own, given) for f in (chain.plan(given), chain._composed(given)))
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("wanted", ("input", "weight", "bn_weight", "bn_bias", "residual"))
def test_only_some_gradients(wanted: str) -> None:
    given = described((4, 16, 6, 6), (16, 16, 1, 1), Conv((1, 1), (0, 0), (1, 1), 1), residual=True,
                      dtype=torch.bfloat16)  # fmt: skip
    found = []
    for run in (chain.plan(given), chain._composed(given)):
        own = tensors(given)
        own[wanted].requires_grad_()
        y = called(run, own, given)
        found += torch.autograd.grad(y, own[wanted], torch.ones_like(y))
    torch.testing.assert_close(*found, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("residual", (False, True), ids=("", "residual"))
@pytest.mark.parametrize("activation", ("relu", "silu", None))
def test_double_backward(activation: str | None, residual: bool) -> None:
    given = described((3, 8, 5, 5), (8, 1, 5, 5), Conv((1, 1), (2, 2), (1, 1), 8), True, residual, activation)
    found = []
    for run in (chain.plan(given), chain._composed(given)):
        own = tensors(given)
        leaves = [own[k].requires_grad_() for k in NAMES if k in own]
        first = torch.autograd.grad(called(run, own, given).pow(3).sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first[:2]), leaves))
    largest = max(b.abs().max().item() for b in found[1])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-5 * largest)


def test_saved_tensors_in_another_layout() -> None:
    given = described((3, 8, 5, 6), (8, 1, 5, 5), Conv((1, 1), (2, 2), (1, 1), 8), residual=True)
    found = []
    for pack in (lambda t: t, lambda t: t.contiguous() if t.dim() == 4 else t):
        own = tensors(given)
        leaves = [own[k].requires_grad_() for k in NAMES if k in own]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = called(chain.plan(given), own, given)
        found.append(torch.autograd.grad(y, leaves, torch.ones_like(y)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("change", "reason"),
    (
        ({"channels_last": False}, "channels_last"), ({"dtype": torch.float64}, "float64"),
        ({"input": (2, 3, 4)}, "3 axes"), ({"norm": Norm(False, 0.1, 1e-5)}, "running statistics"),
        ({"norm": None}, "no batch norm"),
    ),
)  # fmt: skip
def test_reasons(change: dict[str, Any], reason: str) -> None:
    found = chain.plan(described((4, 8, 6, 6))._replace(**change))
    assert isinstance(found, str)
    assert reason in found


def test_a_map_of_one_pixel_leaves_the_pass_of_larger_ones_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A small image's last maps: the pass over a window's places did not compile for them, and then for no others."""
    monkeypatch.setattr(compiler, "_compiled", {})
    call = convolution.Call((1, 1), (2, 2), (1, 1), 24, torch.float32, convolution.Ways("torch", "places"))
    weight = torch.randn(24, 1, 5, 5, requires_grad=True)
    for shape in ((4, 24, 1, 1), (4, 24, 1, 6), (4, 24, 6, 7)):
        x = torch.randn(shape).contiguous(memory_format=CL)
        dy = torch.randn(shape).contiguous(memory_format=CL)
        (found,) = torch.autograd.grad(convolution.conv2d(call, x, weight, None), weight, dy)
        twin = weight.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(F.conv2d(x.double(), twin, None, 1, 2, 1, 24), twin, dy.double())
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        passes = [key[0] for key in compiler._compiled]
        assert passes == ["depthwise weight gradient 5x5 stride 1x1"] * (1 not in shape), shape
    assert "PyTorch runs it" not in caplog.text
