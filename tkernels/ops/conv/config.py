"""Launch configurations of the convolution's kernels."""

from __future__ import annotations

import functools
import math

import torch

from tkernels.core.config import Config, block, cdiv, next_power_of_two
from tkernels.core.geometry import Geometry
from tkernels.core.targets import Target

ACCUMULATORS = 64  # float32 ones a thread, above which no warps are taken from a tile
MIN_STEPS = 8  # pixel steps that make a split of the weight gradient worth its workspace


def unit(channels: int) -> int:
    """The factor taken out of a channel count before a kernel sees it, so that it knows the count to be a multiple
    of 8 (or 4) where it is: Triton itself finds out multiples of 16 only."""
    return 1 if channels % 16 == 0 else math.gcd(channels, 8)


def is_exact(dtype: torch.dtype, precision: str) -> bool:
    """Whether products are float32's own, without tensor cores."""
    return dtype == torch.float32 and precision == "ieee"


def reduction_block(length: int, dtype: torch.dtype, precision: str, target: Target) -> int:
    """The step along a product's reduction axis. Long steps are for targets whose tensor cores read shared memory;
    elsewhere they hold too many operand registers."""
    if is_exact(dtype, precision):
        return 16
    return block(length, 16, 64 if reads_shared(target) and dtype != torch.float32 else 32)


def reads_shared(target: Target) -> bool:
    """Whether the tensor cores take operands from shared memory (four warps at a time): sm_90 and sm_100."""
    return isinstance(target.arch, int) and 90 <= target.arch < 120


