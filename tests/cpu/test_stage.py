"""conv_stage's fast way on a CPU: the same values as float64's, memory never in two hands, and the facts that make it
fast (few bytes kept, few calls, no index tensors, no fresh memory in a steady state)."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conv_stage import cases as general
from tests.cpu.cases import take
from tests.tolerance import assert_close
from tkernels.cpu import buffers, compiler
from tkernels.cpu import stage as fast
from tkernels.functional import ConvBNLayer, MaxPool, conv_stage

pytestmark = [
    pytest.mark.gate("torch"),
    pytest.mark.skipif(not compiler.enabled(), reason="passes are not compiled here: no C++ compiler, or turned off"),
]

CL = torch.channels_last
PADDED = {"padding": 1}
# of the fast way's kind, as tests/conv_stage/test_values.py has them
CASES: dict[str, Any] = {
    "rgb, 2 layers, pool": ((2, 3, 8, 6), [(20, 3, PADDED), (17, 3, PADDED)], {"pool": 2}),
    "no end": ((3, 5, 4, 5), [(6, 3, PADDED)], {}),
    "dropout alone": ((40, 4, 5, 5), [(6, 3, PADDED)], {"dropout_p": 0.4}),
    "strided, grouped, depthwise": (
        (2, 6, 9, 7),
        [(8, 3, {"padding": 1, "groups": 2}), (18, (2, 3), {"stride": (2, 3), "padding": (0, 1)}),
         (18, 3, {"groups": 18, "padding": 1}), (5, 1, {"bias": False})],
        {},
    ),
    "dilation, padding past the window": (
        (2, 7, 5, 4), [(8, 1, {"padding": 2}), (24, 3, {"padding": 2, "dilation": 2}), (7, 3, PADDED)],
        {"dropout_p": 0.4},
    ),
    "one image, one channel": ((1, 1, 6, 6), [(1, 3, PADDED)], {"pool": 2}),
    "large images": ((2, 3, 48, 46), [(4, 3, PADDED)], {"pool": 2, "dropout_p": 0.5}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fast way for maps of any size; buffers of any size come from the pool."""
    monkeypatch.setattr(fast, "WORTH_IT", 0)
    monkeypatch.setattr(buffers, "SMALLEST", 0)
    monkeypatch.setattr(general, "CASES", {**general.CASES, **CASES})
    yield
    assert compiler.enabled(), "a pass did not compile"


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ran of the fast way since the test began."""
    found: list[str] = []
    for name in ("train", "evaluate"):
        monkeypatch.setattr(fast, name, _noting(found, name, getattr(fast, name)))
    return found


def _noting(found: list[str], name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def noted(*args: Any) -> Tensor:
        found.append(name)
        return function(*args)

    return noted


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


def stage(
    channels: int = 8, size: int = 8, batch: int = 6, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Any, dict[str, Any]]:
    """(input, two layers, arguments) of a stage with everything."""
    layers = general.layers_for(3, [(channels, 3, PADDED), (channels, 3, PADDED)], torch.float32, "cpu")
    x = torch.randn(batch, 3, size, size).to(dtype).contiguous(memory_format=CL)
    return x.requires_grad_(), layers, {"pool": 2, "dropout_p": 0.25, "training": True}


def leaves(x: Tensor, layers: Any) -> list[Tensor]:
    return [x, *(t for layer in layers for t in layer[:4])]


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


# --- memory that is used again ---


def storages(*graphs: Tensor) -> set[int]:
    """Addresses of what graphs keep for backward."""
    found = set()
    for y in graphs:
        for t in y.grad_fn.saved_tensors:  # type: ignore[union-attr]
            if t is not None:
                found.add(t.untyped_storage().data_ptr())
    return found


def test_two_graphs_alive_share_nothing() -> None:
    x, layers, arguments = stage()
    shared = {t.untyped_storage().data_ptr() for t in leaves(x, layers)}
    torch.manual_seed(0)
    first = conv_stage(x, layers, **arguments)
    torch.manual_seed(0)
    expected = [g.clone() for g in torch.autograd.grad(first.sum(), leaves(x, layers), retain_graph=True)]
    second = conv_stage(2 * x, layers, **arguments)
    assert not (storages(first) & storages(second)) - shared
    torch.autograd.grad(second.sum(), leaves(x, layers))
    again = torch.autograd.grad(first.sum(), leaves(x, layers))
    assert all(torch.equal(a, b) for a, b in zip(expected, again))


def test_results_are_the_callers_own() -> None:
    """An output and an input's gradient that are kept are not written to by later calls."""
    x, layers, arguments = stage()
    y = conv_stage(x, layers, **arguments)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    kept = y.detach().clone(), dx.clone()
    for _ in range(3):
        conv_stage(x, layers, **arguments).sum().backward()
    assert torch.equal(y, kept[0])
    assert torch.equal(dx, kept[1])


