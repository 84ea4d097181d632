"""The headline: a training step of the CIFAR CNN with its optimizer, ours and everybody's."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

from perf.bench.gpu import training
from perf.bench.gpu.session import Item, Run
from perf.bench.gpu.training import Contender, Workload
from perf.providers import COMPILED
from perf.static import traffic

BATCHES, DRY_BATCHES = (256, 1024, 64), (4,)
# who is ready at once, the baseline of the others' speed-ups first; who compiles for a minute or more comes later
AT_ONCE = ("torch", "torch graph", "tkernels", "tkernels graph")
ONCE = ("tkernels sgd graph",)
MODES = ("reduce-overhead", "max-autotune")


def items(run: Run) -> list[Item]:
    """Batch by batch, whatever takes longest to compile last."""
    first, *others = DRY_BATCHES if run.request.dry else BATCHES
    order = [(name, first) for name in (*AT_ONCE, *ONCE)]
    order += [(name, batch) for batch in others[:1] for name in AT_ONCE]
    order += [(name, first) for name in (COMPILED, f"{COMPILED} graph")]
    order += [(name, batch) for batch in others[1:] for name in AT_ONCE]
    order += [(f"{COMPILED} {MODES[0]}", first), *((COMPILED, batch) for batch in others)]
    order += [(f"{COMPILED} {mode}", first) for mode in MODES[1:]]
    contenders = {each.name: each for each in _contenders(run)}
    return [Item(f"batch {n} {name}", functools.partial(_timed, run, contenders[name], n)) for name, n in order]


def _timed(run: Run, contender: Contender, batch: int) -> None:
    run.tell_timing(training.measured(run, contender, workload(batch)))


def workload(batch: int) -> Workload:
    return Workload("cnn", {"N": batch, "C": 3, "H": 32, "W": 32}, 10)


def _contenders(run: Run) -> Iterator[Contender]:
    yield Contender("tkernels", traffic.fused)
    yield Contender("tkernels graph", traffic.fused, graph=True)
    yield Contender("tkernels sgd graph", traffic.fused, graph=True, optimizer="sgd")
    yield Contender("torch", traffic.plain, context=tuned)
    yield Contender("torch graph", traffic.plain, graph=True, context=tuned)
    yield Contender(COMPILED, training.compiled(traffic.plain, run), context=tuned)
    # its own graphs leave the optimizer out; the whole step in one is what it can do at best
    yield Contender(f"{COMPILED} graph", training.compiled(traffic.plain, run), graph=True, context=tuned)
    for mode in MODES:
        build = training.compiled(traffic.plain, run, mode)
        yield Contender(f"{COMPILED} {mode}", build, replayed=run.on_gpu, context=tuned)


@contextlib.contextmanager
def tuned() -> Iterator[None]:
    """cuDNN tries its algorithms and takes the fastest."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
