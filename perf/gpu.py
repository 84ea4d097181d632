"""Everything a GPU can tell in one go, into one folder: facts, the test suite, sweeps, a training run, plots, summary.

Each part runs in a process of its own with a time limit; a part that fails is reported and the rest goes on. The
folder holds a log a part, the sweeps' CSVs, PNGs, the training's results and summary.md.

With --dry-run the same path is walked on the CPU with tiny shapes.

Exit status: 0 every part succeeded, 1 one did not, 2 refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from perf import machine, operators, options, providers, schema
from perf.options import Refused

ROOT = Path(__file__).parent.parent
# operators of a sweep -> their named shapes, the most telling first
SWEEPS = {
    ("cnn",): ("cnn",),
    ("linear", "linear_relu"): ("cnn", "mlp"),
    ("conv2d",): ("cnn", "resnet50"),
    ("conv_stage",): ("cnn", "vgg"),
    ("batch_norm", "batch_norm_relu"): ("cnn", "resnet50"),
    ("cross_entropy",): ("cnn", "vocab"),
}
# of the whole run's time; the sweep's is each sweep's
SHARES = {"facts": 0.02, "tests": 0.25, "sweep": 0.085, "train": 0.1, "traffic": 0.06, "plots": 0.06}
# what a dry run tests: the parts of the suite that take a moment
QUICK_TESTS = ("tests/test_runtime.py",)


@dataclasses.dataclass(frozen=True)
class Part:
    """One command, and its share of the run's time."""

    name: str
    command: Sequence[str]
    share: float
    environment: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a part ended: 'ok' or why not."""

    name: str
    status: str
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="an empty or new folder for all results")
    add("--device", metavar="DEVICE", help="cuda, cuda:1, ... (default: cuda)")
    add("--dry-run", action="store_true", help="walk the same path on the CPU with tiny shapes")
    add("--only", nargs="+", metavar="PART", help="only parts whose names begin so: facts, tests, sweep, train, ...")
    add("--minutes", type=float, default=10.0, metavar="N",
        help="for the whole run; each part stops after its share of them (default: 10)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run every part, then write the summary."""
    if args.dry_run and args.device is not None:
        raise Refused("--dry-run takes the CPU: leave out --device")
    device = "cpu" if args.dry_run else options.device(args.device or "cuda")
    if device == "cpu" and not args.dry_run:
        raise Refused("a GPU is needed: --device cuda, cuda:1, ..., or --dry-run to try this on the CPU")
    if args.minutes <= 0:
        raise Refused(f"--minutes must be above 0, got {args.minutes:g}")
    wanted = [part for part in parts(args.out, device, args.dry_run) if _chosen(part.name, args.only)]
    if not wanted:
        raise Refused(f"no part is named {' or '.join(args.only)}, allowed: facts, tests, sweep, train, traffic, plots")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise Refused(f"{args.out} exists and is not an empty folder: name another")
    options.directory(args.out)
    (args.out / "logs").mkdir()
    outcomes: list[Outcome] = []
    with tqdm(wanted, unit="part", disable=None) as bar:
        for part in bar:
            bar.set_postfix_str(part.name)
            outcomes.append(execute(part, 60 * args.minutes * part.share, args.out / "logs"))
            # after every part: an interrupted run keeps a summary of what it has
            (args.out / "summary.md").write_text(summary(args.out, device, outcomes))
    print((args.out / "summary.md").read_text())
    return 0 if all(outcome.status == "ok" for outcome in outcomes) else 1


def _chosen(name: str, only: Sequence[str] | None) -> bool:
    return only is None or any(name.startswith(prefix) for prefix in only)


def parts(out: Path, device: str, dry: bool) -> list[Part]:
    """Every part of a run, in order."""
    python = [sys.executable, "-m"]
    gate = "torch" if dry else "cuda"
    tests = [*python, "pytest", "-q", "-p", "no:cacheprovider", *(QUICK_TESTS if dry else ("-n", "4"))]
    found = [
        Part("facts", _facts(device), SHARES["facts"]),
        Part("tests", tests, SHARES["tests"], (("TK_GATE", gate),)),
    ]
    names = _installed(device)
    for swept, shapes in SWEEPS.items():
        command = [*python, "perf", "sweep", "--op", *swept, "--device", device, "--provider", *names]
        command += ["--mode", *operators.MODES, "--csv", str(out / f"sweep-{swept[0]}.csv"), "--cudagraph"]
        command += ["--shapes", "tiny", "--quick"] if dry else ["--shapes", *shapes]
        found.append(Part(f"sweep {swept[0]}", command, SHARES["sweep"]))
    train = [*python, "models.train", "--data", "digits", "--device", device, "--out", str(out / "train")]
    found.append(Part("train", [*train, *(["--epochs", "0"] if dry else [])], SHARES["train"]))
    traffic = [*python, "perf", "traffic", "--csv", str(out / "traffic.csv")]
    traffic += ["--batch", "4", "--last-batch", "3", "--no-inductor"] if dry else []
    found.append(Part("traffic", traffic, SHARES["traffic"]))
    drawn = "import sys; from perf.gpu import draw; sys.exit(draw(sys.argv[1]))"
    found.append(Part("plots", [sys.executable, "-c", drawn, str(out)], SHARES["plots"]))
    return found


