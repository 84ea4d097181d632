"""SyncBatchNorm against torch's batch norm of everything together.

Real processes over Gloo (gate torch), and on the kernels processes played one after the other: what each sends is
recorded, and the round repeated until everybody has got what the others sent.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import tkernels
import tkernels.nn as tnn
from tests.models import processes
from tests.tolerance import assert_close
from tkernels.ops.batch_norm import sync as ops

CHANNELS = 6
# values of the processes; the last two cases: one process has none, one has a single value a channel
SHARES: dict[str, list[tuple[int, ...]]] = {
    "even": [(2, CHANNELS, 5, 4)] * 2,
    "uneven": [(3, CHANNELS, 5, 4), (1, CHANNELS, 5, 4), (2, CHANNELS, 5, 4)],
    "none": [(3, CHANNELS, 5, 4), (0, CHANNELS, 5, 4)],
    "single": [(1, CHANNELS), (4, CHANNELS)],
}


def _parts(share: str, dtype: torch.dtype, device: str, offset: float = 3.0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(input, residual, gradient) of each process; the input's mean is ``offset``, its deviation 1."""
    random = torch.Generator().manual_seed(1)
    return [
        (
            (torch.randn(shape, generator=random) + offset).to(device, dtype),
            torch.randn(shape, generator=random).to(device, dtype),
            torch.randn(shape, generator=random).to(device, dtype),
        )
        for shape in SHARES[share]
    ]


def _module(activation: str | None, momentum: float | None, affine: bool, device: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(2)
    norm = tnn.SyncBatchNorm(CHANNELS, momentum=momentum, affine=affine, activation=activation)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm.to(device, dtype)


def _results(norm: Any, part: tuple[Tensor, Tensor, Tensor], residual: bool) -> dict[str, Tensor]:
    x, other, dy = part
    x, other = x.clone().requires_grad_(), other.clone().requires_grad_()
    y = norm(x, other) if residual else norm(x)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad, "running_mean": norm.running_mean, "running_var": norm.running_var}
    if residual:
        found["dresidual"] = other.grad
    if norm.weight is not None:
        found |= {"dweight": norm.weight.grad, "dbias": norm.bias.grad}
    return {name: t.detach().clone() for name, t in found.items() if t is not None}


def _reference(norm: Any, parts: list[tuple[Tensor, Tensor, Tensor]], residual: bool) -> dict[str, Tensor]:
    """One process that has everything, in float64, by torch."""
    together = tuple(torch.cat([p[i] for p in parts]).double().cpu() for i in range(3))
    kind = tnn.BatchNorm1d if together[0].ndim == 2 else tnn.BatchNorm2d
    whole: Any = kind(CHANNELS, momentum=norm.momentum, affine=norm.affine, activation=norm.activation).double()
    whole.load_state_dict({name: t.double() if t.is_floating_point() else t for name, t in norm.state_dict().items()})
    with tkernels.backend("torch"):
        return _results(whole, together, residual)


def _assert_together(found: list[dict[str, Tensor]], expected: dict[str, Tensor], reduction: int) -> None:
    for name, reference in expected.items():
        if name in ("dweight", "dbias"):
            ours = torch.stack([f[name].double().cpu() for f in found]).sum(0).to(found[0][name].dtype)
        elif name.startswith("running"):
            ours = found[0][name].cpu()
            assert all(torch.equal(f[name].cpu(), ours) for f in found), f"{name} differs between processes"
        else:
            ours = torch.cat([f[name].cpu() for f in found])
        # gradients of parameters are sums of what was rounded to the input's dtype
        dtype = ours.dtype if name.startswith("running") else found[0]["y"].dtype
        assert_close(ours, reference, reduction=reduction, dtype=dtype, name=name)


