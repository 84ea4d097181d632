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
# so many unreadable files are named, the others are counted
NAMED = 20
# of the memory that is free the images may take so much
SHARE = 0.5
# files read at a time
BATCH = 32


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

    def __init__(self, listing: Listing, reading: Reading, seen: int | None) -> None:
        self.files, self.size = Files(listing, seen), reading.size
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
    an error if ``strict``; ``memory``: how many bytes the images may take and stay in it; ``whole``: those to train
    on are read in their full size, of which parts are taken at random; ``log`` gets lines of text."""

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
    listings = _listings(path, seed, val_fraction, reading.log)
    keep = sum(len(listing.files) for listing in listings) * 3 * reading.size**2 <= reading.memory
    train, val = (
        _Part(listing, reading, keep, None if reading.whole and listing is listings[0] else reading.seen)
        for listing in listings
    )
    _complain([*train.reasons, *val.reasons], sum(len(listing.files) for listing in listings), reading)
    there = set(train.listing.labels)
    for label, name in enumerate(train.listing.classes):
        if label not in there:
            raise DataError(f"--data folder: of the images of class {name!r} none can be read to train on")
    if not val.listing.files:
        raise DataError("--data folder: none of the images to validate with can be read")
    return Data(train.dataset(), val.dataset(), train.listing.classes, *data.moments(train.counts))


def fingerprint(path: Path) -> str:
    """Which examples there are and how large their files, in a few words; empty where there are none."""
    try:
        train, val = _parts(path)
        listing = _listing(train)
        files = listing.files if val is None else [*listing.files, *_listing(val, listing.classes).files]
    except DataError:
        return ""
    found = hashlib.sha256()
    for file in files:
        size = file.stat().st_size if file.exists() else -1  # a link to nowhere
        found.update(f"{file.relative_to(path)}\0{size}\0".encode(errors="surrogateescape"))
    return f"{len(files):,} images with digest {found.hexdigest()[:12]}" if files else ""


def free_memory(device: torch.device) -> float:
    """Bytes that are free on the host and, if it is another one, on the device too, as far as the system tells."""
    if device.type == "cuda":
        return min(free_memory(torch.device("cpu")), float(torch.cuda.mem_get_info(device)[0]))
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # another system: half of what is built in
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 if hasattr(os, "sysconf") else 2.0**31
    try:  # of a container
        most, used = (Path("/sys/fs/cgroup", name).read_text() for name in ("memory.max", "memory.current"))
        return min(free, float(most) - float(used))
    except (OSError, ValueError):  # none, or "max"
        return free


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _is_results(directory: Path) -> bool:
    """Whether a run of training writes there, or has written: its pictures are no examples."""
    return any((directory / name).exists() for name in ("history.csv", ".lock"))


def _listings(path: Path, seed: int, val_fraction: float | None, log: Callable[[str], None]) -> tuple[Listing, Listing]:
    """What to train on and what to validate with. Raises DataError."""
    train_path, val_path = _parts(path)
    beside = [folder.name for folder in _folders(path) if folder.name.lower() not in (*TRAINING, *VALIDATION)]
    if val_path is not None and beside:
        log(f"note: {path} has folders for training and validation; left out: {', '.join(beside)}")
    listing = _listing(train_path)
    if val_path is not None and val_fraction is None:
        return listing, _listing(val_path, listing.classes)
    train, val = _split(listing, data.VAL_FRACTION if val_fraction is None else val_fraction, seed)
    return listing.only(train), listing.only(val)


def _parts(path: Path) -> tuple[Path, Path | None]:
    """The folders of training and validation images; None where they are to be split."""
    try:
        if not path.is_dir():
            there = "is a file: give the folder it lies in" if path.exists() else "is not there"
            raise DataError(f"--data folder: {path} {there}")
        folders = {folder.name.lower(): folder for folder in _folders(path)}
    except OSError as error:
        raise DataError(f"--data folder: {path} cannot be read: {error.strerror or error}") from error
    train, val = (
        next((folders[name] for name in names if name in folders and _folders(folders[name])), None)
        for names in (TRAINING, VALIDATION)
    )
    if train is None or (val is None and len(folders) > 1):
        return path, None
    return train, val


def _listing(path: Path, classes: tuple[str, ...] | None = None) -> Listing:
    """The images of each folder in ``path``; ``classes``: which those of validation can be. Raises DataError."""
    found = {folder.name: images.below(folder, _is_results) for folder in _folders(path) if not _is_results(folder)}
    for name in [name for name, files in found.items() if not files]:
        if any(directory.is_dir() and _is_results(directory) for directory in (path / name).rglob("*")):
            del found[name]
    names = tuple(found)
    if not names:
        beside = len(images.below(path, lambda directory: True))
        there = f"its {beside} images lie in no folder" if beside else "it is empty"
        raise DataError(
            f"--data folder: {path} needs a folder of images for each class, such as {path / 'cat' / '1.jpg'}: {there}"
        )
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise DataError(
            f"--data folder: there are no images in {path / empty[0]}: put some there or remove it, each folder is a "
            f"class"
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
    files = [file for each in found.values() for file in each]
    return Listing(classes or names, files, [number[name] for name, each in found.items() for _ in each])


class _Part:
    """The examples of a listing that can be read: ``listing`` of them, ``counts``, their colours' histogram, their
    images in memory if ``keep``; ``reasons`` why the others cannot. Files are read for images of ``seen`` pixels."""

    def __init__(self, listing: Listing, reading: Reading, keep: bool, seen: int | None) -> None:
        self.counts = torch.zeros(3, 256, dtype=torch.int64)
        self.reasons: list[str] = []
        self.seen = seen
        total = len(listing.files)
        good: list[int] = []
        kept = torch.empty(total if keep else 0, 3, reading.size, reading.size, dtype=torch.uint8)
        batches = DataLoader(_Tried(listing, reading, seen), BATCH, num_workers=min(reading.workers, total))
        for i, (pixels, why) in enumerate(progress_bar("reading images", len(batches))(batches)):
            there = [place for place, reason in enumerate(why) if not reason]
            self.counts += data.histogram(pixels[there])
            if keep:
                kept[len(good) : len(good) + len(there)] = pixels[there]
            good += [i * BATCH + place for place in there]
            self.reasons += [reason for reason in why if reason]
        self.listing = listing.only(good)
        self.pixels = kept[: len(good)] if keep else None

    def dataset(self) -> Dataset[Any]:
        if self.pixels is None:
            return Files(self.listing, self.seen)
        return TensorDataset(self.pixels, torch.tensor(self.listing.labels))


def _complain(reasons: list[str], total: int, reading: Reading) -> None:
    """Name the files that cannot be read. Raises DataError where there are no others, or where it was asked for."""
    if reasons and (reading.strict or len(reasons) == total):
        raise DataError(f"{min(reasons)} ({len(reasons)} of {total} images cannot be read)")
    if reasons:
        reading.log(f"note: {len(reasons)} of {total:,} images cannot be read and are left out:")
        for reason in sorted(reasons)[:NAMED]:
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
