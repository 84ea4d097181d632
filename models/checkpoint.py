"""Checkpoints: all that a run needs to go on bit for bit, in a file that is whole or not there, and the one before it.

A dictionary: epoch (of the last finished one), model_state_dict, optimizer_state_dict and val_acc, for anybody to use;
and what ``--resume`` needs beside (see models.trainer). Tensors, numbers, strings and containers only: torch.load reads
it with weights_only=True.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from models import contents
from models.cifar_cnn import name_layers
from models.contents import CheckpointError
from models.networks import Network
from models.preprocessing import Preprocessing

__all__ = ["CheckpointError", "load", "load_weights", "naming", "newest", "prepare", "save"]

VERSION = 2
KEYS = ("epoch", "model_state_dict", "optimizer_state_dict", "val_acc", "version", "network")
NAME = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"
# of the attributes that a zip file keeps of each entry; tools that write one again add others, such as permissions
DIRECTORY = 0x10

State = dict[str, Any]


def prepare(directory: Path) -> None:
    """Clear away what runs that were killed as they wrote left of their checkpoints: for who alone writes there.

    Raises CheckpointError where a checkpoint could not be written.
    """
    for pattern in (f".{NAME}.*.tmp", f".{NAME}.*.old"):
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)
    for name in (NAME, PREVIOUS):
        if (directory / name).is_dir():
            raise CheckpointError(f"{directory / name} is a directory, a checkpoint is to be written there")


def save(path: Path, state: State) -> None:
    """Write a checkpoint so that ``path`` at any moment, power cuts included, holds the whole old or the whole new one.

    The old one is kept beside it as checkpoint.previous.pt. Raises OSError where it cannot be written.
    """
    whole = io.BytesIO()  # torch writing to a full disk does not say what was wrong, or ends the process
    torch.save({**state, "version": VERSION}, whole)
    write(path, whole.getbuffer(), previous=path.with_name(PREVIOUS))


def write(path: Path, content: bytes | memoryview, previous: Path | None = None) -> None:
    """Write a file that is the whole old or the whole new one at any moment; the old one is kept as ``previous``.

    Raises OSError, which names the file, where it cannot be written; then no other file is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.is_file():
            _keep(path, previous, temporary.with_suffix(".old"))
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _keep(path: Path, previous: Path, temporary: Path) -> None:
    """Give the file at ``path`` the name ``previous`` too; at no moment is either name without a file."""
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without links
        shutil.copy2(path, temporary)
    os.replace(temporary, previous)


def _sync_directory(directory: Path) -> None:
    """Make the renaming last; where a directory cannot be opened (Windows) the system sees to it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load(path: Path, map_location: str | torch.device = "cpu") -> State:
    """Read a checkpoint; raises CheckpointError where it cannot be read, is damaged, lacks a key or is of another
    version, or where its weights are not finite."""
    state = _read(path, map_location)
    with naming(path):
        _check(state)
    return state


def load_weights(path: Path) -> tuple[Network, dict[str, Tensor], Preprocessing | None]:
    """(network, its state_dict, how a table's columns become its inputs) of a checkpoint, or of a file that somebody
    else saved: a state_dict, or a dictionary that has one as model_state_dict, of a CNN here or of the tutorial's; in
    torch's old format too, which has no checksums. Raises CheckpointError."""
    state = _read(path, "cpu", old_format=True)
    with naming(path):
        bare = isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values())
        if bare or (
            isinstance(state, dict) and "model_state_dict" in state and not state.keys() & {"version", "network"}
        ):
            weights = state if bare else state["model_state_dict"]
            contents.check_weights(weights)
            name_layers(weights)
            return Network.of_weights(weights), weights, None
        network, preprocessing = _check(state)
        return network, state["model_state_dict"], preprocessing


def _check(state: Any) -> tuple[Network, Preprocessing | None]:
    if not isinstance(state, dict):
        raise CheckpointError(f"is no checkpoint of this program: it holds a {type(state).__name__}")
    version = state.get("version", VERSION)
    if not (isinstance(version, int) and version == VERSION):
        raise CheckpointError(f"is a checkpoint of version {version}, this program reads version {VERSION}")
    contents.need(state, KEYS)
    contents.check_result(state)
    network = Network.from_dict(state["network"])
    preprocessing = state.get("preprocessing")  # none of images, nor of a checkpoint from before there were any
    if preprocessing is not None:
        preprocessing = Preprocessing.from_dict(preprocessing, network.features)
    contents.check_weights(state["model_state_dict"])
    return network, preprocessing


class _Unreadable(Exception):
    """Why a file is no checkpoint, in words of our own."""


def _read(path: Path, map_location: str | torch.device, old_format: bool = False) -> Any:
    """What a file holds, if each of its parts has the checksum it was written with (torch compares none)."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # a FIFO would be waited for
            raise _Unreadable("it is a directory" if stat.S_ISDIR(mode) else "it is no regular file")
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles and programs, which are no checkpoints
            head = file.read(9)
            if not head:
                raise _Unreadable("it is empty")
            if head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
                raise _Unreadable(
                    "it is a safetensors file; torch.save(safetensors.torch.load_file(FILE), OTHER) converts it"
                )
            if not old_format or head.startswith(b"PK"):
                _check_archive(file)
            elif not head.startswith(b"\x80"):  # a pickle begins so; the unpickler makes some sense of any text
                raise ValueError
            file.seek(0)
            return torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:  # arbitrary bytes make the unpickler raise arbitrary exceptions
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """In words of our own: torch advises to let a file run code of its own as it is read."""
    if isinstance(error, _Unreadable):
        return str(error)
    if isinstance(error, OSError):
        return error.strerror or str(error)
    found = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
    if found is None:
        return "it is no file that torch.save wrote, or it is damaged"
    return (
        f"it holds a Python object ({found[1]}), only tensors, numbers, strings and containers of them are read: save "
        f"the network's state_dict() instead"
    )


def _check_archive(file: BinaryIO) -> None:
    """Raise an exception where a part of the zip file is not as it was written."""
    with zipfile.ZipFile(file) as archive:
        damaged, entries = archive.testzip(), archive.infolist()
    # torch reads nothing of what is marked as a directory, and says nothing
    marked = next((e.filename for e in entries if e.external_attr & DIRECTORY and not e.is_dir()), None)
    if damaged is not None and not any(entry.CRC for entry in entries):
        raise _Unreadable("it was written without checksums (torch.serialization.set_crc32_options(False))")
    if damaged is not None or marked is not None:
        raise _Unreadable(f"its part {damaged or marked!r} is damaged")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """CheckpointErrors from within begin with the file's name; what else goes wrong there says that it is damaged."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    except Exception as error:  # what is done with contents that are not what they should be
        if str(error).startswith("CUDA "):  # the device's own trouble
            raise
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {reason}") from error


def newest(directory: Path, take: Callable[[State], None], log: Callable[[str], None]) -> State:
    """The newest checkpoint in a directory that can be read and that ``take`` accepts (it raises CheckpointError).

    ``take`` may have half done its work with one it refuses: another follows, or nothing goes on. ``log`` gets a line
    about one that was passed over. Raises CheckpointError where there is none.
    """
    complaints: list[str] = []
    for path in (directory / NAME, directory / PREVIOUS):
        if not path.exists():
            continue
        try:
            state = load(path)
            with naming(path):
                take(state)
        except CheckpointError as error:
            complaints.append(str(error))
            continue
        for complaint in complaints:
            log(f"{complaint}; going on from {path}")
        return state
    if complaints:
        raise CheckpointError("; ".join(complaints))
    raise CheckpointError(f"there is no checkpoint in {directory}")
