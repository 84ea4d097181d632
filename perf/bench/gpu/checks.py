"""Right or wrong: every output and gradient against float64, and the same bits however often and however it is run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import tkernels
from perf import operators, providers
from perf.bench import measure
from perf.bench.gpu import problems
from perf.bench.gpu.problems import EXPANDED, LAYS, Case
from perf.bench.gpu.results import CheckRow
from perf.bench.gpu.session import Item, Run
from perf.bench.measure import Subject
from perf.operators import Tensors
from perf.providers import Provider
from tkernels.core import mode

# Against float64 a result is wrong beyond these times PyTorch's error and roundings, in relative norm and at the
# maximum, and less exact beyond the project's own bounds (tests/numerics), errors below one rounding counted as one.
WRONG_NORM, WRONG_MAX = (measure.WORSE_THAN_TORCH, measure.ROUNDINGS), (4.0, 4.0)
LESS_EXACT_NORM, LESS_EXACT_MAX = 1.25, 2.0
# half a rounding to tf32: no error of products that may be formed in it counts as less, whatever a library took instead
TF32_ERROR = 2.0**-11
# bytes of fresh memory filled with NaN before a run: blocks of sizes that the allocator keeps apart
POISON = (1 << 9, 1 << 12, 1 << 16, 1 << 19, 1 << 21, 1 << 24, 1 << 27)
# a product that keeps a GPU busy for a fraction of a millisecond, so many of them for so many runs beside them
BUSY_SIZE, BUSY_PRODUCTS, BUSY_RUNS = 4096, 10, 20

# cases that are checked before any is repeated: the CIFAR CNN and its layers with the most kernels
FIRST = 6

Ways = dict[str, Callable[[Subject], Tensors]]
# (output, what it was computed from)
Forward = Callable[[], tuple[Tensor, list[Tensor]]]


def items(run: Run) -> list[Item]:
    """A comparison a case, and after the network's own layers those that run a thousand times."""
    provider = providers.load(run.request.provider)
    cases = [case for case in problems.checked(run.request.dry) if case.operator in provider.functions]
    checked = [Item(str(case), functools.partial(check, run, provider, case)) for case in cases]
    found: list[Item] = []
    for case, times in problems.repeated(run.request.dry):
        ways = {"": functools.partial(_forward, run, provider, case)}
        if case.operator == "linear_relu" and provider.name == providers.OURS:
            ways["with dropout"] = functools.partial(_with_dropout, run, case)
        for what, forward in ways.items():
            name = " ".join(part for part in (str(case), what, f"{times:,} times") if part)
            if case.operator in provider.functions:
                found.append(Item(name, functools.partial(repeat, run, name, times, provider, forward)))
    return [*checked[:FIRST], *found, *checked[FIRST:]]


class Checked(Subject):
    """A subject whose tensors lie as its case says, or ``plain``: kernels of PyTorch's may need an alignment that a
    variant has not, and its rounding has nothing to do with strides. ``clear``: where a gradient may flow."""

    def __init__(
        self, case: Case, device: str, provider: Provider, precise: torch.dtype | None = None, *, plain: bool = False,
        clear: Tensor | None = None,
    ) -> None:  # fmt: skip
        lay = LAYS[""] if plain else LAYS.get(case.variant, LAYS[""])
        super().__init__(case.problem(device), provider, exact=True, precise=precise, lay=lay)
        self._expanded, self._plain, self._clear = case.variant == EXPANDED, plain, clear
        self._gradient: Tensor | None = None

    def output_gradient(self, output: Tensor) -> Tensor:
        """The same tensor each time: a generator of its own cannot draw while a CUDA graph is captured."""
        if self._gradient is None:
            self._gradient = self._drawn(output)
        return self._gradient

    def _drawn(self, output: Tensor) -> Tensor:
        if self._expanded:
            ones = torch.ones((), dtype=output.dtype, device=output.device).expand_as(output)
            return ones.contiguous() if self._plain else ones
        drawn = super().output_gradient(output)
        return drawn if self._clear is None else drawn.mul_(self._clear)  # its layout stays


