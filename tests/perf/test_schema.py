"""The CSV's columns, and reading and appending rows."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pandas as pd
import pytest

from perf import plan, schema
from perf.bench.gpu.results import CheckRow, ProfileRow
from perf.bench.model.comparison import ModelMeasurement
from perf.options import Refused
from perf.schema import Measurement
from perf.static.operator_traffic import OperatorTraffic
from perf.static.report import Compiled
from perf.static.traffic import Traffic
from tests.perf.command import row, write

pytestmark = pytest.mark.gate("torch")

# users' scripts read these: a column may be added, none renamed or removed
PROMISED = """timestamp commit host device driver torch triton operator mode dtype layout provider config ms_p20 ms_p50
ms_p80 tflops gbps bytes flops roofline_pct speedup_vs_torch err_fp64 torch_err_fp64 peak_memory_mb host_us status
N C H W K R S stride padding groups timing""".split()  # noqa: SIM905


def test_every_column_is_there_and_documented() -> None:
    assert set(PROMISED) <= set(schema.NAMES)
    assert len(set(schema.NAMES)) == len(schema.NAMES)
    for column in schema.COLUMNS:
        assert column.kind in ("text", "whole", "number")
        assert len(column.meaning) > 10, column.name


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    given = row(
        config='kernel[BLOCK=4]; "quoted", with comma', status="error: two\nlines", N=17, groups=None, host_us=None
    )
    frame = schema.read(write(tmp_path / "a.csv", given, row()))
    assert len(frame) == 2
    first = schema.records(frame)[0]
    assert first["config"] == given.config
    assert first["status"] == "error: two lines"
    assert first["N"] == 17
    assert pd.isna(first["groups"])
    assert pd.isna(first["host_us"])
    assert first["ms_p50"] == 1.0


def test_a_column_that_there_is_not_is_an_error_when_the_row_is_made(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="colour"):
        row(colour="red")
    with pytest.raises(TypeError, match="colour"):
        row().having(colour="red")
    with pytest.raises(TypeError, match="rows of Measurement, not of CheckRow"):
        write(tmp_path / "a.csv", cast(Measurement, CheckRow(check="a")))
    with pytest.raises(TypeError, match="rows of Traffic, not of OperatorTraffic"):
        schema.frame_of(Traffic, [Traffic(), OperatorTraffic()])
    with pytest.raises(TypeError, match="colour"):
        Traffic().having(colour="red")


@pytest.mark.parametrize(
    "kind", (Measurement, ModelMeasurement, CheckRow, ProfileRow, Compiled, OperatorTraffic, Traffic)
)
def test_every_kind_of_row_documents_its_columns(kind: type[schema.Row]) -> None:
    for column in kind.columns():
        assert column.kind in ("text", "whole", "number")
        assert len(column.meaning) > 5, column.name


def test_a_row_read_back_has_the_key_of_its_task(tmp_path: Path) -> None:
    shape = (("N", 8), ("C", 10))
    task = plan.Task("cross_entropy", "fwd", "fp32", "", shape, "torch", "wall")
    path = write(tmp_path / "a.csv", row(**task.columns()))
    assert schema.key(schema.records(schema.read(path))[0]) == task.key()
    assert plan.missing([task], path, "GPU") == []
    assert plan.missing([task], path, "another GPU") == [task]


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", row(), row(N=2))
    whole = path.read_bytes()
    for cut in (1, 5, 100):
        path.write_bytes(whole[:-cut])
        schema.drop_torn_line(path)
        assert len(schema.read(path)) == 1
    path.write_bytes(whole[:20])
    schema.drop_torn_line(path)
    assert path.read_bytes() == b""


def test_a_file_of_another_kind_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.csv"
    for content in ("a,b\n1,2\n3", "no newline", ",".join(reversed(schema.NAMES)) + "\n1,"):
        path.write_text(content)
        with pytest.raises(Refused, match="does not begin with the header of a sweep's CSV"):
            schema.drop_torn_line(path)
        assert path.read_text() == content


def test_a_file_of_an_earlier_version_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_text(",".join(schema.NAMES[:-2]) + "\n1,2")
    with pytest.raises(Refused, match="has the columns of another version: rows of this one need a file of their own"):
        schema.drop_torn_line(path)
    assert path.read_text().endswith("\n1,2")


@pytest.mark.parametrize(
    "content, message",
    (
        ("", "is empty"),
        ("a,b\n1,2\n", "lacks the columns timestamp, commit"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe\x00", "is not a CSV"),
    ),
)
def test_what_is_not_a_sweep_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(Refused, match=message):
        schema.read(path)


def test_cells_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="column ms_p50: 'soon' is not a number"):
        schema.read(write(tmp_path / "a.csv", row(ms_p50="soon")))
    with pytest.raises(Refused, match="column N: a whole number"):
        schema.read(write(tmp_path / "b.csv", row(N=1.5)))
    with pytest.raises(Refused, match="does not exist"):
        schema.read(tmp_path / "c.csv")


def test_shapes_in_short() -> None:
    assert schema.shape_label(vars(row())) == "256x32x32x32→32 3x3"
    assert schema.shape_label(vars(row(stride=2, groups=32))) == "256x32x32x32→32 3x3/2 g32"
    assert schema.shape_label(vars(row(**dict.fromkeys(("H", "W", "K", "R", "S", "stride", "groups"))))) == "256x32"
    assert schema.shape_label(vars(row(operator="attention", N=8, K=12, H=197, W=197, C=64))) == "8x12x197x64"
    assert schema.shape_label(vars(row(operator="attention", N=8, K=12, H=1, W=197, C=64))) == "8x12x1x64 at 197"
