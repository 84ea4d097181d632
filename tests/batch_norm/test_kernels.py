"""The kernels of batch_norm in many tiles and programs: sums that are merged, specialisations, programs enough."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import tolerance
from tests.batch_norm.cases import BF16, F16, F32, F64, Case, arrange, evaluate, operands
from tkernels.core import targets
from tkernels.core.geometry import matrix
from tkernels.core.records import BatchNorm, Norm

SMALL_TILES = [
    # runs of 6, 6 and 4 tiles, the last with 6 rows of 8; partial tiles on both axes
    ((2, 5, 7, 9), "channels_last", {"BLOCK_R": 8, "BLOCK_C": 4}),
    # planes of 3 tiles, the last ragged, 2 images a tile of which the last has one
    ((5, 3, 7, 6), "contiguous", {"BLOCK_R": 2, "BLOCK_C": 16}),
    # columns that share a channel: the merge runs over rows and columns
    ((13, 5, 3), "contiguous", {"BLOCK_R": 2, "BLOCK_C": 8}),
]


@pytest.mark.gate("ttsem", "cuda")
@pytest.mark.parametrize("dtype, ratio", [(F32, 1e4), (BF16, 1e2), (F16, 1.0)], ids=str)
@pytest.mark.parametrize("shape, layout, blocks", SMALL_TILES)
def test_small_tiles_merge(
    shape: Any, layout: str, blocks: Any, dtype: Any, ratio: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_small_tiles(Case(shape, layout, dtype, activation="relu", ratio=ratio), blocks, device, monkeypatch)


@pytest.mark.gate("interp")
@pytest.mark.parametrize("shape, layout, blocks", SMALL_TILES)
def test_small_tiles_interpreted(
    shape: Any, layout: str, blocks: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_small_tiles(Case(shape, layout, activation="relu", ratio=1e4), blocks, device, monkeypatch)


def check_small_tiles(case: Case, blocks: dict[str, int], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel in tiny tiles: many programs, several tiles each, many partials a merge, ragged ends."""
    from tkernels.core.config import Config
    from tkernels.ops.batch_norm import config as tuning
    from tkernels.ops.batch_norm import kernels

    made = operands(case)
    want = evaluate(case, made.like(F64, "cpu"), reference=True)
    o = made.like(None, device)
    x, dy = arrange(o.input, case.layout), arrange(o.dy, case.layout)
    m = matrix(x.shape, case.layout == "channels_last")
    # several tiles a program and several partials a merge, whatever the number of multiprocessors
    monkeypatch.setattr(tuning, "MAX_PARTIALS", 3 * m.spatial)
    config, merge = Config.of(num_warps=1, **blocks), Config.of(num_warps=1, BLOCK_P=2, BLOCK_C=2)
    assert tuning.producers(m, config, targets.current())[0] > 2
    assert tuning.producers(m, config, targets.current())[1] > 1

    partials = kernels.launch_statistics(x, m, config=config)
    bn = BatchNorm(o.running_mean, o.running_var, o.weight, o.bias, True, 0.3, 1e-3)
    stats = kernels.launch_finalize_statistics(partials, m, bn, config=merge)
    norm = Norm(stats, None, o.weight, o.bias, 1e-3)
    got = {"output": kernels.launch_normalize(x, m, norm, "relu", config=config)}
    sums, dz = kernels.launch_gradient_sums(dy, x, m, norm, "relu", write_dz=True, config=config)
    got["dweight"], got["dbias"], coefficients = kernels.launch_finalize_gradients(sums, m, norm, config=merge)
    got["dinput"], _ = kernels.launch_input_gradient(dy, x, m, norm, coefficients, "relu", config=config)
    from_dz, _ = kernels.launch_input_gradient(dz, x, m, norm, coefficients, config=config)
    assert torch.equal(from_dz, got["dinput"])
    got |= {"running_mean": o.running_mean, "running_var": o.running_var}
    for name, reference in want.items():
        scale = 1.0 if name in ("dinput", "dweight", "dbias") else None
        tolerance.assert_close(got[name], reference, m.values, scale=scale, name=name)


@pytest.mark.gate("aot")
@pytest.mark.parametrize("channels_last", [True, False])
def test_batches_share_specialisations(channels_last: bool) -> None:
    from perf.static import aot, cases
    from perf.static.cases.batch_norm import training

    found = []
    for batch in (256, 250, 17, 1):
        with pytest.MonkeyPatch.context() as patch, aot.recording("sm_90") as recorded:
            patch.setattr(cases, "BATCH", batch)
            training(64, 16, BF16, channels_last, "relu", True)
        found.append([aot.specialisation(launch, "sm_90") for launch in recorded])
    assert found[1:] == found[:1] * 3


@pytest.mark.gate("aot")
def test_merges_stay_short_and_gpus_full() -> None:
    from tkernels.ops.batch_norm import config as tuning

    for shape, channels_last in (
        ((10_000_000, 1), False), ((256, 64, 32, 32), True), ((2, 4096), False), ((4, 3, 1000, 1000), False),
        ((2048, 2048, 2, 2), False), ((1, 1, 3000, 3000), False), ((8, 4096, 28, 28), True),
    ):  # fmt: skip
        for target in targets.TARGETS.values():
            m = matrix(shape, channels_last)
            config = tuning.statistics(m)
            programs, each = tuning.producers(m, config, target)
            tiles = tuning.tiles(m, config)
            assert programs * m.spatial <= tuning.MAX_PARTIALS
            assert (programs - 1) * each < tiles <= programs * each
            total = programs * tuning.groups(m, config)
            assert total >= min(target.multiprocessors, tiles * tuning.groups(m, config), 256)
