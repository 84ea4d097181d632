"""Tiles and program counts of the batch norm kernels."""

from __future__ import annotations

import functools

from tkernels.core.config import Config, block, cdiv
from tkernels.core.geometry import Matrix
from tkernels.core.targets import Target

# A finalise program merges at most this many partials of a channel, in one pass.
MAX_PARTIALS = 512
PROGRAMS_PER_MULTIPROCESSOR = 4


def groups(m: Matrix, config: Config) -> int:
    """Programs side by side: one a channel where planes are contiguous, else one a block of columns."""
    return m.channels if m.planes else cdiv(m.width, config["BLOCK_C"])


def tiles(m: Matrix, config: Config) -> int:
    """Tiles of one group."""
    return cdiv(m.rows, config["BLOCK_R"]) * (cdiv(m.width, config["BLOCK_C"]) if m.planes else 1)


def producers(m: Matrix, config: Config, target: Target) -> tuple[int, int]:
    """(programs that share a group's tiles, tiles of each): enough to fill the GPU, at most what one merge takes.

    They depend on the batch and reach kernels as runtime values.
    """
    n = tiles(m, config)
    wanted = cdiv(target.multiprocessors * PROGRAMS_PER_MULTIPROCESSOR, groups(m, config))
    each = cdiv(n, max(min(wanted, MAX_PARTIALS // m.spatial), 1))
    return cdiv(n, each), each


@functools.lru_cache(maxsize=1024)
def tile(width: int, planes: bool, elements: int) -> Config:
    """Tiles of ``elements`` values. Columns cover a memory line; planes as much of one plane as fits."""
    columns = block(width, 16, 1024) if planes else block(width, 1, 64)
    return Config.of(num_warps=4, num_stages=1, BLOCK_R=elements // columns, BLOCK_C=columns)


def statistics(m: Matrix) -> Config:
    """Two accumulators an element of the tile, in registers: 4096 of them at 128 threads."""
    return tile(m.width, m.planes, 4096)


def normalize(m: Matrix) -> Config:
    """The elementwise pass."""
    return tile(m.width, m.planes, 4096)


def gradient(m: Matrix) -> Config:
    """Both backward passes: up to three operands and two accumulators an element."""
    return tile(m.width, m.planes, 2048)


FINALIZE = Config.of(num_warps=4, num_stages=1, BLOCK_P=128, BLOCK_C=4)


def finalize(m: Matrix) -> Config:
    """Few channels a program: the merge is in float64, slow on consumer GPUs, so it is spread wide."""
    return FINALIZE
