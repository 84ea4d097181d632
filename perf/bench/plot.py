"""PNGs of a CSV: of a sweep latency and speedup by shape for each provider and a roofline; of traffic its bytes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
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
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from perf import options, schema
from perf.providers import BASELINE, COMPILED, OURS, colour
from perf.schema import MODES
from perf.static import traffic

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
STYLE: Any = {
    "figure.dpi": 120,
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
    figures: list[tuple[str, Figure]] = []
    with mpl.rc_context(STYLE):
        for path in args.csv:
            figures += [(f"{path.stem}-{name}.png", figure) for name, figure in drawn(path)]
        if not figures:
            raise options.Refused(f"{args.csv[0]} has no row with a time of a call: nothing to draw")
        out = options.directory(args.out or args.csv[0].parent)
        for name, figure in figures:
            figure.savefig(out / name, bbox_inches="tight")
            plt.close(figure)
            print(f"wrote {out / name}")
    return 0


def drawn(path: Path) -> Iterator[tuple[str, Figure]]:
    """The figures of one file, with the ends of their names. Raises Refused for a CSV of another kind."""
    frame = schema.table(path)
    if "workspace_bytes" in frame.columns:
        schema.require(frame, traffic.Traffic.names(), path)
        yield "bytes", _signed(stacked_bytes(schema.typed(frame, traffic.Traffic.columns(), path)), frame, "target")
        return
    sweep = schema.read(path)
    # networks against others have a table
    sweep = sweep[(sweep.status == schema.OK) & sweep.ms_p50.notna() & sweep["mode"].isin(list(MODES))]
    several = sweep.device.nunique() > 1
    for (operator, dtype, device), rows in sweep.groupby(["operator", "dtype", "device"], sort=False):
        name = f"{operator} {dtype}" + (f" {device}" if several else "")
        yield _slug(name), _signed(latency(rows), rows, "device")
    for (device, dtype), rows in sweep.groupby(["device", "dtype"], sort=False):
        name = f"roofline {dtype}" + (f" {device}" if several else "")
        yield _slug(name), _signed(roofline(rows), rows, "device")


def _signed(figure: Figure, rows: pd.DataFrame, machine: str) -> Figure:
    """The figure with the machine, the versions and the source's commit at its foot."""
    values = {name: ", ".join(filter(None, dict.fromkeys(rows[name].astype(str))))
              for name in (machine, "torch", "triton", "commit")}  # fmt: skip
    words = [value if name == "device" else f"{name} {value}" for name, value in values.items() if value]
    # the layout has no room for two lines below the axes: it is made first, and the legend held where it is
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    figure.legends[0].set_bbox_to_anchor((0, 0, 1, 1), figure.transFigure)
    figure.text(0.5, -0.01, "   ".join(words), ha="center", va="top", fontsize=7, color="#666666")
    return figure


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _series(rows: pd.DataFrame) -> pd.Series:
    """What gets a bar of its own: the provider, and its timing where there are several."""
    return rows.provider + np.where(rows.timing == "cudagraph", GRAPH, "")


def _ordered(series: pd.Series) -> list[str]:
    """The baseline first, then as they came."""
    return sorted(series.unique(), key=lambda name: not name.startswith(BASELINE + " ") and name != BASELINE)


def latency(rows: pd.DataFrame) -> Figure:
    """Latency and speedup by shape: a pair of panels for each mode."""
    rows = rows.assign(series=_series(rows), label=_labels(rows))
    modes = [mode for mode in MODES if (rows["mode"] == mode).any()]
    shapes, series = list(rows.label.unique()), _ordered(rows.series)
    width = max(4.2, 1.2 + 0.28 * len(shapes) * (len(series) + 1))
    figure, axes = plt.subplots(
        2, len(modes), figsize=(max(width * len(modes), 5.6), 5.4), sharex="col", squeeze=False,
        height_ratios=(3, 2), layout="constrained",
    )  # fmt: skip
    for column, mode in enumerate(modes):
        part = rows[rows["mode"] == mode]
        _bars(axes[0][column], part, shapes, series)
        _speedups(axes[1][column], part, shapes, series)
        axes[0][column].set_title(MODES[mode])
    axes[0][0].set_ylabel("milliseconds a call\nmedian, p20 to p80")
    axes[1][0].set_ylabel("times as fast\nas PyTorch")
    first = rows.iloc[0]
    figure.suptitle(f"{first.operator}, {first['dtype']}", fontsize=11)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(series))
    return figure


def _labels(rows: pd.DataFrame) -> list[str]:
    """Shapes in words, the batch apart where it is the same for all, the layout named where there are two."""
    layouts = rows.layout.nunique() > 1
    return [schema.shape_label(row) + (f"\n{row['layout']}" if layouts else "") for row in schema.records(rows)]