CASES: list[tuple[str, str | None, bool, float | None, bool]] = [
    ("even", None, False, 0.1, True),
    ("uneven", "relu", True, 0.1, True),
    ("uneven", "gelu", False, None, False),
    ("uneven", "silu", True, 0.3, True),
    ("none", "leaky_relu", False, 0.1, True),
    ("single", None, False, 0.1, True),
]


def _in_a_process(rank: int, size: int) -> list[Any]:
    found = []
    for share, activation, residual, momentum, affine in CASES:
        if len(SHARES[share]) != size:
            continue
        norm = _module(activation, momentum, affine, "cpu", torch.float64)
        _results(norm, _parts(share, torch.float64, "cpu", 1.0)[rank], residual)  # a first batch, to be tracked
        norm.zero_grad()
        before = copy.deepcopy(norm.state_dict())
        found.append((before, _results(norm, _parts(share, torch.float64, "cpu")[rank], residual)))
    return found


@pytest.mark.gate("torch")
@pytest.mark.parametrize("size", [2, 3])
def test_processes(size: int, tmp_path: Path) -> None:
    """float64: as one process to the last digits, whatever each has; evaluation and one process are batch norm."""
    found = processes.run_job(size, lambda rank: _in_a_process(rank, size), tmp_path / "job")
    cases = [case for case in CASES if len(SHARES[case[0]]) == size]
    for i, (share, activation, residual, momentum, affine) in enumerate(cases):
        norm = _module(activation, momentum, affine, "cpu", torch.float64)
        norm.load_state_dict(found[0][i][0])
        expected = _reference(norm, _parts(share, torch.float64, "cpu"), residual)
        assert (found[0][i][0]["num_batches_tracked"]) == 1
        _assert_together([rank[i][1] for rank in found], expected, 120)


class _Rounds:
    """Stands in for the exchange between processes that are played one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
        self.size, self.rank, self.call = size, 0, 0
        self.sent: dict[tuple[int, int], Tensor] = {}
        monkeypatch.setattr(ops, "_gathered", self.gathered)
        monkeypatch.setattr(tnn.sync_batch_norm, "_several_processes", lambda group: True)

    def gathered(self, row: Tensor, group: Any) -> Tensor:
        self.sent[self.call, self.rank] = row.clone()
        rows = [self.sent.get((self.call, rank), row) for rank in range(self.size)]
        self.call += 1
        return torch.stack(rows)

    def play(self, body: Any) -> list[Any]:
        for _ in range(3):  # forward has the others' rows in the second round, backward in the third
            results = []
            for rank in range(self.size):
                self.rank, self.call = rank, 0
                results.append(body(rank))
        return results


def _where_extended(case: tuple[Any, ...]) -> tuple[str, ...]:
    """The gates in which a case takes long and shows little more than the others."""
    if case == ("uneven", "relu", torch.float32):
        return ()
    always = case in {("none", "leaky_relu", torch.float32), ("uneven", "silu", torch.bfloat16)}
    return ("interp",) if always else ("ttsem", "interp")


def _on_the_kernels() -> list[Any]:
    return [
        pytest.param(
            *case, dtype, id=f"{case[0]}-{case[1]}-{str(dtype).removeprefix('torch.')}",
            marks=pytest.mark.extended(*_where_extended((case[0], case[1], dtype))),
        )
        for case in CASES
        for dtype in (torch.float32, torch.bfloat16)
    ]  # fmt: skip


@pytest.mark.gate("torch", "ttsem", "interp", "cuda")
@pytest.mark.parametrize("share, activation, residual, momentum, affine, dtype", _on_the_kernels())
def test_on_the_kernels(
    share: str, activation: str | None, residual: bool, momentum: float | None, affine: bool, dtype: torch.dtype,
    device: str, triton_runs: bool, monkeypatch: pytest.MonkeyPatch, launches: list[str],
) -> None:  # fmt: skip
    if dtype == torch.bfloat16 and not triton_runs:
        pytest.skip("the PyTorch body rounds between its steps, as torch's own calls do")
    parts = _parts(share, dtype, device)
    if share == "uneven":  # channels_last in every process
        parts = [tuple(t.contiguous(memory_format=torch.channels_last) for t in part) for part in parts]  # type: ignore[misc]
    rounds = _Rounds(monkeypatch, len(parts))

    def module() -> Any:
        # float32 parameters beside a bf16 input
        return _module(activation, momentum, affine, device, torch.float32)

    found = rounds.play(lambda rank: _results(module(), parts[rank], residual))
    _assert_together(found, _reference(module(), parts, residual), 120)
    if triton_runs:
        assert {"statistics_kernel", "normalize_kernel", "gradient_sums_kernel", "input_gradient_kernel"} <= set(
            launches
        )


@pytest.mark.gate("torch", "ttsem")
def test_large_mean(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean/std of 1e4, means of the processes apart: variances come from differences of means, not of squares."""
    parts = [(x + shift, r, dy) for (x, r, dy), shift in zip(_parts("even", torch.float32, device, 1e4), (0.0, 2.0))]
    rounds = _Rounds(monkeypatch, 2)
    found = rounds.play(lambda rank: _results(_module(None, 1.0, True, device, torch.float32), parts[rank], False))
    expected = _reference(_module(None, 1.0, True, device, torch.float32), parts, False)
    assert_close(found[0]["running_var"].cpu(), expected["running_var"], reduction=40, name="running_var")


