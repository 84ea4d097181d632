"""The choosers answer for the target they are given, whole: not for whatever has its name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from perf.static import aot
from perf.static.cases import window
from tkernels.core import targets
from tkernels.core.config import Config, cdiv
from tkernels.core.geometry import matrix
from tkernels.core.targets import Target
from tkernels.ops.batch_norm import config as batch_norm
from tkernels.ops.conv import config as conv
from tkernels.ops.cross_entropy import config as cross_entropy
from tkernels.ops.linear import config as linear
from tkernels.ops.linear import kernels
from tkernels.ops.matmul import config as matmul

pytestmark = pytest.mark.gate("torch")

LARGE = targets.TARGETS["sm_90"]
SMALL = dataclasses.replace(LARGE, multiprocessors=8)  # as a slice of it is (MIG)
PLANES = matrix((256, 64, 32, 32), False)
CHOOSERS: dict[str, Callable[[Target], Any]] = {
    "linear forward's splits": lambda target: linear.forward_splits(16, 2048, target),
    "linear wgrad's splits": lambda target: linear.wgrad_splits(8, 10**6, 32, target),
    "linear wgrad": lambda target: linear.wgrad(512, 512, 2, "ieee", target),
    "matmul's splits": lambda target: matmul.splits(16, 2048, target),
    "cross entropy's splits": lambda target: cross_entropy.splits(4, 10**6, 4096, target),
    "batch norm's producers": lambda target: batch_norm.producers(PLANES, batch_norm.statistics(PLANES), target),
    "conv wgrad's runs": lambda target: conv.runs(
        10**6, 4, Config.of(BLOCK_M=64, BLOCK_N=64, BLOCK_P=32), 4096, target
    ),
}


@pytest.mark.parametrize("name", CHOOSERS)
def test_gpus_of_one_name_get_their_own_answers(name: str) -> None:
    choose = CHOOSERS[name]
    assert SMALL.name == LARGE.name
    first, other = choose(LARGE), choose(SMALL)
    assert first != other
    assert (choose(LARGE), choose(SMALL)) == (first, other), "in whatever order they are asked"


def test_launches_follow_the_target_not_its_name() -> None:
    """What runs, not only what the choosers say: programs of one call on two GPUs of one name."""

    def programs(target: Target) -> list[tuple[int, ...]]:
        grids: list[tuple[int, ...]] = []
        with aot.intercepting(target, lambda kernel, args, options, grid: grids.append(tuple(grid))):
            kernels.launch_forward(torch.empty(64, 2048), torch.empty(256, 2048), None)
        return grids

    assert programs(LARGE) != programs(SMALL)


def test_a_pretended_target_is_known_by_all_of_it() -> None:
    """What an operator's plans are kept by."""
    with targets.pretend(LARGE):
        large = targets.identity()
    with targets.pretend(SMALL):
        assert targets.identity() != large


def test_registers_are_capped_where_there_is_a_cap() -> None:
    """Triton has no option maxnreg on AMD: no chooser names one there."""
    g = window(64, 64, 16)
    for name, target in targets.TARGETS.items():
        found = [
            conv.forward(g, torch.bfloat16, "ieee", target),
            linear.forward(512, 512, 4, "ieee", False, target),
            linear.dgrad(512, 512, 2, "ieee", target),
            matmul.product(64, 64, 64, 2, "ieee", target),
        ]
        capped = [config for config in found if "maxnreg" in config.options()]
        assert bool(capped) == target.is_nvidia, name


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_a_weight_gradient_leaves_few_places_empty(name: str) -> None:
    """Programs fit at once, or more waves of them leave fewer places empty: none has a last wave of a few."""
    target = targets.TARGETS[name]
    for g in (
        window(64, 64, 56),
        window(128, 128, 28),
        window(256, 256, 14),
        window(512, 512, 7),
        window(64, 256, 56, 1),
    ):
        config = conv.wgrad(g, torch.bfloat16, "ieee", target, plain=True)
        rows, cols, _ = conv.wgrad_sides(g)
        tiles = cdiv(rows, config["BLOCK_M"]) * cdiv(cols, config["BLOCK_N"])
        places = conv.resident(config, target) * target.multiprocessors
        for batch in (1, 17, 250, 256):
            pixels = batch * g.out_h * g.out_w
            _, count = conv.runs(pixels, tiles, config, 4 * rows * cols, target)
            programs = tiles * count
            waves = cdiv(programs, places)
            assert count == 1 or waves == 1 or programs >= 0.8 * waves * places, (g, batch, programs, places)
            # a run is worth its workspace
            assert count == 1 or pixels / count >= conv.MIN_STEPS * config["BLOCK_P"] / 2


def test_large_tiles_are_for_large_products() -> None:
    """By features, channels and the image's size: 128 x 256, of which a multiprocessor of sm_90 holds one."""
    half = torch.bfloat16

    def area(config: Config, *names: str) -> int:
        return math.prod(config[name] for name in names)

    large, small = 128 * 256, 128 * 128
    g, few, strided = window(256, 256, 14), window(512, 512, 7), window(256, 256, 28, stride=2)
    assert area(conv.forward(g, half, "ieee", LARGE, True), "BLOCK_M", "BLOCK_N") == large
    assert area(conv.dgrad(g, half, "ieee", LARGE, plain=True), "BLOCK_M", "BLOCK_N") == large
    assert area(conv.wgrad(g, half, "ieee", LARGE, plain=True), "BLOCK_M", "BLOCK_N") == large
    # NCHW, or an activation of many values; two tiles for three images; phases; float32
    for config in (
        conv.forward(g, half, "ieee", LARGE),
        conv.forward(few, half, "ieee", LARGE, True),
        conv.dgrad(strided, half, "ieee", LARGE, plain=True),
        conv.dgrad(window(256, 256, 14, 1), half, "ieee", LARGE, masked=True, plain=True),
        conv.wgrad(g, half, "ieee", LARGE, masked=True, plain=True),
        conv.forward(g, torch.float32, "tf32", LARGE, True),
    ):
        assert area(config, "BLOCK_M", "BLOCK_N") == small
    assert area(linear.forward(4096, 4096, 2, "ieee", False, LARGE, True), "BLOCK_M", "BLOCK_N") == large
    assert area(linear.dgrad(4096, 4096, 2, "ieee", LARGE, True), "BLOCK_M", "BLOCK_K") == large
    assert area(linear.wgrad(4096, 4096, 2, "ieee", LARGE, True), "BLOCK_N", "BLOCK_K") == large
    assert area(linear.forward(4096, 4096, 2, "ieee", False, LARGE), "BLOCK_M", "BLOCK_N") == small
    assert area(linear.wgrad(32768, 128, 2, "ieee", LARGE, True), "BLOCK_N", "BLOCK_K") == small
    assert area(matmul.product(4096, 4096, 4096, 2, "ieee", LARGE, True), "BLOCK_M", "BLOCK_N") == large
    assert matmul.product(4, 4096, 4096, 2, "ieee", LARGE, True) == matmul.product(4, 4096, 4096, 2, "ieee", LARGE)
