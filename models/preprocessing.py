"""How a table's columns become a network's inputs: fitted by training, kept in its checkpoint, applied by both.

The checkpoint has it as numbers, strings and lists: what stands for a missing number, mean and scale of each column of
numbers, the names of each column of categories.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from models.contents import mapping, must
from models.data import DataError
from models.table import Table


@dataclass(frozen=True)
class Numbers:
    """A column of numbers, one input: (number - mean) / scale; the median where the number is missing."""

    name: str
    median: float
    mean: float
    scale: float

    def inputs(self, table: Table) -> np.ndarray:
        values = table.numbers(self.name)
        values = np.where(np.isnan(values), self.median, values)
        with np.errstate(over="ignore"):
            scaled = ((values - self.mean) / self.scale).astype(np.float32)
        for row in np.flatnonzero(~np.isfinite(scaled)).tolist():
            text = table.columns[self.name][row]
            raise DataError(f"{table.where(row, self.name)}: {text!r} is too far from the others")
        return scaled[:, None]


@dataclass(frozen=True)
class Categories:
    """A column of words, an input for each that training had: 1 for the row's own, 0 for the others."""

    name: str
    categories: tuple[str, ...]

    def inputs(self, table: Table) -> np.ndarray:
        place = {text: i for i, text in enumerate(self.categories)}
        found = np.array([place.get(text, -1) for text in table.columns[self.name]], dtype=np.int64)
        return (found[:, None] == np.arange(len(place))).astype(np.float32)


@dataclass(frozen=True)
class Preprocessing:
    """All columns in the order of the inputs, and the name of the one that held the class."""

    target: str
    columns: tuple[Numbers | Categories, ...]

    @classmethod
    def fit(
        cls, table: Table, target: str, numbers: Sequence[str], words: Sequence[str], train: Sequence[int]
    ) -> Preprocessing:
        """By what the rows ``train`` hold in the columns of these names. Raises DataError without scikit-learn."""
        try:
            from sklearn.impute import SimpleImputer
            from sklearn.preprocessing import StandardScaler
        except ImportError as error:
            raise DataError("--data csv:FILE needs scikit-learn: pip install scikit-learn") from error

        columns: list[Numbers | Categories] = []
        if numbers:
            cells = np.stack([table.numbers(name) for name in numbers], axis=1)[train]
            # a column without any value stays, as zeros: the network's width must not depend on the split
            medians = SimpleImputer(strategy="median", keep_empty_features=True).fit(cells)
            scale = StandardScaler().fit(medians.transform(cells))
            fitted = zip(numbers, *(values.tolist() for values in (medians.statistics_, scale.mean_, scale.scale_)))
            columns += (Numbers(*column) for column in fitted)
        for name in words:
            texts = table.columns[name]
            columns.append(Categories(name, tuple(sorted({texts[row] for row in train}))))
        return cls(target, tuple(columns))

    def inputs(self, table: Table) -> np.ndarray:
        """The network's inputs (rows, features) of float32. Raises DataError for a column that is not there, and for a
        cell that is no number where all were in training."""
        lacking = [column.name for column in self.columns if column.name not in table.columns]
        if lacking:
            there = ", ".join(map(repr, table.columns))
            raise DataError(f"{table.path} lacks {_columns(lacking)} of the rows trained on; it has {there}")
        return np.concatenate([column.inputs(table) for column in self.columns], axis=1)

    def notes(self, table: Table) -> list[str]:
        """What of a table does not count: columns, and categories that training had not; a line each."""
        found = []
        known = {self.target, *(column.name for column in self.columns)}
        strange = [name for name in table.columns if name not in known]
        if strange:
            found.append(f"{table.path}: {_columns(strange)} not among those trained on, not used")
        for column in self.columns:
            if isinstance(column, Categories):
                unknown = Counter(table.columns[column.name])
                for text in column.categories:
                    del unknown[text]
                if unknown:
                    found.append(
                        f"{table.path}, column {column.name!r}: {unknown.total()} of {len(table)} rows are of a "
                        f"category that training had not, such as {next(iter(unknown))!r}"
                    )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dictionaries, for checkpoints."""
        columns = [asdict(column) for column in self.columns]
        for column in columns:
            if "categories" in column:
                column["categories"] = list(column["categories"])
        return {"target": self.target, "columns": columns}

    @classmethod
    def from_dict(cls, saved: Any, features: int) -> Preprocessing:
        """Of what :meth:`to_dict` gave, with so many inputs. Raises CheckpointError for anything else."""
        where = "preprocessing"
        target: Any = mapping(saved, where).get("target")
        columns = saved.get("columns")
        must(type(target) is str, f"{where}: target", "a column's name", target)
        must(isinstance(columns, list) and len(columns) > 0, f"{where}: columns", "a list of columns", columns)
        found = tuple(_column(column, f"{where}: columns[{i}]") for i, column in enumerate(columns))
        names = [column.name for column in found]
        must(len({target, *names}) == len(names) + 1, where, "of columns that differ in name", [target, *names])
        inputs = sum(len(column.categories) if isinstance(column, Categories) else 1 for column in found)
        must(inputs == features, where, f"of as many inputs as the network has, {features}", inputs)
        return cls(target, found)


def _column(saved: Any, where: str) -> Numbers | Categories:
    name: Any = mapping(saved, where).get("name")
    must(type(name) is str, f"{where}: name", "a column's name", name)
    if "categories" in saved:
        texts = saved["categories"]
        good = isinstance(texts, list) and all(type(text) is str for text in texts) and len(set(texts)) == len(texts)
        must(good and len(texts) > 0, f"{where}: categories", "a list of names that differ", texts)
        return Categories(name, tuple(texts))
    numbers = [saved.get(key) for key in ("median", "mean", "scale")]
    good = all(type(value) is float and math.isfinite(value) for value in numbers) and numbers[2] > 0
    must(good, where, "a median, a mean and a scale above 0, or categories", numbers)
    return Numbers(name, *numbers)


def _columns(names: Sequence[str]) -> str:
    return f"the column{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}"
