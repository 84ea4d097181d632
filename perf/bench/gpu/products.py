"""Each product and each pass alone, replayed from a CUDA graph, ours and the others' one after another."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

from perf import providers, schema
from perf.bench import measure, rows
from perf.bench.gpu import headline, problems
from perf.bench.gpu.problems import Case
from perf.bench.gpu.session import Item, Run
from perf.bench.measure import Subject, Timing
from perf.providers import Provider
from perf.schema import Measurement

# as a graph's replay is timed with the L2 cache cleared, a few repetitions are clear
EFFORT = dataclasses.replace(measure.QUICK, seconds=0.3)
# PyTorch's attention has several kernels; the plain call takes what it thinks best
ATTENTION = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
LOSSES = ("liger-kernel",)
Found = tuple[Provider, Timing | str]


def items(run: Run) -> list[Item]:
    """A comparison a case."""
    ours = providers.load(run.request.provider)
    cases = [case for case in problems.timed(run.request.dry) if case.operator in ours.functions]
    return [Item(str(case), functools.partial(compare, run, case, ours)) for case in cases]


def compare(
    run: Run, case: Case, ours: Provider, others: list[Provider] | None = None, passes: tuple[str, ...] | None = None
) -> None:  # fmt: skip
    """Time passes of a case (default: every one) with everybody; the baseline comes first, for the others' speedups.
    cuDNN takes its fastest algorithm."""
    first = dataclasses.replace(providers.load(providers.BASELINE), context=headline.tuned)
    contenders = [first, ours, *(_others(run, case) if others is None else others)]
    for mode in passes or problems.passes(case.operator):
        for contender, found in (_one_by_one if run.on_gpu else _in_turns)(run, case, mode, contenders):
            run.tell_timing(row(run, case, mode, contender.name, found))


def _others(run: Run, case: Case) -> list[Provider]:
    """Who else is worth a comparison: PyTorch's attention kernels, each alone; a loss that is installed."""
    if case.operator == "attention" and run.on_gpu:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        baseline = providers.load(providers.BASELINE)
        contexts = {
            name: functools.partial(sdpa_kernel, getattr(SDPBackend, value)) for name, value in ATTENTION.items()
        }
        return [dataclasses.replace(baseline, name=f"torch {name}", context=c) for name, c in contexts.items()]
    if case.operator == "cross_entropy" and run.on_gpu:
        return [providers.load(name) for name in LOSSES if _installed(name)]
    return []


def _installed(name: str) -> bool:
    with contextlib.suppress(Exception):
        return bool(providers.check([name]))
    return False


def _one_by_one(run: Run, case: Case, mode: str, contenders: list[Provider]) -> Iterator[Found]:
    for contender in contenders:
        with problems.triton_only(run), contender.context():
            try:
                found: Timing | str = measure.on_gpu(_prepared(run, case, mode, contender), "cudagraph", EFFORT)
            except Exception as error:  # a row of the report; the others go on
                found = measure.failure(error)
        yield contender, found


def _in_turns(run: Run, case: Case, mode: str, contenders: list[Provider]) -> Iterator[Found]:
    calls = {contender.name: _prepared(run, case, mode, contender)() for contender in contenders}
    timings = measure.interleaved(calls, measure.QUICK)
    yield from ((contender, timings[contender.name]) for contender in contenders)


def _prepared(run: Run, case: Case, mode: str, contender: Provider) -> Callable[[], Callable[[], object]]:
    return lambda: Subject(case.problem(run.device), contender, exact=False).call(mode)


def row(run: Run, case: Case, mode: str, provider: str, found: Timing | str) -> Measurement:
    """A line of timings.csv."""
    made = rows.made(
        Measurement, run.device, operator=case.operator, mode=mode, dtype=case.dtype, layout=case.layout,
        provider=provider, timing="cudagraph" if run.on_gpu else "wall", **dict(case.shape),
    )  # fmt: skip
    if isinstance(found, str):
        return made.having(status=found)
    rates = measure.rates(case.problem(run.device), mode, found)
    return made.having(**found.columns(), **rates, status=schema.OK)
