"""conv_stage against torch's own operators in float64: values, gradients, running statistics, pooling, dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tkernels
from tests.conv_stage.cases import (
    CASES,
    CL,
    FIELDS,
    assert_no_gradient,
    close,
    compare,
    doubled,
    layers_for,
    reference,
)
from tests.tolerance import assert_close
from tkernels.functional import ConvBNLayer, MaxPool, conv_stage

pytestmark = pytest.mark.gate("torch", "ttsem", "cuda")

SLOW = pytest.mark.extended("ttsem")
# what a case adds in evaluation to the others is the geometry, which training has been through
EVALUATED = ("rgb, 2 layers, pool", "one layer, no end", "gaps", "pool and dropout")


@pytest.mark.parametrize(
    "name, training",
    [(name, True) for name in CASES]
    + [pytest.param(name, False, marks=() if name in EVALUATED else SLOW) for name in CASES],
)
def test_equals_torch(name: str, training: bool, device: str) -> None:
    compare(name, device, training=training, memory_format=CL if training else torch.contiguous_format)


@pytest.mark.parametrize("dtype", (torch.bfloat16, pytest.param(torch.float16, marks=SLOW)))
def test_half_precision(dtype: torch.dtype, device: str) -> None:
    compare("rgb, 2 layers, pool", device, dtype)


def test_nchw_in_nchw_out(device: str) -> None:
    compare("3 layers, dropout", device)


def test_batch_norm_frozen_or_without_statistics(device: str) -> None:
    """A layer may keep to its running statistics in training, and have none in evaluation."""

    def freeze(layers: list[ConvBNLayer]) -> list[ConvBNLayer]:
        return [layers[0]._replace(training=False), layers[1]._replace(running_mean=None, running_var=None)]

    compare("rgb, 2 layers, pool", device, training=True, change=freeze)
    compare("rgb, 2 layers, pool", device, training=False, change=freeze)


def test_vectors_with_gaps(device: str) -> None:
    """Biases, batch norm's parameters and running statistics that are not contiguous, read and moved where they lie."""

    def gaps(layers: list[ConvBNLayer]) -> list[ConvBNLayer]:
        spread = {}
        for name in FIELDS:
            t = getattr(layers[0], name)
            if isinstance(t, Tensor) and t.dim() == 1:
                wide = torch.stack([t.detach(), torch.full_like(t, 9.0)], 1)
                spread[name] = wide[:, 0].requires_grad_(t.requires_grad)
        assert len(spread) == 5
        return [layers[0]._replace(**spread), *layers[1:]]

    for training in (True, False):
        compare("rgb, 2 layers, pool", device, training=training, change=gaps)


@pytest.mark.parametrize("momentum", (None, 0.3))
def test_momentum(momentum: float | None, device: str) -> None:
    (layer,) = layers_for(3, [(4, 1, {})], torch.float32, device)
    layer = layer._replace(momentum=momentum)
    (exact,) = doubled([layer])
    x = torch.randn(2, 3, 4, 5)
    conv_stage(x.to(device), [layer], training=True)
    factor = 1 / 4 if momentum is None else momentum
    z = F.conv2d(x.double(), exact.weight, exact.bias)
    F.batch_norm(z, exact.running_mean, exact.running_var, training=True, momentum=factor)
    assert_close(layer.running_mean, exact.running_mean, 40, name="running mean")
    assert_close(layer.running_var, exact.running_var, 40, name="running variance")


# Through the second layer's convolution goes a gradient only if something before it asks for one; its epilogue masks
# and sums where batch norm asks for sums, in training for all but a convolution's bias, whose gradient is zero.
FUSED = {"conv_stage_dgrad_kernel": 1}
TRAINING_PRODUCTS: dict[str, dict[str, int]] = {
    "weight 0": {"conv_wgrad_kernel": 1, **FUSED},
    "bn_bias 1": {},
    "bn_weight 0": FUSED,
    "bias 0": {},
    "input": {"conv_dgrad_kernel": 1, **FUSED},
}
EVALUATION_PRODUCTS: dict[str, dict[str, int]] = {
    "weight 0": {"conv_wgrad_kernel": 1, "conv_dgrad_kernel": 1},
    "bn_bias 1": {},
    "bn_weight 0": FUSED,
    "bias 0": {"conv_wgrad_kernel": 1, "conv_dgrad_kernel": 1},
    "input": {"conv_dgrad_kernel": 2},
}