def _bars(axes: Axes, rows: pd.DataFrame, shapes: list[str], series: list[str]) -> None:
    for places, part in _drawn_bars(axes, rows, shapes, series, "ms_p50"):
        spread = np.abs(np.vstack([part.ms_p50 - part.ms_p20, part.ms_p80 - part.ms_p50]).astype(float))
        axes.errorbar(places, part.ms_p50, yerr=spread, fmt="none", ecolor="#333333", elinewidth=0.9, capsize=2)
    if rows.ms_p80.max() > WIDE_RANGE * rows.ms_p20.min():
        axes.set_yscale("log")
        axes.set_ylim(bottom=rows.ms_p20.min() / 2)
        _plain_logarithmic(axes.yaxis)


def _speedups(axes: Axes, rows: pd.DataFrame, shapes: list[str], series: list[str]) -> None:
    others = [name for name in series if name != BASELINE]
    for places, part in _drawn_bars(axes, rows, shapes, others, "speedup_vs_torch"):
        for place, value in zip(places, part.speedup_vs_torch):
            if pd.notna(value):
                axes.annotate(f"{value:.2f}", (place, 0), xytext=(0, 4), textcoords="offset points", ha="center",
                              fontsize=8, color="white")  # fmt: skip
    axes.axhline(1, color="#333333", linewidth=0.9)
    axes.margins(y=0.15)
    axes.set_xticks(range(len(shapes)), shapes, rotation=35, ha="right", rotation_mode="anchor", fontsize=8.5)


def _drawn_bars(
    axes: Axes, rows: pd.DataFrame, shapes: list[str], series: list[str], column: str
) -> Iterator[tuple[np.ndarray[Any, Any], pd.DataFrame]]:
    """Draw a bar of each series at each shape; where they stand, and the rows that they show."""
    step = 0.8 / max(len(series), 1)
    axes.grid(axis="x", visible=False)
    for i, name in enumerate(series):
        part = rows[rows.series == name].drop_duplicates("label").set_index("label").reindex(shapes)
        places = np.arange(len(shapes)) + (i - (len(series) - 1) / 2) * step
        axes.bar(places, part[column], 0.92 * step, label=name, color=colour(name.removesuffix(GRAPH)),
                 hatch="//" if name.endswith(GRAPH) else None, edgecolor="white", linewidth=0.4)  # fmt: skip
        yield places, part


def roofline(rows: pd.DataFrame) -> Figure:
    """Each measurement against what the device can do: by bytes where it computes little, by operations elsewhere."""
    products, memory_bound = rows[rows.flops > 0], rows[rows.flops == 0]
    draw = [(panel, part) for panel, part in ((_products, products), (_memory_bound, memory_bound)) if not part.empty]
    figure, axes = plt.subplots(
        1, len(draw), figsize=(11 if len(draw) == 2 else 7, 4.8), width_ratios=(3, 2)[: len(draw)], squeeze=False,
        layout="constrained",
    )  # fmt: skip
    markers = dict(zip(dict.fromkeys(rows.operator), "osD^vP*X"))
    for (panel, part), place in zip(draw, axes[0]):
        panel(place, part, markers)
    handles: list[Artist] = [plt.Line2D([], [], linestyle="", marker=markers[name], color="#666666", label=name)
               for name in dict.fromkeys(products.operator)]  # fmt: skip
    handles += [Patch(color=colour(name), label=name) for name in _ordered(rows.provider)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8))
    first = rows.iloc[0]
    figure.suptitle(f"roofline, {first['dtype']}", fontsize=11)
    return figure


def _products(axes: Axes, rows: pd.DataFrame, markers: dict[str, str]) -> None:
    peaks = _roofs(axes, rows)
    for (operator, provider), part in rows.groupby(["operator", "provider"], sort=False):
        look: Any = {"marker": markers[str(operator)], "color": colour(str(provider))}
        axes.scatter(part.flops / part.bytes, part.tflops, s=34, edgecolors="white", linewidths=0.5, zorder=3, **look)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte (least traffic)", ylabel="TFLOP/s")
    axes.set_title(f"products   (peak: {peaks})", fontsize=10)
    for axis in (axes.xaxis, axes.yaxis):
        _plain_logarithmic(axis)


def _memory_bound(axes: Axes, rows: pd.DataFrame, markers: dict[str, str]) -> None:
    names = list(dict.fromkeys(rows.operator + " " + rows["mode"]))
    for provider, part in rows.groupby("provider", sort=False):
        heights = [names.index(name) for name in part.operator + " " + part["mode"]]
        axes.scatter(100 * part.gbps / part.peak_gbps, heights, s=34, color=colour(str(provider)), edgecolors="white",
                     linewidths=0.5, zorder=3)  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="least traffic / time, in % of the peak bandwidth", title="memory-bound operators")
    axes.set_xlim(left=0)
    axes.margins(y=0.15)


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
