"""tkernels, or python -m tkernels: what an issue report needs. Versions, devices, switches, what of the CPU's passes
compiles, caches, and the backend each operator takes."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

import tkernels
import tkernels.functional as F
from tkernels.core import autotune, hardware, launch, mode, settings, targets
from tkernels.ops import cpu

MOST_FILES = 20_000  # of a cache that are looked at


def environment() -> Iterator[tuple[str, str]]:
    """(name, value) of what decides how operators run."""
    yield "tkernels", f"{tkernels.__version__}, {_source()}"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__} (CUDA {torch.version.cuda}, HIP {torch.version.hip})"
    for package in ("triton", "torchvision", "numpy"):
        yield package, _version(package)
    yield "CUDA available", _cuda()
    for index in range(torch.cuda.device_count()):
        yield f"device {index}", _gpu(index)
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    yield "CPU", f"{hardware.cpu_model()}, {cores}"
    yield "backend", f"{tkernels.get_backend()!r}"
    yield "Triton's interpreter", "on" if mode.interpreting() else "off"
    yield "autotuning", "on" if autotune.enabled else "off"
    yield (
        "float32 products",
        f"conv {mode.dot_precision(torch.float32, 'conv')}, "
        + (f"matmul {mode.dot_precision(torch.float32, 'matmul')}"),
    )
    yield from settings.others("TKERNELS_", "TRITON_")


def _source() -> str:
    """Where the package lies, and its commit where that is known: of a checkout, or of what pip was told to install."""
    folder, commit = Path(tkernels.__file__).parent, None
    if (folder.parent / ".git").exists():
        describe = "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"
        commit = "".join(hardware.printed("git", "-C", str(folder), *describe))
    elif (of_wheel := _distribution("tkernels")) is not None:
        commit = json.loads(of_wheel.read_text("direct_url.json") or "{}").get("vcs_info", {}).get("commit_id")
    return f"commit {commit}, in {folder}" if commit else f"in {folder}"


def _cuda() -> str:
    """Whether there is a GPU, with its driver's version; else why torch finds none."""
    if torch.cuda.is_available():
        drivers = hardware.ask_smi("driver_version")
        return f"yes, driver {drivers[0] if drivers else 'of unknown version'}"
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:  # the first is that of a build without CUDA
        return f"no: {str(error).partition('. ')[0]}"
    return "no"


def _gpu(index: int) -> str:
    """What it is, and the row of core/targets.py by which kernels are configured for it."""
    found, arch = torch.cuda.get_device_properties(index), targets.arch_of(index)
    what = (
        f"{found.name}, compute capability {found.major}.{found.minor}, {found.multi_processor_count} "
        f"multiprocessors, {found.total_memory / 2**30:.0f} GiB"
    )
    if isinstance(arch, int) and arch < targets.OLDEST:
        return f"{what}: too old for the kernels, PyTorch runs"
    target, row = targets.of_device(index), targets.row_of(arch)
    of_another = "" if row.name == target.name else f" ({target.name} has none of its own)"
    return (
        f"{what}: takes the row {row.name}{of_another}, {row.shared_memory // 1024} KiB of shared memory, "
        f"{row.tflops:.0f} TFLOP/s in bfloat16, {row.gbps:.0f} GB/s"
    )


def cpu_passes() -> Iterator[tuple[str, str]]:
    """(what, who computes it on this CPU and why)."""
    if cpu is None:
        yield "tkernels.cpu", "is not there: every call on a CPU is PyTorch's"
    else:
        yield from cpu.describe()


def caches() -> Iterator[tuple[str, str]]:
    """(what is kept, where, how many files and bytes)."""
    if cpu is not None:
        yield "compiled passes", _kept(cpu.cache_folder, "cpu-*")
    yield "measured choices", _kept(autotune.folder_of_choices, "autotune-*")
    if mode.HAS_TRITON:
        yield "Triton's kernels", _kept(launch.cache_folder)