def check(run: Run, provider: Provider, case: Case) -> None:
    """Compare with the reference, then with itself."""
    problem, clear = case.problem(run.device), _clear_of_kinks(case, run.device)
    reference, precision = _reference(case, run.device, clear)
    baseline = providers.load(providers.BASELINE)
    baseline_results = measure.evaluate(Checked(case, run.device, baseline, plain=True, clear=clear))
    least = TF32_ERROR if _product_eps(case) > torch.finfo(problem.dtype).eps else 0.0
    with problems.triton_only(run), provider.context():
        subject = Checked(case, run.device, provider, clear=clear)
        poison(run.device)
        first = measure.evaluate(subject)
        for name, exact in reference.items():
            found = compare(first[name], baseline_results[name], exact, problem.dtype, least)
            run.tell("check", CheckRow(check=str(case), what=name, reference=precision, **found))
        del reference, baseline_results
        for way, again in _ways(run).items():
            poison(run.device)
            run.tell("check", CheckRow(check=str(case), what=way, status=_same(first, again(subject))))


def _reference(case: Case, device: str, clear: Tensor | None) -> tuple[Tensors, str]:
    """PyTorch's results in float64, or in float32 where that does not fit."""
    baseline = providers.load(providers.BASELINE)
    for precise, name in ((torch.float64, "float64"), (torch.float32, "float32")):
        try:
            return measure.evaluate(Checked(case, device, baseline, precise, plain=True, clear=clear)), name
        except torch.OutOfMemoryError:  # noqa: PERF203
            torch.cuda.empty_cache()
    raise torch.OutOfMemoryError(f"{case}: not even the float32 reference fits")


def _clear_of_kinks(case: Case, device: str) -> Tensor | None:
    """Where the input of a ReLU is farther from 0 than roundings reach. Elsewhere PyTorch, we and float64 may take
    different sides, each rightly, and one element of millions that does would look like a wrong gradient."""
    operator = case.operator.removesuffix("_relu")
    if operator == case.operator or case.variant == EXPANDED:
        return None
    before = dataclasses.replace(case, operator=operator)
    with torch.no_grad():
        z = Checked(before, device, providers.load(providers.BASELINE), torch.float64, plain=True).forward()
        return z.abs() > max(2 * _product_eps(case), 1e-4) * z.square().mean().sqrt()


def _product_eps(case: Case) -> float:
    """The roundings of what a case's products take: tf32 has bf16's range and float16's digits."""
    dtype, precision = operators.DTYPES[case.dtype], operators.get(case.operator).precision
    return 2.0**-10 if mode.dot_precision(dtype, precision) == "tf32" else torch.finfo(dtype).eps


def compare(actual: Tensor, baseline: Tensor, exact: Tensor, dtype: torch.dtype, least: float = 0.0) -> dict[str, Any]:
    """Errors against the reference, PyTorch's beside ours, and the verdict, in which PyTorch's count as ``least``."""
    errors = measure.relative(actual, exact), largest(actual, exact)
    others = measure.relative(baseline, exact), largest(baseline, exact)
    row = dict(zip(("error", "max_error", "torch_error", "torch_max_error"), (*errors, *others)))
    return {**row, "status": verdict(errors, (max(others[0], least), max(others[1], least)), torch.finfo(dtype).eps)}


def largest(actual: Tensor, exact: Tensor) -> float:
    """The largest error over the largest magnitude; infinite where it is not finite. An error of one element shows here
    as it does not in a norm."""
    if exact.numel() == 0:
        return 0.0
    error = (actual.to(exact.dtype) - exact).abs().max().item() / max(exact.abs().max().item(), 1e-30)
    return error if error == error else float("inf")  # NaN


def verdict(errors: tuple[float, float], others: tuple[float, float], eps: float) -> str:
    """'ok', or what is wrong with (relative norm, maximum) where PyTorch's are ``others``."""
    bounds = (("relative norm", WRONG_NORM, LESS_EXACT_NORM), ("the maximum", WRONG_MAX, LESS_EXACT_MAX))
    found = []
    for (where, (times, roundings), ratio), error, torch_error in zip(bounds, errors, others):
        if not error <= times * torch_error + roundings * eps:
            return f"wrong: off by {error:.1e} in {where}, PyTorch by {torch_error:.1e}"
        if max(error, eps) > ratio * max(torch_error, eps):
            found.append(f"{max(error, eps) / max(torch_error, eps):.2f} times PyTorch's error in {where}")
    return f"less exact: {', '.join(found)}" if found else "ok"


