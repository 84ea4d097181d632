"""perf gpu: what it finds of what is planted, its limits, and what it does when something crashes, hangs or fails."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from perf import providers, schema, shapes
from perf.bench import compare, measure
from perf.bench.gpu import checks, command, facts, problems, profile, suite, summary, supervisor, tools
from perf.bench.gpu.results import CheckRow, Failure, Outcome, ProfileRow, Results
from perf.bench.gpu.session import Block, Request, Run
from perf.bench.gpu.supervisor import Supervisor
from tests.perf.command import environment, module, refused, row, run

pytestmark = pytest.mark.gate("torch")

# a wrong element, other bits each time, a crash, and a loss slower than PyTorch's
PLANTED = """
import os, time, torch
from torch.nn import functional as F

def conv2d(*arguments):
    output = F.conv2d(*arguments)
    wrong = torch.zeros_like(output)
    wrong[0, 0, 0, 0] = 0.5
    return output + wrong

def batch_norm(*arguments):
    output = F.batch_norm(*arguments)
    return output + 1e-7 * torch.randn_like(output)

def matmul(a, b):
    os.abort()

def cross_entropy(*arguments):
    time.sleep(0.005)
    return F.cross_entropy(*arguments)

def linear(*arguments):
    return F.linear(*arguments)
"""


def test_what_is_planted_shows_in_the_first_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = module(tmp_path, monkeypatch, "planted_kernels", PLANTED)
    out = tmp_path / "run"
    arguments = ["--dry-run", "--out", out, "--only", "facts", "checks", "products", "--minutes", "60"]
    assert run("gpu", *arguments, "--provider", f"module:{name}") == 1
    text = (out / "summary.md").read_text()
    first = text[: text.index("## Faster")]
    assert len(first.splitlines()) < 40
    assert re.search(r"\| checks: matmul [^|]*\| crashed: signal 6 \|", first)
    assert re.search(r"\| conv2d 2x8x9x9→16 3x3 fp32 nhwc: output \| wrong: off by \S+ in [a-z ]+, PyTorch by", first)
    assert re.search(r"\| batch_norm [^|]*: again \| differs: \d+ of 1,296 elements of output \|", first)
    assert re.search(r"\| cross_entropy 8x10 fp32 forward \| [^|]+\| [^|]+\| torch \| 0\.0\d+ \|", first)
    # nothing else is wrong, and what came after the crash was done
    found = pd.read_csv(out / "checks.csv")
    assert set(found[found.status != "ok"].check.str.split().str[0]) == {"conv2d", "batch_norm"}
    assert set(found[found.check.str.startswith("linear")].status) == {"ok"}
    assert (found.check.str.contains("misaligned") & (found.status == "ok")).any()
    assert (out / "timings-roofline-fp32.png").stat().st_size > 5000
    # on the terminal the screen comes last
    assert capsys.readouterr().out.rstrip().endswith("Everything was.")


@pytest.mark.extended("torch")
def test_a_dry_run_walks_every_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in environment().items():
        monkeypatch.setenv(variable, value)
    out = tmp_path / "run"
    # what is slower is no failure; long enough for a machine with other things to do
    assert run("gpu", "--dry-run", "--out", out, "--minutes", "60") == 0
    names = {path.name for path in out.iterdir()}
    pictures = {f"timings-{name}.png" for name in (
        "copy", "matmul-bf16", "conv2d-fp32", "linear-fp32", "matmul-fp32", "cross-entropy-fp32",
        "batch-norm-relu-fp32", "attention-fp32", "roofline-fp32")}  # fmt: skip
    assert names - pictures == {"summary.md", "timings.csv", "checks.csv", "profile.csv", "environment.txt", "log.txt"}
    assert names > pictures
    text = (out / "summary.md").read_text()
    for block in command.BLOCKS:
        assert re.search(rf"\| {block.name} \| ok \| \d+ \|", text), block.name
    assert re.search(r"Nothing: \d+ results of 17 cases were compared", text)
    assert re.search(r"6 kernels compiled for sm_90 by \d+ processes", text)
    assert re.search(r"\| tests tests \| \d+ passed", text)
    assert "| memcheck | compute-sanitizer is not installed |" in text
    assert "not recorded" not in (out / "log.txt").read_text()
    timings = schema.read(out / "timings.csv")
    assert {"copy", "matmul", "cnn", "resnet50", "conv2d", "attention"} <= set(timings.operator)
    assert set(timings[timings.operator == "linear"]["mode"]) == {"fwd", "dgrad", "wgrad"}
    assert run("compare", out, out) == 0


BLOCKS = """
import os, time, pathlib
from perf.bench.gpu.session import Item

