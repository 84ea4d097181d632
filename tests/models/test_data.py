"""The data sets: shapes, normalisation, splits, order; CIFAR-10 from files made here in its own format."""

from __future__ import annotations

import builtins
import hashlib
import pickle
import socket
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import data

pytestmark = pytest.mark.gate("torch")


def _stacked(dataset: Any) -> tuple[torch.Tensor, torch.Tensor]:
    images, target = zip(*(dataset[i] for i in range(len(dataset))))
    return torch.stack(images), torch.as_tensor(target)


@pytest.fixture
def cifar10_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a small CIFAR-10: 5 files of 4 training images and one of 6 test images.

    torchvision compares checksums with those of the real files; here they are those of the files made.
    """
    from torchvision.datasets import CIFAR10

    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    random = np.random.default_rng(0)

    def write(name: str, content: dict[str, Any]) -> list[str]:
        raw = pickle.dumps(content, protocol=2)
        (base / name).write_bytes(raw)
        return [name, hashlib.md5(raw).hexdigest()]

    def batch(name: str, count: int) -> list[str]:
        pixels = random.integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)
        return write(name, {"data": pixels, "labels": [i % 10 for i in range(count)], "batch_label": name})

    monkeypatch.setattr(CIFAR10, "train_list", [batch(f"data_batch_{i}", 4) for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch", 6)])
    meta = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return tmp_path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    def download(self: Any) -> None:
        assert socket.getdefaulttimeout() == data.CONNECT_SECONDS
        raise urllib.error.URLError("no\nroute")

    monkeypatch.setattr(CIFAR10, "download", download)


def test_digits() -> None:
    images = data.load("digits", Path(), seed=0)
    assert images.num_classes == 10
    train, train_target = _stacked(images.train)
    val, val_target = _stacked(images.val)
    assert train.shape == (1437, 3, 32, 32)
    assert val.shape == (360, 3, 32, 32)
    assert train.dtype == torch.float32
    assert train_target.dtype == torch.int64
    # normalised by the training part
    assert abs(train.mean()) < 1e-5
    assert abs(train.std() - 1) < 1e-5
    assert 1e-5 < abs(val.mean()) < 0.1
    assert torch.equal(train[:, 0], train[:, 2])
    # stratified: every class has a fifth of its images in the validation part
    counts, held_out = train_target.bincount() + val_target.bincount(), val_target.bincount()
    assert ((held_out - counts / 5).abs() <= 1).all()


def test_digits_shows_every_image_once() -> None:
    from sklearn.datasets import load_digits

    images = data.load("digits", Path(), seed=0)
    everything, target = (torch.cat(parts) for parts in zip(_stacked(images.train), _stacked(images.val)))
    assert target.bincount().tolist() == np.bincount(load_digits().target).tolist()
    unique = {image.numpy().tobytes() for image in everything}
    assert len(unique) == len({image.tobytes() for image in load_digits().data})


def test_split_follows_the_seed() -> None:
    first, again, other = (_stacked(data.load("digits", Path(), seed).val)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_order_follows_the_seed_and_changes_each_epoch() -> None:
    images = data.load("digits", Path(), seed=0)

    def order(loader: Any) -> list[int]:
        return [int(t) for _, target in loader for t in target]

    first, again, other = (data.loaders(images, 100, seed)[0] for seed in (0, 0, 1))
    epochs = [order(first), order(first)]
    assert epochs == [order(again), order(again)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != order(other)
    assert sorted(epochs[0]) == sorted(epochs[1])
    val = data.loaders(images, 100, 0)[1]
    assert order(val) == _stacked(images.val)[1].tolist()


def test_cifar10(cifar10_dir: Path) -> None:
    images = data.load("cifar10", cifar10_dir, seed=0)
    assert (len(images.train), len(images.val), images.num_classes) == (20, 6, 10)  # type: ignore[arg-type]
    with (cifar10_dir / "cifar-10-batches-py" / "test_batch").open("rb") as file:
        raw = pickle.load(file)
    pixels = torch.from_numpy(raw["data"]).reshape(-1, 3, 32, 32) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    val, target = _stacked(images.val)
    torch.testing.assert_close(val, (pixels - mean) / std)
    assert target.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("state", ["absent", "changed"])
def test_cifar10_that_cannot_be_had(cifar10_dir: Path, no_network: None, state: str) -> None:
    directory = cifar10_dir if state == "changed" else cifar10_dir / "elsewhere"
    batch = cifar10_dir / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-1])
    with pytest.raises(data.DataError) as caught:
        data.load("cifar10", directory, seed=0)
    message = str(caught.value)
    assert "\n" not in message
    assert str(directory) in message
    for part in ("no route", data.CIFAR10_URL, "--data-dir"):
        assert part in message
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("name, package", [("digits", "sklearn"), ("cifar10", "torchvision")])
def test_missing_package(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(module: str, *args: Any, **kwargs: Any) -> Any:
        if module.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {module!r}")
        return original(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(data.DataError, match=f"--data {name} needs .*pip install"):
        data.load(name, Path(), seed=0)
