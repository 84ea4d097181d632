"""python -m tkernels: the environment report."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tkernels
from tkernels import __main__ as report
from tkernels.__main__ import main
from tkernels.core import _torch, settings, targets
from tkernels.cpu import compiler

pytestmark = pytest.mark.gate("torch")


def _said(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    """The report: by section, what is said of each name."""
    assert main([]) == 0
    sections: dict[str, dict[str, str]] = {}
    for line in capsys.readouterr().out.splitlines():
        if not line.startswith(" "):
            said = sections[line] = {}
        else:
            name, value = line.strip().split("  ", 1)
            said[name] = value.strip()
    return sections


def test_report_says_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    said = _said(capsys)
    assert said["environment"]["torch"].startswith(torch.__version__)
    where = settings.tilde(str(Path(tkernels.__file__).parent))
    assert re.fullmatch(rf"{re.escape(tkernels.__version__)}, (commit [0-9a-f]+(-dirty)?, )?in {re.escape(where)}",
                        said["environment"]["tkernels"])  # fmt: skip
    assert said["environment"]["CUDA available"].startswith("yes, driver" if torch.cuda.is_available() else "no: ")
    assert re.search(r", \d+ cores, \d+ threads, ", said["environment"]["CPU"])
    names = ("linear", "conv2d", "batch_norm", "conv_stage", "cross_entropy")
    assert said["operators on cpu in float32"] == dict.fromkeys(names, "no kernel: a tensor is on cpu, not on a GPU")


def test_report_names_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with tkernels.backend("torch"):
        main(["--dtype", "bfloat16"])
    assert "backend 'torch' was asked for" in capsys.readouterr().out
    with tkernels.backend("triton"):
        main([])
    said = capsys.readouterr().out
    assert said.count("  a call fails: RuntimeError: backend 'triton' was asked for, but a tensor is on cpu") == 5
    assert "python -m tkernels" not in said
    main(["--dtype", "float64", "--device", "cpu"])
    assert "float64 is left to PyTorch" in capsys.readouterr().out


def test_report_is_short_and_keeps_the_home_to_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HOME", "TKERNELS_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(compiler, "_wanted", False)
    main([])
    said = capsys.readouterr().out
    assert len(said.splitlines()) < 60
    assert str(tmp_path) not in said
    assert re.search(r"TKERNELS_CACHE_DIR +~: ", said)


def test_report_says_which_commit_pip_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Away from a checkout, whatever repository its environment lies in."""
    told: str | None = '{"url": "https://somewhere/tkernels", "vcs_info": {"vcs": "git", "commit_id": "abc123"}}'
    monkeypatch.setattr(tkernels, "__file__", str(tmp_path / "tkernels/__init__.py"))
    monkeypatch.setattr(report, "_distribution", lambda name: SimpleNamespace(version="1", read_text=lambda file: told))
    assert dict(report.environment())["tkernels"].endswith(f", commit abc123, in {tmp_path}/tkernels")
    told = None
    assert dict(report.environment())["tkernels"].endswith(f"{tkernels.__version__}, in {tmp_path}/tkernels")