def _installed(device: str) -> list[str]:
    """The providers that can be measured here. In a dry run torch.compile, which takes long on a CPU, is left out."""
    names = []
    for name in providers.NEEDS:
        try:
            providers.check([name])
        except Refused:
            continue
        if device != "cpu" or name not in ("torch.compile", "flag-gems", "attorch", "liger-kernel"):
            names.append(name)
    return names


def _facts(device: str) -> list[str]:
    """A command that prints versions and, on a GPU, what nvidia-smi or rocm-smi knows."""
    smi = next((path for path in map(shutil.which, ("nvidia-smi", "rocm-smi")) if path), None)
    tell = "import sys; from perf.gpu import tell; tell(*sys.argv[1:])"
    question = [] if smi is None else [smi, "-q"] if smi.endswith("nvidia-smi") else [smi]
    return [sys.executable, "-c", tell, device, *question]


def tell(device: str, *smi: str) -> None:
    """Print the machine's facts, and the output of a vendor's tool."""
    for name, value in machine.facts(device).items():
        print(f"{name}: {value}")
    print(f"python: {sys.version.split()[0]}", flush=True)
    if smi:
        subprocess.run(smi, check=False)


def draw(folder: str) -> int:
    """Plot every CSV of a run that has something to plot."""
    from perf.__main__ import main

    return max((main(["plot", str(path)]) for path in sorted(Path(folder).glob("*.csv"))), default=0)


def execute(part: Part, limit: float, logs: Path) -> Outcome:
    """Run a part to its end or its limit, its output in a log; whatever it started ends with it."""
    start = time.monotonic()
    with open(logs / f"{part.name.replace(' ', '-')}.log", "wb") as log:
        environment = {**os.environ, **dict(part.environment)}
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
            status = "ok" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after its {limit:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Outcome(part.name, status, time.monotonic() - start)


def summary(out: Path, device: str, outcomes: Sequence[Outcome]) -> str:
    """The run in Markdown: facts, how each part ended, and what the sweeps say."""
    lines = ["# tkernels on " + machine.device_name(device), ""]
    lines += [f"- {name}: {value}" for name, value in machine.facts(device).items() if value]
    lines += ["", "| part | result | seconds |", "|---|---|---|"]
    lines += [f"| {o.name} | {o.status} | {o.seconds:.0f} |" for o in outcomes]
    failed = [o for o in outcomes if o.status != "ok"]
    for outcome in failed:
        log = out / "logs" / f"{outcome.name.replace(' ', '-')}.log"
        tail = log.read_text(errors="replace").strip().splitlines()[-15:]
        lines += ["", f"## {outcome.name}: {outcome.status}", "", "```", *tail, "```"]
    lines += _sweeps(out)
    log = out / "logs" / "train.log"
    if log.exists():
        accuracy = [line for line in log.read_text(errors="replace").splitlines() if "validation accuracy" in line]
        lines += ["", "## training on digits", "", *(accuracy or ["no validation accuracy was printed"])]
    pictures = sorted(path.name for path in out.glob("*.png"))
    lines += ["", "## plots", "", *(f"![{name}]({name})" for name in pictures)] if pictures else []
    return "\n".join(lines) + "\n"


def _read(path: Path) -> pd.DataFrame | None:
    """A sweep's rows; None where it was stopped before its header was whole."""
    try:
        schema.drop_torn_line(path)
        frame = schema.read(path)
    except Refused:
        return None
    return None if frame.empty else frame


def _sweeps(out: Path) -> list[str]:
    """Speedups over PyTorch by operator, mode and dtype, and what failed."""
    read = [_read(path) for path in sorted(out.glob("sweep-*.csv"))]
    frames = [frame for frame in read if frame is not None]
    frame = pd.concat(frames) if frames else pd.DataFrame()
    if frame.empty:
        return []
    lines = ["", "## speedup over PyTorch", "", "Geometric mean over shapes, least and most.", ""]
    lines += ["| operator | mode | dtype | timing | provider | shapes | mean | least | most | roofline % |"]
    lines += ["|" + "---|" * 10]
    timed = frame[(frame.status == schema.OK) & frame.speedup_vs_torch.notna() & (frame.provider != providers.BASELINE)]
    groups = timed.groupby(["operator", "mode", "dtype", "timing", "provider"], sort=False)
    for names, part in groups:
        speed = part.speedup_vs_torch.astype(float)
        mean = float(np.log2(speed).mean())
        lines.append(
            f"| {' | '.join(map(str, names))} | {len(part)} | {2**mean:.2f} | {speed.min():.2f} | {speed.max():.2f} "
            f"| {part.roofline_pct.median():.0f} |"
        )
    other = frame[frame.status != schema.OK]
    if not other.empty:
        lines += [
            "",
            "## not measured",
            "",
            "| operator | mode | dtype | shape | provider | status |",
            "|" + "---|" * 6,
        ]
        for row in schema.records(other.drop_duplicates(["operator", "provider", "status"])):
            cells = (
                row["operator"],
                row["mode"],
                row["dtype"],
                schema.shape_label(row),
                row["provider"],
                row["status"],
            )
            lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return lines
