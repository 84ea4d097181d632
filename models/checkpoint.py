"""Checkpoints: a dictionary with the keys epoch, model_state_dict, optimizer_state_dict and val_acc."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

KEYS = ("epoch", "model_state_dict", "optimizer_state_dict", "val_acc")


class CheckpointError(Exception):
    """A file that is no usable checkpoint; the message says in one line what is wrong with it."""


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, val_acc: float) -> None:
    """Write a checkpoint so that ``path`` at any moment holds either the whole old one or the whole new one."""
    state = {
        "epoch": epoch,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": _portable(optimizer.state_dict()),
        "val_acc": val_acc,
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _portable(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state without the marks of a CUDA graph, which a CPU refuses: a learning rate that is a tensor."""
    groups = []
    for group in state["param_groups"]:
        lr = group["lr"]
        changed = {"lr": lr.item(), "capturable": False} if isinstance(lr, torch.Tensor) else {}
        groups.append({**group, **changed})
    return {**state, "param_groups": groups}


def load(path: Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint; raises CheckpointError where it cannot be read or lacks a key."""
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # arbitrary bytes make the unpickler raise arbitrary exceptions
        reason, *_ = str(error).splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {reason}") from error
    missing = [key for key in KEYS if not isinstance(state, dict) or key not in state]
    if missing:
        raise CheckpointError(f"{path} is no checkpoint of this program: it lacks {', '.join(missing)}")
    return state
