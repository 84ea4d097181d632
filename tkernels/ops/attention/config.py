"""Launch configurations of attention, and where there is none. Tiles depend on the head dimensions only, never on batch
or lengths. BLOCK_D and BLOCK_V cover a head of queries and of values; CHUNK is how many features a product takes at
once: all of them on tensor cores."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from tkernels.core.config import Config, block
from tkernels.core.targets import Target

__all__ = ["apart", "delta", "dkv", "dq", "forward", "least_rows", "lse_shape", "why_not"]

WIDEST = 256


class Tile(NamedTuple):
    """Rows of queries and of keys, threads, features a product takes at once (0: all), stages, registers a thread at
    most on NVIDIA, and whether dk and dv take a launch each, because the sums of both do not fit in registers."""

    rows: int
    keys: int
    threads: int
    chunk: int = 0
    stages: int = 2
    maxnreg: int | None = None
    apart: bool = False


# By where a product accumulates ("part": of heads that leave features of their blocks empty, which wants registers), or
# a target whose compiler wants others; then by the head dimension covered and by whether there is a mask or dropout
# ("extras"). The largest tiles tried that compile without spills in every variant, in 99 KiB of shared memory for
# 'mma', and with eight warps on a multiprocessor. ptxas, left alone, spills a few bytes to stay below 128 registers:
# hence maxnreg. The rows of a wgmma are 64 for four warps: eight warps with 64 form each weight of dk and dv twice.
Table = dict[str, dict[tuple[int, bool], Tile]]
_FORWARD: Table = {
    "mma": {(64, False): Tile(128, 64, 256), (64, True): Tile(128, 32, 256),
            (128, False): Tile(128, 32, 256, stages=3), (128, True): Tile(128, 16, 256),
            (256, False): Tile(64, 32, 256), (256, True): Tile(32, 64, 256, 64)},
    "sm_120": {(64, True): Tile(128, 16, 256)},
    "wgmma": {(64, False): Tile(128, 64, 256), (64, True): Tile(128, 32, 256),
              (128, False): Tile(128, 64, 256), (128, True): Tile(128, 16, 256),
              (256, False): Tile(128, 32, 256), (256, True): Tile(64, 16, 256)},
    "tmem": {(64, False): Tile(128, 64, 256), (64, True): Tile(128, 16, 256),
             (128, False): Tile(128, 64, 256), (128, True): Tile(128, 16, 256),
             (256, False): Tile(128, 64, 256), (256, True): Tile(64, 32, 256, 64)},
    "cdna": {(64, False): Tile(128, 64, 256), (64, True): Tile(64, 32, 256),
             (128, False): Tile(128, 32, 256), (128, True): Tile(64, 16, 256),
             (256, False): Tile(64, 16, 256), (256, True): Tile(64, 16, 256)},
    "rdna": {(64, False): Tile(128, 32, 256), (64, True): Tile(64, 16, 256),
             (128, False): Tile(64, 16, 128), (128, True): Tile(64, 16, 256, 64)},
}  # fmt: skip
_DQ: Table = {
    "mma": {(64, False): Tile(128, 32, 256), (64, True): Tile(128, 32, 256),
            (128, False): Tile(64, 64, 256), (128, True): Tile(32, 64, 256),
            (256, False): Tile(64, 32, 256, 64), (256, True): Tile(32, 64, 256, 64)},
    "sm_120": {(64, True): Tile(128, 16, 256), (256, False): Tile(32, 64, 256, 64)},
    "wgmma": {(64, False): Tile(128, 64, 256, stages=3), (64, True): Tile(128, 32, 256),
              (128, False): Tile(128, 64, 256, stages=3), (128, True): Tile(128, 16, 256),
              (256, False): Tile(128, 32, 256), (256, True): Tile(64, 16, 256)},
    "tmem": {(64, False): Tile(128, 64, 256), (64, True): Tile(128, 32, 256),
             (128, False): Tile(128, 64, 256), (128, True): Tile(128, 16, 256),
             (256, False): Tile(128, 32, 256), (256, True): Tile(64, 32, 256, 64)},
    "cdna": {(64, False): Tile(128, 32, 256), (64, True): Tile(64, 32, 256),
             (128, False): Tile(64, 16, 256), (128, True): Tile(64, 16, 256),
             (256, False): Tile(64, 16, 256, 64), (256, True): Tile(64, 16, 256, 64)},
    "rdna": {(64, False): Tile(64, 32, 256), (64, True): Tile(64, 16, 256),
             (128, False): Tile(64, 32, 256, 32), (128, True): Tile(64, 16, 256, 32)},
}  # fmt: skip
_DKV: Table = {
    "mma": {(64, False): Tile(32, 128, 256), (64, True): Tile(16, 128, 256),
            (128, False): Tile(64, 64, 256), (128, True): Tile(64, 32, 256, stages=3),
            (256, False): Tile(32, 32, 256, 64), (256, True): Tile(32, 32, 256, 64)},
    "wgmma": {(64, False): Tile(64, 128, 256, stages=3), (64, True): Tile(32, 128, 256, stages=3),
              (128, False): Tile(64, 128, 256, stages=3), (128, True): Tile(16, 128, 256),
              (256, False): Tile(32, 128, 256, stages=3, apart=True), (256, True): Tile(16, 128, 256, apart=True)},
    "wgmma part": {(128, False): Tile(32, 128, 256, stages=3)},
    "tmem": {(64, False): Tile(64, 128, 256), (64, True): Tile(32, 128, 256),
             (128, False): Tile(64, 128, 256), (128, True): Tile(32, 128, 256),
             (256, False): Tile(32, 64, 256, maxnreg=255), (256, True): Tile(16, 64, 256, 64, maxnreg=255)},
    "cdna": {(64, False): Tile(32, 64, 256), (64, True): Tile(16, 64, 256),
             (128, False): Tile(16, 128, 512), (128, True): Tile(16, 64, 256, 64),
             (256, False): Tile(16, 64, 512, 64), (256, True): Tile(16, 64, 512, 64)},
    "rdna": {(64, False): Tile(16, 64, 256, 32), (64, True): Tile(16, 64, 256, 32),
             (128, False): Tile(32, 64, 256, 32), (128, True): Tile(16, 64, 256, 32)},
}  # fmt: skip
# Float32, whatever the precision: operands are twice as large, and without tensor cores a thread holds whole rows of a
# chunk. By a target or where a product accumulates ('' for all others), and by the head dimension covered (0 for all
# others).
Float32Table = dict[tuple[str, int], Tile]
_FLOAT32_FORWARD: Float32Table = {
    ("", 0): Tile(32, 32, 256, 16), ("", 32): Tile(32, 32, 256, 16, maxnreg=255),
    ("cdna", 128): Tile(32, 16, 256, 16), ("rdna", 128): Tile(32, 16, 256, 16),
}  # fmt: skip
_FLOAT32_DQ: Float32Table = {
    ("", 0): Tile(32, 32, 256, 16, maxnreg=255), ("", 32): Tile(32, 16, 256, 16, maxnreg=255),
    ("cdna", 0): Tile(16, 32, 256, 16), ("rdna", 0): Tile(16, 32, 256, 16),
}  # fmt: skip
_FLOAT32_DKV: Float32Table = {
    ("", 0): Tile(32, 32, 256, 16, maxnreg=255, apart=True),
    ("tmem", 0): Tile(32, 32, 256, 16, stages=1, maxnreg=255, apart=True),
    ("cdna", 0): Tile(16, 32, 256, 16, apart=True),
    ("sm_120", 32): Tile(32, 16, 256, 16, maxnreg=255, apart=True),
}


@functools.lru_cache(maxsize=1024)
def why_not(head: int, v_head: int, itemsize: int, extras: bool, target: Target) -> str | None:
    """Why heads of this size are left to PyTorch, or None where they are not. ``extras``: a mask or dropout."""
    if head == 0:
        return "heads are empty"
    widest = max(_blocks(head, v_head))
    if widest > WIDEST:
        return f"heads of {max(head, v_head)} are wider than {WIDEST}"
    if widest == WIDEST and itemsize == 4:
        return f"heads of {max(head, v_head)} in float32 do not fit in registers"
    if itemsize == 2 and (max(widest, 64), extras) not in _DKV[_accumulates(target)]:
        options = " with a mask or dropout" if extras else ""
        return f"heads of {max(head, v_head)}{options} do not fit in {target.name}'s registers"
    return None


def _blocks(head: int, v_head: int) -> tuple[int, int]:
    """BLOCK_D and BLOCK_V."""
    return block(head, 16, 1 << 20), block(v_head, 16, 1 << 20)


def _accumulates(target: Target) -> str:
    """Where a product accumulates: 'mma' in the registers of one warp for 16 rows (sm_80 to sm_89 and sm_120), 'wgmma'
    of four warps for 64 (sm_90), 'tmem' in tensor memory (sm_100), 'cdna' or 'rdna' on AMD."""
    if target.name in ("sm_90", "sm_100"):
        return "wgmma" if target.name == "sm_90" else "tmem"
    if target.is_nvidia:
        return "mma"
    return "cdna" if target.warp_size == 64 else "rdna"


def _tile(
    half: Table, single: Float32Table, head: int, v_head: int, itemsize: int, extras: bool, target: Target
) -> Tile:
    """Of the tables of 16-bit operands and of float32's."""
    where, blocks = _accumulates(target), _blocks(head, v_head)
    widest = max(blocks)
    if itemsize == 2:
        key = max(64, widest), extras
        names = (target.name, where) if blocks == (head, v_head) else (target.name, f"{where} part", where)
        return next(half[name][key] for name in names if key in half.get(name, {}))
    return next(single[key] for key in ((target.name, widest), (where, widest), (where, 0), ("", widest), ("", 0))
                if key in single)  # fmt: skip


