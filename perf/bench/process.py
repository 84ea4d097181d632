"""A process that measures for another: asked through a pipe, and given up where it dies or does not answer."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# exit status of a process whose GPU no longer answers
BROKEN_GPU = 70
# seconds a process has to end by itself
PATIENCE = 5.0


class Ended(Exception):
    """The process has ended; the text is a status that says how."""


class Process:
    """``serve(connection, *arguments)`` in a process of its own, within ``environment``. Spawned unless told otherwise:
    torch's threads and CUDA do not survive a fork. It is to end when nobody is at the connection's other end."""

    def __init__(
        self, serve: Callable[..., None], *arguments: Any, daemon: bool = True, method: str = "spawn",
        environment: Mapping[str, str | None] | None = None,
    ) -> None:  # fmt: skip
        context: Any = multiprocessing.get_context(method)
        self.connection, there = context.Pipe()
        self._process = context.Process(target=serve, args=(there, *arguments), daemon=daemon)
        with changed_environment(environment or {}):
            self._process.start()
        there.close()

    def send(self, what: object) -> None:
        """Raises Ended."""
        try:
            self.connection.send(what)
        except OSError as error:
            raise Ended(self._how()) from error

    def receive(self, seconds: float | None = None) -> Any:
        """What it tells next. Raises TimeoutError where that takes longer, and Ended."""
        if seconds is not None and not self.connection.poll(max(seconds, 0.0)):
            raise TimeoutError
        try:
            return self.connection.recv()
        except (EOFError, OSError) as error:
            raise Ended(self._how()) from error

    def _how(self) -> str:
        self._process.join(PATIENCE)
        code = self._process.exitcode
        if code == BROKEN_GPU:
            return "crashed: the GPU no longer answers"
        return f"crashed: signal {-code}" if code is not None and code < 0 else f"crashed: exit status {code}"

    def close(self, patience: float = PATIENCE) -> None:
        """End it, by force after so many seconds. (One that waits within a driver that hangs does not even die.)"""
        self.connection.close()
        self._process.join(patience)
        self._process.kill()
        self._process.join(PATIENCE)


def gpu_answers() -> bool:
    """Whether the GPU can be used as before: after an access out of bounds every call fails, and after a capture that
    could not be ended no random number can be drawn."""
    import torch

    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.set_stream(torch.cuda.default_stream())
        torch.rand(1, device="cuda")
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:  # it is full, and says so
        return True
    except RuntimeError:
        return False
    return True


@contextlib.contextmanager
def changed_environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Variables that processes started meanwhile find set, or None: not set."""
    before = {name: os.environ.get(name) for name in changes}
    _set(changes)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
