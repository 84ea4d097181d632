"""The linear kernels under small explicit configurations: several programs on each grid axis, partial tiles, splits.
And what decides compilation: one specialisation for all batches."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests import tolerance
from tests.conftest import GATE
from tkernels.core import activation as activations
from tkernels.core import mode, targets
from tkernels.core.config import Config
from tkernels.ops.linear import config as tuning

if not mode.HAS_TRITON:
    pytest.skip("needs triton", allow_module_level=True)

from tkernels.ops.linear import kernels

pytestmark = pytest.mark.gate("ttsem", "cuda")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SMALL = Config.of(num_warps=4, num_stages=2, BLOCK_M=16, BLOCK_N=16, BLOCK_K=16)
SM_90 = targets.TARGETS["sm_90"]
UNEVEN = Config.of(num_warps=4, num_stages=2, BLOCK_M=32, BLOCK_N=16, BLOCK_K=32)
# no block like another, and the gradient's products are of transposed tiles
THIN = Config.of(num_warps=4, num_stages=2, BLOCK_M=16, BLOCK_N=64, BLOCK_K=32)
# three tiles on each axis, the last of them partial; a group of tiles for L2 is partial too
M, N, K = 41, 36, 39


def problem(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, w, b, dy."""
    shapes = ((M, K), (N, K), (N,), (M, N))
    x, w, b, dy = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    return x, w, b, dy


