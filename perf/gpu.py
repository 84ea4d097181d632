"""Everything a GPU can tell in one go, into one folder: facts, the test suite, sweeps, a training run, plots, summary.

Each part runs in a process of its own within its share of the minutes that are left; one that fails or is stopped is
reported, keeps what it has, and the rest goes on. The folder: summary.md, sweep.csv (every operator and the network,
with and without CUDA graph; perf compare takes it) and traffic.csv, PNGs, the training's results in train/, the parts'
own output in logs/.

With --dry-run the same path is walked on the CPU with tiny shapes.

Exit status: 0 every part succeeded, 1 one did not, 2 refused.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from perf import machine, options, providers, report, schema
from perf.options import Refused

ROOT = Path(__file__).parent.parent
# operators of a sweep -> their named shapes, the most telling first
SWEEPS = {
    ("cnn",): ("cnn",),
    ("linear", "linear_relu"): ("cnn", "mlp"),
    ("matmul", "attention"): ("transformer",),
    ("conv2d", "conv2d_relu"): ("cnn", "resnet50"),
    ("conv_stage",): ("cnn", "vgg"),
    ("batch_norm", "batch_norm_relu"): ("cnn", "resnet50"),
    ("cross_entropy",): ("cnn", "vocab"),
}
# Shares of the time: a part gets its share of what is left and of what the parts after it are due
WEIGHTS = {"facts": 2.0, "tests ops": 9.0, "tests rest": 7.0, "train": 5.0, "traffic": 4.0, "plots": 4.0}
SWEEP_WEIGHTS = {"cnn": 12.0, "conv2d": 7.0}
OTHER_SWEEPS_WEIGHT = 4.0
# a provider that is silent for so many seconds is given up: compiling a training step's kernels takes about half
SILENCE = 120
# seconds that a part has to end by itself when its time is over
GRACE = 20.0
# what a dry run tests: the parts of the suite that take a moment
QUICK_TESTS = ("tests/test_runtime.py",)


@dataclasses.dataclass(frozen=True)
class Part:
    """One command, and the weight of its share of the run's time."""

    name: str
    command: Sequence[str]
    weight: float
    environment: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a part ended: 'ok' or why not."""

    name: str
    status: str
    seconds: float

    @property
    def log(self) -> str:
        """Where its output is, in the run's folder."""
        return f"logs/{self.name.replace(' ', '-')}.log"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="an empty or new folder for all results")
    add("--device", metavar="DEVICE", help="cuda, cuda:1, ... (default: cuda)")
    add("--dry-run", action="store_true", help="walk the same path on the CPU with tiny shapes")
    add("--only", nargs="+", metavar="PART", help="only parts whose names begin so: facts, tests, sweep, train, ...")
    add("--minutes", type=float, default=10.0, metavar="N",
        help="for the whole run; a part that takes more than its share is stopped (default: 10)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run every part, then write the summary."""
    if args.dry_run and args.device is not None:
        raise Refused("--dry-run takes the CPU: leave out --device")
    device = "cpu" if args.dry_run else options.device(args.device or "cuda")
    if device == "cpu" and not args.dry_run:
        raise Refused("a GPU is needed: --device cuda, cuda:1, ..., or --dry-run to try this on the CPU")
    if args.minutes <= 0:
        raise Refused(f"--minutes must be above 0, got {args.minutes:g}")
    wanted = [part for part in parts(args.out.resolve(), device, args.dry_run) if _chosen(part.name, args.only)]
    if not wanted:
        raise Refused(f"no part is named {' or '.join(args.only)}, allowed: facts, tests, sweep, train, traffic, plots")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise Refused(f"{args.out} exists and is not an empty folder: name another")
    args.out = options.directory(args.out).resolve()
    for folder in ("logs", "sweeps"):
        (args.out / folder).mkdir()
    outcomes: list[Outcome] = []
    end = time.monotonic() + 60 * args.minutes
    with tqdm(wanted, unit="part", disable=None) as bar:
        for i, part in enumerate(bar):
            bar.set_postfix_str(part.name)
            limit = (end - time.monotonic()) * part.weight / sum(later.weight for later in wanted[i:])
            outcomes.append(execute(part, max(limit, 1.0), args.out))
            # after every part: an interrupted run keeps a summary of what it has
            (args.out / "summary.md").write_text(report.summary(args.out, device, args.minutes, outcomes))
    print((args.out / "summary.md").read_text())
    return 0 if all(outcome.status == "ok" for outcome in outcomes) else 1


def _chosen(name: str, only: Sequence[str] | None) -> bool:
    return only is None or any(name.startswith(prefix) for prefix in only)


def parts(out: Path, device: str, dry: bool) -> list[Part]:
    """Every part of a run, in order."""
    python = [sys.executable, "-m"]
    found = [Part("facts", _facts(device), WEIGHTS["facts"]), *_tests(device, dry)]
    names = _installed(device)
    for swept, shapes in SWEEPS.items():
        command = [*python, "perf", "sweep", "--op", *swept, "--device", device, "--provider", *names]
        command += ["--mode", *schema.MODES, "--cudagraph", "--limit", str(SILENCE)]
        command += ["--csv", str(out / "sweeps" / f"{swept[0]}.csv")]
        command += ["--shapes", "tiny", "--quick"] if dry else ["--shapes", *shapes]
        found.append(Part(f"sweep {swept[0]}", command, SWEEP_WEIGHTS.get(swept[0], OTHER_SWEEPS_WEIGHT)))
    train = [*python, "models.train", "--data", "digits", "--device", device, "--out", str(out / "train")]
    found.append(Part("train", [*train, *(["--epochs", "0"] if dry else [])], WEIGHTS["train"]))
    traffic = [*python, "perf", "traffic", "--csv", str(out / "traffic.csv")]
    traffic += ["--batch", "4", "--last-batch", "3", "--no-inductor"] if dry else []
    found.append(Part("traffic", traffic, WEIGHTS["traffic"]))
    drawn = "import sys; from perf.gpu import draw; sys.exit(draw(sys.argv[1]))"
    found.append(Part("plots", [sys.executable, "-c", drawn, str(out)], WEIGHTS["plots"]))
    return found


def _tests(device: str, dry: bool) -> list[Part]:
    """The suite on the GPU, operators first; a part stopped by its time tells what failed so far."""
    python = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    if dry:
        return [Part("tests", [*python, *QUICK_TESTS], WEIGHTS["tests ops"], _gate("torch"))]
    python += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal", "--tb", "short"]
    chosen = {"tests ops": ["tests/ops"], "tests rest": ["tests", "--ignore=tests/ops"]}
    environment = (*_gate("cuda"), *_visible(device))
    return [Part(name, [*python, *paths], WEIGHTS[name], environment) for name, paths in chosen.items()]


def _gate(name: str) -> tuple[tuple[str, str], ...]:
    """The ordinary tests of a gate, whatever the environment of the run says."""
    return ("TK_GATE", name), ("TK_EXTENDED", "0")


def _visible(device: str) -> tuple[tuple[str, str], ...]:
    """What makes cuda:1 the only GPU that a process sees: the tests take the first."""
    index = device.partition(":")[2]
    if not index:
        return ()
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (("CUDA_VISIBLE_DEVICES", before.split(",")[int(index)] if before else index),)


def _installed(device: str) -> list[str]:
    """The providers that can be measured here, but the usual code of CPUs, which has no single operators. In a dry run
    torch.compile, which takes long on a CPU, is left out."""
    names = []
    for name in providers.NEEDS:
        if name == providers.USUAL:
            continue
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
    """Put the sweeps together in one CSV, and plot it and the traffic."""
    from perf.__main__ import main

    out = Path(folder)
    rows = report.sweeps(out)
    if rows is not None:
        rows.to_csv(out / "sweep.csv", index=False)
    given = [str(out / name) for name in ("sweep.csv", "traffic.csv") if (out / name).exists()]
    return main(["plot", *given]) if given else 0


def execute(part: Part, limit: float, out: Path) -> Outcome:
    """Run a part to its end or its limit, its output in a log; whatever it started ends with it."""
    start = time.monotonic()
    done = Outcome(part.name, "ok", 0.0)
    with open(out / done.log, "wb") as log:
        environment = {**os.environ, **dict(part.environment)}
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
            status = "ok" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after its {limit:.0f} s"
            _interrupt(process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return dataclasses.replace(done, status=status, seconds=time.monotonic() - start)


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """Let it end as by Ctrl-C: pytest then lists what failed, a sweep's worker goes with it."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