@pytest.mark.parametrize("seen", ("weight 0", "bn_bias 1", "bn_weight 0", "bias 0", "input", "nothing"))
@pytest.mark.parametrize("training", (True, False))
def test_only_what_is_asked_for(seen: str, training: bool, device: str, launches: list[str], triton_runs: bool) -> None:
    shape, specs, _ = CASES["rgb, 2 layers, pool"]
    layers = layers_for(3, specs, torch.float32, device, grad=False)
    x = torch.randn(shape, device=device)
    exact_layers, exact_x = doubled(layers), x.cpu().double()
    for some, image in ((layers, x), (exact_layers, exact_x)):
        if seen == "input":
            image.requires_grad_()
        elif seen != "nothing":
            field, i = seen.split()
            getattr(some[int(i)], field).requires_grad_()
    y = conv_stage(x, layers, 2, training=training)
    expected = reference(exact_x, exact_layers, torch.float32, 2, None, training)
    assert_close(y, expected, 9 * 20 * 63, name="y")
    assert y.requires_grad == (seen != "nothing")
    if seen == "nothing":
        return
    launches.clear()
    y.sum().backward()  # a stride-0 gradient
    expected.sum().backward()
    names = [(some[int(seen[-1])], seen.split()[0]) if seen != "input" else None for some in (layers, exact_layers)]
    got, want = (image if at is None else getattr(*at) for at, image in zip(names, (x, exact_x)))
    if seen == "bias 0" and training:
        assert_no_gradient(got, y)
    else:
        close(got.grad, want.grad, 9 * 20 * 63, 8, torch.float32, seen)
    if triton_runs:
        products = {name: launches.count(name) for name in set(launches) if "grad_kernel" in name and "conv" in name}
        assert products == (TRAINING_PRODUCTS if training else EVALUATION_PRODUCTS)[seen]


@pytest.mark.gate("ttsem", "cuda")
def test_launches(device: str, launches: list[str]) -> None:
    """What a stage launches, exactly: no kernel more in training, one a layer in evaluation, then the pool."""
    shape, specs, _ = CASES["rgb, 2 layers, pool"]
    layers = layers_for(3, specs, torch.float32, device)
    x = torch.randn(shape, device=device)
    launches.clear()
    y = conv_stage(x, layers, 2, 0.25, training=True)
    measured = ["conv_stage_kernel", "finalize_statistics_kernel"]
    assert launches == ["pack_pair_kernel", *measured, "normalize_kernel", *measured, "stage_end_kernel"]
    launches.clear()
    y.sum().backward()
    assert launches == [
        "stage_sums_kernel", "finalize_gradients_kernel", "stage_gradient_kernel", "conv_wgrad_kernel",
        "conv_stage_dgrad_kernel", "finalize_gradients_kernel", "conv_wgrad_kernel", "merge_pair_kernel",
    ]  # fmt: skip
    launches.clear()
    with torch.no_grad():
        conv_stage(x, layers, 2, 0.25, training=False)
    assert launches == ["pack_pair_kernel", "conv_stage_kernel", "conv_stage_kernel", "stage_end_kernel"]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_pointwise_layers_form_their_input_themselves(
    dtype: torch.dtype, device: str, triton_runs: bool, launches: list[str]
) -> None:
    """No pass between a layer and a 1x1 layer, no stored activation, and only what is asked for kept."""
    shape, specs, arguments = CASES["bottleneck"]
    layers = layers_for(16, specs, dtype, device, grad=False)
    layers[2].weight.requires_grad_()  # nothing before it: its input's raw map is kept for it alone
    exact = doubled(layers)
    x = torch.randn(shape, device=device).to(dtype)
    launches.clear()
    y = conv_stage(x, layers, **arguments, training=True)
    expected = reference(x.cpu().double(), exact, dtype, **arguments)
    y.sum().backward()
    expected.sum().backward()
    assert layers[2].weight.grad is not None
    close(layers[2].weight.grad, exact[2].weight.grad, 70 * 40, 16, dtype, "gradient of the 1x1 weight")
    if triton_runs:
        assert launches.count("pointwise_forward_kernel") == 2
        assert launches.count("normalize_kernel") == 1  # before the 3x3 layer
        assert launches.count("pointwise_wgrad_kernel") == 1


