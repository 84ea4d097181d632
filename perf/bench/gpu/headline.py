"""The headline: a training step of the CIFAR CNN with its optimizer, ours and everybody's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from perf.bench.gpu import training
from perf.bench.gpu.session import Item, Run
from perf.bench.gpu.training import Rival, Task
from perf.static import traffic

BATCHES, DRY_BATCHES = (256, 1024, 64), (4,)
# who is ready at once, and who compiles for a minute or more, at the first batch and then at the others
AT_ONCE = ("tkernels", "tkernels graph", "torch", "torch graph")
ONCE = ("tkernels sgd graph",)
COMPILED, MODES = "torch.compile", ("reduce-overhead", "max-autotune")


def items(run: Run) -> list[Item]:
    """Batch by batch, whatever takes longest to compile last."""
    first, *others = DRY_BATCHES if run.request.dry else BATCHES
    rivals = {rival.name: rival for rival in _rivals(run)}
    found = [_item(run, rivals[name], first) for name in AT_ONCE]
    found += [_item(run, rivals[name], first) for name in ONCE]
    found += [_item(run, rivals[name], others[0]) for name in AT_ONCE if others]
    found += [_item(run, rivals[name], first) for name in (COMPILED, f"{COMPILED} graph")]
    found += [_item(run, rivals[name], batch) for batch in others[1:] for name in AT_ONCE]
    found += [_item(run, rivals[f"{COMPILED} {mode}"], first) for mode in MODES[:1]]
    found += [_item(run, rivals[COMPILED], batch) for batch in others]
    return [*found, *(_item(run, rivals[f"{COMPILED} {mode}"], first) for mode in MODES[1:])]


def _item(run: Run, rival: Rival, batch: int) -> Item:
    return Item(f"batch {batch} {rival.name}", lambda: run.tell_timing(training.measured(run, rival, task(batch))))


def task(batch: int) -> Task:
    return Task("cnn", {"N": batch, "C": 3, "H": 32, "W": 32}, 10)


def _rivals(run: Run) -> Iterator[Rival]:
    yield Rival("tkernels", traffic.fused)
    yield Rival("tkernels graph", traffic.fused, graph=True)
    yield Rival("tkernels sgd graph", traffic.fused, graph=True, optimizer="sgd")
    yield Rival("torch", traffic.plain, context=tuned)
    yield Rival("torch graph", traffic.plain, graph=True, context=tuned)
    yield Rival(COMPILED, training.compiled(traffic.plain, run), context=tuned)
    # its own graphs leave the optimizer out; the whole step in one is what it can do at best
    yield Rival(f"{COMPILED} graph", training.compiled(traffic.plain, run), graph=True, context=tuned)
    for mode in MODES:
        build = training.compiled(traffic.plain, run, mode)
        yield Rival(f"{COMPILED} {mode}", build, replayed=run.on_gpu, context=tuned)


@contextlib.contextmanager
def tuned() -> Iterator[None]:
    """cuDNN tries its algorithms and takes the fastest."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
