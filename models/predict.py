"""Classify images, or the rows of CSV files: ``python -m models.predict CHECKPOINT FILE...``; or export the network.

Exit status: 0; 1 where a file could not be read, though the others are answered for; 2 for a bad option, a checkpoint
that cannot be used, or results that cannot be written.
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import answers, checkpoint, contents, images
from models.answers import Answer
from models.arguments import IntArgument, Parser, shown
from models.checkpoint import CheckpointError
from models.data import DataError
from models.networks import Network
from models.preprocessing import Preprocessing
from models.table import Table

PROGRAM = "python -m models.predict"
SUFFIXES = {".csv": "csv", ".json": "json", ".txt": "text"}


class PredictError(Exception):
    """A checkpoint that cannot be used as asked, or a file to write; the message says why in one line."""


class Probabilities(nn.Module):
    """Images (N, 3, S, S) of floats in [0, 1] -> probabilities (N, classes): normalisation, network, softmax."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return torch.softmax(self.model((images - self.mean) / self.std).float(), 1)


class Loaded(NamedTuple):
    """A checkpoint's network, which gives probabilities; its description; of rows, how a table becomes them."""

    model: nn.Module
    network: Network
    preprocessing: Preprocessing | None


# a file's name, for a row the line it begins on, and what the network takes
Item = tuple[str, int | None, Tensor]


class _Failures:
    """Within it a DataError is said and counted, no more."""

    count = 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if not isinstance(error, DataError):
            return False
        self.count += 1
        _say("error", error)
        return True


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    args = _parse(argv)
    failures = _Failures()
    try:
        loaded = load(args.checkpoint)
        if args.out is not None:
            _check_out(args.out, [args.checkpoint, *args.files])
        if args.export is not None:
            export(loaded, args.export)
            _print(f"wrote {args.export}\n")
        if args.files:
            _answer(args, loaded, failures)
    except (PredictError, CheckpointError, OSError) as error:
        _say("error", error)
        return 2
    return 1 if failures.count else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog=PROGRAM,
        description="Name the class of each image, or of each row of a CSV file, and its probability, by a checkpoint "
        "of python -m models.train; --export writes the network as a torch.export program.",
        epilog="CHECKPOINT may be of another program, a state_dict or a dictionary with model_state_dict, its layers "
        "named as here or numbered as in nn.Sequential(features), nn.Sequential(classifier): images are normalised "
        "as CIFAR-10 is here then, and classes are CIFAR-10's if they are ten, else numbers. "
        "A checkpoint of --data csv:FILE takes files with the columns it was trained on, in any order; the class's own "
        "need not be there, others are ignored, categories that training had not count as none. "
        "In CSV and JSON an image has file, class and probability, with --top class_2, probability_2 and so on; a row "
        "has the line it begins on too. A file that cannot be read has a line on standard error and no answer. "
        "The exported program takes images (N, 3, S, S) of floats in [0, 1] and gives probabilities (N, classes); "
        "torch.export.load reads it without this package. Its extra file classes.txt has the classes' names. "
        "Exit status: 0; 1 where a file could not be read; 2 for a bad option or checkpoint, or where results cannot "
        "be written.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint.pt of a training run")
    add("files", type=Path, nargs="*", metavar="FILE",
        help="images that Pillow reads: PNG, JPEG, ... (transparent is white, a tag turns, of several pictures the "
        "first), directories of such, or, for a checkpoint of --data csv:FILE, CSV files")  # fmt: skip
    add("--top", type=IntArgument(1), default=1, metavar="K", help="the K likeliest classes (default: 1)")
    add("--format", choices=tuple(answers.FORMATS),
        help="how answers are written (default: as --out ends; else text for images, csv for rows)")  # fmt: skip
    add("--out", type=Path, metavar="FILE", help="write the answers here, as FILE.csv, FILE.json or FILE.txt (default: "
        "standard output)")  # fmt: skip
    add("--batch-size", type=IntArgument(1), default=64, metavar="N", help="images or rows at a time (default: 64)")
    add("--export", type=Path, metavar="FILE", help="write the program here, as FILE.pt2")
    args = parser.parse_args(argv)
    if not args.files and args.export is None:
        parser.error("nothing to do: give files, or --export FILE")
    if args.format is None and args.out is not None:
        args.format = SUFFIXES.get(args.out.suffix.lower())
        if args.format is None:
            parser.error(f"argument --out: {args.out} must end in {', '.join(SUFFIXES)}, or --format be given")
    return args


def _check_out(out: Path, inputs: Sequence[Path]) -> None:
    """Raise PredictError where results cannot be written, before any are computed, or would replace an input."""
    if not out.parent.is_dir():
        raise PredictError(f"--out {out}: there is no directory {out.parent}")
    if out.exists():
        if not out.is_file():  # a device would be replaced by a file
            raise PredictError(f"--out {out} is no regular file")
        listed = (
            file for path in inputs if path.exists() for file in ([path] if path.is_file() else images.below(path))
        )
        if any(file.exists() and file.samefile(out) for file in listed):
            raise PredictError(f"--out {out} is what is to be read")


