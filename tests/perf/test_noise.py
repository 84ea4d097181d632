"""What is said of measurements on a busy machine, and that a speed-up is one number wherever it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from perf import operators, providers, schema, shapes
from perf.bench import compare, machine, measure, noise, plot, ratios, rows, sweep
from perf.bench.gpu import summary
from perf.bench.gpu.results import Results
from perf.bench.measure import Effort, Problem, Sample
from perf.bench.model import command
from perf.bench.model.comparison import ModelMeasurement, Task
from perf.bench.noise import Quartiles
from perf.schema import Measurement
from tests.perf.command import row, run, write

pytestmark = pytest.mark.gate("torch")


@pytest.mark.parametrize(
    "low, high, waited, mark",
    ((0.95, 1.049, 0.0, ""), (0.95, 1.051, 0.0, "!"), (0.9, 1.149, 0.0, "!"), (0.9, 1.151, 0.0, "!!"),
     (1.0, 1.0, 0.09, ""), (1.0, 1.0, 0.1, "!"), (1.0, 1.0, 0.25, "!!"), (None, None, 0.0, "")),
)  # fmt: skip
def test_a_mark_is_of_the_quartiles_and_of_waiting(low: Any, high: Any, waited: float, mark: str) -> None:
    assert Quartiles(low, 1.0, high, waited).mark == mark
    spread = "" if low is None else f" ({low:.2f} to {high:.2f})"
    assert Quartiles(low, 1.0, high, waited).shown(".2f") == f"1.00{spread} {mark}".rstrip()


def _taken(**samples: list[Sample]) -> dict[str, Measurement]:
    """Rows of turns that went as given, by provider."""
    turn: dict[str, Callable[[], Sample]] = {name: iter(taken).__next__ for name, taken in samples.items()}
    count = len(next(iter(samples.values())))
    found = measure.turns(turn, Effort(1.0, count), 1.0, providers.OURS, dict.fromkeys(turn, providers.BASELINE))
    given = {"device": "cpu: X", "operator": "linear", "mode": "fwd", "dtype": "fp32", "N": 8, "status": "ok"}
    return {name: Measurement(**given, provider=name, timing="wall", **each.columns()) for name, each in found.items()}


def _samples(*ms: float, **given: Any) -> list[Sample]:
    return [Sample(each, True, **given) for each in ms]


def test_a_round_that_is_slow_for_all_scatters_the_times_alone(capsys: pytest.CaptureFixture[str]) -> None:
    pattern = [1.0, 1.0, 4.0, 4.0, 2.0] * 4
    found = _taken(torch=_samples(*(2 * ms for ms in pattern)), tkernels=_samples(*pattern))
    ours = found["tkernels"]
    assert ours.noise == "very noisy: quartiles apart by 150% (times) of the median"
    assert (ours.speedup_p25, ours.speedup_vs_torch, ours.speedup_p75) == (2.0, 2.0, 2.0)
    sweep.summary(schema.frame_of(Measurement, found.values()))
    shown = capsys.readouterr().out
    assert re.search(r"tkernels +wall +2 \(1 to 4\) !! +2\.00 \(2\.00 to 2\.00\) +ok", shown), shown
    assert "! noisy, !! very noisy: quartiles at least 10% (25%) of the median apart" in shown
    assert "2 of 2 rows" in shown


def test_a_provider_that_scatters_by_itself_has_an_unsure_speed_up() -> None:
    found = _taken(torch=_samples(*[2.0] * 20), tkernels=_samples(*[1.0, 1.0, 1.15, 1.15] * 5))
    assert found["tkernels"].noise == "noisy: quartiles apart by 14% (times), 14% (speed-up) of the median"
    assert found["torch"].noise == ""


def test_times_without_a_cpu_are_noisy_however_steady() -> None:
    """A thread that waits for its core makes each call one slice of the scheduler's long."""
    found = _taken(torch=_samples(*[8.0] * 9, waited=0.9), tkernels=_samples(*[8.0] * 9, waited=0.12))
    assert found["torch"].noise == "very noisy: a thread waited for a CPU 90% of the time"
    assert found["tkernels"].noise == "noisy: a thread waited for a CPU 12% of the time"
    assert noise.speedup(vars(found["tkernels"])).shown(".2f") == "1.00 (1.00 to 1.00) !"


def test_few_rounds_cannot_tell() -> None:
    found = _taken(tkernels=_samples(1.0, 1.0, 1.0))
    assert found["tkernels"].noise == "unknown: 3 rounds, too few for quartiles"


