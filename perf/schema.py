"""Rows of CSVs, one a measurement: what each column means, and reading and writing rows safely."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd

from perf.options import Refused


class Column(NamedTuple):
    """``kind``: 'text', 'whole' (may be empty) or 'number' (may be empty)."""

    name: str
    kind: str
    meaning: str


def text(meaning: str) -> Any:
    """A column of text."""
    return dataclasses.field(default="", metadata={"meaning": meaning})


def number(meaning: str) -> Any:
    """A column of whole numbers (int | None) or of others (float | None); None is an empty cell."""
    return dataclasses.field(default=None, metadata={"meaning": meaning})


KINDS = {"str": "text", "int | None": "whole", "float | None": "number", "float": "number"}
Self = TypeVar("Self", bound="Row")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a CSV; the fields of a subclass are its columns, in their order. Naming one that there is not is a
    TypeError where the row is made."""

    @classmethod
    def columns(cls) -> tuple[Column, ...]:
        """The columns, with what they mean."""
        return tuple(Column(f.name, KINDS[str(f.type)], f.metadata["meaning"]) for f in dataclasses.fields(cls))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cls))

    def having(self: Self, **columns: Any) -> Self:
        """The row with these columns filled in."""
        return dataclasses.replace(self, **columns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes(Row):
    """Sizes of what was called. (Columns of a class's last base come first.)"""

    N: int | None = number("batch: images, or rows of a matrix")
    C: int | None = number("input channels, input features or classes; attention: features of a head")
    H: int | None = number("rows of the input image; attention: queries")
    W: int | None = number("columns of the input image; attention: keys")
    K: int | None = number("output channels or output features; attention: heads")
    R: int | None = number("rows of the convolution window")
    S: int | None = number("columns of the convolution window")
    stride: int | None = number("of the convolution, both axes")
    padding: int | None = number("of the convolution, both axes")
    groups: int | None = number("of the convolution; matmul: products in a batch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Which(Row):
    timestamp: str = text("when the row was written, UTC, ISO 8601")
    commit: str = text("git commit of the source, -dirty where it was changed since; unknown outside git")
    host: str = text("name of the machine")
    device: str = text("the GPU's name, or cpu with its model and torch's number of threads")
    driver: str = text("version of the GPU's driver; empty on a CPU")
    torch: str = text("version of torch")
    triton: str = text("version of triton; empty where it is not installed")
    operator: str = text("a name of perf/operators.py; perf model: the model's name")
    mode: str = text(
        "fwd: forward without autograd; bwd: backward alone, of which dgrad: the input's gradient, wgrad: the "
        "weight's; full: forward and backward; of a network train: a step with Adam (perf model: with none, or the "
        "optimizer of its column); infer: forward in evaluation, without autograd"
    )
    dtype: str = text(
        "bf16, fp16 or fp32: of inputs, weights and outputs; train and infer: of autocast over float32 (fp32: none)"
    )
    layout: str = text("nhwc (channels_last) or nchw; empty where the operator has no images")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement(Sizes, _Which):
    """What is timed, by perf sweep and perf gpu."""

    provider: str = text("whose code was measured")
    timing: str = text("wall: the call as a user makes it; cudagraph: replayed from a CUDA graph")
    allocator: str = text(
        "train and infer: default; faultless: glibc told to keep all memory it was ever given; shared: default, but "
        "all providers in one process; else empty"
    )
    config: str = text("kernels that were launched and their launch configurations; empty without Triton")
    ms_p20: float | None = number("milliseconds a call, 20th percentile of the repetitions")
    ms_p25: float | None = number("milliseconds a call, 25th percentile")
    ms_p50: float | None = number("milliseconds a call, median")
    ms_p75: float | None = number("milliseconds a call, 75th percentile")
    ms_p80: float | None = number("milliseconds a call, 80th percentile")
    tflops: float | None = number("flops / ms_p50, in 10^12 a second")
    gbps: float | None = number("bytes / ms_p50, in 10^9 a second")
    bytes: float | None = number(
        "least traffic of the mode: each operand of an operator read once, each result written once"
    )
    flops: float | None = number(
        "operations of the mode's products, a multiply-add counted as two; 0 where there is none"
    )
    roofline_pct: float | None = number(
        "least time at the peak rates (by bytes or by flops, the larger) / ms_p50, in percent"
    )
    peak_tflops: float | None = number("the peak meant: a GPU's from core/targets.py, a CPU's as measured by a product")
    peak_gbps: float | None = number(
        "the peak meant: a GPU's from core/targets.py, a CPU's as measured by a copy of about as many bytes"
    )
    above_roofline: str = text("why roofline_pct is above 100: cache or unexplained, with what is known; else empty")
    speedup_vs_torch: float | None = number(
        "how many times as fast as provider torch, timed in the same way: torch's time over this one's in the same "
        "round, median of the rounds; of the medians where they had no rounds together (GPUs, a sweep gone on with)"
    )
    speedup_p25: float | None = number("the same, 25th percentile of the rounds")
    speedup_p75: float | None = number("the same, 75th percentile")
    noise: str = text(
        "why the figures are to be taken with care: 'noisy' where quartiles of the times or of the speed-up are 10% of "
        "their median apart or a thread waited for a CPU a tenth of the time, 'very noisy' from 25% on; 'unknown' "
        "after too few rounds; else empty"
    )
    cpu_wait_pct: float | None = number(
        "time for which the thread that waited longest had no CPU, in percent, median of the rounds; 0 where the "
        "system does not tell; CPU only"
    )
    ratio_p25: float | None = number(
        "how many times as fast tkernels is as this provider, from the same rounds as a speed-up, 25th percentile; "
        "CPU only"
    )
    ratio_p50: float | None = number("the same, median")
    ratio_p75: float | None = number("the same, 75th percentile")
    rounds: int | None = number("rounds in which the providers took turns; CPU only")
    page_faults: float | None = number("minor page faults a call, median of the rounds; CPU only")
    saved_mb: float | None = number(
        "train: what autograd keeps from forward to backward, 10^6 bytes; not of torch.compile"
    )
    err_fp64: float | None = number("largest error of output and gradients against float64, relative norm")
    torch_err_fp64: float | None = number("the same of PyTorch in this dtype on this device")
    peak_memory_mb: float | None = number(
        "most memory a call allocated, 10^6 bytes; on a CPU of train and of perf model only: the process's largest "
        "resident memory in a step above what stands between steps, where the system tells"
    )
    host_us: float | None = number("microseconds until the call returned, not waiting for the GPU; empty on a CPU")
    status: str = text("ok; else wrong, error, out of memory, crashed, timeout or unsupported, with the reason")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted(Row):
    """What rows of what is counted, not timed, begin with."""

    commit: str = text("git commit of the source")
    torch: str = text("version of torch")
    triton: str = text("version of triton")
    target: str = text("the GPU the choosers believed in")


COLUMNS, NAMES = Measurement.columns(), Measurement.names()
SHAPE, SHAPE_COLUMNS = Sizes.columns(), Sizes.names()
# What makes two rows the same measurement
KEY = ("device", "operator", "mode", "dtype", "layout", *SHAPE_COLUMNS, "provider", "timing",
       "allocator")  # fmt: skip
# The same without the device: what a sweep is asked for
TASK = KEY[1:]
# What CSVs of before have no column of
LATER = ("allocator", "ms_p25", "ms_p75", "above_roofline", "speedup_p25", "speedup_p75", "noise", "cpu_wait_pct",
         "ratio_p25", "ratio_p50", "ratio_p75", "rounds", "page_faults", "saved_mb")  # fmt: skip
# of CSVs of what is counted, not timed
STEP = "(step)"  # the whole step, among its layers or calls
BYTES = "arguments of launches and ATen calls, read once and written once, without workspaces"
LAUNCHES = "Triton launches"
ATEN_CALLS = "ATen calls that compute (no views, no allocations)"
OK = "ok"
# Text that a spreadsheet would take for a formula and execute; a quote before it makes it text again
_FORMULA = re.compile(r"\s*[=+\-@\t\r\uff0b\uff0d\uff1d\uff20]")
_QUOTED = re.compile(rf"'(?='*{_FORMULA.pattern})")
# in words, for plots and summaries
MODES = {"fwd": "forward", "bwd": "backward", "full": "forward + backward"}
# of products, each gradient alone: perf gpu
GRADIENTS = {"dgrad": "input gradient", "wgrad": "weight gradient"}
# of whole networks, on a CPU: perf/bench/ratios.py
NETWORK_MODES = {"train": "training step", "infer": "inference"}


def shielded(cell: Any) -> Any:
    """A cell for a CSV: text that a spreadsheet would execute gets a quote before it, which ``table`` takes away."""
    if not isinstance(cell, str) or not _FORMULA.match(cell.lstrip("'")) or _is_number(cell):
        return cell
    return "'" + cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def write(frame: pd.DataFrame, path: Path) -> None:
    """Write a CSV, over an older one. Raises OSError."""
    text = frame.astype(object).map(shielded).to_csv(index=False)
    with _naming(path), open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        file.write(text)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A full disk does not say which file was being written."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def line(row: Row) -> str:
    """One row as a line of CSV."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow([_cell(value) for value in vars(row).values()])
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return shielded(value.replace("\n", " ").replace("\r", " "))
    return "" if is_empty(value) else value


def is_empty(cell: Any) -> bool:
    """Whether a row, or a table read from a CSV, has nothing there."""
    return cell is None or bool(pd.isna(cell))


def _check_kind(row: Row, kind: type[Row], owner: str) -> None:
    if type(row) is not kind:
        raise TypeError(f"{owner} has rows of {kind.__name__}, not of {type(row).__name__}")


class Writer:
    """Appends rows of one kind to a CSV, each whole and on disk before the call returns. Raises OSError where the disk
    is full."""

    def __init__(self, path: Path, kind: type[Row] = Measurement) -> None:
        self._path, self._kind = path, kind
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        if self._file.tell() == 0:
            self._write(",".join(kind.names()) + "\n")

    def append(self, row: Row) -> None:
        _check_kind(row, self._kind, str(self._path))
        self._write(line(row))

    def close(self) -> None:
        self._file.close()

    def _write(self, text: str) -> None:
        rest = memoryview(text.encode(errors="backslashreplace"))
        before = self._file.tell()
        with _naming(self._path):
            try:
                while rest:  # a disk that gets full takes a part
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(before)
                raise


def drop_torn_line(path: Path) -> None:
    """Cut what a killed writer left of a line behind the last complete one. Raises Refused, and leaves the file as it
    is, where its header is not a sweep's: rows must not be appended to it."""
    header = (",".join(NAMES) + "\n").encode()
    with open(path, "r+b") as file:
        content = file.read()
        if not content.startswith(header) and not header.startswith(content):
            if content.startswith(",".join(NAMES[:3]).encode()):
                raise Refused(f"{path} has the columns of another version: rows of this one need a file of their own")
            raise Refused(f"{path} does not begin with the header of a sweep's CSV, {','.join(NAMES[:3])},...")
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def table(path: Path) -> pd.DataFrame:
    """Any CSV as text. Raises Refused for a file that is missing, is not a CSV or has no rows."""
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise Refused(f"{path} does not exist") from None
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from error
    except pd.errors.EmptyDataError:
        raise Refused(f"{path} is empty, a CSV with columns is needed") from None
    except (pd.errors.ParserError, UnicodeDecodeError):
        raise Refused(f"{path} is not a CSV") from None
    return frame.map(lambda cell: _QUOTED.sub("", cell, count=1) if _QUOTED.match(cell) else cell)


def require(frame: pd.DataFrame, columns: Iterable[str], path: Path) -> None:
    """Raise Refused unless the columns are there."""
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        shown = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        raise Refused(f"{path} lacks the columns {shown}")


def typed(frame: pd.DataFrame, columns: Iterable[Column], path: Path) -> pd.DataFrame:
    """Columns of text given their kinds. Raises Refused where a cell does not fit."""
    result = frame.copy()
    for column in columns:
        if column.kind == "text":
            continue
        values = pd.to_numeric(result[column.name].replace("", None), errors="coerce")
        bad = values.isna() & (result[column.name] != "")
        if bad.any():
            cell = result.loc[bad, column.name].iloc[0]
            raise Refused(f"{path}, column {column.name}: {cell!r} is not a number")
        if column.kind == "whole":
            if (values.dropna() % 1 != 0).any():
                raise Refused(f"{path}, column {column.name}: a whole number is needed")
            values = values.astype("Int64")
        result[column.name] = values
    return result


def frame_of(kind: type[Row], rows: Iterable[Row]) -> pd.DataFrame:
    """A table of rows of one kind. Raises TypeError for a row of another, whose columns would be lost."""
    listed = list(rows)
    for row in listed:
        _check_kind(row, kind, "the table")
    frame = pd.DataFrame([vars(row) for row in listed], columns=list(kind.names()))
    return frame.astype({column.name: "Int64" for column in kind.columns() if column.kind == "whole"})


def as_text(frame: pd.DataFrame, index: bool = True) -> str:
    """What is printed of a table: nothing where there is no value."""
    return frame.astype(object).where(frame.notna(), "").to_string(index=index)


def read(path: Path) -> pd.DataFrame:
    """A sweep's CSV with typed columns. Raises Refused for anything else."""
    frame = table(path)
    for name in LATER:
        if name not in frame.columns:
            frame[name] = ""
    require(frame, NAMES, path)
    return typed(frame[list(NAMES)], COLUMNS, path)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as dictionaries."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def key(row: Mapping[str, Any], columns: Iterable[str] = TASK) -> tuple[str, ...]:
    """What tells one measurement from another, as text: the same for a row just made and one read back."""
    cells = (row.get(name) for name in columns)
    return tuple("" if is_empty(cell) else str(cell) for cell in cells)


def shape_label(row: Mapping[str, Any]) -> str:
    """A row's shape in short: '256x32x32x32→64 3x3/2'; attention's as torch has it, '8x12x197x64', queries and keys
    '8x12x1x64 at 197' where they differ in number."""
    cells: Any = (row.get(name) for name in SHAPE_COLUMNS)
    n, c, h, w, k, r, s, stride, _, groups = (None if is_empty(cell) else int(cell) for cell in cells)
    if row.get("operator") == "attention":
        return f"{n}x{k}x{h}x{c}" + (f" at {w}" if w != h else "")
    text = f"batch {n}" if c is None else "x".join(str(size) for size in (n, c, h, w) if size is not None)
    text += "" if k is None else f"→{k}"
    text += "" if r is None else f" {r}x{s}"
    text += f"/{stride}" if (stride or 1) > 1 else ""
    return text + (f" g{groups}" if (groups or 1) > 1 else "")
