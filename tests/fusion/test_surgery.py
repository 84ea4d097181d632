"""What people change on a model after fuse() and after its first calls: the next call must follow, and fuse again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval, parametrizations, parametrize, prune

import tkernels
import tkernels.nn as tnn
from tests.fusion.cases import cnn
from tests.fusion.pairs import assert_alike, both, close, gradients_alike, images
from tkernels.core import _torch

pytestmark = pytest.mark.gate("torch", "cuda")


class Adapter(nn.Module):
    """As LoRA's: the layer it wraps, plus a narrow way around it."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Conv2d(layer.in_channels, 2, 1, bias=False).to(layer.weight.device)
        self.up = nn.Conv2d(2, layer.out_channels, 1, bias=False).to(layer.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + self.up(self.down(x))
        return y


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x


def swap_activation(m: Any) -> None:
    m[2] = nn.GELU()


def swap_activation_for_another_kind(m: Any) -> None:
    m[2] = nn.Tanh()


def swap_convolution(m: Any) -> None:
    m[3] = nn.Conv2d(8, 8, 5, padding=2, bias=False).to(m[0].weight.device)


def swap_norm_for_group_norm(m: Any) -> None:
    m[1] = nn.GroupNorm(2, 8).to(m[0].weight.device)


def swap_norm_for_identity(m: Any) -> None:
    m[4] = nn.Identity()


def append(m: Any) -> None:
    m.append(nn.Tanh())


def insert(m: Any) -> None:
    m.insert(1, nn.Tanh())


def delete_the_head(m: Any) -> None:
    del m[-3:]


def delete_an_activation(m: Any) -> None:
    del m[2]


def wrap_in_an_adapter(m: Any) -> None:
    m[3] = Adapter(m[3])


def circular(m: Any) -> None:
    m[0].padding_mode = m[3].padding_mode = "circular"


def windows(m: Any) -> None:
    m[0].stride, m[3].dilation, m[3].padding = (2, 2), (2, 2), (2, 2)


def groups(m: Any) -> None:
    m[3].groups, m[3].weight = 2, nn.Parameter(m[3].weight.detach()[:, :4].clone())


def take_the_bias_away(m: Any) -> None:
    m[0].bias = None


def share_a_layer(m: Any) -> None:
    m[4] = m[1]


def share_weights(m: Any) -> None:
    m[4].weight, m[4].bias = m[1].weight, m[1].bias


def norm_without_weights(m: Any) -> None:
    m[1].weight = m[1].bias = None


def norm_without_statistics(m: Any) -> None:
    m[1].running_mean = m[1].running_var = m[1].num_batches_tracked = None
    m[1].track_running_stats = False


def slope(m: Any) -> None:
    m[2], m[5] = nn.LeakyReLU(0.01), nn.LeakyReLU(0.3)  # the second is no activation of ours


def in_place(m: Any) -> None:
    m[2].inplace = m[5].inplace = True


def old_weight_norm(m: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(m[0])


def weight_norm(m: Any) -> None:
    parametrizations.weight_norm(m[0])


def spectral_norm(m: Any) -> None:
    torch.manual_seed(3)
    parametrizations.spectral_norm(m[0])


def parametrise(m: Any) -> None:
    parametrize.register_parametrization(m[3], "weight", Doubled())


def parametrise_and_remove(m: Any) -> None:
    parametrise(m)
    parametrize.remove_parametrizations(m[3], "weight")


def prune_weights(m: Any) -> None:
    mask = torch.arange(m[3].weight.numel(), device=m[3].weight.device).view(m[3].weight.shape) % 3 > 0
    prune.custom_from_mask(m[3], "weight", mask)


def prune_for_good(m: Any) -> None:
    prune_weights(m)
    prune.remove(m[3], "weight")


def torchs_synchronised_norms(m: Any) -> None:
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(m)
    assert converted is m
    assert type(m[1]) is nn.SyncBatchNorm


def freeze_a_norms_weights(m: Any) -> None:
    m[1].requires_grad_(False)


def freeze_all_but_the_head(m: Any) -> None:
    m[:6].requires_grad_(False)


def load_state(m: Any) -> None:
    m.load_state_dict({k: v + 1 if v.is_floating_point() else v for k, v in m.state_dict().items()})


def load_state_by_assignment(m: Any) -> None:
    m.load_state_dict({k: v.clone() + 1 for k, v in m.state_dict().items()}, assign=True)


def write_in_place(m: Any) -> None:
    m[0].weight.data.mul_(2.0)
    m[1].running_mean.fill_(3.0)
    nn.init.constant_(m[4].weight, 0.5)


def write_data(m: Any) -> None:
    m[0].weight.data = m[0].weight.data * 2.0


def replace_parameters(m: Any) -> None:
    m[0].weight, m[1].weight = nn.Parameter(m[0].weight.detach() * 2.0), nn.Parameter(m[1].weight.detach() * 2.0)


def own_forward(m: Any) -> None:
    m[1].forward = lambda x: 2.0 * type(m[1]).forward(m[1], x)


def own_forward_of_the_whole(m: Any) -> None:
    m.forward = lambda x: m[:6](x).mean((2, 3))


def other_class(m: Any) -> None:
    class Scaled(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2.0 * super().forward(input)

    m[1].__class__ = Scaled


def double(m: Any) -> None:
    m.double()


SURGERIES: list[tuple[Callable[[Any], None], int]] = [
    # (what is done, chains that a call runs afterwards)
    (swap_activation, 2), (swap_activation_for_another_kind, 2), (swap_convolution, 2), (swap_norm_for_group_norm, 1),
    (append, 2), (insert, 2), (delete_the_head, 2), (delete_an_activation, 2), (wrap_in_an_adapter, 2), (circular, 2),
    (windows, 2), (groups, 2), (take_the_bias_away, 2), (share_a_layer, 2), (share_weights, 2),
    (norm_without_weights, 2), (norm_without_statistics, 2), (slope, 2), (in_place, 2), (old_weight_norm, 2),
    (weight_norm, 2), (spectral_norm, 2), (parametrise, 2), (parametrise_and_remove, 2), (prune_weights, 2),
    (prune_for_good, 2), (torchs_synchronised_norms, 2), (freeze_a_norms_weights, 2), (freeze_all_but_the_head, 2),
    (load_state, 2), (load_state_by_assignment, 2), (write_in_place, 2), (write_data, 2), (replace_parameters, 2),
    (own_forward, 2), (own_forward_of_the_whole, 2), (other_class, 2),
]  # fmt: skip


def inputs(device: str) -> Tensor:
    """Images with gradients."""
    return images(device).requires_grad_()


def operated(surgery: Callable[[Any], None], device: str) -> tuple[nn.Module, nn.Module]:
    """A model and its fused copy that were called, then changed."""
    model, fused = both(cnn, device)
    assert_alike(fused, model, inputs(device), more=2)
    for network in (model, fused):
        torch.manual_seed(7)
        surgery(network)
    return model, fused


@pytest.mark.parametrize("surgery, chains", SURGERIES, ids=lambda value: getattr(value, "__name__", ""))
def test_in_training(surgery: Callable[[Any], None], chains: int, device: str) -> None:
    model, fused = operated(surgery, device)
    for _ in range(2):
        assert_alike(fused, model, inputs(device), more=chains)
    gradients_alike(fused, model, images(device))


SWITCHED: list[Callable[[Any], None]] = [
    swap_activation, delete_an_activation, wrap_in_an_adapter, circular, groups, prune_weights, own_forward,
    torchs_synchronised_norms, norm_without_weights, load_state,
]  # fmt: skip


@pytest.mark.parametrize("surgery", SWITCHED, ids=lambda value: value.__name__)
def test_in_evaluation(surgery: Callable[[Any], None], device: str) -> None:
    model, fused = operated(surgery, device)
    x = images(device)
    with torch.no_grad():
        assert_alike(fused.eval(), model.eval(), x)
    for network in (model, fused):
        network.train()
    assert_alike(fused, model, x, more=2)


def test_a_dozen_changes_in_a_row(device: str) -> None:
    """More than Dynamo compiles of one model: it may run as it is then, never as it was."""
    model, fused = both(cnn, device)
    x = images(device)
    for i in range(12):
        for network in (model, fused):
            network[3].padding_mode = ("zeros", "circular", "reflect", "replicate")[i % 4]
            network[2] = (nn.ReLU(), nn.GELU(), nn.Tanh())[i % 3]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            close([fused(x)], [model(x)], f"call {i}")
    close(dict(fused.named_buffers()), dict(model.named_buffers()), "buffers")


def test_slices_are_models_of_their_own(device: str) -> None:
    model, fused = both(cnn, device)
    x = images(device)
    assert_alike(fused, model, x, more=2)
    for k in (3, 6, 3):
        close([fused[:k](x)], [model[:k](x)], f"first {k}")
    features = tkernels.fuse(fused[:6])
    assert_alike(features, model[:6], x, more=2)
    assert_alike(fused, model, x, more=2)


def test_parts_in_evaluation(device: str) -> None:
    """Frozen norms: the rest of the model goes on training."""
    model, fused = operated(lambda m: m[1].eval(), device)
    x = images(device)
    assert_alike(fused, model, x)
    gradients_alike(fused, model, x)
    assert fused[1].num_batches_tracked == 1
    for network in (model, fused):
        network[0].eval()  # makes no difference to a convolution
        network[1].train()
    assert_alike(fused, model, x, more=2)


def fold_one(m: Any) -> None:
    m[0], m[1] = fuse_conv_bn_eval(m[0], m[1]), nn.Identity()


def fold_all(m: Any) -> None:
    torch.ao.quantization.fuse_modules(m, [["0", "1", "2"], ["3", "4", "5"]], inplace=True)


@pytest.mark.parametrize("fold", [fold_one, fold_all])
def test_batch_norms_folded_for_inference(fold: Callable[[Any], Any], device: str) -> None:
    model, fused = both(cnn, device)
    x = images(device)
    assert_alike(fused, model, x, more=2)
    before = model.eval()(x)
    for network in (model, fused):
        fold(network.eval())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        close([fused(x)], [model(x)], "folded")
        close([fused(x)], [before], "folded, and before", 1e-3)


def test_our_synchronised_norms(device: str) -> None:
    """One process: as torch's batch norm. (Two: tests/ecosystem.)"""
    model, fused = both(cnn, device)
    x = images(device)
    assert_alike(fused, model, x, more=2)
    fused = tnn.SyncBatchNorm.convert_sync_batchnorm(fused)
    assert type(fused[1]) is tnn.SyncBatchNorm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are ours already
        for _ in range(2):
            close([fused(x)], [model(x)], "result")
    close(dict(fused.named_buffers()), dict(model.named_buffers()), "buffers")
    gradients_alike(fused, model, x)


@pytest.mark.parametrize("cls, name", [
    (nn.ReLU, "forward"), (nn.BatchNorm2d, "forward"), (nn.Conv2d, "_conv_forward"), (nn.Sequential, "forward"),
    (nn.Sequential, "__call__"),
])  # fmt: skip
def test_methods_replaced_on_a_class(
    cls: type[nn.Module], name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fused = both(cnn, device)
    x = images(device)
    assert_alike(fused, model, x, more=2)
    original = getattr(cls, name)
    with monkeypatch.context() as patch:
        patch.setattr(cls, name, lambda *args: 2.0 * original(*args), raising=False)
        assert_alike(fused, model, x, more=2)
        close([model(x)], [fused(x)], "again")
    assert_alike(fused, model, x, more=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype, device: str) -> None:
    model, fused = operated(lambda m: m.to(dtype), device)
    x = images(device).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a CPU has passes for two dtypes
        bound = 1e-4 if dtype is torch.float64 else 3e-2
        close([fused(x)], [model(x)], "result", bound)
        close(dict(fused.named_buffers()), dict(model.named_buffers()), "buffers", bound)
        gradients_alike(fused, model, x, 2 * bound)
    fused.load_state_dict(model.state_dict())  # 16 bits round apart
    for network in (model, fused):
        network.float()
    assert_alike(fused, model, images(device), more=2)


def test_memory_formats(device: str) -> None:
    model, fused = both(cnn, device)
    x = images(device)
    for memory_format in (torch.channels_last, torch.contiguous_format, torch.channels_last):
        for network in (model, fused):
            network.to(memory_format=memory_format)
        given = x.contiguous(memory_format=memory_format)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a CPU has passes for channels_last alone
            y, expected = fused(given), model(given)
        close([y], [expected], str(memory_format))
    assert_alike(fused, model, x, more=2)


def test_inputs_of_every_layout(device: str) -> None:
    """What is not dense, starts within its storage, or is a batch of one."""
    model, fused = both(cnn, device)
    whole = images(device, n=6, channels=6, size=12)
    for x in (whole[:, :3], whole[1:5, 3:, 2:10, 2:10], whole[:, :3].flip(3), whole[:1, :3], whole[::2, ::2],
              whole[:, :3].transpose(2, 3), whole[:, :1].expand(-1, 3, -1, -1)):  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            close([fused(x)], [model(x)], f"{tuple(x.shape)} {x.stride()}")
    close(dict(fused.named_buffers()), dict(model.named_buffers()), "buffers")


def test_empty_batches(device: str) -> None:
    model, fused = both(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval(), device)
    x = images(device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        close([fused(x)], [model(x)], "result")
        assert fused(x[:0]).shape == model(x[:0]).shape


@pytest.mark.parametrize("wrong", [
    {"channels": 4}, {"n": 1, "size": 3},
], ids=["channels", "one value a channel"])  # fmt: skip
@pytest.mark.parametrize("called", [True, False])
def test_errors_are_the_models_own(wrong: dict[str, int], called: bool, device: str) -> None:
    """As the layers raise them, at the first call and later; buffers are what they would be, and calls go on."""
    model, fused = both(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), device)
    if called:
        assert_alike(fused, model, images(device), more=1)
    raised = []
    for network in (model, fused):
        with pytest.raises((RuntimeError, ValueError)) as error:
            network(images(device, **wrong))
        raised.append((error.type, str(error.value)))
    assert raised[0] == raised[1]
    assert_alike(fused, model, images(device), more=1)


def test_a_counter_with_two_names(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU reads all counters before it writes any: one that is there twice would go up by one."""
    together: list[int] = []

    def add(counts: list[Tensor], one: int) -> None:
        together.append(len(counts))
        for count, more in zip(counts, [count + one for count in counts]):
            count.copy_(more)

    monkeypatch.setattr(_torch, "foreach_add_", add)
    model, fused = operated(share_a_layer, device)
    assert_alike(fused, model, inputs(device), more=2)
    assert together == [2], "of the call before the layer stood in two places"
