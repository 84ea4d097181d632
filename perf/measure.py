"""Measuring one operator at one shape: correctness against float64 first, then time, memory and host cost.

On a CPU the providers take turns, one repetition each, so that whatever else the machine does hits all alike, and
repetitions in which another process took the CPU are left out where enough others remain. On a GPU
triton.testing.do_bench times each provider with CUDA events, after warm-up and with the L2 cache cleared before each
repetition; a CUDA graph's replay is timed in the same way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perf import providers
from perf.operators import Operator, Sources, Tensors
from perf.providers import Provider
from perf.shapes import Shape

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# A result may be so many times as far from float64 as PyTorch's, plus so many roundings, before it counts as wrong
WORSE_THAN_TORCH = 4.0
ROUNDINGS = 16.0
# repetitions on a CPU, however long they take
LEAST_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is measured: an operator at a shape, dtype and layout on a device."""

    operator: Operator
    shape: Shape
    dtype: torch.dtype
    layout: str
    device: str


@dataclasses.dataclass(frozen=True)
class Effort:
    """Seconds to spend on a provider's timing, and the least number of repetitions unless they take four times that."""

    seconds: float
    repetitions: int


NORMAL = Effort(1.0, 15)
QUICK = Effort(0.15, 9)


class Subject:
    """One provider's call of an operator, with what backward is asked for."""

    def __init__(self, problem: Problem, provider: Provider, *, exact: bool, double: bool = False) -> None:
        operator = problem.operator
        tensors = operator.tensors(problem.shape, Sources(problem.dtype, problem.layout, problem.device))
        if double:
            tensors = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
        self.leaves = {name: tensors[name].requires_grad_() for name in operator.differentiable}
        self._forward = operator.bind(provider.functions[operator.name], tensors, problem.shape, exact)
        self._problem = problem

    def forward(self) -> Tensor:
        return self._forward()

    def gradients(self, output: Tensor, output_gradient: Tensor, retain: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, list(self.leaves.values()), output_gradient, retain_graph=retain)

    def output_gradient(self, output: Tensor) -> Tensor:
        """What flows into backward: ones for a scalar, else random values in the layout of an image."""
        if output.dim() == 0:
            return torch.ones_like(output)
        # not the draws of the input: batch norm's gradient of its own input is zero
        source = Sources(self._problem.dtype, self._problem.layout, self._problem.device, seed=1)
        draw = source.image if output.dim() == 4 else source.normal
        return draw(*output.shape).to(output.dtype)

    def call(self, mode: str) -> Callable[[], object]:
        """What is timed in a mode."""
        if mode == "fwd":
            return self._forward_only
        output = self.forward()
        gradient = self.output_gradient(output)
        if mode == "bwd":
            return lambda: self.gradients(output, gradient, retain=True)
        return lambda: self.gradients(self.forward(), gradient)

    def _forward_only(self) -> Tensor:
        with torch.no_grad():
            return self.forward()


@dataclasses.dataclass(frozen=True)
class Check:
    """How far a provider is from float64 (relative norm), and what it launched, by mode; or why it cannot be timed."""

    status: str
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    config: dict[str, str] = dataclasses.field(default_factory=dict)


