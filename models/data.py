"""What to train on: digits, torchvision's sets of small images, noise for load tests, rows of numbers; each in two
parts, one to validate.

Images come as 3xHxW, uint8 or floats in [0, 1]: enlarging, augmentation and normalisation happen on whole batches, on
the device (models.augment).
"""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset, random_split

from models.arguments import one_line

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
    validate (None: a data set's own test images, else a fifth).

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


def in_memory(dataset: Dataset[Any]) -> bool:
    """Whether :func:`tensors` can give the whole of a data set."""
    return isinstance(dataset, TensorDataset) or (isinstance(dataset, Subset) and in_memory(dataset.dataset))


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


class _Vision(NamedTuple):
    """A data set of torchvision: the name of its class, where its files lie below --data-dir and come from."""

    name: str
    folder: str
    address: str
    # what torchvision's class is asked for each part by
    parts: tuple[dict[str, Any], dict[str, Any]] = ({"train": True}, {"train": False})
    colours: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # None: those of the training images


VISION = {
    "cifar10": _Vision("CIFAR10", "cifar-10-batches-py", CIFAR10_URL, colours=(CIFAR10_MEAN, CIFAR10_STD)),
    "cifar100": _Vision("CIFAR100", "cifar-100-python", "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"),
    "mnist": _Vision("MNIST", "MNIST/raw", "https://ossci-datasets.s3.amazonaws.com/mnist/"),
    "fashion-mnist": _Vision("FashionMNIST", "FashionMNIST/raw", "https://github.com/zalandoresearch/fashion-mnist"),
    "svhn": _Vision(
        "SVHN", "train_32x32.mat", "http://ufldl.stanford.edu/housenumbers/", ({"split": "train"}, {"split": "test"})
    ),
}


def vision(name: str, data_dir: Path, seed: int, val_fraction: float | None = None) -> Data:
    """A data set of ``VISION`` by torchvision, downloaded to ``data_dir`` if not there; grey becomes three colours.

    Its test images validate; with ``val_fraction`` a part of the training images does, and they are left alone.
    """
    about = VISION[name]
    try:
        from torchvision import datasets

        kind = getattr(datasets, about.name)
        train = _had(kind, about, data_dir, about.parts[0])
        images, target = _pixels(train)
        parts: tuple[Dataset[Any], Dataset[Any]]
        if val_fraction is None:
            test = _had(kind, about, data_dir, about.parts[1])
            parts = TensorDataset(images, target), TensorDataset(*_pixels(test))
        else:
            parts = split(TensorDataset(images, target), val_fraction, seed)
    except ImportError as error:
        package = error.name or "torchvision"
        raise DataError(f"--data {name} needs {package}: pip install {package}") from error
    # MNIST's are called "0 - zero", SVHN's have no names
    names = [str(each).split(" - ")[0] for each in getattr(train, "classes", range(int(target.max()) + 1))]
    return Data(parts[0], parts[1], tuple(names), *(about.colours or colours(images)))


def _had(kind: Any, about: _Vision, data_dir: Path, part: dict[str, Any]) -> Any:
    """A part of the data set as torchvision holds it, downloaded where it is not there. Raises DataError."""
    try:
        return kind(str(data_dir), **part)
    except ImportError:
        raise
    except Exception:  # not there, or damaged, which torchvision finds by checksums or as it reads
        pass
    try:
        with _connection_timeout(CONNECT_SECONDS):
            return kind(str(data_dir), **part, download=True)
    except ImportError:
        raise
    except Exception as error:  # of the network, and of whatever answered instead
        raise DataError(
            f"{kind.__name__} is not in {data_dir}, or damaged, and could not be downloaded ({one_line(error)}): fetch "
            f"{about.address}, unpack it so that {data_dir / about.folder} exists, or give --data-dir; --data digits "
            f"needs no download"
        ) from error


def _pixels(found: Any) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) of uint8 and their classes, of a data set as torchvision holds it."""
    pixels = torch.as_tensor(found.data)
    if pixels.dim() == 3:
        pixels = pixels.unsqueeze(1).expand(-1, 3, -1, -1)
    elif pixels.shape[-1] == 3:
        pixels = pixels.permute(0, 3, 1, 2)
    target = found.targets if hasattr(found, "targets") else found.labels
    return pixels, torch.as_tensor(target).long()


def colours(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) of each colour of uint8 images (N, 3, H, W), white being 1."""
    return moments(histogram(images))


def histogram(images: Tensor) -> Tensor:
    """How often each value is in each colour of uint8 images (N, 3, H, W): (3, 256)."""
    return torch.stack([torch.bincount(images[:, c].reshape(-1), minlength=256) for c in range(3)])


def moments(counts: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) of each colour by its histogram; a colour that never changes deviates by a step."""
    values, shares = torch.arange(256, dtype=torch.float64) / 255, counts / counts.sum(1, keepdim=True).double()
    mean = (shares * values).sum(1, keepdim=True)
    std = (shares * (values - mean).square()).sum(1).sqrt().clamp(min=1 / 255)
    return tuple(mean.squeeze(1).tolist()), tuple(std.tolist())


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


_LOADERS: dict[str, Callable[..., Data]] = {
    "digits": digits,
    **{name: functools.partial(vision, name) for name in VISION},
    "synthetic": synthetic,
    "fake": fake,
}
NAMES = tuple(_LOADERS)
