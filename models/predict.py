"""Classify images with a trained checkpoint: ``python -m models.predict CHECKPOINT IMAGE...``, or export its network.

Exit status: 0; 2 for a bad option, a file that cannot be read, or a checkpoint of rows instead of images.
"""

from __future__ import annotations

import io
import reprlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import checkpoint, images, networks
from models.arguments import Parser, Whole
from models.checkpoint import CheckpointError
from models.data import DataError

PROGRAM = "python -m models.predict"


class PredictError(Exception):
    """A checkpoint that cannot be used for images, or a file to write; the message says why in one line."""


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


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = Parser(
        prog=PROGRAM,
        description="Name the class of each image and its probability, by a checkpoint of python -m models.train; "
        "--export writes the network as a torch.export program.",
        epilog="The program takes images (N, 3, S, S) of floats in [0, 1] and gives probabilities (N, classes); "
        "torch.export.load reads it without this package. Its extra file classes.txt has the classes' names.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint.pt of a training run")
    parser.add_argument(
        "images",
        type=Path,
        nargs="*",
        metavar="IMAGE",
        help="files that Pillow reads: PNG, JPEG, ... (transparent is white, a tag turns)",
    )
    parser.add_argument("--top", type=Whole(1), default=1, metavar="K", help="the K likeliest classes (default: 1)")
    parser.add_argument("--export", type=Path, default=None, metavar="FILE", help="write the program here, as FILE.pt2")
    args = parser.parse_args(argv)
    if not args.images and args.export is None:
        parser.error("nothing to do: give images, or --export FILE")
    try:
        model, network = load(args.checkpoint)
        if args.export is not None:
            export(model, network, args.export)
            _print(f"wrote {args.export}")
        for path in args.images:
            probabilities = model(read(path, network["image_size"]))
            if not torch.isfinite(probabilities).all():
                raise PredictError(f"{args.checkpoint} has no finite answer for {path}")
            _print(f"{path}: {_answer(probabilities, network['classes'], args.top)}")
    except (PredictError, CheckpointError, DataError, OSError) as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def load(path: Path) -> tuple[Probabilities, dict[str, Any]]:
    """(network, its description) of a checkpoint, on the CPU. Raises CheckpointError, or PredictError for an MLP's."""
    state = checkpoint.load(path)
    network, weights = state["network"], state["model_state_dict"]
    wrong = _wrong(network)
    if wrong:
        raise CheckpointError(f"{path} is damaged: its network's {wrong}")
    if network["kind"] == "mlp":
        raise PredictError(f"{path} classifies rows of {network['features']} numbers, no images")
    try:
        with torch.device("meta"):  # sizes that do not fit the weights must not be allocated
            layout = networks.build(network, fused=False)
        wanted = layout.state_dict()
        layout.load_state_dict(weights, assign=True)
        for name, value in wanted.items():
            if not _fits(weights[name], value):
                raise CheckpointError(f"{path} is damaged: its weights {name} are no finite numbers of {value.dtype}")
        model = networks.build(network, fused=False)
        model.load_state_dict(weights)
    except (AttributeError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold the weights it describes: {error}") from error
    return Probabilities(model, network["mean"], network["std"]).eval().requires_grad_(False), network


def _fits(value: Tensor, wanted: Tensor) -> bool:
    """Whether a tensor of the right shape holds what the network's own of that name may hold."""
    plain = value.layout == torch.strided and value.device.type == "cpu" and value.dtype == wanted.dtype
    return plain and bool(torch.isfinite(value).all())


def _wrong(network: Any) -> str:
    """What of a network's description is of a kind that training does not write; empty if nothing is."""
    if not isinstance(network, dict):
        return f"description is a {type(network).__name__}"
    kind = network.get("kind")
    if kind not in ("mlp", "cnn", "attention"):
        return f"kind is {reprlib.repr(kind)}"
    for name in ("features",) if kind == "mlp" else ("width", "image_size"):
        if type(network.get(name)) is not int or network[name] < 1:
            return f"{name} is {reprlib.repr(network.get(name))}"
    classes = network.get("classes")
    if not (isinstance(classes, list) and classes and all(type(name) is str and "\n" not in name for name in classes)):
        return f"classes are {reprlib.repr(classes)}"
    # of colours in [0, 1]
    for name, least in (("mean", 0.0), ("std", 1e-6)) if kind != "mlp" else ():
        value = network.get(name)
        if not (
            isinstance(value, list) and len(value) == 3 and all(type(x) is float and least <= x <= 1 for x in value)
        ):
            return f"{name} is {reprlib.repr(value)}"
    return ""


def read(path: Path, size: int) -> Tensor:
    """An image file as (1, 3, size, size) in [0, 1]. Raises DataError where it is none."""
    from torchvision.transforms import v2

    prepare = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Resize((size, size), antialias=True)])
    return prepare(images.read(path)).unsqueeze(0)


def export(model: Probabilities, network: dict[str, Any], path: Path) -> None:
    """Write the network to ``path`` as a torch.export program of any number of images. Raises PredictError."""
    if path.suffix != ".pt2":
        raise PredictError(f"--export {path}: the name must end in .pt2")
    example = (torch.zeros(2, 3, network["image_size"], network["image_size"]),)
    program = torch.export.export(model, example, dynamic_shapes=({0: torch.export.Dim("images", min=1)},))
    whole = io.BytesIO()  # torch writing to a full disk ends the process
    torch.export.save(program, whole, extra_files={"classes.txt": "\n".join(network["classes"])})
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(whole.getbuffer())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _print(line: str) -> None:
    """Print, whatever bytes are in a file's name and whatever the screen can show."""
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding))


def _answer(probabilities: Tensor, classes: Sequence[str], top: int) -> str:
    values, indices = probabilities[0].topk(min(top, len(classes)))
    return ", ".join(f"{classes[i]} {value:.2%}" for value, i in zip(values.tolist(), indices.tolist()))


if __name__ == "__main__":
    sys.exit(main())
