"""Fused models under other people's modes, transforms and compilers: right, or what the plain model does."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import symbolic_trace
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode

import tkernels
from tests.fusion.cases import CNN_CHAINS, cnn
from tests.fusion.pairs import (
    assert_alike,
    both,
    chains,
    close,
    gradients_alike,
    images,
    in_one,
    ran,
    report,
)

pytestmark = [
    pytest.mark.gate("torch", "cuda"),
    pytest.mark.filterwarnings("ignore:tkernels.fuse. a call of .* ran no fused operator"),  # counted, where it matters
    pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _frozen_switch() -> None:
    """Export reads cuDNN's float32 switch by its old name, which must agree with the new ones the suite sets."""
    torch._C._set_cudnn_allow_tf32(False)


def called(device: str, training: bool = True) -> tuple[nn.Module, nn.Module]:
    """A model and its fused copy, both of which ran a step."""
    model, fused = both(cnn, device)
    assert_alike(fused, model, images(device), more=2)
    return model.train(training), fused.train(training)


def test_pytorchs_own_batch_norms_are_gone(device: str) -> None:
    model, fused = called(device)
    x = images(device)
    counts = []
    for network in (model, fused):
        with profile() as measured:
            network(x).sum().backward()
        names = [event.key for event in measured.key_averages() for _ in range(event.count)]
        counts.append(sum(name in ("aten::native_batch_norm", "aten::cudnn_batch_norm") for name in names))
    assert counts == [2, 0]


class CastsInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = cnn()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            y = self.body[:3](x)
        with torch.autocast(x.device.type, enabled=False):
            y = self.body[3:6](y.float())
        return self.body[6:](y)


@pytest.mark.parametrize("make", [cnn, CastsInside])
@pytest.mark.parametrize("outside", [True, False])
def test_autocast(make: Callable[[], nn.Module], outside: bool, device: str) -> None:
    if make is cnn and not outside:
        pytest.skip("nothing is cast")
    model, fused = both(make, device)
    x, bound = images(device), 3e-2
    results = []
    for network in (fused, model):
        before = ran(fused)
        with torch.autocast(device, torch.bfloat16, enabled=outside):
            y = network(x)
        y.float().square().sum().backward()
        results.append((y, [p.grad for p in network.parameters()], dict(network.named_buffers())))
        if network is fused:
            assert ran(fused) == before + 2
    close([results[0][0]], [results[1][0]], "result", bound)
    close(results[0][1], results[1][1], "gradients", bound)
    close(results[0][2], results[1][2], "buffers", bound)
    without = 1e-4 if make is cnn else bound
    assert_alike(fused.float(), _like(model, fused), x, more=2, bound=without)


def _like(model: nn.Module, other: nn.Module) -> nn.Module:
    model.load_state_dict(other.state_dict())
    return model


def test_grad_scaler(device: str) -> None:
    model, fused = called(device)
    for network in (fused, model):
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for step in range(3):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss = network(images(device)).square().mean() * (float("inf") if step == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**9  # halved once
    close(fused.state_dict(), model.state_dict(), "state", 1e-3)
    assert ran(fused) == 2 * 4


def test_gradient_modes(device: str) -> None:
    """Each has graphs of its own, and what one gave is no tensor of another's."""
    model, fused = called(device)
    x = images(device)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad, torch.no_grad):
        with mode():
            assert_alike(fused, model, x, more=2)
            y = fused(x)
            close([y], [model(x)], mode.__name__)
        assert y.requires_grad == (mode is torch.enable_grad)
        assert y.is_inference() == (mode is torch.inference_mode)
    gradients_alike(fused, model, x)


def test_anomaly_mode(device: str) -> None:
    model, fused = called(device)
    with torch.autograd.detect_anomaly(check_nan=True):
        gradients_alike(fused, model, images(device))


def test_saved_tensors_hooks(device: str) -> None:
    """Activations packed away and back, as for offloading."""
    model, fused = called(device)
    x = images(device)
    packed: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t.double() if t.is_floating_point() else t

    def unpack(t: Tensor) -> Tensor:
        return t.float() if t.is_floating_point() else t

    for network in (model, fused):
        packed.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            y = network(x)
        y.square().sum().backward()
        assert packed
    close([p.grad for p in fused.parameters()], [p.grad for p in model.parameters()], "gradients")