def _spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not tell who waits for a CPU")
def test_waiting_for_a_cpu_is_seen() -> None:
    """Two processes that are to share a core."""
    before = os.sched_getaffinity(0)
    core = {min(before)}
    spins = f"import os\nos.sched_setaffinity(0, {core})\nprint(flush=True)\nwhile True: pass"
    other = subprocess.Popen([sys.executable, "-c", spins], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        os.sched_setaffinity(0, core)
        taken = measure.sample(lambda: _spin(0.3), 1)
    finally:
        os.sched_setaffinity(0, before)
        other.kill()
        other.communicate()
    assert 0.2 < taken.waited < 1


def test_the_thread_that_waited_longest_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "THREADS", str(tmp_path))
    assert noise.waiting() == {}
    for thread, waited in (("1", 5), ("2", 7)):
        (tmp_path / thread).mkdir()
        (tmp_path / thread / "schedstat").write_text(f"100 {waited}000000 3\n")
    (tmp_path / "3").mkdir()  # one that ended meanwhile
    assert noise.waiting() == {"1": 5_000_000, "2": 7_000_000}
    assert noise.waited_ms({"1": 1_000_000, "2": 5_000_000}, noise.waiting()) == 4.0
    assert noise.waited_ms({}, {}) == 0.0


def test_noisy_rows_are_known_in_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = {"ms_p20": 1.9, "ms_p50": 2.0, "ms_p80": 2.1}
    old = write(tmp_path / "old.csv", row(), row(N=2, noise="noisy: x"), row(N=3))
    new = write(tmp_path / "new.csv", row(**slow, noise="very noisy: y"), row(N=2, noise="noisy: z", **slow), row(N=3))
    verdicts = compare.judge(compare.match(schema.read(old), schema.read(new)), 0.05)
    assert list(verdicts.noisy) == ["new", "old new", ""]
    assert run("compare", old, new) == 1
    shown = capsys.readouterr().out
    assert re.search(r"\bold new +slower by 100%", shown)
    assert "2 noisy in one of them or both" in shown


@pytest.mark.parametrize(
    "gbps, tflops, moved, found",
    (
        (1e9, 1e9, 100, ""),
        (1.0, 1e9, 2_000_000, "cache: the operands fit into it: 2 MB, the last-level cache 4 MB"),
        (1.0, 1e9, 8_000_000, "unexplained: operands of 8 MB, the last-level cache 4 MB; a busy machine"),
        (1e9, 1e-6, 2_000_000, "unexplained: more operations than at the peak rate; a busy machine"),
    ),
)
def test_a_roofline_above_100_is_explained_or_marked(
    gbps: float, tflops: float, moved: int, found: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    linear = operators.get("linear")
    monkeypatch.setattr(machine, "peaks", lambda *given: (tflops, gbps))
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 4_000_000)
    monkeypatch.setattr(linear, "work", lambda *given: (moved, 1000))
    problem = Problem(linear, shapes.linear(8, 8, 8), torch.float32, "", "cpu")
    rates = measure.rates(problem, "fwd", measure.Timing(measure.percentiles([1e-3])))
    assert (rates["roofline_pct"] > 100) == bool(found)
    assert rates["above_roofline"].startswith(found)
    assert bool(rates["above_roofline"]) == bool(found)
    sweep.summary(schema.frame_of(Measurement, [row(**rates)]))
    shown = capsys.readouterr().out
    assert (f"{rates['roofline_pct']:.0f} *" in shown) == bool(found)
    assert ("* above 100% of the roofline: 1 " + found.partition(":")[0] in shown) == bool(found)


