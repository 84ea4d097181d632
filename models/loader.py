"""Batches on the device. The order of an epoch depends on seed and epoch alone: it can be taken up in its middle, and
by another number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from models import data, distributed
from models.augment import Transform

Batch = tuple[Tensor, Tensor]


class Feed(NamedTuple):
    """How examples get to the device. ``workers`` None: all of them lie there; else a DataLoader of so many."""

    device: torch.device
    workers: int | None = None
    pin_memory: bool = False
    drop_last: bool = False


class _Order(DistributedSampler[Any]):
    """This process's part of an epoch: every ``processes``-th example of the order drawn, from ``start`` on."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        # seeds are far apart, for the epoch is added
        super().__init__(dataset, distributed.size(), distributed.rank(), seed=seed * 1_000_003 % 2**32)
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.start, None)

    def __len__(self) -> int:
        return max(self.num_samples - self.start, 0)


class TrainLoader:
    """Shuffled batches of ``batch_size`` examples, over all processes; each yields its share of every batch.

    Where the processes do not divide the examples, a few are shown twice an epoch, as DistributedSampler does.
    """

    def __init__(
        self, dataset: Dataset[Any], batch_size: int, seed: int, feed: Feed, transform: Transform | None = None
    ) -> None:
        self._each = batch_size // distributed.size()
        self._order = _Order(dataset, seed)
        self._feed, self._transform = feed, transform
        self._resident = _resident(dataset, feed.device) if feed.workers is None else None
        self._loader = None if feed.workers is None else _data_loader(dataset, self._each, feed, self._order)

    def __len__(self) -> int:
        """Batches an epoch."""
        batches = self._order.num_samples / self._each
        return math.floor(batches) if self._feed.drop_last else math.ceil(batches)

    def size(self, batch: int) -> int:
        """Examples of this process in a batch."""
        return min(self._each, self._order.num_samples - batch * self._each)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number ``start`` on."""
        self._order.set_epoch(epoch)
        self._order.start = start * self._each
        if self._resident is None:
            source: Iterator[Batch] = iter(cast(Any, self._loader))
        else:
            chosen = torch.as_tensor(list(self._order), device=self._feed.device).split(self._each)
            source = (_pick(self._resident, indices) for indices in chosen)
        for batch in islice(source, max(len(self) - start, 0)):
            yield _prepared(batch, self._feed.device, self._transform)


class ValLoader:
    """Batches in order, of this process's share: no example is shown twice."""

    def __init__(self, dataset: Dataset[Any], batch_size: int, feed: Feed, transform: Transform | None = None) -> None:
        own = range(distributed.rank(), len(cast(Any, dataset)), distributed.size())
        mine = Subset(dataset, own)
        self._feed, self._transform = feed, transform
        self._batch_size = max(batch_size // distributed.size(), 1)
        self._resident = _resident(mine, feed.device) if feed.workers is None else None
        order = range(len(own))
        self._loader = None if feed.workers is None else _data_loader(mine, self._batch_size, feed, order, last=True)
        self._count = len(own)

    def __len__(self) -> int:
        return math.ceil(self._count / self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if self._resident is None:
            source: Iterator[Batch] = iter(cast(Any, self._loader))
        else:
            source = zip(*(t.split(self._batch_size) for t in self._resident)) if self._count else iter(())
        for batch in source:
            yield _prepared(batch, self._feed.device, self._transform)


def _resident(dataset: Dataset[Any], device: torch.device) -> Batch:
    inputs, target = data.tensors(dataset)
    return inputs.to(device), target.to(device)


def _pick(resident: Batch, indices: Tensor) -> Batch:
    inputs, target = resident
    return inputs[indices], target[indices]


def _data_loader(dataset: Dataset[Any], batch_size: int, feed: Feed, order: Any, last: bool = False) -> DataLoader[Any]:
    # a generator of its own: the loader draws a seed for its workers, which must not move the training's random numbers
    return DataLoader(
        dataset, batch_size, sampler=order, num_workers=feed.workers or 0, pin_memory=feed.pin_memory,
        drop_last=feed.drop_last and not last, generator=torch.Generator().manual_seed(0),
        persistent_workers=bool(feed.workers),
    )  # fmt: skip


def _prepared(batch: Batch, device: torch.device, transform: Transform | None) -> Batch:
    """The batch on the device; images channels-last, which is faster on the CPU and on tensor cores."""
    inputs, target = (t.to(device, non_blocking=True) for t in batch)
    if transform is not None:
        inputs = transform(inputs)
    if inputs.dim() == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    return inputs, target
