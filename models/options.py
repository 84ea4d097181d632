"""What ``python -m models.train`` was asked for, complete and checked before any work is done."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tkernels
from models import augment, data, distributed, folder, networks, recipes
from models.arguments import FloatArgument, IntArgument, Parser
from tkernels.core import mode

PROGRAM = "python -m models.train"
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
POSITIVE = FloatArgument(lambda x: x > 0, "above 0")
NOT_NEGATIVE = FloatArgument(lambda x: x >= 0, "0 or more")
PART = FloatArgument(lambda x: 0 <= x < 1, "from 0 to below 1")
# where and how a run goes on, not what it computes
_NOT_SETTINGS = ("data_dir", "device", "out", "resume", "plot_gradients", "tensorboard", "backend", "workers", "loader",
                 "pin_memory", "cuda_graph", "compile", "fuse", "model", "recipe", "strict")  # fmt: skip
# the recipes' first numbers are theirs; their images are mirrored and turned
CIFAR = ("cifar10", "cifar100")


def _option(help: str, default: Any = None, **how: Any) -> Any:
    """A field that is an option too; ``how`` goes to argparse. A default of None depends on other options."""
    return dataclasses.field(metadata={"help": help, "default": default, **how})


def _by_recipe(name: str) -> str:
    """The default of an option, where recipes differ of each."""
    texts = []
    for recipe in recipes.RECIPES.values():
        value = getattr(recipe, name)
        texts.append(f"{value[1]}, for cifar {value[0]}" if isinstance(value, tuple) else
                     f"{value:g}" if isinstance(value, float) else value)  # fmt: skip
    default, fast = texts
    return f"(default: {default})" if default == fast else f"(default: {default}; fast: {fast})"


def _data(text: str) -> str:
    if text in data.NAMES or (text.startswith(("csv:", "folder:")) and not text.endswith(":")):
        return text
    hint = ""
    if text and (Path(text).exists() or text.endswith((".csv", ".tsv"))):
        hint = f" (did you mean {'folder' if Path(text).is_dir() else 'csv'}:{text}?)"
    raise argparse.ArgumentTypeError(
        f"must be one of {', '.join(data.NAMES)}, folder:DIR or csv:FILE, got {text!r}{hint}"
    )


def _model(text: str) -> str:
    if text in networks.OURS or text in networks.torchvision_names():
        return text
    near = difflib.get_close_matches(text, [*networks.OURS, *networks.torchvision_names()], 3)
    raise argparse.ArgumentTypeError(
        f"must be one of {', '.join(networks.OURS)} or a classifier of torchvision such as resnet18, got {text!r}"
        + (f" (near: {', '.join(near)})" if near else "")
    )


# fmt: off
# ruff: noqa: RUF009  # _option makes fields
@dataclass(frozen=True)
class Options:
    """What to train, on what, and how. Each field is an option of the command line."""

    data: str = _option(
        "digits: 1,797 handwritten digits that come with scikit-learn; cifar10, cifar100, mnist, fashion-mnist, svhn: "
        "torchvision's, downloaded if need be; folder:DIR: your images of any size, a folder a class, or such folders "
        "in DIR/train and DIR/val; csv:FILE: the rows of a CSV file with a first line of names; synthetic: 1,000 rows "
        "of 10 normal numbers, classified by the sign of their sum; fake: noise of CIFAR-10's shape",
        "digits", type=_data, metavar="NAME", group="data")
    data_dir: Path = _option("where torchvision's data sets lie", Path("data"), type=Path, metavar="DIR")
    strict: bool = _option(
        "with folder: an image that cannot be read ends the run, else it is named and left out (default: no)",
        False, action="store_true")
    target: str | None = _option("with csv: the column that holds the class (default: the last)", metavar="COLUMN")
    categorical: tuple[str, ...] = _option(
        "with csv: columns of categories though they look like numbers, such as postal codes (default: none)",
        (), nargs="+", metavar="COLUMN")
    val_fraction: float | None = _option(
        "part of the training data held out at random to validate, of folders a part of each class (default: 0.2; the "
        "test images of torchvision's sets and those of DIR/val validate)",
        type=FloatArgument(lambda x: 0 < x < 1, "between 0 and 1"), metavar="F")

    loader: str = _option(
        "device: all data lie on the device from the start; workers: a DataLoader brings batches, from disk with "
        "folder; auto: device where the data fit and no option treats images one by one",
        "auto", choices=("auto", "device", "workers"), group="loading and augmentation")
    workers: int = _option(
        "processes that load, with --loader workers; 0: the training process itself",
        2, type=IntArgument(0), metavar="N")
    pin_memory: bool = _option("page-locked memory for batches, with --loader workers (default: on a GPU yes)")
    drop_last: bool = _option("leave out an epoch's last batch if it is not full (default: no)", False)
    image_size: int = _option(
        "the network sees images of N x N (default: 32; 224 for a torchvision network on a folder)",
        type=IntArgument(8, 1024), metavar="N")
    resize: int = _option(
        "an image's shorter side becomes N pixels, then the middle of --image-size is cut out; 0: it is stretched to "
        "a square (default: --image-size with folder, else 0)", type=IntArgument(0, 4096), metavar="N")
    random_crop: float = _option(
        "train on a random part of each image, of at least this share of its area and resized (v2.RandomResizedCrop); "
        "0: on what is validated with", 0.0, type=FloatArgument(lambda x: 0 <= x <= 1, "from 0 to 1"), metavar="F")
    flip: bool = _option("mirror every other training image at random (default: with cifar10 and cifar100 yes)")
    rotate: float = _option(
        "turn training images by up to so much (default: 10 for cifar10 and cifar100, else 0)",
        type=FloatArgument(lambda x: 0 <= x <= 180, "from 0 to 180"), metavar="DEGREES")
    augment: str = _option(
        "a policy of torchvision for each training image: v2.TrivialAugmentWide, v2.RandAugment, v2.AutoAugment",
        "none", choices=tuple(augment.POLICIES))
    mixup: float = _option(
        "mix pairs of training images and their labels, in parts from a Beta distribution of this parameter (v2.MixUp)",
        0.0, type=NOT_NEGATIVE, metavar="ALPHA")
    cutmix: float = _option(
        "put a piece of one training image into another, the same way (v2.CutMix); with --mixup one of the two a batch",
        0.0, type=NOT_NEGATIVE, metavar="ALPHA")

    model: str = _option(
        "fused: built from tkernels.nn; plain: from torch.nn; checkpoints fit both; attention: fused, with "
        "self-attention on the last feature map; or a classifier of torchvision by its name, such as resnet18",
        "fused", type=_model, metavar="NAME", group="network")
    pretrained: bool = _option(
        "begin with torchvision's weights of its network, downloaded if need be, and normalise as they want it; the "
        "last layer is new (default: no)", False, action="store_true")
    classes: int = _option(
        "outputs of the network, for a use to come; those beyond the data's classes have no name (default: the data's)",
        type=IntArgument(2), metavar="N")
    fuse: bool = _option("fuse torchvision's network by tkernels.fuse (default: yes)")
    width: int = _option(
        "channels of the CNN's first stage; the later layers scale with it",
        32, type=IntArgument(1, 4096), metavar="N")
    backend: str = _option(
        "how fused modules run: triton, torch, or auto: Triton on a GPU, PyTorch elsewhere "
        "(default: %(default)s; TKERNELS_BACKEND sets it)", tkernels.get_backend, choices=mode.BACKENDS)
    device: torch.device = _option(
        "cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu; with torchrun a GPU a process)")
    amp: torch.dtype | None = _option(
        "mixed precision: bf16, or fp16 with a scaled loss (default: off; with --recipe fast bf16 on a GPU)",
        choices=tuple(AMP))
    compile: bool = _option("compile the network with torch.compile (default: no)", False)
    cuda_graph: bool = _option(
        "replay the training step as a CUDA graph, which saves the host's time (default: on a GPU yes, unless fp16, "
        "several processes or accumulation forbid it)")
    sync_bn: bool = _option(
        "with several processes: batch norm's statistics are those of all of them (default: yes)", True)

    recipe: str = _option(
        "sets the defaults of what follows: Adam along a cosine; or, fast, a few epochs of SGD-Nesterov in larger "
        "batches with smoothed labels", "default", choices=tuple(recipes.RECIPES), group="training")
    epochs: int = _option(
        "passes over the training data; 0 only validates the initial weights " + _by_recipe("epochs"),
        type=IntArgument(0), metavar="N")
    batch_size: int = _option(
        "examples a batch, of all processes together " + _by_recipe("batch_size"),
        type=IntArgument(1, 2**31 - 1), metavar="N")
    accumulate: int = _option("batches whose gradients make one step", 1, type=IntArgument(1), metavar="N")
    optimizer: str = _option(
        "adam, adamw, or sgd with Nesterov momentum " + _by_recipe("optimizer"), choices=recipes.OPTIMIZERS)
    lr: float = _option("the largest learning rate " + _by_recipe("lr"), type=POSITIVE, metavar="RATE")
    schedule: str = _option(
        "how the learning rate falls to 0 after warm-up, or that it stays " + _by_recipe("schedule"),
        choices=recipes.SCHEDULES)
    warmup: float = _option(
        "part of the run in which the learning rate rises to --lr " + _by_recipe("warmup"), type=PART, metavar="F")
    momentum: float = _option("of sgd", 0.9, type=PART, metavar="F")
    weight_decay: float = _option(
        "L2 penalty of adam; decay of weights, not of biases and norms, of adamw and sgd "
        + _by_recipe("weight_decay"), type=NOT_NEGATIVE, metavar="RATE")
    label_smoothing: float = _option(
        "part of each label that is spread over all classes " + _by_recipe("label_smoothing"),
        type=PART, metavar="F")
    clip: float = _option(
        "scale gradients down to this norm, all together; 0: never " + _by_recipe("clip"),
        type=NOT_NEGATIVE, metavar="NORM")
    seed: int = _option(
        "of weights, split, order, augmentation and dropout", 0, type=IntArgument(0, 2**32 - 1), metavar="N")

    out: Path = _option(
        "where results go; files of an earlier run there are replaced (default: runs/NAME-OF-THE-DATA)",
        type=Path, metavar="DIR", group="results")
    resume: bool = _option(
        "go on from the newest good checkpoint in --out, which every epoch, SIGTERM and SIGINT leave there; "
        "give the same options again (default: no)", False, action="store_true")
    plot_gradients: bool = _option(
        "draw gradients.png: mean and largest gradient of every layer in the last step (default: no)",
        False, action="store_true")
    tensorboard: bool = _option(
        "write loss and accuracy for TensorBoard too, which must be installed (default: no)",
        False, action="store_true")
    # fmt: on

    def settings(self) -> dict[str, str]:
        """What decides the result, as text, for checkpoints."""
        fields = dataclasses.asdict(self)
        return {name: str(value) for name, value in fields.items() if name not in _NOT_SETTINGS}

    def changed(self, saved: dict[str, str]) -> list[tuple[str, str, str]]:
        """(option, its value in ``saved``, its value now) of the settings that differ."""
        return [
            (_name(name), saved[name], value)
            for name, value in self.settings().items()
            if name in saved and saved[name] != value
        ]

    def fingerprint(self) -> str:
        """Which content CSV file or folder have, in a few words; empty for what names and seeds define."""
        if self.data.startswith("folder:"):
            return folder.fingerprint(Path(self.data.removeprefix("folder:")))
        path = Path(self.data.removeprefix("csv:"))
        if not self.data.startswith("csv:") or not path.is_file():  # a pipe is read once
            return ""
        content = path.read_bytes()
        return f"{len(content):,} bytes with digest {hashlib.sha256(content).hexdigest()[:12]}"


def one_by_one(chosen: Any) -> bool:
    """Whether training images are treated each by itself, as they are loaded."""
    return chosen.random_crop > 0 or chosen.augment != "none"


def parse(argv: Sequence[str] | None = None) -> Options:
    """The options given. Exits with status 2 and one line on stderr where one is unknown or absurd."""
    try:
        distributed.check_environment()
        parser = _parser()
    except ValueError as error:  # of an environment variable
        Parser(prog=PROGRAM).error(str(error))
    args = parser.parse_args(argv)
    try:
        _complete(args)
    except ValueError as error:
        parser.error(f"argument {error}")
    return Options(**vars(args))


def _name(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _parser() -> Parser:
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
    group: Any = parser
    for field in dataclasses.fields(Options):
        how = dict(field.metadata)
        if "group" in how:
            group = parser.add_argument_group(how.pop("group"))
        if callable(how["default"]):
            how["default"] = how["default"]()
        if "(default: " not in how["help"]:
            how["help"] += " (default: %(default)s)"
        if field.type == "bool":
            how.setdefault("action", argparse.BooleanOptionalAction)
        group.add_argument(_name(field.name), **how)
    return parser


def _complete(args: Any) -> None:
    """Fill in the defaults that depend on recipe, data and device. Raises ValueError for what does not go together."""
    cifar, kind = args.data in CIFAR, args.data.partition(":")[0]
    for name, value in recipes.RECIPES[args.recipe]._asdict().items():
        if getattr(args, name) is None:
            setattr(args, name, (value[0] if cifar else value[1]) if isinstance(value, tuple) else value)
    if args.flip is None:
        args.flip = cifar
    if args.rotate is None:
        args.rotate = 10.0 if cifar else 0.0
    if args.out is None:
        args.out = Path("runs") / (Path(args.data.partition(":")[2]).resolve().stem if ":" in args.data else args.data)
    args.categorical = tuple(args.categorical)
    _check(args, kind)
    if args.image_size is None:
        args.image_size = 224 if kind == "folder" and args.model not in networks.OURS else 32
    if args.resize is None:
        args.resize = args.image_size if kind == "folder" else 0
    _check_images(args, kind)
    _check_network(args)
    try:
        args.device = _device(args.device)
    except ValueError as error:
        raise ValueError(f"--device: {error}") from error
    _check_backend(args)
    on_gpu = args.device.type == "cuda"
    if args.pin_memory is None:
        args.pin_memory = on_gpu
    if args.amp is None:
        args.amp = "bf16" if args.recipe == "fast" and on_gpu else "off"
    obstacle = _no_cuda_graph(args)
    if args.cuda_graph and obstacle:
        raise ValueError(f"--cuda-graph: {obstacle}")
    if args.cuda_graph is None:
        args.cuda_graph = not obstacle
    args.amp = AMP[args.amp]


def _check_images(args: Any, kind: str) -> None:
    """Raise ValueError for options that are for images, or for some, where there are no such."""
    if kind in ("csv", "synthetic"):
        for name in ("random_crop", "augment", "mixup", "cutmix", "resize"):
            if getattr(args, name) not in (0, "none"):
                raise ValueError(f"{_name(name)}: this is for images, not for the rows of {args.data}")
        if args.model not in ("fused", "plain"):
            raise ValueError(f"--model: {args.model} is for images, not for the rows of {args.data}")
    if args.strict and kind != "folder":
        raise ValueError("--strict: this is for --data folder:DIR")
    if 0 < args.resize < args.image_size:
        raise ValueError(f"--resize: {args.resize} pixels are less than --image-size {args.image_size}, or 0")
    if args.loader == "device" and one_by_one(args):
        raise ValueError(
            "--loader: --random-crop and --augment treat images one by one as they are loaded, which needs workers"
        )


def _check_network(args: Any) -> None:
    """Fill in whether the network is fused. Raises ValueError for options that are for other networks."""
    if args.model in networks.OURS:
        if args.fuse is not None and args.fuse != (args.model != "plain"):
            raise ValueError("--fuse: this is for torchvision's networks; of ours plain is the one that is not fused")
        args.fuse = args.model != "plain"
    elif args.fuse is None:
        args.fuse = True
    if args.pretrained and args.model in networks.OURS:
        raise ValueError(f"--pretrained: there are weights of torchvision's networks, not of {args.model}")
    if args.fuse and args.compile and args.model not in networks.OURS:
        raise ValueError("--compile: fuse compiles the network in its own way, --no-fuse leaves it to torch.compile")


def _check(args: Any, kind: str) -> None:
    try:
        if args.out.exists() and not args.out.is_dir():
            raise ValueError(f"--out: {args.out} is a file, a directory is needed")
    except OSError as error:  # a name too long
        raise ValueError(f"--out: {error}") from error
    if kind != "csv" and (args.target is not None or args.categorical):
        option = "--categorical" if args.target is None else "--target"
        raise ValueError(f"{option}: columns are for --data csv:FILE, not for {args.data}")
    processes = distributed.wanted()
    if args.batch_size % processes:
        raise ValueError(f"--batch-size: {args.batch_size} examples cannot be shared by {processes} processes")
    if args.tensorboard:
        try:
            importlib.import_module("torch.utils.tensorboard")
        except ImportError:
            raise ValueError("--tensorboard: TensorBoard is not installed: pip install tensorboard") from None


def _check_backend(args: Any) -> None:
    if args.backend != "triton":
        return
    if not args.fuse:
        raise ValueError("--backend: 'triton' needs a fused network, such as --model fused: plain is all PyTorch")
    reason = mode.why_not_triton(torch.empty(0, device=args.device))
    if reason is not None:
        raise ValueError(f"--backend: 'triton' cannot run here: {reason}")


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
    except RuntimeError as error:  # which lists all that there are
        raise ValueError(f"{name!r} is no device of PyTorch's, such as cpu, cuda or cuda:1") from error
    try:
        if device.type == "meta":
            raise ValueError("'meta' holds no data")
        torch.empty(0, device=device)
    # CPU-only builds of torch answer a GPU's name with an AssertionError, other devices with a NotImplementedError
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"{name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device
