"""The run of everything: its path on a CPU, its time limits, and what it does when a part fails."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from perf import gpu, operators, providers, report, schema
from perf.gpu import Part
from tests.perf.command import environment, refused, row, run, write

pytestmark = pytest.mark.gate("torch")


@pytest.mark.extended("torch")
def test_a_dry_run_walks_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    chosen = ("facts", "tests", "sweep cnn", "sweep linear", "train", "plots")
    # long enough for a machine with other things to do
    assert run("gpu", "--dry-run", "--out", "run", "--only", *chosen, "--minutes", "60") == 0
    out = tmp_path / "run"
    text = (out / "summary.md").read_text()
    for name in chosen:
        assert f"| [{name}](logs/{name.replace(' ', '-')}.log) | ok |" in text
    assert re.search(r"\| \[tests\]\(logs/tests.log\) \| ok \| \d+ \| \d+ passed", text)
    assert "| 24 rows, 12 of them measured |" in text
    assert "validation accuracy" in text
    assert "## A training step of the CIFAR network" in text
    assert "| linear | forward + backward | fp32 | tkernels | as called | 1 | **" in text
    assert "| tkernels | unsupported: a CPU has no CUDA graphs | 9 | cnn, linear, linear_relu | cnn fwd fp32" in text
    for name in ("sweep-linear-fp32.png", "sweep-cnn-fp32.png", "sweep-roofline-fp32.png"):
        assert f"]({name})" in text
        assert (out / name).exists()
    assert (out / "train" / "checkpoint.pt").exists()
    assert len(schema.read(out / "sweep.csv")) == 36


def test_every_part_is_in_a_run() -> None:
    for device, dry in (("cpu", True), ("cuda", False)):
        parts = gpu.parts(Path("out"), device, dry)
        names = [part.name for part in parts]
        assert names[0] == "facts"
        assert names[-3:] == ["train", "traffic", "plots"]
        assert all(part.weight > 0 for part in parts)
        swept = {name for operators in gpu.SWEEPS for name in operators}
        assert swept == set(operators.OPERATORS)
        tests = [part for part in parts if part.name.startswith("tests")]
        assert len(tests) == (1 if dry else 2)
        gate = {"TK_GATE": "torch" if dry else "cuda", "TK_EXTENDED": "0"}
        assert all(dict(part.environment) == gate for part in tests)
        sweeps = [part.command for part in parts if part.name.startswith("sweep")]
        assert all(("tiny" in command) == dry for command in sweeps)
        # it has no operators but the network: rows that say "unsupported" and nothing else
        assert not any(providers.USUAL in command for command in sweeps)


def test_the_tests_run_on_the_gpu_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(device: str) -> set[str | None]:
        parts = gpu.parts(Path("out"), device, dry=False)
        return {dict(part.environment).get("CUDA_VISIBLE_DEVICES") for part in parts if part.name.startswith("tests")}

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (seen("cuda"), seen("cuda:1")) == ({None}, {"1"})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-abc")
    assert (seen("cuda"), seen("cuda:1")) == ({None}, {"GPU-abc"})


# ends like pytest when it is interrupted; what it started holds on
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the suite runs in a shell's background
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
print(f"child {child.pid}", flush=True)
try:
    time.sleep(1000)
except KeyboardInterrupt:
    print("1 failed, 2 passed in 3 s")
"""