def items(run):
    here = pathlib.Path(__file__).parent
    def note(name): open(here / "done.txt", "a").write(name + "\\n")
    def fails(): raise ValueError("because of this")
    def crashes(): note("crashes"); os.abort()
    def sleeps(): note("sleeps"); time.sleep(1000)
    def holds_on():
        note("holds on")
        while True:
            try: time.sleep(1000)
            except BaseException: pass
    last = {"stop": sleeps, "hold": holds_on}[run.request.block]
    return [Item("works", lambda: run.tell("facts", {"a": "b"})), Item("fails", fails), Item("crashes", crashes),
            Item("goes on", lambda: note("goes on")), Item("last", last), Item("never", lambda: note("never"))]
"""


@pytest.mark.parametrize(
    "how, status",
    [
        pytest.param("stop", "stopped after its", marks=pytest.mark.extended("torch")),  # it waits half a minute
        ("hold", "stopped: it did not answer"),
    ],
)
def test_an_item_that_fails_crashes_or_hangs_leaves_the_others(
    how: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = module(tmp_path, monkeypatch, "planted_blocks", BLOCKS)
    monkeypatch.setattr(supervisor, "GRACE", 1.0)
    found = Results(tmp_path, providers.OURS)
    limit = 25.0  # of which starting a second process takes most
    start = time.monotonic()
    with Supervisor(found, "cpu", dry=True) as processes:
        outcome = processes.do(Block(how, 1.0, name), limit)
        again = processes.do(Block("facts", 1.0, "perf.bench.gpu.facts"), 60.0)
    found.close()
    assert outcome.status.startswith(status)
    assert outcome.left == ("last", "never")
    assert time.monotonic() - start < limit + 60
    assert found.facts["a"] == "b"
    assert found.failures[0] == Failure(how, "fails", "error: ValueError: because of this")
    assert found.failures[1] == Failure(how, "crashes", "crashed: signal 6")
    hung = {"stop": "sleeps", "hold": "holds on"}[how]
    assert (tmp_path / "done.txt").read_text().splitlines() == ["crashes", "goes on", hung]
    # the next block has a process of its own
    assert again.status == "ok"
    assert "device" in found.facts


def test_blocks_that_take_all_their_time_keep_within_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, limits = [0.0], {}

    class Slow:
        def __init__(self, *_: Any) -> None: ...

        def __enter__(self) -> Slow:
            return self

        def __exit__(self, *_: Any) -> None: ...

        def do(self, block: Block, limit: float) -> Outcome:
            limits[block.name] = limit
            clock[0] += 0.0 if block.name == "facts" else limit
            return Outcome(block.name, "ok", limit)

    monkeypatch.setattr(command, "Supervisor", Slow)
    monkeypatch.setattr(command.time, "monotonic", lambda: clock[0])
    assert run("gpu", "--dry-run", "--out", tmp_path / "run", "--minutes", "10") == 0
    assert list(limits) == [block.name for block in command.BLOCKS]
    spent = clock[0]
    assert spent == pytest.approx(600)
    weights = {block.name: block.weight for block in command.BLOCKS}
    # the minute that the facts did not take is for the others
    assert limits["compile"] > 600 * weights["compile"] / sum(weights.values())
    limits.clear()
    assert run("gpu", "--dry-run", "--out", tmp_path / "again", "--only", "tools", "resnet50") == 0
    assert list(limits) == ["facts", "profile", "resnet50", "tools"], "what they need goes before them"


def judged(actual: torch.Tensor, torchs: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> str:
    return str(checks.compare(actual.to(dtype), torchs.to(dtype), exact, dtype)["status"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_verdict_sees_one_element_and_a_norm(dtype: torch.dtype) -> None:
    exact = torch.randn(512, 512, dtype=torch.float64)
    torchs = exact.to(dtype)
    assert judged(torchs, torchs, exact, dtype) == "ok"
    one = torchs.clone()
    one[3, 5] += 0.5
    assert judged(one, torchs, exact, dtype).startswith("wrong: off by")
    one[3, 5] = torch.nan
    assert judged(one, torchs, exact, dtype).startswith("wrong: off by inf")
    eps = torch.finfo(dtype).eps
    assert judged(exact * (1 + 30 * eps), torchs, exact, torch.float32 if dtype == torch.float32 else dtype).startswith(
        "wrong"
    )
    assert judged(exact * (1 + 4 * eps), torchs, exact, dtype).startswith("less exact: ")
    with pytest.raises(ValueError, match="is right"):
        checks.compare(torchs[:1], torchs, exact, dtype)


def test_no_error_of_tf32_is_less_than_its_rounding() -> None:
    exact = torch.randn(512, 512, dtype=torch.float64)
    fine, coarse = exact.to(torch.float32), (exact * (1 + 3e-4)).to(torch.float32)
    assert str(checks.compare(coarse, fine, exact, torch.float32)["status"]).startswith("wrong")
    found = checks.compare(coarse, fine, exact, torch.float32, checks.TF32_ERROR)
    assert (found["status"], found["torch_error"] < 1e-7) == ("ok", True)
    worse = (exact * (1 + 3e-3)).to(torch.float32)
    assert str(checks.compare(worse, fine, exact, torch.float32, checks.TF32_ERROR)["status"]).startswith("wrong")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("operator, shape", [
    ("batch_norm_relu", shapes.image(16, 32, 32)), ("linear_relu", shapes.linear(512, 64, 1024)),
])  # fmt: skip
def test_no_gradient_flows_where_roundings_choose_the_side(operator: str, shape: shapes.Shape, dtype: str) -> None:
    case = problems.case(operator, shape, dtype)
    clear = checks._clear_of_kinks(case, "cpu")
    assert clear is not None
    assert 0 < (~clear).sum() < 0.02 * clear.numel()
    subject = checks.Checked(case, "cpu", providers.load(providers.BASELINE), clear=clear)
    output = subject.forward()
    gradient = subject.output_gradient(output)
    assert torch.equal(gradient == 0, ~clear)
    assert gradient.stride() == output.stride()
    assert subject.output_gradient(output) is gradient
    # whoever takes the other side there has the same gradients
    (x,) = (t for name, t in subject.leaves.items() if name == "input")
    plain, other = (torch.autograd.grad(output, x, gradient * keep, retain_graph=True)[0] for keep in (1, clear))
    assert torch.equal(plain, other)


def test_what_has_no_kink_or_one_gradient_everywhere_is_not_masked() -> None:
    assert checks._clear_of_kinks(problems.case("matmul", shapes.linear(8, 8, 8)), "cpu") is None
    expanded = problems.case("linear_relu", shapes.linear(8, 8, 8), variant=problems.EXPANDED)
    assert checks._clear_of_kinks(expanded, "cpu") is None


@pytest.mark.parametrize("variant", ["misaligned", "strided", problems.EXPANDED])
def test_pytorch_has_plain_tensors_whatever_we_have(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels may read 16 bytes at once without asking where: an error that no later call survives."""
    evaluate, seen = measure.evaluate, []

    def spied(subject: Any) -> Any:
        results = evaluate(subject)
        a = subject.leaves["a"]
        seen.append(
            (a.data_ptr() % 16, a.is_contiguous(), subject.output_gradient(results["output"]).stride() == (0, 0))
        )
        return results

    monkeypatch.setattr(measure, "evaluate", spied)
    told: list[Any] = []
    checks.check(
        tools_of(told),
        providers.load(providers.OURS),
        problems.case("matmul", shapes.linear(8, 32, 16), "fp32", variant=variant),
    )
    plain, moved = (0, True, False), {"misaligned": (4, True, False), "strided": (0, False, False)}
    assert seen[:2] == [plain] * 2
    assert set(seen[2:]) == {moved.get(variant, (0, True, True))}


