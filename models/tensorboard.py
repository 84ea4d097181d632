"""The history for TensorBoard."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from models.history import Row


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[Callable[[Row], None]]:
    """Gives a function that writes an epoch's losses and accuracies to ``directory``. TensorBoard must be installed."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(directory))

    def write(row: Row) -> None:
        for split in ("train", "val"):
            writer.add_scalar(f"loss/{split}", getattr(row, f"{split}_loss"), row.epoch)
            writer.add_scalar(f"accuracy/{split}", getattr(row, f"{split}_acc"), row.epoch)
        writer.flush()

    try:
        yield write
    finally:
        writer.close()
