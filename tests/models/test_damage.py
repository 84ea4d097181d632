"""Damaged checkpoints: each loads as it was written or is refused in one line, and the one before is gone on from."""

from __future__ import annotations

import os
import random
import resource
import shlex
import shutil
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models import checkpoint, contents, history, train, trainer
from tests.models import processes

pytestmark = [pytest.mark.gate("torch"), pytest.mark.usefixtures("no_pictures")]

ARGUMENTS = shlex.split("--device cpu --data synthetic --batch-size 400")
Change = Callable[[dict[str, Any]], object]


def _run(out: Path, *arguments: str) -> int:
    return train.main([*ARGUMENTS, "--out", str(out), *arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two epochs."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_report", lambda *args: None)
        assert _run(out, "--epochs", "2") == 0
    return out


@pytest.fixture
def out(trained: Path, tmp_path: Path) -> Path:
    """The same, to be spoiled."""
    return Path(shutil.copytree(trained, tmp_path / "out"))


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


def _flipped(trained: Path, path: Path, places: list[tuple[int, int]]) -> dict[str, int]:
    """Loads the checkpoint with one bit flipped at a time; how often it was as before and how often refused."""
    content, whole = (trained / checkpoint.NAME).read_bytes(), checkpoint.load(trained / checkpoint.NAME)
    counts = {"same": 0, "refused": 0}
    complaints: set[str] = set()
    for position, bit in places:
        spoiled = bytearray(content)
        spoiled[position] ^= 1 << bit
        path.write_bytes(spoiled)
        try:
            found = checkpoint.load(path)
        except checkpoint.CheckpointError as error:
            counts["refused"] += 1
            complaints.add(str(error))
            continue
        assert _same(found, whole), f"altered by bit {bit} of byte {position}"
        counts["same"] += 1
    assert all(line.startswith(f"{path} ") and "\n" not in line for line in complaints)
    return counts


def _directory_of(path: Path) -> int:
    with zipfile.ZipFile(path) as archive:
        return archive.start_dir


def test_a_flipped_bit_never_alters_anything(trained: Path, tmp_path: Path) -> None:
    """Anywhere, and in the zip's directory, where marks have a meaning for torch that checksums know nothing of."""
    path = trained / checkpoint.NAME
    size, directory = path.stat().st_size, _directory_of(path)
    draw = random.Random(0)
    places = [(draw.randrange(size), draw.randrange(8)) for _ in range(300)]
    places += [(draw.randrange(directory, size), draw.randrange(8)) for _ in range(300)]
    with zipfile.ZipFile(path) as archive:
        weights = next(entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
    # names of weights and options
    places += [(draw.randrange(weights.header_offset, weights.header_offset + weights.file_size), draw.randrange(8))
               for _ in range(200)]  # fmt: skip
    # external attributes of each entry: "a directory", of which torch reads nothing
    content = path.read_bytes()
    entries = [i for i in range(directory, size - 4) if content[i : i + 4] == b"PK\x01\x02"]
    assert len(entries) > 20
    marks = _flipped(trained, tmp_path / "bad.pt", [(entry + 38, 4) for entry in entries])
    assert marks == {"same": 0, "refused": len(entries)}
    counts = _flipped(trained, tmp_path / "bad.pt", places)
    assert counts["refused"] > 500
    assert counts["same"] > 20, "padding"


@pytest.mark.extended("torch")
def test_a_flipped_bit_of_the_directory_never_alters_anything(trained: Path, tmp_path: Path) -> None:
    path = trained / checkpoint.NAME
    places = [(i, bit) for i in range(_directory_of(path), path.stat().st_size) for bit in range(8)]
    _flipped(trained, tmp_path / "bad.pt", places)


@pytest.mark.parametrize("attributes", (0o600 << 16, 0o100644 << 16 | 0x20, 0))
def test_a_file_that_a_tool_zipped_again(trained: Path, tmp_path: Path, attributes: int) -> None:
    """Python's own zipfile keeps permissions of each part, others say "archive", or add the directories."""
    path = trained / checkpoint.NAME
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "again.pt", "w") as again:
        directory = zipfile.ZipInfo("archive/")
        directory.external_attr = 0o40755 << 16 | checkpoint.DIRECTORY
        again.writestr(directory, b"")
        for name in archive.namelist():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = attributes
            again.writestr(entry, archive.read(name))
    assert _same(checkpoint.load(tmp_path / "again.pt"), checkpoint.load(path))


def test_a_file_without_checksums(trained: Path, tmp_path: Path) -> None:
    """Nobody can tell whether that is whole, nor is it said to be damaged."""
    state = checkpoint.load(trained / checkpoint.NAME)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "none.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(checkpoint.CheckpointError, match="written without checksums") as caught:
        checkpoint.load(tmp_path / "none.pt")
    assert "damaged" not in str(caught.value)


def test_a_flipped_name_of_a_weight_costs_an_epoch(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = out / checkpoint.NAME
    content = path.read_bytes()
    assert content.count(b"classifier.fc1.weight") == 1
    path.write_bytes(content.replace(b"classifier.fc1.weight", b"classifier.fc1.weighu"))
    assert _run(out, "--epochs", "3", "--resume") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(f"note: {path} cannot be read as a checkpoint: its part 'archive/data.pkl' is damaged")
    assert lines[3] == "goes on after epoch 1"
    assert checkpoint.load(path)["epoch"] == 3


def _set(*keys: Any, to: Any) -> Change:
    def change(state: dict[str, Any]) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = to

    return change


def _drop(*keys: Any) -> Change:
    def change(state: dict[str, Any]) -> None:
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return change


WEIGHT = "classifier.fc1.weight"


def _nan_weight(state: dict[str, Any]) -> None:
    state["model_state_dict"][WEIGHT][0, 0] = float("nan")


def _renamed(state: dict[str, Any]) -> None:
    state["model_state_dict"]["classifier.fc1.weighu"] = state["model_state_dict"].pop(WEIGHT)


# (the change, what the message must say); a whole file of the right checksums in each case
CHANGES: dict[str, tuple[Change, str]] = {
    "epoch x": (_set("epoch", to="x"), "is damaged: epoch must be a whole number, 0 or more, got 'x'"),
    "epoch below 0": (_set("epoch", to=-3), "epoch must be a whole number, 0 or more, got -3"),
    "epoch of the future": (_set("epoch", to=10**6), "history must be as many rows as epochs were done"),
    "epoch past all numbers": (_set("epoch", to=10**30), "epoch must be a whole number"),
    "epoch true": (_set("epoch", to=True), "epoch must be a whole number"),
    "batch x": (_set("batch", to="x"), "batch must be a whole number, 0 or more, got 'x'"),
    "batch below 0": (_set("batch", to=-5), "batch must be a whole number, 0 or more, got -5"),
    "batch too large": (_set("batch", to=99), "99 batches of an epoch done, there are 2 now"),
    "accuracy": (_set("val_acc", to="x"), "val_acc must be a number from 0 to 1"),
    "accuracy NaN": (_set("val_acc", to=float("nan")), "val_acc must be a number from 0 to 1"),
    "version": (_set("version", to="x"), "is a checkpoint of version x"),
    "version tensor": (_set("version", to=torch.zeros(2)), "is a checkpoint of version"),
    "network list": (_set("network", to=[]), "network must be a dictionary, got []"),
    "network empty": (_set("network", to={}), "network: kind must be one of mlp, cnn, attention"),
    "network kind": (_set("network", "kind", to=[]), "network: kind must be one of mlp, cnn, attention"),
    "weights None": (_set("model_state_dict", to=None), "model_state_dict must be a dictionary, got None"),
    "weights text": (_set("model_state_dict", WEIGHT, to="x"), f"model_state_dict: {WEIGHT} must be a tensor"),
    "weights missing": (_drop("model_state_dict", WEIGHT), f"model_state_dict lacks {WEIGHT}"),
    "weights renamed": (_renamed, f"model_state_dict lacks {WEIGHT}"),
    "weights shape": (_set("model_state_dict", WEIGHT, to=torch.zeros(3)), "must be of shape (64, 10)"),
    "weights more": (_set("model_state_dict", "x", to=torch.zeros(3)), "has what the network has not: x"),
    "weights NaN": (_nan_weight, f"has weights that are not finite ({WEIGHT}): the run had diverged"),
    "optimizer empty": (_set("optimizer_state_dict", to={}), "optimizer_state_dict: state must be a dictionary"),
    "optimizer None": (_set("optimizer_state_dict", to=None), "optimizer_state_dict must be a dictionary"),
    "optimizer more": (_set("optimizer_state_dict", "state", 6, to={}), "of the optimizer's 6 parameters, got [6]"),
    "optimizer names": (_set("optimizer_state_dict", "state", "x", to={}), "the optimizer's 6 parameters, got ['x']"),
    "optimizer text": (_set("optimizer_state_dict", "state", 0, "exp_avg", to="x"), "state[0]: exp_avg must be"),
    "optimizer key": (_drop("optimizer_state_dict", "state", 0, "exp_avg"), "must be of one kind"),
    "optimizer shape": (
        _set("optimizer_state_dict", "state", 0, "exp_avg", to=torch.zeros(7)), "or of shape (64, 10), got a tensor"),
    "schedule None": (_set("schedule_state_dict", to=None), "schedule_state_dict must be a dictionary"),
    "schedule step": (_set("schedule_state_dict", "step", to=None), "schedule_state_dict: step must be a whole"),
    "scaler": (_set("scaler_state_dict", to="x"), "scaler_state_dict must be a dictionary"),
    "scaler text": (_set("scaler_state_dict", to={"scale": "x"}), "scaler_state_dict: scale must be a number"),
    "processes None": (_set("processes", to=None), "processes must be a list, one for each process, got None"),
    "processes none": (_set("processes", to=[]), "processes must be a list"),
    "process": (_set("processes", 0, to="x"), "processes[0] must be a dictionary"),
    "totals": (_set("processes", 0, "loss", to=torch.zeros(2)), "processes[0]: loss must be a tensor of one number"),
    "images": (_set("processes", 0, "images", to=None), "processes[0]: images must be a whole number"),
    "rng none": (_set("processes", 0, "rng", to={}), "processes[0]: rng: cpu must be a state of torch's generator"),
    "rng short": (_set("processes", 0, "rng", "cpu", to=torch.zeros(9, dtype=torch.uint8)), "rng: cpu must be a state"),
    "rng of zeros": (
        _set("processes", 0, "rng", "cpu", to=torch.zeros(5056, dtype=torch.uint8)), "rng: cpu must be a state"),
    "history text": (_set("history", to=["a", "b"]), "history[0] must be epoch 1 and four numbers, got 'a'"),
    "history None": (_set("history", to=None), "history must be a list of rows, got None"),
    "history short": (_set("history", to=[]), "history must be as many rows as epochs were done, 2, got 0"),
    "settings list": (_set("settings", to=[]), "settings must be a dictionary, got []"),
    "settings number": (_set("settings", "lr", to=1), "settings: lr must be a text, got 1"),
    "no batch": (_drop("batch"), "cannot be gone on from: it lacks batch"),
    "no epoch": (_drop("epoch"), "is no checkpoint of this program: it lacks epoch"),
}  # fmt: skip


@pytest.mark.parametrize("name", ("Adam", "AdamW", "SGD"))
@pytest.mark.parametrize("frozen", (True, False))
def test_a_parameter_without_a_gradient_has_no_state(name: str, frozen: bool) -> None:
    """A layer that is frozen, or that the loss does not depend on."""
    parameters = [torch.nn.Parameter(torch.ones(3, i + 1)) for i in range(3)]
    parameters[1].requires_grad_(not frozen)
    options = {"lr": 0.1, **({"momentum": 0.9} if name == "SGD" else {})}
    optimizer = getattr(torch.optim, name)(parameters, **options)
    contents.check_optimizer(optimizer.state_dict(), optimizer)
    (parameters[0].sum() + parameters[2].sum()).backward()
    optimizer.step()
    state = optimizer.state_dict()
    assert sorted(state["state"]) == [0, 2]
    contents.check_optimizer(state, optimizer)


@pytest.mark.parametrize("name", CHANGES)
def test_contents_that_are_wrong(out: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """One line, and the one before is gone on from: as if nothing had been tried. Without one, status 2."""
    change, message = CHANGES[name]
    path, previous = out / checkpoint.NAME, out / checkpoint.PREVIOUS
    state = checkpoint.load(path)
    change(state)
    torch.save(state, path)
    assert _run(out, "--epochs", "2", "--resume") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(f"note: {path} "), lines
    assert message in lines[1]
    assert lines[1].endswith(f"going on from {previous}")
    assert lines[2] == "goes on after epoch 1"
    torch.save(state, path)
    previous.unlink()
    assert _run(out, "--resume") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m models.train: error: {path} ")
    assert message in line


def test_what_a_damaged_one_leaves_behind_changes_nothing(trained: Path, out: Path) -> None:
    """Taken half way, then the one before: the same bits as the unbroken run's."""
    state = checkpoint.load(out / checkpoint.NAME)
    for value in state["model_state_dict"].values():
        value.fill_(7)
    state["optimizer_state_dict"]["state"][0]["exp_avg"] = torch.zeros(7)
    torch.save(state, out / checkpoint.NAME)
    assert _run(out, "--epochs", "2", "--resume") == 0
    ours, theirs = (checkpoint.load(path / checkpoint.NAME) for path in (out, trained))
    for key in ("model_state_dict", "processes", "history", "optimizer_state_dict", "schedule_state_dict"):
        assert _same(ours[key], theirs[key]), key


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "directory"])
def test_what_is_no_file(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A FIFO would be waited for, for ever; the one before is gone on from, and a directory is refused at once."""
    path = out / checkpoint.NAME
    path.unlink()
    listening = socket.socket(socket.AF_UNIX)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(out)  # a socket's path may not be long
        listening.bind(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    status = _run(out, "--epochs", "3", "--resume")
    listening.close()
    said, complained = capsys.readouterr()
    if kind == "directory":
        assert status == 2
        assert complained.splitlines()[0].endswith(f"{path} is a directory, a checkpoint is to be written there")
    else:
        assert status == 0
        assert f"note: {path} cannot be read as a checkpoint: it is no regular file; going on from" in said
        assert checkpoint.load(path)["epoch"] == 3


def test_nobody_saves_weights_that_are_nan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to stop in the middle of an epoch that has diverged: the last good checkpoint stays the newest."""
    monkeypatch.setattr(train, "_report", lambda *args: None)
    assert _run(tmp_path, "--epochs", "1") == 0
    content = (tmp_path / checkpoint.NAME).read_bytes()

    def diverged(self: trainer.Trainer, request: Any) -> None:
        next(self.model.parameters()).data.fill_(float("nan"))
        self.save()

    monkeypatch.setattr(trainer.Trainer, "_stop_if_requested", diverged)
    assert _run(tmp_path, "--epochs", "2", "--resume") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"weights are no longer finite in epoch 2, after batch 1 of 2 ({WEIGHT}), which is not written" in line
    assert (tmp_path / checkpoint.NAME).read_bytes() == content


def test_rows_that_changed_since(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Between stop and resume. Checkpoints of before, which know no fingerprint, are gone on from."""
    table, out = tmp_path / "table.csv", tmp_path / "out"
    rows = [f"{i % 7},{i % 5},{'no' if i % 2 else 'yes'}" for i in range(60)]
    table.write_text("\n".join(["a,b,class", *rows]))
    arguments = ["--device", "cpu", "--data", f"csv:{table}", "--out", str(out)]
    assert train.main([*arguments, "--epochs", "1"]) == 0
    moved = table.rename(tmp_path / "moved.csv")
    assert train.main([*arguments, "--data", f"csv:{moved}", "--epochs", "2", "--resume"]) == 0, "the same rows"
    moved.write_text("\n".join(["a,b,class", *rows[1:], rows[0]]))
    capsys.readouterr()
    path = out / checkpoint.NAME
    before = path.read_bytes()
    assert train.main([*arguments, "--data", f"csv:{moved}", "--epochs", "3", "--resume"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path} is of another run: the rows of csv:{moved} were 459 bytes with digest " in line
    assert path.read_bytes() == before
    for name in (checkpoint.NAME, checkpoint.PREVIOUS):
        state = checkpoint.load(out / name)
        del state["settings"][trainer.FINGERPRINT]
        torch.save(state, out / name)
    assert train.main([*arguments, "--data", f"csv:{moved}", "--epochs", "3", "--resume"]) == 0


def _limited(out: Path, size: int) -> int:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return _run(out, "--epochs", "3", "--resume")


# at 9000 torch's writer has an error of its own to tell, which says nothing of a disk
@pytest.mark.parametrize("size", [2000, 9000, 20000])
def test_a_disk_that_is_full(out: Path, size: int) -> None:
    """One line that names the file; the checkpoints of before are whole, and nothing else is left."""
    before = {path.name: path.read_bytes() for path in out.glob("*.pt")}
    names = {path.name for path in out.iterdir()}
    assert processes.wait(processes.start(lambda: _limited(out, size), out, "run")) == 1
    (line,) = (out / "run.out").read_text().splitlines()[3:]
    assert line == f"python -m models.train: error: [Errno 27] File too large: '{out / checkpoint.NAME}'"
    assert {path.name: path.read_bytes() for path in out.glob("*.pt")} == before
    assert {path.name for path in out.iterdir()} - {"run.out", "run.result"} == names


def test_a_full_device_for_the_history(out: Path) -> None:
    (out / "other.csv").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"No space left on device: '{out / 'other.csv'}'"):
        history.History(out / "other.csv").start()
