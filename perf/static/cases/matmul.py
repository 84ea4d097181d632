"""matmul: operands as they lie, transposed, in batches, with few rows, vectors, and reductions that programs share."""

from __future__ import annotations

import torch
from torch import Tensor

from perf.static.aot import Case
from perf.static.cases import DTYPES, case, empty, tf32
from tkernels.ops.matmul import kernels

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
    t = empty(*shape, dtype=dtype)
    return t.mT.contiguous().mT if transposed else t


def product(a: tuple[int, ...], b: tuple[int, ...], transposed: str, dtype: torch.dtype) -> None:
    kernels.launch_matmul(_operand(a, "a" in transposed, dtype), _operand(b, "b" in transposed, dtype))


def cases() -> list[Case]:
    found = []
    for name, *operands in PRODUCTS:
        for short, dtype in DTYPES.items():
            found.append(case(f"matmul {name} {short}", product, *operands, dtype, product=short == "bf16"))
        found.append(case(f"matmul {name} fp32 tf32", tf32, product, *operands, torch.float32))
    for name, *operands in VECTORS:
        found += [case(f"matmul {name} {short}", product, *operands, dtype) for short, dtype in DTYPES.items()]
    return found