class Reference:
    """The float64 result of a problem, and PyTorch's own error in the dtype measured."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        baseline = providers.load(providers.BASELINE)
        self._exact = _evaluate(Subject(problem, baseline, exact=True, double=True))
        self.torch_errors = self._errors(_evaluate(Subject(problem, baseline, exact=True)))

    def check(self, provider: Provider) -> Check:
        """Run a provider once and compare; what it raises becomes its status."""
        if self._problem.operator.name not in provider.functions:
            return Check(f"unsupported: {provider.name} has no {self._problem.operator.name}")
        if provider.gpu_only and self._problem.device == "cpu":
            return Check(f"unsupported: {provider.name} runs on GPUs only")
        try:
            subject = Subject(self._problem, provider, exact=True)
            # the provider's context may replace PyTorch's own operators: neither the draws nor the comparison see it
            with _recorded_launches() as launched, provider.context():
                output = subject.forward()
                in_forward = len(launched)
                results = _with_gradients(subject, output)
            errors = self._errors(results)
        except Exception as error:  # whatever a provider does wrong is a row of the report
            return Check(failure(error))
        config = {"fwd": launched[:in_forward], "bwd": launched[in_forward:], "full": launched}
        status = self._verdict(errors)
        return Check(status, errors, {mode: "; ".join(names) for mode, names in config.items()})

    def _verdict(self, errors: dict[str, float]) -> str:
        for mode in ("fwd", "bwd"):
            ours, torchs = errors[mode], self.torch_errors[mode]
            if not ours <= WORSE_THAN_TORCH * torchs + ROUNDINGS * torch.finfo(self._problem.dtype).eps:
                what = "output" if mode == "fwd" else "gradients"
                return f"wrong: {what} off by {ours:.1e} in relative norm, PyTorch by {torchs:.1e}"
        return "ok"

    def _errors(self, results: Tensors) -> dict[str, float]:
        found = {name: _relative(results[name], exact) for name, exact in self._exact.items()}
        forward = found.pop("output")
        backward = max(found.values())
        return {"fwd": forward, "bwd": backward, "full": max(forward, backward)}


def _evaluate(subject: Subject) -> Tensors:
    return _with_gradients(subject, subject.forward())


def _with_gradients(subject: Subject, output: Tensor) -> Tensors:
    gradients = subject.gradients(output, subject.output_gradient(output))
    return {"output": output.detach(), **dict(zip(subject.leaves, gradients))}


def _relative(actual: Tensor, exact: Tensor) -> float:
    if actual.shape != exact.shape:
        raise ValueError(f"a result has shape {list(actual.shape)}, {list(exact.shape)} is right")
    difference = torch.linalg.vector_norm(actual.double() - exact).item()
    error = difference / max(torch.linalg.vector_norm(exact).item(), 1e-30)
    return error if math.isfinite(error) else math.inf


def failure(error: BaseException) -> str:
    """A status for what a provider raised."""
    text = " ".join(str(error).split())[:200] or type(error).__name__
    exhausted = any(sign in text for sign in ("can't allocate memory", "out of memory", "ALLOC_FAILED"))
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or exhausted:
        return f"out of memory: {text}"
    return f"error: {type(error).__name__}: {text}"


@contextlib.contextmanager
def _recorded_launches() -> Iterator[list[str]]:
    """Within the block every Triton launch leaves its kernel's name and configuration in the list."""
    launched: list[str] = []
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield launched
        return
    jit: Any = JITFunction
    original = jit.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("warmup"):
            blocks = [f"{name}={value}" for name, value in kwargs.items() if name.startswith("BLOCK")]
            options = [f"{name}={kwargs[name]}" for name in ("num_warps", "num_stages", "maxnreg") if name in kwargs]
            launched.append(f"{self.__name__}[{' '.join(blocks + options)}]")
        return original(self, *args, **kwargs)

    jit.run = run
    try:
        yield launched
    finally:
        jit.run = original


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds a call, and on a GPU the memory a call allocates and the time until it returns."""

    ms: tuple[float, float, float]
    peak_memory_mb: float | None = None
    host_us: float | None = None


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    low, middle, high = np.quantile(samples, (0.2, 0.5, 0.8))
    return float(low), float(middle), float(high)


def interleaved(calls: dict[str, Callable[[], object]], effort: Effort) -> dict[str, Timing]:
    """Time calls on the CPU in turns, each starting a round in its turn."""
    repeats, cost = {}, 0.0
    for name, call in calls.items():
        call()
        seconds = _clock(call, 1)
        # long enough for the clock and the interpreter not to matter
        repeats[name] = max(1, min(1000, round(1e-3 / max(seconds, 1e-7))))
        cost += seconds * repeats[name]
    rounds = int(min(max(effort.seconds * len(calls) / max(cost, 1e-9), effort.repetitions), 200))
    samples: dict[str, list[tuple[float, bool]]] = {name: [] for name in calls}
    names = list(calls)
    gc.collect()
    gc.disable()
    end = time.perf_counter() + 4 * effort.seconds * len(calls)
    try:
        for turn in range(rounds):
            if turn >= LEAST_ROUNDS and time.perf_counter() > end:
                break  # huge shapes, or a machine that others use
            for i in range(len(names)):
                name = names[(turn + i) % len(names)]
                before = _preemptions()
                ms = 1e3 * _clock(calls[name], repeats[name]) / repeats[name]
                samples[name].append((ms, _preemptions() == before))
    finally:
        gc.enable()
    return {name: Timing(quantiles(_undisturbed(taken))) for name, taken in samples.items()}


def _undisturbed(samples: list[tuple[float, bool]], least: int = 5) -> list[float]:
    """The samples in which no other process took the CPU away; all of them where those are too few."""
    clean = [ms for ms, undisturbed in samples if undisturbed]
    return clean if len(clean) >= least else [ms for ms, _ in samples]


def _preemptions() -> int:
    """How often the system took the CPU from this process so far; 0 where it does not tell."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource is not None else 0


def _clock(call: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start


def on_gpu(prepare: Callable[[], Callable[[], object]], timing: str, effort: Effort) -> Timing:
    """Time what ``prepare`` returns on the current GPU: the call as it is, or replayed from a CUDA graph."""
    from triton import testing

    call = prepare() if timing == "wall" else _graphed(prepare)
    rep = _budget_ms(call, effort)
    ms = tuple(testing.do_bench(call, warmup=rep / 4, rep=rep, quantiles=[0.2, 0.5, 0.8]))
    if timing != "wall":
        return Timing(ms)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    return Timing(ms, peak, _host_us(call))


def _graphed(prepare: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """The call captured once; what it returns stays in the graph's own memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # autograd runs backward on the stream of the forward call, which must be the one that is captured
        call = prepare()
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()

    def replay(inputs_of: Callable[[], object] = call) -> None:
        graph.replay()

    return replay


def _budget_ms(call: Callable[[], object], effort: Effort) -> float:
    """Milliseconds of repetitions: a call of microseconds is clear after a few, the longest gets its least number."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    once = 1e3 * (time.perf_counter() - start)
    return max(30 * effort.seconds, effort.repetitions * once)


def _host_us(call: Callable[[], object], repetitions: int = 20) -> float:
    samples = []
    for _ in range(repetitions):
        torch.cuda.synchronize()
        samples.append(1e6 * _clock(call, 1))
    torch.cuda.synchronize()
    return float(np.median(samples))


def work(problem: Problem, mode: str) -> tuple[int, int]:
    """Bytes and operations a mode of the problem has to do at least."""
    return problem.operator.work(problem.shape, mode, problem.dtype.itemsize)