class Checkpoints(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body, self.reentrant = cnn(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.body[:6], x, use_reentrant=self.reentrant)
        return self.body[6:](y)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_inside(reentrant: bool, device: str) -> None:
    model, fused = both(lambda: Checkpoints(reentrant), device)
    x = images(device).requires_grad_()
    close([fused(x)], [model(x)], "result")
    assert reentrant or ran(fused) == 2
    gradients_alike(fused, model, x)
    close(dict(fused.named_buffers()), dict(model.named_buffers()), "buffers")


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("sequential", [True, False])
def test_checkpointing_around(reentrant: bool, sequential: bool, device: str) -> None:
    model, fused = called(device)
    x = images(device)
    before, results = ran(fused), []
    for network in (fused, model):
        leaf = x.clone().requires_grad_()
        if sequential:
            y = checkpoint_sequential([network], 1, leaf, use_reentrant=reentrant)
        else:
            y = checkpoint(network, leaf, use_reentrant=reentrant)
        y.square().sum().backward()
        results.append([y, leaf.grad, *[p.grad for p in network.parameters()], *network.buffers()])
    close(*results, "result, gradients, buffers")
    assert ran(fused) > before


def test_functional_call(device: str) -> None:
    """With other parameters; and the model's own stay."""
    model, fused = called(device)
    x = images(device)
    results, before = [], ran(fused)
    for network in (fused, model):
        other = {name: (p.detach() + 0.1).requires_grad_() for name, p in network.named_parameters()}
        y = torch.func.functional_call(network, other, (x,))
        y.square().sum().backward()
        assert all(p.grad is None for p in network.parameters())
        results.append([y, *[p.grad for p in other.values()]])
    close(*results, "result and gradients")
    assert ran(fused) == before + 2
    assert_alike(fused, model, x, more=2)


@pytest.mark.parametrize("training", [True, False])
def test_functional_transforms(training: bool, device: str) -> None:
    """torch.func sees the plain model."""
    model, fused = called(device, training)
    x = images(device)
    results, before = [], ran(fused)
    for network in (fused, model):
        # functional_call puts copies of buffers that batch norm moves in the place of the model's
        state = {k: t.detach().clone() for k, t in network.state_dict().items()}
        buffers = {k: state[k] for k, _ in network.named_buffers()}

        def loss(p: dict[str, Tensor], x: Tensor, network: Any = network, buffers: Any = buffers) -> Tensor:
            y: Tensor = torch.func.functional_call(network, {**p, **{k: t.clone() for k, t in buffers.items()}}, (x,))
            return y.square().sum()

        parameters = {k: p.detach() for k, p in network.named_parameters()}
        found: dict[str, Any] = {"grad": torch.func.grad(loss)(parameters, x)}
        found["jvp"] = torch.func.jvp(lambda v, loss=loss, p=parameters: loss(p, v), (x,), (torch.ones_like(x),))
        # on a GPU torch's own batch norm asks within vmap what vmap cannot tell: is it channels_last?
        if not training and device == "cpu":
            found["vmap"] = torch.func.vmap(network)(torch.stack([x, 2 * x]))
            found["samples"] = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, None])
        results.append(found)
    close(*results, "transformed", 1e-3)
    assert ran(fused) == before
    fused.train(), model.train()
    assert_alike(fused, model, x, more=2)


def test_forward_mode(device: str) -> None:
    model, fused = called(device, False)
    x = images(device)
    results = []
    for network in (fused, model):
        with forward_ad.dual_level():
            y = network(forward_ad.make_dual(x, torch.ones_like(x)))
            results.append([t.clone() for t in forward_ad.unpack_dual(y)])
    close(*results, "tangent")


def test_second_derivatives(device: str, triton_runs: bool) -> None:
    """As for gradient penalties, by the batch's statistics too. Kernels have none, and say so."""
    model, fused = called(device)
    if triton_runs:
        leaf = images(device).requires_grad_()
        (gradient,) = torch.autograd.grad(fused(leaf).square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.square().sum().backward()
        return
    x, results = images(device), []
    for network in (fused, model):
        network.zero_grad()
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network(leaf).square().sum(), leaf, create_graph=True)
        gradient.square().sum().backward()
        results.append([leaf.grad, *[p.grad for p in network.parameters() if p.grad is not None]])
    close(*results, "second derivatives", 1e-3)


def test_vectorised_gradients(device: str) -> None:
    model, fused = called(device)
    x, results = images(device, n=2), []
    for network in (fused, model):
        leaf = x.clone().requires_grad_()
        y = network(leaf)
        rows = torch.eye(y.numel(), device=device).view(-1, *y.shape)
        results.append(torch.autograd.grad(y, leaf, rows, is_grads_batched=True))
    close(*results, "rows")


