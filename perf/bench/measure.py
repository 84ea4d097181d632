"""Measuring one operator at one shape: correctness against float64 first, then time, memory and host cost.

On a CPU the providers take turns, one repetition each, so that whatever else the machine does hits all alike, and
repetitions in which another process took the CPU are left out where enough others remain; noise.py tells what is left
of that. On a GPU triton.testing.do_bench times each provider with CUDA events, after warm-up and with the L2 cache
cleared before each repetition; a CUDA graph's replay is timed in the same way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from perf import providers, schema
from perf.bench import machine, noise
from perf.bench.noise import Quartiles
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
# Roundings by which inputs are moved, so many times, to see what float64's gradients do where an activation or a
# pooling stands between two choices: it may take either, and then a correct gradient differs in whole elements
MOVED, MOVES = 4.0, 8
# repetitions on a CPU, however long they take
LEAST_ROUNDS = noise.LEAST_ROUNDS


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
    """One provider's call of an operator, with what backward is asked for. ``exact``: without randomness; ``precise``:
    the dtype that floating-point inputs are widened to; ``lay``: gives tensors another layout, by name."""

    def __init__(
        self,
        problem: Problem,
        provider: Provider,
        *,
        exact: bool,
        precise: torch.dtype | None = None,
        lay: Callable[[str, Tensor], Tensor] = lambda name, t: t,
    ) -> None:
        operator = problem.operator
        tensors = operator.tensors(problem.shape, Sources(problem.dtype, problem.layout, problem.device))
        if precise is not None:
            tensors = {name: t.to(precise) if t.is_floating_point() else t for name, t in tensors.items()}
        tensors = {name: lay(name, t) for name, t in tensors.items()}
        self.leaves = {name: tensors[name].requires_grad_() for name in operator.differentiable}
        self._forward = operator.bind(provider.functions[operator.name], tensors, problem.shape, exact)
        self._problem = problem

    def forward(self) -> Tensor:
        return self._forward()

    def gradients(self, output: Tensor, output_gradient: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, list(self.leaves.values()), output_gradient)

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
        asked = self._asked(mode)
        # an autograd function computes the gradient of whatever requires one, asked for or not
        for leaf in self.leaves.values():
            leaf.requires_grad_(any(leaf is wanted for wanted in asked))
        output = self.forward()
        gradient = self.output_gradient(output)
        if mode == "full":
            return lambda: self.gradients(self.forward(), gradient)
        return lambda: torch.autograd.grad(output, asked, gradient, retain_graph=True)

    def _asked(self, mode: str) -> list[Tensor]:
        """The tensors whose gradients a mode of backward computes."""
        if mode == "dgrad":
            return [self.leaves[self._problem.operator.differentiable[0]]]
        return [self.leaves["weight"]] if mode == "wgrad" else list(self.leaves.values())

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
        self._exact = evaluate(Subject(problem, baseline, exact=True, precise=torch.float64))
        self.torch_errors = self._errors(evaluate(Subject(problem, baseline, exact=True)))

    def check(self, provider: Provider) -> Check:
        """Run a provider once and compare; what it raises becomes its status."""
        if self._problem.operator.name not in provider.functions:
            return Check(f"unsupported: {provider.name} has no {self._problem.operator.name}")
        if provider.gpu_only and self._problem.device == "cpu":
            return Check(f"unsupported: {provider.name} runs on GPUs only")
        try:
            subject = Subject(self._problem, provider, exact=True)
            # the provider's context may replace PyTorch's own operators: neither the draws nor the comparison see it
            with recorded_launches() as launched, provider.context():
                output = subject.forward()
                in_forward = len(launched)
                results = with_gradients(subject, output)
            errors = self._errors(results)
        except Exception as error:  # whatever a provider does wrong is a row of the report
            return Check(failure(error))
        config = {"fwd": launched[:in_forward], "bwd": launched[in_forward:], "full": launched}
        status = self._verdict(errors)
        return Check(status, errors, {mode: "; ".join(names) for mode, names in config.items()})

    def _verdict(self, errors: dict[str, float]) -> str:
        for mode, what in (("fwd", "output"), ("bwd", "gradients")):
            wrong = too_far(what, errors[mode], self.torch_errors[mode], self._problem.dtype)
            if wrong and not (mode == "bwd" and errors[mode] <= 2 * self._choices):
                return wrong
        return schema.OK

    @functools.cached_property
    def _choices(self) -> float:
        """How far float64's gradients move at most where the inputs move by roundings of the dtype measured."""
        generator = torch.Generator(self._problem.device).manual_seed(1)
        return max(self._moved(generator) for _ in range(MOVES))

    def _moved(self, generator: torch.Generator) -> float:
        subject = Subject(self._problem, providers.load(providers.BASELINE), exact=True, precise=torch.float64)
        with torch.no_grad():
            for leaf in subject.leaves.values():
                noise = torch.empty_like(leaf).normal_(generator=generator)
                leaf.mul_(1 + MOVED * torch.finfo(self._problem.dtype).eps * noise)
        return self._errors(evaluate(subject))["bwd"]

    def _errors(self, results: Tensors) -> dict[str, float]:
        found = {name: relative(results[name], exact) for name, exact in self._exact.items()}
        forward = found.pop("output")
        backward = max(found.values())
        return {"fwd": forward, "bwd": backward, "full": max(forward, backward)}


