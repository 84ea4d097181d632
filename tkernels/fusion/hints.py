"""What would make a model faster and is its user's to do, from the sizes and dtypes in its graphs as they are compiled.

Nothing is said that one graph of several does not bear out: layouts are those of all convolutions, dtypes of all
products, sizes of the largest.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from tkernels.core import hardware, mode, targets
from tkernels.fusion import checkpoint
from tkernels.fusion.steps import Step, is_channels_last, sizes, step_of, value

# Bytes of a network's largest map from which on passes on a CPU pay. (Measured: batch norm and ReLU as one call 0.7 of
# torch's speed at 1 MB, 0.9 to 1.2 times it at 2 MB; resnet18's steps 0.5 to 0.9 of eager's up to 1 MB, 0.9 to 1.3
# times them at 4 MB.)
SMALL = 2 << 20
# Operations from which on products in bfloat16 are worth their casts: a millisecond or so of a CPU.
WORTH_CASTS = 10**8
# Seconds of the host's time that a launch takes, as perf/RESULTS.md has it.
LAUNCH = 12e-6


@dataclasses.dataclass
class _Seen:
    """Of one device: ``contiguous``, ``channels_last``: convolutions by their results' layout; ``products``: how many
    there are in each dtype; ``largest``: bytes of the largest map; ``operations`` of all products; ``estimate``: of a
    GPU's seconds for all ``steps``."""

    contiguous: int = 0
    channels_last: int = 0
    products: dict[torch.dtype, int] = dataclasses.field(default_factory=dict)
    largest: int = 0
    operations: int = 0
    steps: int = 0
    estimate: float = 0.0


class Hints:
    """What was seen of a model's graphs so far."""

    def __init__(self) -> None:
        self._seen: dict[torch.device, _Seen] = {}

    def look(self, gm: fx.GraphModule) -> None:
        """Take in a graph that Dynamo has made, and nobody changed. Warns of a dtype that a device is slow in."""
        for module in (gm, *checkpoint.bodies(gm)):
            for node in module.graph.nodes:
                step = step_of(node)
                if step is not None and step.kind in ("conv", "linear", "norm"):
                    device = value(node).device
                    if device.type not in _NAMES:
                        continue
                    _add(self._seen.setdefault(device, _Seen()), step, device)
        for device, seen in self._seen.items():
            for reason in _slow_dtypes(device, seen):
                mode.log_once(reason, logging.WARNING)

    def lines(self) -> list[str]:
        """A line for each thing to do."""
        return [line for device, seen in self._seen.items() for line in _lines(device, seen)]


def _add(seen: _Seen, step: Step, device: torch.device) -> None:
    result = value(step.node)
    shape, dtype = sizes(result), result.dtype
    if step.kind != "linear" and len(shape) == 4:  # chains are of maps
        seen.largest = max(seen.largest, math.prod(shape) * dtype.itemsize)
    if step.kind == "conv" and shape[1] > 1 and shape[2] * shape[3] > 1:  # else it is in both layouts
        if is_channels_last(result):
            seen.channels_last += 1
        else:
            seen.contiguous += 1
    operations = 0
    if step.kind != "norm":
        weight = sizes(value(step.arguments["weight"]))
        operations = 2 * math.prod(shape) * math.prod(weight[1:] if step.kind == "conv" else weight[-1:])
        seen.products[dtype] = seen.products.get(dtype, 0) + 1
    seen.operations += operations
    seen.steps += 1
    if device.type == "cuda":
        gpu = targets.of(device)
        moved = sum(map(_bytes, (step.node, *step.node.all_input_nodes)))
        rate = gpu.tflops if dtype.itemsize == 2 else gpu.tflops_fp32
        seen.estimate += max(moved / (gpu.gbps * 1e9), operations / (rate * 1e12))


def _bytes(node: fx.Node) -> int:
    tensor: Any = value(node)
    return math.prod(sizes(tensor)) * tensor.dtype.itemsize if isinstance(tensor, torch.Tensor) else 0


def _lines(device: torch.device, seen: _Seen) -> Iterator[str]:
    if seen.contiguous and not seen.channels_last:
        yield (
            f"layout: the maps behind its convolutions ({seen.contiguous}) are in torch.contiguous_format: "
            "model.to(memory_format=torch.channels_last), and its input likewise"
        )
    for reason in _slow_dtypes(device, seen):
        yield f"dtype: {reason}"
    few = _too_small(device, seen)
    if few is not None:
        yield f"size: {few}"
    elif seen.operations >= WORTH_CASTS and set(seen.products) == {torch.float32} and _has_bfloat16(device):
        yield (
            f"precision: its products ({seen.products[torch.float32]}) are in float32, and this "
            f"{_NAMES[device.type]} has bfloat16 instructions: "
            f'torch.autocast("{device.type}", torch.bfloat16) around the forward pass and the loss'
        )


def _too_small(device: torch.device, seen: _Seen) -> str | None:
    if device.type == "cpu" and 0 < seen.largest < SMALL:
        return (
            f"its largest map has {seen.largest / 2**20:.2g} MB, and on a CPU fused passes pay from about "
            f"{SMALL >> 20} MB on: larger batches, or tkernels.unfuse(model)"
        )
    if device.type == "cuda" and seen.estimate < LAUNCH * seen.steps:
        return (
            f"forward takes an estimated {1e3 * seen.estimate:.2g} ms of this GPU, and launching it about "
            f"{1e3 * LAUNCH * seen.steps:.2g} ms: larger batches, or the step as a CUDA graph (torch.cuda.graph)"
        )
    return None


_NAMES = {"cpu": "CPU", "cuda": "GPU"}


def _slow_dtypes(device: torch.device, seen: _Seen) -> list[str]:
    reasons = [hardware.why_slow(dtype, device) for dtype in seen.products]
    return [reason for reason in reasons if reason is not None]


def _has_bfloat16(device: torch.device) -> bool:
    return device.type in _NAMES and hardware.why_slow(torch.bfloat16, device) is None
