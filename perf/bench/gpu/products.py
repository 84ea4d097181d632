"""Each product and each pass alone, replayed from a CUDA graph, ours and its rivals one after another."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from perf import providers, schema
from perf.bench import machine, measure
from perf.bench.gpu import headline, problems
from perf.bench.gpu.problems import Case
from perf.bench.gpu.session import Item, Run
from perf.bench.measure import Subject, Timing
from perf.providers import Provider

# as a graph's replay is timed with the L2 cache cleared, a few repetitions are clear
EFFORT = dataclasses.replace(measure.QUICK, seconds=0.3)
# PyTorch's attention has several kernels; the plain call takes what it thinks best
ATTENTION = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
LOSSES = ("liger-kernel",)
Found = tuple[Provider, Timing | str]


def items(run: Run) -> list[Item]:
    """A contest a case."""
    ours = providers.load(run.request.provider)
    cases = [case for case in problems.timed(run.request.dry) if case.operator in ours.functions]
    return [Item(str(case), functools.partial(contest, run, case, ours)) for case in cases]


def contest(run: Run, case: Case, ours: Provider) -> None:
    """Time every pass of a case with everybody; the baseline comes first, for the others' speedups. cuDNN takes its
    fastest algorithm."""
    first = dataclasses.replace(providers.load(providers.BASELINE), context=headline.tuned)
    rivals = [first, ours, *_others(run, case)]
    for mode in problems.passes(case.operator):
        baseline = None
        for rival, found in (_one_by_one if run.on_gpu else _in_turns)(run, case, mode, rivals):
            baseline = found if rival.name == providers.BASELINE else baseline
            run.tell_timing(row(run, case, mode, rival.name, found, baseline))


def _others(run: Run, case: Case) -> list[Provider]:
    """Who else is worth a comparison: PyTorch's attention kernels, each alone; a loss that is installed."""
    if case.operator == "attention" and run.on_gpu:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        torchs = providers.load(providers.BASELINE)
        contexts = {
            name: functools.partial(sdpa_kernel, getattr(SDPBackend, value)) for name, value in ATTENTION.items()
        }
        return [dataclasses.replace(torchs, name=f"torch {name}", context=c) for name, c in contexts.items()]
    if case.operator == "cross_entropy" and run.on_gpu:
        return [providers.load(name) for name in LOSSES if _installed(name)]
    return []


def _installed(name: str) -> bool:
    with contextlib.suppress(Exception):
        return bool(providers.check([name]))
    return False


def _one_by_one(run: Run, case: Case, mode: str, rivals: list[Provider]) -> Iterator[Found]:
    for rival in rivals:
        with problems.triton_only(run), rival.context():
            try:
                found: Timing | str = measure.on_gpu(_prepared(run, case, mode, rival), "cudagraph", EFFORT)
            except Exception as error:  # a row of the report; the others go on
                found = measure.failure(error)
        yield rival, found


def _in_turns(run: Run, case: Case, mode: str, rivals: list[Provider]) -> Iterator[Found]:
    calls = {rival.name: _prepared(run, case, mode, rival)() for rival in rivals}
    timings = measure.interleaved(calls, measure.QUICK)
    yield from ((rival, timings[rival.name]) for rival in rivals)


def _prepared(run: Run, case: Case, mode: str, rival: Provider) -> Callable[[], Callable[[], object]]:
    return lambda: Subject(case.problem(run.device), rival, exact=False).call(mode)


def row(
    run: Run, case: Case, mode: str, provider: str, found: Timing | str, baseline: Timing | str | None
) -> dict[str, Any]:
    """A line of timings.csv."""
    named = {"operator": case.operator, "mode": mode, "dtype": case.dtype, "layout": case.layout, "provider": provider}
    named["timing"] = "cudagraph" if run.on_gpu else "wall"
    head = {**machine.stamp(), **machine.facts(run.device), **named, **dict(case.shape)}
    if isinstance(found, str):
        return {**head, "status": found}
    rates = measure.rates(case.problem(run.device), mode, found)
    speed = baseline.ms[1] / found.ms[1] if isinstance(baseline, Timing) else None
    return {**head, **found.columns(), **rates, "speedup_vs_torch": speed, "status": schema.OK}
