"""torch.ops.tkernels.linear: opcheck, torch.compile, export, autocast, FLOPs, transforms."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tkernels
import tkernels.functional as F
import tkernels.nn as tnn
from tests.core.tracing import check_autocast_in_compile, check_dropout_in_compile, compare_compiled, operators

pytestmark = [pytest.mark.gate("torch", "interp", "cuda"), pytest.mark.usefixtures("tracing")]


@pytest.mark.gate("interp", "cuda")
@pytest.mark.parametrize("activation, p", [(None, 0.0), ("relu", 0.3), ("leaky_relu", 0.0), ("gelu", 0.3)])
def test_opcheck(activation: str | None, p: float, device: str) -> None:
    x, w, b = (torch.randn(*shape, device=device) for shape in ((2, 3, 7), (6, 7), (6,)))
    seed = torch.tensor(3, device=device) if p else None
    y, z = torch.empty(2, 3, 6, device=device), torch.empty(2, 3, 6, device=device)
    torch.library.opcheck(torch.ops.tkernels.linear_forward, (x, w, b, y, z, seed, activation, p))
    torch.library.opcheck(torch.ops.tkernels.linear_forward, (x, w, None, y, None, seed, activation, p))
    dy, saved = torch.randn_like(y), None if activation is None else torch.randn_like(y)
    given = saved, seed
    torch.library.opcheck(torch.ops.tkernels.linear_input_gradient, (dy, w, *given, torch.empty_like(x), activation, p))
    for dw, db in (
        (torch.empty_like(w), None),
        (None, torch.empty_like(b)),
        (torch.empty_like(w), torch.empty_like(b)),
    ):
        arguments = (dy, None if dw is None else x, *given, dw, db, activation, p)
        torch.library.opcheck(torch.ops.tkernels.linear_weight_gradient, arguments)


class Hidden(torch.nn.Sequential):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(tnn.Linear(7, 9, activation="relu", dropout=dropout), tnn.Linear(9, 4, activation="gelu"))


def test_compile_with_any_batch(device: str, triton_runs: bool) -> None:
    counter = compare_compiled(Hidden().to(device), lambda n: torch.randn(n, 7), (4, 6, 9, 12), 9, device)
    assert counter.frame_count == 2  # the second size makes the batch dynamic, and that serves the others
    assert operators(counter.graphs[-1]) == ({"linear"} if triton_runs else set())


def test_compile_draws_dropout_anew(device: str) -> None:
    check_dropout_in_compile(Hidden(0.5).to(device), torch.randn(8, 7, device=device))


def test_autocast_in_compile(device: str) -> None:
    check_autocast_in_compile(Hidden().to(device), torch.randn(4, 7, device=device))


def test_export_with_dynamic_batch(device: str, triton_runs: bool) -> None:
    model = Hidden().to(device).eval()
    x = torch.randn(4, 7, device=device)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert operators(program.graph_module) == ({"linear"} if triton_runs else set())
    other = torch.randn(6, 7, device=device)
    torch.testing.assert_close(program.module()(other), model(other))


def test_fake_and_meta_tensors(device: str) -> None:
    with FakeTensorMode(), torch.device(device):
        y = Hidden()(torch.randn(5, 7, device=device))
    assert y.shape == (5, 4)
    with torch.device("meta"), tkernels.backend("auto"):
        model = Hidden()
        assert model(torch.randn(5, 7)).device.type == "meta"
    model.to_empty(device=device)
    assert model[0].weight.device.type == device


def test_flops(device: str) -> None:
    model = Hidden().to(device)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(5, 7, device=device)).sum().backward()
    forward = 2 * 5 * (7 * 9 + 9 * 4)
    assert counter.get_total_flops() == forward + 2 * 5 * (7 * 9 + 2 * 9 * 4)  # no gradient for the input


def test_activation_checkpointing(device: str) -> None:
    model = Hidden(0.5).to(device)
    x = torch.randn(8, 7, device=device, requires_grad=True)
    gradients = []
    for call in (model, lambda t: checkpoint(model, t, use_reentrant=False)):
        torch.manual_seed(3)
        gradients.append(torch.autograd.grad(call(x).sum(), [x, *model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_transforms_take_pytorch_or_say_why_not(device: str, triton_runs: bool) -> None:
    x, w = torch.randn(5, 7, device=device), torch.randn(6, 7, device=device)

    def loss(weight: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return F.linear(row, weight, None, "gelu").sum()

    if triton_runs:
        with pytest.raises(RuntimeError, match="transforms"):
            torch.func.grad(loss)(w, x)
    with tkernels.backend("auto"):
        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(w, x)
    expected = torch.stack([torch.func.grad(lambda t, r=r: torch.nn.functional.gelu(r @ t.T).sum())(w) for r in x])
    torch.testing.assert_close(found, expected)
