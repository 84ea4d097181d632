"""The data sets: shapes, normalisation, splits, order; torchvision's from files made here in their own formats."""

from __future__ import annotations

import builtins
import hashlib
import pickle
import socket
import struct
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import data

pytestmark = pytest.mark.gate("torch")


def cifar(directory: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, classes: int, labels: str) -> None:
    """20 training and 6 test images; torchvision compares checksums with the real files', here with these files'."""
    base = directory / kind.base_folder
    base.mkdir(exist_ok=True)
    random = np.random.default_rng(0)

    def write(name: str, content: dict[str, Any]) -> list[str]:
        raw = pickle.dumps(content, protocol=2)
        (base / name).write_bytes(raw)
        return [name, hashlib.md5(raw).hexdigest()]

    def batch(name: str, count: int, first: int = 0) -> list[str]:
        pixels = random.integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)
        return write(name, {"data": pixels, labels: [(first + i) % classes for i in range(count)], "batch_label": name})

    trains, (test,) = [name for name, _ in kind.train_list], [name for name, _ in kind.test_list]
    each = 20 // len(trains)
    monkeypatch.setattr(kind, "train_list", [batch(name, each, i * each) for i, name in enumerate(trains)])
    monkeypatch.setattr(kind, "test_list", [batch(test, 6)])
    meta = write(kind.meta["filename"], {kind.meta["key"]: [f"class {i}" for i in range(classes)]})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": meta[1]})


def mnist(directory: Path, kind: str) -> None:
    """20 training and 6 test images in the format of MNIST, uncompressed: magic number, sizes, bytes."""
    base = directory / kind / "raw"
    base.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, count in (("train", 20), ("t10k", 6)):
        pixels = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (base / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, count, 28, 28) + pixels.tobytes())
        labels = bytes(i % 10 for i in range(count))
        (base / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + labels)


def svhn(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 training and 6 test images in the format of SVHN: MATLAB's, (H, W, C, N), 0 is called 10."""
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    random = np.random.default_rng(0)
    made = {}
    for part, count in (("train", 20), ("test", 6)):
        path = directory / f"{part}_32x32.mat"
        pixels = random.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        savemat(path, {"X": pixels, "y": np.array([[i % 10 or 10] for i in range(count)])})
        made[part] = [*SVHN.split_list[part][:2], hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", made)


@pytest.fixture
def cifar10_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a small CIFAR-10: 5 files of 4 training images and one of 6 test images."""
    from torchvision.datasets import CIFAR10

    cifar(tmp_path, monkeypatch, CIFAR10, 10, "labels")
    return tmp_path


@pytest.fixture
def vision_dir(cifar10_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a small one of each of torchvision's data sets."""
    from torchvision.datasets import CIFAR100

    cifar(cifar10_dir, monkeypatch, CIFAR100, 100, "fine_labels")
    for kind in ("MNIST", "FashionMNIST"):
        mnist(cifar10_dir, kind)
    svhn(cifar10_dir, monkeypatch)
    return cifar10_dir


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    def download(self: Any) -> None:
        assert socket.getdefaulttimeout() == data.CONNECT_SECONDS
        raise urllib.error.URLError("no\nroute")

    for about in data.VISION.values():
        monkeypatch.setattr(getattr(datasets, about.name), "download", download)


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


FILES = {
    "cifar10": "cifar-10-batches-py/data_batch_3", "cifar100": "cifar-100-python/train", "svhn": "train_32x32.mat",
    "mnist": "MNIST/raw/train-images-idx3-ubyte", "fashion-mnist": "FashionMNIST/raw/train-images-idx3-ubyte",
}  # fmt: skip
CLASSES = {
    "cifar10": (10, "class 0"), "cifar100": (100, "class 0"), "mnist": (10, "0"),
    "fashion-mnist": (10, "T-shirt/top"), "svhn": (10, "0"),
}  # fmt: skip


@pytest.mark.parametrize("name", data.VISION)
def test_sets_of_torchvision(name: str, vision_dir: Path) -> None:
    found = data.load(name, vision_dir, seed=0)
    (train, label), (val, target) = data.tensors(found.train), data.tensors(found.val)
    size = 28 if "mnist" in name else 32
    assert (train.shape, val.shape) == ((20, 3, size, size), (6, 3, size, size))
    assert (train.dtype, label.dtype) == (torch.uint8, torch.int64)
    assert (len(found.classes), found.classes[0]) == CLASSES[name]
    assert target.tolist() == [0, 1, 2, 3, 4, 5]
    assert label.tolist() == [i % len(found.classes) for i in range(20)]
    if name != "cifar10":  # CIFAR-10's are what everybody uses
        std, mean = torch.std_mean(train.double() / 255, (0, 2, 3), correction=0)
        torch.testing.assert_close((found.mean, found.std), (tuple(mean.tolist()), tuple(std.tolist())))
    held_out = data.load(name, vision_dir, 0, val_fraction=0.25)
    assert (len(held_out.train), len(held_out.val)) == (15, 5)  # type: ignore[arg-type]


def test_cifar10(cifar10_dir: Path) -> None:
    images = data.load("cifar10", cifar10_dir, seed=0)
    with (cifar10_dir / "cifar-10-batches-py" / "test_batch").open("rb") as file:
        raw = pickle.load(file)
    assert torch.equal(data.tensors(images.val)[0], torch.from_numpy(raw["data"]).reshape(-1, 3, 32, 32))
    assert (images.mean, images.std) == ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def test_grey_and_turned_images(vision_dir: Path) -> None:
    """MNIST's grey is three colours of one memory; SVHN's axes are the other way round in its files."""
    from scipy.io import loadmat

    grey, _ = data.tensors(data.load("mnist", vision_dir, 0).val)
    raw = (vision_dir / "MNIST" / "raw" / "t10k-images-idx3-ubyte").read_bytes()[16:]
    assert all(grey[:, c].contiguous().numpy().tobytes() == raw for c in range(3))
    assert grey.untyped_storage().nbytes() == len(raw)
    coloured, _ = data.tensors(data.load("svhn", vision_dir, 0).val)
    assert np.array_equal(coloured.numpy(), loadmat(vision_dir / "test_32x32.mat")["X"].transpose(3, 2, 0, 1))


def test_a_colour_that_never_changes_can_be_normalised() -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    images[:, 1] = 7
    mean, std = data.colours(images)
    assert (mean[1], std[1]) == (pytest.approx(7 / 255), 1 / 255)


@pytest.mark.parametrize("name", data.VISION)
@pytest.mark.parametrize("state", ["absent", "changed"])
def test_a_set_that_cannot_be_had(name: str, vision_dir: Path, no_network: None, state: str) -> None:
    directory = vision_dir if state == "changed" else vision_dir / "elsewhere"
    part = vision_dir / FILES[name]
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(data.DataError) as caught:
        data.load(name, directory, seed=0)
    message = str(caught.value)
    assert "\n" not in message
    assert str(directory) in message
    for expected in (data.VISION[name].address, "--data-dir", "no route"):
        assert expected in message
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("name, package", [("digits", "sklearn"), ("cifar10", "torchvision"), ("svhn", "scipy")])
def test_missing_package(name: str, package: str, vision_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(module: str, *args: Any, **kwargs: Any) -> Any:
        if module.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {module!r}")
        return original(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(data.DataError, match=f"--data {name} needs .*pip install"):
        data.load(name, vision_dir, seed=0)
