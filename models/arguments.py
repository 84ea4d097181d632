"""The arguments of ``python -m models.train`` and what each accepts."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NoReturn

import tkernels
from models import data, recipes
from tkernels.core import mode

PROGRAM = "python -m models.train"
MODELS = ("fused", "plain", "attention")
AMP = ("off", "bf16", "fp16")
LOADERS = ("device", "workers")


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line: no usage before them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> Parser:
    """Options whose default depends on others are None where they are not given."""
    parser = Parser(
        prog=PROGRAM,
        description="Train a classifier, of images or of the rows of a table, and write to a directory history.csv, "
        "curves.png, confusion.png and checkpoint.pt.",
        epilog="The same seed gives the same weights, bit for bit, on the CPU with the same number of threads, "
        "however often training was interrupted and resumed. Several processes: "
        "torchrun --nproc-per-node N -m models.train ...",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=100),
    )
    _add_data(parser.add_argument_group("data"))
    _add_loading(parser.add_argument_group("loading and augmentation"))
    _add_network(parser.add_argument_group("network"))
    _add_training(parser.add_argument_group("training"))
    _add_results(parser.add_argument_group("results"))
    return parser


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data", type=_data, default="digits", metavar="NAME",
        help="digits: 1,797 handwritten digits that come with scikit-learn; cifar10: CIFAR-10, downloaded if need be; "
        "csv:FILE: the rows of a CSV file with a first line of names; synthetic: 1,000 rows of 10 normal numbers, "
        "classified by the sign of their sum; fake: noise of CIFAR-10's shape (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--data-dir", type=Path, default=Path("data"), metavar="DIR", help="where CIFAR-10 lies (default: %(default)s)"
    )
    group.add_argument(
        "--target", default=None, metavar="COLUMN", help="with csv: the column that holds the class (default: the last)"
    )
    group.add_argument(
        "--categorical", nargs="+", default=[], metavar="COLUMN",
        help="with csv: columns of categories though they look like numbers, such as postal codes (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--val-fraction", type=_fraction, default=None, metavar="F",
        help="part of the training data held out at random to validate (default: 0.2; with cifar10 its test images "
        "validate)",
    )  # fmt: skip


def _add_loading(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--loader", choices=LOADERS, default="device",
        help="device: all data lie on the device from the start; workers: a DataLoader brings batches "
        "(default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--workers", type=Whole(0), default=2, metavar="N",
        help="processes that load, with --loader workers; 0: the training process itself (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--pin-memory", action=argparse.BooleanOptionalAction, default=None,
        help="page-locked memory for batches, with --loader workers (default: on a GPU yes)",
    )  # fmt: skip
    group.add_argument(
        "--drop-last", action=argparse.BooleanOptionalAction, default=False,
        help="leave out an epoch's last batch if it is not full (default: no)",
    )  # fmt: skip
    group.add_argument(
        "--image-size", type=Whole(8, 1024), default=32, metavar="N",
        help="images are resized to N x N (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--flip", action=argparse.BooleanOptionalAction, default=None,
        help="mirror every other training image at random (default: with cifar10 yes)",
    )  # fmt: skip
    group.add_argument(
        "--rotate", type=_angle, default=None, metavar="DEGREES",
        help="turn training images by up to so much (default: 10 for cifar10, else 0)",
    )  # fmt: skip


def _add_network(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model", choices=MODELS, default="fused",
        help="fused: built from tkernels.nn; plain: from torch.nn; checkpoints fit both; attention: fused, with "
        "self-attention on the last feature map (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--width", type=Whole(1, 4096), default=32, metavar="N",
        help="channels of the CNN's first stage; the later layers scale with it (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--backend", choices=mode.BACKENDS, default=tkernels.get_backend(),
        help="how fused modules run: triton, torch, or auto: Triton on a GPU, PyTorch elsewhere "
        "(default: %(default)s; TKERNELS_BACKEND sets it)",
    )  # fmt: skip
    group.add_argument(
        "--device", default=None,
        help="cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu; with torchrun a GPU a process)",
    )  # fmt: skip
    group.add_argument(
        "--amp", choices=AMP, default=None,
        help="mixed precision: bf16, or fp16 with a scaled loss (default: off; with --recipe fast bf16 on a GPU)",
    )  # fmt: skip
    group.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False,
        help="compile the network with torch.compile (default: no)",
    )  # fmt: skip
    group.add_argument(
        "--cuda-graph", action=argparse.BooleanOptionalAction, default=None,
        help="replay the training step as a CUDA graph, which saves the host's time (default: on a GPU yes, unless "
        "fp16, several processes or accumulation forbid it)",
    )  # fmt: skip
    group.add_argument(
        "--sync-bn", action=argparse.BooleanOptionalAction, default=True,
        help="with several processes: batch norm's statistics are those of all of them (default: yes)",
    )  # fmt: skip


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--recipe", choices=tuple(recipes.RECIPES), default="default",
        help="sets the defaults of what follows: Adam along a cosine; or, fast, a few epochs of SGD-Nesterov in larger "
        "batches with smoothed labels (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--epochs", type=Whole(0), default=None, metavar="N",
        help="passes over the training data; 0 only validates the initial weights " + _by_recipe("epochs"),
    )  # fmt: skip
    group.add_argument(
        "--batch-size", type=Whole(1, 2**31 - 1), default=None, metavar="N",
        help="examples a batch, of all processes together " + _by_recipe("batch_size"),
    )  # fmt: skip
    group.add_argument(
        "--accumulate", type=Whole(1), default=1, metavar="N",
        help="batches whose gradients make one step (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--optimizer", choices=recipes.OPTIMIZERS, default=None,
        help="adam, adamw, or sgd with Nesterov momentum " + _by_recipe("optimizer"),
    )  # fmt: skip
    group.add_argument(
        "--lr", type=_positive, default=None, metavar="RATE", help="the largest learning rate " + _by_recipe("lr")
    )
    group.add_argument(
        "--schedule", choices=recipes.SCHEDULES, default=None,
        help="how the learning rate falls to 0 after warm-up, or that it stays " + _by_recipe("schedule"),
    )  # fmt: skip
    group.add_argument(
        "--warmup", type=_part, default=None, metavar="F",
        help="part of the run in which the learning rate rises to --lr " + _by_recipe("warmup"),
    )  # fmt: skip
    group.add_argument("--momentum", type=_part, default=0.9, metavar="F", help="of sgd (default: %(default)s)")
    group.add_argument(
        "--weight-decay", type=_not_negative, default=None, metavar="RATE",
        help="L2 penalty of adam; decay of weights, not of biases and norms, of adamw and sgd "
        + _by_recipe("weight_decay"),
    )  # fmt: skip
    group.add_argument(
        "--label-smoothing", type=_part, default=None, metavar="F",
        help="part of each label that is spread over all classes " + _by_recipe("label_smoothing"),
    )  # fmt: skip
    group.add_argument(
        "--clip", type=_not_negative, default=None, metavar="NORM",
        help="scale gradients down to this norm, all together; 0: never " + _by_recipe("clip"),
    )  # fmt: skip
    group.add_argument(
        "--seed", type=Whole(0, 2**32 - 1), default=0, metavar="N",
        help="of weights, split, order, augmentation and dropout (default: %(default)s)",
    )  # fmt: skip


def _add_results(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--out", type=Path, default=None, metavar="DIR",
        help="where results go; files of an earlier run there are replaced (default: runs/NAME-OF-THE-DATA)",
    )  # fmt: skip
    group.add_argument(
        "--resume", action="store_true",
        help="go on from the newest good checkpoint in --out, which every epoch, SIGTERM and SIGINT leave there; "
        "give the same options again (default: no)",
    )  # fmt: skip
    group.add_argument(
        "--plot-gradients", action="store_true",
        help="draw gradients.png: mean and largest gradient of every layer in the last step (default: no)",
    )  # fmt: skip
    group.add_argument(
        "--tensorboard", action="store_true",
        help="write loss and accuracy for TensorBoard too, which must be installed (default: no)",
    )  # fmt: skip


def _by_recipe(name: str) -> str:
    """The default of an option, where recipes differ of each."""
    values = {recipe: getattr(values, name) for recipe, values in recipes.RECIPES.items()}
    texts = {
        recipe: f"{v[1]}, for cifar10 {v[0]}" if isinstance(v, tuple) else f"{v:g}" if isinstance(v, float) else v
        for recipe, v in values.items()
    }
    if len(set(texts.values())) == 1:
        return f"(default: {texts['default']})"
    return f"(default: {texts['default']}; fast: {texts['fast']})"


def _data(text: str) -> str:
    if text in data.NAMES or (text.startswith("csv:") and len(text) > 4):
        return text
    raise argparse.ArgumentTypeError(f"must be one of {', '.join(data.NAMES)} or csv:FILE, got {text!r}")


class Whole:
    """Type of an option: a whole number within bounds."""

    def __init__(self, low: int, high: int | None = None) -> None:
        self.low, self.high = low, high

    def __call__(self, text: str) -> int:
        bounds = f"at least {self.low}" if self.high is None else f"from {self.low} to {self.high}"
        complaint = argparse.ArgumentTypeError(f"must be a whole number, {bounds}, got {text!r}")
        try:
            value = int(text)
        except ValueError:
            raise complaint from None
        if value < self.low or (self.high is not None and value > self.high):
            raise complaint
        return value


def _number(text: str, low: float, high: float, bounds: str, ends: bool = True) -> float:
    complaint = argparse.ArgumentTypeError(f"must be a finite number, {bounds}, got {text!r}")
    try:
        value = float(text)
    except ValueError:
        raise complaint from None
    inside = low <= value <= high if ends else low < value < high
    if not (math.isfinite(value) and inside):
        raise complaint
    return value


def _positive(text: str) -> float:
    return _number(text, 0.0, math.inf, "above 0", ends=False)


def _not_negative(text: str) -> float:
    return _number(text, 0.0, math.inf, "0 or more")


def _part(text: str) -> float:
    return _number(text, 0.0, math.nextafter(1.0, 0.0), "from 0 to below 1")


def _fraction(text: str) -> float:
    return _number(text, 0.0, 1.0, "between 0 and 1", ends=False)


def _angle(text: str) -> float:
    return _number(text, 0.0, 180.0, "from 0 to 180")
