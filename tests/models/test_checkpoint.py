"""Checkpoints: whole or not there, and refused in one line when they are not what they should be."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
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


def _other_files(state: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """What people take for a checkpoint: content, or a function that writes a file, and what is said of it."""
    plain = "it is no file that torch.save wrote, or it is damaged"
    kept = "only tensors, numbers, strings and containers of them are read: save the network's state_dict() instead"
    module = f"it holds a Python object (torch.nn.modules.linear.Linear), {kept}"

    def saved(content: Any, **options: Any) -> Any:
        return lambda path: torch.save(content, path, **options)

    return {
        "truncated": (lambda path: (checkpoint.save(path, state), os.truncate(path, path.stat().st_size - 100)), plain),
        "absent": (lambda path: None, "No such file or directory"),
        "directory": (Path.mkdir, "it is a directory"),
        "empty": (b"", "it is empty"),
        "text": (b"hello\nworld\n", plain),
        "table": (b"colour,size\nred,1\n", plain),
        "picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", plain),
        "object": (saved(_Unwanted()), f"it holds a Python object ({__name__}._Unwanted), {kept}"),
        "module": (saved(nn.Linear(3, 2)), module),
        "module among others": (saved({**state, "model": nn.Linear(3, 2)}), module),
        "array's number": (saved({**state, "val_acc": np.float64(0.5)}), "it holds a Python object (numpy."),
        "pickle": (pickle.dumps(_Unwanted()), plain),
        "pickle of an old protocol": (pickle.dumps(_Unwanted(), 2), "cannot be read as a checkpoint: it "),
        "arrays": (lambda path: np.savez(path.open("wb"), a=np.zeros(3)), plain),
        "program": (lambda path: torch.jit.save(torch.jit.trace(nn.Linear(3, 2), torch.ones(1, 3)), path), plain),
        "safetensors": (
            (17).to_bytes(8, "little") + b'{"a": "and so on"}' + bytes(20), "it is a safetensors file; torch.save(saf"),
        "list": (saved([1]), "is no checkpoint of this program: it holds a list"),
        "other keys": (saved({"epoch": 1}), "is no checkpoint of this program: it lacks"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", _other_files({}))
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_other_files(tmp_path: Path, state: dict[str, Any], kind: str, recwarn: pytest.WarningsRecorder) -> None:
    """Each in words of ours, never torch's advice to switch off weights_only; and no warning beside."""
    path = tmp_path / "x.pt"
    content, message = _other_files(state)[kind]
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    recwarn.clear()
    for load in (checkpoint.load, checkpoint.load_weights):
        with pytest.raises(checkpoint.CheckpointError) as caught:
            load(path)
        line = str(caught.value)
        assert line.startswith(f"{path} ")
        assert message in line
        assert "\n" not in line
        assert "weights_only" not in line
    assert not recwarn.list


def test_a_whole_module_in_the_old_format(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2), tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(checkpoint.CheckpointError, match=r"holds a Python object \(torch.nn.modules.linear.Linear\)"):
        checkpoint.load_weights(tmp_path / "x.pt")
