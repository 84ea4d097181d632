"""CSV files: how columns become features, fitted on the training part alone, and errors with line and column."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from models import data, table, tabular

pytestmark = pytest.mark.gate("torch")


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
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
    'x,y\n1,"a\n2,b': "line 2: unexpected end of data",
    "y\na\nb\na\nb\na": "has no column beside 'y'",
    "x:y\n1:a\n2:b": "has no column beside 'x:y'; what separates columns is one of: commas, semicolons, tabs, vertical",
    "x;y\n1;a\n2\n3;b": "line 3: 1 values, the first line names 2 columns (separated by semicolons)",
    "x;y\n1,5;a\n2,5;b\n3;a\n4;b": "line 2, column 'x': '1,5' is no finite number of digits, a point and an exponent; "
    "pandas.read_csv(FILE, sep=';', decimal=',').to_csv(OTHER, index=False) makes points of decimal commas",
    "x\ty\n1.234,5\ta\n2,5\tb\n3\ta\n4\tb": "pandas.read_csv(FILE, sep='\\t', decimal=',')",
    "x,y\n1,a\n2,b\nx, y\n3,a": "line 4: the first line's names again",
    'x,y\n"1\n2",a\n3': "line 4: 1 values",
    'x,y\n"1\n2",a\n3,': "line 4, column 'y': the class is missing",
    "x,y\n1,a\n2,b\n3,\0\n": "line 4 is no UTF-8 text (UTF-16?)",
    # one class to pandas, or to the eye
    "x,y\n1,1\n2,1.0\n3,2": "line 3, column 'y': the class '1.0' is '1' in other lines",
    "x,y\n1,1\n2,01\n3,2": "line 2, column 'y': the class '1' is '01' in other lines",
    "x,y\n1,True\n2,TRUE\n3,False": "line 2, column 'y': the class 'True' is 'TRUE' in other lines",
    "x,y\n1,caf\u00e9\n2,cafe\u0301": "is 'cafe\u0301' in other lines",
}
# what people write for a number, and float() or nobody takes for one
WRITTEN = [
    *(
        "1_000",
        "Inf",
        "-inf",
        "+Infinity",
        "1e400",
        "-1e300",
        "1,234",
        "1,234.5",
        "1,5",
        "1.234,5",
        "1.234.567",
        "1 234",
    ),
    *(
        "1\u00a0234",
        "1\u202f234",
        "1'234",
        "1\u2019234",
        "5%",
        "$5",
        "5 \u20ac",
        "\u22125",
        "0x1F",
        "\u0663",
        "\uff15",
        "\u00b2",
    ),
]
WORDS = ["2020-01-05", "05.01.2020", "12:30", "1.2.3", "192.168.0.1", "10-20", "5kg", "1/2", "e5", "True", "-", "0xyz",
         "1_10", "1_000", "12_345_678", "2024_1", "1__0"]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_bad_files(tmp_path: Path, text: str) -> None:
    path = _written(tmp_path / "bad.csv", text)
    with pytest.raises(data.DataError) as caught:
        tabular.load(path, None, [], seed=0)
    message = str(caught.value)
    assert BAD[text] in message
    assert str(path) in message
    assert "\n" not in message


@pytest.mark.parametrize("text", WRITTEN)
@pytest.mark.parametrize("others", ["same", "numbers", "half of them words"])
def test_what_only_looks_like_a_number_is_refused(tmp_path: Path, text: str, others: str) -> None:
    """Alone in its column too, where pandas would make words of it: one-hot, it would be silently useless. But 1_000
    between others of the kind is an identifier."""
    if (text, others) == ("1_000", "same"):
        others = "numbers"
    column = {"same": [text] * 20, "numbers": ["7"] * 20, "half of them words": ["7"] * 11 + ["a"] * 9}[others]
    column[3] = text
    path = _written(
        tmp_path / "t.csv", "\n".join(["x,y", *(f'"{cell}",{"ab"[i % 2]}' for i, cell in enumerate(column))])
    )
    line = 2 if others == "same" else 5
    with pytest.raises(data.DataError) as caught:
        tabular.load(path, None, [], seed=0)
    assert f"{path}, line {line}, column 'x': {text!r} is no finite number" in str(caught.value)
    assert "--categorical 'x'" in str(caught.value)
    if others == "same":  # as the message says
        assert data.tensors(tabular.load(path, None, ["x"], seed=0).train)[0].tolist() == [[1.0]] * 16


@pytest.mark.parametrize("text", WORDS)
def test_dates_times_and_words_are_categories(tmp_path: Path, text: str) -> None:
    rows = [f"{(text, 'other')[i % 2]},{'ab'[i // 2 % 2]}" for i in range(20)]
    train, _ = data.tensors(tabular.load(_written(tmp_path / "t.csv", "\n".join(["x,y", *rows])), None, [], 0).train)
    assert train.shape == (16, 2)
    assert torch.equal(train.sum(1), torch.ones(16))


def test_identifiers_stay_what_they_are(tmp_path: Path) -> None:
    """Cut in threes or not, each is a category and no two are one; a class is called as the file calls it."""
    for names in (["1_10", "11_0", "1_1_0", "110_000", "1_000"], ["1_000", "10_000", "100_000", "1_000_000", "2_000"]):
        rows = [f"{names[i % 5]},{names[i % 2]}" for i in range(40)]
        parts = tabular.load(_written(tmp_path / "t.csv", "\n".join(["x,y", *rows])), None, [], 0)
        assert parts.classes == tuple(sorted(names[:2]))
        assert parts.preprocessing == {"target": "y", "columns": [{"name": "x", "categories": sorted(names)}]}
    # between numbers one is refused, the other is a word
    for name, status in (("1_000", "refused"), ("1_10", "a word")):
        cells = ["7"] * 10 + [name] * 12
        path = _written(tmp_path / "t.csv", "\n".join(["x,y", *(f"{c},{'ab'[i % 2]}" for i, c in enumerate(cells))]))
        if status == "refused":
            with pytest.raises(data.DataError, match="line 12, column 'x': '1_000' is no finite number"):
                tabular.load(path, None, [], 0)
        else:
            assert data.tensors(tabular.load(path, None, [], 0).train)[0].shape[1] == 2


TABLE = "x,word,y\n" + "".join(f'{i}.5,"w, {i % 2};|",{"ab"[i % 2]}\n' for i in range(20))


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_other_delimiters(tmp_path: Path, delimiter: str) -> None:
    """The same table as with commas, which the cells have too, and other delimiters within quotes."""
    comma = tabular.load(_written(tmp_path / "comma.csv", TABLE), None, [], 0)
    rows = csv.reader(TABLE.splitlines())
    other = io.StringIO()
    csv.writer(other, delimiter=delimiter).writerows(rows)
    found = tabular.load(_written(tmp_path / "other.csv", other.getvalue()), None, [], 0)
    assert (found.classes, found.preprocessing) == (comma.classes, comma.preprocessing)
    assert all(map(torch.equal, data.tensors(found.train), data.tensors(comma.train)))


def test_the_delimiter_is_what_cuts_all_lines_alike(tmp_path: Path) -> None:
    """And of two such that which gives more columns; lines cut otherwise leave the first line's choice."""
    for text, delimiter, columns in (
        ("name;price, EUR;y\nu;1.5;a\nv;2.5;b", ";", 3),
        ("name;price, EUR;y\nu;1,5;a\nv;2,5;b", ";", 3),
        ("name;price, EUR, net;y\nu;1.5;a\nv;2.5;b", ";", 3),
        ("name,a|b,y\nu,1|2,a\nv,2,b", ",", 3),
        ('"a;b",c\n1,2\n3,4', ",", 2),
        ('"a,b";c\n1;2\n3;4', ";", 2),
        ("a;b\n", ";", 2),
        ("only\n1\n", ",", 1),
        ("", ",", 0),
    ):
        file = io.StringIO(text, newline="")
        assert table._delimiter(file) == delimiter, text
        assert file.tell() == 0
        if text:
            assert len(table.Table(_written(tmp_path / "t.csv", text)).columns) == columns


