"""What only a GPU can tell, in minutes, into one folder: right or wrong first, then fast or slow.

Blocks, in this order, each with its share of the minutes; one that needs less leaves the rest to those after it:

  facts     versions, what nvidia-smi says, the rates of a large copy and a large product
  compile   every kernel that the run needs, compiled by a process a core
  checks    every output and gradient at real shapes against float64, each again for equal bits: as called, on a side
            stream, from a CUDA graph, a thousand times beside a busy stream; tensors strided, offset and misaligned
  profile   a training step of the CIFAR CNN kernel by kernel
  headline  the step with its optimizer against eager and torch.compile, with and without CUDA graphs
  products  each product and each pass alone, replayed from a CUDA graph, against cuDNN, cuBLAS and PyTorch's attention
  ab        linear, matmul and 3x3 convolutions with descriptors (TKERNELS_TMA=1), without, and by cuBLAS and cuDNN
  resnet50  fuse(resnet50) against eager and torch.compile
  tools     compute-sanitizer over a small step, ncu over the slowest kernels, where they are installed
  tests     the test suite's cuda gate, operators first

Everything found is written at once: timings.csv (perf compare takes the folder), checks.csv, profile.csv, log.txt with
all that was printed, environment.txt, and summary.md, which is printed at the end: what was wrong, what is slower than
its rival, what is faster, what was not reached. Pictures of timings.csv, as of perf plot, come last.

With --dry-run the same path is walked on the CPU with tiny shapes.

Exit status: 0 nothing is wrong and every block was done, 1 something is or one was not, 2 refused.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tqdm import tqdm

from perf import options, providers
from perf.bench.gpu import facts, results, summary
from perf.bench.gpu.session import Block
from perf.bench.gpu.supervisor import Supervisor
from perf.options import Refused

BLOCKS = (
    Block("facts", 2.0, "perf.bench.gpu.facts"),
    Block("compile", 7.0, "perf.bench.gpu.precompile", alone=True),
    Block("checks", 9.0, "perf.bench.gpu.checks"),
    Block("profile", 2.0, "perf.bench.gpu.profile", alone=True),
    Block("headline", 12.0, "perf.bench.gpu.headline"),
    Block("products", 9.0, "perf.bench.gpu.products"),
    Block("ab", 2.0, "perf.bench.gpu.ab"),
    Block("resnet50", 5.0, "perf.bench.gpu.resnet50"),
    Block("tools", 5.0, "perf.bench.gpu.tools", alone=True),
    Block("tests", 8.0, "perf.bench.gpu.suite", alone=True),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="an empty or new folder for all results")
    add("--device", metavar="DEVICE", help="cuda, cuda:1, ... (default: cuda)")
    add("--dry-run", action="store_true", help="walk the same path on the CPU with tiny shapes")
    add(
        "--only",
        nargs="+",
        metavar="BLOCK",
        help=f"only these, after facts: {', '.join(block.name for block in BLOCKS)} (tools begins with profile)",
    )
    add("--minutes", type=float, default=10.0, metavar="N",
        help="for the whole run: 5 are useful, 10 reach everything (default: 10)")  # fmt: skip
    add("--provider", default=providers.OURS, metavar="NAME",
        help="whose operators are checked and timed: module:NAME for your own (default: tkernels)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run every block, then print the summary."""
    if args.dry_run and args.device is not None:
        raise Refused("--dry-run takes the CPU: leave out --device")
    device = "cpu" if args.dry_run else options.device(args.device or "cuda")
    if device == "cpu" and not args.dry_run:
        raise Refused("a GPU is needed: --device cuda, cuda:1, ..., or --dry-run to try this on the CPU")
    if not args.minutes > 0:
        raise Refused(f"--minutes must be above 0, got {args.minutes:g}")
    if providers.check([args.provider]) == [providers.BASELINE]:
        raise Refused(f"{providers.BASELINE} is what others are compared with: name another provider")
    names = options.several("block", args.only or [block.name for block in BLOCKS], [block.name for block in BLOCKS])
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise Refused(f"{args.out} exists and is not an empty folder: name another")
    out = options.directory(args.out).resolve()
    # whatever is measured, on what it was; and ncu looks at the kernels that the profile finds slowest
    names += ["facts", *(["profile"] if "tools" in names else [])]
    wanted = [block for block in BLOCKS if block.name in names]
    found = results.Results(out, args.provider)
    start = time.monotonic()
    end = start + 60 * args.minutes
    try:
        with (
            Supervisor(found, device, args.dry_run) as supervisor,
            tqdm(wanted, unit="block", disable=None) as bar,
        ):
            for i, block in enumerate(bar):
                bar.set_postfix_str(block.name)
                limit = (end - time.monotonic()) * block.weight / sum(later.weight for later in wanted[i:])
                found.outcomes.append(supervisor.do(block, max(limit, 1.0)))
                if block.name == "facts":
                    facts.write_environment(out / "environment.txt", found.facts)
                # after every block: an interrupted run keeps a summary of what it has
                screen = summary.screen(found, args.minutes, time.monotonic() - start)
                (out / "summary.md").write_text(screen + summary.details(found))
    finally:
        found.close()
    print(summary.details(found), screen, sep="\n", flush=True)
    # last, and imported here: a second or two that nothing measured waits for
    from perf.bench import plot

    plot.draw([out / results.TIMINGS], out)
    return summary.exit_status(found)
