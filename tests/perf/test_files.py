"""Files of the commands: one writer at a time, a full disk in one line, no cell that a spreadsheet would execute."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import pandas as pd
import pytest

from models import lock
from perf import options, schema
from perf.options import Refused
from tests.models import processes
from tests.perf.command import refused, row, run, write

pytestmark = pytest.mark.gate("torch")

FORMULAS = (
    "=1+1",
    "+1+1",
    "-1+1",
    "@SUM(A1)",
    "\t=1+1",
    "  =1+1",
    "=cmd|' /C calc'!A0",
    "\uff1d1+1",
    "'=1+1",
    "''=1+1",
)
PLAIN = ("", "ok", "'quoted'", "it's = 1", "-1", "+2.5", "-1e-3", "-inf", "a-b", "1 = 2", "''")


@pytest.mark.parametrize("text", [*FORMULAS, *PLAIN])
def test_text_is_no_formula_and_comes_back(tmp_path: Path, text: str) -> None:
    """By both ways that the project writes a CSV."""
    appended = write(tmp_path / "a.csv", row(status=text, provider=text))
    schema.write(pd.DataFrame([vars(row(status=text, provider=text))]), tmp_path / "b.csv")
    for path in (appended, tmp_path / "b.csv"):
        raw = pd.read_csv(path, dtype=str, keep_default_na=False).status[0]
        assert (raw[:1] == "'") if text in FORMULAS else (raw == text), raw
        found = schema.table(path)
        assert (found.status[0], found.provider[0]) == (text, text)
    assert appended.read_text() == (tmp_path / "b.csv").read_text()


def test_numbers_stay_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", row(ms_p50=-1.5, err_fp64=-float("inf"), N=-3))
    line = path.read_text().splitlines()[1]
    assert "'" not in line
    read = schema.read(path).iloc[0]
    assert (read.ms_p50, read.err_fp64, read.N) == (-1.5, -float("inf"), -3)


def test_text_that_is_no_unicode(tmp_path: Path) -> None:
    assert schema.table(write(tmp_path / "a.csv", row(status="bad \udc80 name"))).status[0] == "bad \\udc80 name"


SWEEP = ("sweep", "--op", "linear", "--mode", "fwd", "--device", "cpu", "--provider", "torch", "--quick", "--shapes",
         "N=8 C=8 K=8")  # fmt: skip


def test_two_sweeps_into_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second is refused while the first lives; perf model, whose rows go there too, as well."""
    path = write(tmp_path / "out.csv", row())

    def body() -> None:
        with options.alone(path):
            (tmp_path / "holds").touch()
            time.sleep(processes.SECONDS)

    pid = processes.start(body, tmp_path, "first")
    while not (tmp_path / "holds").exists():
        time.sleep(0.01)
    before = path.read_bytes()
    for command in ((*SWEEP, "--resume"), SWEEP, ("model", "torch.nn:Identity")):
        assert f"another process ({pid} on " in refused(capsys, *command, "--csv", path)
    assert path.read_bytes() == before
    os.kill(pid, signal.SIGKILL)
    processes.wait(pid)
    assert run(*SWEEP, "--csv", path, "--resume") == 0
    assert len(schema.read(path)) == 2
    assert run(*SWEEP, "--csv", path, "--resume") == 0
    assert len(schema.read(path)) == 2
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("command", [SWEEP, ("model", "torch.nn:Identity")])
def test_what_rows_cannot_be_added_to(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: tuple[str]) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in ("/dev/full", tmp_path / "fifo"):
        assert f"{path} is no regular file" in refused(capsys, *command, "--csv", path)
    assert "File name too long" in refused(capsys, *command, "--csv", tmp_path / ("x" * 300))
    assert "File name too long" in refused(capsys, *command, "--csv", tmp_path / ("x" * 300) / "a.csv")


def test_a_full_disk(tmp_path: Path) -> None:
    """A row that does not fit is taken back as a whole, and what replaces a file says which one it was."""
    path = write(tmp_path / "a.csv", *[row(N=n, device="cpu") for n in range(300)])
    size = path.stat().st_size

    def body() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, size + 20))
        with pytest.raises(OSError, match=rf"File too large: '{path}'"):
            write(path, row())
        return run(*SWEEP, "--csv", path, "--resume")

    assert processes.wait(processes.start(body, tmp_path, "child")) == 2, (tmp_path / "child.out").read_text()
    lines = (tmp_path / "child.out").read_text().splitlines()
    assert lines[-1] == f"python -m perf sweep: error: [Errno 27] File too large: '{path}'"
    assert not any("Traceback" in line for line in lines)
    assert path.stat().st_size == size
    (tmp_path / "full.csv").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 'full.csv'}'"):
        schema.write(pd.DataFrame([vars(row())]), tmp_path / "full.csv")


def test_alone_is_the_lock_of_runs(tmp_path: Path) -> None:
    with options.alone(tmp_path / "a.csv"), pytest.raises(Refused):
        options.alone(tmp_path / "a.csv").__enter__()
    with lock.held(tmp_path / ".a.csv.lock", "", print), pytest.raises(Refused):
        options.alone(tmp_path / "a.csv").__enter__()