def evaluate(subject: Subject) -> Tensors:
    """The output and every gradient, by name."""
    return with_gradients(subject, subject.forward())


def with_gradients(subject: Subject, output: Tensor) -> Tensors:
    """The output of a call that was made, and every gradient, by name."""
    gradients = subject.gradients(output, subject.output_gradient(output))
    return {"output": output.detach(), **dict(zip(subject.leaves, gradients))}


def too_far(what: str, error: float, torch_error: float, dtype: torch.dtype) -> str | None:
    """The status of a result so far from float64, where PyTorch's error is ``torch_error``; None where that is good
    enough."""
    if error <= WORSE_THAN_TORCH * torch_error + ROUNDINGS * torch.finfo(dtype).eps:
        return None
    return f"wrong: {what} off by {error:.1e} in relative norm, PyTorch by {torch_error:.1e}"


def relative(actual: Tensor, exact: Tensor) -> float:
    """The relative norm of the error; infinite where it is not finite. Raises ValueError for another shape."""
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
def recorded_launches() -> Iterator[list[str]]:
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


class Times(NamedTuple):
    """Milliseconds a call, percentiles of the repetitions."""

    p20: float
    p25: float
    p50: float
    p75: float
    p80: float


PERCENTILES = tuple(int(name[1:]) / 100 for name in Times._fields)


@dataclasses.dataclass(frozen=True)
class Timing:
    """What a call takes. On a CPU how many rounds there were, how many times as fast this call is as PyTorch's
    (``speedup``) and tkernels' as this one (``ratio``), the share of the time without a CPU, and page faults; on a GPU
    the memory a call allocates and microseconds until it returns."""

    ms: Times
    peak_memory_mb: float | None = None
    host_us: float | None = None
    rounds: int | None = None
    speedup: Quartiles | None = None
    ratio: Quartiles | None = None
    waited: float | None = None
    page_faults: float | None = None

    def columns(self) -> dict[str, Any]:
        """Its part of a row."""
        none = Quartiles(None, None, None)
        found = {
            **{f"ms_{name}": value for name, value in self.ms._asdict().items()},
            **dict(zip(("speedup_p25", "speedup_vs_torch", "speedup_p75"), self.speedup or none)),
            **dict(zip(("ratio_p25", "ratio_p50", "ratio_p75"), self.ratio or none)),
            "cpu_wait_pct": None if self.waited is None else 100 * self.waited,
            "rounds": self.rounds,
            "page_faults": self.page_faults,
            "peak_memory_mb": self.peak_memory_mb,
            "host_us": self.host_us,
        }
        return {**found, "noise": noise.reason(found)}


class Sample(NamedTuple):
    """One call's turn. ``clean``: no other process took the CPU meanwhile; ``waited``: share of the time for which a
    thread had no CPU."""

    ms: float
    clean: bool
    page_faults: float = 0.0
    waited: float = 0.0


def percentiles(samples: Sequence[float]) -> Times:
    """The percentiles of repetitions."""
    return Times(*np.quantile(samples, PERCENTILES).tolist())


def interleaved(calls: dict[str, Callable[[], object]], effort: Effort) -> dict[str, Timing]:
    """Time calls on the CPU in turns."""
    turn: dict[str, Callable[[], Sample]] = {}
    cost = 0.0
    for name, call in calls.items():
        call()
        seconds = _clock(call, 1)
        # long enough for the clock and the interpreter not to matter
        repeats = max(1, min(1000, round(1e-3 / max(seconds, 1e-7))))
        turn[name] = functools.partial(sample, call, repeats)
        cost += seconds * repeats
    return turns(turn, effort, cost, providers.OURS, dict.fromkeys(calls, providers.BASELINE))


def turns(
    turn: dict[str, Callable[[], Sample]], effort: Effort, cost: float, ours: str, baselines: Mapping[str, str]
) -> dict[str, Timing]:
    """Rounds in which everyone has a turn. ``cost``: seconds of a round; ``ours``: who is compared with everyone;
    ``baselines``: for each of them whom it is compared with."""
    count = int(min(max(effort.seconds * len(turn) / max(cost, 1e-9), effort.repetitions), 200))
    samples = rounds(turn, count, 4 * effort.seconds * len(turn))
    return {name: timing(taken, samples.get(ours), samples.get(baselines[name])) for name, taken in samples.items()}


def rounds(turn: dict[str, Callable[[], Sample]], count: int, seconds: float) -> dict[str, list[Sample]]:
    """So many rounds in which everyone has a turn, each beginning with another one; fewer where they take longer, as
    huge shapes do, or a machine that others use."""
    samples: dict[str, list[Sample]] = {name: [] for name in turn}
    names = list(turn)
    gc.collect()
    gc.disable()
    end = time.perf_counter() + seconds
    try:
        for i in range(count):
            if i >= LEAST_ROUNDS and time.perf_counter() > end:
                break
            for j in range(len(names)):
                name = names[(i + j) % len(names)]
                samples[name].append(turn[name]())
    finally:
        gc.enable()
    return samples


