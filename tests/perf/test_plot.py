"""Plots are drawn from what there is; a file of another kind leaves nothing behind."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from perf import operators, providers, schema
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
    names = [*providers.PROVIDERS, "module:mine", "module:yours", "torch flash"]
    found = providers.colours([*names, *names])
    assert list(found) == names
    assert len(set(found.values())) == len(names)


LONG = "module:" + "a.very.long.name." * 20 + "b"


def test_everything_at_once_has_its_pictures(tmp_path: Path) -> None:
    """More operators than markers and more providers than colours, of any length, in every mode."""
    names = [*operators.OPERATORS, "copy", *(f"operator{i}" for i in range(5)), "x" * 300, "\u03b1", "\u03b2"]
    whose = ["torch", "tkernels", LONG, *(f"module:m{i}" for i in range(10))]
    modes, others = itertools.cycle(plot.MODES), itertools.cycle(whose[1:])
    listed = [(names[0], name) for name in whose] + [(name, next(others)) for name in names[1:]]
    rows = [row(operator=operator, provider=provider, mode=next(modes), flops=1e9 * (i % 9 != 1))
            for i, (operator, provider) in enumerate(listed)]  # fmt: skip
    assert len({each.operator for each in rows if each.flops}) > len(plot.MARKERS)
    assert len(whose) > len(providers.OTHER_COLOURS) + 3
    path = write(tmp_path / "a.csv", *rows)
    written = plot.draw([path], tmp_path / "out")
    assert len(set(written)) == len(_pictures(tmp_path / "out")) == len(names) + 1
    roofline = plot.roofline(schema.read(path), providers.colours(whose))
    dots = [each for axes in roofline.axes for each in axes.collections]
    assert sum(len(each.get_offsets()) for each in dots) == len(rows)


@pytest.mark.parametrize("missing", ("ms_p20", "speedup_vs_torch", "flops", "bytes", "peak_gbps", "tflops", "gbps"))
@pytest.mark.parametrize("value", (None, 0.0, float("inf")))
def test_what_is_not_known_is_left_out(missing: str, value: float | None, tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", row(**{missing: value}), row(operator="linear", provider="torch"))
    assert run("plot", path) == 0
    assert _pictures(tmp_path) == ["a-conv2d-bf16.png", "a-linear-bf16.png", "a-roofline-bf16.png"]


def test_a_row_without_peaks_is_drawn_without_a_roofline(tmp_path: Path) -> None:
    """Such as perf gpu has of a copy alone."""
    assert run("plot", write(tmp_path / "a.csv", row(operator="copy", dtype="", flops=None, peak_gbps=None))) == 0
    assert _pictures(tmp_path) == ["a-copy.png"]


def test_two_files_of_one_name_have_their_pictures(tmp_path: Path) -> None:
    files = [tmp_path / folder / "timings.csv" for folder in ("old", "new")]
    for path in files:
        path.parent.mkdir()
        write(path, row(operator="conv2d"), row(operator="conv2D"))
    written = plot.draw(files, tmp_path)
    assert len(written) == len(_pictures(tmp_path)) == 6


def test_a_sweep_of_hundreds_of_shapes_is_drawn(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", *(row(N=n) for n in range(1, 400)))
    figure = next(figure for _, figure in plot.drawn(path))
    assert figure.get_figwidth() == plot.WIDEST < 2**16 / figure.dpi


def test_noisy_rows_and_those_above_the_roof_are_marked(tmp_path: Path) -> None:
    noisy = {"ms_p25": 0.8, "ms_p75": 1.2, "speedup_p25": 0.9, "speedup_p75": 1.05, "noise": "very noisy: x"}
    rows = [row(provider="torch"), row(**noisy), row(N=2, above_roofline="cache: x", roofline_pct=120.0)]
    latency, roofline = (figure for _, figure in plot.drawn(write(tmp_path / "a.csv", *rows)))
    written = [[text.get_text() for text in axes.texts] for axes in latency.axes]
    assert [text for text in written[0] if text] == ["!!"]
    assert [text for text in written[1] if text] == ["1.00", "!", "1.00"]
    assert "! noisy, !! very noisy: quartiles at least 10% (25%)" in latency.texts[-1].get_text()
    assert "1 of 3 rows" in latency.texts[-1].get_text()
    (axes,) = roofline.axes
    assert [text.get_text() for text in axes.texts] == ["*"]
    faces = np.vstack([dots.get_facecolors() for dots in axes.collections])
    assert int((faces == 1).all(axis=1).sum()) == 1, "one is hollow"
    foot = roofline.texts[-1].get_text()
    assert "hollow: noisy" in foot
    assert "* above 100% of the roofline: 1 cache" in foot


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
