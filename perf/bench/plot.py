"""PNGs of a CSV: of a sweep latency and speedup by shape for each provider and a roofline; of traffic its bytes."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from perf import options, schema
from perf.bench import noise
from perf.providers import BASELINE, COMPILED, OURS, colours
from perf.static import traffic

MODES = {**schema.MODES, **schema.GRADIENTS}

# parts of the network, by the names of their layers, from the bottom of the stack up
PARTS = (
    ("convolution", r"conv\d*$", "#0072B2"),
    ("batch norm", r"bn\d*$", "#E69F00"),
    ("ReLU", r"relu\d*$", "#F0E442"),
    ("max pool", r"pool$", "#009E73"),
    ("dropout", r"dropout\d*$", "#CC79A7"),
    ("fused stage", r"stage\d*$", "#56B4E9"),
    ("linear, loss, other", r"", "#999999"),
)
# bars say most from 0 on; where the slowest is so many times the fastest, the axis is logarithmic
WIDE_RANGE = 25
INDUCTOR_COLOUR = "#BBBBBB"
# behind the provider in a label
GRAPH = " (CUDA graph)"
# of operators in a roofline, again and again
MARKERS = "osD^vP*Xhp<>d8H"
# characters of a name that have room, and inches of a picture: those of 2^16 pixels are refused
LONGEST, WIDEST = 40, 200
STYLE: Any = {
    "figure.dpi": 120,
    "figure.max_open_warning": 0,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.parse_math": False,  # names are text, dollars and all
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("csv", type=Path, nargs="+", metavar="FILE.csv", help="of perf sweep or perf traffic")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where PNGs go (default: beside the first file)")


def run(args: argparse.Namespace) -> int:
    """Draw everything, then write: a file that cannot be read leaves nothing behind."""
    written = draw(args.csv, args.out or args.csv[0].parent)
    if not written:
        raise options.Refused(f"{args.csv[0]} has no row with a time of a call: nothing to draw")
    for path in written:
        print(f"wrote {path}")
    return 0


def draw(files: Sequence[Path], out: Path) -> list[Path]:
    """Write the pictures of CSVs, each under a name of its own, into a folder, which is made if there are any."""
    figures: dict[str, Figure] = {}
    with mpl.rc_context(STYLE):
        for path in files:
            for name, figure in drawn(path):
                stem = f"{path.stem[:100]}-{name[:100]}"
                numbered = (f"{stem}-{n}" for n in itertools.count(2))
                figures[next(each for each in itertools.chain([stem], numbered) if each not in figures)] = figure
        written = [options.directory(out) / f"{name}.png" for name in figures]
        for path, figure in zip(written, figures.values()):
            figure.savefig(path, bbox_inches="tight")
            plt.close(figure)
    return written


def drawn(path: Path) -> Iterator[tuple[str, Figure]]:
    """The figures of one file, with the ends of their names. Raises Refused for a CSV of another kind."""
    frame = schema.table(path)
    if "workspace_bytes" in frame.columns:
        schema.require(frame, traffic.Traffic.names(), path)
        yield "bytes", _signed(stacked_bytes(schema.typed(frame, traffic.Traffic.columns(), path)), frame, "target")
        return
    sweep = schema.read(path).replace([np.inf, -np.inf], np.nan)
    # networks against others have a table
    sweep = sweep[(sweep.status == schema.OK) & _positive(sweep, "ms_p50") & sweep["mode"].isin(list(MODES))]
    palette = colours(sweep.provider)
    several = sweep.device.nunique() > 1
    for (operator, dtype, device), rows in sweep.groupby(["operator", "dtype", "device"], sort=False):
        name = f"{operator} {dtype}" + (f" {device}" if several else "")
        yield _slug(name), _signed(latency(rows, palette), rows, "device", _notes(rows.assign(above_roofline="")))
    products = (sweep.flops > 0) & _positive(sweep, "bytes", "tflops", "peak_tflops", "peak_gbps")
    memory_bound = (sweep.flops == 0) & _positive(sweep, "gbps", "peak_gbps")
    for (device, dtype), rows in sweep[products | memory_bound].groupby(["device", "dtype"], sort=False):
        name = f"roofline {dtype}" + (f" {device}" if several else "")
        yield _slug(name), _signed(roofline(rows, palette), rows, "device", _notes(rows, "hollow: noisy"))


def _positive(rows: pd.DataFrame, *columns: str) -> pd.Series:
    """Where all of these are numbers above 0."""
    return (rows[list(columns)].astype(float) > 0).all(axis="columns")


def _notes(rows: pd.DataFrame, *sign: str) -> list[str]:
    return noise.footnotes(schema.records(rows), *sign)


def _signed(figure: Figure, rows: pd.DataFrame, machine: str, notes: Sequence[str] = ()) -> Figure:
    """The figure with notes, the machine, the versions and the source's commit at its foot."""
    values = {name: ", ".join(filter(None, dict.fromkeys(rows[name].astype(str))))
              for name in (machine, "torch", "triton", "commit")}  # fmt: skip
    words = [value if name == "device" else f"{name} {value}" for name, value in values.items() if value]
    # the layout has no room for two lines below the axes: it is made first, and the legend held where it is
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    figure.legends[0].set_bbox_to_anchor((0, 0, 1, 1), figure.transFigure)
    foot = "\n".join(["   ".join(words), *notes])
    figure.text(0.5, -0.01, foot, ha="center", va="top", fontsize=7, color="#666666")
    return figure


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _series(rows: pd.DataFrame) -> pd.Series:
    """What gets a bar of its own: the provider, and its timing where there are several."""
    return rows.provider + np.where(rows.timing == "cudagraph", GRAPH, "")


