"""Processes for tests: forked, which costs no import, and joined over Gloo on the loopback where they are several."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SECONDS = 120.0


def start(body: Callable[[], Any], directory: Path, name: str, environment: dict[str, str] | None = None) -> int:
    """Runs ``body`` in a child, whose output goes to NAME.out, its result to NAME.result; gives its process id.

    It exits with the body's result where that is a number, else with 0; with 99 after an exception.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        output = os.open(directory / f"{name}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        import sys

        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.environ.update(environment or {})
        result = body()
        (directory / f"{name}.result").write_bytes(pickle.dumps(result))
        status = result if isinstance(result, int) else 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 98
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(pid: int, seconds: float = SECONDS) -> int:
    """The exit status of a child, negative for a signal; kills it and raises TimeoutError after ``seconds``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"a child did not end in {seconds} seconds")


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def start_job(size: int, body: Callable[[int], Any], directory: Path) -> list[int]:
    """``size`` children that find each other as torchrun's do; each runs body(rank)."""
    shared = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    found = []
    for rank in range(size):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **shared}
        found.append(start(lambda rank=rank: body(rank), directory, f"rank{rank}", own))  # type: ignore[misc]
    return found


def run_job(size: int, body: Callable[[int], Any], directory: Path) -> list[Any]:
    """What body(rank) returned in each of ``size`` joined processes; fails with their output where one did."""

    def joined(rank: int) -> Any:
        torch.distributed.init_process_group("gloo")
        try:
            return [body(rank)]
        finally:
            torch.distributed.destroy_process_group()

    directory.mkdir(exist_ok=True)
    statuses = [wait(pid) for pid in start_job(size, joined, directory)]
    output = "\n".join((directory / f"rank{rank}.out").read_text() for rank in range(size))
    assert statuses == [0] * size, output
    return [pickle.loads((directory / f"rank{rank}.result").read_bytes())[0] for rank in range(size)]
