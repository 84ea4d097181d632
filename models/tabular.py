"""Rows of a CSV file to classify: missing values, standardisation and categories, fitted on the training part alone.

The file is as pandas.read_csv expects it: UTF-8, a first line of names, commas, a point in numbers. A cell that looks
like a number of another kind, 1_000 or 1,5 or 5%, is refused rather than guessed at.
"""

from __future__ import annotations

import codecs
import csv
import io
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset, TensorDataset

from models.data import Data, DataError, split

# what stands for no value in a column of numbers, in small letters: pandas' words, and "?" of the UCI repository
MISSING = {"", "?", "#n/a", "#n/a n/a", "#na", "-1.#ind", "-1.#qnan", "-nan", "1.#ind", "1.#qnan", "<na>", "n/a", "na",
           "nan", "none", "null"}  # fmt: skip
# a column of more different words than this is no category
MOST_CATEGORIES = 1000
LARGEST = torch.finfo(torch.float32).max


class _Table:
    """The file's cells as text without the spaces around it, by column, and the line each row begins on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[int] = []
        self.columns: dict[str, list[str]] = {}
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        # what follows a comma and spaces may be quoted: spaces count nowhere
        self._read(csv.reader(io.StringIO(self._text(raw), newline=""), strict=True, skipinitialspace=True))

    def _text(self, raw: bytes) -> str:
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            kind = " (UTF-16?)" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else ""
            raise DataError(
                f"{self.path}, line {line} is no UTF-8 text{kind}: byte {error.start} ({error.reason})"
            ) from error
        if "\0" in text:
            line = text.count("\n", 0, text.index("\0")) + 1
            raise DataError(f"{self.path}, line {line} is no UTF-8 text (UTF-16?): it has a byte 0")
        return text

    def _read(self, reader: Any) -> None:
        line = 1
        try:
            header = [name.strip() for name in next(reader, [])]
            self._check_names(header)
            cells: list[list[str]] = [[] for _ in header]
            line = reader.line_num + 1
            for found in reader:
                row = [text.strip() for text in found]
                if len(row) > 1 or any(row):  # no empty line
                    self._check_row(row, header, line)
                    self.lines.append(line)
                    for column, text in zip(cells, row):
                        column.append(text)
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{self.path}, line {line}: {error}") from error
        self.columns = dict(zip(header, cells))

    def _check_names(self, header: list[str]) -> None:
        if not any(header):
            raise DataError(f"{self.path} is empty: a first line with the columns' names is needed")
        if len(header) == 1:
            for separator in ";\t|":
                if separator in header[0]:
                    raise DataError(
                        f"{self.path}, line 1: the names are separated by {separator!r} as it seems, commas are needed "
                        f"(and a point in numbers)"
                    )
        seen: set[str] = set()
        for i, name in enumerate(header, start=1):
            if not name:
                raise DataError(f"{self.path}, line 1: column {i} has no name")
            if name in seen:
                raise DataError(f"{self.path}, line 1: two columns are called {name!r}")
            seen.add(name)

    def _check_row(self, row: list[str], header: list[str], line: int) -> None:
        if len(row) != len(header):
            raise DataError(f"{self.path}, line {line}: {len(row)} values, the first line names {len(header)} columns")
        if row == header:
            raise DataError(f"{self.path}, line {line}: the first line's names again, instead of values")

    def where(self, row: int, column: str) -> str:
        return f"{self.path}, line {self.lines[row]}, column {column!r}"

    def numbers(self, column: str) -> np.ndarray | None:
        """A column as float64, missing values as NaN; None where most of what is there are words.

        Raises DataError for a cell that is no number between numbers, or one as people write it and no program means.
        """
        values = np.full(len(self.lines), np.nan)
        odd: dict[int, str] = {}
        there = 0
        for row, text in enumerate(self.columns[column]):
            value = _number(text)
            if value is None and text.lower() in MISSING:
                continue
            there += 1
            if value is None:
                odd[row] = text
            else:
                values[row] = value
        similar = sum(count for text, count in Counter(odd.values()).items() if _looks_like_a_number(text))
        if 2 * (there - len(odd) + similar) <= there:
            return None
        for row, text in odd.items():
            raise DataError(
                f"{self.where(row, column)}: {text!r} is no finite number of digits, a point and an exponent "
                f"(--categorical {column!r} if the column holds categories)"
            )
        return values


def load(
    path: Path, target: str | None, categorical: Sequence[str], seed: int, val_fraction: float | None = None
) -> Data:
    """The rows of ``path`` with ``target`` (None: the last column) as the class; the other columns are numbers, or
    categories where most values are words (dates and True and False are) or ``categorical`` names them.

    A number is one to pandas: 01234 is 1234, so a column of postal codes belongs in ``categorical``, where the text
    counts as it stands. Missing numbers (empty, or one of ``MISSING``) become the column's median; in the target and
    in categories "None" and "NA" are names, and an empty category is one of its own. Numbers are standardised,
    categories one-hot. All of it is fitted on the training part: a category seen in validation only is no category.

    Raises DataError, with line and column where there is one, for a file that cannot be used.
    """
    table = _Table(path)
    target = target or list(table.columns)[-1]
    for name in (target, *categorical):
        if name not in table.columns:
            raise DataError(f"{path} has no column {name!r}; it has {', '.join(map(repr, table.columns))}")
    label, classes = _label(table, target)
    numbers, words = _features(table, target, set(categorical))
    if not numbers and not words:
        raise DataError(f"{path} has no column beside {target!r}")
    train, val = split(TensorDataset(torch.arange(len(label)), label), val_fraction, seed)
    if not (isinstance(train, Subset) and isinstance(val, Subset)):
        raise TypeError("a split must give subsets")
    inputs = _prepared(list(numbers.values()), list(words.values()), list(train.indices))
    for row, i in np.argwhere(~np.isfinite(inputs)):
        column = list(numbers)[i]  # a category is 0 or 1
        raise DataError(f"{table.where(row, column)}: {table.columns[column][row]!r} is too far from the others")
    whole = TensorDataset(torch.from_numpy(inputs), label)
    return Data(Subset(whole, train.indices), Subset(whole, val.indices), classes)


def _label(table: _Table, target: str) -> tuple[torch.Tensor, tuple[str, ...]]:
    there = table.columns[target]
    if "" in there:
        raise DataError(f"{table.where(there.index(''), target)}: the class is missing")
    values = {name: _number(name) for name in set(there)}
    classes = sorted(values, key=lambda name: (values[name] is None, values[name] or 0.0, name))
    if len(classes) < 2:
        found = f"there is only {classes[0]!r}" if classes else "there are no rows"
        raise DataError(f"{table.path}, column {target!r}: at least two classes are needed, {found}")
    _check_names_differ(table, target, classes)
    if 2 * len(classes) > len(there):
        raise DataError(f"{table.path}, column {target!r}: {len(classes)} classes in {len(there)} rows is too many")
    number = {name: i for i, name in enumerate(classes)}
    return torch.tensor([number[name] for name in there]), tuple(classes)


def _check_names_differ(table: _Table, target: str, classes: Sequence[str]) -> None:
    """Raise DataError where two classes are one value to pandas (1 and 1.0, True and TRUE) or to the eye."""
    first: dict[Any, str] = {}
    for name in classes:
        value: float | str | None = _number(name)
        if value is None:
            value = name.lower() if name.lower() in ("true", "false") else unicodedata.normalize("NFC", name)
        other = first.setdefault(value, name)
        if other != name:
            row = table.columns[target].index(name)
            raise DataError(
                f"{table.where(row, target)}: the class {name!r} is {other!r} in other lines: write it in one way"
            )


def _features(table: _Table, target: str, categorical: set[str]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The columns of numbers and those of categories."""
    numbers, words = {}, {}
    for name, cells in table.columns.items():
        if name == target:
            continue
        values = None if name in categorical else table.numbers(name)
        if values is not None:
            numbers[name] = values
            continue
        count = len(set(cells))
        if count > MOST_CATEGORIES:
            raise DataError(
                f"{table.path}, column {name!r}: {count} different values, at most {MOST_CATEGORIES} can be "
                f"categories; leave the column out of the file"
            )
        words[name] = np.array(cells, dtype=object)
    return numbers, words


