"""Classify images with a trained checkpoint: ``python -m models.predict CHECKPOINT IMAGE...``, or export its network.

Exit status: 0; 2 for a bad option, a file that cannot be read, or a checkpoint of rows instead of images.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from models import checkpoint, contents, images
from models.arguments import IntArgument, Parser
from models.checkpoint import CheckpointError
from models.data import DataError
from models.networks import Network

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
        epilog="CHECKPOINT may be of another program, a state_dict or a dictionary with model_state_dict, its layers "
        "named as here or numbered as in nn.Sequential(features), nn.Sequential(classifier): images are normalised "
        "as CIFAR-10 is here then, and classes are CIFAR-10's if they are ten, else numbers. "
        "The exported program takes images (N, 3, S, S) of floats in [0, 1] and gives probabilities (N, classes); "
        "torch.export.load reads it without this package. Its extra file classes.txt has the classes' names.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint.pt of a training run")
    add("images", type=Path, nargs="*", metavar="IMAGE",
        help="files that Pillow reads: PNG, JPEG, ... (transparent is white, a tag turns)")  # fmt: skip
    add("--top", type=IntArgument(1), default=1, metavar="K", help="the K likeliest classes (default: 1)")
    add("--export", type=Path, default=None, metavar="FILE", help="write the program here, as FILE.pt2")
    args = parser.parse_args(argv)
    if not args.images and args.export is None:
        parser.error("nothing to do: give images, or --export FILE")
    try:
        model, network = load(args.checkpoint)
        if args.export is not None:
            export(model, network, args.export)
            _print(f"wrote {args.export}")
        for path in args.images:
            probabilities = model(read(path, network.image_size))
            if not torch.isfinite(probabilities).all():
                raise PredictError(f"{args.checkpoint} has no finite answer for {path}")
            _print(f"{path}: {_answer(probabilities, network.classes, args.top)}")
    except (PredictError, CheckpointError, DataError, OSError) as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def load(path: Path) -> tuple[Probabilities, Network]:
    """(network, its description) of a checkpoint, on the CPU. Raises CheckpointError, or PredictError for an MLP's."""
    network, weights, _ = checkpoint.load_weights(path)
    if network.takes_rows:
        raise PredictError(f"{path} classifies rows of {network.features} numbers, no images")
    with checkpoint.naming(path):
        one_line = not any("\n" in name for name in network.classes)
        contents.must(one_line, "network: classes", "names of one line", list(network.classes))
    try:
        with torch.device("meta"):  # sizes that do not fit the weights must not be allocated
            layout = network.build(fused=False)
        wanted = layout.state_dict()
        layout.load_state_dict(weights, assign=True)
        for name, value in wanted.items():
            if not _fits(weights[name], value):
                raise CheckpointError(f"{path} is damaged: its weights {name} are no finite numbers of {value.dtype}")
        model = network.build(fused=False)
        model.load_state_dict(weights)
    except (AttributeError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold the weights it describes: {error}") from error
    return Probabilities(model, network.mean, network.std).eval().requires_grad_(False), network


def _fits(value: Tensor, wanted: Tensor) -> bool:
    """Whether a tensor of the right shape holds what the network's own of that name may hold."""
    plain = value.layout == torch.strided and value.device.type == "cpu" and value.dtype == wanted.dtype
    return plain and bool(torch.isfinite(value).all())


def read(path: Path, size: int) -> Tensor:
    """An image file as (1, 3, size, size) in [0, 1]. Raises DataError where it is none."""
    from torchvision.transforms import v2

    prepare = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Resize((size, size), antialias=True)])
    return prepare(images.read(path)).unsqueeze(0)


def export(model: Probabilities, network: Network, path: Path) -> None:
    """Write the network to ``path`` as a torch.export program of any number of images. Raises PredictError."""
    if path.suffix != ".pt2":
        raise PredictError(f"--export {path}: the name must end in .pt2")
    size = network.image_size
    program = torch.export.export(
        model, (torch.zeros(2, 3, size, size),), dynamic_shapes=({0: torch.export.Dim("images", min=1)},)
    )
    whole = io.BytesIO()  # torch writing to a full disk ends the process
    torch.export.save(program, whole, extra_files={"classes.txt": "\n".join(network.classes)})
    checkpoint.write(path, whole.getbuffer())


def _print(line: str) -> None:
    """Print, whatever bytes are in a file's name and whatever the screen can show."""
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding))


def _answer(probabilities: Tensor, classes: Sequence[str], top: int) -> str:
    values, indices = probabilities[0].topk(min(top, len(classes)))
    return ", ".join(f"{classes[i]} {value:.2%}" for value, i in zip(values.tolist(), indices.tolist()))


if __name__ == "__main__":
    sys.exit(main())
