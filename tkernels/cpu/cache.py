"""Where compiled passes are kept on disk: a folder of our own, for this machine's instructions.

Inductor's own key does not say for which instruction set its C++ was written, and its compiler is told to use all that
this CPU has: out of one folder for two machines came wrong numbers without a word, and illegal instructions. So the
folder's name says for what it is. What lies in it runs, so nobody else may be able to put anything there; where that
is not certain, a folder serves this process alone.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from tkernels.core import _torch, settings

log = logging.getLogger("tkernels")
# seconds for which the notice that passes are compiled is not given again
LATELY = 300


def folder() -> Path:
    """This machine's and this version's, made if need be. Instruction sets have folders of their own in it."""
    try:
        wanted = chosen() / "-".join(("cpu", torch.__version__, *_digests()))
    except RuntimeError as error:  # no HOME, and a user whom the system does not know
        return _own(f"compiled passes are not kept: {error}")
    problem = _unsafe(wanted)
    if problem is None:
        return wanted
    return _own(f"compiled passes are not kept: {problem}")


def chosen() -> Path:
    """What the user chose, for us or for Inductor; else where a user's caches are."""
    ours, inductors = settings.CACHE_DIR.text(), settings.INDUCTOR_CACHE_DIR.text()
    if ours:
        return Path(ours)
    if inductors and not _default(inductors):
        return Path(inductors) / "tkernels"
    home = settings.CACHE_HOME.text() or ""
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "tkernels"


def _default(path: str) -> bool:
    """Whether that is what Inductor takes where nobody chose: it then says so in the environment itself."""
    return os.path.abspath(path) == os.path.abspath(_torch.inductor_cache_dir())


@functools.cache
def _digests() -> tuple[str, str]:
    """Of the build of torch and Python; of the CPU's features."""
    build = f"{torch.version.git_version} {sys.implementation.cache_tag} {sys.prefix}"
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        wanted = ("flags", "Features", "model name", "isa")
        cpu = "\n".join(line for line in lines if line.startswith(wanted))
    except OSError:
        cpu = ""
    cpu += f"{platform.machine()} {platform.processor()}"
    return hashlib.sha256(build.encode()).hexdigest()[:8], hashlib.sha256(cpu.encode()).hexdigest()[:8]


def _unsafe(path: Path) -> str | None:
    """Why nothing may be run that lies in ``path``, which is made if need be."""
    try:
        for part in reversed((path, *path.parents)):
            if not part.is_dir():
                part.mkdir(mode=0o700, exist_ok=True)  # (parents=True would leave the levels above to the umask)
        path = path.resolve()
        if not os.access(path, os.W_OK | os.X_OK):
            return f"{path} is not writable"
        if not hasattr(os, "getuid"):
            return None  # a user's folders are the user's own there
        if path.stat().st_uid != os.getuid():
            return f"{path} is another user's"
        for part in (path, *path.parents):
            found = part.stat()
            # (in a sticky folder nobody can replace what is another's)
            sticky = part != path and found.st_mode & stat.S_ISVTX
            if (_others_may_write(found) and not sticky) or found.st_uid not in (0, os.getuid()):
                return f"others may write to {part}"
    except (OSError, RuntimeError) as error:
        return str(error)
    return None


def _others_may_write(found: os.stat_result) -> bool:
    if found.st_mode & stat.S_IWOTH:
        return True
    return bool(found.st_mode & stat.S_IWGRP) and not _is_private(found.st_gid)


def _is_private(group: int) -> bool:
    """Whether that is the group that systems with a umask of 002 give each user: of the user's name, with nobody else
    in it."""
    try:
        import grp
        import pwd

        user, found = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(group)
    except (ImportError, KeyError, OSError):
        return False
    return group == os.getgid() and found.gr_name == user and set(found.gr_mem) <= {user}


@functools.cache
def _own(reason: str) -> Path:
    """A folder that goes with this process."""
    log.warning("%s", reason)
    path = Path(tempfile.mkdtemp(prefix="tkernels-"))
    atexit.register(_remove, path, os.getpid())
    return path


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:  # rather than a child of it
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def used() -> Iterator[None]:
    """Inductor, in this block, keeps what it makes in our folder, and nothing in it afterwards.

    For whoever holds Dynamo's lock: no other thread compiles meanwhile.
    """
    variable, place = settings.INDUCTOR_CACHE_DIR, folder()
    with variable.restored():
        variable.assign(str(place))  # which the look for instruction sets writes to as well
        place = place / "-".join(str(_torch.pick_vec_isa()).split())
        variable.assign(str(place))
        headers = _torch.header_settings(place / "headers")
        with mock.patch.multiple(_torch.inductor_codecache(), **headers) if headers else contextlib.nullcontext():
            yield


def is_empty(folder: Path) -> bool:
    """Whether nothing was ever compiled into that folder."""
    return not any(path.is_dir() for path in folder.iterdir())


def announced(folder: Path) -> bool:
    """Whether a process that keeps its passes there said lately that it compiles. If none has, this one will, and the
    other processes of a job need not."""
    mark = folder / "announced"
    with contextlib.suppress(OSError):  # it is not there, or no longer
        if time.time() - mark.stat().st_mtime > LATELY:
            mark.unlink()
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return True
    except OSError:  # a full disk
        pass
    return False
