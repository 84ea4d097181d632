"""The history file and the picture of its curves."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from PIL import Image

from models.history import History, Row
from models.plots import draw_curves

pytestmark = pytest.mark.gate("torch")


def test_csv_grows_epoch_by_epoch(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    history = History(path)
    history.start()
    assert path.read_text().strip() == "epoch,train_loss,val_loss,train_acc,val_acc"
    rows = [Row(1, 2.0, 1.5, 0.25, 1 / 3), Row(2, 1.0, 0.1 + 0.2, 0.5, 0.75)]
    for count, row in enumerate(rows, start=1):
        history.add(row)
        with path.open(newline="") as file:
            read = list(csv.DictReader(file))
        assert [[float(v) for v in r.values()] for r in read] == [list(r) for r in rows[:count]]
    assert [r["epoch"] for r in read] == ["1", "2"]
    assert history.rows == rows


def test_a_new_run_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    History(path).add(Row(1, 2.0, 1.5, 0.25, 0.3))
    History(path).start()
    assert len(path.read_text().splitlines()) == 1


def test_a_run_that_goes_on_keeps_its_rows_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    rows = [Row(e, 2.0 / e, 1.5, 0.25, 1 / 3) for e in range(1, 4)]
    first = History(path)
    first.start()
    for row in rows:
        first.add(row)
    text = path.read_text()
    again = History(path)
    again.start(rows[:2])  # the third one was measured after the checkpoint
    again.add(rows[2])
    assert path.read_text() == text
    History(tmp_path / "elsewhere.csv", write=False).add(rows[0])
    assert not (tmp_path / "elsewhere.csv").exists()


@pytest.mark.parametrize("epochs", [1, 40])
def test_curves(tmp_path: Path, epochs: int) -> None:
    rows = [Row(e, 2.0 / e, 2.5 / e, 1 - 0.9 / e, 1 - 0.95 / e) for e in range(1, epochs + 1)]
    path = tmp_path / "curves.png"
    draw_curves(rows, path, "fused CNN on digits")
    with Image.open(path) as picture:
        picture.verify()
        assert picture.format == "PNG"
        assert picture.width > 2 * picture.height  # two panels
    with Image.open(path) as picture:
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24) or []) > 20
