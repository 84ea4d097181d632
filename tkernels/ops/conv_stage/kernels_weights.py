"""The weights of a conv stage on Triton, two layers a launch: packed before forward, their gradients' runs merged after
backward. Each launch does what conv's launch_pack and launch_merge do for one layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tkernels.core.config import cdiv
from tkernels.core.geometry import Geometry
from tkernels.core.launch import launch
from tkernels.core.records import WeightSums
from tkernels.ops.conv import config as tuning
from tkernels.ops.conv.kernels import launch_pack, pack_tile, packs
from tkernels.ops.conv.kernels_backward import merge_tile


# One program: a tile of the first or of the second packed weight. Grid: (tiles of both,).
@triton.jit
def pack_pair_kernel(w0_ptr, packed0_ptr, rows0, columns0, pitch0, inner0, stride0_o, stride0_i, stride0_h, stride0_w,
                     w1_ptr, packed1_ptr, rows1, columns1, pitch1, inner1, stride1_o, stride1_i, stride1_h, stride1_w,
                     KERNEL_W0: tl.constexpr, KERNEL_W1: tl.constexpr, BLOCK_R: tl.constexpr,
                     BLOCK_C: tl.constexpr):  # fmt: skip
    pid = tl.program_id(0)
    across0 = tl.cdiv(pitch0, BLOCK_C)
    tiles0 = tl.cdiv(rows0, BLOCK_R) * across0
    if pid < tiles0:
        pack_tile(pid // across0, pid % across0, w0_ptr, packed0_ptr, rows0, columns0, pitch0, inner0, rows0,
                  stride0_o, stride0_i, stride0_h, stride0_w, KERNEL_W0, False, BLOCK_R, BLOCK_C)  # fmt: skip
    else:
        pid -= tiles0
        across1 = tl.cdiv(pitch1, BLOCK_C)
        pack_tile(pid // across1, pid % across1, w1_ptr, packed1_ptr, rows1, columns1, pitch1, inner1, rows1,
                  stride1_o, stride1_i, stride1_h, stride1_w, KERNEL_W1, False, BLOCK_R, BLOCK_C)  # fmt: skip


@triton.jit
def store_zeros(ptr, size, BLOCK: tl.constexpr):
    """Zeros into a vector, where there is one."""
    if ptr is not None:
        for start in range(0, size, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            tl.store(ptr + offs, tl.zeros((BLOCK,), dtype=ptr.dtype.element_ty), mask=offs < size)


# One program: a block of the first or of the second layer's gradients; the first program of each also writes the
# layer's zeros. Grid: (blocks of both workspaces' elements,).
@triton.jit(do_not_specialize=["runs0", "runs1"])
def merge_pair_kernel(workspace0_ptr, dw0_ptr, db0_ptr, zeros0_ptr, channels0, runs0, size0, weight_size0, rows0, cols0,
                      group_in0, group_out0, stride0_o, stride0_i, stride0_h, stride0_w,
                      workspace1_ptr, dw1_ptr, db1_ptr, zeros1_ptr, channels1, runs1, size1, weight_size1, rows1, cols1,
                      group_in1, group_out1, stride1_o, stride1_i, stride1_h, stride1_w,
                      KERNEL_W0: tl.constexpr, OUT_ON_ROWS0: tl.constexpr, KERNEL_W1: tl.constexpr,
                      OUT_ON_ROWS1: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    pid = tl.program_id(0)
    blocks0 = tl.cdiv(size0, BLOCK)
    if pid < blocks0:
        merge_tile(pid, workspace0_ptr, dw0_ptr, db0_ptr, runs0, size0, weight_size0, rows0, cols0, group_in0,
                   group_out0, stride0_o, stride0_i, stride0_h, stride0_w, KERNEL_W0, OUT_ON_ROWS0, BLOCK_S,
                   BLOCK)  # fmt: skip
        if pid == 0:
            store_zeros(zeros0_ptr, channels0, BLOCK)
    elif workspace1_ptr is not None:
        pid -= blocks0
        merge_tile(pid, workspace1_ptr, dw1_ptr, db1_ptr, runs1, size1, weight_size1, rows1, cols1, group_in1,
                   group_out1, stride1_o, stride1_i, stride1_h, stride1_w, KERNEL_W1, OUT_ON_ROWS1, BLOCK_S,
                   BLOCK)  # fmt: skip
        if pid == 0:
            store_zeros(zeros1_ptr, channels1, BLOCK)


def launch_packs(weights: Sequence[Tensor], geometries: Sequence[Geometry], dtype: torch.dtype) -> list[Tensor]:
    """conv's launch_pack of each weight (not transposed)."""
    packed = list(weights)
    waiting = [i for i, (weight, g) in enumerate(zip(weights, geometries)) if packs(weight, g, dtype)]
    for i, j in zip(waiting[::2], waiting[1::2]):
        packed[i], packed[j] = _pack_pair(weights[i], geometries[i], weights[j], geometries[j], dtype)
    if len(waiting) % 2:
        packed[waiting[-1]] = launch_pack(weights[waiting[-1]], geometries[waiting[-1]], dtype)
    return packed