def test_prepared_as_scikit_learn_does(mixed: Path) -> None:
    """Its pipeline, bit for bit: medians, means and scales of the training part, one-hot categories."""
    parts = tabular.load(mixed, None, ["code"], seed=0)
    frame = pandas.read_csv(mixed, dtype={"code": str}).fillna({"colour": ""})
    train = list(parts.train.indices)  # type: ignore[attr-defined]
    scale = make_pipeline(SimpleImputer(strategy="median"), StandardScaler()).fit(frame[["size"]].iloc[train])
    one_hot = OneHotEncoder(sparse_output=False).fit(frame[["colour", "code"]].iloc[train])
    expected = np.hstack([scale.transform(frame[["size"]]), one_hot.transform(frame[["colour", "code"]])])
    assert torch.equal(data.tensors(parts.train)[0], torch.from_numpy(expected[train]).float())


def _column(path: Path, cells: list[str]) -> torch.Tensor:
    """What the network gets for one column, in the file's order."""
    rows = [f'"{cell}",{"ab"[i % 2]}' for i, cell in enumerate(cells)]
    whole = tabular.load(_written(path, "\n".join(["x,y", *rows])), None, [], 0).train.dataset  # type: ignore[attr-defined]
    return whole.tensors[0]


def test_numbers_are_read_as_pandas_reads_them(tmp_path: Path) -> None:
    """Signs, exponents, points without digits, spaces, leading zeros (01234 is 1234 unless declared categorical)."""
    cells = ["+5", "-5", " 5 ", "\t7", ".5", "5.", "1e3", "1E-3", "007", "01234", "-0", "5.0e+00"]
    path = tmp_path / "t.csv"
    _column(path, cells)
    values = pandas.read_csv(path)["x"].to_numpy()
    assert values.dtype == np.float64
    assert torch.equal(_column(path, cells), _column(path, [repr(float(value)) for value in values]))
    codes = [("01234", "1234")[i % 2] for i in range(20)]
    assert _column(path, codes).unique().numel() == 1
    _column(path, codes)
    assert data.tensors(tabular.load(path, None, ["x"], 0).train)[0].shape == (16, 2)