@pytest.mark.parametrize(
    "error", [AssertionError("Torch not compiled with CUDA enabled"), RuntimeError("No driver. Get")]
)
def test_report_says_why_there_is_no_gpu(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert dict(report.environment())["CUDA available"] == f"no: {str(error).split('.')[0]}"


def test_report_shows_the_settings(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TKERNELS_COMPILE", "off")
    monkeypatch.setenv("TKERNELS_AUTOTUNE", "")
    monkeypatch.setenv("TKERNELS_BACKND", "torch")
    main([])
    lines = capsys.readouterr().out.splitlines()
    for setting in settings.SETTINGS:
        assert any(line.split()[:1] == [setting.name] and line.endswith(setting.meaning) for line in lines)
    said = {line.split()[0]: line.split(None, 1)[1] for line in lines if line.startswith("  T")}
    assert said["TKERNELS_COMPILE"].startswith("off: ")
    assert said["TKERNELS_AUTOTUNE"].startswith("0 (default): "), "empty is not set"
    assert said["TKERNELS_BACKND"] == "torch", "a misspelt one is seen"


@pytest.mark.skipif(not compiler.enabled(), reason="TKERNELS_COMPILE=0 or no C++ compiler")
def test_report_says_what_a_cpu_runs(capsys: pytest.CaptureFixture[str]) -> None:
    said = _said(capsys)["passes on this CPU"]
    assert "/" in said["C++ compiler"]
    assert any(digit in said["C++ compiler"].split(": ", 1)[1] for digit in "123456789")
    assert said["compiled passes"].startswith("compile, for ")
    assert said["batch_norm"] == "compiled passes, in float32 and bfloat16"
    onednn = torch.backends.mkldnn.is_available()
    assert said["conv_stage"].startswith("oneDNN and compiled passes, in float32" if onednn else "PyTorch's: ")


def test_report_says_that_there_is_no_compiler(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._inductor import config, cpp_builder, cpu_vec_isa

    monkeypatch.setenv("TKERNELS_CACHE_DIR", str(tmp_path))
    cpp_builder.cpp_compiler_search.cache_clear()
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        said = _said(capsys)["passes on this CPU"]
    for cached in (cpp_builder.cpp_compiler_search, cpu_vec_isa.valid_vec_isa_list):
        cached.cache_clear()
    for name in ("C++ compiler", "compiled passes"):
        assert said[name].startswith("none")
        assert "no-such-compiler" in said[name]
    assert said["conv_stage"] == said["fused chains"] == "PyTorch's: nothing compiles"


def test_report_says_that_passes_are_off(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_wanted", False)
    said = _said(capsys)["passes on this CPU"]
    assert said["compiled passes"] == "none: TKERNELS_COMPILE is off"
    monkeypatch.setattr(report, "cpu", None)
    said = _said(capsys)["passes on this CPU"]
    assert said == {"tkernels.cpu": "is not there: every call on a CPU is PyTorch's"}


def test_report_counts_what_caches_hold(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compiler, "_wanted", False)  # nothing is compiled into them meanwhile
    for variable in ("TKERNELS_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    assert _said(capsys)["caches"]["compiled passes"] == f"{tmp_path / 'TKERNELS_CACHE_DIR'}: empty"
    for name, count in (("TKERNELS_CACHE_DIR/cpu-x/deep", 3), ("TRITON_CACHE_DIR/abc", 5)):
        (tmp_path / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / name / str(i)).write_bytes(bytes(100_000))
    (tmp_path / "TKERNELS_CACHE_DIR/autotune-gpu.json").write_bytes(bytes(200_000))
    said = {name: value.rpartition(": ")[2] for name, value in _said(capsys)["caches"].items()}
    assert said == {
        "compiled passes": "3 files, 0.3 MB",
        "measured choices": "1 files, 0.2 MB",
        "Triton's kernels": "5 files, 0.5 MB",
    }
    monkeypatch.setattr(report, "MOST_FILES", 2)
    assert _said(capsys)["caches"]["Triton's kernels"].endswith("at least 2 files, 0.2 MB")


def test_report_says_which_row_each_gpu_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = [
        SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=count, total_memory=80 << 30)
        for name, major, minor, count in (("Old", 7, 5, 40), ("Hopper", 9, 0, 132), ("New", 10, 3, 160))
    ]
    monkeypatch.setattr(compiler, "_wanted", False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    targets.of_device.cache_clear()
    said = _said(capsys)["environment"]
    targets.of_device.cache_clear()
    assert said["device 0"].endswith("too old for the kernels, PyTorch runs")
    assert "132 multiprocessors, 80 GiB: takes the row sm_90, 227 KiB" in said["device 1"]
    assert "takes the row sm_100 (sm_103 has none of its own)" in said["device 2"]


def test_entry_points_of_the_wheel() -> None:
    """A command and a backend's name, each of which is there."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    found = {
        (group, name): EntryPoint(name, value, group).load()
        for group, values in groups.items()
        for name, value in values.items()
    }
    backend = _torch.lookup_backend("tkernels")
    assert found == {("console_scripts", "tkernels"): main, ("torch_dynamo_backends", "tkernels"): backend}


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta"])
def test_a_device_that_is_not_there(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--device", device])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tkernels: error: argument --device: {device!r} cannot be used: ")