def test_an_exception_on_the_way_back_loses_nothing() -> None:
    x, layers, arguments = stage()

    def interrupt(_: Tensor) -> None:
        raise KeyError("stop")

    y = conv_stage(x * 1.0, layers, **arguments)
    y.register_hook(interrupt)
    with pytest.raises(KeyError):
        y.sum().backward()
    test_two_graphs_alive_share_nothing()


def test_threads_do_not_share_buffers() -> None:
    """Four threads train at once; each gets what it gets alone."""

    def train(seed: int, results: dict[int, Any]) -> None:
        generator = torch.Generator().manual_seed(seed)
        layers = [
            ConvBNLayer(torch.randn(8, 3, 3, 3, generator=generator), None, torch.ones(8), torch.zeros(8), padding=1)
        ]
        layers[0].weight.requires_grad_()
        x = torch.randn(8, 3, 16, 16, generator=generator)
        found = []
        for _ in range(20):
            y = conv_stage(x, layers, 2, training=True)
            found.append(torch.autograd.grad(y.square().sum(), layers[0].weight)[0])
        results[seed] = found

    alone: dict[int, Any] = {}
    together: dict[int, Any] = {}
    for seed in range(4):
        train(seed, alone)
    threads = [threading.Thread(target=train, args=(seed, together)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert all(torch.equal(a, b) for a, b in zip(alone[seed], together[seed]))


def test_a_result_is_nobody_elses_while_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "SMALLEST", 1024)
    wrong: list[int] = []

    def fill(number: int) -> None:
        for _ in range(2000):
            t = buffers.dense(torch.float32, 1024).fill_(number)
            if not bool((t == number).all()):
                wrong.append(number)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=fill, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_buffers_of_its_own() -> None:
    x, layers, arguments = stage()
    torch.manual_seed(0)
    y = conv_stage(x, layers, **arguments)
    kept = [t.detach().clone() for t in y.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            # torch refuses backward in a child of a process that has run it in threads
            for _ in range(3):
                conv_stage(2 * x, layers, **arguments)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    saved = [t for t in y.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(saved, kept))


def test_buffers_that_nobody_wants_are_given_back() -> None:
    pool = buffers.Pool()
    held = take(pool, 4096)
    del held
    kept = take(pool, 8192)
    for _ in range(2 * buffers.SHORTEST):
        take(pool, 1024)
    assert pool.held() == 8192 + 1024
    assert kept.numel() == 8192


# --- what makes it fast ---


def test_a_steady_state_takes_no_fresh_memory() -> None:
    x, layers, arguments = stage(16, 16, 16)

    def step() -> None:
        conv_stage(x, layers, **arguments).sum().backward()

    for _ in range(12):  # sizes that fault are found out
        step()
    held = buffers.POOL.held()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        step()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert buffers.POOL.held() <= held
    # the smallest of the maps is 1 MB, 256 pages
    assert faults < 3 * 200


def test_new_memory_and_memory_used_again_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, layers, arguments = stage(16, 16, 16)

    def results(faulted: bool) -> list[Tensor]:
        monkeypatch.setattr(buffers.FRESH, "faulted", lambda nbytes: faulted)
        torch.manual_seed(0)
        y = conv_stage(x, layers, **arguments)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves(x, layers))]

    for a, b in zip(results(True), results(False)):
        assert torch.equal(a, b)