@pytest.mark.parametrize("word", ["", "?", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "-nan", "NULL", "None", "<NA>"])
def test_missing_numbers(tmp_path: Path, word: str) -> None:
    cells = [str(i) for i in range(30)]
    cells[4] = cells[17] = word
    empty = ["" if cell == word else cell for cell in cells]
    assert torch.equal(_column(tmp_path / "t.csv", cells), _column(tmp_path / "t.csv", empty))


@pytest.mark.parametrize("words", [("None", "NA"), ("nan", "inf"), ("null", "N/A"), ("?", "NaN"), ("NULL", "1e5")])
def test_a_word_for_nothing_is_a_class_and_a_category(tmp_path: Path, words: tuple[str, str]) -> None:
    """Kaggle's sleep disorders are None, Insomnia and Sleep Apnea; no alley is NA in the houses of Ames."""
    rows = [f"{i},{words[i % 2] if i % 3 else 'word'},{words[i % 2]}" for i in range(40)]
    path = _written(tmp_path / "t.csv", "\n".join(["x,alley,kind", *rows]))
    for _ in range(2):
        parts = tabular.load(path, None, ["alley"], 0)
        assert set(parts.classes) == set(words)
        whole = parts.train.dataset  # type: ignore[attr-defined]
        assert [parts.classes[i] for i in whole.tensors[1]] == [words[i % 2] for i in range(40)]
        # each has a category of its own; that of the third word are the rows 0, 3, 6, ...
        third = whole.tensors[0][:, 1:][::3]
        assert torch.equal(third, third[:1].expand(14, 3))
        assert sorted(whole.tensors[0][:, 1:].sum(0).tolist()) == [13, 13, 14]


def test_a_number_too_far_from_the_others(tmp_path: Path) -> None:
    """In the validation part alone: standardised by the training part it is infinite in float32."""
    cells = [f"{i % 3}e-20" for i in range(40)]
    _column(path := tmp_path / "t.csv", cells)
    row = tabular.load(path, None, [], 0).val.indices[0]  # type: ignore[attr-defined]
    cells[row] = "1e30"
    with pytest.raises(data.DataError, match=f"line {row + 2}, column 'x': '1e30' is too far from the others"):
        _column(path, cells)


def test_spaces_quotes_and_line_ends(tmp_path: Path) -> None:
    """A byte order mark, CRLF or CR, empty lines, quotes after a space: the same table."""
    plain = "x,word,y\n" + "".join(f"{i},w{i % 2},{'ab'[i % 2]}\n" for i in range(20))
    expected = data.tensors(tabular.load(_written(tmp_path / "plain.csv", plain), None, [], 0).train)
    spaced = "x , word,y\n\n" + "".join(f'{i}, "w{i % 2}" , \u00a0{"ab"[i % 2]}\n   \n' for i in range(20)).replace(
        '" ,', '",'
    )
    for i, text in enumerate((spaced, plain.replace("\n", "\r\n"), plain.replace("\n", "\r"))):
        (tmp_path / f"{i}.csv").write_bytes(("\ufeff" + text).encode())
        parts = tabular.load(tmp_path / f"{i}.csv", None, [], 0)
        assert parts.classes == ("a", "b")
        assert all(map(torch.equal, data.tensors(parts.train), expected))


def test_time_is_linear_in_the_columns(tmp_path: Path) -> None:
    """Counted, not timed: how often two names are compared."""

    class Name(str):
        compared = 0

        def __eq__(self, other: object) -> bool:
            Name.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    found = table.Table(_written(tmp_path / "t.csv", "x"))
    found._check_names([Name(f"c{i}") for i in range(5000)])
    assert Name.compared <= 5000


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
    with pytest.raises(data.DataError, match="line 2 is no UTF-8 text: byte 4"):
        tabular.load(tmp_path / "latin.csv", None, [], 0)
    (tmp_path / "utf16.csv").write_bytes("x,y\n1,1\n".encode("utf-16"))
    with pytest.raises(data.DataError, match=r"line 1 is no UTF-8 text \(UTF-16"):
        tabular.load(tmp_path / "utf16.csv", None, [], 0)
    many = "\n".join(f"word{i},{'ab'[i % 2]}" for i in range(1100))
    with pytest.raises(data.DataError, match="1100 different values"):
        tabular.load(_written(tmp_path / "many.csv", f"x,y\n{many}"), None, [], 0)
