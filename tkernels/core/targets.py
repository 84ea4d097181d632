"""What a GPU is. Shared memory, registers, multiprocessors and peak rates, from the vendors' sheets."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import torch


@dataclasses.dataclass(frozen=True)
class Target:
    """One GPU as the chooser sees it.

    ``shared_memory``: bytes one program may use (LDS on AMD). ``shared_memory_mp``: bytes a multiprocessor has.
    ``registers_mp``: 32-bit registers of a multiprocessor. ``tflops``: dense bf16 with float32 accumulation;
    ``tflops_fp32``: float32 without tensor cores; ``gbps``: memory bandwidth.
    """

    name: str
    vendor: str
    arch: int | str
    multiprocessors: int
    warp_size: int
    max_warps_mp: int
    max_programs_mp: int
    shared_memory: int
    shared_memory_mp: int
    registers_mp: int
    tflops: float
    tflops_fp32: float
    gbps: float
    has_tf32: bool
    max_stages: int

    def __hash__(self) -> int:
        # choosers look answers up by it at each launch; that all else is equal too is seen when they are compared
        return hash((self.name, self.multiprocessors))

    @functools.cached_property
    def facts(self) -> tuple[object, ...]:
        """All of it, as a key that is cheap to look up."""
        return dataclasses.astuple(self)

    @property
    def is_nvidia(self) -> bool:
        return self.vendor == "nvidia"

    def registers(self, most: int | None) -> int | None:
        """``most`` registers a thread as Triton's option maxnreg, which there is not on AMD: None."""
        return most if self.is_nvidia else None


def _nvidia(arch: int, mps: int, warps: int, programs: int, smem_kib: int, smem_mp_kib: int, tflops: float,
            fp32: float, gbps: float) -> Target:  # fmt: skip
    return Target(f"sm_{arch}", "nvidia", arch, mps, 32, warps, programs, smem_kib * 1024, smem_mp_kib * 1024,
                  65536, tflops, fp32, gbps, has_tf32=True, max_stages=5)  # fmt: skip


# Registers on AMD: 128 K (CDNA3, per compute unit, vector and accumulation) and 192 K (RDNA3, per workgroup
# processor's half) 32-bit registers; occupancy from them is an estimate.
TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        _nvidia(80, 108, 64, 32, 163, 164, 312.0, 19.5, 2039.0),  # A100 SXM 80 GB
        _nvidia(86, 82, 48, 16, 99, 100, 71.0, 35.6, 936.0),  # RTX 3090
        _nvidia(89, 128, 48, 24, 99, 100, 165.0, 82.6, 1008.0),  # RTX 4090
        _nvidia(90, 132, 64, 32, 227, 228, 989.0, 66.9, 3350.0),  # H100 SXM
        _nvidia(100, 148, 64, 32, 227, 228, 2250.0, 80.0, 8000.0),  # B200
        _nvidia(120, 170, 48, 24, 99, 100, 209.5, 104.8, 1792.0),  # RTX 5090
        Target("gfx942", "amd", "gfx942", 304, 64, 32, 16, 65536, 65536, 131072, 1307.0, 163.4, 5300.0, True, 2),
        Target("gfx1100", "amd", "gfx1100", 96, 32, 32, 16, 65536, 65536, 98304, 122.8, 61.4, 960.0, False, 2),
    )
}

# the compute capability, times ten, from which on kernels run
OLDEST = 80

_pretended: Target | None = None


@contextlib.contextmanager
def pretend(target: str | Target) -> Iterator[Target]:
    """Let the chooser answer for another GPU (ahead-of-time compilation, tests). Raises KeyError for a name unknown."""
    global _pretended
    before, _pretended = _pretended, TARGETS[target] if isinstance(target, str) else target
    try:
        yield _pretended
    finally:
        _pretended = before


def pretending() -> bool:
    """Whether :func:`pretend` is in force."""
    return _pretended is not None


def _has_gpu() -> bool:
    # is_available alone asks the driver each time, which a launch need not wait for
    return torch.cuda.is_initialized() or torch.cuda.is_available()


def current() -> Target:
    """The current CUDA device's target; without a GPU (Triton's interpreter) sm_90's."""
    if _pretended is not None:
        return _pretended
    return of_device(torch.cuda.current_device()) if _has_gpu() else TARGETS["sm_90"]


def of(device: torch.device) -> Target:
    """A CUDA device's; the current one's for a device without a number."""
    if _pretended is not None or device.index is None or not _has_gpu():
        return current()
    return of_device(device.index)


def identity() -> tuple[object, ...] | int | None:
    """What tells the current target from others, at less cost than the target itself."""
    if _pretended is not None:
        return _pretended.facts
    return torch.cuda.current_device() if _has_gpu() else None


def supported() -> bool:
    """Whether the current device can run the kernels: compute capability 8.0 or newer, or AMD."""
    if _pretended is not None or torch.version.hip is not None:
        return True
    return _has_gpu() and 10 * torch.cuda.get_device_capability()[0] >= OLDEST


@functools.cache
def of_device(index: int) -> Target:
    """The CUDA device's of that number."""
    properties = torch.cuda.get_device_properties(index)
    return dataclasses.replace(of_arch(arch_of(index)), multiprocessors=properties.multi_processor_count)


def arch_of(index: int) -> int | str:
    """A CUDA device's generation, as TARGETS has it: 90, 'gfx942'."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return 10 * int(properties.major) + int(properties.minor)


def of_arch(arch: int | str) -> Target:
    """The facts of a generation: its row's, under its own name."""
    if isinstance(arch, int):
        return dataclasses.replace(row_of(arch), name=f"sm_{arch}", arch=arch)
    # tf32 only where it was compiled: other CDNA generations do without
    return dataclasses.replace(row_of(arch), name=arch, arch=arch, has_tf32=arch == "gfx942")


def row_of(arch: int | str) -> Target:
    """The row of TARGETS that a generation takes: of one unlisted, the nearest listed one's that is not newer."""
    if isinstance(arch, str):
        return TARGETS["gfx942" if arch.startswith("gfx9") else "gfx1100"]
    listed = [t.arch for t in TARGETS.values() if isinstance(t.arch, int)]
    return TARGETS[f"sm_{max((a for a in listed if a <= arch), default=min(listed))}"]
