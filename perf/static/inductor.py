"""How many bytes Inductor says the graphs of a torch.compile'd training step move: its own count, no code generated.

The graphs are lowered and fused for the CPU, which needs no GPU; what is fused with what is decided as for a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class _Counted(Exception):
    """Stops a compilation when its bytes are known."""


def bytes_of_step(
    build: Callable[[], tuple[nn.Module, Callable[..., Tensor]]], batch: int, image_size: int = 32
) -> int:
    """Bytes of the forward and the backward graph of a classifier with its loss, in bf16 NHWC.

    Raises RuntimeError where this torch's Inductor cannot be asked.
    """
    network, loss = build()
    model = network.to(torch.bfloat16).to(memory_format=torch.channels_last)
    images = torch.empty(batch, 3, image_size, image_size, dtype=torch.bfloat16)
    images = images.contiguous(memory_format=torch.channels_last)
    target = torch.zeros(batch, dtype=torch.int64)
    torch._dynamo.reset()

    def step(images: Tensor, target: Tensor) -> Tensor:
        return loss(model(images), target)

    with _counting() as counts:
        compiled: Any = torch.compile(step, backend=_backend, dynamic=False)
        compiled(images, target).backward()
    torch._dynamo.reset()
    if len(counts) != 2:
        raise RuntimeError(f"Inductor lowered {len(counts)} graphs of the step, not a forward and a backward one")
    return sum(counts)


@contextlib.contextmanager
def _counting() -> Iterator[list[int]]:
    """Within the block Inductor counts instead of generating code, one number a graph."""
    from torch._functorch import config as functorch
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    counts: list[int] = []
    lowering: Any = GraphLowering
    original = lowering.compile_to_module

    def compile_to_module(self: Any) -> None:
        self._update_scheduler()
        counts.append(int(self.count_bytes()[0]))
        raise _Counted

    lowering.compile_to_module = compile_to_module
    try:
        with config.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
            yield counts
    finally:
        lowering.compile_to_module = original


def _backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def inner(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        try:
            compile_fx_inner(graph, inputs, **options)
        except Exception as error:
            if not _caused_by(error, _Counted):
                raise
        outputs = graph.graph.output_node().args[0]
        values = [getattr(node, "meta", {}).get("val") for node in outputs]  # type: ignore[union-attr]

        def results(arguments: list[Any]) -> list[Any]:
            arguments.clear()
            return [_blank(value) for value in values]

        results._boxed_call = True  # type: ignore[attr-defined]
        return results

    compile_with: Any = compile_fx
    return compile_with(graph, inputs, inner_compile=inner)


def _caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind) or kind.__name__ in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _blank(value: Any) -> Any:
    """A tensor like a fake one, without its values."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
