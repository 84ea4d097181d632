"""Plots are drawn from what there is; a file of another kind leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from perf import providers
from perf.bench import plot
from perf.static import traffic
from tests.perf.command import refused, row, run, write

pytestmark = pytest.mark.gate("torch")

DATA = Path(__file__).parent / "data"


def _pictures(folder: Path) -> list[str]:
    found = sorted(folder.glob("*.png"))
    for path in found:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size > 5000
    return [path.name for path in found]


def test_a_sweep_has_a_picture_for_each_operator_and_a_roofline(tmp_path: Path) -> None:
    assert run("plot", DATA / "quiet1.csv", "--out", tmp_path / "new") == 0
    operators = ("batch-norm", "conv2d", "cross-entropy", "linear")
    assert _pictures(tmp_path / "new") == [f"quiet1-{name}-fp32.png" for name in operators] + [
        "quiet1-roofline-fp32.png"
    ]


def test_graphs_gaps_and_unknown_providers_are_drawn(tmp_path: Path) -> None:
    rows = [row(provider=name, timing=timing, N=n) for name in ("torch", "module:mine")
            for timing in ("wall", "cudagraph") for n in (1, 2)]  # fmt: skip
    failed = row(provider="tkernels", status="out of memory: 1 TB", ms_p20=None, ms_p50=None, ms_p80=None)
    assert run("plot", write(tmp_path / "a.csv", *rows[:-1], failed)) == 0
    assert _pictures(tmp_path) == ["a-conv2d-bf16.png", "a-roofline-bf16.png"]


def test_a_picture_says_which_machine_and_commit_it_is_of(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", row(commit="abc"), row(commit="def", N=2, triton="3"))
    feet = [figure.texts[-1].get_text() for _, figure in plot.drawn(path)]
    assert feet == ["GPU   triton 3   commit abc, def"] * 2


def test_every_provider_has_a_colour_of_its_own() -> None:
    colours = [known.colour for known in providers.PROVIDERS.values()]
    assert len({*colours, providers.colour("module:mine")}) == len(colours) + 1


def test_names_with_dollars_are_no_formulas(tmp_path: Path) -> None:
    given = row(provider="module:$10^$", device="$_GPU$", status="ok")
    assert run("plot", write(tmp_path / "a.csv", row(device="$_GPU$"), given)) == 0
    assert _pictures(tmp_path) == ["a-conv2d-bf16.png", "a-roofline-bf16.png"]


def test_traffic_is_drawn_in_bars(tmp_path: Path) -> None:
    names = ",".join(traffic.Traffic.names())
    lines = [f"c,t,t,sm_90,4,{p},stage1.conv1,{phase},1000,{w},,1,0,9,," for p, w in (("torch", 0), ("tkernels", 50))
             for phase in ("forward", "backward")]  # fmt: skip
    (tmp_path / "t.csv").write_text(
        "\n".join([names, *lines, "c,t,t,sm_90,4,torch.compile,(step),,3000,,,,,,,"]) + "\n"
    )
    assert run("plot", tmp_path / "t.csv") == 0
    assert _pictures(tmp_path) == ["t-bytes.png"]


def test_bad_input_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, out = write(tmp_path / "good.csv", row()), tmp_path / "out"
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    untimed = row(status="error: x", ms_p20=None, ms_p50=None, ms_p80=None)
    assert "lacks the columns" in refused(capsys, "plot", good, tmp_path / "bad.csv", "--out", out)
    assert not out.exists()
    assert "no row with a time" in refused(capsys, "plot", write(tmp_path / "none.csv", untimed), "--out", out)
    assert "cannot be made" in refused(capsys, "plot", good, "--out", good / "below")
    assert "does not exist" in refused(capsys, "plot", tmp_path / "missing.csv")
