"""Launch configurations of the linear layer's kernels. Tiles depend on the features only, never on the batch."""

from __future__ import annotations

import functools

from tkernels.core import activation as activations
from tkernels.core.config import Config, block, cdiv
from tkernels.core.targets import Target

MAX_SPLITS = 64
STEPS_ALONE = 8  # steps along the batch that a program of the weight gradient takes alone, whatever idles beside it
# Where ptxas, left alone, aims at 64 or 128 registers and spills a few bytes for it in the gradients' larger tiles.
MORE_REGISTERS = {"sm_100": 128, "sm_120": 168}


def _stages(target: Target, bytes_a_stage: int, programs: int = 2) -> int:
    """As many stages as fit in a multiprocessor's shared memory beside those of the other ``programs``, from 2 to 4."""
    return max(2, min(target.max_stages, 4, target.shared_memory // programs // bytes_a_stage))


def is_plain(activation: str | None, drops: bool, unit: int) -> bool:
    """Whether a product leaves registers to its tile: loads of 16 bytes, no draws of dropout, and an activation of few
    values, as all are whose output tells the derivative."""
    return unit > 1 and not drops and not activations.needs_input(activation)


def _is_large(cols: int, reduction: int, itemsize: int, plain: bool, target: Target) -> bool:
    """Whether a product gets tiles of 128 x 256, which ask the L2 of an sm_90 for three quarters of what those of
    128 x 128 do. A multiprocessor holds one of them: so the loop is long, and there are columns enough for a thousand
    rows to fill the GPU."""
    return plain and target.name == "sm_90" and itemsize == 2 and cols >= 2048 and reduction >= 1024


def _ieee(target: Target, maxnreg: int | None = None, **blocks: int) -> Config:
    """Float32 without tensor cores (on AMD with): 256 threads a tile."""
    return Config.of(256 // target.warp_size, 2, target.registers(maxnreg), **blocks)


def _tensor_core_product(
    cols: int, reduction: int, itemsize: int, narrow: bool, target: Target
) -> tuple[int, int, int, int]:
    """(rows, columns, reduction, warps) of a tile of 64 accumulators a thread; ``narrow``: 32, where dropout or an
    operand computed on the way to the product wants registers of its own."""
    step = block(reduction, 16, 128 // itemsize)
    if cols <= 16:
        # 128 threads, so that each loads 16 bytes of the narrow operand
        return 64, 16, step, 128 // target.warp_size
    if cols < 512:
        return 64, block(cols, 32, 64), step, 4
    # threads, not warps, share out the accumulators: 4 warps of 64 are 8 of 32
    warps = 256 // target.warp_size
    return (64, 128, step, warps) if narrow else (128, 128, step, warps)


@functools.lru_cache(maxsize=1024)
def forward(n: int, k: int, itemsize: int, precision: str, drops: bool, target: Target, plain: bool = False) -> Config:
    """For y[M, n] = x[M, k] @ w[n, k]^T; ``drops``: with dropout; ``plain``: see is_plain."""
    if itemsize == 4 and precision == "ieee":
        # left alone ptxas aims at 80 registers and spills four to six, but on sm_80
        return _ieee(target, None if target.name == "sm_80" else 128, BLOCK_M=64, BLOCK_N=block(n, 16, 64), BLOCK_K=16)
    if _is_large(n, k, itemsize, plain, target):
        return Config.of(8, _stages(target, (128 + 256) * 64 * itemsize, 1), BLOCK_M=128, BLOCK_N=256, BLOCK_K=64)
    bm, bn, bk, warps = _tensor_core_product(n, k, itemsize, drops, target)
    stages = _stages(target, (bm + bn) * bk * itemsize)
    # left alone ptxas aims at 64 registers for shares of a tile and spills four
    cap = MORE_REGISTERS["sm_100"] if target.name == "sm_100" and warps == 8 and drops else None
    return Config.of(
        num_warps=warps, num_stages=stages, maxnreg=target.registers(cap), BLOCK_M=bm, BLOCK_N=bn, BLOCK_K=bk
    )


@functools.lru_cache(maxsize=1024)
def dgrad(n: int, k: int, itemsize: int, precision: str, target: Target, plain: bool = False) -> Config:
    """For dx[M, k] = dz[M, n] @ w[n, k]; ``plain``: see is_plain."""
    if itemsize == 4 and precision == "ieee":
        return _ieee(target, BLOCK_M=64, BLOCK_N=16, BLOCK_K=block(k, 16, 64))
    if _is_large(k, n, itemsize, plain, target):
        return Config.of(8, _stages(target, (2 * 128 + 256) * 64 * itemsize, 1), BLOCK_M=128, BLOCK_N=64, BLOCK_K=256)
    bm, bk, bn, warps = _tensor_core_product(k, n, itemsize, True, target)
    if target.warp_size == 64 and bk == 128:
        bn = min(bn, 32)  # gelu's gradient and dropout's draws on longer steps leave room for one wave a SIMD
    stages = _stages(target, (2 * bm + bk) * bn * itemsize)
    # gelu's gradient and dropout's draws take 160 registers where nobody stops them: half the programs
    cap = MORE_REGISTERS.get(target.name, 128) if warps == 8 else None
    return Config.of(
        num_warps=warps, num_stages=stages, maxnreg=target.registers(cap), BLOCK_M=bm, BLOCK_N=bn, BLOCK_K=bk
    )


@functools.lru_cache(maxsize=1024)
def wgrad(n: int, k: int, itemsize: int, precision: str, target: Target, plain: bool = False) -> Config:
    """For dw[n, k] = dz[M, n]^T @ x[M, k]; M is the batch; ``plain``: see is_plain."""
    if itemsize == 4 and precision == "ieee":
        cap = MORE_REGISTERS["sm_120"] if target.name == "sm_120" else None
        return _ieee(target, cap, BLOCK_M=16, BLOCK_N=block(n, 16, 64), BLOCK_K=block(k, 16, 64))
    hopper = target.name == "sm_90" and itemsize == 2
    # a warp of 64 needs twice the rows to load 16 bytes a thread; wgmma has two instructions a barrier in 32 rows
    bm, bn, bk, warps, programs = 64 if hopper else target.warp_size, block(n, 16, 64), block(k, 16, 64), 4, 2
    # RDNA's registers do not hold the larger tile
    if cdiv(n, 128) * cdiv(k, 128) >= target.multiprocessors and (target.is_nvidia or target.warp_size == 64):
        bm, bn, bk, warps = 64 if hopper else 32, 128, 128, 256 // target.warp_size
        # where larger ones fill the GPU, and are not emptier
        wide = cdiv(k, 256)
        fills = 4 * cdiv(n, 128) * wide >= 3 * target.multiprocessors and 2 * wide <= 1.1 * cdiv(k, 128)
        if plain and hopper and fills:
            bk, programs = 256, 1
    stages = _stages(target, (2 * bn + bk) * bm * itemsize, programs)
    cap = MORE_REGISTERS["sm_120"] if target.name == "sm_120" and bn * bk <= 4096 else None
    return Config.of(
        num_warps=warps, num_stages=stages, maxnreg=target.registers(cap), BLOCK_M=bm, BLOCK_N=bn, BLOCK_K=bk
    )


@functools.lru_cache(maxsize=1024)
def forward_splits(tiles: int, reduction: int, target: Target) -> int:
    """Programs that share the reduction of a tile of y or dx; 0: one program a tile, no second pass.

    A second pass pays only where the reduction is long and half of the multiprocessors would idle.
    """
    multiprocessors = target.multiprocessors
    if reduction < 1024 or 2 * tiles > multiprocessors:
        return 0
    return min(multiprocessors // tiles, reduction // 256, MAX_SPLITS)


@functools.lru_cache(maxsize=1024)
def wgrad_splits(tiles: int, rows: int, block_rows: int, target: Target) -> int:
    """Programs that share the batch of a tile of dw; 0 where the tiles alone fill the GPU, whatever the batch, or the
    batch is so short that the second kernels take longer than it does."""
    multiprocessors = target.multiprocessors
    if 2 * tiles > multiprocessors or rows <= STEPS_ALONE * block_rows:
        return 0
    return max(1, min(2 * multiprocessors // tiles, rows // (2 * block_rows), MAX_SPLITS))


@functools.lru_cache(maxsize=1024)
def finish(n: int, target: Target) -> Config:
    """For the pass that sums partial tiles of n columns: 16 bytes a thread."""
    columns = block(n, 16, 128)
    return Config.of(num_warps=4, num_stages=2, BLOCK_M=16 * target.warp_size // columns, BLOCK_N=columns)


@functools.lru_cache(maxsize=1024)
def finish_row(n: int, target: Target) -> Config:
    """The same for partials that are one row of n."""
    columns = block(n, 16, 16 * target.warp_size)
    return Config.of(num_warps=4, num_stages=2, BLOCK_M=1, BLOCK_N=columns)
