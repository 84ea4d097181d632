"""Put one fault at a time into a copy of the source and see whether the tests turn red: ``python -m tests.mutants``.

Exit status: 0 if all mutants died, but for those whose reason to live stands with them; 1 if one lived, or nobody can
tell (the test that failed fails without it too); 2 for a mutant that the source has left behind.
"""

from __future__ import annotations

import argparse
import functools
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
        verdict, why = _verdict(mutant, timeout)
        print(f"{number}/{len(chosen)} {verdict} {time.monotonic() - start:.0f} s  {mutant.name}: {why}", flush=True)
        if verdict != "died":
            yield mutant


def _verdict(mutant: Mutant, timeout: float) -> tuple[str, str]:
    """'died', 'LIVES' or 'UNKNOWN', and the test that saw it or why there is no telling."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        root = Path(folder)
        _copy(root)
        mutant.put_into(root)
        try:
            done = _pytest(root, mutant.gate, mutant.tests, timeout)
        except subprocess.TimeoutExpired:
            return "died", f"ran longer than {timeout:.0f} s"
    if done.returncode == LIVES:
        return "LIVES", done.stdout.splitlines()[-1]
    failed = [line.split(" - ")[0].split(" ", 1)[1] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    if done.returncode != DIES or not failed:
        *_, last = ["", *(done.stdout + done.stderr).strip().splitlines()]
        return "UNKNOWN", f"pytest ended with {done.returncode}: {last}"
    if not _passes(mutant.gate, failed[0], timeout):
        return "UNKNOWN", f"{failed[0]} fails without it too"
    return "died", failed[0]


@functools.cache
def _passes(gate: str, test: str, timeout: float) -> bool:
    """Whether a test passes on a copy of the source as it is."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        _copy(Path(folder))
        return _pytest(Path(folder), gate, (test,), timeout).returncode == LIVES


def _copy(root: Path) -> None:
    """All files that git keeps, or would, as they are now."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():  # not deleted since
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)


def _pytest(root: Path, gate: str, tests: tuple[str, ...], timeout: float) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TK_GATE": gate, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=timeout)


if __name__ == "__main__":
    sys.exit(main())
