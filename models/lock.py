"""One writer at a time: a lock on a file, which the system lets go of when the process that holds it ends, however."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

# file systems that know no locks
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class Busy(Exception):
    """Another process is writing there; the message says in one line which, and what to do."""


class _Descriptor:
    """An open file, closed in children that fork: those would keep the lock beyond the end of the one that took it."""

    open_ones: ClassVar[weakref.WeakSet[_Descriptor]] = weakref.WeakSet()

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.open_ones.add(self)

    def close(self) -> None:
        if self.number >= 0:
            os.close(self.number)
        self.number = -1
        self.open_ones.discard(self)


def _close_all() -> None:
    for descriptor in list(_Descriptor.open_ones):
        descriptor.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_all)


@contextlib.contextmanager
def held(path: Path, what: str, log: Callable[[str], None]) -> Iterator[bool]:
    """Within it this process alone holds ``path``, a file that is made for it and removed in the end.

    ``what``: what others must keep off, for messages. Gives False, after a line to ``log``, on a file system without
    locks: then nobody is kept off. Raises Busy where another one holds it, OSError where the file cannot be made.
    """
    descriptor = _taken(path, what)
    if descriptor is None:
        log(f"note: {path.parent} has no locks: another process writing {what} would not be noticed")
        yield False
        return
    try:
        yield True
    finally:
        _release(descriptor, path)


def _release(descriptor: _Descriptor, path: Path) -> None:
    if descriptor.number < 0:  # a child that forked: the lock is its parent's
        return
    with contextlib.suppress(OSError):
        if sys.platform == "win32":  # an open file cannot be removed there
            descriptor.close()
        # elsewhere while it is held: whoever has opened it meanwhile sees that it is gone
        path.unlink(missing_ok=True)
    descriptor.close()


def _taken(path: Path, what: str) -> _Descriptor | None:
    """The locked file; None where there are no locks. Raises Busy."""
    while True:
        descriptor = _Descriptor(path)
        try:
            _lock(descriptor.number)
            if _is_still(descriptor.number, path):
                _sign(descriptor.number)
                return descriptor
            descriptor.close()  # the one before has just removed it
        except OSError as error:
            holder = _signature(descriptor.number)
            descriptor.close()
            if error.errno in _NO_LOCKS:
                return None
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                raise
            raise Busy(f"another process{holder} is writing {what}: wait for it, stop it, or write elsewhere") from None
        except BaseException:
            descriptor.close()
            raise


if sys.platform == "win32":
    import msvcrt

    def _lock(number: int) -> None:
        # a byte far behind the text, which stays readable
        os.lseek(number, 2**20, os.SEEK_SET)
        try:
            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(number, 0, os.SEEK_SET)

else:
    import fcntl

    def _lock(number: int) -> None:
        # not fcntl.lockf, which the process loses when it closes any descriptor of the file
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_still(number: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), os.stat(path))
    except FileNotFoundError:
        return False


def _sign(number: int) -> None:
    with contextlib.suppress(OSError):  # a full disk takes no text, the lock holds without
        os.ftruncate(number, 0)
        os.write(number, f"{os.getpid()} on {socket.gethostname()}".encode())


def _signature(number: int) -> str:
    try:
        text = os.pread(number, 200, 0) if hasattr(os, "pread") else os.read(number, 200)
    except OSError:
        return ""
    return f" ({text.decode(errors='replace')})" if text else ""
