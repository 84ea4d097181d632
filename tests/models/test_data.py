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
    assert len(images.classes) == 10
    train, train_target = data.tensors(images.train)
    val, val_target = data.tensors(images.val)
    assert train.shape == (1437, 3, 8, 8)
    assert val.shape == (360, 3, 8, 8)
    assert train.dtype == torch.float32
    assert train_target.dtype == torch.int64
    assert 0 <= train.min() < train.max() == 1
    # mean and deviation are the training part's
    assert images.mean == pytest.approx([train.mean().item()] * 3)
    assert images.std == pytest.approx([train.std().item()] * 3, rel=1e-3)
    assert torch.equal(train[:, 0], train[:, 2])
    # stratified: every class has a fifth of its images in the validation part
    counts, held_out = train_target.bincount() + val_target.bincount(), val_target.bincount()
    assert ((held_out - counts / 5).abs() <= 1).all()


def test_digits_shows_every_image_once() -> None:
    from sklearn.datasets import load_digits

    images = data.load("digits", Path(), seed=0)
    parts = zip(data.tensors(images.train), data.tensors(images.val))
    everything, target = (torch.cat(part) for part in parts)
    assert target.bincount().tolist() == np.bincount(load_digits().target).tolist()
    unique = {image.numpy().tobytes() for image in everything}
    assert len(unique) == len({image.tobytes() for image in load_digits().data})


def test_split_follows_the_seed() -> None:
    first, again, other = (data.tensors(data.load("digits", Path(), seed).val)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name, rows", [("digits", 1797), ("synthetic", 1000), ("fake", 2560)])
def test_part_held_out(name: str, rows: int) -> None:
    parts = data.load(name, Path(), 0, val_fraction=0.4)
    sizes = len(parts.train), len(parts.val)  # type: ignore[arg-type]
    assert sum(sizes) == rows
    assert abs(sizes[1] - 0.4 * rows) <= 1
    with pytest.raises(data.DataError, match="cannot be split"):
        data.load(name, Path(), 0, val_fraction=1e-9)


def test_synthetic() -> None:
    """The tutorial's: 1,000 rows of 10 normal features, the class is the sign of their sum, 80 to 20."""
    parts = data.load("synthetic", Path(), seed=0)
    (train, train_label), (val, val_label) = data.tensors(parts.train), data.tensors(parts.val)
    assert (train.shape, val.shape) == ((800, 10), (200, 10))
    for rows, label in ((train, train_label), (val, val_label)):
        assert torch.equal(label, (rows.sum(1) > 0).long())
    assert abs(train.mean()) < 0.05
    assert abs(train.std() - 1) < 0.05
    assert not torch.equal(train, data.tensors(data.load("synthetic", Path(), seed=1).train)[0])


def test_fake() -> None:
    parts = data.load("fake", Path(), seed=0)
    images, label = data.tensors(parts.train)
    assert images.shape[1:] == (3, 32, 32)
    assert images.dtype == torch.uint8
    assert label.bincount().min() > 100


def test_cifar10(cifar10_dir: Path) -> None:
    images = data.load("cifar10", cifar10_dir, seed=0)
    assert (len(images.train), len(images.val), len(images.classes)) == (20, 6, 10)  # type: ignore[arg-type]
    assert images.classes == tuple("abcdefghij")
    with (cifar10_dir / "cifar-10-batches-py" / "test_batch").open("rb") as file:
        raw = pickle.load(file)
    val, target = data.tensors(images.val)
    assert torch.equal(val, torch.from_numpy(raw["data"]).reshape(-1, 3, 32, 32))
    assert target.tolist() == [0, 1, 2, 3, 4, 5]
    assert (images.mean, images.std) == ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    held_out = data.load("cifar10", cifar10_dir, 0, val_fraction=0.25)
    assert (len(held_out.train), len(held_out.val)) == (15, 5)  # type: ignore[arg-type]


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
