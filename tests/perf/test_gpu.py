"""The run of everything: its path on a CPU, its time limits, and what it does when a part fails."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from perf import gpu
from perf.gpu import Part
from tests.perf.command import environment, refused, run

pytestmark = pytest.mark.gate("torch")


@pytest.mark.extended("torch")
def test_a_dry_run_walks_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "run"
    # long enough for a machine with other things to do
    assert (
        run("gpu", "--dry-run", "--out", out, "--only", "facts", "sweep linear", "train", "plots", "--minutes", "60")
        == 0
    )
    text = (out / "summary.md").read_text()
    for name in ("facts", "sweep linear", "train", "plots"):
        assert f"| {name} | ok |" in text
    assert "| linear | full | fp32 | wall | tkernels | 1 |" in text
    assert "unsupported: a CPU has no CUDA graphs" in text
    assert "validation accuracy" in text
    assert "![sweep-linear-linear-fp32.png](sweep-linear-linear-fp32.png)" in text
    assert (out / "sweep-linear-linear-fp32.png").exists()
    assert (out / "train" / "checkpoint.pt").exists()


def test_every_part_is_in_a_run() -> None:
    for device, dry in (("cpu", True), ("cuda", False)):
        parts = gpu.parts(Path("out"), device, dry)
        names = [part.name for part in parts]
        assert names[:2] == ["facts", "tests"]
        assert names[-3:] == ["train", "traffic", "plots"]
        assert sum(part.share for part in parts) <= 1.0 + 1e-9
        swept = {name for operators in gpu.SWEEPS for name in operators}
        assert swept == set(gpu.operators.OPERATORS)
        assert dict(parts[1].environment) == {"TK_GATE": "torch" if dry else "cuda"}
        assert all(("tiny" in part.command) == dry for part in parts if part.name.startswith("sweep"))


def test_a_part_that_fails_or_hangs_is_reported_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def python(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    listed = [
        Part("breaks", python("print('because of this'); raise SystemExit(3)"), 1.0),
        Part("hangs", python("import time; print('on its way', flush=True); time.sleep(1000)"), 0.1),
        Part("works", python("print('fine')"), 1.0),
    ]
    monkeypatch.setattr(gpu, "parts", lambda out, device, dry: listed)
    out = tmp_path / "run"
    assert run("gpu", "--dry-run", "--out", out, "--minutes", "0.5") == 1
    text = (out / "summary.md").read_text()
    assert "| breaks | exit status 3 |" in text
    assert "because of this" in text
    assert "| hangs | stopped after its 3 s |" in text
    assert "on its way" in text
    assert "| works | ok |" in text
    assert (out / "logs" / "works.log").read_text() == "fine\n"


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
