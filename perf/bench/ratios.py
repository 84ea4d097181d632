"""How far tkernels is ahead: the tables of perf/RESULTS.md about the CIFAR CNN on a CPU, with what was aimed at beside
what was measured. A ratio is someone's time over tkernels' in the same round; tables show the median over the rounds
and, where there is room, its quartiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from perf import providers, schema
from perf.bench import machine, noise

ALLOCATORS = {
    "shared": "one process",
    "default": "a process each",
    "faultless": "fault-free allocator",
}
# the best that PyTorch offers: of these the one that comes nearest
BEST = ("torch nhwc", "torch.compile nhwc", "torch.compile nchw")
USUAL = f"{providers.USUAL} nchw"
EAGER = "torch nhwc"


class Aim(NamedTuple):
    """A line of the network's table. ``aims``: by allocator, the ratio to reach at least."""

    mode: str
    dtype: str
    against: tuple[str, ...]
    label: str
    aims: dict[str, float]


AIMS = (
    Aim("train", "bf16", BEST, "training step, bf16", {"default": 1.35, "faultless": 1.15}),
    Aim("train", "fp32", BEST, "training step, fp32", {"default": 1.40, "faultless": 1.10}),
    Aim("train", "bf16", (USUAL,), "training step, bf16, against the usual code: eager, NCHW, fp32",
        {"default": 3.8, "faultless": 2.6}),
    Aim("infer", "bf16", BEST, "inference, bf16", {"default": 1.30, "faultless": 1.05}),
    Aim("infer", "fp32", BEST, "inference, fp32", {"default": 1.30, "faultless": 1.00}),
)  # fmt: skip
# of single operators against PyTorch eager: geometric mean, worst
OPERATORS_AIM = 1.10, 0.95
MEMORY_AIM = 0.75


def table(head: list[str], rows: list[list[str]]) -> str:
    """Aligned, and Markdown."""
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines)


def machine_line() -> str:
    """What the figures depend on."""
    capability = torch.backends.cpu.get_cpu_capability()
    has_bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    instructions = f"{capability} {'with' if has_bf16 else 'without'} bf16 instructions"
    return f"{machine.device_name('cpu')}, {instructions}, torch {torch.__version__}"


def network_tables(frame: pd.DataFrame) -> list[str]:
    """Of rows of the modes train and infer: each in a line; then, batch by batch, what was reached, and aims."""
    if frame.empty:
        return []
    frame = frame.drop_duplicates(list(schema.KEY), keep="last")
    frame = frame.assign(contender=frame.provider + " " + frame.layout)
    found = [_contenders(frame)]
    for (operator, batch, device), part in frame.groupby(["operator", "N", "device"], sort=False):
        where = machine_line() if device == machine.device_name("cpu") else device
        found.append(f"The fused {str(operator).upper()} at batch {batch} on {where}\n\n{_aims(part)}")
        memory = _memory(part)
        if memory:
            found.append(memory)
    return found


def _contenders(frame: pd.DataFrame) -> str:
    rows = [
        [
            f"{schema.NETWORK_MODES[row['mode']]}, {row['dtype']}",
            row["allocator"],
            row["contender"],
            noise.times(row).shown(".1f"),
            noise.ratio(row).shown(".2f"),
            formatted(row["rounds"], ".0f"),
            formatted(row["page_faults"], ",.0f"),
            formatted(row["saved_mb"], ",.0f"),
            formatted(row["peak_memory_mb"], ",.0f"),
            formatted(row["err_fp64"], ".1e"),
            row["status"],
        ]
        for row in schema.records(frame)
    ]
    head = ["", "allocator", "rival", "ms (quartiles)", "over tkernels (quartiles)", "rounds", "page faults",
            "saved MB", "peak MB", "err", "status"]  # fmt: skip
    return "\n".join([table(head, rows), *noise.footnotes(schema.records(frame))])


def formatted(value: Any, form: str) -> str:
    """A number as text; '' where there is none."""
    return "" if schema.is_empty(value) else format(float(value), form)


def _aims(part: pd.DataFrame) -> str:
    head = ["tkernels against the best of PyTorch"]
    measured = [allocator for allocator in ALLOCATORS if (part.allocator == allocator).any()]
    for allocator in measured:
        head += [ALLOCATORS[allocator], "aim"]
    rows = []
    for aim in AIMS:
        line = [aim.label]
        for allocator in measured:
            least = aim.aims["faultless" if allocator == "faultless" else "default"]
            line += [reached(part, aim, allocator), f"{least:.2f}"]
        rows.append(line)
    return table(head, rows)


def reached(part: pd.DataFrame, aim: Aim, allocator: str) -> str:
    """The least ratio over the others, and whose it is; why there is none."""
    rows = part[(part["mode"] == aim.mode) & (part.dtype == aim.dtype) & (part.allocator == allocator)]
    ours = rows[rows.provider == providers.OURS]
    if ours.empty:
        return "not measured"
    if ours.status.iloc[0] != schema.OK:
        return str(ours.status.iloc[0])
    timed = rows[rows.contender.isin(aim.against) & rows.ratio_p50.notna()]
    if timed.empty:
        return "no rival"
    best = schema.records(timed.sort_values("ratio_p50", kind="stable"))[0]
    name = f" {best['contender']}" if len(aim.against) > 1 else ""
    return noise.ratio(best).shown(".2f") + name


def _memory(part: pd.DataFrame) -> str:
    """Of a training step: ours as a share of eager's."""
    rows = []
    for dtype, steps in part[(part["mode"] == "train") & (part.allocator == "default")].groupby("dtype", sort=False):
        ours, eager = (steps[steps.contender == name] for name in (f"{providers.OURS} nhwc", EAGER))
        for column, text in (("saved_mb", "saved for backward"), ("peak_memory_mb", "peak resident memory")):
            if len(ours) and len(eager) and ours[column].notna().all() and eager[column].notna().all():
                a, b = float(ours[column].iloc[0]), float(eager[column].iloc[0])
                rows.append([f"{text}, {dtype}", f"{a:,.0f} MB", f"{b:,.0f} MB", f"{a / b:.2f}", f"{MEMORY_AIM:.2f}"])
    return table(["a training step keeps", "tkernels", EAGER, "share", "aim, at most"], rows) if rows else ""


def operators_table(frame: pd.DataFrame) -> str:
    """How far tkernels is ahead of PyTorch eager over the shapes of each operator, in rounds with both; '' without."""
    timed = frame[(frame.provider == providers.OURS) & frame.speedup_p25.notna()]
    if timed.empty:
        return ""
    rows = []
    for name, part in [*timed.groupby(["operator", "mode"], sort=False), (("all", ""), timed)]:
        ratio = part.speedup_vs_torch.astype(float)
        worst = schema.records(part.loc[[ratio.idxmin()]])[0]
        where = f"{worst['dtype']} {worst['layout']} {schema.shape_label(worst)}".replace("  ", " ")
        below = int((ratio < OPERATORS_AIM[1]).sum())
        rows.append([" ".join(filter(None, name)), f"{len(part)}", f"{np.exp(np.log(ratio).mean()):.2f}",
                     f"{ratio.min():.2f}", where, f"{below}", f"{(part.noise != '').sum()}"])  # fmt: skip
    mean, least = OPERATORS_AIM
    head = ["tkernels' speed-up", "rows", f"geometric mean (aim {mean:.2f})", f"least (aim {least:.2f})",
            "where", f"below {least:.2f}", "noisy"]  # fmt: skip
    return table(head, rows)
