"""Two ways to compute the same product, one after the other: our kernels as they are, and with descriptors
(TKERNELS_TMA=1), beside cuBLAS and cuDNN. Values first: what is wrong need not be timed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from unittest import mock

from perf import providers
from perf.bench.gpu import checks, problems, products
from perf.bench.gpu.problems import Case
from perf.bench.gpu.session import Item, Run
from tkernels.core import descriptors, plan


@contextlib.contextmanager
def by_descriptors() -> Iterator[None]:
    """Within the block kernels take descriptors where they can."""
    with mock.patch.object(descriptors, "enabled", True):
        plan.forget()
        try:
            yield
        finally:
            plan.forget()


def items(run: Run) -> list[Item]:
    """A comparison a case."""
    return [Item(str(case), functools.partial(_compare, run, case)) for case in problems.compared(run.request.dry)]


def _compare(run: Run, case: Case) -> None:
    ours = providers.load(providers.OURS)
    other = dataclasses.replace(ours, name=f"{ours.name} by descriptors", context=by_descriptors)
    checks.check(run, other, dataclasses.replace(case, variant="by descriptors"))
    products.compare(run, case, ours, [other], ("fwd",))
