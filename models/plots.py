"""Pictures of a run: curves of loss and accuracy, the confusion matrix, how large gradients are from layer to layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from models.history import Row


def _shown(name: str, longest: int = 30) -> str:
    """A name on one line that leaves room for the picture; its text is to be drawn with parse_math=False, for
    cost_$10^$ is no formula."""
    line = "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in name)
    return line if len(line) <= longest else f"{line[: longest - 1]}\u2026"


def _figure(title: str, **options: Any) -> Any:
    # pyplot would choose a backend for the whole process and keep the figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", **options)
    FigureCanvasAgg(figure)
    figure.suptitle(_shown(title, 120), parse_math=False)
    return figure


def draw_curves(rows: list[Row], path: Path, title: str) -> None:
    """Save a picture of loss and accuracy over the epochs, training and validation."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = _figure(title, figsize=(10, 4))
    loss, accuracy = figure.subplots(1, 2)
    epochs = [row.epoch for row in rows]
    marker = "o" if len(rows) <= 30 else None
    for axes, kind in ((loss, "loss"), (accuracy, "acc")):
        for split, label, colour in (("train", "training", "tab:blue"), ("val", "validation", "tab:orange")):
            values = [getattr(row, f"{split}_{kind}") for row in rows]
            axes.plot(epochs, values, label=label, color=colour, marker=marker, markersize=4)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(0.5, len(rows) + 0.5)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    loss.set_ylabel("cross-entropy loss")
    loss.set_ylim(0, 1.05 * max(max(row.train_loss, row.val_loss) for row in rows))
    accuracy.set_ylabel("accuracy")
    accuracy.set_ylim(top=1.02)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.savefig(path, dpi=150)


def draw_confusion(counts: Tensor, classes: Sequence[str], path: Path, title: str) -> None:
    """Save a picture of ``counts`` [true class, answer]: shades by row, numbers where there is room for them."""
    size = len(classes)
    side = min(max(4.0, 0.5 * size + 1.5), 16.0)
    figure = _figure(title, figsize=(side, side))
    axes = figure.subplots()
    shares = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("answer")
    axes.set_ylabel("true class")
    if size <= 30:
        turned = {"rotation": 45, "ha": "right"} if max(map(len, classes)) > 2 else {}
        names = [_shown(name) for name in classes]
        axes.set_xticks(range(size), names, parse_math=False, **turned)
        axes.set_yticks(range(size), names, parse_math=False)
    if size <= 20:
        for i, j in counts.nonzero().tolist():
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, f"{int(counts[i, j])}", ha="center", va="center", color=colour, fontsize=9)
    figure.savefig(path, dpi=150)


def draw_gradients(flow: dict[str, tuple[float, float]], path: Path, title: str) -> None:
    """Save a picture of ``flow``, layer -> (mean, largest) magnitude of its weight's gradient, from input to output."""
    figure = _figure(title, figsize=(max(6.0, 0.45 * len(flow) + 2), 4.5))
    axes = figure.subplots()
    layers = range(len(flow))
    means, largest = zip(*flow.values())
    axes.bar(layers, largest, color="tab:blue", alpha=0.35, label="largest")
    axes.bar(layers, means, color="tab:blue", label="mean")
    axes.set_yscale("log")
    axes.set_xticks(layers, [_shown(name, 60) for name in flow], rotation=45, ha="right", parse_math=False)
    axes.set_ylabel("magnitude of the gradient")
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
