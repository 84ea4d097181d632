"""Published networks after fuse(): which chains they come to, what runs, and that nothing but rounding changes."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import profile

import tkernels
from perf.static import meter
from perf.static.rewritten import Rewritten
from tests.fusion.pairs import close, ran, report

pytestmark = pytest.mark.gate("torch")


class Expected(NamedTuple):
    """What a reader counts in a network's source. ``chains``: calls, where kernels run (layers in a row are one stage);
    ``norms``: batch norms in all; ``left``: those among them that no chain takes; ``launches``: forward, backward."""

    chains: int
    norms: int
    left: int
    launches: tuple[int, int]


NETWORKS = {
    # the stem, one stage in each of eight blocks, with its projection
    "resnet18": Expected(9, 20, 0, (58, 103)),
    "resnet50": Expected(17, 53, 0, (149, 265)),
    # five stages, two hidden linear layers
    "vgg16_bn": Expected(7, 13, 0, (44, 68)),
    "mobilenet_v2": Expected(16, 52, 0, (156, 273)),
    # each block's squeeze is a convolution with SiLU
    "efficientnet_b0": Expected(47, 49, 0, (179, 322)),
    # the stem, two in each of 58 layers, a batch norm in each of three transitions, the last one
    "densenet121": Expected(121, 121, 0, (364, 539)),
    # linear -> GELU in each block
    "convnext_tiny": Expected(18, 0, 0, (18, 54)),
    "regnet_y_400mf": Expected(49, 53, 0, (188, 329)),
    "timm:resnet26d": Expected(9, 31, 0, (86, 153)),
    "timm:efficientnet_b0": Expected(47, 49, 0, (179, 322)),
    "timm:mobilenetv3_large_100": Expected(34, 46, 0, (156, 280)),
    # the batch norm of a block's input is added to a sum that is there already
    "timm:repvgg_a0": Expected(39, 61, 17, (128, 256)),
}
QUICK = ("resnet18", "timm:mobilenetv3_large_100")


def network(name: str) -> nn.Module:
    """A network that draws nothing in training."""
    library, _, rest = name.rpartition(":")
    torch.manual_seed(0)
    if library:
        timm = pytest.importorskip("timm", reason="install the ecosystem group")
        model: nn.Module = timm.create_model(rest, num_classes=10)
    else:
        torchvision = pytest.importorskip("torchvision", reason="install the train group")
        model = getattr(torchvision.models, name)(weights=None, num_classes=10)
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0  # type: ignore[assignment]
    return model.to(memory_format=torch.channels_last)


def images(n: int, size: int) -> Tensor:
    return torch.randn(n, 3, size, size).contiguous(memory_format=torch.channels_last)


def each(quick: tuple[str, ...]) -> Callable[..., Any]:
    """A test of the networks; of those that are not ``quick`` in the extended suite."""
    marked = [name if name in quick else pytest.param(name, marks=pytest.mark.extended("torch")) for name in NETWORKS]
    return pytest.mark.parametrize("name", marked)


@each(QUICK)
def test_chains_and_launches_on_kernels(name: str) -> None:
    """On a pretended GPU: every launch of a training step, and no batch norm of PyTorch's but those left."""
    expected = NETWORKS[name]
    rewritten = Rewritten(network(name), images(2, 64))
    assert len(rewritten.report.fused) == expected.chains
    assert sum(node.target is F.batch_norm for node in rewritten.graph.nodes) == expected.left
    launches: list[str] = []
    with (
        tkernels.backend("triton"),
        meter.pretended_gpu("sm_90", lambda kernel, *given: launches.append(kernel.__name__)) as mode,
    ):
        meter.make_fake(rewritten, mode)
        y = rewritten(images(2, 64))
        forward = len(launches)
        y.sum().backward()
    assert (forward, len(launches) - forward) == expected.launches


def own_batch_norms(call: Callable[[], object]) -> tuple[int, int]:
    """How many batch norms PyTorch ran itself, and how many passes of ours ran."""
    with profile() as profiled:
        call()
    counts = Counter({event.key: event.count for event in profiled.key_averages()})
    return counts["aten::native_batch_norm"], sum(n for key, n in counts.items() if key.startswith("tkernels"))


def train(model: nn.Module, x: Tensor, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(len(x))).backward()
        optimizer.step()


@each(QUICK[:1])  # each other kind of layer compiles passes of its own, which tests/cpu has
def test_two_steps_on_the_cpu(name: str) -> None:
    """Gradients, parameters and running statistics after two steps, the evaluation after them, and what ran."""
    model = network(name)
    fused = tkernels.fuse(copy.deepcopy(model))
    x = images(4, 64)
    for each_model in (fused, model):
        train(each_model, x, 2)
    close(dict(fused.named_parameters()), dict(model.named_parameters()), "parameter", 1e-3)
    close(dict(fused.named_buffers()), dict(model.named_buffers()), "buffer", 5e-3)
    # a value that rounds to the other side of a ReLU's kink changes a whole row of gradients, in PyTorch too
    ours, theirs = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (fused, model))  # type: ignore[union-attr]
    assert (ours - theirs).norm() <= 0.2 * theirs.norm()
    kept = sum("norm" in why for _, why in report(fused).left)
    norms, passes = own_batch_norms(lambda: fused(x).sum().backward())
    assert norms <= kept
    assert passes > 0 or NETWORKS[name].norms == 0
    fused.load_state_dict(model.state_dict())  # rounding grows from layer to layer, and from step to step
    with torch.no_grad():
        close(fused.eval()(x), model.eval()(x), "evaluation", 1e-3)
    assert ran(fused) > 0 or NETWORKS[name].norms == 0
