"""Checkpoints: whole or not there, and refused in one line when they are not what they should be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models import checkpoint

pytestmark = pytest.mark.gate("torch")


@pytest.fixture
def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_round_trip(tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer]) -> None:
    model, optimizer = trained
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, model, optimizer, 3, 0.5)
    state = checkpoint.load(path)
    assert tuple(state) == ("epoch", "model_state_dict", "optimizer_state_dict", "val_acc")
    assert (state["epoch"], state["val_acc"]) == (3, 0.5)
    other = nn.Linear(3, 2)
    other.load_state_dict(state["model_state_dict"])
    assert torch.equal(other.weight, model.weight)
    again = torch.optim.Adam(other.parameters())
    again.load_state_dict(state["optimizer_state_dict"])
    assert again.state_dict()["state"][0]["step"] == 1
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_failed_write_keeps_the_old_one(
    tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, *trained, 1, 0.5)

    def fail(state: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, *trained, 2, 0.6)
    assert checkpoint.load(path)["epoch"] == 1
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


class _Unwanted:
    """An object that only an unsafe load would build."""


@pytest.mark.parametrize("content", ["absent", "truncated", "text", "empty", "list", "other keys", "object"])
def test_refused(tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer], content: str) -> None:
    path = tmp_path / "checkpoint.pt"
    if content == "truncated":
        checkpoint.save(path, *trained, 1, 0.5)
        path.write_bytes(path.read_bytes()[:-100])
    elif content in ("text", "empty"):
        path.write_text("hello" if content == "text" else "")
    elif content != "absent":
        torch.save({"list": [1], "other keys": {"epoch": 1}, "object": _Unwanted()}[content], path)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
