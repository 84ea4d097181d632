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
def state() -> dict[str, Any]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "val_acc": 0.5,
        "network": {"kind": "mlp", "features": 3, "classes": ["a", "b"]},
    }


def test_round_trip(tmp_path: Path, state: dict[str, Any]) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, state)
    read = checkpoint.load(path)
    assert set(read) == {*state, "version"}
    assert (read["epoch"], read["val_acc"]) == (3, 0.5)
    other = nn.Linear(3, 2)
    other.load_state_dict(read["model_state_dict"])
    assert torch.equal(other.weight, state["model_state_dict"]["weight"])
    again = torch.optim.Adam(other.parameters())
    again.load_state_dict(read["optimizer_state_dict"])
    assert again.state_dict()["state"][0]["step"] == 1
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("links", [True, False])
def test_the_one_before_is_kept(
    tmp_path: Path, state: dict[str, Any], links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*args: Any) -> None:
        raise OSError("no links here")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "checkpoint.pt"
    for epoch in (1, 2, 3):
        checkpoint.save(path, {**state, "epoch": epoch})
    assert checkpoint.load(path)["epoch"] == 3
    assert checkpoint.load(tmp_path / "checkpoint.previous.pt")["epoch"] == 2
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.previous.pt", "checkpoint.pt"]


def test_failed_write_keeps_the_old_one(tmp_path: Path, state: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {**state, "epoch": 1})

    def fail(state: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, state)
    assert checkpoint.load(path)["epoch"] == 1
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_the_newest_good_one_is_found(tmp_path: Path, state: dict[str, Any]) -> None:
    """Truncated, of another run, or of another version: the one before it is taken, and one line says so."""
    path, previous = tmp_path / "checkpoint.pt", tmp_path / "checkpoint.previous.pt"

    def only_three(state: dict[str, Any]) -> None:
        if state["network"]["features"] != 3:
            raise checkpoint.CheckpointError("is of another run: features")

    def spoil_nothing() -> None: ...

    def truncate() -> None:
        path.write_bytes(path.read_bytes()[:-100])

    def another_run() -> None:
        checkpoint.save(path, {**state, "network": {**state["network"], "features": 4}})

    def another_version() -> None:
        torch.save({**state, "version": 1}, path)

    for spoil, reason in (
        (spoil_nothing, None),
        (truncate, "cannot be read"),
        (another_run, "is of another run"),
        (another_version, "is a checkpoint of version 1, this program reads version 2"),
        (path.unlink, None),
    ):
        path.unlink(missing_ok=True)
        previous.unlink(missing_ok=True)
        checkpoint.save(path, {**state, "epoch": 1})
        if spoil is not another_run:  # which saves a third one itself
            checkpoint.save(path, {**state, "epoch": 2})
        spoil()
        told: list[str] = []
        found = checkpoint.newest(tmp_path, only_three, told.append)
        assert found["epoch"] == (2 if spoil is spoil_nothing else 1), spoil
        if reason is None:
            assert told == []
        else:
            (line,) = told
            assert reason in line
            assert f"{path} " in line
            assert line.endswith(f"going on from {previous}")
            assert "\n" not in line
    path.write_text("hello")
    previous.write_text("hello")
    with pytest.raises(checkpoint.CheckpointError, match=r"checkpoint\.pt cannot .*checkpoint\.previous\.pt cannot"):
        checkpoint.newest(tmp_path, only_three, print)
    with pytest.raises(checkpoint.CheckpointError, match="there is no checkpoint in"):
        checkpoint.newest(tmp_path / "nowhere", only_three, print)


class _Unwanted:
    """An object that only an unsafe load would build."""


@pytest.mark.parametrize("content", ["absent", "truncated", "text", "empty", "list", "other keys", "object"])
def test_refused(tmp_path: Path, state: dict[str, Any], content: str) -> None:
    path = tmp_path / "checkpoint.pt"
    if content == "truncated":
        checkpoint.save(path, state)
        path.write_bytes(path.read_bytes()[:-100])
    elif content in ("text", "empty"):
        path.write_text("hello" if content == "text" else "")
    elif content != "absent":
        torch.save({"list": [1], "other keys": {"epoch": 1}, "object": _Unwanted()}[content], path)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