def test_ties_and_nan_go_where_torch_sends_them(device: str) -> None:
    """Equal activations (zeros above all) and NaN: the same element gets the gradient."""
    x = torch.randint(-1, 2, (3, 1, 6, 7)).float()
    x[0, 0, 2, 2] = x[0, 0, 3, 2] = float("nan")
    ones = torch.ones(1)
    layer = ConvBNLayer(ones[:, None, None, None], running_mean=torch.zeros(1), running_var=ones, eps=1e-30)
    for pool in (MaxPool(2), MaxPool(3, 2, 1)):
        inputs = [x.clone().requires_grad_(), x.clone().to(device).detach().requires_grad_()]
        expected = F.max_pool2d(F.relu(inputs[0]), *pool)
        on_device = layer._replace(**{name: getattr(layer, name).to(device) for name in (FIELDS[0], *FIELDS[4:])})
        y = conv_stage(inputs[1], [on_device], pool)
        assert torch.equal(y.isnan().cpu(), expected.isnan())
        assert torch.equal(y.nan_to_num(7.0).cpu(), expected.nan_to_num(7.0))
        expected.backward(torch.ones_like(expected))
        y.backward(torch.ones_like(y))
        assert inputs[0].grad is not None
        assert inputs[1].grad is not None
        assert torch.equal(inputs[1].grad.cpu(), inputs[0].grad)


@pytest.mark.parametrize("layout", ("channels_last", "transposed", "expanded", "offset", "nchw"))
def test_any_gradient_layout(layout: str, device: str) -> None:
    (layer,) = layers_for(3, [(6, 3, {"padding": 1})], torch.float32, device)
    (exact,) = doubled([layer])
    x = torch.randn(2, 3, 6, 8)
    y = conv_stage(x.to(device), [layer], 2, training=True)
    expected = reference(x.double(), [exact], torch.float32, 2)
    dy = {
        "channels_last": lambda: torch.randn(2, 6, 3, 4).to(memory_format=CL),
        "transposed": lambda: torch.randn(4, 3, 6, 2).permute(3, 2, 1, 0),
        "expanded": lambda: torch.randn(1, 6, 1, 4).expand(2, 6, 3, 4),
        "offset": lambda: torch.randn(3, 7, 5, 9)[1:, 1:, 1:4, 2:9:2],
        "nchw": lambda: torch.randn(2, 6, 3, 4),
    }[layout]()
    given = torch.empty(0, device=device).new_empty(0)
    given = dy.to(device) if layout != "expanded" else dy[:, :, :1].to(device).expand(2, 6, 3, 4)
    y.backward(given)
    expected.backward(dy.double())
    assert layer.weight.grad is not None
    close(layer.weight.grad, exact.weight.grad, 96 * 27, 8, torch.float32, layout)


@pytest.mark.parametrize("p", (0.0, 0.3, 1.0))
@pytest.mark.parametrize("given", (False, True), ids=("", "running statistics"))
@pytest.mark.parametrize("differentiated", (False, True), ids=("", "differentiated"))
def test_dropout_drops_whole_channels(p: float, given: bool, differentiated: bool, device: str) -> None:
    layers = layers_for(2, [(40, 1, {})], torch.float32, device)
    if given:
        layers = [layer._replace(training=False) for layer in layers]
    with torch.set_grad_enabled(differentiated):
        _drops_whole_channels(layers, p, device)


