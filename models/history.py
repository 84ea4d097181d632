"""What training measured, epoch by epoch: a CSV file that grows as it happens, and a picture of its curves."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """One epoch: mean losses, and accuracies as fractions of 1."""

    epoch: int
    train_loss: float
    val_loss: float
    train_acc: float
    val_acc: float


class History:
    """The epochs so far. Each is written to ``path`` when it is added, so that a killed run keeps what it measured."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        with path.open("w", newline="") as file:
            csv.writer(file).writerow(Row._fields)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(row)


def draw_curves(rows: list[Row], path: Path, title: str) -> None:
    """Save a picture of loss and accuracy over the epochs, training and validation."""
    # pyplot would choose a backend for the whole process and keep the figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
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
