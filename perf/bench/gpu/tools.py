"""NVIDIA's own tools over a small step: compute-sanitizer for errors in memory and races, ncu over the slowest kernels.

``python -m perf.bench.gpu.tools`` is the step they watch. Nothing here sets a GPU's clocks: ncu is told to leave them.
"""

from __future__ import annotations

import csv
import functools
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from perf.bench.gpu.session import Item, Run

ROOT = Path(__file__).parents[3]
STEP = (sys.executable, "-m", "perf.bench.gpu.tools")
# what ncu is asked for: time, bytes a second of device memory and L2 (percent of peak), and of the tensor cores
METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "L2 %",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": "tensor %",
}


def items(run: Run) -> list[Item]:
    """A run of the step under each tool."""
    memcheck = functools.partial(_sanitizer, run, "memcheck")
    racecheck = functools.partial(_sanitizer, run, "racecheck")
    return [Item("memcheck", memcheck), Item("ncu", functools.partial(_ncu, run)), Item("racecheck", racecheck)]


def _sanitizer(run: Run, tool: str) -> None:
    path = shutil.which("compute-sanitizer")
    if path is None:
        run.tell("tool", (tool, "compute-sanitizer is not installed"))
        return
    # what a library asks of the driver in vain, and goes on without, is no error in memory
    quiet = ("--report-api-errors", "no") if tool == "memcheck" else ()
    # allocations of their own: an access behind a tensor is then outside of all memory
    text = watched([path, "--tool", tool, *quiet, "--launch-timeout", "0", "--print-limit", "20", *STEP, run.device],
                   PYTORCH_NO_CUDA_MEMORY_CACHING="1")  # fmt: skip
    run.tell("tool", (tool, verdict(text)))


def verdict(text: str) -> str:
    """The sanitizer's own summary, with its first finding. Anything but 'no errors' counts as wrong, except where it
    cannot work at all."""
    if "Device not supported" in text:
        return "unsupported: compute-sanitizer refuses this GPU or machine"
    summary = re.search(r"(ERROR SUMMARY|RACECHECK SUMMARY): (.*)", text)
    if summary is None:
        return f"error: no summary; it said last: {' '.join(text.split())[-300:]}"
    if re.match(r"0 (errors|hazards)", summary[2]):
        return f"no errors ({summary[2].strip()})"
    finding = next((line.strip("= ") for line in text.splitlines() if re.search(r"Invalid|hazard|[Ee]rror:", line)), "")
    return f"wrong: {summary[2].strip()}; {finding}"


def _ncu(run: Run) -> None:
    path = shutil.which("ncu")
    if path is None:
        run.tell("tool", ("ncu", "ncu is not installed"))
        return
    if not run.request.slowest:
        run.tell("tool", ("ncu", "there is no profile that says what is slowest"))
        return
    names = "|".join(f"^{re.escape(name)}$" for name in run.request.slowest)
    text = watched([path, "--clock-control", "none", "--csv", "--kernel-name", f"regex:{names}", "--launch-count", "40",
                    "--metrics", ",".join(METRICS), *STEP, run.device, "256"])  # fmt: skip
    rows = table(text)
    for kernel, values in rows.items():
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        run.tell("tool", (f"ncu {kernel}", shown))
    if not rows:
        forbidden = re.search("ERR_NVGPUCTRPERM|LibraryNotLoaded", text)
        why = "unsupported: the GPU's counters cannot be read" if forbidden else "error: no rows"
        run.tell("tool", ("ncu", f"{why}; it said last: {' '.join(text.split())[-300:]}"))


def table(text: str) -> dict[str, dict[str, str]]:
    """ncu's CSV: of each kernel the metrics of its longest launch."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return {}
    launches: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        found = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        name = METRICS.get(row["Metric Name"])
        if name is not None:
            found[name] = _microseconds(row) if name == "us" else row["Metric Value"]
    best: dict[str, dict[str, str]] = {}
    for found in launches.values():
        kernel = found.pop("kernel")
        if kernel not in best or float(found.get("us", "0")) > float(best[kernel].get("us", "0")):
            best[kernel] = found
    return best


def _microseconds(row: dict[str, str]) -> str:
    value = float(row["Metric Value"].replace(",", ""))
    scale = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}.get(
        row["Metric Unit"], 1.0
    )
    return f"{value * scale:.1f}"


def watched(command: Sequence[str], **environment: str) -> str:
    """Run a command in a group of its own, print and return what it prints; it ends when the block's time does."""
    process = started(command, environment)
    try:
        text, _ = process.communicate()
    finally:
        end(process)
    print(text[-20000:], flush=True)
    return text


def started(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """A command in a group of its own, with these variables besides; what it prints is to be read."""
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> None:
    """Kill a command and all it started, if it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(device: str, batch: int = 8) -> None:
    """A training step of the CIFAR CNN and an attention, forward and backward, on our kernels."""
    import torch

    import tkernels
    from perf.static import traffic

    model, loss = traffic.fused()
    model = model.to(device, torch.bfloat16).to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, 32, 32, device=device, dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last
    )
    target = torch.randint(10, (batch,), device=device)
    with tkernels.backend("triton" if device != "cpu" else "auto"):
        loss(model(images), target).backward()
        attend(device)
    if device != "cpu":
        torch.cuda.synchronize()


def attend(device: str) -> None:
    """The attention."""
    import torch

    import tkernels

    q, k, v = (torch.randn(2, 2, 160, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    tkernels.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
