"""conv_stage's fast way on a CPU: the same values as float64's, memory never in two hands, and the facts that make it
fast (few bytes kept, few calls, no index tensors, no fresh memory in a steady state)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conv_stage import cases as general
from tests.cpu.stages import CASES, CL, leaves, stage
from tests.cpu.stages import always as always  # fixtures
from tests.cpu.stages import taken as taken
from tests.tolerance import assert_close
from tkernels.core import _torch
from tkernels.cpu import buffers, compiler
from tkernels.cpu import stage as fast
from tkernels.functional import MaxPool, conv_stage

pytestmark = [
    pytest.mark.gate("torch"),
    pytest.mark.skipif(not compiler.enabled(), reason="passes are not compiled here: no C++ compiler, or turned off"),
]


@pytest.mark.parametrize("memory_format", (CL, torch.contiguous_format), ids=("nhwc", "nchw"))
@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name: str, memory_format: torch.memory_format, taken: list[str]) -> None:
    general.compare(name, "cpu", memory_format=memory_format)
    assert taken == ["train"]


@pytest.mark.extended("torch")  # each dtype compiles the passes anew
@pytest.mark.parametrize("name", ("rgb, 2 layers, pool", "no end"))
def test_equals_float64_in_bfloat16(name: str, taken: list[str]) -> None:
    general.compare(name, "cpu", torch.bfloat16, CL)
    assert taken == ["train"]


@pytest.mark.parametrize("name", CASES)
def test_evaluation_equals_float64(name: str, taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "CHUNK", 1000)  # a few images at a time
    shape, specs, arguments = CASES[name]
    layers = general.layers_for(shape[1], specs, torch.float32, "cpu")
    x = torch.randn(shape)
    with torch.no_grad():
        y = conv_stage(x, layers, **arguments)
        expected = general.reference(
            x.double(), general.doubled(layers), torch.float64, arguments.get("pool"), None, False
        )
    assert taken == ["evaluate"]
    assert y.is_contiguous()
    assert_close(y, expected, max(layer.weight[0].numel() for layer in layers), scale=4.0)


def test_evaluation_notices_every_write(taken: list[str]) -> None:
    """Parameters written through .data, as averaging of weights does, and statistics that moved."""
    x, layers, _ = stage()
    with torch.no_grad():
        before = conv_stage(x, layers, 2)
        layers[0].weight.data.mul_(2.0)
        layers[1].running_mean.add_(1.0)
        after = conv_stage(x, layers, 2)
        expected = general.reference(x.double(), general.doubled(layers), torch.float64, 2, None, False)
    assert taken == ["evaluate"] * 2
    assert not torch.equal(before, after)
    assert_close(after, expected, 72, scale=4.0)


def test_evaluation_in_even_chunks(taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """About as many images at a time as CHUNK allows, the same for each thread; with more than one chunk a weight is
    brought into oneDNN's order once, and no bit of the result changes."""
    batches, packed = [], []
    convolve, pack = _torch.onednn_conv, _torch.onednn_pack_conv_weight
    monkeypatch.setattr(_torch, "onednn_conv", lambda x, *rest: batches.append(x.shape[0]) or convolve(x, *rest))
    monkeypatch.setattr(_torch, "onednn_pack_conv_weight", lambda *a: packed.append(a[-1][0]) or pack(*a))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, layers, _ = stage(batch=11)
    a_map = 8 * 8 * 8 * 4

    def chunks(maps: float) -> tuple[Tensor, list[int], list[int]]:
        batches.clear(), packed.clear()
        monkeypatch.setattr(fast, "CHUNK", int(maps * a_map))
        return conv_stage(x, layers, 2), batches[:: len(layers)], [*packed]

    with torch.no_grad():
        whole, *counts = chunks(4)
        assert counts == [[11], []]
        for maps, expected in ((3, [6, 5]), (2.5, [6, 5]), (2, [4, 4, 3]), (0.5, [1] * 11), (0, [1] * 11)):
            y, *counts = chunks(maps)
            assert counts == [expected, [expected[0]] * len(layers)], maps
            assert torch.equal(y, whole)
    assert taken == ["evaluate"] * 6


