"""A CSV file as columns of text, and what of it are numbers: for training and for prediction alike.

The file is UTF-8, with a first line of names; commas, semicolons, tabs or "|" between its columns, recognised by the
first lines; a point in numbers. A cell that looks like a number of another kind, 1,5 or 5%, is refused rather than
guessed at.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.data import DataError

# what stands for no value in a column of numbers, in small letters: pandas' words, and "?" of the UCI repository
MISSING = {"", "?", "#n/a", "#n/a n/a", "#na", "-1.#ind", "-1.#qnan", "-nan", "1.#ind", "1.#qnan", "<na>", "n/a", "na",
           "nan", "none", "null"}  # fmt: skip
LARGEST = torch.finfo(torch.float32).max


# what may separate the columns, likeliest first, and how many lines are looked at to see which does
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
LINES = 50


class Table:
    """The file's cells as text without the spaces around it, by column, and the line each row begins on.

    Raises DataError, with line and column where there is one, for a file that cannot be used.
    """

    def __init__(self, path: Path, remedy: str = "") -> None:
        """``remedy``: what to do about a column of numbers with a word in it, with {!r} where its name belongs."""
        self.path, self.remedy = path, remedy
        self.delimiter = ","
        self.lines: list[int] = []
        self.columns: dict[str, list[str]] = {}
        self._parsed: dict[str, tuple[np.ndarray, dict[int, str]]] = {}
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        file = io.StringIO(self._text(raw), newline="")
        self.delimiter = _delimiter(file)
        self._read(_reader(file, self.delimiter))

    def __len__(self) -> int:
        return len(self.lines)

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
        seen: set[str] = set()
        for i, name in enumerate(header, start=1):
            if not name:
                raise DataError(f"{self.path}, line 1: column {i} has no name")
            if name in seen:
                raise DataError(f"{self.path}, line 1: two columns are called {name!r}")
            seen.add(name)

    def _check_row(self, row: list[str], header: list[str], line: int) -> None:
        if len(row) != len(header):
            raise DataError(
                f"{self.path}, line {line}: {len(row)} values, the first line names {len(header)} columns "
                f"(separated by {DELIMITERS[self.delimiter]})"
            )
        if row == header:
            raise DataError(f"{self.path}, line {line}: the first line's names again, instead of values")

    def where(self, row: int, column: str) -> str:
        return f"{self.path}, line {self.lines[row]}, column {column!r}"

    def holds_numbers(self, column: str) -> bool:
        """Whether most of what is in a column are numbers, or are written as one that people take for a number."""
        values, odd = self._numbers(column)
        plain = np.count_nonzero(~np.isnan(values))
        # 1_000 is a number between numbers; in a column of such texts it is an identifier
        similar = sum(
            count
            for text, count in Counter(odd.values()).items()
            if (plain or "_" not in text) and _looks_like_a_number(text)
        )
        return bool(plain + similar > len(odd) - similar)

    def numbers(self, column: str) -> np.ndarray:
        """A column as float64, missing values as NaN. Raises DataError for a cell that is no number."""
        values, odd = self._numbers(column)
        for row, text in odd.items():
            raise DataError(
                f"{self.where(row, column)}: {text!r} is no finite number of digits, a point and an exponent"
                f"{self._advice(column, text)}"
            )
        return values

    def _numbers(self, column: str) -> tuple[np.ndarray, dict[int, str]]:
        """A column's numbers, NaN where there is none, and by row what is neither a number nor missing."""
        if column not in self._parsed:
            values = np.full(len(self), np.nan)
            odd: dict[int, str] = {}
            for row, text in enumerate(self.columns[column]):
                value = number(text)
                if value is not None:
                    values[row] = value
                elif text.lower() not in MISSING:
                    odd[row] = text
            self._parsed[column] = values, odd
        return self._parsed[column]

    def _advice(self, column: str, text: str) -> str:
        if self.delimiter != "," and re.fullmatch(r"[+-]?[\d.]*,\d+", text):
            return (
                f"; pandas.read_csv(FILE, sep={self.delimiter!r}, decimal=',').to_csv(OTHER, index=False) "
                f"makes points of decimal commas"
            )
        return f" ({self.remedy.format(column)})" if self.remedy else ""


def _reader(file: io.StringIO, delimiter: str) -> Any:
    # what follows a delimiter and spaces may be quoted: spaces count nowhere
    return csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=True)


def _delimiter(file: io.StringIO) -> str:
    """What cuts the first line into several names: of such the one that cuts the next lines alike, and into most."""
    found = {}
    for delimiter in DELIMITERS:
        lengths: list[int] = []
        alike = True
        try:
            rows = (row for row in _reader(file, delimiter) if any(map(str.strip, row)))
            for row in itertools.islice(rows, LINES):
                lengths.append(len(row))
                alike = alike and len(row) == lengths[0]
        except csv.Error:  # told when the file is read for good
            alike = False
        file.seek(0)
        if lengths and lengths[0] > 1:
            found[delimiter] = (alike, lengths[0])
    return max(found, key=lambda delimiter: found[delimiter], default=",")


def number(text: str) -> float | None:
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
    if "_" in plain and not re.fullmatch(r"[+-]?\d{1,3}(_\d{3})+(\.\d*)?", plain):  # 1_10 is an identifier
        return False
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
