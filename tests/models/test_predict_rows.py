"""A model of a table's rows answers for other files: by what its checkpoint says of the columns, as in training."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch

from models import checkpoint, data, plots, predict, tabular, train
from models.contents import CheckpointError
from models.preprocessing import Preprocessing
from models.table import Table

pytestmark = pytest.mark.gate("torch")

Rows = list[dict[str, str]]


def _written(path: Path, rows: Rows, delimiter: str = ",") -> Path:
    pandas.DataFrame(rows).to_csv(path, index=False, sep=delimiter)
    return path


def _train(table: Path, out: Path, *options: str) -> int:
    arguments = ["--data", f"csv:{table}", "--target", "kind", "--device", "cpu", "--out", str(out), *options]
    return train.main(arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A trained model, its directory and table, and the confusion matrix that training ended with."""
    directory = tmp_path_factory.mktemp("run")
    random = np.random.default_rng(0)
    rows = []
    for i in range(200):
        size = "NA" if i % 11 == 3 else f"{1e6 + random.standard_normal() + i % 2:.3f}"
        rows.append({"size": size, "kind": ("None", "NA")[i % 2], "colour": ("red", "green", "")[i % 3],
                     "code": f"1_{random.integers(4)}", "same": "7"})  # fmt: skip
    kept: dict[str, Any] = {"directory": directory, "rows": rows, "table": _written(directory / "rows.csv", rows)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw_curves", lambda *args: None)
        patch.setattr(plots, "draw_confusion", lambda counts, *args: kept.update(confusion=counts.clone()))
        assert _train(kept["table"], directory, "--epochs", "3") == 0
    return kept


@pytest.fixture
def trained(run: dict[str, Any], tmp_path: Path) -> Path:
    """Its checkpoint, to be spoiled."""
    return Path(shutil.copy(run["directory"] / checkpoint.NAME, tmp_path / checkpoint.NAME))


def _answers(path: Path, table: Path, *options: str, status: int = 0) -> pandas.DataFrame:
    out = table.with_name("answers.csv")
    assert predict.main([str(path), str(table), "--out", str(out), *options]) == status
    return pandas.read_csv(out, keep_default_na=False)


def test_answers_are_those_of_the_validation(run: dict[str, Any], trained: Path) -> None:
    """The whole training file is answered for; its validation rows, counted, are the trainer's own confusion matrix."""
    found = _answers(trained, run["table"], "--top", "2")
    assert list(found) == ["file", "line", "class", "probability", "class_2", "probability_2"]
    assert list(found["line"]) == list(range(2, 202))
    assert np.allclose(found["probability"] + found["probability_2"], 1, atol=1e-5)
    parts = tabular.load(run["table"], "kind", [], seed=0)
    counts = torch.zeros(2, 2, dtype=torch.int64)
    for row in parts.val.indices:  # type: ignore[attr-defined]
        true, answer = run["rows"][row]["kind"], found["class"][row]
        counts[parts.classes.index(true), parts.classes.index(answer)] += 1
    assert counts.sum() == 40
    assert torch.equal(counts, run["confusion"].cpu())
    assert (counts > 0).all(), "both classes, both right and wrong"


def test_the_networks_inputs_are_those_of_training(run: dict[str, Any], trained: Path) -> None:
    """Bit for bit, from a checkpoint that holds nothing but text and numbers."""
    parts = tabular.load(run["table"], "kind", [], seed=0)
    saved = checkpoint.load(trained)["preprocessing"]
    assert saved == parts.preprocessing
    kinds = {type(value) for column in saved["columns"] for value in column.values()}
    assert kinds == {str, float, list}
    again = Preprocessing.from_dict(saved, 9)
    whole = parts.train.dataset  # type: ignore[attr-defined]
    assert torch.equal(torch.from_numpy(again.inputs(Table(run["table"]))), whole.tensors[0])
    assert again.to_dict() == saved


def test_other_files(run: dict[str, Any], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the class, in another order, with other delimiters; columns and categories that training had not."""
    expected = _answers(trained, run["table"]).drop(columns="file")
    bare = [{key: row[key] for key in ("code", "colour", "same", "size")} for row in run["rows"]]
    for delimiter in ",;\t|":
        found = _answers(trained, _written(tmp_path / "bare.csv", bare, delimiter))
        pandas.testing.assert_frame_equal(found.drop(columns="file"), expected)
    assert not capsys.readouterr().err
    more = [{**row, "note": "x", "id": "1"} for row in bare]
    found = _answers(trained, _written(tmp_path / "more.csv", more))
    pandas.testing.assert_frame_equal(found.drop(columns="file"), expected)
    (line,) = capsys.readouterr().err.splitlines()
    note = f"python -m models.predict: note: {tmp_path / 'more.csv'}"
    assert line == f"{note}: the columns 'note', 'id' not among those trained on, not used"
    more = [{**row, "colour": "blue" if i < 5 else row["colour"]} for i, row in enumerate(bare)]
    _answers(trained, _written(tmp_path / "more.csv", more))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("column 'colour': 5 of 200 rows are of a category that training had not, such as 'blue'")


def test_what_is_missing_or_unknown(run: dict[str, Any], trained: Path, tmp_path: Path) -> None:
    """A missing number is training's median, an unknown category is none of them; an empty one is one here."""
    preprocessing = Preprocessing.from_dict(checkpoint.load(trained)["preprocessing"], 9)
    assert [column.name for column in preprocessing.columns] == ["size", "same", "colour", "code"]
    rows = [{"size": "", "colour": "blue", "code": "1_9", "same": "7"},
            {"size": "NA", "colour": "", "code": "1_3", "same": "?"},
            {"size": repr(preprocessing.columns[0].median), "colour": "red", "code": "1_0", "same": "7.0"}]  # type: ignore[union-attr]  # fmt: skip
    inputs = preprocessing.inputs(Table(_written(tmp_path / "t.csv", rows)))
    assert (inputs[:, 0] == inputs[2, 0]).all()
    assert inputs[:, 1].tolist() == [0, 0, 0]
    assert inputs[:, 2:5].tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 1]]
    assert inputs[:, 5:].tolist() == [[0] * 4, [0, 0, 0, 1], [1, 0, 0, 0]]


