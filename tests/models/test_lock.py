"""One writer at a time, and no lock outlives the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from models import checkpoint, lock, train
from tests.models import processes

pytestmark = [pytest.mark.gate("torch"), pytest.mark.usefixtures("no_pictures")]


def _nothing(text: str) -> None:
    raise AssertionError(text)


def _wait_for(path: Path) -> None:
    end = time.monotonic() + processes.SECONDS
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def _holder(directory: Path) -> int:
    """A child that holds the lock until it is killed."""

    def body() -> None:
        with lock.held(directory / ".lock", "to there", _nothing):
            (directory / "holds").touch()
            time.sleep(processes.SECONDS)

    (directory / "holds").unlink(missing_ok=True)
    pid = processes.start(body, directory, "holder")
    _wait_for(directory / "holds")
    return pid


def test_the_second_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    pid = _holder(tmp_path)
    for _ in range(2):
        with pytest.raises(lock.Busy, match=rf"another process \({pid} on .*\) is writing to there"):
            lock.held(path, "to there", _nothing).__enter__()
    os.kill(pid, signal.SIGKILL)
    assert processes.wait(pid) == -signal.SIGKILL
    assert path.exists(), "what a killed one leaves"
    with lock.held(path, "to there", _nothing) as held:
        assert held
        with pytest.raises(lock.Busy), lock.held(path, "to there", _nothing):  # in the same process too
            pass
        assert path.exists()
    assert not path.exists()
    with lock.held(path, "to there", _nothing):
        pass


def test_a_child_keeps_no_lock(tmp_path: Path) -> None:
    """A process that was forked meanwhile, as loaders' workers are, neither keeps the lock nor takes the file away."""
    path = tmp_path / ".lock"
    with lock.held(path, "to there", _nothing):
        child = os.fork()
        if child == 0:
            time.sleep(processes.SECONDS)
            os._exit(0)
        with pytest.raises(lock.Busy):
            lock.held(path, "to there", _nothing).__enter__()
    try:
        with lock.held(path, "to there", _nothing):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    holding = lock.held(path, "to there", _nothing)
    with holding:
        child = os.fork()
        if child == 0:
            holding.__exit__(None, None, None)
            os._exit(0)
        assert processes.wait(child) == 0
        assert path.exists()
        with pytest.raises(lock.Busy):
            lock.held(path, "to there", _nothing).__enter__()


def test_one_of_many_at_a_time(tmp_path: Path) -> None:
    """Six processes take and leave it as fast as they can, and one at a time has it: the file is removed each time."""

    def body() -> int:
        had = 0
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            with contextlib.suppress(lock.Busy), lock.held(tmp_path / ".lock", "to there", _nothing):
                alone = os.open(tmp_path / "alone", os.O_CREAT | os.O_EXCL)
                os.close(alone)
                os.unlink(tmp_path / "alone")
                had = 1
        return 10 + had

    children = [processes.start(body, tmp_path, f"child{i}") for i in range(6)]
    statuses = {processes.wait(pid) for pid in children}
    assert 11 in statuses and statuses <= {10, 11}, (tmp_path / "child0.out").read_text()  # noqa: PT018


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def none(descriptor: int) -> None:
        raise OSError(number, "no locks here")

    monkeypatch.setattr(lock, "_lock", none)
    told: list[str] = []
    with lock.held(tmp_path / ".lock", "to there", told.append) as held:
        assert not held
    (line,) = told
    assert "has no locks" in line


ARGUMENTS = ["--device", "cpu", "--data", "synthetic", "--epochs", "1"]
STALE = (".checkpoint.pt.123.tmp", ".checkpoint.pt.99999.old")


def _run(out: Path, *arguments: str) -> int:
    return train.main([*ARGUMENTS, "--out", str(out), *arguments])


def test_a_second_run_in_one_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And touches nothing, what the first is writing least of all; killed, the first keeps nobody out, and what it and
    others left is cleared away."""
    assert _run(tmp_path) == 0
    for name in STALE:
        (tmp_path / name).touch()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    pid = _holder(tmp_path)
    capsys.readouterr()
    for arguments in ([], ["--resume"], ["--seed", "3"]):
        assert _run(tmp_path, *arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"python -m models.train: error: another process ({pid} on "), line
        assert line.endswith(f"is writing to {tmp_path}: wait for it, stop it, or write elsewhere")
    assert {path: path.read_bytes() for path in before} == before
    os.kill(pid, signal.SIGKILL)
    processes.wait(pid)
    assert _run(tmp_path, "--resume", "--epochs", "2") == 0
    assert checkpoint.load(tmp_path / checkpoint.NAME)["epoch"] == 2
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint.pt", "checkpoint.previous.pt", "history.csv", "holds", "holder.out"}


def test_the_processes_of_a_job_share_one_run(tmp_path: Path) -> None:
    """A second job beside it is refused as a whole, in one line."""
    out = tmp_path / "out"
    out.mkdir()
    pid = _holder(out)
    (tmp_path / "busy").mkdir()

    def body(rank: int) -> Any:
        return _run(out)

    children = processes.start_job(2, body, tmp_path / "busy")
    assert [processes.wait(child) for child in children] == [2, 2]
    printed = "".join((tmp_path / "busy" / f"rank{rank}.out").read_text() for rank in range(2))
    assert printed.count("error") == 1
    assert f"another process ({pid} on " in printed
    os.kill(pid, signal.SIGKILL)
    processes.wait(pid)
    (tmp_path / "free").mkdir()
    children = processes.start_job(2, body, tmp_path / "free")
    assert [processes.wait(child) for child in children] == [0, 0], (tmp_path / "free" / "rank0.out").read_text()
    assert not (out / ".lock").exists()


@pytest.mark.parametrize("name", ["history.csv", "curves.png", "confusion.png"])
def test_results_that_would_go_into_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert _run(tmp_path) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / name} is no regular file" in line
