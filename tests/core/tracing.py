"""What the tests of the registered operators share: compiled against eager, and operators seen in a graph."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.tolerance import assert_close


def operators(module: torch.nn.Module) -> set[str]:
    """Names of the operators of which a graph module, or one within it, calls a registered launch."""
    graphs = [m.graph for m in module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = [str(node.target) for graph in graphs for node in graph.nodes]
    # a program that was functionalised names them as arguments
    targets += [str(a) for graph in graphs for node in graph.nodes for a in node.args]
    names = [target.split(".")[1] for target in targets if target.startswith("tkernels.")]
    return {
        re.sub(
            "_(forward|backward|statistics|row_sums|(input_|weight_|target_|query_|key_value_)?gradients?)$", "", name
        )
        for name in names
    }


def compare_compiled(
    model: torch.nn.Module, draw: Callable[[int], Tensor], batches: Sequence[int], reduction: int, device: str
) -> CompileCounterWithBackend:
    """Assert that forward and backward of the model, compiled without graph breaks, give eager's values and gradients
    at each batch size. Returns what counted the compilations."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    for n in batches:
        outcomes = []
        state = {name: t.clone() for name, t in model.state_dict().items()}
        for call in (model, compiled):
            model.load_state_dict(state)
            model.zero_grad()
            torch.manual_seed(0)
            x = draw(n).to(device).requires_grad_()
            y = call(x)
            torch.manual_seed(1)
            (y.float() * torch.randn(y.shape, device=device)).sum().backward()
            buffers = {name: b.clone() for name, b in model.named_buffers()}
            outcomes.append({"output": y, "input gradient": x.grad, **buffers,
                             **{name: p.grad for name, p in model.named_parameters()}})  # fmt: skip
        eager, ours = outcomes
        for name, value in eager.items():
            dtype = value.dtype if value.is_floating_point() else torch.float32  # a counter
            assert_close(ours[name], value.detach().double(), reduction, dtype=dtype, name=f"{name} at batch {n}")
    return counter


def check_autocast_in_compile(model: torch.nn.Module, x: Tensor) -> None:
    """Assert that a compiled model gives what it gives without, in autocast's dtype, and gradients in its own."""
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        y, expected = compiled(x), model(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def check_dropout_in_compile(model: torch.nn.Module, x: Tensor) -> None:
    """Assert that a compiled model draws dropout anew at each call, by torch's seed."""
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(x), first)
    compiled(x).sum().backward()
