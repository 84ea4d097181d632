"""What training measured, epoch by epoch: a CSV file that grows as it happens."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One epoch: mean losses, and accuracies as fractions of 1."""

    epoch: int
    train_loss: float
    val_loss: float
    train_acc: float
    val_acc: float

    def show(self, board: Any) -> None:
        """Write the epoch to TensorBoard, by its SummaryWriter."""
        for split in ("train", "val"):
            board.add_scalar(f"loss/{split}", getattr(self, f"{split}_loss"), self.epoch)
            board.add_scalar(f"accuracy/{split}", getattr(self, f"{split}_acc"), self.epoch)
        board.flush()


class History:
    """The epochs so far. Each is in ``path`` as soon as it is added, so that a killed run keeps what it measured."""

    def __init__(self, path: Path, write: bool = True) -> None:
        self.path, self._write = path, write
        self.rows: list[Row] = []

    def start(self, rows: Sequence[Row] = ()) -> None:
        """Begin the file anew, with the rows of a run that goes on."""
        self.rows = list(rows)
        self._append("w", [Row._fields, *self.rows])

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._append("a", [row])

    def _append(self, mode: str, rows: Sequence[Sequence[object]]) -> None:
        if not self._write:
            return
        try:
            with self.path.open(mode, newline="") as file:
                csv.writer(file).writerows(rows)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # a full disk's does not say which file
            raise OSError(error.errno, error.strerror, str(self.path)) from error
