"""The fuzz itself: what is planted is found and printed as a test that fails with it and passes without."""

from __future__ import annotations

import argparse
import collections
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tkernels
from tests.fuzz import __main__ as command
from tests.fuzz import bodies, numbers, report, session
from tests.fuzz.by_seed import SHARES, case_of
from tests.fuzz.cases import Case
from tests.fuzz.check import check, differences
from tests.fuzz.draws import Draw
from tests.fuzz.mistakes import torch_refuses_too
from tests.fuzz.modules import OPERATORS, dropping_as
from tests.fuzz.recipes import LAYOUTS, T
from tests.fuzz.simplify import simplified

pytestmark = pytest.mark.gate("torch")


def _other_strides(y: Tensor) -> Tensor:
    return y.movedim(0, -1).contiguous().movedim(-1, 0) if y.dim() > 1 else y


def _other_gradient(y: Tensor) -> Tensor:
    if y.requires_grad:
        y.register_hook(lambda g: g * 1.01)
    return y


def _raises(y: Tensor) -> Tensor:
    raise RuntimeError("planted")


def _keeps_memory(y: Tensor) -> Tensor:
    """Results of one kind share memory, as they would of a broken pool."""
    if y.requires_grad:
        return y
    kept = _memory.setdefault((y.shape, y.dtype), y)
    return kept if kept is y else kept.copy_(y)


_memory: dict[Any, Tensor] = {}
PLANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "value": lambda y: y * 1.01,
    "one value": lambda y: y.index_fill(0, torch.tensor(0), 3.0) if y.dim() and y.numel() > 1 else y,
    "NaN": lambda y: y.nan_to_num() if y.is_floating_point() else y,
    "gradient": _other_gradient,
    "strides": _other_strides,
    "dtype": lambda y: y.float(),
    "view": lambda y: y.view_as(y),
    "error": _raises,
    "memory": _keeps_memory,
}


VALUES = ("value", "one value", "gradient")


def plant(monkeypatch: pytest.MonkeyPatch, operator: str, spoil: Callable[[Tensor], Tensor]) -> None:
    _memory.clear()
    true = getattr(tkernels.functional, operator)
    monkeypatch.setattr(tkernels.functional, operator, lambda *args, **options: spoil(true(*args, **options)))


def first_failure(body: str, operator: str, draws: int) -> tuple[Case, list[tuple[str, str]]]:
    for index in range(draws):
        _memory.clear()
        case = case_of(1, index, body, [operator])
        found = differences(case).differences
        if found:
            return case, found
    raise AssertionError(f"nothing found in {draws} draws")


def printed(case: Case, found: list[tuple[str, str]]) -> Callable[[], None]:
    """The test that the fuzz prints, from its text."""
    space: dict[str, Any] = {}
    exec(report.test_of(case, "found", "python -m tests.fuzz", found), space)
    test: Callable[[], None] = space["test_found"]
    return test


def simpler(case: Case, found: list[tuple[str, str]]) -> Case:
    kind = found[0][0]
    return simplified(case, lambda c: kind in [k for k, _ in differences(c).differences])


@pytest.mark.parametrize("name", PLANTS)
def test_what_is_planted_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as planted:
        plant(planted, "matmul", PLANTS[name])
        case, found = first_failure("cpu", "matmul", 200 if name in ("NaN", "memory") else 40)
        # what one case needs another for is not made simpler; whether values differ by chance takes long to say
        if name not in ("memory", *VALUES):
            case = simpler(case, found)
        test = printed(case, found)
        _memory.clear()
        with pytest.raises(AssertionError):
            test()
    test()


