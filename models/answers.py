"""Answers for images and rows, and how they are written: for people, as CSV, as JSON."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple


class Answer(NamedTuple):
    """The likeliest classes of an image, or of the row that begins on a line of a file, with their probabilities."""

    file: str
    line: int | None
    likeliest: list[tuple[str, float]]


def names(top: int, rows: bool) -> list[str]:
    """Of the columns, or of the fields of a JSON object: of the second likeliest class they end in _2, and so on."""
    numbered = [f"{name}_{i}" if i > 1 else name for i in range(1, top + 1) for name in ("class", "probability")]
    return ["file", *(["line"] if rows else []), *numbered]


def _values(answer: Answer) -> list[str | int | float]:
    where = [answer.file] if answer.line is None else [answer.file, answer.line]
    # six digits: what is behind them in float32 depends on the batch
    return [*where, *itertools.chain(*((name, float(f"{share:.6g}")) for name, share in answer.likeliest))]


def _text(answers: Iterable[Answer], names: list[str]) -> Iterator[str]:
    for file, line, likeliest in answers:
        shares = ", ".join(f"{name} {share:.2%}" for name, share in likeliest)
        yield f"{file}{'' if line is None else f', line {line}'}: {shares}\n"


def _csv(answers: Iterable[Answer], names: list[str]) -> Iterator[str]:
    rows: Iterator[Sequence[object]] = map(_values, answers)
    for row in itertools.chain([names], rows):
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(row)
        yield line.getvalue()


def _json(answers: Iterable[Answer], names: list[str]) -> Iterator[str]:
    before = "[\n"
    for answer in answers:
        yield before + json.dumps(dict(zip(names, _values(answer))), ensure_ascii=False)
        before = ",\n"
    yield "[]\n" if before == "[\n" else "\n]\n"


# from answers and the names of their parts to pieces of text
FORMATS: dict[str, Callable[[Iterable[Answer], list[str]], Iterator[str]]] = {
    "text": _text,
    "csv": _csv,
    "json": _json,
}
