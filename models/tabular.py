"""Rows of a CSV file to classify: missing values, standardisation and categories, fitted on the training part alone."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset, TensorDataset

from models.data import Data, DataError, split
from models.preprocessing import Preprocessing
from models.table import DELIMITERS, Table, number

# a column of more different words than this is no category
MOST_CATEGORIES = 1000


def load(
    path: Path, target: str | None, categorical: Sequence[str], seed: int, val_fraction: float | None = None
) -> Data:
    """The rows of ``path`` with ``target`` (None: the last column) as the class; the other columns are numbers, or
    categories where most values are words (dates and True and False are) or ``categorical`` names them.

    A number is one to pandas: 01234 is 1234, so a column of postal codes belongs in ``categorical``, where the text
    counts as it stands. Missing numbers (empty, or one of ``models.table.MISSING``) become the column's median; in the
    target and in categories "None" and "NA" are names, and an empty category is one of its own. Numbers are
    standardised, categories one-hot. All of it is fitted on the training part: a category seen in validation only is no
    category. The result's ``preprocessing`` does the same to other rows.

    Raises DataError, with line and column where there is one, for a file that cannot be used.
    """
    table = Table(path, "--categorical {!r} if the column holds categories")
    first, *others = table.columns
    if not others:
        separators = ", ".join(DELIMITERS.values())
        raise DataError(f"{path} has no column beside {first!r}; what separates columns is one of: {separators}")
    target = target or others[-1]
    for name in (target, *categorical):
        if name not in table.columns:
            raise DataError(f"{path} has no column {name!r}; it has {', '.join(map(repr, table.columns))}")
    label, classes = _label(table, target)
    numbers, words = _features(table, target, set(categorical))
    train, val = split(TensorDataset(torch.arange(len(label)), label), val_fraction, seed)
    if not (isinstance(train, Subset) and isinstance(val, Subset)):
        raise TypeError("a split must give subsets")
    preprocessing = Preprocessing.fit(table, target, numbers, words, train.indices)
    whole = TensorDataset(torch.from_numpy(preprocessing.inputs(table)), label)
    return Data(
        Subset(whole, train.indices), Subset(whole, val.indices), classes, preprocessing=preprocessing.to_dict()
    )


def _label(table: Table, target: str) -> tuple[torch.Tensor, tuple[str, ...]]:
    there = table.columns[target]
    if "" in there:
        raise DataError(f"{table.where(there.index(''), target)}: the class is missing")
    values = {name: number(name) for name in set(there)}
    classes = sorted(values, key=lambda name: (values[name] is None, values[name] or 0.0, name))
    if len(classes) < 2:
        found = f"there is only {classes[0]!r}" if classes else "there are no rows"
        raise DataError(f"{table.path}, column {target!r}: at least two classes are needed, {found}")
    _check_names_differ(table, target, classes)
    if 2 * len(classes) > len(there):
        raise DataError(f"{table.path}, column {target!r}: {len(classes)} classes in {len(there)} rows is too many")
    place = {name: i for i, name in enumerate(classes)}
    return torch.tensor([place[name] for name in there]), tuple(classes)


def _check_names_differ(table: Table, target: str, classes: Sequence[str]) -> None:
    """Raise DataError where two classes are one value to pandas (1 and 1.0, True and TRUE) or to the eye."""
    first: dict[Any, str] = {}
    for name in classes:
        value: float | str | None = number(name)
        if value is None:
            value = name.lower() if name.lower() in ("true", "false") else unicodedata.normalize("NFC", name)
        other = first.setdefault(value, name)
        if other != name:
            row = table.columns[target].index(name)
            raise DataError(
                f"{table.where(row, target)}: the class {name!r} is {other!r} in other lines: write it in one way"
            )


def _features(table: Table, target: str, categorical: set[str]) -> tuple[list[str], list[str]]:
    """The names of the columns of numbers and of those of categories."""
    numbers, words = [], []
    for name, cells in table.columns.items():
        if name == target:
            continue
        if name not in categorical and table.holds_numbers(name):
            numbers.append(name)
            continue
        count = len(set(cells))
        if count > MOST_CATEGORIES:
            raise DataError(
                f"{table.path}, column {name!r}: {count} different values, at most {MOST_CATEGORIES} can be "
                f"categories; leave the column out of the file"
            )
        words.append(name)
    return numbers, words