def _drops_whole_channels(layers: list[ConvBNLayer], p: float, device: str) -> None:
    x = torch.randn(4, 2, 3, 3, device=device)
    torch.manual_seed(5)
    y = conv_stage(x, layers, None, p, training=True)
    torch.manual_seed(5)
    again = conv_stage(x, layers, None, p, training=True)
    assert torch.equal(y, again)
    full = conv_stage(x, layers, None, 0.0, training=True)
    share = ((y != 0) & (full != 0)).sum() / (full != 0).sum()
    # 160 draws: 4 standard deviations
    assert abs(share.item() - (1 - p)) <= 4 * (p * (1 - p) / 160) ** 0.5
    channel_kept = (y != 0).flatten(2).any(2)[:, :, None, None]
    scale = 1 / (1 - p) if p < 1 else 0.0
    assert_close(y, (full * scale * channel_kept).double().cpu(), 8, name="kept channels")


@pytest.mark.gate("torch")
def test_dropout_draws_as_torch_does_on_the_cpu() -> None:
    stage = tkernels.nn.ConvStage((3, 4), pool=2, dropout=0.5, padding=1)
    x = torch.randn(2, 3, 6, 6)
    torch.manual_seed(3)
    y = stage(x)
    torch.manual_seed(3)
    plain = torch.nn.Sequential(stage.conv1, stage.bn1, torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Dropout2d(0.5))
    torch.testing.assert_close(y, plain(x))


def test_two_runs_are_bitwise_equal(device: str) -> None:
    shape, specs, _ = CASES["rgb, 2 layers, pool"]
    layers = layers_for(3, specs, torch.float32, device)
    x = torch.randn(shape, device=device)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        y = conv_stage(x, layers, 2, 0.25, training=True)
        leaves = [layer.weight for layer in layers]
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("kind", ("3x3", "pointwise", "depthwise"))
def test_a_large_bias_under_autocast(kind: str, device: str) -> None:
    """Its rounding decides the variance of maps in 16 bits: no further from float64's than torch's is."""
    kernel, groups, mine, theirs = (1 if kind == "pointwise" else 3), (16 if kind == "depthwise" else 1), 0.0, 0.0
    first = ConvBNLayer(torch.randn(16, 16, 3, 3, device=device) / 12, activation="relu")
    for _ in range(4):
        x = torch.randn(2, 16, 6, 6, device=device)
        weight, bias = (
            torch.randn(16, 16 // groups, kernel, kernel, device=device),
            1e4 * torch.randn(16, device=device),
        )
        var = torch.ones(16, device=device)
        last = ConvBNLayer(weight, bias=bias, running_mean=torch.zeros_like(var), running_var=var, groups=groups,
                           momentum=1.0)  # fmt: skip
        with torch.autocast("cuda" if x.is_cuda else "cpu", torch.bfloat16):
            conv_stage(x, [first, last] if kind == "pointwise" else [last], training=True)
        if kind == "pointwise":
            x = F.relu(F.batch_norm(F.conv2d(x.bfloat16(), first.weight.bfloat16()), None, None, training=True))
        y = F.conv2d(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), groups=groups)
        exact = F.conv2d(x.double(), weight.double(), groups=groups).var((0, 2, 3))
        mine += (var - exact).square().sum().item()
        theirs += (y.double().var((0, 2, 3)) - exact).square().sum().item()
    assert 0 < mine <= 1.25**2 * theirs


def test_autocast_and_mixed_dtypes(device: str) -> None:
    """Parameters stay float32 under autocast, maps are bfloat16, gradients have their parameter's dtype."""
    layers = layers_for(16, [(8, 3, {"padding": 1})], torch.float32, device)
    x = torch.randn(2, 16, 4, 5, device=device, requires_grad=True)
    with torch.autocast("cuda" if x.is_cuda else "cpu", torch.bfloat16):
        y = conv_stage(x, layers, 2, training=True)
    assert y.dtype == torch.bfloat16
    (exact,) = doubled(layers)
    exact = exact._replace(running_mean=None, running_var=None)
    rounded = x.detach().cpu().bfloat16().double()
    expected = reference(
        rounded, [exact._replace(weight=exact.weight.bfloat16().double(), bias=exact.bias.bfloat16().double())],
        torch.bfloat16, 2,
    )  # fmt: skip
    assert_close(y, expected, 9 * 16 * 40, name="y")
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert layers[0].weight.grad is not None
    assert layers[0].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training: bool, device: str) -> None:
    (layer,) = layers_for(3, [(4, 3, {"padding": 1})], torch.float32, device)
    before = layer.running_mean.clone()
    x = torch.empty(0, 3, 4, 4, device=device, requires_grad=True)
    y = conv_stage(x, [layer], 2, training=training)
    assert y.shape == (0, 4, 2, 2)
    dx, dw = torch.autograd.grad(y.sum(), (x, layer.weight))
    assert dx.shape == x.shape
    assert not dw.any()
    assert torch.equal(layer.running_mean, before)


