"""People's own images, a folder for each class: PATH/cat/1.jpg, or PATH/train/cat/1.jpg and PATH/val/cat/2.jpg.

All files are read once before training: those that cannot be are found, the colours' mean and deviation are known, and
the images stay in memory where they fit into it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from models import data, images
from models.augment import each_image
from models.data import Data, DataError
from models.engine import progress_bar

# what the two parts may be called; where there are several for validation, the first
TRAINING, VALIDATION = ("train", "training"), ("val", "valid", "validation", "test", "testing")
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".jp2", ".pgm", ".ppm")
# so many unreadable files are named, the others are counted
NAMED = 20
# of the memory that is free the images may take so much: they are there twice while they are split
SHARE = 0.4


class Listing(NamedTuple):
    """Image files and the class of each, sorted by name; ``classes``: the folders' names."""

    classes: tuple[str, ...]
    files: list[Path]
    labels: list[int]

    def only(self, indices: Sequence[int]) -> Listing:
        return Listing(self.classes, [self.files[i] for i in indices], [self.labels[i] for i in indices])


class Files(Dataset[Any]):
    """(image, class) of a listing, read from disk: (3, H, W), as models.images reads it for that ``size``."""

    def __init__(self, listing: Listing, size: int | None) -> None:
        self.listing, self.size = listing, size

    def __len__(self) -> int:
        return len(self.listing.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return images.read(self.listing.files[index], self.size), self.listing.labels[index]


class _Tried(Dataset[Any]):
    """(image as uint8, why it cannot be read: empty if it can) of a listing's files."""

    def __init__(self, listing: Listing, reading: Reading) -> None:
        self.files, self.size = Files(listing, reading.seen), reading.size
        self.prepare = each_image(reading.size, reading.resize)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        try:
            return self.prepare(self.files[index][0]), ""
        except DataError as error:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), str(error)


class Reading(NamedTuple):
    """How files are read: made size x size as the option ``resize`` says, by so many ``workers``; an unreadable one is
    an error if ``strict``; ``memory``: how many bytes the images may take and stay in it; ``whole``: those that stay on
    disk come in their full size, of which parts are taken at random; ``log`` gets lines of text."""

    size: int
    resize: int
    workers: int = 0
    strict: bool = False
    memory: float = float("inf")
    whole: bool = False
    log: Callable[[str], None] = print

    @property
    def seen(self) -> int:
        return max(self.size, self.resize)


def load(path: Path, reading: Reading, seed: int, val_fraction: float | None = None) -> Data:
    """The images below ``path``: PATH/train and PATH/val where there are such folders and no ``val_fraction``, else a
    part of each class drawn by ``seed``.

    Datasets of tensors where they fit into ``reading.memory``, else of files. Raises DataError, with what to do, where
    there is nothing to train on.
    """
    train_path, val_path = _parts(path)
    listing, pixels, counts = _readable(_listing(train_path), reading)
    if val_path is None or val_fraction is not None:
        train, val = (
            _dataset(listing.only(part), None if pixels is None else pixels[part], reading)
            for part in _split(listing, data.VAL_FRACTION if val_fraction is None else val_fraction, seed)
        )
    else:
        held_out, val_pixels, _ = _readable(_listing(val_path, listing.classes), reading)
        train, val = _dataset(listing, pixels, reading), _dataset(held_out, val_pixels, reading)
    return Data(train, val, listing.classes, *data.moments(counts))


def fingerprint(path: Path) -> str:
    """Which files there are and how large, in a few words; empty where there are none."""
    found = hashlib.sha256()
    count = 0
    for file in sorted(_images_below(path)):
        count += 1
        found.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode(errors="surrogateescape"))
    return f"{count:,} images with digest {found.hexdigest()[:12]}" if count else ""


def free_memory(device: torch.device) -> float:
    """Bytes that are free on the host and, if it is another one, on the device too, as far as the system tells."""
    if device.type == "cuda":
        return min(free_memory(torch.device("cpu")), float(torch.cuda.mem_get_info(device)[0]))
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**20
        return float(pages * 4096) / 2


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images_below(path: Path) -> list[Path]:
    """Image files in a folder and those below it; hidden ones are another system's notes."""
    return [
        Path(directory) / name
        for directory, _, names in os.walk(path, followlinks=True)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    ]


