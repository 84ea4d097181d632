"""Values that a CPU's compiled passes cannot take, as they sum in float32: torch's own calls take over, for that call.

And what a stage hands out: results that may be written to, and running statistics that move as torch moves them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tkernels.functional as TF
import tkernels.nn as tnn
from tests.cpu.profiles import events
from tkernels.core import activation as activations
from tkernels.core.records import BatchNorm
from tkernels.cpu import chain, compiler, norm
from tkernels.cpu import stage as conv_stage_cpu

pytestmark = [
    pytest.mark.gate("torch"),
    pytest.mark.skipif(not compiler.enabled(), reason="TKERNELS_COMPILE=0 or no C++ compiler"),
]

CL = torch.channels_last
NATIVE, PASS = "aten::native_batch_norm", "tkernels: batch norm relu"
NAN, INF = float("nan"), float("inf")


def batch(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and bias of a batch norm that takes the passes, spoiled in one way."""
    x, weight, bias = torch.randn(64, 32, 32, 32).contiguous(memory_format=CL), torch.rand(32) + 0.5, torch.randn(32)
    if kind == "large":
        x[3, 5, 7, 9], x[4, 6, 1, 1] = 1e30, -1e30
    elif kind == "large mean":
        x[:, 2] = 1e17
        x[:32, 2] = -1e17
    elif kind == "huge":
        x[3, 5] = 3e38
    elif kind == "nan":
        x[3, 5, 7, 9] = NAN
    elif kind == "inf":
        x[3, 5, 7, 9] = -INF
    elif kind == "weight":
        weight[4], bias[4], weight[5] = INF, 1.0, NAN
    return x, weight, bias


def run(
    call: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """The result, running mean and variance, and the gradients of all three."""
    given = [t.clone().requires_grad_() for t in (x, weight, bias)]
    mean, var = torch.zeros(32), torch.ones(32)
    y = call(given[0], mean, var, given[1], given[2])
    torch.manual_seed(1)
    return y, mean, var, torch.autograd.grad(y, given, torch.randn(y.shape).contiguous(memory_format=CL))


def torchs(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, mean, var, weight, bias, True, 0.1, 1e-5))


def ours(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return TF.batch_norm(x, mean, var, weight, bias, True, 0.1, 1e-5, "relu")


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("kind", ["large", "large mean", "huge", "nan", "inf", "weight"])
def test_batch_norm(kind: str) -> None:
    x, weight, bias = batch(kind)
    y, mean, var, gradients = run(ours, x, weight, bias)
    expected, torchs_mean, torchs_var, torchs_gradients = run(torchs, x, weight, bias)
    for a, b in ((y, expected), (mean, torchs_mean), (var, torchs_var), *zip(gradients, torchs_gradients)):
        same(a, b)
    with torch.no_grad():
        statistics = torch.zeros(32), torch.ones(32)
        same(ours(x, *statistics, weight, bias), expected)
        same(torch.stack(statistics), torch.stack((torchs_mean, torchs_var)))


def test_torch_takes_over_for_that_call_alone() -> None:
    x, weight, bias = batch("")
    spoiled = batch("large")[0]
    for given, expected in ((x, [PASS]), (spoiled, [PASS, NATIVE]), (x, [PASS])):
        # (warm: a first call compiles)
        ours(given, torch.zeros(32), torch.ones(32), weight, bias)

        def call(given: Tensor = given) -> None:
            ours(given, torch.zeros(32), torch.ones(32), weight, bias)

        assert events(call, (PASS, NATIVE)) == expected


def stages() -> tuple[tnn.ConvStage, nn.Sequential]:
    torch.manual_seed(0)
    stage = tnn.ConvStage([8, 16, 16], 3, padding=1, pool=2, dropout=0.25)
    plain = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.25),
    )  # fmt: skip
    plain.load_state_dict(dict(zip(plain.state_dict(), stage.state_dict().values())))
    return stage.to(memory_format=CL), plain.to(memory_format=CL)


def spoil(kind: str, x: Tensor, *models: nn.Module) -> None:
    parameters = [list(model.parameters()) for model in models]
    with torch.no_grad():
        if kind == "image":
            x[1, 2, 3, 4] = 1e25
        elif kind == "nan":
            x[1, 2, 3, 4] = NAN
        for own in parameters:
            if kind == "weight":
                own[4][0, 0, 0, 0] = 1e25
            elif kind == "scale":
                own[2][3] = INF


@pytest.mark.parametrize("kind", ["image", "weight", "scale", "nan"])
@pytest.mark.parametrize("training", [True, False])
def test_stage(kind: str, training: bool) -> None:
    stage, plain = stages()
    x = torch.randn(16, 8, 32, 32).contiguous(memory_format=CL)
    spoil(kind, x, stage, plain)
    found = []
    for model in (stage.train(training), plain.train(training)):
        images = x.clone().requires_grad_(training)
        torch.manual_seed(3)
        with torch.set_grad_enabled(training):
            y = model(images)
        results = [y, torch.rand(1)]  # the same draws were taken
        if training:
            results += torch.autograd.grad(y, [images, *model.parameters()], torch.ones_like(y))
        found.append([*results, *(t.clone() for t in model.buffers())])
    for number, (a, b) in enumerate(zip(*found)):
        # (gradients of the convolutions' biases are 0, or rounding)
        if not (training and number in (4, 8) and b.isfinite().all()):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3, equal_nan=True, msg=lambda m, n=number: f"{n}: {m}")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch", [2, 32])
