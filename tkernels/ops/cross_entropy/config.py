"""Launch configurations of the cross entropy kernels. Tiles depend on classes and layout, never on the batch."""

from __future__ import annotations

import functools

from tkernels.core.config import Config, block, cdiv
from tkernels.core.targets import Target

TILE = 4096  # elements of a tile: 32 a thread at 4 warps
LONGEST_TILE = 4096  # classes of a row one step takes
SPATIAL_CLASSES = 32  # classes of a step where the rows are what is contiguous
MAX_SPLITS = 128  # programs that share a row; one program of the merge reads them all
ENDS_FROM = 128  # shorter rows are not worth a separate load for their unaligned ends


@functools.lru_cache(maxsize=1024)
def rows(n_classes: int, inner: int, classes_contiguous: bool, target: Target) -> Config:
    """For every pass over [rows, n_classes] logits: the tile [BLOCK_ROWS, BLOCK_C].

    ``inner``: rows that follow one another in memory where that number is not the batch's, else 0.
    """
    if classes_contiguous:
        block_c = block(n_classes, 2, LONGEST_TILE)
        if block_c <= 16:
            # the rows of a small batch in one program, which then needs no second pass
            return Config.of(num_warps=8, num_stages=1, BLOCK_ROWS=256, BLOCK_C=block_c)
        # several rows a program: what is kept for each of them takes registers too
        if block_c <= 512:
            # masks are scalar registers on AMD, and 8 elements a thread have too many of them
            warps = 4 if target.is_nvidia else 8
            return Config.of(num_warps=warps, num_stages=1, BLOCK_ROWS=TILE // 2 // block_c, BLOCK_C=block_c)
        return Config.of(num_warps=4, num_stages=1, BLOCK_ROWS=TILE // block_c, BLOCK_C=block_c)
    block_c = block(n_classes, 2, SPATIAL_CLASSES)
    block_rows = min(TILE // block_c, 256)
    if inner:
        block_rows = block(inner, 16, block_rows)
    return Config.of(num_warps=4, num_stages=1, BLOCK_ROWS=block_rows, BLOCK_C=block_c)


@functools.lru_cache(maxsize=1024)
def splits(tiles: int, n_classes: int, block_c: int, target: Target) -> int:
    """How many programs share a row; 1 where the row tiles alone fill the GPU twice or a row is short."""
    wanted = cdiv(2 * target.multiprocessors, max(tiles, 1))
    return max(1, min(wanted, n_classes // block_c, MAX_SPLITS))


@functools.lru_cache(maxsize=1)
def merge() -> Config:
    """For the pass that merges what the programs of a row found."""
    return Config.of(num_warps=4, num_stages=1, BLOCK_ROWS=16, BLOCK_SPLITS=MAX_SPLITS)


@functools.lru_cache(maxsize=1)
def total() -> Config:
    """For the second stage of the sum over rows: LENGTH partial sums a program."""
    return Config.of(num_warps=8, num_stages=1, BLOCK=2048, LENGTH=65536)
