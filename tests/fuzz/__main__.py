"""python -m tests.fuzz: random calls of tkernels beside torch's, for minutes or hours; prints what differs as tests."""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

EPILOG = """\
Each failure is printed as a test: paste it into a file under tests/ and run it (TK_GATE=torch or TK_GATE=ttsem). It is
the simplest case found that still fails. --seed N --only I makes the draw of that seed and index alone, in any process.
The last line says what ran. Exit status: 0 nothing differs, 1 something does, 2 a fast way never ran (or bad usage).
"""


def parser() -> argparse.ArgumentParser:
    from models.arguments import Parser
    from tests.fuzz.bodies import BODIES
    from tests.fuzz.by_seed import SHARES

    made = Parser(
        prog="python -m tests.fuzz",
        description="Random calls of tkernels (functions, modules, fused models) compared with torch and float64: "
        "values, NaN and Inf, dtypes, shapes, strides, gradients, errors, and what is written to.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--minutes", type=float, default=1.0, help="how long to draw (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of all draws (default: %(default)s)")
    made.add_argument(
        "--body", choices=BODIES, default="cpu",
        help="cpu: PyTorch with compiled passes; kernels: Triton's, run by the executor (default: %(default)s)",
    )  # fmt: skip
    made.add_argument(
        "--op", type=lambda text: text.split(","), default=[], metavar="NAME,...", help=f"of {', '.join(SHARES)}"
    )
    made.add_argument("--only", type=int, metavar="INDEX", help="one draw and no more")
    made.add_argument("--first", type=int, default=0, metavar="INDEX", help="where to start (default: %(default)s)")
    made.add_argument("--draws", type=int, metavar="N", help="at most so many draws")
    made.add_argument("--as-drawn", action="store_true", help="print cases as they were drawn, not simplified")
    made.add_argument("--worker", help=argparse.SUPPRESS)
    return made


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    from tests.fuzz.by_seed import SHARES

    unknown = [name for name in arguments.op if name not in SHARES]
    if unknown:
        parser().error(f"--op: no operator {', '.join(unknown)}; there are {', '.join(SHARES)}")
    if arguments.worker:
        return work(arguments)
    return supervise(arguments)


# seconds after which one draw counts as hanging
PATIENCE = 300
# the exit status of a worker that leaves the rest to another
FULL = 75


def work(arguments: argparse.Namespace) -> int:
    """Draws until the time is over, in this process; keeps the count of what ran in the file ``arguments.worker``."""
    from tests.fuzz import bodies, session

    warnings.simplefilter("ignore")
    for name in ("tkernels", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with bodies.opened(arguments.body):
        over = session.Session(arguments, Path(arguments.worker), PATIENCE).run()
    return 0 if over else FULL


def supervise(arguments: argparse.Namespace) -> int:
    """Workers one after the other: one that dies by a signal is a failure of the draw it was at."""
    from tests.fuzz import session

    start, first, total = time.monotonic(), arguments.first, collections.Counter[str]()
    ran = collections.Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        while True:
            progress = Path(folder) / "progress"
            progress.unlink(missing_ok=True)
            left = arguments.minutes - (time.monotonic() - start) / 60
            code = _worker(arguments, progress, first, left)
            found = json.loads(progress.read_text()) if progress.exists() else {}
            total.update(found.get("counts", {}))
            ran.update(found.get("ran", {}))
            if code == 0 or not found:
                break
            if code == FULL:
                first = found["index"]
                continue
            total["failures"] += 1
            print(session.died(arguments, found["index"], code), flush=True)
            first = found["index"] + 1
            if arguments.only is not None or code == -signal.SIGINT or left <= 0:
                break
    seconds = time.monotonic() - start
    return session.conclude(arguments, total, ran, seconds, code if not found else 0)


def _worker(arguments: argparse.Namespace, progress: Path, first: int, minutes: float) -> int:
    command = [sys.executable, "-m", "tests.fuzz", "--worker", str(progress), "--first", str(first),
               "--minutes", str(minutes), "--seed", str(arguments.seed), "--body", arguments.body]  # fmt: skip
    for name in ("only", "draws"):
        if getattr(arguments, name) is not None:
            command += [f"--{name}", str(getattr(arguments, name))]
    if arguments.op:
        command += ["--op", ",".join(arguments.op)]
    if arguments.as_drawn:
        command.append("--as-drawn")
    threads = "1" if arguments.body == "kernels" else "2"
    process = subprocess.Popen(command, env={"OMP_NUM_THREADS": threads, **os.environ})
    try:
        return process.wait()
    except KeyboardInterrupt:
        return process.wait()


if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main())
