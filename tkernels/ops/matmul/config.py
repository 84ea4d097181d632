"""Launch configurations of matrix products: the linear layer's tiles, lower ones for few rows, and those of vectors."""

from __future__ import annotations

import dataclasses
import functools

from tkernels.core.config import Config, block
from tkernels.core.targets import Target
from tkernels.ops.linear import config as linear

__all__ = ["product", "splits", "vector"]


@functools.lru_cache(maxsize=1024)
def product(m: int, n: int, k: int, itemsize: int, precision: str, target: Target, plain: bool = False) -> Config:
    """For out[m, n] = a[m, k] @ b[k, n]; of ``m`` only the height of a tile that holds few rows. ``plain``: loads and
    stores are wide."""
    config = linear.forward(n, k, itemsize, precision, False, target, plain and m > 64)
    if config.maxnreg is None and (config.num_warps == 4 or (itemsize == 4 and precision == "ieee")):
        # ptxas, left alone, spills a few bytes to stay below 80, 96 or 128 registers
        config = dataclasses.replace(config, maxnreg=target.registers(168 if config.num_warps == 4 else 128))
    # warps of 64 need 32 rows to load 16 bytes a thread in steps so short that a multiprocessor holds eight of them
    wide = target.warp_size == 64
    height = block(m, 32 if wide else 16, config["BLOCK_M"])
    if height == config["BLOCK_M"]:
        return config
    low = {**dict(config.blocks), "BLOCK_M": height}
    if wide:
        low["BLOCK_K"] = min(low["BLOCK_K"], 32)
    # few enough threads that each loads 16 bytes
    warp = target.warp_size
    shares = height * low["BLOCK_N"] // (16 * warp), height * low["BLOCK_K"] * itemsize // (16 * warp)
    warps = max(1, min(config.num_warps, *shares))
    return dataclasses.replace(config, blocks=tuple(low.items()), num_warps=warps, maxnreg=target.registers(168))


@functools.lru_cache(maxsize=1024)
def vector(n: int, k: int, transposed: bool) -> Config:
    """For out[n] = a[k] @ b[k, n]; ``transposed``: b is dense along k. A tile is long where b is dense."""
    if transposed:
        return Config.of(num_warps=4, num_stages=2, BLOCK_N=8, BLOCK_K=block(k, 64, 512))
    return Config.of(num_warps=4, num_stages=2, BLOCK_N=block(n, 16, 128), BLOCK_K=32)


# Programs that share the reduction of a tile; 0: one program a tile, no second pass.
splits = linear.forward_splits