def reference(
    x: Tensor, w: Tensor, b: Tensor, dy: Tensor, activation: str | None, factor: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    inputs = [t.cpu().double().requires_grad_() for t in (x, w, b)]
    y = activations.apply(torch.nn.functional.linear(*inputs), activation)
    y = y if factor is None else y * factor.cpu().double()
    return y.detach(), torch.autograd.grad(y, inputs, dy.cpu().double())


def mask_of(seed: Tensor, p: float, config: Config) -> Tensor:
    """Dropout's factors [M, N]."""
    one = torch.ones(N, device=seed.device)
    return kernels.launch_forward(one.new_zeros(M, 1), one.new_zeros(N, 1), one, None, p, seed, config=config)[0]


@pytest.mark.parametrize(
    "dtype, activation, p, config, splits",
    (
        (F32, "relu", 0.0, SMALL, 0),
        (F32, None, 0.0, SMALL, 3),
        (F32, "relu", 0.5, UNEVEN, 0),
        (BF16, "relu", 0.5, SMALL, 3),
        (BF16, "gelu", 0.3, UNEVEN, 2),
        (F16, "leaky_relu", 0.3, SMALL, 0),
        (F16, "silu", 0.0, UNEVEN, 0),
        (BF16, "relu", 0.0, THIN, 0),
        (F32, "silu", 0.3, THIN, 2),
    ),
)
def test_small_tiles(
    dtype: torch.dtype, activation: str | None, p: float, config: Config, splits: int, device: str, launches: list[str]
) -> None:
    x, w, b, dy = problem(device, dtype)
    seed = torch.tensor(-(2**40) + 7, device=device) if p else None
    factor = None if seed is None else mask_of(seed, p, SMALL)
    launches.clear()
    save_z = activations.needs_input(activation)
    y, z = kernels.launch_forward(x, w, b, activation, p, seed, save_z, config, splits)
    assert (z is not None) == save_z
    saved = None if activation is None else y if z is None else z
    replayed = None if activation == "relu" else seed
    dx = kernels.launch_dgrad(dy, w, saved, activation, p, replayed, config, splits)
    dw, db = kernels.launch_wgrad(dy, x, saved, activation, p, replayed, True, config, splits)
    y64, (dx64, dw64, db64) = reference(x, w, b, dy, activation, factor)
    tolerance.assert_close(y, y64, K, name="y")
    # dz is rounded to the dtype before it is multiplied
    for got, want, terms, name in ((dx, dx64, N, "dx"), (dw, dw64, M, "dw"), (db, db64, M, "db")):
        tolerance.assert_close(got, want, terms, scale=2 * terms**0.5, name=name)
    if splits:
        assert launches.count("linear_finish_kernel") == 4
    # only what is asked for
    assert torch.equal(kernels.launch_wgrad(dy, x, saved, activation, p, replayed, False, config, splits)[0], dw)
    alone = kernels.launch_wgrad(dy, None, saved, activation, p, replayed, True, config, splits)
    assert alone[0] is None
    tolerance.assert_close(alone[1], db64, M, scale=2 * M**0.5, name="db alone")
    # on a GPU the two programs may add up in different orders
    assert GATE == "cuda" or torch.equal(alone[1], db)


def test_mask_does_not_depend_on_tiles(device: str) -> None:
    seed = torch.tensor(2**62 + 12345, device=device)
    masks = [mask_of(seed, 0.5, config) for config in (SMALL, UNEVEN)]
    assert torch.equal(*masks)
    zero, one = seed.new_zeros(M, K, dtype=F32), seed.new_ones(N, dtype=F32)
    split, _ = kernels.launch_forward(zero, zero[:N], one, None, 0.5, seed, config=SMALL, splits=2)
    assert torch.equal(split, masks[0])


def test_transposed_weight_and_row_strides(device: str) -> None:
    x, w, b, dy = problem(device, F32)
    wide = torch.full((M, K + 9), 1e4, device=device)
    wide[:, 4 : K + 4] = x
    x, wt = wide[:, 4 : K + 4], w.t().contiguous().t()
    y64, (dx64, dw64, _) = reference(x, w, b, dy, None, None)
    tolerance.assert_close(kernels.launch_forward(x, wt, b, config=SMALL)[0], y64, K)
    for config in (SMALL, THIN):
        tolerance.assert_close(kernels.launch_dgrad(dy, wt, config=config), dx64, N)
    tolerance.assert_close(kernels.launch_wgrad(dy, x, config=SMALL)[0], dw64, M)
    with pytest.raises(ValueError, match="do not fold"):
        kernels.launch_forward(wide.t()[:K, :].t()[:, ::2], w[:, : (K + 1) // 2], b)
    with pytest.raises(ValueError, match="neither dimension"):
        kernels.launch_forward(x[:, :9].contiguous(), w[:, :18:2], b)


def test_every_configuration_runs(device: str) -> None:
    """Whatever the choosers can answer, on a tile or a little more of each kernel."""
    for itemsize, precision, dtype in ((2, "ieee", BF16), (4, "ieee", F32)):
        sizes = ((4096, 4096), (512, 1024), (64, 64), (8, 24)) if dtype is BF16 else ((64, 64), (8, 24))
        for (n, k), plain in itertools.product(sizes, (False, True)):
            x, w, dy = (torch.randn(s, device=device).to(dtype) for s in ((9, 40), (24, 40), (9, 24)))
            b = torch.randn(24, device=device).to(dtype)
            for drops in (False, True):
                config = tuning.forward(n, k, itemsize, precision, drops, SM_90, plain)
                y, _ = kernels.launch_forward(x, w, b, config=config)
                y64, (dx64, dw64, db64) = reference(x, w, b, dy, None, None)
                tolerance.assert_close(y, y64, 40)
            dx = kernels.launch_dgrad(dy, w, config=tuning.dgrad(n, k, itemsize, precision, SM_90, plain))
            config = tuning.wgrad(n, k, itemsize, precision, SM_90, plain)
            dw, db = kernels.launch_wgrad(dy, x, with_bias=True, config=config)
            for got, want in ((dx, dx64), (dw, dw64), (db, db64)):
                tolerance.assert_close(got, want, 24)


def launches_of(batch: int, k: int, n: int, dtype: torch.dtype) -> None:
    """The three products of a linear layer with ReLU and dropout, and a GELU's, on fake tensors."""
    make = functools.partial(torch.empty, device="cuda", dtype=dtype)
    seed = torch.empty((), dtype=torch.int64, device="cuda")
    x, w, b, dy = make(batch, k), make(n, k), make(n), make(batch, n)
    y, _ = kernels.launch_forward(x, w, b, "relu", 0.5, seed)
    kernels.launch_dgrad(dy, w, y, "relu", 0.5)
    kernels.launch_wgrad(dy, x, y, "relu", 0.5, with_bias=True)
    y, z = kernels.launch_forward(x, w, b, "gelu", save_z=True)
    kernels.launch_dgrad(dy, w, z, "gelu")
    kernels.launch_wgrad(dy, x, z, "gelu", with_bias=True)


def keys(run: Callable[[], None], target: str) -> list[str]:
    from perf.static import aot

    with aot.recording(target) as launched:
        run()
    return [aot.specialisation(launch, target) for launch in launched]


@pytest.mark.gate("aot")
@pytest.mark.parametrize("target", ("sm_80", "sm_90", "gfx942"))
@pytest.mark.parametrize("k, n", ((2048, 256), (256, 128), (128, 10), (24, 40)))
def test_batches_share_one_specialisation(k: int, n: int, target: str) -> None:
    batches = [keys(functools.partial(launches_of, batch, k, n, BF16), target) for batch in (256, 250, 17, 1)]
    assert batches[0] == batches[1] == batches[2] == batches[3]
    assert keys(functools.partial(launches_of, 256, k + 1, n, BF16), target) != batches[0]


@pytest.mark.gate("aot")
@pytest.mark.parametrize("target", sorted(targets.TARGETS))
def test_few_tiles_share_their_reduction(target: str) -> None:
    gpu = targets.TARGETS[target]
    # the head's first layer is 16 tiles: more programs than tiles
    splits = tuning.forward_splits(16, 2048, gpu)
    assert splits > 1
    assert 16 * splits <= 2 * gpu.multiprocessors
    assert tuning.forward_splits(10_000, 2048, gpu) == 0
    assert tuning.forward_splits(16, 256, gpu) == 0
    for rows in (1, 17, 256):  # over before a second kernel would have started
        assert tuning.wgrad_splits(8, rows, 32, gpu) == 0
    for rows in (257, 10**6):
        assert 1 <= tuning.wgrad_splits(8, rows, 32, gpu) <= 2 * gpu.multiprocessors // 8
    assert tuning.wgrad_splits(10_000, 10**6, 32, gpu) == 0