def test_bits_are_compared_not_values() -> None:
    a = torch.tensor([0.0, torch.nan, 1.0])
    assert int(checks.differing(a, a.clone())) == 0
    assert int(checks.differing(a, torch.tensor([-0.0, torch.nan, 1.0]))) == 1


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_variants_lay_the_same_values_elsewhere(format: torch.memory_format) -> None:
    t = torch.randn(2, 8, 5, 5).contiguous(memory_format=format)
    moved, part = problems.misaligned("input", t), problems.strided("input", t)
    assert torch.equal(moved, t)
    assert torch.equal(part, t)
    assert moved.stride() == t.stride()
    assert moved.data_ptr() % 16 == 4
    assert not part.is_contiguous(memory_format=format)
    matrix = problems.strided("a", torch.randn(4, 6))
    assert matrix.stride() == (14, 1)


def test_every_operator_is_checked_and_every_variant_differs_from_the_plain_case() -> None:
    for dry in (True, False):
        cases = problems.checked(dry)
        assert len(set(map(str, cases))) == len(cases)
        assert {case.variant for case in cases} == {*problems.LAYS, problems.EXPANDED}
    assert {"bf16", "fp16", "fp32"} == {case.dtype for case in problems.checked(False)}
    assert len(problems.checked(False)) >= 45