def _kept(find: Callable[[], Path | str | None], pattern: str = "*") -> str:
    """A folder, and what lies in it under names of that pattern. Past MOST_FILES nothing is counted."""
    try:
        folder = find()
    except RuntimeError as error:  # no HOME, and a user whom the system does not know
        return f"nowhere: {error}"
    if folder is None:
        return "nowhere"
    sizes = []
    for path in itertools.islice(_files(Path(folder), pattern), MOST_FILES):
        with contextlib.suppress(OSError):  # deleted meanwhile
            sizes.append(path.lstat().st_size)
    at_least = "at least " if len(sizes) == MOST_FILES else ""
    return f"{folder}: {at_least}{len(sizes)} files, {sum(sizes) / 1e6:.1f} MB" if sizes else f"{folder}: empty"


def _files(folder: Path, pattern: str) -> Iterator[Path]:
    for top in folder.glob(pattern):
        if top.is_file():
            yield top
        for place, _, names in os.walk(top):
            yield from (Path(place, name) for name in names)


def variables() -> Iterator[tuple[str, str]]:
    """(name, value or default, and what it decides) of the environment variables that tkernels reads."""
    for setting in settings.SETTINGS:
        value = setting.text()
        said = f"{setting.default} (default)" if value is None else value
        yield setting.name, f"{said}: {setting.meaning}"


def _version(package: str) -> str:
    found = _distribution(package)
    return "not installed" if found is None else found.version


def _distribution(package: str) -> metadata.Distribution | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.distribution(package)
    return None


def _operators(device: str, dtype: torch.dtype) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """A small call of each operator."""
    image, rows = torch.ones(2, 4, 4, 4, device=device, dtype=dtype), torch.ones(2, 4, device=device, dtype=dtype)
    weight = torch.ones(4, 4, 1, 1, device=device, dtype=dtype)
    target = torch.zeros(2, device=device, dtype=torch.int64)
    return {
        "linear": (F.linear, (rows, rows)),
        "conv2d": (F.conv2d, (image, weight)),
        "batch_norm": (lambda x: F.batch_norm(x, None, None, training=True), (image,)),
        "conv_stage": (lambda x, w: F.conv_stage(x, [F.ConvBNLayer(w)], training=True), (image, weight)),
        "cross_entropy": (F.cross_entropy, (rows, target)),
    }


def backends(device: str, dtype: torch.dtype) -> Iterator[tuple[str, str]]:
    """(operator, the backend a small call of it takes and why, or how it fails)."""
    for name, (call, tensors) in _operators(device, dtype).items():
        if mode.get_backend() == "torch":
            taken = "no kernel: backend 'torch' was asked for"
        else:
            reason = mode.why_not_triton(*tensors)
            taken = "Triton" if reason is None else f"no kernel: {reason}"
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")  # its interpreter's NumPy
                call(*tensors)
        except Exception as error:
            said = f"a call fails: {type(error).__name__}: {str(error).removesuffix(mode.ADVICE)}"
            taken = said if taken.startswith("no kernel") else f"{taken}; {said}"
        yield name, taken


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tkernels", description=__doc__)
    parser.add_argument("--device", help="where the operators are tried (default: cuda if available, else cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "float64"))
    options = parser.parse_args(arguments)
    try:
        tkernels.get_backend()
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=device).item()
    # (CPU-only builds of torch answer a GPU's name with an AssertionError, other devices with a NotImplementedError)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        parser.exit(
            2, f"{parser.prog}: error: argument --device: {device!r} cannot be used: {str(error).splitlines()[0]}\n"
        )
    sections = {
        "environment": list(environment()),
        "settings": list(variables()),
        "passes on this CPU": list(cpu_passes()),
        "caches": list(caches()),
        f"operators on {device} in {options.dtype}": list(backends(device, getattr(torch, options.dtype))),
    }
    width = max(len(name) for rows in sections.values() for name, _ in rows)
    for title, rows in sections.items():
        print(title)
        for name, value in rows:
            print(f"  {name:<{width}}  {settings.tilde(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
