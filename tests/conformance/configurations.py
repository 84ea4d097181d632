"""Every launch configuration the choosers can return: asked for a spread of shapes, dtypes and all targets."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from tkernels.core import targets
from tkernels.core.config import Config
from tkernels.core.geometry import Geometry, Matrix, Pooling
from tkernels.core.targets import Target
from tkernels.ops.attention import config as attention

GATE = os.environ.get("TK_GATE", "torch")
MODULES = ("linear", "matmul", "attention", "conv", "conv_stage", "batch_norm", "cross_entropy")
# shared by the choosers of its module, which are asked themselves
HELPERS = ("tile",)
SIZES = (1, 3, 10, 17, 32, 33, 64, 128, 200, 512, 2048)


def _geometries() -> Iterator[Geometry]:
    """Stem, plain, wide, strided, grouped and depthwise convolutions on small and large images."""
    channels = ((3, 32), (3, 96), (8, 16), (16, 16), (24, 40), (32, 64), (64, 128), (256, 512), (512, 24))
    for (cin, cout), kernel, stride, image in itertools.product(channels, (1, 3, 5), (1, 2), (4, 8, 32)):
        pad = kernel // 2
        out = (image + 2 * pad - kernel) // stride + 1
        for groups in (1, 2, cin):
            if cin % groups == 0 and cout % groups == 0:
                yield Geometry(
                    cin, cout, groups, image, image, kernel, kernel, stride, stride, pad, pad, 1, 1, out, out
                )


def _matrices() -> Iterator[Matrix]:
    for channels, rows in itertools.product((1, 3, 16, 24, 32, 64, 100, 256, 4096), (2, 300, 100_000)):
        yield Matrix(rows, channels, channels, 1, False)
        for spatial in (2, 4, 8):
            yield Matrix(rows, channels, channels * spatial, spatial, False)
        for plane in (9, 16, 49, 64, 256, 1024, 50176):
            yield Matrix(rows, channels, plane, 1, True)


def _poolings() -> Iterator[Pooling]:
    """No pooling, 2x2, and windows that overlap, on maps of few and many pixels."""
    for size, (kernel, stride, pad) in itertools.product((2, 3, 5, 8, 16, 32, 112), ((1, 1, 0), (2, 2, 0), (3, 2, 1))):
        out = (size + 2 * pad - kernel) // stride + 1
        yield Pooling(size, size, kernel, kernel, stride, stride, pad, pad, out, out)


# Rows of a product: m is a Matrix elsewhere.
ROWS = (2, 17, 40, 200)
# Widths of a head of queries and of values: one for each power of two that covers them and counts, and two that differ.
HEADS = (13, 40, 100, 200)
HEAD_PAIRS = (*((width, width) for width in HEADS), (13, 100), (200, 100))
# Values for every parameter a chooser may have, by its name. A new name is added here, or the enumeration fails.
POOL: dict[str, tuple[Any, ...]] = {
    "n": SIZES,
    "k": SIZES,
    "g": tuple(_geometries()),
    "m": tuple(_matrices()),
    "pool": tuple(_poolings()),
    "channels_last": (True, False),
    "masked": (True, False),
    "plain": (True, False),
    "training": (True, False),
    "elements": (1, 30, 500, 9_000, 40_000, 70_000, 10**6, 10**7),
    "columns": (1, 9, 17, 40, 70, 150, 300, 5000),
    "channels": (1, 3, 8, 9, 17, 33, 64, 100, 512),
    "n_classes": (1, 2, 3, 5, 10, 17, 40, 100, 200, 500, 1000, 2000, 4096, 5000, 256_000),
    "inner": (0, 2, 16, 40, 100, 1000, 50176),
    "classes_contiguous": (True, False),
    "drops": (True, False),
    "transposed": (True, False),
    "head": HEADS,
    "v_head": HEADS,
    "extras": (True, False),
    "itemsize": (2, 4),
    "dtype": (torch.float32, torch.bfloat16),
    "precision": ("ieee", "tf32"),
}


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A configuration some target gets from ``chooser`` of tkernels.ops.``module``.config.

    ``dtype``: one it was chosen for, float32 where the chooser does not ask. ``witness``: the first arguments that led
    to it.
    """

    module: str
    chooser: str
    config: Config
    dtype: torch.dtype
    kind: str
    witness: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.chooser} {'x'.join(str(size) for _, size in self.config.blocks)}"