def results(folder: Path) -> Results:
    found = Results(folder, providers.OURS)
    found.take("facts", "facts", {"device": "GPU", "commit": "abc", "torch": "2", "copy": "3,000 GB/s"})
    return found


def test_a_summary_has_one_screen_however_much_there_is_to_say(tmp_path: Path) -> None:
    found = results(tmp_path)
    for i in range(60):
        found.take("checks", "check", CheckRow(check=f"case {i}", what="output", status="wrong: off"))
        found.take("checks", "failed", (f"item {i}", "error: x"))
        for provider, ms in (("torch", 1.0), ("tkernels", 2.0 if i % 2 else 0.5)):
            found.take("products", "timing", row(N=i + 1, provider=provider, ms_p50=ms, speedup_vs_torch=None))
        found.outcomes.append(Outcome(f"block {i}", "stopped after its 3 s", 3.0, ("x", "y")))
    found.close()
    screen = summary.screen(found, 10, 600)
    assert len(screen.splitlines()) <= 60
    assert "## Wrong: 120" in screen
    assert "## Slower than the fastest rival: 30 of 60" in screen
    assert "## Faster than the fastest rival: 30" in screen
    assert "## Not reached: 60" in screen
    assert (
        screen.index("## Wrong")
        < screen.index("## Slower")
        < screen.index("## Faster")
        < screen.index("## Not reached")
    )
    assert len(pd.read_csv(tmp_path / "checks.csv")) == 60


def test_a_summary_says_who_is_faster(tmp_path: Path) -> None:
    found = results(tmp_path)
    step = {"operator": "cnn", "mode": "train", "N": 256, "C": 3, "K": None, "R": None, "S": None, "stride": None}
    for provider, timing, ms in (
        ("torch", "wall", 2.0), ("tkernels", "wall", 2.5), ("torch.compile", "wall", 1.5),
        ("tkernels JITFunction.run", "wall", 0.1), ("tkernels graph", "cudagraph", 0.5),
        ("torch graph", "cudagraph", 1.0),
        ("torch.compile max-autotune", "cudagraph", 0.75), ("tkernels sgd graph", "cudagraph", 0.2),
    ):  # fmt: skip
        found.take(
            "headline", "timing", row(**step, provider=provider, timing=timing, ms_p50=ms, speedup_vs_torch=None)
        )
    listed = summary.speeds(found)
    assert [(speed.rival, speed.ratio) for speed in listed] == [
        ("torch.compile", pytest.approx(0.6)),
        ("torch.compile max-autotune", pytest.approx(1.5)),
    ]
    details = summary.details(found)
    assert "| cnn | 256 | tkernels graph | CUDA graph | 0.5 | 512,000 |" in details
    assert summary.exit_status(found) == 0


def test_what_cannot_be_measured_of_ours_is_wrong_and_of_a_rival_is_not_reached(tmp_path: Path) -> None:
    found = results(tmp_path)
    for provider, status in (("tkernels", "error: a"), ("torch flash", "error: b"), ("tkernels", "unsupported: c")):
        found.take("products", "timing", row(provider=provider, status=status))
    found.take("tools", "tool", ("memcheck", "wrong: 3 errors"))
    found.take("tools", "tool", ("ncu", "ncu is not installed"))
    assert [status for _, status in summary.wrongs(found)] == ["wrong: 3 errors", "error: a"]
    screen = summary.screen(found, 10, 600)
    left = screen[screen.index("## Not reached") :]
    assert "error: b" in left
    assert "unsupported: c" in left
    assert "ncu is not installed" in left
    assert summary.exit_status(found) == 1


