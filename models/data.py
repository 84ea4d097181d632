"""Images to train on: scikit-learn's handwritten digits and CIFAR-10, both as normalised 3x32x32 images."""

from __future__ import annotations

import contextlib
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

IMAGE_SIZE = 32
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CONNECT_SECONDS = 20.0


class DataError(Exception):
    """Data that cannot be had; the message says in one line what is missing and how to get it."""


class Images(NamedTuple):
    """A data set in two parts, each of (image, class index) pairs."""

    train: Dataset[Any]
    val: Dataset[Any]
    num_classes: int


def load(name: str, data_dir: Path, seed: int) -> Images:
    """The data set of that name, one of ``NAMES``. ``seed`` draws the split where there is none by custom.

    Raises DataError where the data cannot be had.
    """
    return _LOADERS[name](data_dir, seed)


def loaders(
    images: Images, batch_size: int, seed: int, *, pin_memory: bool = False
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Batches for training, in an order drawn anew each epoch from ``seed``, and for validation, in order."""
    order = torch.Generator().manual_seed(seed)
    train = DataLoader(images.train, batch_size, shuffle=True, generator=order, pin_memory=pin_memory)
    return train, DataLoader(images.val, batch_size, pin_memory=pin_memory)


def digits(data_dir: Path, seed: int) -> Images:
    """1,797 real handwritten digits, 8x8 grey, enlarged to 3x32x32; 80% to train on, stratified by class.

    They come with scikit-learn: ``data_dir`` is not used. Normalised by mean and deviation of the training part.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("--data digits needs scikit-learn: pip install scikit-learn") from error

    grey, label = load_digits(return_X_y=True)
    train, val = train_test_split(range(len(label)), test_size=0.2, stratify=label, random_state=seed)
    pixels = torch.from_numpy(grey).float().reshape(-1, 1, 8, 8) / 16
    target = torch.from_numpy(label).long()
    enlarged = torch.nn.functional.interpolate(pixels, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
    std, mean = torch.std_mean(enlarged[train])
    rgb = ((enlarged - mean) / std).expand(-1, 3, -1, -1)
    return Images(_subset(rgb, target, train), _subset(rgb, target, val), num_classes=10)


def cifar10(data_dir: Path, seed: int) -> Images:
    """CIFAR-10's 50,000 training and 10,000 test images, by torchvision; downloaded to ``data_dir`` if not there.

    The split is CIFAR-10's own: ``seed`` is not used.
    """
    try:
        from torchvision import datasets, transforms
    except ImportError as error:
        raise DataError("--data cifar10 needs torchvision: pip install torchvision") from error

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(CIFAR10_MEAN, CIFAR10_STD)])

    def part(train: bool, download: bool) -> Dataset[Any]:
        return datasets.CIFAR10(str(data_dir), train=train, transform=transform, download=download)

    try:
        train = part(train=True, download=False)
    except (RuntimeError, OSError):  # not there, or incomplete: torchvision compares checksums
        try:
            with _connection_timeout(CONNECT_SECONDS):
                train = part(train=True, download=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise DataError(_how_to_get_cifar10(data_dir, error)) from error
    return Images(train, part(train=False, download=False), num_classes=10)


def _how_to_get_cifar10(data_dir: Path, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return (
        f"CIFAR-10 is not in {data_dir} and could not be downloaded ({reason}): fetch {CIFAR10_URL}, unpack it so that "
        f"{data_dir / 'cifar-10-batches-py'} exists, or give --data-dir; --data digits needs no download"
    )


def _subset(images: Tensor, target: Tensor, indices: list[int]) -> TensorDataset:
    return TensorDataset(images[indices], target[indices])


@contextlib.contextmanager
def _connection_timeout(seconds: float) -> Iterator[None]:
    """torchvision waits for ever for a server that does not answer."""
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)


_LOADERS = {"digits": digits, "cifar10": cifar10}
NAMES = tuple(_LOADERS)