def _prepared(numbers: list[np.ndarray], words: list[np.ndarray], train: list[int]) -> np.ndarray:
    """The network's inputs, columns of numbers first, by what the rows ``train`` hold."""
    try:
        from sklearn.impute import SimpleImputer
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import OneHotEncoder, StandardScaler
    except ImportError as error:
        raise DataError("--data csv:FILE needs scikit-learn: pip install scikit-learn") from error

    # a column without any value stays, as zeros: the network's width must not depend on the split
    scale = make_pipeline(SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler())
    one_hot = OneHotEncoder(handle_unknown="ignore", sparse_output=False, dtype=np.float32)
    parts = []
    for columns, prepare in ((numbers, scale), (words, one_hot)):
        if columns:
            cells = np.stack(columns, axis=1)
            prepare.fit(cells[train])
            with np.errstate(over="ignore"):
                parts.append(prepare.transform(cells).astype(np.float32))
    return np.concatenate(parts, axis=1)


def _number(text: str) -> float | None:
    """A finite number, within float32's range; of what float() takes not 1_000 and digits of all scripts, as pandas."""
    try:
        value = float(text)
    except ValueError:
        return None
    # a nan compares as no number within the range
    return value if abs(value) <= LARGEST and "_" not in text and text.isascii() else None


def _looks_like_a_number(text: str) -> bool:
    """Whether a person reads a number where _number reads none: 1,5 or 1 000 or 5% or 0x1F or a minus sign for -."""
    plain = unicodedata.normalize("NFKC", text).replace("\u2212", "-")
    if plain.count(".") > 1 or plain.rfind(",") > plain.find(".") > 0:  # 1.234.567 or 1.234,5
        whole, *rest = plain.split(",", 1)
        first, *groups = whole.split(".")
        if all(len(group) == 3 for group in groups):
            plain = first + "".join(groups + rest)
    kept = (c for c in plain if c not in ",_'%\u2019" and not c.isspace() and unicodedata.category(c) != "Sc")
    digits = "".join(kept)
    try:
        int(digits, 16) if digits.lower().lstrip("+-").startswith("0x") else float(digits)
    except ValueError:
        return False
    return True