def _pack_pair(w0: Tensor, g0: Geometry, w1: Tensor, g1: Geometry, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    packed0 = w0.new_empty((g0.out_channels, g0.row_pitch), dtype=dtype)
    packed1 = w1.new_empty((g1.out_channels, g1.row_pitch), dtype=dtype)
    config = tuning.pack(max(g0.reduction, g1.reduction))
    tiles = [
        cdiv(g.out_channels, config["BLOCK_R"]) * cdiv(g.row_pitch, config["BLOCK_C"]) for g in (g0, g1)
    ]  # fmt: skip
    launch(
        pack_pair_kernel, (sum(tiles),),
        w0, packed0, g0.out_channels, g0.reduction, g0.row_pitch, g0.group_in, *w0.stride(),
        w1, packed1, g1.out_channels, g1.reduction, g1.row_pitch, g1.group_in, *w1.stride(),
        KERNEL_W0=g0.kernel_w, KERNEL_W1=g1.kernel_w, **config.options(),
    )  # fmt: skip
    return packed0, packed1


def launch_merges(layers: Sequence[WeightSums]) -> list[tuple[Tensor, Tensor | None]]:
    """(weight's, bias's gradient) of each layer; the bias's is zeros where it is ``unmoved``, None where unwanted."""
    found: list[tuple[Tensor, Tensor | None]] = []
    for i in range(0, len(layers), 2):
        pair = layers[i : i + 2]
        arguments = [_merge_arguments(layer) for layer in pair]
        config = tuning.merge(max(layer.workspace.shape[1] for layer in pair))
        blocks = sum(cdiv(layer.workspace.shape[1], config["BLOCK"]) for layer in pair)
        windows = [(layer.geometry.kernel_w, tuning.wgrad_sides(layer.geometry)[2]) for layer in pair]
        second = arguments[1] if len(pair) == 2 else _NOTHING
        launch(
            merge_pair_kernel, (blocks,),
            *arguments[0], *second, KERNEL_W0=windows[0][0], OUT_ON_ROWS0=windows[0][1],
            KERNEL_W1=windows[-1][0], OUT_ON_ROWS1=windows[-1][1], **config.options(),
        )  # fmt: skip
        for _workspace, dw, db, zeros, *_rest in arguments:
            found.append((dw, zeros if db is None else db))
    return found


_NOTHING = (None, None, None, None, *(0,) * 12)


def _merge_arguments(layer: WeightSums) -> list:
    """merge_pair_kernel's arguments for one layer."""
    g = layer.geometry
    runs, size = layer.workspace.shape
    rows, cols, _out_on_rows = tuning.wgrad_sides(g)
    dw = torch.empty_like(layer.weight)
    db, zeros = (None if t is None else torch.empty_like(t) for t in (layer.bias, layer.unmoved))
    return [layer.workspace, dw, db, zeros, g.out_channels, runs, size, g.out_channels * g.reduction, rows, cols,
            g.group_in, g.group_out, *dw.stride()]  # fmt: skip
