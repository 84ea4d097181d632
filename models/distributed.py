"""The processes that torchrun started: which one this is, and what all of them agree on. One process without it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.arguments import shown

# how long a process waits for another one before it takes it for dead
TIMEOUT = timedelta(minutes=10)


def launched() -> bool:
    """Whether torchrun (or something that speaks its language) started this process."""
    return dist.is_available() and bool(os.environ.get("RANK")) and bool(os.environ.get("WORLD_SIZE"))


def check_environment() -> None:
    """Raise ValueError for a variable of the environment that cannot be what torchrun sets."""
    restarts()
    if not launched():
        return
    local_rank()
    _integer("RANK", 0, 0, wanted() - 1)
    _integer("MASTER_PORT", -1, 0, 65535)
    if not os.environ.get("MASTER_ADDR"):
        raise ValueError("environment variable MASTER_ADDR must be the address of the first process, it is not set")


def _integer(name: str, default: int, low: int, high: int | None = None) -> int:
    """A variable's number; an empty one is not set. Raises ValueError."""
    text = os.environ.get(name) or str(default)
    value = int(text) if text.isascii() and text.removeprefix("-").isdigit() else None
    if value is None or value < low or (high is not None and value > high):
        bounds = f"{low} or more" if high is None else f"from {low} to {high}"
        got = repr(os.environ[name]) if os.environ.get(name) else "nothing"
        raise ValueError(f"environment variable {name} must be a whole number, {bounds}, got {got}")
    return value


def wanted() -> int:
    """Of how many processes the job is."""
    return _integer("WORLD_SIZE", 1, 1) if launched() else 1


def restarts() -> int:
    """How often torchrun started the job again after a process had died."""
    return _integer("TORCHELASTIC_RESTART_COUNT", 0, 0)


def local_rank() -> int:
    """The number of this process on its machine."""
    return _integer("LOCAL_RANK", 0, 0)


def active() -> bool:
    return dist.is_available() and dist.is_initialized()


def size() -> int:
    return dist.get_world_size() if active() else 1


def rank() -> int:
    return dist.get_rank() if active() else 0


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def log(line: str) -> None:
    """Print a line, in the main process only."""
    if is_main():
        print(shown(line), flush=True)


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Within it the processes of the job can talk: NCCL between GPUs, Gloo between CPUs."""
    if not launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # torchrun's store outlives the processes: those it starts again must not read their predecessors' addresses
    store = dist.PrefixStore(f"start {restarts()}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The main process runs what is within first, then the others do: for files that it makes."""
    if active() and not is_main():
        dist.barrier()
    try:
        yield
    finally:
        if active() and is_main():
            dist.barrier()


def add_up(t: Tensor) -> Tensor:
    """``t``, now its sum over all processes."""
    if active():
        dist.all_reduce(t)
    return t


def largest(value: int) -> int:
    """The largest of the processes' values."""
    if not active():
        return value
    t = torch.tensor(value)  # on the CPU: waits for no GPU
    dist.all_reduce(t, dist.ReduceOp.MAX)
    return int(t)


def gathered(value: Any) -> list[Any] | None:
    """Every process's value, in the main process; None in the others."""
    if not active():
        return [value]
    values: list[Any] | None = [None] * size() if is_main() else None
    dist.gather_object(value, values)
    return values


def is_loss_of_a_process(error: BaseException) -> bool:
    """Whether an error says that another process no longer answers."""
    if not active() or not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "connection closed", "nccl"))
