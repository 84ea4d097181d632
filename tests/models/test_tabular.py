"""CSV files: how columns become features, fitted on the training part alone, and errors with line and column."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models import data, tabular

pytestmark = pytest.mark.gate("torch")


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """100 rows: numbers around 50 of which some are missing, a colour, a code of digits; the class is the last."""
    random = np.random.default_rng(0)
    lines = ["size,colour,code,kind"]
    for i in range(100):
        size = "NA" if i % 10 == 3 else f"{50 + 7 * random.standard_normal():.3f}"
        lines.append(f"{size},{'' if i % 20 == 5 else random.choice(['red', 'green'])},{i % 3},{'ab'[i % 2]}")
    return _written(tmp_path / "mixed.csv", "\n".join(lines))


def test_columns(mixed: Path) -> None:
    parts = tabular.load(mixed, None, ["code"], seed=0)
    assert parts.classes == ("a", "b")
    assert parts.mean is None
    (train, label), (val, _) = data.tensors(parts.train), data.tensors(parts.val)
    # one number, three colours (missing is one), three codes
    assert (train.shape, val.shape) == ((80, 7), (20, 7))
    assert label.bincount().sum() == 80
    assert torch.isfinite(train).all()
    # standardised by the training part, which the validation part is not
    assert abs(train[:, 0].mean()) < 1e-5
    assert train[:, 0].std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert abs(val[:, 0].mean()) > 1e-4
    assert torch.equal(train[:, 1:].sum(1), torch.full((80,), 2.0))
    # as a number the code is one column
    assert data.tensors(tabular.load(mixed, None, [], seed=0).train)[0].shape[1] == 5
    assert tabular.load(mixed, "code", [], seed=0).classes == ("0", "1", "2")


def test_nothing_is_fitted_on_the_validation_part(tmp_path: Path) -> None:
    """A value of validation rows only moves neither mean nor median, and is no category."""
    rows = [f"{i},w,{'ab'[i % 2]}" for i in range(40)]
    path = _written(tmp_path / "t.csv", "\n".join(["x,word,kind", *rows]))
    parts = tabular.load(path, None, [], seed=0)
    train, held_out = data.tensors(parts.train)[0], list(parts.val.indices)  # type: ignore[attr-defined]
    for i in held_out:
        rows[i] = f"1e9,other,{'ab'[i % 2]}"
    again = tabular.load(_written(path, "\n".join(["x,word,kind", *rows])), None, [], seed=0)
    assert torch.equal(data.tensors(again.train)[0], train)
    val = data.tensors(again.val)[0]
    assert (val[:, 0] > 1e6).all()
    assert (val[:, 1] == 0).all()


BAD = {
    "x,y\n1,a\n2\n3,b": "line 3: 1 values, the first line names 2 columns",
    "x,y\n1,a\n2,b,c": "line 3: 3 values, the first line names 2 columns",
    "x,y\n1,a\n2,b\nthree,a\n4,b": "line 4, column 'x': 'three' is no finite number",
    "x,y\n1,a\ninf,b\n3,a\n4,b": "line 3, column 'x': 'inf' is no finite number",
    "x,y\n1,a\n2,\n3,b": "line 3, column 'y': the class is missing",
    "x,y\n1,a\n2,a": "column 'y': at least two classes are needed, there is only 'a'",
    "x,y\n": "column 'y': at least two classes are needed, there are no rows",
    "x,y\n1,a\n2,b\n3,c": "column 'y': 3 classes in 3 rows is too many",
    "": "is empty",
    "x,x,y\n1,2,a": "line 1: two columns are called 'x'",
    "x,,y\n1,2,a": "line 1: column 2 has no name",
    'x,y\n1,"a\n2,b': "line 3: unexpected end of data",
    "y\na\nb\na\nb\na": "has no column beside 'y'",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_files(tmp_path: Path, text: str) -> None:
    path = _written(tmp_path / "bad.csv", text)
    with pytest.raises(data.DataError) as caught:
        tabular.load(path, None, [], seed=0)
    message = str(caught.value)
    assert BAD[text] in message
    assert str(path) in message
    assert "\n" not in message


def test_other_bad_input(tmp_path: Path, mixed: Path) -> None:
    for target, categorical, message in (
        ("nothing", [], "has no column 'nothing'; it has 'size', 'colour', 'code', 'kind'"),
        (None, ["nothing"], "has no column 'nothing'"),
    ):
        with pytest.raises(data.DataError, match=message):
            tabular.load(mixed, target, categorical, 0)
    with pytest.raises(data.DataError, match="cannot be read: No such file"):
        tabular.load(tmp_path / "absent.csv", None, [], 0)
    (tmp_path / "latin.csv").write_bytes(b"x,y\n\xe4,1\n")
    with pytest.raises(data.DataError, match="no UTF-8 text"):
        tabular.load(tmp_path / "latin.csv", None, [], 0)
    many = "\n".join(f"word{i},{'ab'[i % 2]}" for i in range(1100))
    with pytest.raises(data.DataError, match="1100 different values"):
        tabular.load(_written(tmp_path / "many.csv", f"x,y\n{many}"), None, [], 0)