def test_scikit_learn_is_not_needed(
    run: dict[str, Any], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To fit, it is."""
    expected = _answers(trained, run["table"])
    for name in ("sklearn", "sklearn.impute", "sklearn.preprocessing"):
        monkeypatch.setitem(sys.modules, name, None)
    pandas.testing.assert_frame_equal(_answers(trained, run["table"]), expected)
    with pytest.raises(data.DataError, match="needs scikit-learn"):
        tabular.load(run["table"], "kind", [], seed=0)


def test_one_bad_file_does_not_stop_the_rest(
    run: dict[str, Any], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line that names file, line and column; the good ones are answered for. One without rows has no answers."""
    header = "size,colour,code,same\n"
    bad = {
        "lacks": ("size,colour\n1,red\n", "lacks the columns 'same', 'code' of the rows trained on; it has 'size', 'c"),
        "word": (header + "big,red,1_1,7\n", "line 2, column 'size': 'big' is no finite number of digits, a point and"),
        "comma": (header.replace(",", ";") + "1,5;red;1_1;7\n", "decimal=','"),
        "short": (header + "1,red\n", "line 2: 2 values, the first line names 4 columns"),
        "empty": ("", "is empty"),
        "absent": (None, "cannot be read: No such file"),
    }
    for name, (text, _) in bad.items():
        if text is not None:
            (tmp_path / name).write_text(text)
    (tmp_path / "none").write_text(header)
    files = [str(tmp_path / name) for name in (*bad, "none")] + [str(run["table"])]
    assert predict.main([str(trained), *files]) == 1
    out, err = capsys.readouterr()
    assert set(pandas.read_csv(io.StringIO(out))["file"]) == {str(run["table"])}
    lines = err.splitlines()
    assert len(lines) == len(bad)
    for line, (name, (_, message)) in zip(lines, bad.items()):
        assert str(tmp_path / name) in line
        assert message in line
    assert predict.main([str(trained), str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out == "file,line,class,probability\n"


def test_a_network_of_rows_is_not_exported(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict.main([str(trained), "--export", str(tmp_path / "x.pt2")]) == 2
    assert "networks of images are exported" in capsys.readouterr().err


def _set(*keys: Any, to: Any) -> Callable[[Any], None]:
    def change(saved: Any) -> None:
        for key in keys[:-1]:
            saved = saved[key]
        saved[keys[-1]] = to

    return change


NAN = float("nan")
# which part becomes what, and what is said of it
DAMAGED: dict[str, tuple[Any, str]] = {
    "number": (3, "preprocessing must be a dictionary, got 3"),
    "nothing": ({}, "preprocessing: target must be a column's name, got None"),
    "target": (_set("target", to=1), "preprocessing: target must be a column's name, got 1"),
    "no columns": (_set("columns", to=[]), "preprocessing: columns must be a list of columns, got []"),
    "columns": (_set("columns", to={}), "preprocessing: columns must be a list of columns, got {}"),
    "column": (_set("columns", 0, to="size"), "preprocessing: columns[0] must be a dictionary, got 'size'"),
    "fewer": (lambda saved: saved["columns"].pop(0), "of as many inputs as the network has, 9, got 8"),
    "name": (_set("columns", 1, "name", to=None), "columns[1]: name must be a column's name, got None"),
    "twice": (_set("columns", 1, "name", to="size"), "of columns that differ in name, got ['kind', 'size', 'size'"),
    "its own target": (_set("target", to="size"), "of columns that differ in name, got ['size', 'size'"),
    "no mean": (lambda saved: saved["columns"][0].pop("mean"), "columns[0] must be a median, a mean and a scale above"),
    "nan": (_set("columns", 0, "median", to=NAN), "columns[0] must be a median, a mean and a scale above 0"),
    "scale": (_set("columns", 0, "scale", to=0.0), "columns[0] must be a median, a mean and a scale above 0"),
    "whole": (_set("columns", 0, "scale", to=1), "columns[0] must be a median, a mean and a scale above 0"),
    "tensor": (_set("columns", 0, "scale", to=torch.ones(2)), "columns[0] must be a median, a mean and a scale above"),
    "categories": (_set("columns", 2, "categories", to="abc"), "columns[2]: categories must be a list of names that"),
    "none": (_set("columns", 2, "categories", to=[]), "columns[2]: categories must be a list of names that differ"),
    "category": (_set("columns", 2, "categories", 0, to=1), "columns[2]: categories must be a list of names that"),
    "same": (_set("columns", 2, "categories", to=["a", "a", "b"]), "columns[2]: categories must be a list of names"),
    "lists": (_set("columns", 2, "categories", to=[[], [], []]), "columns[2]: categories must be a list of names"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged(run: dict[str, Any], trained: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """One line, to predict and to go on alike."""
    change, message = DAMAGED[kind]
    state = checkpoint.load(trained)
    if callable(change):
        change(state["preprocessing"])
    else:
        state["preprocessing"] = change
    torch.save(state, trained)
    assert predict.main([str(trained), str(run["table"])]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"python -m models.predict: error: {trained} is damaged: preprocessing")
    assert message in line
    with pytest.raises(CheckpointError, match=r"is damaged: preprocessing"):
        checkpoint.load(trained)


@pytest.mark.usefixtures("no_pictures")
def test_a_checkpoint_from_before_there_was_any(
    run: dict[str, Any], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says why it cannot answer, and can be gone on from: the next one has all that is needed."""
    state = checkpoint.load(trained)
    saved = state.pop("preprocessing")
    torch.save(state, trained)
    assert predict.main([str(trained), str(run["table"])]) == 2
    assert "does not say of which columns" in capsys.readouterr().err
    assert _train(run["table"], trained.parent, "--epochs", "4", "--resume") == 0
    assert checkpoint.load(trained)["preprocessing"] == saved
    assert predict.main([str(trained), str(run["table"])]) == 0
