"""Put one fault at a time into a copy of the source and see whether the tests turn red: ``python -m tests.mutants``.

Exit status: 0 if all mutants died, but for those whose reason to live stands with them; 1 if one lived; 2 for a mutant
that the source has left behind, or tests that fail without one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.mutants import MUTANTS
from tests.mutants.mutant import ROOT, Mutant

COPIED = ("tkernels", "models", "perf", "tests", "pyproject.toml", "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
# what pytest ends with: no test failed, some did
LIVES, DIES = 0, 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="parts of mutants' names (default: all)")
    parser.add_argument("--list", action="store_true", help="list the mutants and stop")
    parser.add_argument(
        "--timeout", type=float, default=900.0, metavar="S", help="seconds of a run; one that takes longer died"
    )
    args = parser.parse_args(argv)
    chosen = [m for m in MUTANTS if not args.names or any(name in m.name for name in args.names)]
    if not chosen:
        parser.error(f"no mutant is called like {', '.join(args.names)}")
    complaints = [complaint for m in chosen if (complaint := m.complaint()) is not None]
    if complaints:
        print("\n".join(complaints), file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(f"{m.name}  ({m.file}; {m.gate}: {' '.join(m.tests)})" for m in chosen))
        return 0
    lived = [m for m in _run(chosen, args.timeout) if not m.reason]
    print(f"{len(chosen)} mutants, {len(lived)} lived without a reason")
    for m in lived:
        print(f"  {m.name}")
    return 1 if lived else 0


def _run(chosen: Sequence[Mutant], timeout: float) -> Iterator[Mutant]:
    """Those that live."""
    for number, mutant in enumerate(chosen, 1):
        start = time.monotonic()
        status, last = _status_of(mutant, timeout)
        if status not in (LIVES, DIES):
            last = f"no verdict, pytest ended with {status}: {last}"
        verdict = {LIVES: "LIVES", DIES: "died"}.get(status, "LIVES?")
        print(f"{number}/{len(chosen)} {verdict} {time.monotonic() - start:.0f} s  {mutant.name}: {last}", flush=True)
        if status != DIES:
            yield mutant


def _status_of(mutant: Mutant, timeout: float) -> tuple[int, str]:
    """How pytest ends on a copy with the mutant, and the line that says most."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        root = Path(folder)
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif (ROOT / name).exists():
                shutil.copy(ROOT / name, root / name)
        mutant.put_into(root)
        environment = {**os.environ, "TK_GATE": mutant.gate, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *mutant.tests]
        try:
            done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return DIES, f"ran longer than {timeout:.0f} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, (lines or done.stdout.splitlines() or done.stderr.splitlines() or [""])[-1]


if __name__ == "__main__":
    sys.exit(main())