def choosers(module: ModuleType) -> dict[str, Callable[..., Config]]:
    """The public functions of a tuning module that return a Config by themselves."""
    found = {}
    for name, function in vars(module).items():
        own = callable(function) and getattr(function, "__module__", "") == module.__name__
        public = own and not name.startswith("_") and name not in HELPERS
        if public and inspect.signature(function).return_annotation == "Config":
            found[name] = function
    return found


def _kind(arguments: dict[str, Any]) -> str:
    """What of the shape, beside the blocks, makes another kernel of it."""
    g, m = arguments.get("g"), arguments.get("m")
    if g is not None:
        return "depthwise" if g.depthwise else "flat" if g.flattened else "wide"
    if isinstance(m, Matrix):
        return "planes" if m.planes else "columns"
    if "transposed" in arguments:
        return "transposed" if arguments["transposed"] else "dense"
    if "head" in arguments:
        return f"{arguments['head']}, {arguments['v_head']}"
    if "pool" in arguments:
        return "overlapping" if arguments["pool"].overlaps else "apart"
    if "n_classes" in arguments:
        return "classes" if arguments["classes_contiguous"] else "pixels" if arguments["inner"] else "strided"
    return ""


def _arguments(function: Callable[..., Config], target: Target) -> Iterator[dict[str, Any]]:
    names = [name for name in inspect.signature(function).parameters if name != "target"]
    missing = [name for name in names if name not in POOL]
    if missing:
        raise KeyError(
            f"{function.__module__}.{function.__name__} has parameters {missing} that POOL has no values for"
        )
    fixed = {"target": target} if "target" in inspect.signature(function).parameters else {}
    pools = [ROWS if name == "m" and "k" in names else POOL[name] for name in names]
    for values in itertools.product(*pools):
        arguments = {**dict(zip(names, values)), **fixed}
        half = arguments.get("itemsize") == 2 or arguments.get("dtype") == torch.bfloat16
        if not (half and arguments.get("precision") == "tf32") and not _left_to_torch(arguments):
            yield arguments


def _left_to_torch(arguments: dict[str, Any]) -> bool:
    """Whether attention has no tile for such heads, or they are not among HEAD_PAIRS."""
    if "head" not in arguments:
        return False
    head, v_head = arguments["head"], arguments["v_head"]
    if (head, v_head) not in HEAD_PAIRS:
        return True
    return attention.why_not(head, v_head, arguments["itemsize"], arguments["extras"], arguments["target"]) is not None


def targets_here() -> tuple[Target, ...]:
    """On a GPU, its own: it need not fit the tiles of another, which nobody gives it. Else every target."""
    own = targets.current()
    listed = GATE == "cuda" and torch.cuda.is_available() and own.name in targets.TARGETS
    return (own,) if listed else tuple(targets.TARGETS.values())


def enumerate_configs() -> list[Chosen]:
    """Distinct block sizes by chooser and kind; num_warps, num_stages and maxnreg do not change what is computed.

    Where both dtypes get the same blocks, they are run in bfloat16 and float32 by turns.
    """
    found: dict[tuple[Any, ...], list[Chosen]] = {}
    for name in MODULES:
        module = importlib.import_module(f"tkernels.ops.{name}.config")
        for chooser, function in choosers(module).items():
            for target in targets_here():
                for arguments in _arguments(function, target):
                    half = arguments.get("itemsize") == 2 or arguments.get("dtype") == torch.bfloat16
                    dtype, kind = torch.bfloat16 if half else torch.float32, _kind(arguments)
                    config = function(**arguments)
                    same = found.setdefault((name, chooser, config.blocks, kind), [])
                    if dtype not in [chosen.dtype for chosen in same]:
                        same.append(Chosen(name, chooser, config, dtype, kind, arguments))
    return [same[i % len(same)] for i, same in enumerate(found.values())]


ALL = enumerate_configs() if GATE in ("ttsem", "cuda") else []
