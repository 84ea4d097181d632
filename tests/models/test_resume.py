"""Never lose work: killed, told to stop or interrupted at any moment, a run that is resumed ends with the same bits."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from models import checkpoint, train, trainer
from tests.models import processes

pytestmark = [pytest.mark.gate("torch"), pytest.mark.usefixtures("no_pictures")]

# every kind of state: dropout, augmentation, momentum, a learning rate that changes, parts of steps, a scaled loss
ARGUMENTS = shlex.split(
    "--device cpu --data digits --width 4 --image-size 8 --batch-size 96 --epochs 4 --flip --rotate 10 "
    "--optimizer sgd --warmup 0.3 --accumulate 2 --amp fp16"
)


def _run(out: Path, *arguments: str) -> int:
    return train.main([*ARGUMENTS, "--out", str(out), *arguments])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nothing disturbed, and the seconds it took."""
    out = tmp_path_factory.mktemp("unbroken")
    # children inherit what is imported: their time goes into training
    assert _run(tmp_path_factory.mktemp("first"), "--epochs", "1") == 0
    start = time.monotonic()
    assert processes.wait(processes.start(lambda: _run(out), out, "run")) == 0
    return out, time.monotonic() - start


def _assert_same(out: Path, unbroken: Path) -> None:
    ours, theirs = (checkpoint.load(path / checkpoint.NAME) for path in (out, unbroken))
    for key in ("model_state_dict", "optimizer_state_dict", "schedule_state_dict", "scaler_state_dict", "processes"):
        _assert_equal(ours[key], theirs[key], key)
    assert (out / "history.csv").read_bytes() == (unbroken / "history.csv").read_bytes()


def _assert_equal(ours: Any, theirs: Any, where: str) -> None:
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in ours.items():
            _assert_equal(value, theirs[key], f"{where}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, (one, other) in enumerate(zip(ours, theirs)):
            _assert_equal(one, other, f"{where}[{i}]")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def _killed_and_resumed(seed: int, unbroken: tuple[Path, float], directory: Path) -> int:
    """SIGKILL at up to four random moments; how many of them came before the end."""
    finished, seconds = unbroken
    moments = random.Random(seed)
    out, kills = directory / "out", 0
    for attempt in range(20):
        resume = ["--resume"] if (out / checkpoint.NAME).exists() else []
        pid = processes.start(lambda resume=resume: _run(out, *resume), directory, "run")
        if attempt < 4 or kills == 0:
            time.sleep(moments.uniform(0.05, 0.5) * seconds)
            os.kill(pid, signal.SIGKILL)
        status = processes.wait(pid)
        if status == 0 and kills > 0:
            break
        if status == 0:  # faster than the unbroken run, which the machine was busier in, or which compiled
            shutil.rmtree(out)
            seconds /= 2
            continue
        assert status == -signal.SIGKILL, (directory / "run.out").read_text()
        kills += 1
    _assert_same(out, finished)
    return kills


def test_killed_at_random_moments(unbroken: tuple[Path, float], tmp_path: Path) -> None:
    assert _killed_and_resumed(0, unbroken, tmp_path) > 0


@pytest.mark.extended("torch")
@pytest.mark.parametrize("seed", range(1, 11))
def test_killed_at_random_moments_ten_times(seed: int, unbroken: tuple[Path, float], tmp_path: Path) -> None:
    assert _killed_and_resumed(seed, unbroken, tmp_path) > 0


@pytest.mark.parametrize("signum, batch", [(signal.SIGTERM, 3), (signal.SIGINT, 8), (signal.SIGTERM, 15)])
def test_told_to_stop(
    signum: signal.Signals,
    batch: int,
    unbroken: tuple[Path, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The step at hand is finished, the checkpoint written in the middle of the epoch (15 batches, 2 a step)."""
    done = 0
    original = trainer.engine.TrainingStep.__call__

    def step(*args: Any) -> Any:
        nonlocal done
        done += 1
        if done == batch:
            os.kill(os.getpid(), signum)
        return original(*args)

    monkeypatch.setattr(trainer.engine.TrainingStep, "__call__", step)
    assert _run(tmp_path) == 128 + signum
    where = f"in epoch 1, after batch {min(batch + batch % 2, 15)} of 15"
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"python -m models.train: error: stopped by {signum.name} {where}; {tmp_path / 'checkpoint.pt'} is written, "
        "--resume goes on from there"
    )
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert _run(tmp_path, "--resume") == 0
    assert f"goes on {where}" in capsys.readouterr().out
    _assert_same(tmp_path, unbroken[0])


def test_a_bad_newest_checkpoint_costs_an_epoch(
    unbroken: tuple[Path, float], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, saved = checkpoint.save, []

    def save(path: Path, state: Any) -> None:
        original(path, state)
        saved.append(path)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save)
    assert _run(tmp_path) == 130
    monkeypatch.undo()
    path = tmp_path / checkpoint.NAME
    path.write_bytes(path.read_bytes()[:-1000])
    capsys.readouterr()
    monkeypatch.setattr(train, "_report", lambda *args: None)
    assert _run(tmp_path, "--resume") == 0
    # (a CPU without float16 instructions is told of too)
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("note: --amp")]
    assert lines[1].startswith(f"note: {path} cannot be read as a checkpoint: ")
    assert lines[1].endswith(f"; going on from {tmp_path / checkpoint.PREVIOUS}")
    assert lines[2] == "goes on after epoch 2"
    _assert_same(tmp_path, unbroken[0])


def test_what_cannot_be_resumed(
    unbroken: tuple[Path, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = str(unbroken[0])
    assert train.main(["--resume", "--out", str(tmp_path)]) == 2
    assert f"there is no checkpoint in {tmp_path}" in capsys.readouterr().err
    for change, reason in (
        (["--width", "5"], "is of another run: width 4 instead of 5"),
        (["--optimizer", "adam"], "is of another run: --optimizer sgd instead of adam"),
        (["--data", "synthetic"], "is of another run: classes"),
    ):
        assert train.main([*ARGUMENTS, "--out", finished, "--resume", *change]) == 2, change
        (line,) = capsys.readouterr().err.splitlines()
        assert reason in line
    # longer, and with another learning rate: allowed, and said
    assert _run(unbroken[0], "--resume", "--epochs", "4", "--lr", "0.01") == 0
    assert "note: --lr was 0.001 so far and is 0.01 from here on" in capsys.readouterr().out


def test_a_second_signal_acts_at_once() -> None:
    from models.interrupt import StopRequest

    # a suite in a shell's background is started with the signal ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGINT)
            assert request.requested() == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                _interrupt_this_process()
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt_this_process() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)
