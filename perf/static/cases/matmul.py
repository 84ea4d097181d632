"""matmul: operands as they lie, transposed, in batches, with few rows, vectors, and reductions that programs share."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from perf.static.aot import Case
from perf.static.cases.linear import tf32
from tkernels.ops.matmul import kernels as matmul

# name, shape of a, shape of b, which of them is transposed
PRODUCTS = (
    ("512x1024 @ 1024x768", (512, 1024), (1024, 768), ""),
    ("512x1024 @ 1024x768, both transposed", (512, 1024), (1024, 768), "ab"),
    ("512x1024 @ 1024x768, a transposed", (512, 1024), (1024, 768), "a"),
    ("512x1024 @ 1024x768, b transposed", (512, 1024), (1024, 768), "b"),
    ("batch 8x64 of 200x40 @ 40x200", (8, 64, 200, 40), (8, 64, 40, 200), ""),
    ("few rows 4x4096 @ 4096x4096", (4, 4096), (4096, 4096), ""),
    ("large K 64x65536 @ 65536x64", (64, 65536), (65536, 64), "a"),
)
VECTORS = (
    ("vector 4096 @ 4096x4096", (1, 4096), (4096, 4096), ""),
    ("vector 4096 @ 4096x4096, b transposed", (1, 4096), (4096, 4096), "b"),
    ("4096x24 @ 24 vector", (4096, 24), (24, 1), ""),
)


def _operand(shape: tuple[int, ...], transposed: bool, dtype: torch.dtype) -> Tensor:
    t = torch.empty(shape, device="cuda", dtype=dtype)
    return t.mT.contiguous().mT if transposed else t


def product(a: tuple[int, ...], b: tuple[int, ...], transposed: str, dtype: torch.dtype) -> None:
    matmul.launch_matmul(_operand(a, "a" in transposed, dtype), _operand(b, "b" in transposed, dtype))


def cases() -> list[Case]:
    found = []
    for name, a, b, transposed in PRODUCTS:
        run = functools.partial(product, a, b, transposed)
        found.append(Case(f"matmul {name} bf16", functools.partial(run, torch.bfloat16), product=True))
        found.append(Case(f"matmul {name} fp32", functools.partial(run, torch.float32)))
        found.append(Case(f"matmul {name} fp32 tf32", functools.partial(tf32, functools.partial(run, torch.float32))))
    for name, a, b, transposed in VECTORS:
        for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            run = functools.partial(product, a, b, transposed, dtype)
            found.append(Case(f"matmul {name} {short}", run))
    return found
