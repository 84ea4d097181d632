"""Which chains fuse() finds and runs, and which it must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fusion.cases import ACTIVATIONS
from tests.fusion.pairs import assert_alike, both, chains, gradients_alike, images, report
from tkernels.core import activation as activations

pytestmark = pytest.mark.gate("torch", "cuda")

FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "relu": (F.relu, torch.relu, lambda x: x.relu(), lambda x: x.relu_(), lambda x: F.relu(x, True), torch.relu_),
    "relu6": (F.relu6, lambda x: F.hardtanh(x, 0.0, 6.0), lambda x: F.hardtanh(x, 0, 6, inplace=True)),
    "leaky_relu": (F.leaky_relu, lambda x: F.leaky_relu(x, 0.01, True)),
    "silu": (F.silu, lambda x: F.silu(x, inplace=True)),
    "hardswish": (F.hardswish, lambda x: F.hardswish(x, True)),
    "gelu": (F.gelu,),
}  # fmt: skip


class Layers(nn.Module):
    """Two convolutions with batch norms, and a forward of the test's."""

    def __init__(self, forward: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.norm = nn.BatchNorm2d(3)
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        assert self.body is not None
        result: Tensor = self.body(self, x)
        return result


def test_every_activation_is_among_the_chains() -> None:
    assert ACTIVATIONS.keys() == FUNCTIONS.keys() == set(activations.ACTIVATIONS) - {None}


@pytest.mark.parametrize("name", list(FUNCTIONS))
@pytest.mark.parametrize("training", [True, False])
def test_activations_as_modules(name: str, training: bool, device: str) -> None:
    make = ACTIVATIONS[name]

    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), make(), nn.BatchNorm2d(8), make())

    model, fused = both(network, device)
    for m in (model, fused):
        m.train(training)
    x = images(device)
    with torch.set_grad_enabled(training):  # by running statistics a CPU fuses what nobody differentiates
        assert_alike(fused, model, x, more=2)
    assert chains(fused) == ["0 -> 1 -> 2", "3 -> 4"]
    gradients_alike(fused, model, x)


@pytest.mark.parametrize("name, variant", [(name, i) for name, found in FUNCTIONS.items() for i in range(len(found))])
def test_activations_as_functions(name: str, variant: int, device: str) -> None:
    function = FUNCTIONS[name][variant]
    model, fused = both(lambda: Layers(lambda m, x: function(m.bn(m.conv(x)))), device)
    assert_alike(fused, model, images(device), more=1)
    assert len(report(fused).fused) == 1
    assert not report(fused).left
    gradients_alike(fused, model, images(device))


def residual(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.bn(m.conv(x)) + m.bn2(m.conv2(x)))


def residual_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    y += m.bn2(m.conv2(x))
    return F.relu(y, inplace=True)


