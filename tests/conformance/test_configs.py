"""Every configuration that a chooser can return, on any target, is executed against float64 at a tiny shape.

The choosers of one operator that a call consults together are made to return the n-th configuration of each list.
Shapes leave partial tiles and, where blocks are small enough, have several programs.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from tests.conformance.calls import Call
from tests.conformance.compare import check_call
from tests.conformance.configurations import ALL, HEAD_PAIRS, Chosen

pytestmark = [pytest.mark.gate("ttsem", "cuda"), pytest.mark.extended("ttsem")]
CHOSEN = [c for c in ALL if c.module != "conv_stage"]  # those are in test_stage_configs.py
# The kernels that a call of each kind launches, by their choosers.
GROUPS = {
    ("linear", ""): (("forward", "dgrad", "wgrad"), ("finish", "finish_row")),
    ("matmul", ""): (("product",),),
    ("matmul", "dense"): (("vector",),),
    ("matmul", "transposed"): (("vector",),),
    **{("attention", f"{head}, {v_head}"): (("forward", "dq", "dkv"),) for head, v_head in HEAD_PAIRS},
    ("attention", ""): (("delta",),),
    ("conv", "wide"): (("forward", "dgrad", "wgrad"),),
    ("conv", "flat"): (("forward", "dgrad", "wgrad"),),
    ("conv", "depthwise"): (("depthwise_wgrad",),),
    ("conv", ""): (("pack", "merge", "mask"), ("depthwise",)),
    ("batch_norm", "planes"): (("statistics", "normalize", "gradient", "finalize"),),
    ("batch_norm", "columns"): (("statistics", "normalize", "gradient", "finalize"),),
    ("cross_entropy", "classes"): (("rows",),),
    ("cross_entropy", "pixels"): (("rows",),),
    ("cross_entropy", "strided"): (("rows",),),
    ("cross_entropy", ""): (("merge", "total"),),
}
# Choosers that return a configuration for another kernel than the call of their kind launches.
UNREACHED = {("conv", "depthwise", name) for name in ("forward", "dgrad", "wgrad")} | {
    ("conv", kind, "depthwise_wgrad") for kind in ("wide", "flat")
}


def _batches() -> list[Any]:
    """Groups of configurations that one call runs: the n-th of each chooser, those of a shorter list again."""
    batches = []
    for (module, kind), groups in GROUPS.items():
        for group in groups:
            lists = [[c for c in CHOSEN if (c.module, c.kind, c.chooser) == (module, kind, name)] for name in group]
            lists = [configs for configs in lists if configs]
            for i in range(max(map(len, lists), default=0)):
                batch = [configs[i % len(configs)] for configs in lists]
                batches.append(pytest.param(batch, id=f"{module} {kind}: {', '.join(map(str, batch))}"))
    return batches


def _draws(shape: Iterable[int], dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(tuple(shape)) * scale).to(dtype).requires_grad_()


def _largest(batch: list[Chosen], *blocks: str) -> int:
    """The largest of these blocks, as '<chooser>.<block>', among the batch; 1 if there is none."""
    sizes = [size for c in batch for name, size in c.config.blocks if f"{c.chooser}.{name}" in blocks]
    return max(sizes, default=1)


def _linear(batch: list[Chosen]) -> Call:
    dtype = batch[0].dtype
    rows = _largest(batch, "wgrad.BLOCK_M") + 1
    outputs = _largest(batch, "forward.BLOCK_N", "dgrad.BLOCK_N", "wgrad.BLOCK_N", "finish.BLOCK_N") + 1
    features = _largest(batch, "forward.BLOCK_K", "dgrad.BLOCK_K", "wgrad.BLOCK_K") + 1
    if _largest(batch, "finish_row.BLOCK_N") > 1:
        features = max(_largest(batch, "finish_row.BLOCK_N") // outputs + 1, 600)
    arguments = {"input": _draws((rows, features), dtype), "weight": _draws((outputs, features), dtype)}
    return Call("linear", kwargs={**arguments, "bias": _draws((outputs,), dtype), "activation": "relu"})


def _matmul(batch: list[Chosen]) -> Call:
    dtype, (c,) = batch[0].dtype, batch
    sizes = dict(c.config.blocks)
    k, n = sizes["BLOCK_K"] + 1, sizes["BLOCK_N"] + 1
    if c.kind == "dense":
        return Call("matmul", (_draws((k,), dtype), _draws((k, n), dtype)))
    if c.kind == "transposed":
        return Call("matmul", (_draws((n, k), dtype), _draws((k,), dtype)))
    return Call("matmul", (_draws((sizes["BLOCK_M"] + 1, k), dtype), _draws((k, n), dtype)))


def _attention(batch: list[Chosen]) -> Call:
    """A mask where the tiles are those of one, else in causal order."""
    dtype, witness = batch[0].dtype, batch[0].witness
    if batch[0].chooser == "delta":  # which is not asked for a dtype
        dtype = torch.bfloat16
    v_head = witness["v_head"]
    head, n_q, n_k = witness.get("head", 16), _rows(batch, "BLOCK_M"), _rows(batch, "BLOCK_N")
    shapes = {"query": (1, 1, n_q, head), "key": (1, 1, n_k, head), "value": (1, 1, n_k, v_head)}
    options = {"attn_mask": torch.rand(n_q, n_k) > 0.3} if witness.get("extras") else {"is_causal": True}
    return Call("scaled_dot_product_attention", kwargs={**{n: _draws(s, dtype) for n, s in shapes.items()}, **options})


def _rows(batch: list[Chosen], block: str) -> int:
    """One more than the largest tile of the batch has; for the row sums' tiles, which hold as many as fit, few."""
    return max(min(dict(c.config.blocks).get(block, 16), 128) for c in batch) + 1