def test_a_profile_stands_beside_its_bytes_and_the_copy(tmp_path: Path) -> None:
    found = results(tmp_path)
    found.take("facts", "timing", row(operator="copy", provider="torch", gbps=2000.0))
    found.take("compile", "bytes", {"ours": 50e6, "faster": 10e6, "unused": 1.0})
    names = {"ours": 50.0, "theirs": 30.0, "faster": 20.0}
    profile = [ProfileRow(kernel=name, calls=2.0, us=us, share=us / 100) for name, us in names.items()]
    found.take("headline", "profile", profile)
    found.close()
    assert found.slowest() == ("ours", "faster")
    assert "| ours | 2 | 50.0 | 50.0 | 50.0 | 1,000 | 50% |" in summary.details(found)
    assert "| theirs | 2 | 30.0 | 30.0 |  |  |  |" in summary.details(found)
    assert list(pd.read_csv(tmp_path / "profile.csv").of_copy.dropna()) == [0.5, 0.25]


def test_a_profile_counts_a_kernel_once() -> None:
    """torch tells of the ranges that each launch and an optimizer's step are named with on the device as well."""
    run = Run(Request("profile", "cuda", False, providers.OURS, 60.0), lambda kind, what: None)
    event = SimpleNamespace(key="a_kernel", device_type="DeviceType.CUDA", count=10, self_device_time_total=50.0)
    event.is_user_annotation = False
    assert profile._row(run, event) == ProfileRow(kernel="a_kernel", calls=2.0, us=10.0)
    event.is_user_annotation = True
    assert profile._row(run, event) is None


def test_a_named_range_is_known_as_one() -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as recorded, torch.profiler.record_function("a range"):
        torch.ones(3) + 1
    named = {event.key: event.is_user_annotation for event in recorded.key_averages()}
    assert named["a range"]
    assert not named["aten::add"]


def test_nvidia_smi_that_hangs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(*_: Any, timeout: float, **__: Any) -> Any:
        raise subprocess.TimeoutExpired("nvidia-smi", timeout)

    monkeypatch.setattr(facts.shutil, "which", lambda name: "/bin/" + name)
    monkeypatch.setattr(facts.subprocess, "run", hangs)
    assert facts.details() == ""


def test_a_kind_of_result_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no kind of result"):
        results(tmp_path).take("checks", "chekc", {})
    with pytest.raises(TypeError, match="rows of CheckRow, not of Measurement"):
        results(tmp_path).take("checks", "check", row())


def tools_of(told: list[tuple[str, Any]], **request: Any) -> Run:
    return Run(Request("tools", "cpu", True, providers.OURS, 60.0, **request), lambda kind, what: told.append(what))


SANITIZER = """#!/bin/sh
echo "$@" >> {folder}/asked.txt
echo "========= COMPUTE-SANITIZER"
case "$2" in
memcheck) echo "========= Invalid __global__ read of size 4 bytes"; echo "========= ERROR SUMMARY: 1 error";;
racecheck) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)";;
esac
"""
NCU = """#!/bin/sh
echo "$@" >> {folder}/asked.txt
echo "==PROF== Connected to process 1"
echo '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
echo '"0","one","gpu__time_duration.sum","ns","1,500"'
echo '"0","one","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","61.5"'
echo '"1","one","gpu__time_duration.sum","ns","900"'
echo '"2","two","gpu__time_duration.sum","us","7"'
"""


def test_nvidias_tools_are_asked_and_their_answers_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("compute-sanitizer", SANITIZER), ("ncu", NCU)):
        (tmp_path / name).write_text(text.format(folder=tmp_path))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    told: list[Any] = []
    for item in tools.items(tools_of(told, slowest=("one", "two"))):
        item.do()
    assert told == [
        ("memcheck", "wrong: 1 error; Invalid __global__ read of size 4 bytes"),
        ("ncu one", "us 1.5, DRAM % 61.5"),
        ("ncu two", "us 7.0"),
        ("racecheck", "no errors (0 hazards displayed (0 errors, 0 warnings))"),
    ]
    asked = (tmp_path / "asked.txt").read_text()
    assert "--clock-control none" in asked  # its default would set the GPU's clocks
    assert asked.count("--report-api-errors no") == 1  # an option of memcheck's alone
    assert "regex:^one$|^two$" in asked


