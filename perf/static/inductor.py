"""How many bytes Inductor says the graphs of a torch.compile'd training step move: its own count, no code generated.

The graphs are lowered and fused for the CPU, which needs no GPU; what is fused with what is decided as for a GPU, with
one thread, or sums would be cut in parts for several. A convolution's two gradients are one call there: each of its two
products reads the incoming gradient, which is added, as of PyTorch's own calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from perf.static import meter


def bytes_of_step(build: meter.Build, batch: int, image_size: int = 32) -> int:
    """Bytes of the forward and the backward graph of a classifier with its loss, in bf16 NHWC.

    Raises RuntimeError where this torch's Inductor cannot be asked.
    """
    from torch._functorch import config as functorch
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.graph import GraphLowering

    network, loss = build()
    model = meter.in_bf16(network)
    images, target = meter.batch_of(batch, image_size)
    counts: list[int] = []
    twice: list[int] = []

    def step(images: Tensor, target: Tensor) -> Tensor:
        return loss(model(images), target)

    def compile_to_module(self: Any) -> None:
        self._update_scheduler()
        counts.append(int(self.count_bytes()[0]))
        raise RuntimeError("its bytes are known")

    torch._dynamo.reset()
    count: Any = functools.partial(_count, counts, twice)
    backend: Any = functools.partial(compile_fx, inner_compile=count)
    with (
        mock.patch.object(GraphLowering, "compile_to_module", compile_to_module),
        config.patch({"fx_graph_cache": False, "cpp.threads": 1}),
        functorch.patch(enable_autograd_cache=False),
    ):
        torch.compile(step, backend=backend, dynamic=False)(images, target).backward()
    torch._dynamo.reset()
    if len(counts) != 2:
        raise RuntimeError(f"Inductor lowered {len(counts)} graphs of the step, not a forward and a backward one")
    return sum(counts) + sum(twice)


def count_or_say_why(build: meter.Build, batch: int, image_size: int = 32) -> int | None:
    """bytes_of_step's; None, and a note, where it cannot be had."""
    try:
        return bytes_of_step(build, batch, image_size)
    except Exception as error:  # Inductor's inside changes from release to release
        print(f"note: Inductor's count is not to be had: {' '.join(str(error).split())[:200]}")
        return None


def _count(
    counts: list[int], twice: list[int], graph: torch.fx.GraphModule, inputs: list[Any], **options: Any
) -> Callable[..., Any]:
    """In place of a compiled graph: one that returns tensors without values, once its bytes are counted, and in
    ``twice`` the gradients that two products read."""
    from torch._inductor.compile_fx import compile_fx_inner

    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.convolution_backward.default and all(node.args[-1][:2]):
            dy = node.args[0].meta["val"]
            twice.append(dy.numel() * dy.element_size())
    counted = len(counts)
    try:
        compile_fx_inner(graph, inputs, **options)
    except Exception:
        if len(counts) == counted:
            raise

    def results(arguments: list[Any]) -> list[Any]:
        arguments.clear()
        outputs: Any = graph.graph.output_node().args[0]
        values = [getattr(node, "meta", {}).get("val") for node in outputs]
        return [
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype) if isinstance(value, Tensor) else value
            for value in values
        ]

    results._boxed_call = True  # type: ignore[attr-defined]
    return results