def _ways(run: Run) -> Ways:
    """How a case is run again. (The first call makes plans and compiles.)"""
    ways: Ways = {"again": measure.evaluate}
    if run.on_gpu:
        ways |= {"side stream": _beside, "profiled": _profiled, "CUDA graph": _replayed}
    return ways


def _beside(subject: Subject) -> Tensors:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = measure.evaluate(subject)
    torch.cuda.current_stream().wait_stream(stream)
    return results


def _profiled(subject: Subject) -> Tensors:
    """Each launch by Triton's own Python, and named."""
    with torch.autograd.profiler.profile():
        return measure.evaluate(subject)


def _replayed(subject: Subject) -> Tensors:
    """What a graph's replay writes over NaN."""
    results: Tensors = {}

    def call() -> None:
        results.update(measure.evaluate(subject))

    replay = measure.graphed(lambda: call)
    for t in results.values():
        t.fill_(torch.nan)
    replay()
    return results


def _same(first: Tensors, again: Tensors) -> str:
    """'ok', or in how many elements two runs differ."""
    for name, t in first.items():
        if t.shape != again[name].shape or t.dtype != again[name].dtype:
            return f"differs: {name} is {tuple(again[name].shape)} {again[name].dtype}, was {tuple(t.shape)} {t.dtype}"
        count = int(differing(t, again[name]))
        if count:
            return f"differs: {count:,} of {t.numel():,} elements of {name}"
    return "ok"


def differing(a: Tensor, b: Tensor) -> Tensor:
    """How many elements have other bits, a tensor on the device; NaN is like NaN."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return (a.view(bits) != b.view(bits)).sum()


def poison(device: str) -> None:
    """Leave NaN in the memory that the allocator hands out next: what a kernel does not write must show."""
    sizes = [size for size in POISON for _ in range(2 if size > 1 << 20 else 8)]
    held = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
    for block in held:
        block.fill_(255)


def repeat(run: Run, name: str, times: int, provider: Provider, forward: Forward) -> None:
    """Forward once, backward again and again beside a stream that keeps the tensor cores busy."""
    with problems.triton_only(run), provider.context():
        output, leaves = forward()
        gradient = torch.randn_like(output)
        first = torch.autograd.grad(output, leaves, gradient, retain_graph=True)
        wrong = torch.zeros((), dtype=torch.int64, device=run.device)
        keep_busy = _busy_stream() if run.on_gpu else lambda: None
        for i in range(times):
            if i % BUSY_RUNS == 0:
                keep_busy()
            again = torch.autograd.grad(output, leaves, gradient, retain_graph=True)
            wrong += sum((differing(a, b) for a, b in zip(first, again)), torch.zeros_like(wrong)) > 0
    if run.on_gpu:  # what the other stream still writes to is given back below
        torch.cuda.synchronize()
    count = int(wrong)
    status = f"differs: {count:,} of {times:,} runs from the first" if count else "ok"
    run.tell("check", CheckRow(check=name, what="beside a busy stream", status=status))


def _forward(run: Run, provider: Provider, case: Case) -> tuple[Tensor, list[Tensor]]:
    subject = Checked(case, run.device, provider)
    return subject.forward(), list(subject.leaves.values())


def _with_dropout(run: Run, case: Case) -> tuple[Tensor, list[Tensor]]:
    """The network's own hidden layer, whose backward draws dropout's mask again."""
    subject = Checked(case, run.device, providers.load(providers.OURS))
    x, w, b = subject.leaves.values()
    return tkernels.functional.linear(x, w, b, activation="relu", dropout_p=0.5, training=True), [x, w, b]


def _busy_stream() -> Callable[[], None]:
    """Gives a second stream a few milliseconds of products each time."""
    stream = torch.cuda.Stream()
    a, b = (torch.randn(BUSY_SIZE, BUSY_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    stream.wait_stream(torch.cuda.current_stream())

    def keep_busy() -> None:
        with torch.cuda.stream(stream):
            for _ in range(BUSY_PRODUCTS):
                torch.mm(a, b, out=out)

    return keep_busy
