"""Rows of a CSV file to classify: missing values, standardisation and categories, fitted on the training part alone."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset, TensorDataset

from models.data import Data, DataError, split

MISSING = {"", "?", "na", "n/a", "nan", "null", "none"}
# a column of more different words than this is no category
MOST_CATEGORIES = 1000


class _Table:
    """The file's cells as text, by column, and the line each row stands on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[int] = []
        self.columns: dict[str, list[str | None]] = {}
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                self._read(csv.reader(file, strict=True))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is no UTF-8 text: byte {error.start} ({error.reason})") from error

    def _read(self, reader: Any) -> None:
        try:
            header = [name.strip() for name in next(reader, [])]
            if not header:
                raise DataError(f"{self.path} is empty: a first line with the columns' names is needed")
            for i, name in enumerate(header, start=1):
                if not name:
                    raise DataError(f"{self.path}, line 1: column {i} has no name")
                if header.index(name) != i - 1:
                    raise DataError(f"{self.path}, line 1: two columns are called {name!r}")
            cells: list[list[str | None]] = [[] for _ in header]
            for row in reader:
                if not row:  # an empty line
                    continue
                if len(row) != len(header):
                    raise DataError(
                        f"{self.path}, line {reader.line_num}: {len(row)} values, the first line names "
                        f"{len(header)} columns"
                    )
                self.lines.append(reader.line_num)
                for column, text in zip(cells, row):
                    column.append(None if text.strip().lower() in MISSING else text.strip())
        except csv.Error as error:
            raise DataError(f"{self.path}, line {reader.line_num}: {error}") from error
        self.columns = dict(zip(header, cells))

    def where(self, row: int, column: str) -> str:
        return f"{self.path}, line {self.lines[row]}, column {column!r}"

    def numbers(self, column: str) -> np.ndarray:
        """A column as float64, missing values as NaN."""
        values = np.full(len(self.lines), np.nan)
        for row, text in enumerate(self.columns[column]):
            if text is None:
                continue
            value = _number(text)
            if value is None or not math.isfinite(value):
                raise DataError(
                    f"{self.where(row, column)}: {text!r} is no finite number, as the column's others are "
                    f"(--categorical {column!r} if it holds categories)"
                )
            values[row] = value
        return values

    def is_numeric(self, column: str) -> bool:
        """Whether most of what is there are numbers."""
        there = [text for text in self.columns[column] if text is not None]
        return 2 * sum(_number(text) is not None for text in there) > len(there)


def load(
    path: Path, target: str | None, categorical: Sequence[str], seed: int, val_fraction: float | None = None
) -> Data:
    """The rows of ``path`` with ``target`` (None: the last column) as the class; the other columns are numbers, or
    categories where most values are no numbers or ``categorical`` names them.

    Missing numbers become the column's median, missing categories a category of their own; numbers are standardised,
    categories one-hot. All of it is fitted on the training part: a category seen in validation only is no category.

    Raises DataError, with line and column where there is one, for a file that cannot be used.
    """
    try:
        import pandas
    except ImportError as error:
        raise DataError("--data csv:FILE needs pandas and scikit-learn: pip install pandas scikit-learn") from error
    table = _Table(path)
    target = target or list(table.columns)[-1]
    for name in (target, *categorical):
        if name not in table.columns:
            raise DataError(f"{path} has no column {name!r}; it has {', '.join(map(repr, table.columns))}")
    label, classes = _label(table, target)
    features = [name for name in table.columns if name != target]
    if not features:
        raise DataError(f"{path} has no column beside {target!r}")
    numeric = [name for name in features if name not in categorical and table.is_numeric(name)]
    words = [name for name in features if name not in numeric]
    frame = pandas.DataFrame(
        {name: table.numbers(name) if name in numeric else _filled(table, name) for name in features}
    )
    rows = TensorDataset(torch.arange(len(label)), label)
    train, val = split(rows, val_fraction, seed)
    if not (isinstance(train, Subset) and isinstance(val, Subset)):
        raise TypeError("a split must give subsets")
    prepare = _preprocessing(numeric, words)
    prepare.fit(frame.iloc[list(train.indices)])
    inputs = torch.from_numpy(np.asarray(prepare.transform(frame), dtype=np.float32))
    whole = TensorDataset(inputs, label)
    return Data(Subset(whole, train.indices), Subset(whole, val.indices), classes)


def _label(table: _Table, target: str) -> tuple[torch.Tensor, tuple[str, ...]]:
    there: list[str] = []
    for row, text in enumerate(table.columns[target]):
        if text is None:
            raise DataError(f"{table.where(row, target)}: the class is missing")
        there.append(text)
    classes = sorted(set(there), key=lambda name: (_number(name) is None, _number(name) or 0.0, name))
    if len(classes) < 2:
        found = f"there is only {classes[0]!r}" if classes else "there are no rows"
        raise DataError(f"{table.path}, column {target!r}: at least two classes are needed, {found}")
    if 2 * len(classes) > len(there):
        raise DataError(f"{table.path}, column {target!r}: {len(classes)} classes in {len(there)} rows is too many")
    number = {name: i for i, name in enumerate(classes)}
    return torch.tensor([number[name] for name in there]), tuple(classes)


def _filled(table: _Table, column: str) -> list[str]:
    """A column of categories; a missing one is a category of its own."""
    cells = ["" if text is None else text for text in table.columns[column]]
    count = len(set(cells))
    if count > MOST_CATEGORIES:
        raise DataError(f"{table.path}, column {column!r}: {count} different values, at most {MOST_CATEGORIES} can be "
                        f"categories; leave the column out of the file")  # fmt: skip
    return cells


def _preprocessing(numeric: list[str], words: list[str]) -> Any:
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    # a column without any value stays, as zeros: the network's width must not depend on the split
    numbers = make_pipeline(SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler())
    one_hot = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    return ColumnTransformer([("numbers", numbers, numeric), ("words", one_hot, words)])


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
