"""SIGTERM and SIGINT as a request to stop after the step at hand, so that nothing of it is lost."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from models import distributed


class Stopped(Exception):
    """Training was stopped by a signal, after a checkpoint."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """While it is open, the first SIGTERM or SIGINT is noted; a second one acts as it usually does."""

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signum, handler = self._before.popitem()
            # None: it was not set from Python
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()

    def requested(self) -> int:
        """The signal to stop for, 0 if none: the same answer in every process of the job."""
        return distributed.largest(self.signum)
