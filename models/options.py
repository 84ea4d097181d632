"""What ``python -m models.train`` was asked for, complete and checked before any work is done."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models import arguments, distributed, recipes
from models.arguments import PROGRAM, Parser
from tkernels.core import mode

__all__ = ["PROGRAM", "Options", "parse"]

# where and how a run goes on, not what it computes
_NOT_SETTINGS = ("data_dir", "device", "out", "resume", "plot_gradients", "tensorboard", "backend", "workers", "loader",
                 "pin_memory", "cuda_graph", "compile", "model", "recipe")  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What to train, on what, and how."""

    data: str
    data_dir: Path
    target: str | None
    categorical: tuple[str, ...]
    val_fraction: float | None
    loader: str
    workers: int
    pin_memory: bool
    drop_last: bool
    image_size: int
    flip: bool
    rotate: float
    model: str
    width: int
    backend: str
    device: torch.device
    amp: torch.dtype | None
    compile: bool
    cuda_graph: bool
    sync_bn: bool
    recipe: str
    epochs: int
    batch_size: int
    accumulate: int
    optimizer: str
    lr: float
    schedule: str
    warmup: float
    momentum: float
    weight_decay: float
    label_smoothing: float
    clip: float
    seed: int
    out: Path
    resume: bool
    plot_gradients: bool
    tensorboard: bool

    def settings(self) -> dict[str, str]:
        """What decides the result, as text, for checkpoints."""
        fields = dataclasses.asdict(self)
        return {name: str(value) for name, value in fields.items() if name not in _NOT_SETTINGS}

    def fingerprint(self) -> str:
        """Which content the CSV file has, in a few words; empty for other data, which their names and seeds define."""
        path = Path(self.data.removeprefix("csv:"))
        if not self.data.startswith("csv:") or not path.is_file():  # a pipe is read once
            return ""
        content = path.read_bytes()
        return f"{len(content):,} bytes with digest {hashlib.sha256(content).hexdigest()[:12]}"

    def changed(self, saved: dict[str, str]) -> list[tuple[str, str, str]]:
        """(option, its value in ``saved``, its value now) of the settings that differ."""
        return [
            (f"--{name.replace('_', '-')}", saved[name], value)
            for name, value in self.settings().items()
            if name in saved and saved[name] != value
        ]


def parse(argv: Sequence[str] | None = None) -> Options:
    """The options given. Exits with status 2 and one line on stderr where one is unknown or absurd."""
    try:
        distributed.check_environment()
        parser = arguments.build_parser()
    except ValueError as error:  # of an environment variable
        Parser(prog=PROGRAM).error(str(error))
    args = parser.parse_args(argv)
    _complete(args)
    _check(parser, args)
    on_gpu = args.device.type == "cuda"
    if args.pin_memory is None:
        args.pin_memory = on_gpu
    if args.amp is None:
        args.amp = "bf16" if args.recipe == "fast" and on_gpu else "off"
    obstacle = _no_cuda_graph(args)
    if args.cuda_graph and obstacle:
        parser.error(f"argument --cuda-graph: {obstacle}")
    if args.cuda_graph is None:
        args.cuda_graph = not obstacle
    args.amp = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    args.categorical = tuple(args.categorical)
    return Options(**vars(args))


def _complete(args: Any) -> None:
    """The defaults that depend on recipe and data."""
    cifar10 = args.data == "cifar10"
    for name, value in recipes.RECIPES[args.recipe]._asdict().items():
        if getattr(args, name) is None:
            setattr(args, name, (value[0] if cifar10 else value[1]) if isinstance(value, tuple) else value)
    if args.flip is None:
        args.flip = cifar10
    if args.rotate is None:
        args.rotate = 10.0 if cifar10 else 0.0
    if args.out is None:
        args.out = Path("runs") / (Path(args.data[4:]).stem if args.data.startswith("csv:") else args.data)


def _check(parser: Parser, args: Any) -> None:
    try:
        if args.out.exists() and not args.out.is_dir():
            parser.error(f"argument --out: {args.out} is a file, a directory is needed")
    except OSError as error:  # a name too long
        parser.error(f"argument --out: {error}")
    if not args.data.startswith("csv:") and (args.target is not None or args.categorical):
        option = "--categorical" if args.target is None else "--target"
        parser.error(f"argument {option}: columns are for --data csv:FILE, not for {args.data}")
    if args.model == "attention" and (args.data.startswith("csv:") or args.data == "synthetic"):
        parser.error(f"argument --model: attention is for images, not for the rows of {args.data}")
    processes = distributed.wanted()
    if args.batch_size % processes:
        parser.error(f"argument --batch-size: {args.batch_size} examples cannot be shared by {processes} processes")
    if args.tensorboard:
        try:
            importlib.import_module("torch.utils.tensorboard")
        except ImportError:
            parser.error("argument --tensorboard: TensorBoard is not installed: pip install tensorboard")
    try:
        args.device = _device(args.device)
    except ValueError as error:
        parser.error(f"argument --device: {error}")
    if args.backend == "triton":
        if args.model == "plain":
            parser.error("argument --backend: 'triton' needs --model fused or attention: plain is all PyTorch")
        reason = mode.why_not_triton(torch.empty(0, device=args.device))
        if reason is not None:
            parser.error(f"argument --backend: 'triton' cannot run here: {reason}")


def _no_cuda_graph(args: Any) -> str:
    """Why the training step cannot be a CUDA graph; empty if it can."""
    if args.device.type != "cuda":
        return f"needs a GPU, the device is {args.device}"
    if args.amp == "fp16":
        return "a loss scaled for --amp fp16 asks the device in every step, use bf16"
    if args.accumulate > 1:
        return "--accumulate makes steps of different kinds"
    if distributed.launched():
        return "several processes talk to each other within a step"
    return ""


def _device(name: str | None) -> torch.device:
    """The device to train on; raises ValueError where there is no such device."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and distributed.launched():
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise ValueError("'meta' holds no data")
        torch.empty(0, device=device)
    # CPU-only builds of torch answer a GPU's name with an AssertionError, other devices with a NotImplementedError
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"{name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device