def _conv(batch: list[Chosen]) -> Call:
    dtype, kind = batch[0].dtype, batch[0].kind
    outputs = _largest(batch, "forward.BLOCK_N", "dgrad.BLOCK_K", "wgrad.BLOCK_N", "mask.BLOCK_C") + 1
    inputs = _largest(batch, "forward.BLOCK_K", "dgrad.BLOCK_N", "wgrad.BLOCK_M", "pack.BLOCK_C") + 1
    groups, kernel, activation = 1, (1, 2), None
    if kind == "flat":
        inputs, kernel, outputs = 3, (3, 3), max(outputs, _largest(batch, "wgrad.BLOCK_M") + 1)
    elif any("depthwise" in c.chooser for c in batch):
        groups = _largest(batch, "depthwise_wgrad.BLOCK_C", "depthwise.BLOCK_C") + 1
        inputs, outputs, kernel = groups, groups, (1, 1)
        if _largest(batch, "depthwise_wgrad.BLOCK_T") > 1:
            kernel = (3, 3)
    elif kind == "":
        activation = "gelu"
    arguments: dict[str, Any] = {
        "input": _draws((2, inputs, 3, 3), dtype),
        "weight": _draws((outputs, inputs // groups, *kernel), dtype),
        "bias": _draws((outputs,), dtype),
        "padding": (kernel[0] // 2, kernel[1] // 2),
        "groups": groups,
        "activation": activation,
    }
    return Call("conv2d", kwargs=arguments)


def _batch_norm(batch: list[Chosen]) -> Call:
    columns = _largest(batch, "statistics.BLOCK_C", "normalize.BLOCK_C", "gradient.BLOCK_C") + 1
    shape = (3, 2, columns) if batch[0].kind == "planes" else (5, columns)
    vectors = {name: torch.rand(shape[1]) + 0.5 for name in ("running_mean", "running_var", "weight", "bias")}
    for name in ("weight", "bias"):
        vectors[name].requires_grad_()
    return Call("batch_norm", kwargs={"input": _draws(shape, torch.float32), **vectors, "training": True})


def _cross_entropy(batch: list[Chosen]) -> Call:
    classes = batch[0].witness.get("n_classes", 40)
    if batch[0].kind == "pixels":
        logits = _draws((2, classes, 19), torch.float32)
    elif batch[0].kind == "strided":
        logits = _draws((classes, 5), torch.float32).detach().t().requires_grad_()
    elif batch[0].chooser == "merge":
        logits = _draws((20, 40), torch.float32)  # more rows than one program merges: their sums need a second stage
    else:
        logits = _draws((5, min(classes, 5000)), torch.float32)
    target = torch.randint(logits.shape[1], (logits.shape[0], *logits.shape[2:]))
    return Call("cross_entropy", kwargs={"input": logits, "target": target})


@pytest.mark.parametrize("batch", _batches())
def test_configuration(batch: list[Chosen], device: str, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make = {
        "linear": _linear, "matmul": _matmul, "attention": _attention, "conv": _conv, "batch_norm": _batch_norm,
        "cross_entropy": _cross_entropy,
    }  # fmt: skip
    tuning = importlib.import_module(f"tkernels.ops.{batch[0].module}.config")
    call = make[batch[0].module](batch)
    asked = set()

    def answer(c: Chosen) -> Any:
        def chooser(*args: Any, **kwargs: Any) -> Any:
            asked.add(c.chooser)
            return c.config

        return chooser

    for c in batch:
        monkeypatch.setattr(tuning, c.chooser, answer(c))
        if c.chooser in ("finish", "finish_row", "merge") and c.module != "conv":
            for name in ("splits", "forward_splits", "wgrad_splits"):
                if hasattr(tuning, name):
                    monkeypatch.setattr(tuning, name, lambda *args: 2)
    check_call(call, device)
    assert launches
    assert asked == {c.chooser for c in batch}, "a configuration was not used"


def test_every_chooser_is_run() -> None:
    """A chooser that no call above consults would go untested."""
    run = {(module, kind, name) for (module, kind), groups in GROUPS.items() for group in groups for name in group}
    assert {(c.module, c.kind, c.chooser) for c in CHOSEN} - run <= UNREACHED


@pytest.mark.parametrize("group", sorted({c.module for c in CHOSEN}))
def test_blocks_are_powers_of_two(group: str) -> None:
    for c in itertools.chain(c for c in CHOSEN if c.module == group):
        assert all(size > 0 and size & (size - 1) == 0 for _, size in c.config.blocks), str(c)
