"""Checkpoints: all that a run needs to go on bit for bit, in a file that is whole or not there, and the one before it.

A dictionary: epoch (of the last finished one), model_state_dict, optimizer_state_dict and val_acc, for anybody to use;
and what ``--resume`` needs beside (see models.trainer). Tensors, numbers, strings and containers only: torch.load reads
it with weights_only=True.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VERSION = 2
KEYS = ("epoch", "model_state_dict", "optimizer_state_dict", "val_acc", "version", "network")
NAME = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"

State = dict[str, Any]


class CheckpointError(Exception):
    """A file that is no usable checkpoint; the message says in one line what is wrong with it."""


def save(path: Path, state: State) -> None:
    """Write a checkpoint so that ``path`` at any moment, power cuts included, holds the whole old or the whole new one.

    The old one is kept beside it as checkpoint.previous.pt.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({**state, "version": VERSION}, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            _keep(path, path.with_name(PREVIOUS), temporary.with_suffix(".old"))
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
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
    """Read a checkpoint; raises CheckpointError where it cannot be read, lacks a key or is of another version."""
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # arbitrary bytes make the unpickler raise arbitrary exceptions
        reason, *_ = str(error).splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is no checkpoint of this program: it holds a {type(state).__name__}")
    if state.get("version", VERSION) != VERSION:
        raise CheckpointError(
            f"{path} is a checkpoint of version {state['version']}, this program reads version {VERSION}"
        )
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise CheckpointError(f"{path} is no checkpoint of this program: it lacks {', '.join(missing)}")
    return state


def newest(directory: Path, check: Callable[[State], None], tell: Callable[[str], None]) -> State:
    """The newest checkpoint in a directory that can be read and that ``check`` accepts (it raises CheckpointError).

    ``tell`` gets a line about one that was passed over. Raises CheckpointError where there is none.
    """
    complaints: list[str] = []
    for path in (directory / NAME, directory / PREVIOUS):
        if not path.exists():
            continue
        try:
            state = load(path)
            try:
                check(state)
            except CheckpointError as error:
                raise CheckpointError(f"{path} {error}") from error
        except CheckpointError as error:
            complaints.append(str(error))
            continue
        for complaint in complaints:
            tell(f"{complaint}; going on from {path}")
        return state
    if complaints:
        raise CheckpointError("; ".join(complaints))
    raise CheckpointError(f"there is no checkpoint in {directory}")
