"""Every configuration that a chooser of conv_stage can return, on any target, is executed against float64.

As in test_configs.py; a stage's layers and end are made so that the choosers of one group are all consulted.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conformance.configurations import ALL, Chosen
from tests.conv_stage.cases import close, doubled, layers_for, reference
from tkernels.functional import MaxPool, conv_stage
from tkernels.ops.conv_stage import config as tuning

pytestmark = [pytest.mark.gate("ttsem", "cuda"), pytest.mark.extended("ttsem")]
STAGE = [c for c in ALL if c.module == "conv_stage"]
PRODUCTS, ENDS = ("forward", "dgrad", "wgrad"), ("end", "end_sums", "end_gradient")
GROUPS = (
    ("wide", PRODUCTS),
    ("flat", PRODUCTS),
    ("wide", ("pointwise_forward", "pointwise_wgrad")),
    ("apart", ENDS),
    ("overlapping", ENDS),
    ("", ("fold",)),
)
# Asked here about convolutions that never come to them: depthwise ones, and few channels in a pointwise layer.
UNREACHED = {("depthwise", name) for name in (*PRODUCTS, "pointwise_forward", "pointwise_wgrad")} | {
    ("flat", name) for name in ("pointwise_forward", "pointwise_wgrad")
}


def _batches() -> list[Any]:
    found = []
    for kind, names in GROUPS:
        lists = [configs for n in names if (configs := [c for c in STAGE if (c.kind, c.chooser) == (kind, n)])]
        for i in range(max(map(len, lists), default=0)):
            batch = [configs[i % len(configs)] for configs in lists]
            found.append(pytest.param(batch, id=f"{kind}: {', '.join(map(str, batch))}"))
    return found


def _stage(batch: list[Chosen]) -> tuple[tuple[int, ...], list[Any], Any]:
    """(input's shape, layers, pool) that the batch's kernels run on."""
    names, kind = {c.chooser for c in batch}, batch[0].kind
    if names & set(ENDS):
        channels = max(c.config["BLOCK_C"] for c in batch) + 1
        pool = MaxPool(3, 2, 1) if kind == "overlapping" else 2
        return (2, 3, 9, 8), [(channels, 1, {})], pool
    if "fold" in names:
        return (1, 3, 8, 9), [(batch[0].config["BLOCK_C"] + 1, 3, {}), (4, 1, {})], None
    blocks = [size for c in batch for name, size in c.config.blocks if name in ("BLOCK_N", "BLOCK_K")]
    if "pointwise_forward" in names:
        return (2, 3, 5, 4), [(max(blocks) + 1, 1, {}), (max(blocks) + 1, 1, {})], None
    if kind == "flat":
        return (2, 3, 5, 4), [(15, 3, {"padding": 1}), (max(blocks) + 1, 3, {"padding": 1})], None
    width = max(blocks) + 1
    return (2, width, 3, 4), [(width, (1, 2), {}), (width, (1, 2), {})], None


@pytest.mark.parametrize("batch", _batches())
def test_configuration(batch: list[Chosen], device: str, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set()

    def answer(c: Chosen) -> Any:
        def chooser(*args: Any, **kwargs: Any) -> Any:
            asked.add(c.chooser)
            return c.config

        return chooser

    for c in batch:
        monkeypatch.setattr(tuning, c.chooser, answer(c))
    names, dtype = {c.chooser for c in batch}, batch[0].dtype
    monkeypatch.setattr(tuning, "normalizes_in_wgrad", lambda *args: "wgrad" in names)
    monkeypatch.setattr(tuning, "MAX_PARTIALS", 1 if "fold" in names else 512)
    monkeypatch.setattr(tuning, "applies_in_prologue", lambda *args: "pointwise_forward" in names)
    shape, specs, pool = _stage(batch)
    x = torch.randn(shape)
    layers = layers_for(shape[1], specs, dtype, device)
    exact = doubled(layers)
    y = conv_stage(x.to(dtype).to(device), layers, pool, training=True)
    expected = reference(x.to(dtype).double(), exact, dtype, pool)
    terms = expected.numel() * max(layer.weight[0].numel() for layer in layers)
    close(y, expected, terms, 4, dtype, "y")
    dy = torch.randn(expected.shape).to(dtype)
    y.backward(dy.to(device))
    expected.backward(dy.double())
    for i, (layer, want) in enumerate(zip(layers, exact)):
        for field in ("weight", "bn_weight", "bn_bias"):
            t, r = getattr(layer, field), getattr(want, field)
            assert isinstance(t, Tensor)
            assert t.grad is not None
            close(t.grad, r.grad, terms, 4 * len(layers), dtype, f"gradient of {field} of layer {i}")
    assert asked == names, "a configuration was not used"


def test_every_chooser_is_run() -> None:
    """A chooser that no stage above consults would go untested."""
    run = {(kind, name) for kind, names in GROUPS for name in names}
    assert {(c.kind, c.chooser) for c in STAGE} - run <= UNREACHED