def stages(step_bytes: int, target: Target, alone: bool = False) -> int:
    """Pipeline stages that fit, up to 4: at most 2 on AMD, and two programs a multiprocessor on NVIDIA, or one that is
    ``alone``."""
    budget = target.shared_memory
    if target.is_nvidia and not alone:
        budget = min(budget, target.shared_memory_mp // 2)
    return max(1, min(4, target.max_stages, (budget - 2048) // step_bytes))


def wide_warps(block_m: int, block_n: int, block_k: int, warps: int, dtype: torch.dtype, target: Target) -> int:
    """At most ``warps``, and so few that a thread loads 16 bytes at once of the smaller operand's tile."""
    enough = min(block_m, block_n) * block_k * dtype.itemsize // 16
    fewest = 4 if reads_shared(target) else 1
    while warps > fewest and warps * target.warp_size > enough:
        if block_m * block_n > ACCUMULATORS * target.warp_size * warps // 2:
            break
        warps //= 2
    return warps


def is_hopper(g: Geometry, dtype: torch.dtype, target: Target) -> bool:
    """Whether an sm_90 multiplies 16-bit operands, all of them loaded 16 bytes at once, faster than its L2 hands them
    out: at the full rate a tile of 128 x 64 asks for 96 bytes a clock, one of 128 x 128 for 64 and one of 128 x 256 for
    48, and about 37 were measured."""
    aligned = not g.flattened and (g.group_in | g.group_out) % 8 == 0
    return target.name == "sm_90" and dtype.itemsize == 2 and aligned


def _widest(rows: int, cols: int, reduction: int, g: Geometry, dtype: torch.dtype, target: Target) -> int:
    """Columns that a tile of nothing but a product may have: 64, or 128 on Hopper, or 256, of which a multiprocessor
    holds one: in a long loop, where ``rows`` (of an image, or of the weight) and columns make one tile at least, and
    leave none empty."""
    if not is_hopper(g, dtype, target):
        return 64
    large = rows * cols >= 128 * 256 and reduction >= 2048 and cols >= 256 and _fits(cols, 256)
    return 256 if large else 128


def _fits(size: int, wide: int) -> bool:
    """Whether blocks of ``wide`` are not a tenth emptier than those of half of it."""
    return cdiv(size, wide) * wide <= 1.1 * cdiv(size, wide // 2) * (wide // 2)


def product_tile(
    rows_long: bool, rows: int, cols: int, dtype: torch.dtype, precision: str, widest: int = 64
) -> tuple[int, int, int]:
    """(block of rows, block of columns, warps) of a product tile.

    ``rows_long``: the rows are pixels, of images of ``rows`` each; small images make few tiles, so tiles get smaller.
    ``widest``: what _widest says.
    """
    if is_exact(dtype, precision):
        return (64 if rows_long else block(rows, 16, 64)), block(cols, 16, 64), 8
    if widest == 256:
        return 128, 256, 8
    if cols >= 256 and (rows_long or rows >= 256):
        return 128, 128, 8
    if widest == 128 and cols >= 128 and _fits(cols, 128) and rows >= (128 if rows_long else 1024):
        return 128, 128, 8
    block_n = block(cols, 16, 64)
    if rows_long:
        return (64 if rows <= 64 else 128), block_n, 4
    # of 128 and 64 rows the one that wastes less; 64 must win by a tenth to pay for loading the columns twice
    return block(rows, 16, 128 if _fits(rows, 128) else 64), block_n, 4


@functools.lru_cache(maxsize=4096)
def _pixels_product(
    pixels: int, cols: int, length: int, dtype: torch.dtype, precision: str, target: Target, maps: int = 1,
    widest: int = 64,
) -> Config:  # fmt: skip
    block_m, block_n, warps = product_tile(True, pixels, cols, dtype, precision, widest)
    block_k = reduction_block(length, dtype, precision, target)
    if target.warp_size == 32 and not target.is_nvidia:
        warps = 8  # gfx1100 spills the epilogue of 64 accumulators a thread
    warps = wide_warps(block_m, block_n, block_k, warps, dtype, target)
    # ptxas spills a few registers of small tiles below a limit it sets itself
    maxnreg = 128 if block_m * block_n <= 4096 and block_m == 64 and dtype != torch.float32 else None
    if target.name == "sm_120" and block_m == 128 and warps == 4:
        maxnreg = 255  # there of large ones too, at 96 and 128; limits between spill more
    if maps > 1 and target.name in ("sm_80", "sm_86", "sm_89") and warps == 4:
        maxnreg = maxnreg or 192  # and there at 168, where the gradient is computed on the way to the product
    if is_exact(dtype, precision):
        maxnreg = 128  # of sums in short chains ptxas spills a few to stay below 80 or 96
    n_stages = stages((maps * block_m + block_n) * block_k * dtype.itemsize, target, block_n == 256)
    return Config.of(warps, n_stages, target.registers(maxnreg), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k)


@functools.lru_cache(maxsize=4096)
def _flat_product(cols: int, reduction: int, dtype: torch.dtype, precision: str, target: Target) -> Config:
    # gathered element by element: a tall tile or a long step would hold too many addresses and masks
    block_k = reduction_block(min(reduction, 32), dtype, precision, target)
    warps = 8 if is_exact(dtype, precision) else 4
    return Config.of(warps, min(cdiv(reduction, block_k), 2), BLOCK_M=64 if target.is_nvidia else 32,
                     BLOCK_N=block(cols, 16, 64), BLOCK_K=block_k)  # fmt: skip


def forward(g: Geometry, dtype: torch.dtype, precision: str, target: Target, plain: bool = False) -> Config:
    """Tiles of the forward product: BLOCK_M pixels, BLOCK_N output channels, BLOCK_K of the reduction. ``plain``: of an
    epilogue that only adds a bias, applies an activation of few values (all whose output tells the derivative) and
    stores NHWC."""
    if g.flattened:
        return _flat_product(g.group_out, g.reduction, dtype, precision, target)
    pixels = g.out_h * g.out_w
    widest = _widest(pixels, g.group_out, g.reduction, g, dtype, target) if plain else 64
    return _pixels_product(pixels, g.group_out, g.group_in, dtype, precision, target, widest=widest)


def dgrad(
    g: Geometry, dtype: torch.dtype, precision: str, target: Target, masked: bool = False, plain: bool = False
) -> Config:
    """Tiles of the input gradient: BLOCK_M input pixels, BLOCK_N input channels, BLOCK_K output channels. ``masked``:
    the gradient is multiplied by an activation's derivative as it is loaded, from a second map. ``plain``: dx is
    stored NHWC, and that is all."""
    phase = cdiv(g.height, g.stride_h) * cdiv(g.width, g.stride_w)
    widest = 64
    if plain and not masked and g.stride_h == g.stride_w == 1:
        widest = _widest(phase, g.group_in, g.taps * g.group_out, g, dtype, target)
    return _pixels_product(phase, g.group_in, g.group_out, dtype, precision, target, 1 + masked, widest)


@functools.lru_cache(maxsize=4096)
def _wgrad(
    reduction: int, group_out: int, dtype: torch.dtype, precision: str, target: Target, flat: bool, masked: bool,
    widest: int,
) -> Config:  # fmt: skip
    rows, cols = max(reduction, group_out), min(reduction, group_out)
    block_m, block_n, warps = product_tile(False, rows, cols, dtype, precision, widest)
    block_p = reduction_block(64, dtype, precision, target)
    warps = wide_warps(block_m, block_n, block_p, warps, dtype, target)
    if flat and target.name == "sm_90" and block_m >= 64:
        warps = 8  # 4 spill the addresses and masks of an image that is gathered element by element
    second_map = (block_m if group_out > reduction else block_n) if masked else 0
    # left alone ptxas aims at 128 registers for some of these and spills two
    maxnreg = 168 if target.name == "sm_100" and block_m * block_n == 16384 and dtype != torch.float32 else None
    if widest == 128 and block_m * block_n == 16384:
        maxnreg = 128  # Triton 3.6 takes 142, and a multiprocessor would hold one program, not two
    n_stages = stages((block_m + block_n + second_map) * block_p * dtype.itemsize, target, block_n == 256)
    return Config.of(warps, n_stages, target.registers(maxnreg), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_P=block_p)


def wgrad(
    g: Geometry, dtype: torch.dtype, precision: str, target: Target, masked: bool = False, plain: bool = False
) -> Config:
    """Tiles of the weight gradient: BLOCK_M and BLOCK_N of its longer and its shorter side, BLOCK_P pixels a step.
    ``masked``: as for dgrad. ``plain``: both operands are loaded as they lie."""
    rows, cols = max(g.reduction, g.group_out), min(g.reduction, g.group_out)
    widest = _widest(rows, cols, rows, g, dtype, target) if plain and not masked else 64
    return _wgrad(g.reduction, g.group_out, dtype, precision, target, g.flattened, masked, widest)


def wgrad_sides(g: Geometry) -> tuple[int, int, bool]:
    """Rows and columns of the sums of one group's weight gradient, and whether output channels are the rows: the
    longer side is. A depthwise gradient is one table of taps and channels."""
    if g.depthwise:
        return g.taps, g.out_channels, False
    out_on_rows = g.group_out > g.reduction
    return (g.group_out, g.reduction, True) if out_on_rows else (g.reduction, g.group_out, False)


@functools.lru_cache(maxsize=4096)
def splits(pixels: int, tiles: int, block_p: int, workspace_bytes: int, target: Target, resident: int = 2) -> int:
    """Into how many runs of pixels a weight gradient is cut, each with partial sums of ``workspace_bytes``: of the most
    that one to four waves of programs hold, ``resident`` a multiprocessor, the one that takes the least time. At least
    MIN_STEPS steps a run, at most 32 MiB of workspace."""
    pixels, tiles = max(pixels, 1), max(tiles, 1)
    places = resident * target.multiprocessors
    affordable = max(1, (32 << 20) // max(workspace_bytes, 1))
    most = min(affordable, cdiv(pixels, block_p * MIN_STEPS), 65535)
    # a run's partial sums, written and read, beside all products at half of the peak rate; a wave's pipelines, filled
    toll = 2e3 * target.tflops / (target.gbps * pixels) * tiles / places
    filling = 4 * block_p / pixels
    counts = [max(1, min(waves * places // tiles, most)) for waves in (1, 2, 3, 4)]
    return min(counts, key=lambda count: cdiv(tiles * count, places) * (1 / count + filling) + toll * count)


def resident(config: Config, target: Target) -> int:
    """How many programs of a weight gradient a multiprocessor is given: two where its registers suffice for them, each
    thread having as many as it may, or 128 of them with at most 32 accumulators."""
    threads = target.warp_size * config.num_warps
    few = config["BLOCK_M"] * config["BLOCK_N"] <= 32 * threads
    return max(1, min(2, target.registers_mp // ((config.maxnreg or (128 if few else 255)) * threads)))


def runs(
    pixels: int, tiles: int, config: Config, workspace_bytes: int, target: Target, wanted: int | None = None
) -> tuple[int, int]:
    """(pixels a run, runs) of a weight gradient: whole steps, and no more runs than ``wanted`` or splits says."""
    block_p = config["BLOCK_P"]
    count = wanted or splits(pixels, tiles, block_p, workspace_bytes, target, resident(config, target))
    run = max(cdiv(cdiv(pixels, count), block_p), 1) * block_p
    return run, max(cdiv(pixels, run), 1)


@functools.lru_cache(maxsize=4096)
def merge(elements: int) -> Config:
    """Blocks of the second pass over a split weight gradient: BLOCK elements, BLOCK_S splits at a time."""
    size = block(elements // 256, 32, 256)
    return Config.of(4, 1, BLOCK=size, BLOCK_S=4096 // size)


@functools.lru_cache(maxsize=4096)
def pack(columns: int) -> Config:
    """Blocks of the weight packing kernel: BLOCK_R rows, BLOCK_C columns."""
    size = block(columns, 16, 256)
    return Config.of(4, 1, BLOCK_R=max(1, 1024 // size), BLOCK_C=size)


@functools.lru_cache(maxsize=4096)
def mask(channels: int) -> Config:
    """Blocks of the pass that applies an activation's derivative: BLOCK_P pixels, BLOCK_C channels."""
    size = block(channels, 8, 64)
    return Config.of(4, 1, BLOCK_P=2048 // size, BLOCK_C=size)


@functools.lru_cache(maxsize=4096)
def depthwise(channels: int, target: Target) -> Config:
    """Blocks of the depthwise forward and input gradient: BLOCK_P pixels, BLOCK_C channels."""
    size = block(channels, 8, 64)
    # 128 threads, so that each loads 16 bytes
    return Config.of(128 // target.warp_size, 1, BLOCK_P=1024 // size, BLOCK_C=size)


@functools.lru_cache(maxsize=4096)
def depthwise_wgrad(g: Geometry) -> Config:
    """Blocks of the depthwise weight gradient: BLOCK_T taps, BLOCK_P pixels a step, BLOCK_C channels."""
    taps = min(next_power_of_two(g.taps), 16)
    size = block(g.out_channels, 8, 64)
    return Config.of(4, 1, BLOCK_T=taps, BLOCK_P=max(1, 4096 // (taps * size)), BLOCK_C=size)