@pytest.mark.gate("torch")
def test_one_process_and_evaluation_are_batch_norm() -> None:
    x = torch.randn(4, CHANNELS, 3, 3)
    ours, theirs = tnn.SyncBatchNorm(CHANNELS), tnn.BatchNorm2d(CHANNELS)
    for _ in range(2):
        assert torch.equal(ours(x), theirs(x))
        ours.eval()
        theirs.eval()
    assert torch.equal(ours.running_var, theirs.running_var)
    assert list(ours.state_dict()) == list(nn.SyncBatchNorm(CHANNELS).state_dict())


@pytest.mark.gate("torch")
def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    _Rounds(monkeypatch, 1)
    with pytest.raises(ValueError, match="at least 2D"):
        tnn.SyncBatchNorm(3)(torch.randn(3))
    with pytest.raises(RuntimeError, match="one value per channel"):
        tnn.SyncBatchNorm(3)(torch.randn(2, 4))
    with pytest.raises(ValueError, match="activation"):
        tnn.SyncBatchNorm(3, activation="tanh")
    x = torch.randn(4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(tnn.SyncBatchNorm(3)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.gate("torch")
def test_conversion() -> None:
    """torch's and our batch norms and conv stages: the same state_dict, parameters and, in one process, outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(
        tnn.ConvStage((3, 4, 5), padding=1, pool=2, dropout=0.0),
        tnn.ConvBNReLU2d(5, 6, 3),
        nn.Sequential(nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), tnn.BatchNorm2d(4, momentum=None, activation="silu")),
        nn.Flatten(),
        nn.BatchNorm1d(16, affine=False),
    )
    images = torch.randn(5, 3, 8, 8)
    twin = copy.deepcopy(model)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    converted = tnn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted is model
    assert list(converted.state_dict()) == keys
    assert all(a is b for a, b in zip(converted.parameters(), parameters))
    norms = [m for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 6
    assert all(type(m) is tnn.SyncBatchNorm for m in norms)
    assert [m.activation for m in norms] == [None, None, None, None, "silu", None]
    for _ in range(2):
        torch.testing.assert_close(converted(images), twin(images), atol=1e-5, rtol=1e-5)
        converted.eval()
        twin.eval()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(converted.state_dict()[name], value)
    alone = tnn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(3).eval())
    assert type(alone) is tnn.SyncBatchNorm
    assert not alone.training
    assert tnn.SyncBatchNorm.convert_sync_batchnorm(alone) is alone
    assert not dist.is_initialized()