def load(path: Path) -> Loaded:
    """A checkpoint's network, on the CPU. Raises CheckpointError, or PredictError for rows of unknown columns."""
    network, weights, preprocessing = checkpoint.load_weights(path)
    if network.takes_rows and preprocessing is None:
        raise PredictError(
            f"{path} classifies rows of {network.features} numbers and does not say of which columns: that is known of "
            f"what was trained with --data csv:FILE, by this version or a later one"
        )
    with checkpoint.naming(path):
        one_line = network.takes_rows or not any("\n" in name for name in network.classes)
        contents.must(one_line, "network: classes", "names of one line", list(network.classes))
    try:
        layout = network.layout()  # sizes that do not fit the weights must not be allocated
        wanted = layout.state_dict()
        layout.load_state_dict(weights, assign=True)
        for name, value in wanted.items():
            if not _fits(weights[name], value):
                raise CheckpointError(f"{path} is damaged: its weights {name} are no finite numbers of {value.dtype}")
        model = network.build(fused=False)
        model.load_state_dict(weights)
    except (AttributeError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold the weights it describes: {error}") from error
    probabilities = (
        nn.Sequential(model, nn.Softmax(1)) if network.takes_rows else Probabilities(model, network.mean, network.std)
    )
    return Loaded(probabilities.eval().requires_grad_(False), network, preprocessing)


def _fits(value: Tensor, wanted: Tensor) -> bool:
    """Whether a tensor of the right shape holds what the network's own of that name may hold."""
    plain = value.layout == torch.strided and value.device.type == "cpu" and value.dtype == wanted.dtype
    return plain and bool(torch.isfinite(value).all())


def _answer(args: argparse.Namespace, loaded: Loaded, failures: _Failures) -> None:
    """Write the answers for ``args.files``: to ``args.out`` all at once, to standard output as they come."""
    model, network, preprocessing = loaded
    top = min(args.top, len(network.classes))
    rows = preprocessing is not None
    items = _images(args.files, network, failures)
    if preprocessing is not None:
        items = _rows(args.files, preprocessing, failures)
    found: Iterable[Answer] = _answers(args.checkpoint, model, network.classes, items, top, args.batch_size)
    if args.out is not None:
        found = list(found)
        if failures.count and not found:
            return
    pieces = answers.FORMATS[args.format or ("csv" if rows else "text")](found, answers.names(top, rows))
    if args.out is None:
        for piece in pieces:
            _print(piece)
    else:
        checkpoint.write(args.out, "".join(pieces).encode("utf-8", "backslashreplace"))
        _print(f"wrote {args.out}\n")


def _images(paths: Sequence[Path], network: Network, failures: _Failures) -> Iterator[Item]:
    for path in paths:
        with failures:
            for file in images.files(path):
                with failures:
                    yield str(file), None, read(file, network.image_size, network.resize)[0]


def _rows(paths: Sequence[Path], preprocessing: Preprocessing, failures: _Failures) -> Iterator[Item]:
    for path in paths:
        with failures:
            table = Table(path)
            inputs = torch.from_numpy(preprocessing.inputs(table))
            for note in preprocessing.notes(table):
                _say("note", note)
            yield from zip(itertools.repeat(str(path)), table.lines, inputs)


def _answers(
    path: Path, model: nn.Module, classes: Sequence[str], items: Iterator[Item], top: int, batch_size: int
) -> Iterator[Answer]:
    """Raises PredictError where the network of the checkpoint ``path`` has no answer."""
    while batch := list(itertools.islice(items, batch_size)):
        files, lines, inputs = zip(*batch)
        probabilities = model(torch.stack(inputs))
        for i in (~torch.isfinite(probabilities).all(1)).nonzero().flatten().tolist():
            raise PredictError(f"{path} has no finite answer for {files[i]}")
        values, indices = probabilities.topk(top)
        for file, line, shares, places in zip(files, lines, values.tolist(), indices.tolist()):
            yield Answer(file, line, [(classes[place], share) for place, share in zip(places, shares)])


def read(path: Path, size: int, resize: int = 0) -> Tensor:
    """An image file as (1, 3, size, size) in [0, 1], as training fits it. Raises DataError where it is none."""
    from torchvision.transforms import v2

    from models import augment

    prepare = v2.Compose([v2.ToDtype(torch.float32, scale=True), *augment.fit(size, resize)])
    return prepare(images.read(path, max(size, resize))).unsqueeze(0)


def export(loaded: Loaded, path: Path) -> None:
    """Write the network to ``path`` as a torch.export program of any number of images. Raises PredictError."""
    if path.suffix != ".pt2":
        raise PredictError(f"--export {path}: the name must end in .pt2")
    if loaded.network.takes_rows:
        raise PredictError(f"--export {path}: networks of images are exported, not those of rows")
    size = loaded.network.image_size
    # (of weights in channels_last, as training may leave them, the exporter warns)
    model = copy.deepcopy(loaded.model).to(memory_format=torch.contiguous_format)
    program = torch.export.export(
        model, (torch.zeros(2, 3, size, size),), dynamic_shapes=({0: torch.export.Dim("images", min=1)},)
    )
    whole = io.BytesIO()  # torch writing to a full disk ends the process
    torch.export.save(program, whole, extra_files={"classes.txt": "\n".join(loaded.network.classes)})
    checkpoint.write(path, whole.getbuffer())


def _say(kind: str, what: object) -> None:
    """A line on standard error."""
    print(f"{PROGRAM}: {kind}: {' '.join(str(what).split())}", file=sys.stderr)


def _print(text: str) -> None:
    print(shown(text), end="")


if __name__ == "__main__":
    sys.exit(main())
