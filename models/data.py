"""What to train on: digits and CIFAR-10, noise for load tests, rows of numbers; each in two parts, one to validate.

Images come as 3xHxW, uint8 or floats in [0, 1]: enlarging, augmentation and normalisation happen on whole batches, on
the device (models.augment).
"""

from __future__ import annotations

import contextlib
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset, random_split

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CONNECT_SECONDS = 20.0
# what is held out where the data have no validation part of their own
VAL_FRACTION = 0.2


class DataError(Exception):
    """Data that cannot be had; the message says in one line what is missing and how to get it."""


class Data(NamedTuple):
    """A data set in two parts, each of (image or row, class index) pairs.

    ``classes``: the classes' names. ``mean``, ``std``: of each colour of the training images in [0, 1]; None for rows.
    ``preprocessing``: of a table, how its columns became rows, as models.preprocessing writes it for checkpoints.
    """

    train: Dataset[Any]
    val: Dataset[Any]
    classes: tuple[str, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    preprocessing: dict[str, Any] | None = None


def load(name: str, data_dir: Path, seed: int, val_fraction: float | None = None) -> Data:
    """The data set of that name, one of ``NAMES``. ``seed`` draws the split, ``val_fraction`` is the part held out to
    validate (None: CIFAR-10's own test images, else a fifth).

    Raises DataError where the data cannot be had.
    """
    return _LOADERS[name](data_dir, seed, val_fraction)


def tensors(dataset: Dataset[Any]) -> tuple[Tensor, Tensor]:
    """All inputs and all targets of a TensorDataset, or of a Subset of one."""
    if isinstance(dataset, Subset):
        chosen = torch.as_tensor(list(dataset.indices))
        inputs, target = tensors(dataset.dataset)
        return inputs[chosen], target[chosen]
    return cast("tuple[Tensor, Tensor]", cast(TensorDataset, dataset).tensors)


def split(dataset: Dataset[Any], val_fraction: float | None, seed: int) -> tuple[Dataset[Any], Dataset[Any]]:
    """(training part, validation part) at random. Raises DataError where one of them would be empty."""
    total = len(cast(Any, dataset))
    held_out = round(total * (VAL_FRACTION if val_fraction is None else val_fraction))
    if not 0 < held_out < total:
        raise DataError(f"{total} examples cannot be split into a training and a validation part")
    train, val = random_split(dataset, [total - held_out, held_out], torch.Generator().manual_seed(seed))
    return train, val


def digits(data_dir: Path, seed: int, val_fraction: float | None = None) -> Data:
    """1,797 real handwritten digits, 8x8 grey, as 3x8x8 in [0, 1]; split by class.

    They come with scikit-learn: ``data_dir`` is not used.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("--data digits needs scikit-learn: pip install scikit-learn") from error

    grey, label = load_digits(return_X_y=True)
    held_out = VAL_FRACTION if val_fraction is None else val_fraction
    try:
        train, val = train_test_split(range(len(label)), test_size=held_out, stratify=label, random_state=seed)
    except ValueError as error:
        raise DataError(f"the digits cannot be split: {error}") from error
    pixels = (torch.from_numpy(grey).float().reshape(-1, 1, 8, 8) / 16).expand(-1, 3, -1, -1)
    std, mean = torch.std_mean(pixels[train])
    whole = TensorDataset(pixels, torch.from_numpy(label).long())
    names = tuple(str(digit) for digit in range(10))
    return Data(Subset(whole, train), Subset(whole, val), names, (mean.item(),) * 3, (std.item(),) * 3)


def cifar10(data_dir: Path, seed: int, val_fraction: float | None = None) -> Data:
    """CIFAR-10's 50,000 training and 10,000 test images, by torchvision; downloaded to ``data_dir`` if not there.

    With ``val_fraction`` a part of the training images validates instead, and the test images are left alone.
    """
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError("--data cifar10 needs torchvision: pip install torchvision") from error

    def part(train: bool, download: bool) -> Any:
        return datasets.CIFAR10(str(data_dir), train=train, download=download)

    def images(found: Any) -> TensorDataset:
        return TensorDataset(torch.from_numpy(found.data).permute(0, 3, 1, 2), torch.tensor(found.targets))

    try:
        train = part(train=True, download=False)
    except (RuntimeError, OSError):  # not there, or incomplete: torchvision compares checksums
        try:
            with _connection_timeout(CONNECT_SECONDS):
                train = part(train=True, download=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise DataError(_how_to_get_cifar10(data_dir, error)) from error
    if val_fraction is None:
        parts: tuple[Dataset[Any], Dataset[Any]] = (images(train), images(part(train=False, download=False)))
    else:
        parts = split(images(train), val_fraction, seed)
    return Data(parts[0], parts[1], tuple(train.classes), CIFAR10_MEAN, CIFAR10_STD)


def _how_to_get_cifar10(data_dir: Path, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return (
        f"CIFAR-10 is not in {data_dir} and could not be downloaded ({reason}): fetch {CIFAR10_URL}, unpack it so that "
        f"{data_dir / 'cifar-10-batches-py'} exists, or give --data-dir; --data digits needs no download"
    )


def synthetic(data_dir: Path, seed: int, val_fraction: float | None = None) -> Data:
    """1,000 rows of 10 normal features; a row's class is 1 where their sum is positive. ``data_dir`` is not used."""
    rows = torch.randn(1000, 10, generator=torch.Generator().manual_seed(seed))
    train, val = split(TensorDataset(rows, (rows.sum(1) > 0).long()), val_fraction, seed)
    return Data(train, val, ("negative", "positive"))


def fake(data_dir: Path, seed: int, val_fraction: float | None = None) -> Data:
    """2,560 images of CIFAR-10's shape, noise with labels at random, to load a machine with; nothing can be learnt."""
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (2560, 3, 32, 32), dtype=torch.uint8, generator=random)
    label = torch.randint(0, 10, (2560,), generator=random)
    train, val = split(TensorDataset(pixels, label), val_fraction, seed)
    return Data(train, val, tuple(str(i) for i in range(10)), (0.5,) * 3, (0.29,) * 3)


@contextlib.contextmanager
def _connection_timeout(seconds: float) -> Iterator[None]:
    """torchvision waits for ever for a server that does not answer."""
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)


_LOADERS = {"digits": digits, "cifar10": cifar10, "synthetic": synthetic, "fake": fake}
NAMES = tuple(_LOADERS)
