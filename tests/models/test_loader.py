"""Batches: their order, that an epoch can be taken up in its middle, and that no way of loading changes them."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from models import loader as loading
from models.loader import Feed, TrainLoader, ValLoader

pytestmark = pytest.mark.gate("torch")

CPU = torch.device("cpu")
ROWS = TensorDataset(torch.arange(23.0).view(23, 1), torch.arange(23))
FEEDS = {"device": Feed(CPU), "workers 0": Feed(CPU, 0), "workers 1": Feed(CPU, 1)}


def _order(batches: Any) -> list[list[int]]:
    found = [(inputs, target.tolist()) for inputs, target in batches]
    assert all(inputs.view(-1).tolist() == target for inputs, target in found)
    return [target for _, target in found]


@pytest.mark.parametrize("feed", FEEDS)
def test_order(feed: str) -> None:
    """By seed and epoch alone, the same for every way of loading; every example once."""
    train = TrainLoader(ROWS, 5, 7, FEEDS[feed])
    epochs = [_order(train.epoch(epoch)) for epoch in (1, 2)]
    assert [len(batch) for batch in epochs[0]] == [5, 5, 5, 5, 3] == [train.size(i) for i in range(5)]
    assert len(train) == 5
    assert sorted(chain(*epochs[0])) == list(range(23)) == sorted(chain(*epochs[1]))
    assert epochs[0] != epochs[1]
    assert epochs[1] == _order(TrainLoader(ROWS, 5, 7, Feed(CPU)).epoch(2))
    assert epochs[0] != _order(TrainLoader(ROWS, 5, 8, Feed(CPU)).epoch(1))
    # and from the middle of an epoch on
    for start in range(6):
        assert _order(train.epoch(2, start)) == epochs[1][start:]


@pytest.mark.parametrize("feed", ["device", "workers 0"])
def test_drop_last(feed: str) -> None:
    train = TrainLoader(ROWS, 5, 7, FEEDS[feed]._replace(drop_last=True))
    assert len(train) == 4
    assert [len(batch) for batch in _order(train.epoch(1))] == [5, 5, 5, 5]
    val = ValLoader(ROWS, 5, FEEDS[feed]._replace(drop_last=True))
    assert list(chain(*_order(val))) == list(range(23))
    assert len(val) == 5


@pytest.mark.parametrize("feed", ["device", "workers 0"])
def test_loading_draws_no_random_numbers(feed: str) -> None:
    before = torch.get_rng_state()
    _order(TrainLoader(ROWS, 5, 7, FEEDS[feed]).epoch(1))
    _order(ValLoader(ROWS, 5, FEEDS[feed]))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_the_data_loader_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []

    def spy(*args: Any, **kwargs: Any) -> list[Any]:
        told.append(kwargs)
        return []

    monkeypatch.setattr(loading, "DataLoader", spy)
    TrainLoader(ROWS, 5, 7, Feed(CPU, 3, True, True))
    ValLoader(ROWS, 5, Feed(CPU, 3, True, True))
    keys = ("num_workers", "pin_memory", "drop_last", "persistent_workers")
    assert [[call[key] for key in keys] for call in told] == [[3, True, True, True], [3, True, False, True]]
    TrainLoader(ROWS, 5, 7, Feed(CPU))
    assert len(told) == 2


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_batches(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they show a batch of one process; validation shows every example once."""
    rows = TensorDataset(torch.arange(24.0).view(24, 1), torch.arange(24))
    alone = [sorted(batch) for batch in _order(TrainLoader(rows, 6, 7, Feed(CPU)).epoch(3))]
    shares, shown = [], []
    for rank in range(processes):
        monkeypatch.setattr(loading.distributed, "size", lambda: processes)
        monkeypatch.setattr(loading.distributed, "rank", lambda rank=rank: rank)
        train = TrainLoader(rows, 6, 7, Feed(CPU))
        shares.append(_order(train.epoch(3)))
        assert _order(train.epoch(3, 2)) == shares[-1][2:]
        shown += chain(*_order(ValLoader(ROWS, 6, Feed(CPU))))
    assert [sorted(chain(*parts)) for parts in zip(*shares)] == alone
    assert sorted(shown) == list(range(23))


def test_images_come_channels_last() -> None:
    images = TensorDataset(torch.randn(4, 3, 8, 8), torch.arange(4))
    for batches in (TrainLoader(images, 4, 0, Feed(CPU)).epoch(1), ValLoader(images, 4, Feed(CPU), lambda x: x * 2)):
        ((batch, _),) = batches
        assert batch.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(batch, images.tensors[0] * 2)