@pytest.mark.parametrize("pool", (None, 2))
def test_evaluation_keeps_what_is_no_number(pool: int | None, taken: list[str]) -> None:
    x, layers, _ = stage()
    with torch.no_grad():
        x[0, 0, 3, 3], x[1, 1, 2, 5], x[2, 2, 4, 0] = float("nan"), float("inf"), float("-inf")
        y = conv_stage(x, layers, pool)
        expected = general.reference(x.double(), general.doubled(layers), torch.float64, pool, None, False)
    assert taken == ["evaluate"]
    assert expected[:3].isnan().flatten(1).any(1).all()
    assert torch.equal(y.isnan(), expected.isnan())


def test_dropout_draws_as_torch_does() -> None:
    x, layers, arguments = stage()
    torch.manual_seed(7)
    y = conv_stage(x, layers, **arguments)
    torch.manual_seed(7)
    dropped = F.dropout2d(torch.ones_like(y), 0.25)
    assert torch.equal((y == 0).flatten(2).all(2), (dropped == 0).flatten(2).all(2))
    assert torch.rand(()) == _after(7, lambda: F.dropout2d(torch.ones_like(y), 0.25))


def _after(seed: int, call: Callable[[], object]) -> Tensor:
    torch.manual_seed(seed)
    call()
    return torch.rand(())


@pytest.mark.parametrize("frozen", range(9))
def test_only_the_gradients_asked_for(frozen: int) -> None:
    """Each tensor in turn asks for none; a gradient that is asked for does not depend on the others."""
    x, layers, arguments = stage()

    def gradients(without: int | None) -> list[Tensor | None]:
        torch.manual_seed(1)
        for i, t in enumerate(leaves(x, layers)):
            t.grad = None
            t.requires_grad_(i != without)
        conv_stage(x, layers, **arguments).square().sum().backward()
        return [t.grad for t in leaves(x, layers)]

    every, some = gradients(None), gradients(frozen)
    assert some[frozen] is None
    for i, (a, b) in enumerate(zip(every, some)):
        assert i == frozen or (a is not None and b is not None and torch.equal(a, b))


def test_two_runs_give_the_same_bits() -> None:
    x, layers, arguments = stage(16, 12, 40)

    def run() -> list[Tensor]:
        torch.manual_seed(5)
        y = conv_stage(x, layers, **arguments)
        return [y, *torch.autograd.grad(y.square().sum(), leaves(x, layers))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


def test_differentiated_twice() -> None:
    """A penalty on the gradient: what torch's own calls give."""
    x, layers, arguments = stage()

    def penalty(call: Callable[[], Tensor]) -> list[Tensor]:
        torch.manual_seed(2)
        (dx,) = torch.autograd.grad(call().square().sum(), x, create_graph=True)
        wanted = [t for t in leaves(x, layers) if t.dim() == 4 or t is layers[0].bn_weight]
        return list(torch.autograd.grad(dx.square().sum(), wanted))

    ours = penalty(lambda: conv_stage(x, layers, **arguments))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "WORTH_IT", 1 << 60)
        theirs = penalty(lambda: conv_stage(x, layers, **arguments))
    for a, b in zip(ours, theirs):
        assert_close(a, b.double(), 1 << 14, scale=b.abs().max().item())


def test_training_after_inference_mode() -> None:
    """Buffers and compiled passes that inference mode asked for first serve training too."""
    x, layers, arguments = stage(8, 10)
    buffers.POOL.clear()
    with torch.inference_mode():
        conv_stage(x, layers, **arguments)
        conv_stage(x, layers, **{**arguments, "training": False})
    conv_stage(x, layers, **arguments).sum().backward()
    assert x.grad is not None


def test_nan_goes_through() -> None:
    x, layers, arguments = stage()
    x.data[0, 0, 3, 3] = float("nan")
    y = conv_stage(x, layers, **{**arguments, "dropout_p": 0.0})
    assert y.isnan().all()
    y.sum().backward()
    assert layers[0].weight.grad.isnan().all()


