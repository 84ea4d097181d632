"""The sweep's CSV: one row a measurement. What each column means, and reading and writing rows safely."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from perf.options import Refused


class Column(NamedTuple):
    """``kind``: 'text', 'whole' (may be empty) or 'number' (may be empty)."""

    name: str
    kind: str
    meaning: str


SHAPE = (
    Column("N", "whole", "batch: images, or rows of a matrix"),
    Column("C", "whole", "input channels, input features or classes; attention: features of a head"),
    Column("H", "whole", "rows of the input image; attention: queries"),
    Column("W", "whole", "columns of the input image; attention: keys"),
    Column("K", "whole", "output channels or output features; attention: heads"),
    Column("R", "whole", "rows of the convolution window"),
    Column("S", "whole", "columns of the convolution window"),
    Column("stride", "whole", "of the convolution, both axes"),
    Column("padding", "whole", "of the convolution, both axes"),
    Column("groups", "whole", "of the convolution; matmul: products in a batch"),
)
SHAPE_COLUMNS = tuple(column.name for column in SHAPE)

COLUMNS = (
    Column("timestamp", "text", "when the row was written, UTC, ISO 8601"),
    Column("commit", "text", "git commit of the source, -dirty where it was changed since; unknown outside git"),
    Column("host", "text", "name of the machine"),
    Column("device", "text", "the GPU's name, or cpu with its model and torch's number of threads"),
    Column("driver", "text", "version of the GPU's driver; empty on a CPU"),
    Column("torch", "text", "version of torch"),
    Column("triton", "text", "version of triton; empty where it is not installed"),
    Column("operator", "text", "a name of perf/operators.py; perf model: the model's name"),
    Column(
        "mode",
        "text",
        "fwd: forward without autograd; bwd: backward alone, of which dgrad: the input's gradient, wgrad: the "
        "weight's; full: forward and backward; of a network train: a step with Adam (perf model: with none, or the "
        "optimizer of its column); infer: forward in evaluation, without autograd",
    ),
    Column(
        "dtype",
        "text",
        "bf16, fp16 or fp32: of inputs, weights and outputs; train and infer: of autocast over float32 (fp32: none)",
    ),
    Column("layout", "text", "nhwc (channels_last) or nchw; empty where the operator has no images"),
    *SHAPE,
    Column("provider", "text", "whose code was measured"),
    Column("timing", "text", "wall: the call as a user makes it; cudagraph: replayed from a CUDA graph"),
    Column(
        "allocator",
        "text",
        "train and infer: default; faultless: glibc told to keep all memory it was ever given; shared: default, but "
        "all providers in one process; else empty",
    ),
    Column("config", "text", "kernels that were launched and their launch configurations; empty without Triton"),
    Column("ms_p20", "number", "milliseconds a call, 20th percentile of the repetitions"),
    Column("ms_p50", "number", "milliseconds a call, median"),
    Column("ms_p80", "number", "milliseconds a call, 80th percentile"),
    Column("tflops", "number", "flops / ms_p50, in 10^12 a second"),
    Column("gbps", "number", "bytes / ms_p50, in 10^9 a second"),
    Column(
        "bytes", "number", "least traffic of the mode: each operand of an operator read once, each result written once"
    ),
    Column(
        "flops", "number", "operations of the mode's products, a multiply-add counted as two; 0 where there is none"
    ),
    Column(
        "roofline_pct", "number", "least time at the peak rates (by bytes or by flops, the larger) / ms_p50, in percent"
    ),
    Column(
        "peak_tflops",
        "number",
        "the peak meant: a GPU's from core/targets.py, a CPU's as measured by a product",
    ),
    Column(
        "peak_gbps",
        "number",
        "the peak meant: a GPU's from core/targets.py, a CPU's as measured by a copy of about as many bytes",
    ),
    Column("speedup_vs_torch", "number", "ms_p50 of provider torch / ms_p50, measured in turns with it on a CPU"),
    Column(
        "ratio_p25",
        "number",
        "this provider's time over tkernels' in the same round, 25th percentile of the rounds; above 1 tkernels is "
        "ahead; CPU only",
    ),
    Column("ratio_p50", "number", "the same, median"),
    Column("ratio_p75", "number", "the same, 75th percentile"),
    Column("rounds", "whole", "rounds in which the providers took turns; CPU only"),
    Column("page_faults", "number", "minor page faults a call, median of the rounds; CPU only"),
    Column(
        "saved_mb", "number", "train: what autograd keeps from forward to backward, 10^6 bytes; not of torch.compile"
    ),
    Column("err_fp64", "number", "largest error of output and gradients against float64, relative norm"),
    Column("torch_err_fp64", "number", "the same of PyTorch in this dtype on this device"),
    Column(
        "peak_memory_mb",
        "number",
        "most memory a call allocated, 10^6 bytes; on a CPU of train and of perf model only: the process's "
        "largest resident memory in a step above what stands between steps, where the system tells",
    ),
    Column("host_us", "number", "microseconds until the call returned, not waiting for the GPU; empty on a CPU"),
    Column("status", "text", "ok; else wrong, error, out of memory, crashed, timeout or unsupported, with the reason"),
)
# What counts, and is not timed, begins with these columns, and counts these
COUNTED_FOR = (
    Column("commit", "text", "git commit of the source"),
    Column("torch", "text", "version of torch"),
    Column("triton", "text", "version of triton"),
    Column("target", "text", "the GPU the choosers believed in"),
)
COUNTED_BYTES = Column(
    "bytes", "whole", "arguments of launches and ATen calls, read once and written once, without workspaces"
)
COUNTED_CALLS = (
    Column("launches", "whole", "Triton launches"),
    Column("aten_calls", "whole", "ATen calls that compute (no views, no allocations)"),
)
NAMES = tuple(column.name for column in COLUMNS)
# What makes two rows the same measurement
KEY = ("device", "operator", "mode", "dtype", "layout", *SHAPE_COLUMNS, "provider", "timing",
       "allocator")  # fmt: skip
# The same without the device: what a sweep is asked for
TASK = KEY[1:]
# What CSVs of before have no column of
LATER = ("allocator", "ratio_p25", "ratio_p50", "ratio_p75", "rounds", "page_faults", "saved_mb")
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


def line(row: Mapping[str, Any], names: Sequence[str] = NAMES) -> str:
    """One row as a line of CSV. Raises KeyError for a column that is not among the names."""
    unknown = set(row) - set(names)
    if unknown:
        raise KeyError(f"not in the schema: {sorted(unknown)}")
    text = {name: shielded(value.replace("\n", " ").replace("\r", " ")) if isinstance(value, str) else value
            for name, value in row.items()}  # fmt: skip
    buffer = io.StringIO()
    pd.DataFrame([text], columns=list(names), dtype=object).to_csv(buffer, header=False, index=False)
    return buffer.getvalue()


class Writer:
    """Appends rows to a CSV, each whole and on disk before the call returns. Raises OSError where the disk is full."""

    def __init__(self, path: Path, names: Sequence[str] = NAMES) -> None:
        self._path, self._names = path, names
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        if self._file.tell() == 0:
            self._write(",".join(names) + "\n")

    def append(self, row: Mapping[str, Any]) -> None:
        self._write(line(row, self._names))

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


def require(frame: pd.DataFrame, columns: tuple[str, ...], path: Path) -> None:
    """Raise Refused unless the columns are there."""
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        shown = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        raise Refused(f"{path} lacks the columns {shown}")


def typed(frame: pd.DataFrame, columns: tuple[Column, ...], path: Path) -> pd.DataFrame:
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


def key(row: Mapping[str, Any], columns: tuple[str, ...] = TASK) -> tuple[str, ...]:
    """What tells one measurement from another, as text: the same for a row just made and one read back."""

    def text(value: Any) -> str:
        return "" if value is None or pd.isna(value) else str(value)

    return tuple(text(row[name]) for name in columns)


def shape_label(row: Mapping[str, Any]) -> str:
    """A row's shape in short: '256x32x32x32→64 3x3/2'; attention's as torch has it, '8x12x197x64', queries and keys
    '8x12x1x64 at 197' where they differ in number."""

    def get(name: str) -> int | None:
        value = row[name]
        return None if value is None or pd.isna(value) else int(value)

    n, c, h, w, k, r, s = (get(name) for name in ("N", "C", "H", "W", "K", "R", "S"))
    if row.get("operator") == "attention":
        return f"{n}x{k}x{h}x{c}" + (f" at {w}" if w != h else "")
    text = "x".join(str(v) for v in (n, c, h, w) if v is not None)
    if c is None:
        text = f"batch {n}"
    if k is not None:
        text += f"→{k}"
    if r is not None:
        text += f" {r}x{s}"
    if (get("stride") or 1) > 1:
        text += f"/{get('stride')}"
    if (get("groups") or 1) > 1:
        text += f" g{get('groups')}"
    return text
