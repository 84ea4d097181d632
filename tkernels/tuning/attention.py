"""Launch configurations of attention, and where there is none. Tiles depend on the head dimensions only, never on batch
or lengths. BLOCK_D and BLOCK_V cover a head of queries and of values; CHUNK is how many features a product takes at
once: all of them on tensor cores."""

from __future__ import annotations

import functools

from tkernels import targets
from tkernels.tuning import Config, block
from tkernels.tuning.linear import target_name

__all__ = ["delta", "dkv", "dq", "forward", "target_name", "why_not"]

WIDEST = 256


@functools.lru_cache(maxsize=1024)
def why_not(head: int, v_head: int, itemsize: int, extras: bool, target: str) -> str | None:
    """Why heads of this size are left to PyTorch, or None where they are not. ``extras``: a mask or dropout."""
    if head == 0:
        return "heads are empty"
    widest = max(_blocks(head, v_head))
    if widest > WIDEST:
        return f"heads of {max(head, v_head)} are wider than {WIDEST}"
    if widest == WIDEST and itemsize == 4:
        return f"heads of {max(head, v_head)} in float32 do not fit in registers"
    if widest == WIDEST and extras:
        return f"heads of {max(head, v_head)} with a mask or dropout do not fit in registers"
    if _registers(target) not in _FORWARD:
        return f"no tile is known to compile without spills for {target}"
    return None


def _blocks(head: int, v_head: int) -> tuple[int, int]:
    """BLOCK_D and BLOCK_V."""
    return block(head, 16, 1 << 20), block(v_head, 16, 1 << 20)


def _config(head: int, v_head: int, rows: int, keys: int, warps: int, stages: int, chunk: int | None = None,
            maxnreg: int | None = None) -> Config:  # fmt: skip
    block_d, block_v = _blocks(head, v_head)
    chunk = min(chunk, block_d, block_v) if chunk else block_d
    return Config.of(num_warps=warps, num_stages=stages, maxnreg=maxnreg, BLOCK_M=rows, BLOCK_N=keys, BLOCK_D=block_d,
                     BLOCK_V=block_v, CHUNK=chunk)  # fmt: skip


def _float32(head: int, v_head: int) -> Config:
    """Small tiles and features in chunks, whatever the precision: operands are twice as large, and without tensor
    cores a thread holds whole rows of a chunk."""
    return _config(head, v_head, 32, 32, 256 // targets.current().warp_size, 2, chunk=16)


def _registers(target: str) -> str:
    """Where a product accumulates: 'mma' in the registers of one warp for 16 rows (sm_80 to sm_89 and sm_120), 'wgmma'
    of four warps for 64 (sm_90), 'tmem' in tensor memory (sm_100), 'cdna' or 'rdna' on AMD."""
    if target in ("sm_90", "sm_100"):
        return "wgmma" if target == "sm_90" else "tmem"
    if target.startswith("sm_"):
        return "mma"
    return "cdna" if targets.current().warp_size == 64 else "rdna"


# By where a product accumulates, then by the head dimension covered and whether there is a mask or dropout ("extras"):
# rows of queries, rows of keys, threads, features a product takes at once (0: all). The largest tiles of a list that
# compile without spills for each target.
Tile = tuple[int, int, int, int]
Table = dict[str, dict[tuple[int, bool], Tile]]
_FORWARD: Table = {
    "mma": {(64, False): (128, 64, 256, 0), (64, True): (128, 32, 256, 0),
            (128, False): (128, 64, 256, 0), (128, True): (64, 16, 128, 0), (256, False): (64, 16, 128, 0)},
    "wgmma": {(64, False): (128, 64, 256, 0), (64, True): (128, 64, 256, 0),
              (128, False): (128, 64, 256, 0), (128, True): (128, 32, 256, 0), (256, False): (128, 64, 256, 0)},
    "tmem": {(64, False): (128, 64, 256, 0), (64, True): (128, 64, 256, 0),
             (128, False): (128, 64, 256, 0), (128, True): (64, 16, 128, 0), (256, False): (128, 64, 256, 0)},
}  # fmt: skip
_DQ: Table = {
    "mma": {(64, False): (128, 32, 256, 0), (64, True): (128, 32, 256, 0),
            (128, False): (64, 32, 128, 0), (128, True): (64, 16, 128, 64), (256, False): (64, 16, 128, 64)},
    "wgmma": {(64, False): (128, 64, 256, 0), (64, True): (128, 64, 256, 0),
              (128, False): (128, 64, 256, 0), (128, True): (128, 32, 256, 0), (256, False): (128, 32, 256, 0)},
    "tmem": {(64, False): (128, 64, 256, 0), (64, True): (128, 64, 256, 0),
             (128, False): (128, 64, 256, 0), (128, True): (128, 32, 256, 0), (256, False): (64, 64, 128, 0)},
}  # fmt: skip
_DKV: Table = {
    "mma": {(64, False): (32, 128, 256, 0), (64, True): (32, 128, 256, 0),
            (128, False): (32, 64, 128, 0), (128, True): (32, 64, 128, 0), (256, False): (16, 128, 256, 64)},
    "wgmma": {(64, False): (64, 64, 256, 0), (64, True): (64, 64, 256, 0),
              (128, False): (64, 64, 256, 0), (128, True): (64, 64, 256, 0), (256, False): (32, 64, 256, 0)},
    "tmem": {(64, False): (64, 128, 256, 0), (64, True): (64, 128, 256, 0),
             (128, False): (64, 128, 256, 0), (128, True): (64, 128, 256, 0), (256, False): (32, 64, 256, 0)},
}  # fmt: skip


def _looked_up(table: Table, head: int, v_head: int, extras: bool, target: str) -> Config:
    widest = max(64, *_blocks(head, v_head))
    rows, keys, threads, chunk = table[_registers(target)][widest, extras]
    return _config(head, v_head, rows, keys, threads // targets.current().warp_size, 2, chunk or None)


@functools.lru_cache(maxsize=1024)
def forward(head: int, v_head: int, itemsize: int, precision: str, extras: bool, target: str) -> Config:
    """``extras``: a mask or dropout, which want registers of their own."""
    if itemsize == 4:
        return _float32(head, v_head)
    return _looked_up(_FORWARD, head, v_head, extras, target)


@functools.lru_cache(maxsize=1024)
def dq(head: int, v_head: int, itemsize: int, precision: str, extras: bool, target: str) -> Config:
    """For the gradient of the queries."""
    if itemsize == 4:
        return _float32(head, v_head)
    return _looked_up(_DQ, head, v_head, extras, target)


@functools.lru_cache(maxsize=1024)
def dkv(head: int, v_head: int, itemsize: int, precision: str, extras: bool, target: str) -> Config:
    """For the gradients of keys and values."""
    if itemsize == 4:
        return _float32(head, v_head)
    return _looked_up(_DKV, head, v_head, extras, target)


@functools.lru_cache(maxsize=1024)
def apart(head: int, v_head: int, itemsize: int, precision: str, extras: bool, target: str) -> bool:
    """Whether dk and dv take a launch each, because the sums of both do not fit in registers: the weights are formed
    twice."""
    widest = max(_blocks(head, v_head))
    if _registers(target) in ("wgmma", "tmem"):
        return widest > 128
    return widest > 64 or extras


@functools.lru_cache(maxsize=64)
def delta(v_head: int) -> Config:
    """For the row sums that both gradients need: 4096 elements a program."""
    columns = block(v_head, 16, 1 << 20)
    return Config.of(num_warps=4, num_stages=2, BLOCK_V=columns, BLOCK_M=max(4096 // columns, 1))