def test_a_cpus_cache_is_looked_up() -> None:
    told = list(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    found = machine.cache_bytes("cpu")
    assert (found >= 1 << 15) if told else found == 0


def test_failed_rows_alone_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    sweep.summary(
        schema.frame_of(Measurement, [Measurement(operator="linear", mode="fwd", status="crashed: signal 6")])
    )
    assert "crashed: signal 6" in capsys.readouterr().out


def _numbers(pattern: str, text: str) -> list[str]:
    return re.findall(pattern, text, re.MULTILINE)


def test_a_speed_up_is_one_number_in_table_csv_plot_and_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that the medians would give otherwise: 3 / 2 of the medians, 2 of the rounds."""
    torchs, ours = [3.0, 1.0, 4.0, 2.0, 6.0], [1.5, 1.0, 2.0, 3.0, 2.0]
    found = _taken(torch=_samples(*torchs), tkernels=_samples(*ours))
    path = write(tmp_path / "a.csv", *(each.having(bytes=1e6, flops=0.0) for each in found.values()))
    frame = schema.read(path)
    assert list(frame.ms_p50) == [3.0, 2.0]
    assert list(frame.speedup_vs_torch) == [1.0, 2.0]
    assert list(frame.ratio_p50) == [2.0, 1.0]
    sweep.summary(frame)
    shown = capsys.readouterr().out
    assert _numbers(r"tkernels +wall .*?\) !!? +(\S+) \(", shown) == ["2.00"]
    assert _numbers(r"^\| (?:linear fwd|all) +\| 1 +\| (\S+) +\| (\S+)", shown) == [("2.00", "2.00")] * 2
    latency = next(figure for _, figure in plot.drawn(path))
    bar = latency.axes[1].containers[-1].patches[0]
    assert bar.get_height() == 2.0
    assert [text.get_text() for text in latency.axes[1].texts if text.get_text() not in ("", "!", "!!")] == ["2.00"]


def test_a_speed_up_is_one_number_in_what_perf_gpu_finds(tmp_path: Path) -> None:
    """On a CPU of the rounds, on a GPU of the medians; against another rival than PyTorch of the two speed-ups."""
    for folder, given in (("cpu", {"torch": 1.0, "tkernels": 2.0}), ("gpu", {})):
        (tmp_path / folder).mkdir()
        results = Results(tmp_path / folder, providers.OURS)
        for n, last in ((1, "torch"), (2, "torch flash")):
            for name, ms in (("torch", 3.0), ("tkernels", 2.0), ("torch flash", 1.0 if last == "torch flash" else 9.0)):
                results.take("products", "timing", row(N=n, provider=name, ms_p50=ms, speedup_vs_torch=given.get(name)))
        results.close()
        frame = schema.read(tmp_path / folder / "timings.csv").set_index(["N", "provider"]).speedup_vs_torch
        speeds = {speed.rival: speed.ratio for speed in summary.speeds(results)}
        assert speeds["torch"] == frame[1, "tkernels"] == given.get("tkernels", 1.5)
        assert speeds["torch flash"] == pytest.approx(frame[2, "tkernels"] / frame[2, "torch flash"])
        assert f"| torch | {frame[1, 'tkernels']:.3g} |" in summary.screen(results, 1, 1)


def test_a_speed_up_is_one_number_of_perf_model(tmp_path: Path) -> None:
    tasks = [Task(name, 4, 8, "fp32", "train", True, "cpu", None) for name in ("one", "two")]
    torchs, ours = [3.0, 1.0, 4.0, 2.0, 6.0], [1.5, 1.0, 2.0, 3.0, 2.0]
    found = _taken(torch=_samples(*torchs), tkernels=_samples(*ours))
    written = schema.Writer(tmp_path / "a.csv", ModelMeasurement)
    for task in tasks:
        columns = {name: task.columns() | {"provider": name, "noise": each.noise} for name, each in found.items()}
        timed = {name: {key: value for key, value in vars(each).items() if key.startswith(("ms_", "speedup", "rounds"))}
                 for name, each in found.items()}  # fmt: skip
        made = [ModelMeasurement(**columns[name], **timed[name], status="ok") for name in found]
        for each in made:
            written.append(each)
        shown = command.shown(task, made)
        assert "| tkernels | 2 (1.5 to 2) !! | 2.000 (1.000 to 2.000) !! |" in shown, shown
        assert "tkernels: very noisy: quartiles apart by 25% (times), 50% (speed-up) of the median" in shown
    written.close()
    frame = command.read(tmp_path / "a.csv")
    assert set(frame[frame.provider == "tkernels"].speedup_vs_torch) == {2.0}
    last = [cell.strip() for cell in command.summary(frame).splitlines()[-1].split("|")[1:-1]]
    assert last[:3] + last[4:5] + last[-1:] == ["training step, fp32", "2", "2.000", "2.000", "2"]


def test_a_speed_up_without_rounds_is_of_the_medians_and_one_of_rounds_is_left() -> None:
    speedups = rows.Speedups()
    torchs = speedups.filled(row(provider="torch", ms_p50=3.0, speedup_vs_torch=None))
    assert torchs.speedup_vs_torch == 1.0
    assert speedups.filled(row(ms_p50=2.0, speedup_vs_torch=None)).speedup_vs_torch == 1.5
    assert speedups.filled(row(ms_p50=2.0, speedup_vs_torch=1.7)).speedup_vs_torch == 1.7
    assert ratios.operators_table(schema.frame_of(Measurement, [torchs])) == ""
