"""Count what one training step of the CIFAR network moves, without a GPU: bytes, launches and saved bytes by layer.

Every launch and every ATen call counts its tensor arguments, read once and written once, over forward, loss and
backward in bf16 NHWC: of the fused network on Triton, and of plain PyTorch; an ATen call of several kernels counts each
(meter.py). torch.compile's bytes are Inductor's count (inductor.py). Float32 operands that live within one pass of a
layer (split-K partial sums, statistics) are shown apart.

With --op the same is counted of single operators, beside the least they have to move; with --model of a model of
torchvision, timm or one's own, plain and after fuse(), by kernel.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

import tkernels
from models.cifar_cnn import CNNClassifier, FusedCNNClassifier
from perf import operators, options, providers, schema, shapes
from perf.options import Refused
from perf.schema import STEP, Counted, number, text
from perf.static import aot, inductor, meter, model_traffic, operator_traffic
from perf.static.model_traffic import ModelTraffic
from perf.static.operator_traffic import OperatorTraffic
from tkernels.core import targets


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic(Counted):
    """What a layer moves in a phase, or the whole step."""

    batch: int | None = number("images a step")
    provider: str = text("tkernels, torch (eager) or torch.compile")
    layer: str = text("the module's name; (step) for the whole step")
    phase: str = text("forward or backward; empty in the row of the whole step")
    bytes: int | None = number(schema.BYTES)
    workspace_bytes: int | None = number("float32 operands made and dropped within one pass of a layer")
    workspace_alive: int | None = number("in the row of the step: most bytes of workspace in one pass of a layer")
    launches: int | None = number(schema.LAUNCHES)
    aten_calls: int | None = number(schema.ATEN_CALLS)
    saved_bytes: int | None = number("distinct storages kept for backward, parameters not counted")
    specialisations: int | None = number("in the row of the step: kernels that Triton compiles for it")
    specialisations_added: int | None = number("in the row of the step: further kernels for another last batch")


def plain() -> tuple[nn.Module, nn.Module]:
    """The network of torch.nn modules and its loss."""
    return CNNClassifier(), nn.CrossEntropyLoss()


def fused() -> tuple[nn.Module, nn.Module]:
    """The network of fused modules and its loss."""
    return FusedCNNClassifier(), tkernels.nn.CrossEntropyLoss()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("--batch", type=int, default=256, metavar="N", help="images a step (default: 256)")
    add("--last-batch", type=int, default=17, metavar="N",
        help="images in the last, smaller batch, which should compile nothing new (default: 17)")  # fmt: skip
    add("--target", default="sm_90", metavar="NAME", help=f"{', '.join(targets.TARGETS)} (default: sm_90)")
    add("--model", metavar="NAME",
        help="of a model, plain and after fuse(): a name of torchvision's, timm:NAME or module:function")  # fmt: skip
    add("--image-size", type=int, default=224, metavar="N", help="for --model: rows and columns (default: 224)")
    add("--op", nargs="+", metavar="NAME", help=f"of single operators: {', '.join(operator_traffic.NAMES)}")
    add("--shapes", nargs="+", metavar="SHAPES",
        help=f"for --op: {', '.join(shapes.NAMED)}, FILE.csv, or 'N=256 C=32 K=64' (default: cnn)")  # fmt: skip
    add("--dtype", nargs="+", metavar="NAME", help=f"for --op: {', '.join(operators.DTYPES)} (default: bf16)")
    add("--no-inductor", action="store_true", help="leave out torch.compile, which takes longest")
    add("--calls", action="store_true", help="list every launch and call of the fused network")
    add("--csv", type=Path, metavar="FILE", help="where the rows go; an older file is replaced")


def run(args: argparse.Namespace) -> int:
    """Count, print, write."""
    options.one_of("target", args.target, targets.TARGETS)
    if args.csv is not None:
        options.new_file(args.csv)
    head: dict[str, Any] = {"commit": options.commit(), **providers.versions(), "target": args.target}
    if args.model is not None:
        frame = schema.frame_of(ModelTraffic, [row.having(**head) for row in _rows_of_model(args)])
        model_traffic.show(frame)
    elif args.op is not None:
        rows = operator_traffic.rows(args.op, args.shapes or ["cnn"], args.dtype or ["bf16"], args.target)
        frame = schema.frame_of(OperatorTraffic, [row.having(**head) for row in rows])
        print(operator_traffic.summary(frame).to_string(index=False))
    else:
        frame = schema.frame_of(Traffic, [row.having(**head, batch=args.batch) for row in _rows_of_network(args)])
        _print(frame, args.batch)
    if args.csv is not None:
        schema.write(frame, args.csv)
    return 0


def _rows_of_model(args: argparse.Namespace) -> list[ModelTraffic]:
    for name in ("op", "shapes", "dtype"):
        if getattr(args, name) is not None:
            raise Refused(f"--{name} does not go with --model")
    if args.batch < 2 or args.image_size < 1:
        raise Refused(f"--batch must be at least 2 and --image-size 1, got {args.batch} and {args.image_size}")
    return model_traffic.rows(args.model, args.batch, args.image_size, args.target, not args.no_inductor)


def _rows_of_network(args: argparse.Namespace) -> list[Traffic]:
    for name in ("shapes", "dtype"):
        if getattr(args, name) is not None:
            raise Refused(f"--{name} goes with --op, which is not given")
    for name in ("batch", "last_batch"):
        if getattr(args, name) < 2:
            raise Refused(f"--{name.replace('_', '-')} must be at least 2, got {getattr(args, name)}")
    eager, ours, last = (
        step(build, batch, args.target)
        for build, batch in ((plain, args.batch), (fused, args.batch), (fused, args.last_batch))
    )
    if args.calls:
        _print_calls(ours, args.batch)
    compiled = {
        "specialisations": len(specialisations(ours, args.target)),
        "specialisations_added": len(added_specialisations(ours, last, args.target)),
    }
    rows = [*_rows("torch", eager), *_rows("tkernels", ours, **compiled)]
    if not args.no_inductor:
        moved = inductor.count_or_say_why(plain, args.batch)
        rows.append(Traffic(provider="torch.compile", layer=STEP).having(bytes=moved))
    return rows


def step(build: meter.Build, batch: int, target_name: str) -> meter.Step:
    """One training step counted. Plain modules stay PyTorch; fused ones must take Triton."""
    with tkernels.backend("triton"):
        return meter.training_step(build, batch, target_name)


def specialisations(counted: meter.Step, target_name: str) -> set[str]:
    """What Triton compiles for a step."""
    return {aot.specialisation(launch, target_name) for launch in counted.launches}


def added_specialisations(full: meter.Step, last: meter.Step, target_name: str) -> set[str]:
    """What a last batch of another size compiles on top."""
    return specialisations(last, target_name) - specialisations(full, target_name)


def _rows(provider: str, counted: meter.Step, **of_step: int) -> list[Traffic]:
    """A row a layer and phase, and one of the whole step, with the columns that it alone has."""
    saved = {(layer, "forward"): size for layer, size in counted.saved.items()}
    passes: dict[tuple[str, str], list[meter.Call]] = {}
    for call in counted.calls:
        passes.setdefault((call.layer, call.phase), []).append(call)
    found = [
        Traffic(provider=provider, layer=key[0], phase=key[1]).having(
            **meter.counts(passes.get(key, ()), saved.get(key, 0))
        )
        for key in dict.fromkeys([*passes, *saved])
    ]
    whole = Traffic(provider=provider, layer=STEP, workspace_alive=counted.alive)
    return [*found, whole.having(**meter.counts(counted.calls, sum(saved.values())), **of_step)]


def _print_calls(counted: meter.Step, batch: int) -> None:
    frame = pd.DataFrame(map(dataclasses.asdict, counted.calls))
    frame["KB/image"] = (frame.bytes / batch / 1e3).round(2)
    frame["workspace KB/image"] = (frame.workspace / batch / 1e3).round(2)
    print(frame.drop(columns=["bytes", "workspace"]).to_string(index=False), end="\n\n")


def by_layer(layers: pd.DataFrame, batch: int) -> pd.DataFrame:
    """What each layer moves, saves and calls, a group of columns a provider; fused layers below those they replace."""
    columns: dict[tuple[str, str], pd.Series] = {}
    for provider, rows in layers.groupby("provider", sort=False):
        for phase in ("forward", "backward"):
            moved = rows[rows.phase == phase].groupby("layer").bytes.sum() / batch / 1e3
            columns[str(provider), f"{phase} KB/image"] = moved.astype(float).round(1)
        by_name = rows.groupby("layer")
        columns[str(provider), "saved KB/image"] = (by_name.saved_bytes.sum() / batch / 1e3).astype(float).round(1)
        columns[str(provider), "calls"] = (by_name.launches.sum() + by_name.aten_calls.sum()).astype("Int64")
    names = list(dict.fromkeys(layers.layer))
    groups = list(dict.fromkeys(name.partition(".")[0] for name in names))
    order = sorted(names, key=lambda name: groups.index(name.partition(".")[0]))
    return pd.DataFrame(columns).reindex(order).rename_axis("layer")


def _print(frame: pd.DataFrame, batch: int) -> None:
    shown = schema.as_text(by_layer(frame[frame.layer != STEP], batch))
    print(f"layer by layer, batch {batch}, bf16 NHWC; calls: Triton launches and ATen calls that compute\n{shown}\n")
    steps = frame[frame.layer == STEP].set_index("provider")
    eager = steps.loc["torch"]
    summary = pd.DataFrame(
        {
            "KB/image": (steps.bytes / batch / 1e3).round(0),
            "of eager": (steps.bytes / eager.bytes).round(3),
            "workspace KB/image": (steps.workspace_bytes / batch / 1e3).round(1),
            "alive MB": (steps.workspace_alive / 1e6).round(1),
            "launches": steps.launches,
            "ATen calls": steps.aten_calls,
            "saved KB/image": (steps.saved_bytes / batch / 1e3).round(0),
            "saved of eager": (steps.saved_bytes / eager.saved_bytes).round(3),
            "specialisations": steps.specialisations,
            "added by last batch": steps.specialisations_added,
        }
    )
    print(schema.as_text(summary.T))