def test_no_second_derivative(device: str, triton_runs: bool) -> None:
    layers = layers_for(3, [(4, 1, {})], torch.float32, device)
    x = torch.randn(2, 3, 2, 2, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(conv_stage(x, layers, training=True).sum(), x, create_graph=True)
    if triton_runs:
        with pytest.raises(RuntimeError, match="differentiate twice"):
            dx.sum().backward()


def test_statistics_stay_right_at_a_large_mean(device: str) -> None:
    """At mean / std of 1e4, E[x^2] - E[x]^2 would have no digit left."""
    weight = torch.eye(2)[:, :, None, None].to(device)
    x = torch.randn(2, 2, 9, 8) + 1e4
    y = conv_stage(x.to(device), [ConvBNLayer(weight)], training=True)
    z = F.relu(F.batch_norm(x.double(), None, None, training=True))
    # the input itself is rounded to 6e-8 of 1e4
    assert (y.cpu().double() - z).abs().max() < 2e-3


@pytest.mark.parametrize("channels", (1, 3))
def test_statistics_stay_right_beside_a_large_bias(channels: int, device: str) -> None:
    """The map is a sum rounded once as a number of the bias's size, and its variance that of such a map."""
    x, w, bias = torch.randn(3, channels, 7, 5), torch.randn(4, channels, 3, 3), 1e4 * torch.randn(4)
    mean, var = torch.zeros(4).to(device), torch.ones(4).to(device)
    layer = ConvBNLayer(w.to(device), bias.to(device), running_mean=mean, running_var=var, momentum=1.0)
    conv_stage(x.to(device), [layer], training=True)
    exact = F.conv2d(x.double(), w.double(), bias.double()).transpose(0, 1).flatten(1)
    once = (exact.float().double().var(1) - exact.var(1)).norm()
    assert (var.cpu() - exact.var(1)).norm() < 1.25 * once


BAD: dict[str, tuple[type[Exception], Callable[[Tensor, ConvBNLayer], Any]]] = {
    "no tensor": (TypeError, lambda x, a: conv_stage([1.0], [a])),  # type: ignore[arg-type]
    "unbatched": (ValueError, lambda x, a: conv_stage(x[0], [a])),
    "no layers": (ValueError, lambda x, a: conv_stage(x, [])),
    "layers of another kind": (TypeError, lambda x, a: conv_stage(x, [a.weight])),  # type: ignore[list-item]
    "channels that don't follow": (RuntimeError, lambda x, a: conv_stage(x, [a, a])),
    "probability": (ValueError, lambda x, a: conv_stage(x, [a], None, 1.5)),
    "pool of 0": (RuntimeError, lambda x, a: conv_stage(x, [a], 0)),
    "pool too large": (RuntimeError, lambda x, a: conv_stage(x, [a], 9)),
    "pool's padding": (RuntimeError, lambda x, a: conv_stage(x, [a], MaxPool(2, 2, 2))),
    "pool's type": (TypeError, lambda x, a: conv_stage(x, [a], 2.5)),  # type: ignore[arg-type]
    "bias of another length": (RuntimeError, lambda x, a: conv_stage(x, [a._replace(bias=x.new_ones(3))])),
    "bn_weight of another length": (RuntimeError, lambda x, a: conv_stage(x, [a._replace(bn_weight=x.new_ones(3))])),
    "half of the statistics": (ValueError, lambda x, a: conv_stage(x, [a._replace(running_var=None)])),
    "statistics that want a gradient": (
        RuntimeError,
        lambda x, a: conv_stage(x, [a._replace(running_mean=x.new_zeros(4).requires_grad_())]),
    ),
    "dtypes": (RuntimeError, lambda x, a: conv_stage(x.half(), [a])),
    "eps": (ValueError, lambda x, a: conv_stage(x, [a._replace(eps=0.0)])),
    "activation": (ValueError, lambda x, a: conv_stage(x, [a._replace(activation="tanh")])),
    "residual's type": (TypeError, lambda x, a: conv_stage(x, [a], residual=1.0)),  # type: ignore[arg-type]
    "residual's shape": (RuntimeError, lambda x, a: conv_stage(x, [a], residual=x)),
    "residual's dtype": (RuntimeError, lambda x, a: conv_stage(x, [a], residual=x.new_ones(2, 4, 5, 5).half())),
    "residual and pool": (ValueError, lambda x, a: conv_stage(x, [a], 2, residual=x.new_ones(2, 4, 5, 5))),
    "residual and dropout": (ValueError, lambda x, a: conv_stage(x, [a], None, 0.1, residual=x.new_ones(2, 4, 5, 5))),
    "stride": (RuntimeError, lambda x, a: conv_stage(x, [a._replace(stride=0)])),
    "one value a channel": (ValueError, lambda x, a: conv_stage(x[:1, :, :1, :1], [a], training=True)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(name: str, device: str, launches: list[str]) -> None:
    error, call = BAD[name]
    (layer,) = layers_for(3, [(4, 1, {})], torch.float32, device)
    before = layer.running_mean.clone()
    x = torch.randn(2, 3, 5, 5, device=device)
    launches.clear()
    with pytest.raises(error):
        call(x, layer)
    assert not launches
    assert torch.equal(layer.running_mean, before)


@pytest.mark.gate("torch")
def test_modules_keep_torch_names_and_draws() -> None:
    torch.manual_seed(0)
    stage = tkernels.nn.ConvStage((3, 8, 4), 3, padding=1, pool=2, dropout=0.1)
    single = tkernels.nn.ConvBNReLU2d(4, 2, 1, bias=False)
    torch.manual_seed(0)
    plain = torch.nn.ModuleDict(
        {
            "conv1": torch.nn.Conv2d(3, 8, 3, padding=1),
            "bn1": torch.nn.BatchNorm2d(8),
            "conv2": torch.nn.Conv2d(8, 4, 3, padding=1),
            "bn2": torch.nn.BatchNorm2d(4),
        }
    )
    conv = torch.nn.Conv2d(4, 2, 1, bias=False)
    state = stage.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(state[key], t) for key, t in plain.state_dict().items())
    assert torch.equal(single.conv.weight, conv.weight)
    assert list(single.state_dict()) == ["conv.weight", *(f"bn.{key}" for key in torch.nn.BatchNorm2d(2).state_dict())]
    with pytest.raises(ValueError):
        tkernels.nn.ConvStage((3,))
    with pytest.raises(ValueError):
        tkernels.nn.ConvStage((3, 4), dropout=-1.0)


@pytest.mark.gate("torch")
@pytest.mark.parametrize("target", ("sm_80", "sm_90", "sm_120", "gfx942"))
def test_the_prologue_is_for_1x1_layers(target: str) -> None:
    """The estimate says where normalising on the way in pays: never behind a 3x3 window, nor for very wide outputs."""
    from perf.static.cases import window
    from tkernels.core import targets
    from tkernels.ops.conv_stage import config as tuning

    g = window(64, 64, 16)
    pointwise = g._replace(kernel_h=1, kernel_w=1, pad_h=0, pad_w=0)
    gpu = targets.TARGETS[target]
    assert tuning.applies_in_prologue(pointwise, torch.bfloat16, gpu)
    assert not tuning.applies_in_prologue(g, torch.bfloat16, gpu)
    assert not tuning.applies_in_prologue(pointwise._replace(out_channels=4096), torch.bfloat16, gpu)
    assert not tuning.applies_in_prologue(pointwise._replace(stride_h=2), torch.bfloat16, gpu)