def _config(head: int, v_head: int, tile: Tile, target: Target) -> Config:
    block_d, block_v = _blocks(head, v_head)
    chunk = min(tile.chunk, block_d, block_v) if tile.chunk else block_d
    return Config.of(num_warps=tile.threads // target.warp_size, num_stages=tile.stages,
                     maxnreg=target.registers(tile.maxnreg), BLOCK_M=tile.rows, BLOCK_N=tile.keys, BLOCK_D=block_d,
                     BLOCK_V=block_v, CHUNK=chunk)  # fmt: skip


@functools.lru_cache(maxsize=1024)
def forward(head: int, v_head: int, itemsize: int, precision: str, extras: bool, target: Target) -> Config:
    """``extras``: a mask or dropout, which want registers of their own."""
    return _config(head, v_head, _tile(_FORWARD, _FLOAT32_FORWARD, head, v_head, itemsize, extras, target), target)


@functools.lru_cache(maxsize=1024)
def dq(head: int, v_head: int, itemsize: int, precision: str, extras: bool, target: Target) -> Config:
    """For the gradient of the queries."""
    return _config(head, v_head, _tile(_DQ, _FLOAT32_DQ, head, v_head, itemsize, extras, target), target)


@functools.lru_cache(maxsize=1024)
def dkv(head: int, v_head: int, itemsize: int, precision: str, extras: bool, target: Target) -> Config:
    """For the gradients of keys and values."""
    return _config(head, v_head, _tile(_DKV, _FLOAT32_DKV, head, v_head, itemsize, extras, target), target)