@pytest.mark.extended("torch")
@pytest.mark.parametrize("name", VALUES)
def test_differences_of_values_are_made_simpler(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as planted:
        plant(planted, "matmul", PLANTS[name])
        case, found = first_failure("cpu", "matmul", 40)
        simple = simpler(case, found)
        assert len(repr(simple)) < len(repr(case))
        test = printed(simple, found)
        with pytest.raises(AssertionError):
            test()
    test()


@pytest.mark.gate("ttsem")
def test_draws_of_the_kernels(monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    with monkeypatch.context() as planted:
        plant(planted, "matmul", PLANTS["value"])
        case, found = first_failure("kernels", "matmul", 30)
        test = printed(case, found)
        with pytest.raises(AssertionError):
            test()
    test()
    assert launches


def test_an_out_of_range_read_is_a_failure_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the executor raises is never the error that torch raises too."""
    fault = type("KernelFault", (RuntimeError,), {"__module__": "ttsem.sanitize"})

    def broken(*args: Any, **options: Any) -> Tensor:
        raise fault("reads past the end")

    monkeypatch.setattr(tkernels.functional, "matmul", broken)
    refused = Case("matmul", "cpu", {"a": T((2, 3)), "b": T((2, 3))})
    assert [kind for kind, _ in differences(refused).differences] == ["fault in forward"]


@pytest.mark.parametrize("body", bodies.BODIES)
def test_a_draw_is_that_of_its_seed_and_index(body: str) -> None:
    """And a case written down is the case."""
    cases = [case_of(3, index, body) for index in range(150)]
    written = [repr(case) for case in cases]
    assert written == [repr(case_of(3, index, body)) for index in range(150)]
    assert written != [repr(case_of(4, index, body)) for index in range(150)]
    assert {case.operator for case in cases} == set(SHARES)
    from tests.fuzz import check as names

    assert [repr(eval(text, vars(names))) for text in written] == written


@pytest.mark.parametrize("layout", [*LAYOUTS, "permuted 2 0 1", "every 2 1 3", "repeated 1"])
def test_a_tensor_is_the_same_each_time(layout: str) -> None:
    t = T((3, 4, 5), layout=layout, seed=5, special=((7, float("nan")),))
    one, two, other = t.make(), t.make(), t.make(again=1)
    assert one.shape == (3, 4, 5)
    assert torch.equal(one.nan_to_num(), two.nan_to_num())
    assert one.stride() == two.stride() == other.stride()
    assert not torch.equal(one.nan_to_num(), other.nan_to_num())
    assert torch.equal(t.make(dtype=torch.float64).nan_to_num(), one.double().nan_to_num())


def test_the_default_device_and_dtype_are_not_what_tensors_are_made_by() -> None:
    with torch.device("meta"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            made = T((2, 3)).make()
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(made, T((2, 3)).make())


def test_every_threshold_is_there() -> None:
    assert bodies.missing() == []


def test_patched_cases_take_the_passes() -> None:
    """And leave the sizes as they were."""
    sizes = tkernels.cpu.buffers.SMALLEST
    tensors = {"input": T((8, 16), grad=True), "weight": T((16,)), "bias": T((16,))}
    case = Case("batch_norm", "cpu", tensors, {"training": True, "activation": "relu"}, patched=True)
    with bodies.counting():
        before = bodies.RAN["pass batch norm relu"]
        check(case)
        assert bodies.RAN["pass batch norm relu"] == before + 1
        check(case.changed(patched=False))
        assert bodies.RAN["pass batch norm relu"] == before + 1
    assert sizes == tkernels.cpu.buffers.SMALLEST


def test_what_was_written_to_is_not_what_was_given() -> None:
    """The target written to between forward and backward is out of range."""
    tensors = {
        "input": T((64, 16, 3), dtype="bfloat16", seed=93723, special=((5671, -1e-42),), grad=True),
        "target": T((64, 3), dtype="int64", values="index 16 5 0", layout="turned", seed=796395),
    }
    options = {"reduction": "mean", "label_smoothing": 0.0, "ignore_index": 5}
    case = Case("cross_entropy", "cpu", tensors, options, mode="autocast bfloat16 off", gradient="sliced")
    check(case.changed(mutate="target", patched=True, fresh=True, seed=948395))


@pytest.mark.gate("ttsem")
def test_float64_drops_what_kernels_drop() -> None:
    """The next layer's statistics take the scale of one channel away: its gradient is rounding of large terms."""
    tensors = {
        "input": T((3, 1, 7, 6), seed=867165), "w0": T((1, 1, 2, 3), seed=1031641),
        "g0": T((1,), seed=785441, grad=True), "w1": T((1, 1, 5, 3), seed=359984), "w2": T((4, 1, 3, 1), seed=95257),
    }  # fmt: skip
    layers = [{"padding": "valid", "dilation": (1, 2)}, {"padding": 2}, {"padding": (1, 0), "dilation": 2}]
    options = {"layers": layers, "training": True, "pool": 2, "dropout_p": 0.5}
    check(Case("conv_stage", "kernels", tensors, options, seed=180070))


@pytest.mark.gate("ttsem")
def test_the_size_of_terms_of_a_module() -> None:
    """One key: the gradient of its scores is a difference of equal terms, here of 1e38."""
    tensors = {
        "query": T((3, 2, 4), seed=648016),
        "key": T((1, 2, 4), seed=585377, grad=True),
        "value": T((1, 2, 4), seed=809679, special=((50131, 3.4e38),), grad=True),
    }
    options = {
        "seed": 586263, "training": False, "arguments": {"embed_dim": 4, "num_heads": 1, "bias": True},
        "call": {"need_weights": False}, "module": "MultiheadAttention",
    }  # fmt: skip
    check(Case("module", "kernels", tensors, options, gradient="stepped", seed=155800))


@pytest.mark.gate("ttsem")
def test_the_size_of_terms_after_a_write() -> None:
    """One query sees one key: the key's gradient is a difference of equal terms, also where torch refuses backward."""
    tensors = {
        "query": T((1, 4, 1, 8), seed=437129),
        "key": T((1, 4, 8, 8), seed=791915, grad=True),
        "value": T((1, 4, 8, 8), layout="turned", seed=919677),
    }
    check(Case("attention", "kernels", tensors, {"is_causal": True}, mutate="value"))


def exact_of(x: Tensor) -> numbers.Exact:
    return lambda: (x, x)


def test_numbers() -> None:
    """What is far, and what is not."""
    x = torch.randn(10_000, dtype=torch.float64)
    theirs, dtype = x.bfloat16(), torch.bfloat16
    assert numbers.far(theirs, theirs, exact_of(x), dtype) is None
    assert numbers.far((x * (1 + 2e-3)).bfloat16(), theirs, exact_of(x), dtype) is None
    assert numbers.far((x * 1.1).bfloat16(), theirs, exact_of(x), dtype) is not None
    one = theirs.clone()
    one[17] += 1
    assert "largest error" in str(numbers.far(one, theirs, exact_of(x), dtype))
    one[17] = float("nan")
    assert "NaN in 1 places, torch in 0" in str(numbers.far(one, theirs, exact_of(x), dtype))
    big = torch.tensor([65504.0, 1.0], dtype=torch.float16)
    infinite = torch.tensor([float("inf"), 1.0], dtype=torch.float16)
    assert numbers.far(infinite, big, exact_of(big.double()), torch.float16) is None
    assert numbers.far(infinite, big / 4, exact_of(big.double() / 4), torch.float16) is not None


def test_nan_and_infinities_are_accounted_for_one_by_one() -> None:
    """Each as torch has it, or the truth, or another way of torch's, or where parts of a sum pass the range."""
    nan, inf = float("nan"), float("inf")
    mine, theirs, truth = torch.tensor([[2.0, nan, 1.0], [inf, nan, 1.0], [2.0, 1.0, 1.0]]).unbind()
    exact = exact_of(truth.double())
    assert numbers.far(mine, theirs, exact, torch.float32) is None
    wrong = torch.tensor([nan, nan, 1.0])
    assert numbers.far(wrong, theirs, exact, torch.float32) == "NaN in 2 places, torch in 1, of 3"
    assert numbers.far(wrong, theirs, exact, torch.float32, ways=numbers.Ways(others=lambda: [wrong])) is None
    sizes = torch.tensor([1e39, 0.0, 0.0], dtype=torch.float64)
    assert numbers.far(wrong, theirs, exact, torch.float32, ways=numbers.Ways(sizes=lambda: sizes)) is None
    assert numbers.far(wrong, theirs, exact, torch.float32, ways=numbers.Ways(sizes=lambda: sizes / 10)) is not None


def test_errors_of_one_distribution() -> None:
    ours, theirs = torch.randn(2, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).exp()
    rows = [(a, t, a, t) for a, t in zip(ours.tolist(), theirs.tolist())]
    assert numbers.by_chance(rows)
    assert not numbers.by_chance([(3 * a, t, a, t) for a, t, _, _ in rows])
    assert not numbers.by_chance([(a, t, 3 * a, t) for a, t, _, _ in rows])
    assert not numbers.by_chance(rows[:5])


@pytest.mark.parametrize("always", (False, True))
def test_an_error_by_chance(always: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call's error over the bound is a failure where other values have it too."""
    calls = []

    def spoil(y: Tensor) -> Tensor:
        calls.append(y)
        return y * (1 + 1e-5) if always or len(calls) == 1 else y

    plant(monkeypatch, "matmul", spoil)
    told = differences(Case("matmul", "cpu", {"a": T((5, 7)), "b": T((7, 3), seed=1)}))
    assert [kind for kind, _ in told.differences] == ["output"] * always
    assert ("by chance" in told.events) is not always
    assert len(calls) > 10


def test_a_call_has_one_mistake() -> None:
    d = Draw(Random(0), "cpu", False, False)
    assert [d.wrong(0.0), d.wrong(1.0), d.wrong(1.0)] == [False, True, False]


def test_mistakes_of_empty_batches_and_of_later_layers() -> None:
    """Errors of ours that torch has only for others, or when it gets so far."""
    empty = Case("conv2d", "cpu", {"input": T((0, 2, 5, 5)), "weight": T((3, 2, 3, 3))}, {"dilation": 0})
    assert torch_refuses_too(empty, RuntimeError())
    assert not torch_refuses_too(empty, ValueError())
    assert not torch_refuses_too(empty.changed(options={}), RuntimeError())
    layers = [{}, {"padding": "same", "stride": 2}]
    tensors = {"input": T((2, 1, 2, 2)), "w0": T((1, 1, 3, 3)), "w1": T((1, 1, 3, 3))}
    assert torch_refuses_too(Case("conv_stage", "cpu", tensors, {"layers": layers}), RuntimeError())
    assert not torch_refuses_too(Case("conv_stage", "cpu", tensors, {"layers": layers}), TypeError())
    tensors = {"input": T((1, 1, 3, 3)), "w0": T((1, 1, 3, 3))}
    one_value = Case("conv_stage", "cpu", tensors, {"layers": [{}], "training": True, "pool": 2})
    assert torch_refuses_too(one_value, RuntimeError())
    tensors = {name: T((3, 4)) for name in ("query", "key", "value")}
    grouped = Case("attention", "kernels", tensors, {"enable_gqa": True, "dropout_p": 1.5})
    assert torch_refuses_too(grouped, RuntimeError())


def test_torchs_other_ways() -> None:
    """Flash attention of any rank and layout; dropout in float64 as another dtype draws it."""
    tensors = {
        name: T((3, 6, 8), layout="transposed", seed=i).make() for i, name in enumerate(("query", "key", "value"))
    }
    (side,) = OPERATORS["attention"].others({"is_causal": True})
    torch.testing.assert_close(side.call(tensors), F.scaled_dot_product_attention(*tensors.values(), is_causal=True))
    x = torch.randn(4, 5, 3, 3)
    for dropout in ("dropout", "dropout2d"):
        torch.manual_seed(1)
        expected = getattr(F, dropout)(x, 0.25)
        torch.manual_seed(1)
        with dropping_as(torch.float32):
            torch.testing.assert_close(getattr(F, dropout)(x.double(), 0.25), expected.double(), rtol=1e-6, atol=0.0)


def arguments(**given: Any) -> argparse.Namespace:
    found = command.parser().parse_args([])
    for name, value in given.items():
        setattr(found, name, value)
    return found


def test_the_exit_status() -> None:
    counts: collections.Counter[str] = collections.Counter({"calls": 9, "draw matmul": 9})
    ran: collections.Counter[str] = collections.Counter()
    assert session.conclude(arguments(), counts, ran, 1.0, 0) == 0
    assert session.conclude(arguments(), counts, ran, 1.0, 1) == 1
    assert session.conclude(arguments(), counts + collections.Counter(failures=1), ran, 1.0, 0) == 1
    counts["draw batch_norm"] = 100
    assert session.conclude(arguments(), counts, ran, 1.0, 0) == 2
    counts["fast batch_norm pass"] = 1
    assert session.conclude(arguments(), counts, ran, 1.0, 0) == 0
    assert session.conclude(arguments(body="kernels"), counts, ran, 1.0, 0) == 2


def test_a_draw_that_kills_the_process_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next worker goes on behind it."""
    started = []

    def worker(given: argparse.Namespace, progress: Path, first: int, minutes: float) -> int:
        started.append(first)
        counts = {"calls": 5, "draw matmul": 5}
        progress.write_text(json.dumps({"index": first + 4, "counts": counts, "ran": {"pass statistics": 2}}))
        return -signal.SIGSEGV if first == 0 else 0

    monkeypatch.setattr(command, "_worker", worker)
    assert command.supervise(arguments(seed=7)) == 1
    said = capsys.readouterr().out
    assert started == [0, 5]
    assert "SIGSEGV" in said
    assert "--seed 7 --only 4" in said
    assert "10 calls" in said
    assert "4 passes" in said


def test_a_worker_that_has_grown_makes_room_for_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Which goes on at the next index, with nothing counted as a failure."""
    monkeypatch.setattr(session, "MOST_MEMORY", 0)
    started = []

    def worker(given: argparse.Namespace, progress: Path, first: int, minutes: float) -> int:
        started.append(first)
        given = argparse.Namespace(**{**vars(given), "first": first})
        return command.FULL if not session.Session(given, progress, 300).run() else 0

    monkeypatch.setattr(command, "_worker", worker)
    assert command.supervise(arguments(op=["matmul"], draws=3)) == 0
    assert started == [0, 1, 2, 3]
    assert "3 calls" in capfd.readouterr().out


def test_the_command() -> None:
    """A few draws in a process of their own; the help; an operator that there is not."""
    run = [sys.executable, "-m", "tests.fuzz"]
    done = subprocess.run([*run, "--draws", "3", "--op", "matmul"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(matmul 3)" in done.stdout.splitlines()[-1]
    assert "0 failures" in done.stdout.splitlines()[-1]
    with pytest.raises(SystemExit) as stopped:
        command.main(["--op", "sine"])
    assert stopped.value.code == 2
    assert "--minutes" in command.parser().format_help()