def test_memory_that_faults_is_tried_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [0]
    monkeypatch.setattr(buffers, "_faults", lambda: faults[0])
    fresh, mapped = buffers.Fresh(), [True]

    def call() -> bool:
        """Whether memory was made anew."""
        if fresh.faulted(1 << 20):
            return False

        def make() -> Tensor:
            faults[0] += 256 if mapped[0] else 0
            return torch.empty(0)

        fresh.watch(1 << 20, make)
        return True

    made = [call() for _ in range(64)]
    assert [i for i, new in enumerate(made) if new] == [0, 5, 14, 31]
    assert not fresh.faulted(1 << 21)  # another size
    mapped[0] = False
    later = [call() for _ in range(64)]
    assert all(later[later.index(True) :])


def test_memory_that_does_not_fault_is_never_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_faults", lambda: 0)
    fresh = buffers.Fresh()
    for _ in range(8):
        assert not fresh.faulted(1 << 20)
        fresh.watch(1 << 20, lambda: torch.empty(0))


def saved_bytes(call: Callable[[], Tensor], owned: list[Tensor]) -> tuple[int, list[torch.dtype]]:
    """Bytes of distinct storages kept for backward, beside the leaves', and the dtypes of what is kept."""
    found: dict[int, int] = {}
    dtypes: list[torch.dtype] = []
    own = {t.untyped_storage().data_ptr() for t in owned}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            dtypes.append(t.dtype)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    del y
    return sum(found.values()), dtypes


@pytest.mark.parametrize("dtype", (torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.extended("torch"))))
def test_bytes_kept_and_calls_made(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 0.75 of what torch keeps, no integers among it, and fewer ATen calls over maps."""
    x, layers, arguments = stage(32, 16, 16)

    def call() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return conv_stage(x, layers, **arguments)

    ours, dtypes = saved_bytes(call, leaves(x, layers))
    call().sum().backward()  # compiles what it needs
    called = _calls(lambda: call().sum().backward())
    assert [name for name in called if name.startswith("tkernels: ")] == [f"tkernels: {name}" for name in COMPILED]
    assert not [name for name in called if "AOTDispatcher" in name]  # autograd's wrappers round a pass
    # no arithmetic besides: statistics move, a counter counts, a draw is scaled, gradients are added up
    assert {name for name in called if name in ARITHMETIC} == {"aten::lerp_", "aten::add_", "aten::div", "aten::sum"}
    assert called.count("aten::sum") == 1  # the test's own
    monkeypatch.setattr(fast, "WORTH_IT", 1 << 60)
    theirs, _ = saved_bytes(call, leaves(x, layers))
    assert ours <= 0.75 * theirs
    assert all(kept.is_floating_point for kept in dtypes)
    assert set(_calls(lambda: call().sum().backward())) >= PASSES
    assert not PASSES & set(called)
    # two layers: forward, the weights' gradients, and the input gradients as convolutions
    assert called.count("aten::convolution_backward") == 2
    assert sum(name.startswith("mkldnn::_convolution_pointwise") for name in called) == 4


# torch's passes over maps between convolutions; the pooling's make int64 indices and fill maps with zeros
PASSES = {
    "aten::native_batch_norm", "aten::native_batch_norm_backward", "aten::threshold_backward", "aten::feature_dropout",
    "aten::max_pool2d_with_indices", "aten::max_pool2d_with_indices_backward",
}  # fmt: skip


# ours, of two layers
COMPILED = (
    *("statistics", "normalize", "statistics", "end 2x2"),
    *("winners 2x2", "end sums 2x2", "end gradient 2x2", "sums", "gradient_in_place"),
)
ARITHMETIC = {f"aten::{name}{end}" for end in ("", "_") for name in (
    "add", "sub", "mul", "div", "pow", "rsqrt", "sqrt", "reciprocal", "lerp", "addcmul", "addcdiv", "sum", "mean",
    "relu", "clamp_min", "where", "maximum",
)}  # fmt: skip


def _calls(call: Callable[[], object]) -> list[str]:
    """Names of all calls, nested ones too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return [event.name for event in profile.events()]


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
