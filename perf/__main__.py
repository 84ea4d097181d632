"""``python -m perf COMMAND ...``: see ``python -m perf --help``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from models.arguments import Parser
from perf import options

COMMANDS = {
    "sweep": "time operators against PyTorch and other libraries, into a CSV",
    "model": "a model of torchvision, timm or your own: eager, torch.compile and fused side by side",
    "compare": "what got slower or less exact between two CSVs; exit status 1 if anything did",
    "plot": "PNGs of a CSV: latency, speedup, roofline, bytes",
    "static": "what the compiler made of every kernel, for GPUs that are not there",
    "traffic": "bytes, launches and saved bytes of a training step, layer by layer",
    "host": "what a training step costs the host in Python, without a GPU",
    "gpu": "on a GPU, in minutes: what is wrong, slower than its rival, faster; one folder of results",
}
MODULES = {
    **{name: f"perf.bench.{name}" for name in ("sweep", "compare", "plot")},
    **{name: f"perf.bench.{name}.command" for name in ("model", "gpu")},
    **{name: f"perf.static.{name}" for name in ("traffic", "host")},
    "static": "perf.static.report",
}
PROGRAM = "python -m perf"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand. Returns its exit status: 0 done, 1 found something bad, 2 refused or could not write, 130
    interrupted, 141 nobody reads what it prints."""
    given = list(sys.argv[1:] if argv is None else argv)
    listing = "\n".join(f"  {name:8} {text}" for name, text in COMMANDS.items())
    top = _parser(PROGRAM, f"Measure tkernels.\n\ncommands:\n{listing}")
    top.usage = f"{PROGRAM} COMMAND ... (--help after a command lists its options)"
    top.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    name = top.parse_args(given[:1]).command
    module = importlib.import_module(MODULES[name])
    parser = _parser(f"{PROGRAM} {name}", module.__doc__)
    module.add_arguments(parser)
    try:
        _check_environment()
        return module.run(parser.parse_args(given[1:]))
    except options.Refused as refusal:
        parser.error(str(refusal))
    except BrokenPipeError:
        # who reads has seen enough; the interpreter must not try to flush the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a full disk, a name too long
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130


def _parser(program: str, description: str | None) -> Parser:
    described = argparse.RawDescriptionHelpFormatter
    return Parser(prog=program, description=description, allow_abbrev=False, formatter_class=described)


def _check_environment() -> None:
    """Raise Refused for a backend that does not exist, before every row says so."""
    library = sys.modules.get("tkernels")
    try:
        if library is not None:
            library.get_backend()
    except ValueError as error:
        raise options.Refused(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