@functools.lru_cache(maxsize=1024)
def apart(head: int, v_head: int, itemsize: int, precision: str, extras: bool, target: Target) -> bool:
    """Whether dk and dv take a launch each; the weights are formed twice then."""
    return _tile(_DKV, _FLOAT32_DKV, head, v_head, itemsize, extras, target).apart


def lse_shape(q_shape: Sequence[int], added: bool) -> tuple[int, ...]:
    """Of what forward keeps of its rows for backward: [B, H, n_q], or [B, H, 2, n_q] where a mask is added."""
    return (*q_shape[:2], 2, q_shape[2]) if added else tuple(q_shape[:3])


def least_rows(itemsize: int, target: Target) -> int:
    """The fewest rows of queries that a tile may have, forward and for dq: of fewer than a wgmma's, chained products in
    bfloat16 gave wrong values and an illegal access on an H200 (triton 3.6)."""
    return 64 if itemsize == 2 and _accumulates(target) == "wgmma" else 16


@functools.lru_cache(maxsize=64)
def delta(v_head: int) -> Config:
    """For the row sums that both gradients need: 4096 elements a program."""
    columns = block(v_head, 16, 1 << 20)
    return Config.of(num_warps=4, num_stages=2, BLOCK_V=columns, BLOCK_M=max(4096 // columns, 1))