@pytest.mark.parametrize("channels_last", [True, False])
def test_what_is_not_finite_is_laid_out_as_ever(channels_last: bool, taken: list[str]) -> None:
    """The input is so small that torch's own calls, which take over, would lay its gradient out another way."""
    _, layers, _ = stage(channels=3)
    strides = []
    for value in (1.0, float("nan")):
        x = torch.randn(1, 3, 2, 8)
        x[0, 0, 0, 0] = value
        if channels_last:
            x = x.contiguous(memory_format=CL)
        y = conv_stage(x.requires_grad_(), layers, training=True)
        strides.append((y.stride(), *(t.stride() for t in torch.autograd.grad(y.sum(), x))))
    assert taken == ["train", "train"]
    assert strides[0] == strides[1]


# --- where it is not taken ---


@pytest.mark.parametrize(
    "change",
    (
        {"pool": MaxPool(3, 2, 1)},
        {"pool": 3},
        {"pool": MaxPool(2, 3)},
    ),
    ids=str,
)
def test_other_pools_go_the_plain_way(change: dict[str, Any], taken: list[str]) -> None:
    x, layers, arguments = stage()
    conv_stage(x, layers, **{**arguments, **change})
    assert not taken


def test_other_stages_go_the_plain_way(taken: list[str]) -> None:
    """Another activation, padding of one side ("same" beside an even window), evaluation that is differentiated."""
    x, layers, arguments = stage()
    conv_stage(x, [layers[0], layers[1]._replace(activation="silu")], **arguments)
    even = general.layers_for(3, [(8, 2, {"padding": "same"})], torch.float32, "cpu")
    conv_stage(x, even, **arguments)
    arguments["training"] = False
    y = conv_stage(x, layers, **arguments)
    assert not taken
    assert y.requires_grad
    with torch.no_grad():
        conv_stage(x, layers, **arguments)
    assert taken == ["evaluate"]


def test_what_watches_or_transforms_calls_goes_the_plain_way(taken: list[str]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, layers, arguments = stage()
    with FlopCounterMode(display=False) as counter:
        conv_stage(x, layers, **arguments)
    assert counter.get_total_flops() > 0
    arguments["dropout_p"] = 0.0
    layers = [layer._replace(running_mean=None, running_var=None, num_batches_tracked=None) for layer in layers]
    torch.func.grad(lambda t: conv_stage(t, layers, **arguments).sum())(x.detach())
    wide = [
        layer._replace(**{f: getattr(layer, f).double() for f in ("weight", "bias", "bn_weight", "bn_bias")})
        for layer in layers
    ]
    conv_stage(x.double(), wide, **arguments)
    assert not taken


@pytest.mark.parametrize(
    "environment",
    (
        pytest.param({"TKERNELS_COMPILE": "0"}, id="off"),
        pytest.param({"CXX": "/does/not/exist"}, id="no compiler", marks=pytest.mark.extended("torch")),
    ),
)
def test_without_compiled_passes(environment: dict[str, str], tmp_path: Any) -> None:
    """The same answers from torch's own calls, with a warning where a compiler was wanted."""
    program = """
import torch, tkernels.functional as F
from tkernels.cpu import compiler
w = torch.randn(8, 3, 3, 3).requires_grad_()
x = torch.randn(64, 3, 32, 32)
layer = F.ConvBNLayer(w, padding=1)
for _ in range(2):
    y = F.conv_stage(x, [layer], 2, training=True)
    y.sum().backward()
z = torch.nn.functional.conv2d(x, w, None, padding=1)
z = torch.relu(torch.nn.functional.batch_norm(z, None, None, training=True))
z = torch.nn.functional.max_pool2d(z, 2)
assert (y - z).abs().max() < 1e-4 * z.abs().max()
assert not compiler.enabled()
"""
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **cache, **environment}
    )
    assert done.returncode == 0, done.stderr
    assert ("without compiled passes" in done.stderr) == ("CXX" in environment)