@pytest.mark.parametrize("layout", [CL, torch.contiguous_format])
def test_what_a_stage_gives_may_be_written_to(layout: Any, batch: int, training: bool) -> None:
    stage, _ = stages()
    stage.train(training).to(memory_format=layout)
    x = torch.randn(batch, 8, 32, 32).contiguous(memory_format=layout)
    y = stage(x)
    assert not y._is_view()
    twin = copy.deepcopy(y.detach())
    y += 1
    torch.testing.assert_close(y.detach(), twin + 1)
    if training:
        y.sum().backward()


def test_running_statistics_move_as_torch_moves_them() -> None:
    """No graph that saved them notices: what torch lets pass (two forwards, then a backward of the first) goes on."""
    stage, plain = stages()
    x = torch.randn(16, 8, 32, 32).contiguous(memory_format=CL)
    versions = []
    for model in (stage, plain):
        before = [t._version for t in model.buffers()]
        model(x)
        versions.append([t._version - number for t, number in zip(model.buffers(), before)])
    assert versions[0] == versions[1] == [0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("images", [CL, torch.contiguous_format])
@pytest.mark.parametrize("weights", [CL, torch.contiguous_format])
def test_gradients_are_laid_out_as_torch_s(images: Any, weights: Any) -> None:
    found = []
    for model in stages():
        model.to(memory_format=weights)
        x = torch.randn(16, 8, 32, 32).contiguous(memory_format=images).requires_grad_()
        y = model(x)
        gradients = torch.autograd.grad(y.sum(), [x, *model.parameters()])
        found.append([t.stride() for t in (y, *gradients)])
    assert found[0] == found[1]


def test_one_value_for_each_channel_is_refused_at_any_size() -> None:
    x = torch.randn(1, 1 << 20)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        TF.batch_norm(x, None, None, training=True, activation="relu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [(1, 2), (1, 3), (2, 1), (2, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_images_of_one_channel(
    stride: tuple[int, int], dtype: torch.dtype, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN by name is wrong for some of them: it is not called then."""
    monkeypatch.setattr(conv_stage_cpu, "WORTH_IT", 1)
    for width, maps in itertools.product((1, 2, 4, 28), (4, 16)):
        x = torch.randn(33, 1, 12, width).to(dtype).contiguous(memory_format=CL)
        weight = torch.randn(maps, 1, 3, 3).to(dtype)
        statistics = [(torch.zeros(maps), torch.ones(maps)) for _ in range(2)]
        layer = TF.ConvBNLayer(weight, None, None, None, *statistics[0], stride=stride, padding=1)
        with torch.no_grad():
            y = TF.conv_stage(x, [layer], training=training)
            z = F.conv2d(x.float(), weight.float(), None, stride, 1)
            expected = F.relu(F.batch_norm(z, *statistics[1], training=training))
        assert (y - expected).norm() <= (1e-5 if dtype is torch.float32 else 2e-2) * expected.norm()
        assert (statistics[0][1] - statistics[1][1]).norm() <= 1e-2 * statistics[1][1].norm()


@pytest.mark.parametrize("activation", ["relu", "silu", None])
@pytest.mark.parametrize("value", [0.0, INF])
@pytest.mark.parametrize("again", [True, False])
def test_a_gradient_of_the_residual_alone(activation: str | None, value: float, again: bool) -> None:
    """As where a pretrained trunk is frozen and what is added to it is trained."""
    x = torch.randn(16, 8, 24, 24).contiguous(memory_format=CL)
    x[1, 2, 3, 4] = value
    residual = torch.randn_like(x).requires_grad_()
    bn = BatchNorm(None, None, torch.ones(8), torch.zeros(8), True, 0.1, 1e-5)
    y = norm.normalize(x, bn, activation, residual, recorded=True)
    found = torch.autograd.grad(y, residual, torch.ones_like(y), create_graph=again)[0]
    z = F.batch_norm(x, None, None, torch.ones(8), torch.zeros(8), True) + residual
    expected = torch.autograd.grad(activations.apply(z, activation), residual, torch.ones_like(y))[0]
    same(found, expected)


def test_gradients_to_be_differentiated_may_be_written_to() -> None:
    x, weight, bias = batch("")
    x.requires_grad_()
    y = ours(x, torch.zeros(32), torch.ones(32), weight, bias)
    (g,) = torch.autograd.grad(y.square().mean(), x, create_graph=True)
    g *= 2
    g.square().sum().backward()
    assert x.grad is not None


def negated(t: Tensor) -> Tensor:
    """``t`` as memory of the opposite sign, as the imaginary part of a conjugate is."""
    view: Tensor = torch._neg_view(-t)  # type: ignore[attr-defined]
    assert view.is_neg()
    assert view.stride() == t.stride()
    return view


@pytest.mark.parametrize("which", range(3))
def test_batch_norm_of_negated_views(which: int) -> None:
    x, weight, bias = (t.detach() for t in batch(""))
    given: list[Tensor] = [x, weight, bias]
    given[which] = negated(given[which])
    y = ours(given[0], torch.zeros(32), torch.ones(32), *given[1:])
    torch.testing.assert_close(y, torchs(x, torch.zeros(32), torch.ones(32), weight, bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_stage_of_negated_views(training: bool) -> None:
    x = torch.randn(16, 8, 64, 64)
    weight, bias, bn_weight, bn_bias = torch.randn(16, 8, 3, 3), torch.randn(16), torch.rand(16), torch.randn(16)
    plain = [x, weight, bias, bn_weight, bn_bias]
    for which in range(5):
        mean, var = torch.zeros(16), torch.ones(16)
        given = [negated(t) if i == which else t for i, t in enumerate(plain)]
        with torch.no_grad():
            y = TF.conv_stage(given[0], [TF.ConvBNLayer(*given[1:], mean, var)], None, 0.0, training)
            z = F.conv2d(x, weight, bias)
            expected = F.relu(F.batch_norm(z, torch.zeros(16), torch.ones(16), bn_weight, bn_bias, training))
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("which", range(4))
def test_chain_of_negated_views(which: int, training: bool) -> None:
    x = torch.randn(8, 16, 24, 24).contiguous(memory_format=CL)
    plain = [x, torch.rand(16) + 0.5, torch.randn(16), torch.randn_like(x)]
    made = chain.plan(
        chain.Chain(tuple(x.shape), True, None, None, chain.Norm(training, 0.1, 1e-5), True, "relu", x.dtype, False)
    )
    assert not isinstance(made, str)
    given = [negated(t) if i == which else t for i, t in enumerate(plain)]
    with torch.no_grad():
        y = made(given[0], None, None, torch.zeros(16), torch.ones(16), given[1], given[2], given[3])
    normed = F.batch_norm(x, torch.zeros(16), torch.ones(16), plain[1], plain[2], training)
    torch.testing.assert_close(y, F.relu(normed + plain[3]), rtol=1e-4, atol=1e-4)


def _normed(x: Tensor) -> Tensor:
    return ours(x, torch.zeros(64), torch.ones(64), torch.ones(64), torch.zeros(64))


def _staged(x: Tensor) -> Tensor:
    weight = torch.linspace(-1, 1, 16 * 64 * 9, dtype=x.dtype).view(16, 64, 3, 3)
    layer = TF.ConvBNLayer(weight, None, torch.ones(16), torch.zeros(16), torch.zeros(16), torch.ones(16))
    return TF.conv_stage(x, [layer], None, 0.0, True)


def _lost(x: Tensor) -> Tensor:
    return TF.cross_entropy(x.permute(0, 2, 3, 1).reshape(4096, 1024), torch.arange(4096) % 1000)


CALLS = [(_normed, "native_batch_norm"), (_staged, "convolution"), (_lost, "log_softmax")]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*jit.trace:FutureWarning")
@pytest.mark.parametrize(("call", "torchs_own"), CALLS)
def test_who_watches_torchs_calls_sees_them(call: Callable[[Tensor], Tensor], torchs_own: str) -> None:
    """A mode is shown what runs; a pass of ours in a recording of torch.jit would be a constant."""
    x, other = (torch.randn(64, 64, 32, 32).contiguous(memory_format=CL) for _ in range(2))
    plain = call(x)
    assert events(lambda: call(x), ()), "a pass of ours"
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        watched = call(x)
    assert any(torchs_own in name for name in seen), seen
    torch.testing.assert_close(watched, plain, rtol=1e-4, atol=1e-4)
    traced = torch.jit.trace(call, x, check_trace=False)
    torch.testing.assert_close(traced(other), call(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("call", "torchs_own"), CALLS)
def test_float16_is_torchs(call: Callable[[Tensor], Tensor], torchs_own: str) -> None:
    x = torch.randn(64, 64, 32, 32, dtype=torch.float16).contiguous(memory_format=CL)
    with torch.no_grad():
        found = events(lambda: call(x), (torchs_own,))
    assert any(torchs_own in name for name in found)
    assert not any(name.startswith("tkernels: ") for name in found)


def test_vectors_and_targets_of_other_dtypes_are_torchs() -> None:
    """Which takes bfloat16 vectors beside bfloat16 images and refuses the others."""
    x = torch.randn(64, 64, 32, 32).contiguous(memory_format=CL)
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(RuntimeError, match="statistics of a torch"):
            ours(x, torch.zeros(64, dtype=dtype), torch.ones(64, dtype=dtype), torch.ones(64), torch.zeros(64))
    vectors = [torch.full((64,), value, dtype=torch.bfloat16) for value in (0.0, 1.0, 1.0, 0.0)]
    assert NATIVE in events(lambda: ours(x.bfloat16(), *vectors), (PASS, NATIVE))
    with pytest.raises(RuntimeError, match="int32"):
        TF.cross_entropy(torch.randn(4096, 1024), torch.zeros(4096, dtype=torch.int32))