def residual_by_method(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.bn(m.conv(x))
    return y.add_(m.bn2(m.conv2(x))).relu_()


def residual_first(m: Any, x: Tensor) -> Tensor:
    shortcut = torch.tanh(m.conv2(x))
    return F.silu(shortcut + m.bn(m.conv(x)))


def residual_alone(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.conv(x)) + torch.tanh(m.conv2(x))


def pooled(m: Any, x: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(m.bn(m.conv(x))), 3, 2, 1)


def pooled_and_dropped(m: Any, x: Tensor) -> Tensor:
    return F.dropout2d(F.max_pool2d(F.relu(m.bn(m.conv(x))), 2), 0.0, m.training)


def keywords(m: Any, x: Tensor) -> Tensor:
    y = F.conv2d(input=x, weight=m.conv.weight, bias=m.conv.bias, padding="same", stride=1)
    y = F.batch_norm(y, m.bn.running_mean, m.bn.running_var, weight=m.bn.weight, training=m.training, eps=1e-3)
    return F.relu(input=y)


def pre_activation(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.conv(F.relu(m.norm(x))))


WRITTEN = [
    (residual, ["conv -> bn -> add -> relu", "conv2 -> bn2"]),
    (residual_in_place, ["conv -> bn -> add -> relu", "conv2 -> bn2"]),
    (residual_by_method, ["conv -> bn -> add -> relu_", "conv2 -> bn2"]),
    (residual_first, ["conv -> bn -> add -> silu"]),
    (residual_alone, ["conv -> bn -> add"]),
    (pooled, ["conv -> bn -> relu -> max_pool2d"]),
    (pooled_and_dropped, ["conv -> bn -> relu -> max_pool2d -> dropout2d"]),
    (keywords, ["conv2d -> batch_norm -> relu"]),
    (pre_activation, ["norm -> relu", "conv -> bn"]),
]  # fmt: skip


@pytest.mark.parametrize("forward, expected", WRITTEN, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("training", [True, False])
def test_forwards(forward: Callable[..., Tensor], expected: list[str], training: bool, device: str) -> None:
    model, fused = both(lambda: Layers(forward).train(training), device)
    with torch.set_grad_enabled(training):
        assert_alike(fused, model, images(device), more=len(expected))
    found = sorted(chains(fused))
    # Dropout2d stays torch's own on a CPU
    assert all(e.startswith(f) for f, e in zip(found, sorted(expected)))
    assert len(found) == len(expected)
    gradients_alike(fused, model, images(device))


def alias_used_afterwards(m: Any, x: Tensor) -> Tensor:
    stem = torch.tanh(m.conv2(x))
    trunk = stem
    trunk += m.bn(m.conv(x))
    return F.relu(trunk) + stem


def view_used_afterwards(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.bn(m.conv(x))
    view = y[:, 1:]
    y += 1.0
    return F.relu(y).sum(1) + view.sum(1)


def input_written_between(m: Any, x: Tensor) -> Tensor:
    x = torch.tanh(x)
    y = m.conv(x)
    x.mul_(2.0)
    return F.relu(m.bn(y)) + x.sum()


def residual_written_between(m: Any, x: Tensor) -> Tensor:
    r = torch.tanh(m.conv2(x))
    y = m.bn(m.conv(x)) + r
    r[:, 0] = 3.0
    return F.relu(y) + r


def statistics_read_between(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    seen = m.bn.running_mean.clone()
    return F.relu(y) + seen.sum()


def parameter_written_between(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    with torch.no_grad():
        m.conv.bias.add_(1.0)
    return F.relu(m.bn(y))


def gradients_switched_between(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.conv(x)
    return F.relu(m.bn(y))


def used_twice(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    return F.relu(y) + y


def added_to_itself(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    return F.relu(y + y)


def broadcast(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.bn(m.conv(x)) + torch.tanh(m.conv2(x))[:, :, :1, :1])


def scaled_addition(m: Any, x: Tensor) -> Tensor:
    return F.relu(torch.add(m.bn(m.conv(x)), torch.tanh(m.conv2(x)), alpha=2.0))


def one_norm_twice(m: Any, x: Tensor) -> Tensor:
    a = m.bn(m.conv(x))
    b = m.bn(torch.tanh(m.conv2(x)))
    return F.relu(a) + F.relu(b)


TRAPS = [
    # (forward, how many chains it may run, in training)
    (alias_used_afterwards, 1), (view_used_afterwards, 1), (input_written_between, 1), (residual_written_between, 1),
    (statistics_read_between, 1), (parameter_written_between, 1), (gradients_switched_between, 1), (used_twice, 1),
    (added_to_itself, 1), (broadcast, 1), (scaled_addition, 1), (one_norm_twice, 2),
]  # fmt: skip


@pytest.mark.parametrize("forward, most", TRAPS, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("training", [True, False])
def test_what_must_not_be_fused_whole(forward: Callable[..., Tensor], most: int, training: bool, device: str) -> None:
    model, fused = both(lambda: Layers(forward).train(training), device)
    x = images(device)
    with torch.no_grad():  # some write to parameters
        results = [network(x) for network in (fused, model, fused, model)]
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[2], results[3])
    torch.testing.assert_close(fused.state_dict(), model.state_dict())
    assert len(report(fused).fused) <= most


def test_gradients_stop_where_the_model_stops_them(device: str) -> None:
    model, fused = both(lambda: Layers(gradients_switched_between), device)
    for network in (model, fused):
        network(images(device)).sum().backward()
        assert network.conv.weight.grad is None
        assert network.bn.weight.grad is not None


def test_what_disturbs_the_end_leaves_the_beginning(device: str) -> None:
    model, fused = both(lambda: Layers(statistics_read_between), device)
    assert_alike(fused, model, images(device), more=1)
    assert chains(fused) == ["conv -> bn"]


def test_the_report_says_why_a_layer_was_left(device: str) -> None:
    _, fused = both(lambda: Layers(input_written_between), device)
    fused(images(device))
    assert any("writes between its layers" in why for _, why in report(fused).left)
    _, fused = both(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)), device)
    with pytest.warns(UserWarning, match="ran no fused operator"):
        fused(images(device))
    assert dict(report(fused).left) == {
        "0": "convolution alone, followed by 1: nothing to fuse it with",
        "2": "linear layer alone, followed by the end of the graph: nothing to fuse it with",
    }


def test_the_report_names_what_a_cpu_leaves_behind_a_chain() -> None:
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.5))
    _, fused = both(lambda: nn.Sequential(*layers), "cpu")
    fused(images("cpu"))
    assert chains(fused) == ["0 -> 1 -> 2"]
    assert report(fused).left == [
        ("3", "max pool, PyTorch's own behind the fused layers"),
        ("4", "Dropout2d, PyTorch's own behind the fused layers"),
    ]


def test_the_warning_is_about_the_call_that_it_is_about(device: str) -> None:
    """And not about a graph of an earlier call, which fused something."""

    def forward(m: Any, x: Tensor) -> Any:
        return (F.relu(m.bn(m.conv(x))), torch.sigmoid(m.conv2(x))) if m.training else torch.tanh(m.conv(x))

    _, fused = both(lambda: Layers(forward), device)
    fused.train()(images(device))
    assert report(fused).fused
    assert report(fused).left
    with pytest.warns(UserWarning, match="convolution alone, followed by tanh"):
        fused.eval()(images(device))


def test_convolutions_of_every_kind(device: str) -> None:
    """Strides, dilation, groups, depthwise, padding by mode and by name, no bias."""
    kinds: list[dict[str, Any]] = [
        {"stride": 2}, {"dilation": 2, "padding": 2}, {"groups": 4}, {"groups": 8}, {"padding": "same"},
        {"padding": 1, "padding_mode": "reflect"}, {"bias": False, "stride": (1, 2), "padding": (0, 1)},
    ]  # fmt: skip

    def network() -> nn.Module:
        layers: list[nn.Module] = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
        for kind in kinds:
            layers += [nn.Conv2d(8, 8, 3, **kind), nn.BatchNorm2d(8), nn.SiLU()]
        return nn.Sequential(*layers)

    model, fused = both(network, device)
    x = images(device, size=32)
    assert_alike(fused, model, x, more=1 + len(kinds))
    gradients_alike(fused, model, x, 1e-3)


@pytest.mark.parametrize("norm", [
    nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, track_running_stats=False), nn.BatchNorm2d(8, momentum=0.3),
    nn.BatchNorm2d(8, eps=0.1),
])  # fmt: skip
def test_batch_norms_of_every_kind(norm: nn.Module, device: str) -> None:
    model, fused = both(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU()), device)
    for _ in range(2):
        assert_alike(fused, model, images(device), more=1)
    gradients_alike(fused, model, images(device))


def test_momentum_and_eps_may_change(device: str) -> None:
    model, fused = both(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), device)
    for momentum, eps in ((0.1, 1e-5), (0.3, 1e-5), (0.5, 1e-2)):
        for network in (model, fused):
            network[1].momentum, network[1].eps = momentum, eps
        assert_alike(fused, model, images(device), more=1)


def test_losses(device: str) -> None:
    class WithLoss(nn.Module):
        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(x, target, label_smoothing=0.1)

    x, target = torch.randn(4, 5, device=device), torch.arange(4, device=device)
    for make in (WithLoss, lambda: nn.CrossEntropyLoss(label_smoothing=0.1)):
        model, fused = both(make, device)
        assert_alike(fused, model, x, target, more=1)