def _ordered(series: pd.Series) -> list[str]:
    """The baseline first, then as they came."""
    return sorted(series.unique(), key=lambda name: not _is_baseline(name))


def _is_baseline(name: str) -> bool:
    return name.removesuffix(GRAPH) == BASELINE


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}\u2026"


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    """Below the axes, in as many columns as fit; from the third line on the figure grows."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), int(figure.get_figwidth() / (0.6 + 0.09 * longest))))
    figure.set_figheight(figure.get_figheight() + 0.22 * max(0, -(-len(handles) // columns) - 2))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def latency(rows: pd.DataFrame, palette: dict[str, str]) -> Figure:
    """Latency and speedup by shape: a pair of panels for each mode."""
    rows = rows.assign(series=_series(rows), label=_labels(rows))
    modes = [mode for mode in MODES if (rows["mode"] == mode).any()]
    shapes, series = list(rows.label.unique()), _ordered(rows.series)
    width = max(4.2, 1.2 + 0.28 * len(shapes) * (len(series) + 1))
    figure, axes = plt.subplots(
        2, len(modes), figsize=(min(max(width * len(modes), 5.6), WIDEST), 5.4), sharex="col", squeeze=False,
        height_ratios=(3, 2), layout="constrained",
    )  # fmt: skip
    for column, mode in enumerate(modes):
        part = rows[rows["mode"] == mode]
        _bars(axes[0][column], part, shapes, series, palette)
        _speedups(axes[1][column], part, shapes, series, palette)
        axes[0][column].set_title(MODES[mode])
    axes[0][0].set_ylabel("milliseconds a call\nmedian, p20 to p80")
    axes[1][0].set_ylabel("times as fast\nas PyTorch, quartiles")
    first = rows.iloc[0]
    figure.suptitle(f"{_short(first.operator)}, {first['dtype']}", fontsize=11)
    _legend(figure, [bars for bars in axes[0][0].containers if isinstance(bars, BarContainer)])
    return figure


def _labels(rows: pd.DataFrame) -> list[str]:
    """Shapes in words, the batch apart where it is the same for all, the layout named where there are two."""
    layouts = rows.layout.nunique() > 1
    return [schema.shape_label(row) + (f"\n{row['layout']}" if layouts else "") for row in schema.records(rows)]


Colours = dict[str, str]


def _bars(axes: Axes, rows: pd.DataFrame, shapes: list[str], series: list[str], palette: Colours) -> None:
    for places, part in _drawn_bars(axes, rows, shapes, series, palette, ("ms_p20", "ms_p50", "ms_p80")):
        for place, row in zip(places, schema.records(part)):
            if mark := noise.times(row).mark:
                _write(axes, mark, (place, np.nanmax([row["ms_p50"], row["ms_p80"]])), "#333333")
    if rows.ms_p80.max() > WIDE_RANGE * rows.ms_p20.min() > 0:
        axes.set_yscale("log")
        axes.set_ylim(bottom=rows.ms_p20.min() / 2)
        _plain_logarithmic(axes.yaxis)
    axes.margins(y=0.1)


def _speedups(axes: Axes, rows: pd.DataFrame, shapes: list[str], series: list[str], palette: Colours) -> None:
    others = [name for name in series if not _is_baseline(name)]
    columns = ("speedup_p25", "speedup_vs_torch", "speedup_p75")
    for places, part in _drawn_bars(axes, rows, shapes, others, palette, columns):
        for place, row in zip(places, schema.records(part)):
            if pd.notna(row["speedup_vs_torch"]):
                value, top = noise.speedup(row), np.nanmax([row["speedup_vs_torch"], row["speedup_p75"]])
                _write(axes, f"{value.p50:.2f}", (place, 0), "white")
                _write(axes, value.mark, (place, top), "#333333")
    axes.axhline(1, color="#333333", linewidth=0.9)
    axes.margins(y=0.15)
    axes.set_xticks(range(len(shapes)), shapes, rotation=35, ha="right", rotation_mode="anchor", fontsize=8.5)


def _write(axes: Axes, text: str, place: tuple[float, float], colour: str) -> None:
    """Right above a place, to be read on a bar and beside one."""
    outline = withStroke(linewidth=1.5, foreground="#555555" if colour == "white" else "white")
    axes.annotate(text, place, xytext=(0, 4), textcoords="offset points", ha="center", fontsize=8, color=colour,
                  path_effects=[outline])  # fmt: skip


def _drawn_bars(
    axes: Axes,
    rows: pd.DataFrame,
    shapes: list[str],
    series: list[str],
    palette: Colours,
    columns: tuple[str, str, str],
) -> Iterator[tuple[np.ndarray[Any, Any], pd.DataFrame]]:
    """Draw a bar of each series at each shape, of a column between two others; where they stand, and the rows that
    they show: of a measurement made twice the later one."""
    step = 0.8 / max(len(series), 1)
    axes.grid(axis="x", visible=False)
    for i, name in enumerate(series):
        part = rows[rows.series == name].drop_duplicates("label", keep="last").set_index("label").reindex(shapes)
        places = np.arange(len(shapes)) + (i - (len(series) - 1) / 2) * step
        low, middle, high = (part[column].astype(float) for column in columns)
        axes.bar(places, middle, 0.92 * step, yerr=np.abs(np.vstack([middle - low, high - middle])),
                 error_kw={"ecolor": "#333333", "elinewidth": 0.9, "capsize": 2},
                 label=_short(name), color=palette[name.removesuffix(GRAPH)],
                 hatch="//" if name.endswith(GRAPH) else None, edgecolor="white", linewidth=0.4)  # fmt: skip
        yield places, part


def roofline(rows: pd.DataFrame, palette: Colours) -> Figure:
    """Each measurement against what the device can do: by bytes where it computes little, by operations elsewhere."""
    products, memory_bound = rows[rows.flops > 0], rows[rows.flops == 0]
    panels = [(panel, part) for panel, part in ((_products, products), (_memory_bound, memory_bound)) if not part.empty]
    height = max(4.8, 1.5 + 0.25 * len(_calls(memory_bound).unique()))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(11 if len(panels) == 2 else 7, height), width_ratios=(3, 2)[: len(panels)],
        squeeze=False, layout="constrained",
    )  # fmt: skip
    markers = dict(zip(dict.fromkeys(products.operator), itertools.cycle(MARKERS)))
    for (panel, part), place in zip(panels, axes[0]):
        panel(place, part, palette, markers)
    handles: list[Artist] = [plt.Line2D([], [], linestyle="", marker=marker, color="#666666", label=_short(name))
               for name, marker in markers.items()]  # fmt: skip
    handles += [Patch(color=palette[name], label=_short(name)) for name in _ordered(rows.provider)]
    _legend(figure, handles)
    first = rows.iloc[0]
    figure.suptitle(f"roofline, {first['dtype']}", fontsize=11)
    return figure


def _products(axes: Axes, rows: pd.DataFrame, palette: Colours, markers: dict[str, str]) -> None:
    peaks = _roofs(axes, rows)
    for (operator, provider), part in rows.groupby(["operator", "provider"], sort=False):
        _dots(axes, part, part.flops / part.bytes, part.tflops, palette[str(provider)], markers[str(operator)])
    axes.set(xscale="log", yscale="log", xlabel="operations a byte (least traffic)", ylabel="TFLOP/s")
    axes.set_title(f"products   (peak: {peaks})", fontsize=10)
    for axis in (axes.xaxis, axes.yaxis):
        _plain_logarithmic(axis)


def _memory_bound(axes: Axes, rows: pd.DataFrame, palette: Colours, markers: dict[str, str]) -> None:
    names = list(_calls(rows).unique())
    for provider, part in rows.groupby("provider", sort=False):
        heights = _calls(part).map(names.index)
        _dots(axes, part, 100 * part.gbps / part.peak_gbps, heights, palette[str(provider)], "o")
    axes.set_yticks(range(len(names)), map(_short, names))
    axes.set(xlabel="least traffic / time, in % of the peak bandwidth", title="memory-bound operators")
    axes.axvline(100, color="#333333", linewidth=1.2)
    axes.set_xlim(left=0)
    axes.margins(y=0.15)


def _calls(rows: pd.DataFrame) -> pd.Series:
    return rows.operator + " " + rows["mode"]


def _dots(axes: Axes, rows: pd.DataFrame, x: pd.Series, y: pd.Series, colour: str, marker: str) -> None:
    """A dot a row, hollow where it is noisy, with a star where it is faster than the device can be."""
    noisy = rows.noise != ""
    axes.scatter(x, y, s=34, marker=marker, facecolors=np.where(noisy, "white", colour).tolist(),
                 edgecolors=np.where(noisy, colour, "white").tolist(), linewidths=np.where(noisy, 1.2, 0.5).tolist(),
                 zorder=3)  # fmt: skip
    for place in zip(x[rows.above_roofline != ""], y[rows.above_roofline != ""]):
        axes.annotate("*", place, xytext=(4, 1), textcoords="offset points", fontsize=8, color="#333333")


def _plain_logarithmic(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 of each decade, written out."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _roofs(axes: Axes, rows: pd.DataFrame) -> str:
    """Draw the device's peaks, and tell them; of a CPU's bandwidths, one a cache, the slowest and the fastest."""
    intensity = rows.flops / rows.bytes
    x = np.geomspace(intensity.min() / 2, intensity.max() * 2, 200)
    tflops, slow, fast = rows.peak_tflops.max(), rows.peak_gbps.min(), rows.peak_gbps.max()
    axes.plot(x, np.minimum(tflops, x * slow / 1e3), color="#333333", linewidth=1.2)
    label = f"{tflops:.3g} TFLOP/s, {slow:.3g} GB/s"
    if fast > 1.1 * slow:
        axes.plot(x, np.minimum(tflops, x * fast / 1e3), color="#333333", linewidth=1.0, linestyle="--")
        label += f", dashed: {fast:.3g} GB/s from caches"
    return label


def stacked_bytes(frame: pd.DataFrame) -> Figure:
    """Bytes of a training step by part of the network, forward and backward, a bar a provider."""
    layers = frame[frame.layer != traffic.STEP]
    batch = int(frame.batch.iloc[0])
    providers = [name for name in (BASELINE, COMPILED, OURS) if (frame.provider == name).any()]
    figure, axes = plt.subplots(figsize=(8.2, 4.4), layout="constrained")
    left = pd.Series(0.0, index=providers)
    part_of = layers.layer.map(_part)

    def kilobytes(chosen: pd.DataFrame, column: str) -> pd.Series:
        return chosen.groupby("provider")[column].sum().reindex(providers).fillna(0).astype(float) / batch / 1e3

    for name, _, filled in PARTS:
        for phase, hatch in (("forward", None), ("backward", "///")):
            width = kilobytes(layers[(part_of == name) & (layers.phase == phase)], "bytes")
            label = name if phase == "forward" and (part_of == name).any() else None
            axes.barh(providers, width, 0.62, left=left, color=filled, hatch=hatch, edgecolor="white", linewidth=0.5,
                      label=label)  # fmt: skip
            left = left + width
    workspace = kilobytes(layers, "workspace_bytes")
    axes.barh(providers, workspace, 0.62, left=left, color="white", edgecolor="#333333", linewidth=0.8,
              label="workspaces")  # fmt: skip
    shown = {name: f"{left[name]:,.0f}" + (f" + {workspace[name]:,.0f}" if workspace[name] else "")
             for name in providers}  # fmt: skip
    left = left + workspace
    whole = frame[(frame.layer == traffic.STEP) & (frame.provider == COMPILED) & frame.bytes.notna()]
    if not whole.empty:
        left[COMPILED] = float(whole.bytes.iloc[0]) / batch / 1e3
        shown[COMPILED] = f"{left[COMPILED]:,.0f}"
        axes.barh([COMPILED], left[COMPILED], 0.62, color=INDUCTOR_COLOUR, label="Inductor's own count")
    for name in providers:
        if left[name]:
            axes.annotate(shown[name], (left[name], name), xytext=(5, 0), textcoords="offset points",
                          va="center")  # fmt: skip
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"KB an image read and written in a training step (batch {batch}, bf16 NHWC; hatched: backward)")
    axes.set_title("bytes a training step of the CIFAR network moves: counted, not measured", fontsize=11)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def _part(layer: str) -> str:
    return next(name for name, pattern, _ in PARTS if re.search(pattern, layer))