def test_a_part_that_fails_or_hangs_is_reported_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def python(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    listed = [
        Part("breaks", python("print('because of this'); raise SystemExit(3)"), 0.1),
        Part("tests", python(STUBBORN), 0.1),
        Part("works", python("print('fine')"), 1.0),
    ]
    monkeypatch.setattr(gpu, "parts", lambda out, device, dry: listed)
    out = tmp_path / "run"
    assert run("gpu", "--dry-run", "--out", out, "--minutes", "0.4") == 1
    text = (out / "summary.md").read_text()
    assert "| [breaks](logs/breaks.log) | exit status 3 |" in text
    assert "because of this" in text
    assert "| [tests](logs/tests.log) | stopped after its 2 s | 2 | 1 failed, 2 passed in 3 s |" in text
    assert "| [works](logs/works.log) | ok |" in text
    assert (out / "logs" / "works.log").read_text() == "fine\n"
    child = int((out / "logs" / "tests.log").read_text().split()[1])
    status = Path(f"/proc/{child}/status")
    assert not status.exists() or "zombie" in status.read_text()


def test_parts_that_take_all_their_time_keep_within_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, limits = [0.0], []

    def execute(part: Part, limit: float, out: Path) -> gpu.Outcome:
        limits.append(limit)
        used = 0.0 if part.name == "facts" else limit
        clock[0] += used
        return gpu.Outcome(part.name, "ok", used)

    monkeypatch.setattr(gpu, "execute", execute)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    assert run("gpu", "--dry-run", "--out", tmp_path / "run", "--minutes", "10") == 0
    assert clock[0] == pytest.approx(600)
    # the minute that the facts did not take is for the others
    assert limits[1] > 600 * gpu.WEIGHTS["tests ops"] / sum(p.weight for p in gpu.parts(tmp_path, "cpu", True))


def test_a_summary_of_a_gpu_reads_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sweeps").mkdir()
    step = {"operator": "cnn", "mode": "full", "C": None, "H": None, "peak_memory_mb": 123.4, "host_us": 4321.0}
    rows = [
        row(**step, provider="torch", ms_p50=2.0),
        row(**step, speedup_vs_torch=2.0),
        row(**step, timing="cudagraph", ms_p50=0.5, speedup_vs_torch=3.0),
        row(status="out of memory: a|b", ms_p20=None, ms_p50=None, ms_p80=None, speedup_vs_torch=None),
        row(N=8, speedup_vs_torch=4.0),
        row(N=4, speedup_vs_torch=1.0),
    ]
    torn = write(tmp_path / "sweeps" / "cnn.csv", *rows)
    torn.write_bytes(torn.read_bytes() + b"2026-01-01,dead")
    (tmp_path / "sweeps" / "linear.csv").write_text("timest")
    outcomes = [gpu.Outcome("sweep cnn", "stopped after its 60 s", 61.0), gpu.Outcome("sweep linear", "ok", 1.0)]
    text = report.summary(tmp_path, "cpu", 10, outcomes)
    assert "| 6 rows, 5 of them measured |" in text
    assert "| no row |" in text
    assert "| tkernels | as called | bf16 | 256 | 1 (0.99 to 1.01) | 256,000 | 2.00 | 123 | 4,321 |" in text
    assert "| tkernels | CUDA graph | bf16 | 256 | 0.5 (0.99 to 1.01) | 512,000 | 3.00 |" in text
    assert "| conv2d | forward | bf16 | tkernels | as called | 2 | **2.00** | 1.00 to 4.00 | 50 |" in text
    assert "| tkernels | out of memory: a/b | 1 | conv2d | conv2d fwd bf16 nhwc 256x32x32x32→32 3x3 |" in text


def test_bad_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in refused(capsys, "gpu", "--out", out)
    assert "a GPU is needed" in refused(capsys, "gpu", "--out", out, "--device", "cpu")
    assert "leave out --device" in refused(capsys, "gpu", "--out", out, "--dry-run", "--device", "cpu")
    assert "no part is named swoop" in refused(capsys, "gpu", "--out", out, "--dry-run", "--only", "swoop")
    assert "--minutes must be above 0" in refused(capsys, "gpu", "--out", out, "--dry-run", "--minutes", "0")
    assert not out.exists()
    (tmp_path / "mine.txt").write_text("mine")
    assert "not an empty folder" in refused(capsys, "gpu", "--out", tmp_path, "--dry-run")
