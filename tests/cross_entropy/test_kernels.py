"""The kernels of cross_entropy in small tiles: partial ones everywhere, splits, the sum, which kernels ran."""

from __future__ import annotations

import pytest
import torch

from tests import tolerance
from tests.cross_entropy.cases import (
    BACKWARD,
    BF16,
    F16,
    F32,
    FORWARD,
    TOTAL,
    Case,
    arrange,
    by_hand,
    check,
    reference,
    target_of,
)
from tkernels.core.records import LossOptions

pytestmark = pytest.mark.gate("torch", "ttsem", "cuda")


@pytest.mark.parametrize("n_classes", [2, 3, 17, 33, 65, 257, 513, 1025, 2049, 4097])
def test_every_tile_the_chooser_gives(n_classes: int, device: str, triton_runs: bool) -> None:
    check(Case((3, n_classes)), device)


@pytest.mark.parametrize(("inner", "n_classes"), [(3, 2), (17, 2), (33, 9), (129, 3), (70, 17), (5, 33)])
def test_every_spatial_tile_the_chooser_gives(inner: int, n_classes: int, device: str) -> None:
    check(Case((2, n_classes, inner)), device)


def test_one_small_batch_is_one_launch(device: str, triton_runs: bool, launches: list[str]) -> None:
    check(Case((256, 2)), device)
    if triton_runs:
        assert launches == [FORWARD, BACKWARD]


SMALL_TILES = [
    # rows, classes, several steps a row; several programs a row; ends; spatial; all with partial tiles
    Case((9, 37)),
    Case((9, 37), dtype=BF16, weighted=True, label_smoothing=0.1),
    Case((9, 37), dtype=F16, probabilities=F16, reduction="none"),
    Case((9, 144), dtype=BF16, probabilities=F32, weighted=True, label_smoothing=0.1),
    Case((5, 137), dtype=BF16),
    Case((5, 137), dtype=F16, weighted=True, label_smoothing=0.1, reduction="sum"),
    Case((5, 137), probabilities=F32, weighted=True, reduction="none"),
    Case((2, 37, 9)),
    Case((2, 37, 16), dtype=BF16, probabilities=F32, weighted=True),
    Case((2, 21, 3, 3), "channels_last", dtype=F16, label_smoothing=0.1, reduction="sum"),
]


@pytest.mark.gate("ttsem", "cuda")
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("case", SMALL_TILES, ids=str)
def test_small_tiles(case: Case, splits: int, device: str, launches: list[str]) -> None:
    x = arrange(torch.randn(case.shape) * 3, case.layout).to(case.dtype).to(device)
    target = target_of(case).to(device)
    weight = (torch.rand(case.shape[1]) + 0.1).to(case.dtype).to(device) if case.weighted else None
    rows = case.shape[:1] + case.shape[2:] if case.reduction == "none" else ()
    grad = torch.randn(rows).to(case.dtype).to(device)
    loss, dx = by_hand(x, target, weight, grad, case.reduction, case.label_smoothing, splits)
    expected, expected_dx, _ = reference(x, target, weight, grad, **case.options)
    tolerance.assert_close(loss, expected, x.numel(), name="loss")
    tolerance.assert_close(dx, expected_dx, case.shape[1], name="gradient")
    first = [FORWARD] if splits == 1 else ["cross_entropy_partial", "cross_entropy_merge"]
    assert [name for name in launches if name != TOTAL] == [*first, BACKWARD]
    if case.reduction == "none":
        assert TOTAL not in launches


@pytest.mark.gate("ttsem", "cuda")
def test_few_long_rows_are_split_by_the_chooser(device: str, launches: list[str]) -> None:
    check(Case((2, 9001), dtype=BF16, reduction="none"), device)
    assert launches == ["cross_entropy_partial", "cross_entropy_merge", BACKWARD]


@pytest.mark.gate("ttsem", "cuda")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_sum_takes_as_many_rounds_as_needed(reduction: str, device: str, launches: list[str]) -> None:
    from tkernels.core.config import Config
    from tkernels.ops.cross_entropy import kernels

    pairs = torch.rand(2, 37).to(device)
    loss, count = pairs.new_empty(()), pairs.new_empty(()) if reduction == "mean" else None
    kernels.launch_total(pairs, loss, count, reduction, Config.of(num_warps=1, num_stages=1, BLOCK=4, LENGTH=8))
    losses, counts = pairs.cpu().double().sum(1)
    tolerance.assert_close(loss, losses / counts if reduction == "mean" else losses, 37)
    assert launches == [TOTAL] * 2


def test_logits_are_read_where_they_lie(device: str, triton_runs: bool) -> None:
    if not triton_runs:
        pytest.skip("PyTorch chooses for itself")
    from tkernels.ops.cross_entropy.layout import readable

    batch = torch.randn(2, 3, 4, 5).to(device)
    layouts = (
        batch,
        batch.contiguous(memory_format=torch.channels_last),
        batch[:, 1:],
        batch[..., 0],
        batch[:, :, 1:3],
        batch.flatten(2).transpose(1, 2),
        batch[:1].expand(2, 3, 4, 5),
    )
    for t in layouts:
        assert readable(t) is t
    cut = batch[..., 1:3]
    assert readable(cut) is not cut


@pytest.mark.gate("aot")
@pytest.mark.parametrize("shape", [(10,), (1000,), (5, 16, 16)])
def test_batches_share_their_compiled_kernels(shape: tuple[int, ...]) -> None:
    from perf.static import aot
    from tkernels.ops.cross_entropy import kernels

    def keys(batch: int) -> set[str]:
        with aot.recording("sm_90") as launches:
            x = torch.empty(batch, *shape, dtype=BF16, device="cuda")
            target = torch.empty(batch, *shape[1:], dtype=torch.int64, device="cuda")
            options = LossOptions(-100, "mean", 0.0)
            loss, stats, count = kernels.launch_forward(x, target, None, options, BF16)
            kernels.launch_backward(loss, x, target, None, stats, count, options)
        # one program has no second stage
        return {aot.specialisation(each, "sm_90") for each in launches if each.kernel.__name__ != TOTAL}

    assert keys(256) == keys(250) == keys(17) == keys(2)