def test_a_tool_that_says_nothing_of_use_is_an_error() -> None:
    assert tools.verdict("Segmentation fault").startswith("error: no summary; it said last: Segmentation fault")
    assert tools.table("no rows") == {}


def test_a_tool_that_may_not_work_there_is_nothing_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ncu").write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM - no permission'\n")
    (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    told: list[Any] = [("memcheck", tools.verdict("========= Error: Device not supported. Please refer to ..."))]
    tools._ncu(tools_of(told, slowest=("one",)))
    found = results(tmp_path)
    for tool in told:
        found.take("tools", "tool", tool)
    assert summary.wrongs(found) == []
    screen = summary.screen(found, 10, 600)
    assert "| ncu | unsupported: the GPU's counters cannot be read; it said last: ==ERROR== ERR_NVGPUCTRPERM" in screen
    assert "| memcheck | unsupported: compute-sanitizer refuses" in screen


def test_the_step_that_the_tools_watch_runs() -> None:
    tools.main("cpu", 2)


TESTS = """
import time

def test_passes(): pass
def test_fails(): assert 1 == 2
def test_sleeps(): time.sleep(1000)
"""


def test_a_suite_that_is_interrupted_tells_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "test_planted.py"
    path.write_text(TESTS)
    module(tmp_path, monkeypatch, "planted_suite", f"""
from perf.bench.gpu import suite
from perf.bench.gpu.suite import items
suite.QUICK_TESTS = ({str(path)!r}, "-c", "/dev/null", "-p", "no:xdist")
""")  # fmt: skip
    found = Results(tmp_path, providers.OURS)
    with Supervisor(found, "cpu", dry=True) as processes:
        outcome = processes.do(Block("tests", 1.0, "planted_suite", alone=True), 12.0)
    found.close()
    assert outcome.status == "stopped after its 12 s"
    ((name, status),) = found.tools
    assert name == "tests tests"
    assert re.match(r"wrong: 1 failed, 1 passed in .*; first: FAILED .*test_fails", status), status


def test_how_a_suite_closed() -> None:
    assert suite.closing(["x", "=== 3 passed, 1 skipped in 2.0s ==="], 0) == "3 passed, 1 skipped in 2.0s"
    assert suite.closing(["boom"], 4) == "error: no test ran (exit status 4)"


def test_a_comparison_of_two_runs_sees_what_became_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, ms, status in (("old", 1.0, "ok"), ("new", 2.0, "wrong: off by 1")):
        (tmp_path / name).mkdir()
        found = results(tmp_path / name)
        found.take("products", "timing", row(ms_p20=0.99 * ms, ms_p50=ms, ms_p80=1.01 * ms))
        found.take("checks", "check", CheckRow(check="linear", what="output", status=status))
        found.close()
    assert run("compare", tmp_path / "old", tmp_path / "new") == 1
    shown = capsys.readouterr().out
    assert "slower by 100%" in shown
    assert "linear: output: was ok, now wrong: off by 1" in shown
    assert run("compare", tmp_path / "old", tmp_path / "old") == 0
    assert compare.TIMINGS == "timings.csv"


def test_bad_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in refused(capsys, "gpu", "--out", out)
    assert "a GPU is needed" in refused(capsys, "gpu", "--out", out, "--device", "cpu")
    assert "leave out --device" in refused(capsys, "gpu", "--out", out, "--dry-run", "--device", "cpu")
    assert "unknown block 'swoop'" in refused(capsys, "gpu", "--out", out, "--dry-run", "--only", "swoop")
    assert "--minutes must be above 0" in refused(capsys, "gpu", "--out", out, "--dry-run", "--minutes", "0")
    assert "name another provider" in refused(capsys, "gpu", "--out", out, "--dry-run", "--provider", "torch")
    assert "unknown provider" in refused(capsys, "gpu", "--out", out, "--dry-run", "--provider", "mine")
    assert not out.exists()
    (tmp_path / "mine.txt").write_text("mine")
    assert "not an empty folder" in refused(capsys, "gpu", "--out", tmp_path, "--dry-run")
