"""Comparing sweeps: planted slowdowns are found, re-runs of the same code are not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from perf import schema
from perf.bench import compare
from tests.perf.command import refused, row, run, write

pytestmark = pytest.mark.gate("torch")

# sweeps of the same code on a CPU: two while it had little else to do, two while other processes used it too
DATA = Path(__file__).parent / "data"
RUNS = [DATA / f"{name}.csv" for name in ("quiet1", "quiet2", "busy1", "busy2")]
# pairs recorded on the same machine
PAIRS = [(a, b) for both in (RUNS[:2], RUNS[2:]) for a in both for b in both]
SLOWER = 1.2


def _changed(path: Path, to: Path, change: Callable[[pd.DataFrame], None]) -> Path:
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    change(frame)
    frame.to_csv(to, index=False)
    return to


def _slow_down(chosen: Callable[[pd.DataFrame], pd.Series]) -> Callable[[pd.DataFrame], None]:
    def change(frame: pd.DataFrame) -> None:
        rows = chosen(frame)
        for name in ("ms_p20", "ms_p50", "ms_p80"):
            frame.loc[rows, name] = (pd.to_numeric(frame.loc[rows, name]) * SLOWER).astype(str)

    return change


@pytest.mark.parametrize("old, new", PAIRS, ids=lambda path: path.stem)
def test_runs_of_the_same_code_are_not_worse(old: Path, new: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", old, new) == 0, capsys.readouterr().out


@pytest.mark.parametrize("old, new", PAIRS[:4], ids=lambda path: path.stem)
def test_a_planted_slowdown_of_ours_is_found(
    old: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = _changed(new, tmp_path / "slow.csv", _slow_down(lambda frame: frame.provider == "tkernels"))
    assert run("compare", old, slow) == 1
    shown = capsys.readouterr().out
    found = [line for line in shown.splitlines() if "slower by" in line]
    # of 24 rows; the others are within the noise of this machine
    assert len(found) >= 8, shown
    assert all(" tkernels " in line for line in found)
    if old == new:
        assert all("slower by 20%" in line for line in found)
        assert run("compare", old, slow, "--threshold", "25%") == 0
    assert run("compare", slow, old) == 0
    faster = re.search(r"0 worse, (\d+) faster by more than 5%", capsys.readouterr().out)
    assert faster is not None
    assert int(faster[1]) >= 8


@pytest.mark.parametrize("path", RUNS[2:], ids=lambda path: path.stem)
def test_a_slowdown_is_found_on_a_busy_machine(path: Path, tmp_path: Path) -> None:
    slow = _changed(path, tmp_path / "slow.csv", _slow_down(lambda frame: frame.provider == "tkernels"))
    assert run("compare", path, slow) == 1


@pytest.mark.parametrize("path", RUNS[:1], ids=lambda path: path.stem)
def test_a_slowdown_of_everything_is_found(path: Path, tmp_path: Path) -> None:
    def everything(frame: pd.DataFrame) -> None:
        # without the noise of the machine it was recorded on
        for name in ("ms_p20", "ms_p80"):
            frame[name] = frame.ms_p50

    old = _changed(path, tmp_path / "old.csv", everything)
    slow = _changed(old, tmp_path / "slow.csv", _slow_down(lambda frame: frame.provider != ""))
    assert run("compare", old, slow) == 1


def test_bands_that_overlap_are_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write(tmp_path / "old.csv", row(ms_p20=0.8, ms_p50=1.0, ms_p80=1.3))
    assert run("compare", old, write(tmp_path / "a.csv", row(ms_p20=1.2, ms_p50=1.4, ms_p80=1.5))) == 0
    assert run("compare", old, write(tmp_path / "b.csv", row(ms_p20=1.35, ms_p50=1.4, ms_p80=1.5))) == 1
    assert "slower by 40%" in capsys.readouterr().out


def test_what_the_machine_did_to_pytorch_is_divided_out(tmp_path: Path) -> None:
    def pair(name: str, torchs: float, ours: float) -> Path:
        sides = (("torch", torchs), ("tkernels", ours))
        rows = [row(device="cpu: x", provider=p, ms_p20=0.99 * t, ms_p50=t, ms_p80=1.01 * t) for p, t in sides]
        return write(
            tmp_path / name,
            *rows,
            row(device="cpu: x", provider="torch", N=2),
            row(device="cpu: x", provider="torch", N=3),
        )

    old = pair("old.csv", 1.0, 2.0)
    assert run("compare", old, pair("busy.csv", 1.5, 3.0)) == 0
    assert run("compare", old, pair("busy.csv2", 1.5, 3.0), "--absolute") == 1
    assert run("compare", old, pair("worse.csv", 1.5, 3.8)) == 1


def test_on_a_gpu_pytorch_is_no_yardstick(tmp_path: Path) -> None:
    slow = {"ms_p20": 1.49, "ms_p50": 1.5, "ms_p80": 1.51}
    old = write(tmp_path / "old.csv", row(provider="torch"), row())
    assert run("compare", old, write(tmp_path / "new.csv", row(provider="torch", **slow), row(**slow))) == 1


@pytest.mark.parametrize(
    "change, verdict",
    (
        ({"status": "wrong: off by 1", "ms_p20": None, "ms_p50": None, "ms_p80": None}, "was ok, now wrong: off by 1"),
        ({"err_fp64": 2e-3}, "error 1.0e-03 -> 2.0e-03"),
        ({"err_fp64": 2e-3, "torch_err_fp64": 3e-3}, ""),
        ({"err_fp64": 1.1e-3}, ""),
    ),
)
def test_broken_and_less_exact(tmp_path: Path, change: dict[str, object], verdict: str) -> None:
    old, new = write(tmp_path / "old.csv", row()), write(tmp_path / "new.csv", row(**change))
    both = compare.match(schema.read(old), schema.read(new))
    assert list(compare.judge(both, 0.05).verdict) == [verdict]
    assert run("compare", old, new) == (1 if verdict else 0)


def test_of_a_repeated_measurement_the_last_counts(tmp_path: Path) -> None:
    slow = {"ms_p20": 1.49, "ms_p50": 1.5, "ms_p80": 1.51}
    old = write(tmp_path / "old.csv", row())
    assert run("compare", old, write(tmp_path / "a.csv", row(**slow), row())) == 0
    assert run("compare", old, write(tmp_path / "b.csv", row(), row(**slow))) == 1


def test_bad_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write(tmp_path / "old.csv", row())
    other = write(tmp_path / "other.csv", row(operator="linear"))
    (tmp_path / "text.csv").write_text("hello\nworld\n")
    assert "no measurement in common" in refused(capsys, "compare", old, other)
    assert "lacks the columns" in refused(capsys, "compare", old, tmp_path / "text.csv")
    assert "does not exist" in refused(capsys, "compare", old, tmp_path / "none.csv")
    assert "must be a percentage such as 5%" in refused(capsys, "compare", old, old, "--threshold", "fast")
    assert "must be a percentage" in refused(capsys, "compare", old, old, "--threshold=-5")
