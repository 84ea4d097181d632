"""What a training step of a model moves, plain, after fuse() and by torch.compile: ``perf traffic --model``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pandas as pd
from torch import nn

import tkernels
from perf import models, schema
from perf.schema import Counted, number, text
from perf.static import inductor, meter
from perf.static.rewritten import Rewritten
from tkernels.core import targets

PROVIDERS = ("torch", "tkernels", "torch.compile")
SHOWN = 12  # rows of the table of kernels


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelTraffic(Counted):
    """What a kernel of ours or a call of PyTorch's moves in a phase, or the whole step."""

    model: str = text("the model's name")
    batch: int | None = number("images a step")
    image_size: int | None = number("rows and columns of an image")
    provider: str = text("torch (eager), tkernels (the model after fuse()) or torch.compile")
    call: str = text("a kernel's or an ATen call's name; (step) for the whole step")
    phase: str = text("forward or backward; empty in the row of the whole step")
    calls: int | None = number("how often it is made in a step")
    bytes: int | None = number(schema.BYTES)
    workspace_bytes: int | None = number("float32 operands made and dropped within the pass")
    launches: int | None = number(schema.LAUNCHES)
    aten_calls: int | None = number(schema.ATEN_CALLS)
    saved_bytes: int | None = number("distinct storages kept for backward, parameters not counted")


def rows(name: str, batch: int, image_size: int, target_name: str, compiled: bool) -> list[ModelTraffic]:
    """Of each provider a row a kernel and one of the step. ``compiled``: with Inductor's count, which takes longest."""
    name = name if ":" in name else f"torchvision:{name}"
    build = models.resolve([name])[name]
    head = ModelTraffic(model=name, batch=batch, image_size=image_size)

    def plain() -> tuple[nn.Module, nn.Module]:
        return build(), nn.CrossEntropyLoss()

    def fused() -> tuple[nn.Module, nn.Module]:
        images, _ = meter.batch_of(batch, image_size)
        # under 'triton' every product is ours, whatever is faster
        target = targets.TARGETS[target_name] if tkernels.get_backend() == "auto" else None
        return Rewritten(meter.in_bf16(build()), images, target), nn.CrossEntropyLoss()

    found = []
    for provider, make in (("torch", plain), ("tkernels", fused)):
        step = meter.training_step(make, batch, target_name, image_size)
        found += [row.having(provider=provider) for row in _of_step(head, step)]
    if compiled:
        moved = inductor.count_or_say_why(plain, batch, image_size)
        found.append(head.having(provider="torch.compile", call=schema.STEP, bytes=moved))
    return found


def _of_step(head: ModelTraffic, step: meter.Step) -> Iterator[ModelTraffic]:
    by_name: dict[tuple[str, str], list[meter.Call]] = {}
    for call in step.calls:
        by_name.setdefault((call.name, call.phase), []).append(call)
    for (name, phase), calls in sorted(by_name.items(), key=lambda item: -sum(call.bytes for call in item[1])):
        yield head.having(call=name, phase=phase, calls=len(calls), **meter.counts(calls, 0))
    yield head.having(call=schema.STEP, calls=len(step.calls), **meter.counts(step.calls, sum(step.saved.values())))


def show(frame: pd.DataFrame) -> None:
    """Print the largest of each provider's calls, and the steps beside one another."""
    for provider, calls in frame[frame.call != schema.STEP].groupby("provider", sort=False):
        table = calls.head(SHOWN)[["call", "phase", "calls"]].copy()
        table["GB"] = (calls.bytes.astype(float) / 1e9).round(2)
        print(f"{provider}: what moves most\n{schema.as_text(table, index=False)}\n")
    steps = frame[frame.call == schema.STEP].set_index("provider")
    columns: dict[str, Any] = {"GB": (steps.bytes.astype(float) / 1e9).round(2)}
    for name in PROVIDERS:
        if name in steps.index and name != "tkernels":
            columns[f"of {name}"] = (steps.bytes / steps.bytes[name]).astype(float).round(3)
    columns |= {"launches": steps.launches, "ATen calls": steps.aten_calls}
    columns["saved GB"] = (steps.saved_bytes.astype(float) / 1e9).round(2)
    print(schema.as_text(pd.DataFrame(columns).T))
