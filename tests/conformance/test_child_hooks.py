"""Modules that read a child's parameters without calling it: what hooks on the child do is done all the same."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import tkernels.nn as tnn

pytestmark = [
    pytest.mark.gate("torch", "ttsem", "cuda"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated", "ignore:Using a non-full backward hook"),
]


class Twin(nn.Module):
    """ConvStage as modules that are called, children by the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2)):
            x = torch.relu(norm(conv(x)))
        return torch.max_pool2d(x, 2)


def pair(device: str) -> tuple[nn.Module, nn.Module]:
    ours, twin = tnn.ConvStage([3, 4, 5], 3, padding=1, pool=2), Twin()
    twin.load_state_dict(ours.state_dict())
    return ours.to(device), twin.to(device)


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Halved(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return t / 2


def forward_replaced(m: nn.Module) -> None:
    original = m.conv2.forward  # type: ignore[union-attr]
    m.conv2.forward = lambda x: 3 * original(x)  # type: ignore[union-attr, assignment]


def subclassed(m: nn.Module) -> None:
    m.conv1.__class__ = Doubled


def pruned(m: Any) -> None:
    prune.l1_unstructured(m.conv1, "weight", 0.5)
    prune.ln_structured(m.conv2, "weight", 0.4, n=2, dim=1)  # (a channel of zeros would make batch norm's of noise)
    prune.l1_unstructured(m.bn1, "weight", 1)


def pruned_and_removed(m: Any) -> None:
    pruned(m)
    for module in (m.conv1, m.conv2, m.bn1):
        prune.remove(module, "weight")


def pruned_together(m: Any) -> None:
    prune.global_unstructured([(m.conv1, "weight"), (m.conv2, "weight")], prune.L1Unstructured, amount=0.3)


def standing_still(m: Any) -> None:
    m.bn1.track_running_stats = False


def deleted(m: Any) -> None:
    weight = m.conv1.weight.detach() * 2
    del m.conv1.weight
    m.conv1.weight = weight


KINDS: dict[str, Callable[[Any], Any]] = {
    "weight_norm": lambda m: weight_norm(m.conv1),
    "spectral_norm": lambda m: spectral_norm(m.conv2),
    "parametrizations.weight_norm": lambda m: parametrizations.weight_norm(m.conv1),
    "parametrizations.spectral_norm": lambda m: parametrizations.spectral_norm(m.conv2),
    "parametrized norm": lambda m: parametrize.register_parametrization(m.bn2, "bias", Halved()),
    "pruned": pruned,
    "pruned and removed": pruned_and_removed,
    "pruned together": pruned_together,
    "forward hook": lambda m: m.bn1.register_forward_hook(lambda module, args, y: 2 * y),
    "forward pre-hook": lambda m: m.conv2.register_forward_pre_hook(lambda module, args: args[0] + 1),
    "backward hook": lambda m: m.conv1.register_full_backward_hook(lambda module, to, of: (None,)),
    "backward hook of a norm": lambda m: m.bn2.register_full_backward_hook(lambda module, to, of: (3 * to[0],)),
    "backward pre-hook": lambda m: m.bn2.register_full_backward_pre_hook(lambda module, of: (2 * of[0],)),
    "forward replaced": forward_replaced,
    "subclassed": subclassed,
    "statistics that stand still": standing_still,
    "deleted and set": deleted,
}
NOT_PICKLED = ("hook", "replaced")


def step(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Two training steps, so that what is computed anew at each call shows; then an evaluation."""
    torch.manual_seed(7)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    module.train()
    for _ in range(2):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.eval()
    return module(x).detach(), gradients, dict(module.state_dict())


def alike(ours: nn.Module, twin: nn.Module, x: Tensor) -> None:
    (y, gradients, state), (y_twin, gradients_twin, state_twin) = step(ours, x), step(twin, x)
    torch.testing.assert_close(y, y_twin, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(state, state_twin, atol=1e-4, rtol=1e-3)
    for name, gradient in gradients_twin.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage(kind: str, device: str) -> None:
    ours, twin = pair(device)
    for module in (ours, twin):
        torch.manual_seed(3)
        KINDS[kind](module)
    alike(ours, twin, torch.randn(3, 3, 6, 6).to(device))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not any(word in kind for word in NOT_PICKLED)])
def test_copies_of_a_stage(kind: str, device: str) -> None:
    x = torch.randn(3, 3, 6, 6).to(device)
    ours, _ = pair(device)
    KINDS[kind](ours)
    ours(x).sum().backward()
    ours.eval()
    with torch.no_grad():
        expected = ours(x)
        if kind != "deleted and set" and kind != "weight_norm":  # what torch copies: no non-leaf
            torch.testing.assert_close(copy.deepcopy(ours)(x), expected)
    if not kind.startswith("param"):  # torch pickles no parametrized module
        with torch.no_grad():
            torch.testing.assert_close(pickle.loads(pickle.dumps(ours))(x), expected)


def test_hooks_are_removed(device: str, triton_runs: bool, launches: list[str]) -> None:
    """Then the stage is one call again."""
    ours, _ = pair(device)
    x = torch.randn(3, 3, 6, 6).to(device)
    ours(x)
    as_one = list(launches)
    handle = ours.get_submodule("bn1").register_forward_hook(lambda module, args, y: None)
    with_hook = torch.nn.modules.module.register_module_forward_hook(lambda module, args, y: None)
    handle.remove()
    with_hook.remove()
    launches.clear()
    ours(x)
    assert launches == as_one
    assert bool(launches) == triton_runs


def test_global_hooks(device: str) -> None:
    """Of all modules: each child's are run."""
    seen: list[str] = []
    found = []
    for module in pair(device):
        seen.clear()
        handle = global_hooks.register_module_forward_hook(lambda m, args, y: seen.append(type(m).__name__))
        module(torch.randn(3, 3, 6, 6).to(device))
        handle.remove()
        found.append(seen[:-1])
    assert found[0] == found[1] == ["Conv2d", "BatchNorm2d"] * 2


@pytest.mark.parametrize("kind", ("weight_norm", "pruned", "hook", "parametrized"))
def test_attention_reads_its_projection_as_torch_does(kind: str, device: str) -> None:
    """torch's own module does not call ``out_proj`` either: its hooks don't run, there and here."""
    ours, twin = (
        kind_of(8, 2, batch_first=True).to(device) for kind_of in (tnn.MultiheadAttention, nn.MultiheadAttention)
    )
    twin.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 8).to(device)
    for module in (ours, twin):
        if kind == "weight_norm":
            weight_norm(module.out_proj)
            with torch.no_grad():
                module.out_proj.weight_g.mul_(2)
        elif kind == "pruned":
            prune.l1_unstructured(module, "in_proj_weight", 0.5)
            prune.l1_unstructured(module.out_proj, "weight", 0.5)
        elif kind == "hook":
            module.out_proj.register_forward_hook(lambda m, args, y: 2 * y)
        else:
            parametrize.register_parametrization(module.out_proj, "weight", Halved())
    for need_weights in (False, True):
        y, expected = (module(x, x, x, need_weights=need_weights)[0] for module in (ours, twin))
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.gate("torch")
@pytest.mark.parametrize("convert", (nn.SyncBatchNorm, tnn.SyncBatchNorm))
def test_conversion_of_a_computed_parameter_is_refused(convert: Any) -> None:
    norm = tnn.BatchNorm2d(3, activation="relu")
    prune.l1_unstructured(norm, "weight", 1)
    with pytest.raises(TypeError, match="weight"):
        convert.convert_sync_batchnorm(norm)
