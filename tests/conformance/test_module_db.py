"""PyTorch's own module inputs go through our twins: initial parameters, state_dict, values, gradients, buffers."""

from __future__ import annotations

import copy
import functools
import os
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tkernels
from tests.conformance import magnitudes
from tests.conformance.calls import Call, Outcome, replica, run
from tests.conformance.compare import STATISTICS, check_errors, check_gradients, check_output, close, normal_cotangent

GATES = ("torch", "ttsem", "cuda")
pytestmark = pytest.mark.gate(*GATES)
MODULES = {
    "Linear": "linear",
    "Conv2d": "conv2d",
    "BatchNorm1d": "batch_norm",
    "BatchNorm2d": "batch_norm",
    "BatchNorm3d": "batch_norm",
    "CrossEntropyLoss": "cross_entropy",
}


@functools.cache
def info(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_modules import module_db
    return next(m for m in module_db if m.module_cls is getattr(nn, name))


@functools.cache
def samples(name: str, training: bool) -> list[Any]:
    torch.manual_seed(0)
    module = info(name)
    return module.module_inputs_func(module, device="cpu", dtype=torch.float32, requires_grad=True, training=training)


@functools.cache
def errors(name: str) -> list[Any]:
    """What a torch that lists no error inputs for a module (before 2.10) leaves empty."""
    module = info(name)
    make = getattr(module, "module_error_inputs_func", None)
    if make is None:
        return []
    return make(module, device="cpu", dtype=torch.float32, requires_grad=False, training=True)


HERE = MODULES if os.environ.get("TK_GATE", "torch") in GATES else {}
TRAINS = {name: (True, False) if "BatchNorm" in name else (True,) for name in HERE}
SAMPLES = [(n, t, i) for n in HERE for t in TRAINS[n] for i in range(len(samples(n, t)))]
ERRORS = [(n, i) for n in HERE for i in range(len(errors(n)))]


def in_make_test(name: str, training: bool, index: int) -> bool:
    """Under ttsem the rest is for make test-extended: other ranks, evaluation, most of the losses."""
    return (
        name in ("Linear", "Conv2d")
        or (name == "BatchNorm2d" and training)
        or (name == "CrossEntropyLoss" and index % 7 == 0)
    )


def twins(name: str, given: Any, training: bool) -> tuple[nn.Module, nn.Module]:
    """Our module and torch's from the same constructor arguments and the same seed, on the CPU."""
    made = []
    for library in (tkernels.nn, nn):
        torch.manual_seed(3)
        module = getattr(library, name)(*given.args, **copy.deepcopy(given.kwargs))
        made.append(module.train(training))
    return made[0], made[1]


def check_states(mine: nn.Module, theirs: nn.Module) -> None:
    """Same state_dict, key by key to the bit, and the same parameters to train; each loads the other's."""
    ours, torchs = mine.state_dict(), theirs.state_dict()
    assert list(ours) == list(torchs)
    for key, value in torchs.items():
        assert ours[key].dtype == value.dtype, key
        assert torch.equal(ours[key], value), f"{key} starts from other draws than torch's"
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert getattr(ours, "_metadata", None) == getattr(torchs, "_metadata", None)
    copy.deepcopy(mine).load_state_dict(torchs, strict=True)
    copy.deepcopy(theirs).load_state_dict(ours, strict=True)


def forward(module: nn.Module, operator: str, given: Any, device: str, dtype: torch.dtype | None = None) -> Outcome:
    """Output and gradients of one forward of ``module`` on copies of the inputs."""
    names = ("input", "target") if operator == "cross_entropy" else ("input",)
    inputs = {**dict(zip(names, given.args)), **given.kwargs}
    inputs = {name: replica(value, device, dtype) for name, value in inputs.items()}
    own = {name: t for name, t in [*module.named_parameters(), *module.named_buffers()] if name in ("weight", "bias")}
    # the leaves go in by name so that every gradient is asked for; the module is closed over
    call = Call(operator, kwargs={**inputs, **own})
    return run(lambda **_: module(*inputs.values()), call, normal_cotangent)


def as_call(module: nn.Module, operator: str, inputs: dict[str, Tensor]) -> Call:
    """The functional call that ``module`` makes, for its scales."""
    arguments: dict[str, Any] = dict(inputs)
    kept = {
        "conv2d": ("stride", "padding", "dilation", "groups"),
        "batch_norm": (*STATISTICS, "eps"),
        "cross_entropy": ("ignore_index", "reduction", "label_smoothing"),
    }
    arguments.update({name: getattr(module, name) for name in kept.get(operator, ())})
    arguments.update({name: getattr(module, name, None) for name in ("weight", "bias")})
    if operator == "batch_norm":
        arguments["training"] = module.training or module.running_mean is None
    if operator == "cross_entropy":
        del arguments["bias"]
    return Call(operator, kwargs=arguments)


@pytest.mark.parametrize(
    "name, training, index",
    [pytest.param(*s, marks=() if in_make_test(*s) else pytest.mark.extended("ttsem")) for s in SAMPLES],
)
def test_module(name: str, training: bool, index: int, device: str, triton_runs: bool, launches: list[str]) -> None:
    operator, sample = MODULES[name], samples(name, training)[index]
    mine, theirs = twins(name, sample.constructor_input, training)
    check_states(mine, theirs)
    precise = copy.deepcopy(theirs).double()
    magnified = copy.deepcopy(precise)  # its statistics before the forward moved them
    mine, theirs = mine.to(device), theirs.to(device)
    got = forward(mine, operator, sample.forward_input, device)
    if triton_runs and got.error is None and all(t.numel() for t in got.call.tensors().values()):
        assert launches, "the module ran without Triton"
    expected = forward(theirs, operator, sample.forward_input, device)
    check_errors(got, expected, f"{mine}")
    if expected.error is not None:
        return
    exact = forward(precise, operator, sample.forward_input, "cpu", torch.float64)
    for outcome in (got, expected, exact):
        assert outcome.output is not None
    inputs = {n: t for n, t in exact.call.tensors().items() if n in ("input", "target")}
    incoming = normal_cotangent(exact.output.detach())
    scales = magnitudes.of(as_call(magnified, operator, inputs), incoming, exact.output.detach())
    length = max(t.numel() for t in [*got.call.tensors().values(), got.output])
    check_output(got.output, expected.output)
    close(got.output, expected.output, exact.output, length, scales["output"], "output")
    check_gradients(got, expected, exact, length, scales)
    for key, buffer in theirs.named_buffers():
        moved = mine.get_buffer(key)
        assert moved.dtype == buffer.dtype, key
        close(moved.float(), buffer.float(), precise.get_buffer(key), length, scales.get(key), key)


@pytest.mark.gate("torch")
def test_there_are_samples() -> None:
    """torch 2.14 has 3, 4, 16, 14, 14 and 105; a list gone empty must not pass by doing nothing."""
    counts = {name: sum(module == name for module, *_ in SAMPLES) for name in MODULES}
    least = {"Linear": 3, "Conv2d": 3, "BatchNorm1d": 10, "BatchNorm2d": 10, "BatchNorm3d": 10, "CrossEntropyLoss": 50}
    assert all(counts[name] >= n for name, n in least.items()), counts


@pytest.mark.parametrize("name, index", ERRORS)
def test_module_error(name: str, index: int, device: str) -> None:
    """Construction and forward together: torch's exception class, wherever it shows."""
    sample = errors(name)[index].module_error_input

    def call(library: Any, device: str) -> Tensor:
        module = getattr(library, name)(*sample.constructor_input.args, **sample.constructor_input.kwargs).to(device)
        given = sample.forward_input
        return module(*(replica(t, device) for t in given.args), **given.kwargs)

    nothing = Call(MODULES[name])
    theirs = run(lambda: call(nn, "cpu"), nothing, None)
    assert theirs.error is not None
    check_errors(run(lambda: call(tkernels.nn, device), nothing, None), theirs, f"{name} {sample.constructor_input}")


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_factory_keywords(name: str, dtype: torch.dtype, device: str) -> None:
    """``device`` and ``dtype`` make the same parameters as torch's twin makes."""
    if name == "CrossEntropyLoss":
        pytest.skip("torch's CrossEntropyLoss takes no device and dtype")
    sizes = (3, 4, 2) if name == "Conv2d" else (3, 4) if name == "Linear" else (3,)
    made = []
    for library in (tkernels.nn, nn):
        torch.manual_seed(5)
        made.append(getattr(library, name)(*sizes, device=device, dtype=dtype))
    check_states(*made)
    assert all(p.device == q.device for p, q in zip(made[0].parameters(), made[1].parameters()))


@pytest.mark.gate("torch")
@pytest.mark.parametrize("name", MODULES)
def test_modules_say_what_they_are(name: str) -> None:
    """A twin prints torch's arguments, with whatever of its own, and can be deep-copied."""
    sample = samples(name, True)[-1].constructor_input
    mine, theirs = twins(name, sample, True)
    assert theirs.extra_repr() in mine.extra_repr()
    clone = copy.deepcopy(mine)
    assert list(clone.state_dict()) == list(theirs.state_dict())
