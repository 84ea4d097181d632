"""The tiles that the choosers of attention and matmul return, compiled: no complaint of perf/static/rules.py.

Attention's depend on what covers the head, on whether there is a mask or dropout, and on the kind of target; each is
compiled in the variants that want most registers. TK_AOT=all compiles all heads and options for all targets (an hour).
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from perf.static import aot, rules
from perf.static.cases import attention, matmul, tf32
from tkernels.core import targets
from tkernels.core.config import Config
from tkernels.ops.attention import config as tuning

pytestmark = pytest.mark.gate("aot")

EVERYTHING = os.environ.get("TK_AOT") == "all"
# sm_86 stands for sm_80 and sm_89: their tiles are the same, its shared memory the smallest
TARGETS: tuple[str, ...] = (
    tuple(targets.TARGETS) if EVERYTHING else ("sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
)
HEADS = (16, 32, 64, 80, 96, 128, 192, 256) if EVERYTHING else (64, 80, 192)
OPTIONS = ("", "causal", "added", "added dropout", "boolean dropout") if EVERYTHING else ("causal", "added dropout")
PASSES = ("forward", "dq", "dkv")
# in make test: one tile of each kind of target and of each pass, and each pass where its products can run one at a time
FEW = {
    ("sm_90", "forward", 64, "causal", "bf16"), ("sm_90", "dkv", 64, "added dropout", "bf16"),
    ("sm_86", "forward", 64, "causal", "bf16"), ("sm_90", "dq", 64, "causal", "bf16"),
    ("sm_100", "dkv", 80, "added dropout", "bf16"), ("gfx942", "dq", 80, "added dropout", "bf16"),
    ("gfx1100", "forward", 64, "added dropout", "bf16"), ("sm_120", "dkv", 80, "causal", "ieee"),
}  # fmt: skip


def _variants() -> Iterator[tuple[str, str, int, str, str]]:
    """Target, pass, head, options, precision."""
    for target in TARGETS:
        for name in PASSES:
            for options in OPTIONS:
                yield from ((target, name, head, options, "bf16") for head in HEADS)
                wide = (16, 32, 64, 80, 96, 128) if EVERYTHING else (80,)
                yield from ((target, name, head, options, precision) for head in wide for precision in ("ieee", "tf32"))


def _params() -> list[Any]:
    extended = pytest.mark.extended("aot")
    return [
        pytest.param(*each, id=" ".join(map(str, each)), marks=[] if each in FEW else [extended])
        for each in _variants()
        if not (each[-1] == "tf32" and not targets.TARGETS[each[0]].has_tf32)
    ]


@pytest.mark.parametrize("target, name, head, options, precision", _params())
def test_tile_compiles_clean(target: str, name: str, head: int, options: str, precision: str) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    extras = "added" in options or "dropout" in options
    reason = tuning.why_not(head, head, dtype.itemsize, extras, targets.TARGETS[target])
    if reason is not None:
        pytest.skip(f"left to PyTorch: {reason}")
    run = functools.partial(attention.call, name, (2, 16, 16, 2048, 2048, head), options, dtype)
    compiled = aot.inspect(functools.partial(tf32, run) if precision == "tf32" else run, target)
    problems = [f"{facts.kernel}: {text}" for launch, facts in compiled for text in rules.complaints(launch, facts)]
    assert compiled
    assert not problems, "\n".join(problems)


def test_a_tile_too_large_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """No exception of perf/static/rules.py hides what attention spills, nor more shared memory than there is."""
    large = Config.of(num_warps=4, num_stages=3, BLOCK_M=128, BLOCK_N=64, BLOCK_D=128, BLOCK_V=128, CHUNK=128)
    monkeypatch.setattr(tuning, "dq", lambda *args: large)
    run = functools.partial(attention.call, "dq", (2, 16, 16, 2048, 2048, 128), "causal", torch.bfloat16)
    ((launch, facts),) = aot.inspect(run, "sm_86")
    assert [text.split()[0] for text in rules.complaints(launch, facts)][:2] == ["spills", "needs"]


# results narrower than 64 have too few tiles for any rule on how many warps a multiprocessor holds
ROWS, COLUMNS = (2, 17, 40, 200), (64, 512)


@pytest.mark.extended("aot")
@pytest.mark.parametrize("precision", ("bf16", "ieee"))
@pytest.mark.parametrize("target", TARGETS if EVERYTHING else ("sm_86", "sm_90", "gfx942"))
def test_matmul_compiles_clean(target: str, precision: str) -> None:
    """Every height and width of tile that matmul's chooser returns for long sums."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    problems = []
    for m, n in itertools.product(ROWS, COLUMNS):
        run = functools.partial(matmul.product, (m, 2048), (2048, n), "", dtype)
        for launch, facts in aot.inspect(run, target):
            problems += [f"{m}x2048 @ 2048x{n}, {facts.kernel}: {text}" for text in rules.complaints(launch, facts)]
    assert not problems, "\n".join(problems)


def test_what_is_left_to_pytorch() -> None:
    """Heads wider than 256; above 128 float32, and any on RDNA. Nothing else."""
    heads = (1, 16, 80, 128, 129, 192, 256, 257)
    for target, itemsize, head in itertools.product(targets.TARGETS.values(), (2, 4), heads):
        narrow = 128 if itemsize == 4 or target.name == "gfx1100" else 256
        for extras in (False, True):
            assert (tuning.why_not(head, 16, itemsize, extras, target) is None) == (head <= narrow)
