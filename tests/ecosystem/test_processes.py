"""Fused models in two processes joined over gloo: what they compute together, and that their chains ran."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tkernels
import tkernels.nn as tnn
from tests.fusion.cases import cnn
from tests.fusion.pairs import close, images, ran
from tests.models import processes

pytestmark = pytest.mark.gate("torch")


class Net(nn.Module):
    """(A Sequential would do, but for fuse() of the wrapper: Dynamo compiles no frame of torch.nn's by itself.)"""

    def __init__(self) -> None:
        super().__init__()
        self.body = cnn()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y


def before_wrapping(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    return DistributedDataParallel(tkernels.fuse(model)), model


def after_wrapping(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    wrapped = DistributedDataParallel(model)
    tkernels.fuse(model)
    return wrapped, model


def the_wrapper(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    wrapped = tkernels.fuse(DistributedDataParallel(model))
    return wrapped, wrapped


def in_small_buckets(model: nn.Module) -> nn.Module:
    """DDP cuts the graph where a bucket of gradients is full: here at every other layer."""
    # (read again as Dynamo compiles; this is a process of the test's own)
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 1000
    return DistributedDataParallel(model, bucket_cap_mb=0.001)


def cut(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    return in_small_buckets(tkernels.fuse(model)), model


def synchronised_afterwards(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    converted = tnn.SyncBatchNorm.convert_sync_batchnorm(tkernels.fuse(model))
    return DistributedDataParallel(converted), converted


def synchronised_before(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    converted = tkernels.fuse(tnn.SyncBatchNorm.convert_sync_batchnorm(model))
    return DistributedDataParallel(converted), converted


def synchronised_and_cut(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    converted = tkernels.fuse(tnn.SyncBatchNorm.convert_sync_batchnorm(model))
    return in_small_buckets(converted), converted


def plain(model: nn.Module) -> tuple[nn.Module, None]:
    return DistributedDataParallel(model), None


def synchronised(model: nn.Module) -> tuple[nn.Module, None]:
    return DistributedDataParallel(tnn.SyncBatchNorm.convert_sync_batchnorm(model)), None


def steps(wrap: Callable[[Any], tuple[nn.Module, nn.Module | None]], rank: int) -> tuple[dict[str, Tensor], int]:
    """State and gradients after two steps, each process on images of its own; chains that ran."""
    torch.manual_seed(0)
    model: nn.Module = Net().to(memory_format=torch.channels_last)
    wrapped, fused = wrap(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    for step in range(2):
        torch.manual_seed(10 * step + rank)
        x = images("cpu") + 3 * rank
        optimizer.zero_grad()
        wrapped(x).square().sum().backward()
        optimizer.step()
    found = {**model.state_dict(), **{f"gradient of {k}": p.grad for k, p in model.named_parameters()}}
    return copy.deepcopy({k: t.detach() for k, t in found.items() if t is not None}), 0 if fused is None else ran(fused)


WAYS = [(before_wrapping, 4), (after_wrapping, 4), (the_wrapper, 4), (cut, 4)]


@pytest.mark.filterwarnings("ignore:tkernels.fuse. a call of .* ran no fused operator")
def test_data_parallel(tmp_path: Path) -> None:
    """fuse() before DDP wraps the model, after it, of the wrapper, and where DDP cuts the graph: gradients and buffers
    are the plain model's."""
    found = processes.run_job(
        2, lambda rank: [steps(way, rank) for way in (plain, *[way for way, _ in WAYS])], tmp_path / "job"
    )
    for expected, *others in found:
        for (state, count), (way, chains) in zip(others, WAYS):
            close(state, expected[0], way.__name__, 1e-3)
            assert count == chains, way.__name__
    gradients = [{k: t for k, t in rank[1][0].items() if k.startswith("gradient")} for rank in found]
    close(gradients[0], gradients[1], "processes", 1e-6)


@pytest.mark.filterwarnings("ignore:tkernels.fuse. a call of .* ran no fused operator")
def test_synchronised_norms(tmp_path: Path) -> None:
    """Converted before fuse() and after it: statistics of all processes' images either way."""
    ways = (synchronised, synchronised_before, synchronised_afterwards, synchronised_and_cut)
    found = processes.run_job(2, lambda rank: [steps(way, rank) for way in ways], tmp_path / "job")
    for expected, *others in found:
        for (state, _), way in zip(others, ways[1:]):
            close(state, expected[0], way.__name__, 1e-3)
    close(*[rank[2][0] for rank in found], "processes", 1e-6)