def _parts(path: Path) -> tuple[Path, Path | None]:
    """The folders of training and validation images; None where they are to be split."""
    try:
        if not path.is_dir():
            there = "is a file: give the folder it lies in" if path.exists() else "is not there"
            raise DataError(f"--data folder: {path} {there}")
        folders = {folder.name.lower(): folder for folder in _folders(path)}
    except OSError as error:
        raise DataError(f"--data folder: {path} cannot be read: {error.strerror or error}") from error
    if folders.keys() <= {*TRAINING, *VALIDATION}:
        for name in TRAINING:
            if name in folders:
                held_out = next((folders[other] for other in VALIDATION if other in folders), None)
                return folders[name], held_out
    return path, None


def _listing(path: Path, classes: tuple[str, ...] | None = None) -> Listing:
    """The images of each folder in ``path``; ``classes``: which those of validation can be."""
    folders = _folders(path)
    names = tuple(folder.name for folder in folders)
    found = [sorted(_images_below(folder)) for folder in folders]
    example = f"such as {path / 'cat' / '1.jpg'}"
    if not names:
        beside = len(_images_below(path))
        there = f"its {beside} images lie in no folder" if beside else "it is empty"
        raise DataError(f"--data folder: {path} needs a folder of images for each class, {example}: {there}")
    empty = [name for name, files in zip(names, found) if not files]
    if empty:
        raise DataError(
            f"--data folder: there are no images in {path / empty[0]} ({', '.join(SUFFIXES)}): put some there or "
            f"remove it, each folder is a class"
        )
    if classes is None and len(names) < 2:
        raise DataError(f"--data folder: {path} has one class only, {names[0]!r}: at least two folders are needed")
    strange = [name for name in names if name not in (classes or names)]
    if strange:
        raise DataError(
            f"--data folder: {path / strange[0]} is a class without training images, which are of "
            f"{', '.join(classes or ())}"
        )
    number = {name: i for i, name in enumerate(classes or names)}
    files = [file for each in found for file in each]
    return Listing(classes or names, files, [number[name] for name, each in zip(names, found) for _ in each])


def _readable(listing: Listing, reading: Reading) -> tuple[Listing, Tensor | None, Tensor]:
    """The files that can be read, their images (N, 3, S, S) of uint8 if they fit into memory, their colours' histogram.

    Raises DataError where none can, or not all if that is asked for.
    """
    size = reading.size
    fits = len(listing.files) * 3 * size * size <= reading.memory
    kept = torch.empty(len(listing.files) if fits else 0, 3, size, size, dtype=torch.uint8)
    counts = torch.zeros(3, 256, dtype=torch.int64)
    reasons: list[str] = []
    good: list[int] = []
    batches = DataLoader(_Tried(listing, reading), 32, num_workers=min(reading.workers, len(listing.files)))
    for pixels, why in progress_bar("reading images", len(batches))(batches):
        there = pixels[[i for i, reason in enumerate(why) if not reason]]
        counts += data.histogram(there)
        if fits:
            kept[len(good) : len(good) + len(there)] = there
        good += [len(reasons) + i for i, reason in enumerate(why) if not reason]
        reasons += why
    _complain([reason for reason in reasons if reason], len(reasons), reading)
    return listing.only(good), kept[: len(good)] if fits else None, counts


def _complain(reasons: list[str], total: int, reading: Reading) -> None:
    """Name the files that cannot be read. Raises DataError where there are no others, or where it was asked for."""
    if reasons and (reading.strict or len(reasons) == total):
        raise DataError(f"{reasons[0]} ({len(reasons)} of {total} images cannot be read)")
    if reasons:
        reading.log(f"note: {len(reasons)} of {total:,} images cannot be read and are left out:")
        for reason in reasons[:NAMED]:
            reading.log(f"  {reason}")
        if len(reasons) > NAMED:
            reading.log(f"  and {len(reasons) - NAMED} more")


def _split(listing: Listing, part: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and to validate with: of each class a part, at least one image. Raises DataError."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.tensor(listing.labels)
    train: list[int] = []
    val: list[int] = []
    for label, name in enumerate(listing.classes):
        there = (labels == label).nonzero().flatten()
        if len(there) < 2:
            raise DataError(
                f"--data folder: class {name!r} has {len(there)} image{'s' * (len(there) != 1)}, two are needed, one "
                f"to validate: add images or remove the folder"
            )
        held_out = min(max(round(part * len(there)), 1), len(there) - 1)
        shuffled = there[torch.randperm(len(there), generator=random)].tolist()
        val += shuffled[:held_out]
        train += shuffled[held_out:]
    return sorted(train), sorted(val)


def _dataset(listing: Listing, pixels: Tensor | None, reading: Reading) -> Dataset[Any]:
    if pixels is None:
        return Files(listing, None if reading.whole else reading.seen)
    return TensorDataset(pixels, torch.tensor(listing.labels))