def sample(call: Callable[[], object], times: int) -> Sample:
    """A turn of so many calls."""
    waiting = noise.waiting()
    preempted, faults = _usage()
    ms = 1e3 * _clock(call, times)
    preempted_since, faults_since = _usage()
    waited = noise.waited_ms(waiting, noise.waiting()) / ms
    return Sample(ms / times, preempted_since == preempted, (faults_since - faults) / times, waited)


def timing(taken: list[Sample], ours: list[Sample] | None, baseline: list[Sample] | None) -> Timing:
    """What someone's turns say, beside those of tkernels and of PyTorch in the same rounds."""
    used = _undisturbed(taken)
    return Timing(
        percentiles([turn.ms for turn in used]),
        rounds=len(taken),
        speedup=times_as_fast(taken, baseline) if baseline else None,
        ratio=times_as_fast(ours, taken) if ours else None,
        waited=float(np.median([turn.waited for turn in used])),
        page_faults=float(np.median([turn.page_faults for turn in taken])) if resource is not None else None,
    )


def times_as_fast(own: Sequence[Sample], other: Sequence[Sample]) -> Quartiles:
    """How many times as fast someone is as another: the other's time over its own, round by round."""
    pairs = [Sample(b.ms / a.ms, a.clean and b.clean) for a, b in zip(own, other)]
    return noise.quartiles(pair.ms for pair in _undisturbed(pairs))


def _undisturbed(samples: Sequence[Sample], least: int = LEAST_ROUNDS) -> Sequence[Sample]:
    """The samples in which no other process took the CPU away; all of them where those are too few."""
    clean = [taken for taken in samples if taken.clean]
    return clean if len(clean) >= least else samples


def _usage() -> tuple[int, int]:
    """How often the system took the CPU from this process so far, and minor page faults; 0 where it does not tell."""
    if resource is None:
        return 0, 0
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_nivcsw, usage.ru_minflt


def _clock(call: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start


def on_gpu(prepare: Callable[[], Callable[[], object]], timing: str, effort: Effort) -> Timing:
    """Time what ``prepare`` returns on the current GPU: the call as it is, or replayed from a CUDA graph."""
    from triton import testing

    call = prepare() if timing == "wall" else graphed(prepare)
    rep = _budget_ms(call, effort)
    ms = Times(*testing.do_bench(call, warmup=rep / 4, rep=rep, quantiles=list(PERCENTILES)))
    if timing != "wall":
        return Timing(ms)
    return Timing(ms, gpu_peak_mb(call), host_us(call))


def gpu_peak_mb(call: Callable[[], object]) -> float:
    """Most memory a call allocates on the current GPU above what stands between calls, in 10^6 bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def graphed(prepare: Callable[[], Callable[[], object]]) -> Callable[[], object]:
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


def host_us(call: Callable[[], object], repetitions: int = 20) -> float:
    """Microseconds until a call on a GPU returns, not waiting for the GPU."""
    samples = []
    for _ in range(repetitions):
        torch.cuda.synchronize()
        samples.append(1e6 * _clock(call, 1))
    torch.cuda.synchronize()
    return float(np.median(samples))


def rates(problem: Problem, mode: str, timing: Timing | None) -> dict[str, Any]:
    """Columns of a row: the least bytes and operations of a mode, and the rates at which they were done."""
    moved, flops = problem.operator.work(problem.shape, mode, problem.dtype.itemsize)
    if timing is None:
        return {"bytes": moved, "flops": flops}
    tflops, gbps = machine.peaks(problem.device, problem.dtype, problem.operator.precision, moved)
    seconds = timing.ms.p50 / 1e3
    by_bytes, by_flops = moved / gbps / 1e9, flops / tflops / 1e12
    percent = 100 * max(by_bytes, by_flops) / seconds
    return {
        "bytes": moved,
        "flops": flops,
        "tflops": flops / seconds / 1e12,
        "gbps": moved / seconds / 1e9,
        "peak_tflops": tflops,
        "peak_gbps": gbps,
        "roofline_pct": percent,
        "above_roofline": _above(problem.device, moved, by_bytes >= by_flops) if percent > 100 else "",
    }


def _above(device: str, moved: int, by_bytes: bool) -> str:
    """Why a call is faster than the peak rates allow."""
    cache = machine.cache_bytes(device)
    holds = f"{moved / 1e6:.3g} MB, the last-level cache {cache / 1e6:.3g} MB"
    if by_bytes and moved <= cache:
        return f"cache: the operands fit into it: {holds}"
    rates = "; a busy machine measures its peaks too low" if device == "cpu" else ""
    return f"unexplained: {f'operands of {holds}' if by_bytes else 'more operations than at the peak rate'}{rates}"