def test_flops_are_counted(device: str) -> None:
    model, fused = called(device)
    counts = []
    for network in (fused, model):
        with FlopCounterMode(display=False) as counter:
            network(images(device)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_threads_share_a_model(device: str) -> None:
    """Several call it at once, the first calls too, which compile it."""
    model, fused = (network.eval() for network in both(cnn, device))
    model, fused = (network.requires_grad_(False) for network in (model, fused))
    given = [images(device, n=n) for n in (4, 4, 2, 6, 4, 2, 6, 4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(fused, given))
    close(found, [model(x) for x in given], "threads")


def test_threads_with_a_model_each(device: str) -> None:
    pairs = [both(cnn, device) for _ in range(4)]
    given = [images(device) for _ in pairs]

    def step(i: int) -> Tensor:
        fused = pairs[i][1]
        fused(given[i]).square().sum().backward()
        y: Tensor = fused(given[i])
        return y

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(step, range(4)))
    for (model, fused), x, y in zip(pairs, given, found):
        model(x).square().sum().backward()
        close([y], [model(x)], "result")
        close([p.grad for p in fused.parameters()], [p.grad for p in model.parameters()], "gradients")
        assert_alike(fused, model, x, more=2)  # (while another thread compiled, calls may have run as they are)


def features(network: nn.Module, x: Tensor) -> Tensor:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    found: Tensor = extraction.create_feature_extractor(network, {"5": "features"})(x)["features"]
    return found


def exported(strict: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    def use(network: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = torch.export.export(network, (x,), strict=strict).module()(x)
        return found

    return use


def compiled(backend: str) -> Callable[[nn.Module, Tensor], Tensor]:
    def use(network: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = torch.compile(network, backend=backend, fullgraph=True)(x)
        return found

    return use


def frozen(network: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = torch.jit.freeze(torch.jit.script(network.eval()))(x)
    return found


USES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "symbolic_trace": lambda network, x: symbolic_trace(network)(x), "create_feature_extractor": features,
    "script": lambda network, x: torch.jit.script(network)(x), "freeze": frozen,
    "trace": lambda network, x: torch.jit.trace(network, x)(x), "export": exported(False),
    "strict export": exported(True), "aot_eager": compiled("aot_eager"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(USES))
@pytest.mark.parametrize("first", [True, False])
def test_other_tracers(name: str, first: bool, device: str) -> None:
    """They see the plain model, whether it was called before or not; and it goes on fused."""
    model, fused = called(device) if not first else both(cnn, device)
    x = images(device)
    results = []
    for network in (fused, model):
        network.eval()
        results.append([USES[name](copy.deepcopy(network), x), USES[name](network, x)])
    close(*results, name)
    for network in (fused, model):
        network.train()
    assert_alike(fused, model, x, more=2)


def test_an_outer_compiler_in_training(device: str) -> None:
    model, fused = called(device)
    x = images(device)
    outer = torch.compile(fused, backend="aot_eager", fullgraph=True)
    before = ran(fused)
    results = []
    for network, call in ((fused, outer), (model, model)):
        y = call(x)
        y.square().sum().backward()
        results.append([y, *[p.grad for p in network.parameters()], *network.buffers()])
    close(*results, "result, gradients, buffers")
    assert ran(fused) == before
    assert_alike(fused, model, x, more=2)


@pytest.mark.extended("torch")
def test_an_outer_inductor(device: str) -> None:
    model, fused = called(device)
    x = images(device)
    y = torch.compile(nn.Sequential(fused, nn.Tanh()), fullgraph=True)(x)
    close([y], [torch.tanh(model(x))], "result", 1e-3)
    assert_alike(fused, model, x, more=2)


@pytest.mark.gate("torch")
@pytest.mark.parametrize("dynamo", [True, pytest.param(False, marks=pytest.mark.filterwarnings("ignore"))])
def test_onnx(dynamo: bool) -> None:
    onnx = pytest.importorskip("onnx", reason="install the ecosystem group")
    pytest.importorskip("onnxscript", reason="install the ecosystem group")
    _, fused = called("cpu", False)
    file = io.BytesIO()
    if dynamo:
        proto = torch.onnx.export(fused, (images("cpu"),), dynamo=True, verbose=False).model_proto
    else:
        torch.onnx.export(fused, (images("cpu"),), file, dynamo=False)
        proto = onnx.load_model_from_string(file.getvalue())
    onnx.checker.check_model(proto)
    assert {node.domain for node in proto.graph.node} == {""}
    assert {"Conv", "Relu", "Gemm"} <= {node.op_type for node in proto.graph.node}


def test_a_fused_part_of_a_plain_model(device: str) -> None:
    """A loop of one's own around it, a loss behind it."""
    model, fused = both(cnn, device)
    head = nn.Linear(5, 3).to(device)
    x, target = images(device), torch.arange(4, device=device) % 3
    results = []
    for network in (fused, model):
        head.zero_grad()
        loss = sum(F.cross_entropy(head(torch.tanh(network(v))), target) for v in (x, x + 1))
        assert isinstance(loss, Tensor)
        loss.backward()
        results.append([loss, *[p.grad.clone() for p in (*head.parameters(), *network.parameters())]])
    close(*results, "loss and gradients")
    assert ran(fused) == 4
    assert in_one(chains(fused)) == CNN_CHAINS
    assert not report(fused).breaks


def test_nested_fused_models(device: str) -> None:
    model, fused = both(lambda: nn.Sequential(cnn(), nn.Linear(5, 5)), device)
    tkernels.fuse(fused[0])
    assert_alike(fused, model, images(device), more=2)
    gradients_alike(fused, model, images(device))
    assert ran(fused[0]) == 0
