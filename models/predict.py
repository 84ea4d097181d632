"""Classify images with a trained checkpoint: ``python -m models.predict CHECKPOINT IMAGE...``, or export its network.

Exit status: 0; 2 for a bad option, a file that cannot be read, or a checkpoint of rows instead of images.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import checkpoint, networks
from models.arguments import Parser, Whole
from models.checkpoint import CheckpointError

PROGRAM = "python -m models.predict"


class PredictError(Exception):
    """An image or a checkpoint that cannot be used; the message says why in one line."""


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
    parser.add_argument("images", type=Path, nargs="*", metavar="IMAGE", help="files that Pillow reads: PNG, JPEG, ...")
    parser.add_argument("--top", type=Whole(1), default=1, metavar="K", help="the K likeliest classes (default: 1)")
    parser.add_argument("--export", type=Path, default=None, metavar="FILE", help="write the program here, as FILE.pt2")
    args = parser.parse_args(argv)
    if not args.images and args.export is None:
        parser.error("nothing to do: give images, or --export FILE")
    try:
        model, network = load(args.checkpoint)
        if args.export is not None:
            export(model, network, args.export)
            print(f"wrote {args.export}")
        for path in args.images:
            print(f"{path}: {_answer(model(read(path, network['image_size'])), network['classes'], args.top)}")
    except (PredictError, CheckpointError, OSError) as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def load(path: Path) -> tuple[Probabilities, dict[str, Any]]:
    """(network, its description) of a checkpoint, on the CPU. Raises CheckpointError, or PredictError for an MLP's."""
    state = checkpoint.load(path)
    network = state["network"]
    if network["kind"] == "mlp":
        raise PredictError(f"{path} classifies rows of {network['features']} numbers, no images")
    model = networks.build(network, fused=False)
    try:
        model.load_state_dict(state["model_state_dict"])
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not hold the weights it describes: {error}") from error
    return Probabilities(model, network["mean"], network["std"]).eval().requires_grad_(False), network


def read(path: Path, size: int) -> Tensor:
    """An image file as (1, 3, size, size) in [0, 1]. Raises PredictError where it is none."""
    from PIL import Image, UnidentifiedImageError
    from torchvision.transforms import v2

    try:
        with Image.open(path) as image:
            pixels = v2.functional.pil_to_tensor(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise PredictError(f"{path} is no image that can be read") from error
    prepare = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Resize((size, size), antialias=True)])
    return prepare(pixels).unsqueeze(0)


def export(model: Probabilities, network: dict[str, Any], path: Path) -> None:
    """Write the network to ``path`` as a torch.export program of any number of images. Raises PredictError."""
    if path.suffix != ".pt2":
        raise PredictError(f"--export {path}: the name must end in .pt2")
    example = (torch.zeros(2, 3, network["image_size"], network["image_size"]),)
    program = torch.export.export(model, example, dynamic_shapes=({0: torch.export.Dim("images", min=1)},))
    torch.export.save(program, path, extra_files={"classes.txt": "\n".join(network["classes"])})


def _answer(probabilities: Tensor, classes: Sequence[str], top: int) -> str:
    values, indices = probabilities[0].topk(min(top, len(classes)))
    return ", ".join(f"{classes[i]} {value:.2%}" for value, i in zip(values.tolist(), indices.tolist()))


if __name__ == "__main__":
    sys.exit(main())
