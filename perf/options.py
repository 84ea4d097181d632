"""What every subcommand's command line shares: refusals in one line, paths, devices, commits."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from models import lock


class Refused(Exception):
    """Input that cannot be worked with; the message says in one line what it is and what is allowed."""


def one_of(what: str, given: str, allowed: Iterable[str]) -> str:
    """``given``, or Refused with the list of what is allowed."""
    names = list(allowed)
    if given not in names:
        raise Refused(f"unknown {what} {given!r}, allowed: {', '.join(names)}")
    return given


def several(what: str, given: Sequence[str], allowed: Iterable[str]) -> list[str]:
    """The names given, each once and in the order given. Raises Refused for an unknown one."""
    names = list(allowed)
    return [one_of(what, name, names) for name in dict.fromkeys(given)]


def new_file(path: Path) -> Path:
    """A path a file can be written to; its directory is made. Raises Refused, leaving nothing behind."""
    if is_there(path) and path.is_dir():
        raise Refused(f"{path} is a directory, a file name is needed")
    directory(path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise Refused(f"{path} cannot be written to")
    return path


def is_there(path: Path) -> bool:
    """Whether something has that name. Raises Refused for one that nothing can have."""
    try:
        return path.exists()
    except OSError as error:
        raise Refused(f"{path} cannot be used: {error.strerror}") from error


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Within it no other command adds rows to the file. Raises Refused where one does, or where it cannot be a file."""
    if is_there(path) and not path.is_file():
        raise Refused(f"{path} is no regular file: rows are added to one, and read again")
    tell = functools.partial(print, file=sys.stderr)
    try:
        with lock.held(path.with_name(f".{path.name}.lock"), f"to {path}", tell):
            yield
    except lock.Busy as busy:
        raise Refused(str(busy)) from busy


def directory(path: Path) -> Path:
    """A directory that can be written to, made if need be. Raises Refused."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"directory {path} cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise Refused(f"directory {path} cannot be written to")
    return path


def device(name: str | None) -> str:
    """'cpu' or 'cuda[:i]' that can be used here; without a name the GPU if there is one. Raises Refused."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise Refused(f"unknown device {name!r}, allowed: cpu, cuda, cuda:0, cuda:1, ...")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            raise Refused(
                f"device {name!r} was asked for, but torch sees {count or 'no'} GPU{'s' if count > 1 else ''}"
            )
    return name


def commit() -> str:
    """The source's commit, with -dirty where it was changed since; 'unknown' outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"
