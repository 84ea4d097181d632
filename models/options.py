"""The command line of ``python -m models.train``: every option, checked before any work is done."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

import tkernels
from models import data
from tkernels import runtime

PROGRAM = "python -m models.train"
MODELS = ("fused", "plain", "attention")
EPOCHS = {"digits": 10, "cifar10": 50}
BATCH_SIZE = {"digits": 32, "cifar10": 128}


@dataclass(frozen=True)
class Options:
    """What to train, on what, and how."""

    data: str
    data_dir: Path
    model: str
    backend: str
    device: torch.device
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    cuda_graph: bool
    seed: int
    out: Path


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line: no usage before them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(argv: Sequence[str] | None = None) -> Options:
    """The options given. Exits with status 2 and one line on stderr where one is unknown or absurd."""
    parser = _build_parser()
    args = parser.parse_args(argv)
    if args.epochs is None:
        args.epochs = EPOCHS[args.data]
    if args.batch_size is None:
        args.batch_size = BATCH_SIZE[args.data]
    if args.out is None:
        args.out = Path("runs") / args.data
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"argument --out: {args.out} is a file, a directory is needed")
    try:
        args.device = _device(args.device)
    except ValueError as error:
        parser.error(f"argument --device: {error}")
    if args.backend == "triton":
        if args.model == "plain":
            parser.error("argument --backend: 'triton' needs --model fused or attention: plain is all PyTorch")
        reason = runtime.why_not_triton(torch.empty(0, device=args.device))
        if reason is not None:
            parser.error(f"argument --backend: 'triton' cannot run here: {reason}")
    on_gpu = args.device.type == "cuda"
    if args.cuda_graph and not on_gpu:
        parser.error(f"argument --cuda-graph: needs a GPU, the device is {args.device}")
    if args.cuda_graph is None:
        args.cuda_graph = on_gpu
    return Options(**vars(args))


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Train the CIFAR classifier and write history.csv, curves.png and checkpoint.pt to a directory.",
        epilog="The same seed gives the same weights, bit for bit, on the CPU with the same number of threads.",
        allow_abbrev=False,
    )

    images = parser.add_argument_group("images")
    images.add_argument(
        "--data",
        choices=data.NAMES,
        default="digits",
        help="digits: 1,797 handwritten digits that come with scikit-learn, 80%% to train on; "
        "cifar10: CIFAR-10, downloaded if need be (default: %(default)s)",
    )
    images.add_argument(
        "--data-dir", type=Path, default=Path("data"), metavar="DIR", help="where CIFAR-10 lies (default: %(default)s)"
    )

    network = parser.add_argument_group("network")
    network.add_argument(
        "--model",
        choices=MODELS,
        default="fused",
        help="fused: built from tkernels.nn; plain: from torch.nn; checkpoints fit both; attention: fused, with "
        "self-attention on the last feature map (default: %(default)s)",
    )
    network.add_argument(
        "--backend",
        choices=runtime.BACKENDS,
        default=tkernels.get_backend(),
        help="how fused modules run: triton, torch, or auto: Triton on a GPU, PyTorch elsewhere "
        "(default: %(default)s; TKERNELS_BACKEND sets it)",
    )
    network.add_argument(
        "--device",
        default=None,
        help="cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs",
        type=_whole(0),
        default=None,
        metavar="N",
        help="passes over the training images; 0 only validates the initial weights " + _by_data(EPOCHS),
    )
    training.add_argument(
        "--batch-size",
        type=_whole(1, 2**31 - 1),
        default=None,
        metavar="N",
        help="images a step " + _by_data(BATCH_SIZE),
    )
    training.add_argument(
        "--lr",
        type=_positive,
        default=1e-3,
        metavar="RATE",
        help="Adam's learning rate at the start; it falls to 0 along a cosine (default: %(default)s)",
    )
    training.add_argument(
        "--weight-decay",
        type=_not_negative,
        default=1e-4,
        metavar="RATE",
        help="Adam's L2 penalty (default: %(default)s)",
    )
    training.add_argument(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="replay the training step as a CUDA graph, which saves the host's time (default: on a GPU yes)",
    )
    training.add_argument(
        "--seed",
        type=_whole(0, 2**32 - 1),
        default=0,
        metavar="N",
        help="of weights, split, order and dropout (default: %(default)s)",
    )
    training.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="DIR",
        help="where results go; files of an earlier run there are replaced (default: runs/NAME-OF-THE-DATA)",
    )
    return parser


def _by_data(defaults: dict[str, int]) -> str:
    return f"(default: {', '.join(f'{value} for {name}' for name, value in defaults.items())})"


def _device(name: str | None) -> torch.device:
    """The device to train on; raises ValueError where there is no such device."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise ValueError("'meta' holds no data")
        torch.empty(0, device=device)
    # CPU-only builds of torch answer a GPU's name with an AssertionError, other devices with a NotImplementedError
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"{name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


class _whole:
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


def _number(text: str, low_allowed: bool) -> float:
    bounds = "0 or more" if low_allowed else "above 0"
    complaint = argparse.ArgumentTypeError(f"must be a finite number, {bounds}, got {text!r}")
    try:
        value = float(text)
    except ValueError:
        raise complaint from None
    if not math.isfinite(value) or value < 0 or (value == 0 and not low_allowed):
        raise complaint
    return value


def _positive(text: str) -> float:
    return _number(text, low_allowed=False)


def _not_negative(text: str) -> float:
    return _number(text, low_allowed=True)
