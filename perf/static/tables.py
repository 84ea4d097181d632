"""The tables that commands count or compile: of rows, as text and as a CSV."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from perf import schema
from perf.schema import Column


def of_rows(rows: Iterable[Mapping[str, Any]], columns: Sequence[Column]) -> pd.DataFrame:
    """A table with these columns; a whole number may be missing."""
    frame = pd.DataFrame(list(rows), columns=[column.name for column in columns])
    return frame.astype({column.name: "Int64" for column in columns if column.kind == "whole"})


def as_text(frame: pd.DataFrame, index: bool = True) -> str:
    """What is printed: nothing where there is no value."""
    return frame.astype(object).where(frame.notna(), "").to_string(index=index)


def write(frame: pd.DataFrame, path: Path | None) -> None:
    """Over an older file, if one was asked for. Raises OSError."""
    if path is not None:
        schema.write(frame, path)
