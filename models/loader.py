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
from models.augment import Mapped, Mix, Transform

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
        # what is drawn for each image depends on the epoch too
        self._shift = len(dataset) if isinstance(dataset, Mapped) else 0

    def __iter__(self) -> Iterator[int]:
        return (self.epoch * self._shift + index for index in islice(super().__iter__(), self.start, None))

    def __len__(self) -> int:
        return max(self.num_samples - self.start, 0)


class TrainLoader:
    """Shuffled batches of ``batch_size`` examples, over all processes; each yields its share of every batch.

    Where the processes do not divide the examples, a few are shown twice an epoch, as DistributedSampler does.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        seed: int,
        feed: Feed,
        transform: Transform | None = None,
        mix: Mix | None = None,
    ) -> None:
        self._each = batch_size // distributed.size()
        self._order = _Order(dataset, seed)
        self._drop_last = feed.drop_last
        self._source = _Source(dataset, self._each, self._order, feed, transform, mix)

    def __len__(self) -> int:
        """Batches an epoch."""
        batches = self._order.num_samples / self._each
        return math.floor(batches) if self._drop_last else math.ceil(batches)

    def size(self, batch: int) -> int:
        """Examples of this process in a batch."""
        return min(self._each, self._order.num_samples - batch * self._each)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number ``start`` on."""
        self._order.set_epoch(epoch)
        self._order.start = start * self._each
        return islice(self._source, max(len(self) - start, 0))


class ValLoader:
    """Batches in order, of this process's share: no example is shown twice."""

    def __init__(self, dataset: Dataset[Any], batch_size: int, feed: Feed, transform: Transform | None = None) -> None:
        mine = Subset(dataset, range(distributed.rank(), len(cast(Any, dataset)), distributed.size()))
        self._count, self._each = len(mine), max(batch_size // distributed.size(), 1)
        self._source = _Source(mine, self._each, range(self._count), feed._replace(drop_last=False), transform)

    def __len__(self) -> int:
        return math.ceil(self._count / self._each)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._source)


class _Source:
    """Batches of a data set's examples in an order: of tensors on the device, or by a DataLoader.

    Images come channels-last, which is faster on the CPU and on tensor cores.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        order: Any,
        feed: Feed,
        transform: Transform | None,
        mix: Mix | None = None,
    ) -> None:
        self._batch_size, self._order, self._device = batch_size, order, feed.device
        self._transform, self._mix = transform, mix
        if feed.workers is None:
            self._tensors = tuple(t.to(feed.device) for t in data.tensors(dataset))
            self._loader = None
            return
        # a generator of its own: the loader draws a seed for its workers, which must not move the training's numbers
        self._loader = DataLoader(
            dataset, batch_size, sampler=order, num_workers=feed.workers, pin_memory=feed.pin_memory,
            drop_last=feed.drop_last, generator=torch.Generator().manual_seed(0), persistent_workers=feed.workers > 0,
        )  # fmt: skip

    def __iter__(self) -> Iterator[Batch]:
        for inputs, target in self._resident() if self._loader is None else self._loaded(self._loader):
            inputs, target = (t.to(self._device, non_blocking=True) for t in (inputs, target))
            if self._transform is not None:
                inputs = self._transform(inputs)
            if self._mix is not None:
                inputs, target = self._mix(inputs, target)
            if inputs.dim() == 4:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            yield inputs, target

    def _resident(self) -> Iterator[Batch]:
        order = torch.as_tensor(list(self._order), dtype=torch.int64, device=self._device)
        for chosen in order.split(self._batch_size) if len(order) else ():
            inputs, target = (t[chosen] for t in self._tensors)
            yield inputs, target

    @staticmethod
    def _loaded(loader: DataLoader[Any]) -> Iterator[Batch]:
        try:
            yield from loader
        except data.DataError as error:  # a file that is gone by now; a worker's comes with its traceback
            raise data.DataError(str(error).rstrip().rpartition("DataError: ")[2]) from error
