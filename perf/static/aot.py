"""Compile the launches a piece of code makes, for GPUs that are not there, and read facts off the machine code.

Code runs on fake CUDA tensors (real shapes, no memory, no values); each launch is recorded instead of made, compiled
for one target, and its registers, spills, shared memory and instruction mix are read with the disassembler that
triton ships. What such a report cannot see: values, timing, occupancy beyond a formula.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, MockTensor, create_function_from_signature

from perf.static import hopper, sass
from tkernels.core import plan, targets

# Its default changes between releases of Triton; the facts must not.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

TENSOR_CORE = ("HGMMA", "UTCHMMA", "HMMA", "v_mfma", "v_wmma")
_STORES = ("STG", "UTMASTG", "global_store", "buffer_store")
_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
_MAX_GRID = (2**31 - 1, 65535, 65535)


@dataclasses.dataclass(frozen=True)
class Case:
    """Code to inspect: ``run()`` makes the launches on fake CUDA tensors it allocates itself.

    ``product``: there is a 16-bit product of aligned operands among them, whose loop must hold tensor-core instructions
    and 128-bit operand loads. ``left_to_torch``: asks the chooser why a target runs PyTorch instead, None where it does
    not.
    """

    name: str
    run: Callable[[], object]
    product: bool = False
    left_to_torch: Callable[[], str | None] | None = None

    def reason_to_skip(self, target_name: str) -> str | None:
        """Why there is nothing to compile for a target, or None where there is."""
        if self.left_to_torch is None:
            return None
        with targets.pretend(target_name):
            return self.left_to_torch()


@dataclasses.dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its arguments (tensors as their dtypes), its grid, and each tensor's bytes."""

    kernel: JITFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grid: tuple[int, int, int]
    bytes: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the machine code of one launch says. ``mix``: instruction counts of the whole kernel; ``loop``: of the
    innermost loop with tensor-core instructions (empty without one). Names are cut to mnemonic and width. ``wgmma``:
    how Hopper's kernels use theirs, None without any."""

    kernel: str
    target: str
    grid: tuple[int, int, int]
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    has_dot: bool
    mix: collections.Counter[str]
    loop: collections.Counter[str]
    ttir: str = dataclasses.field(repr=False)
    wgmma: hopper.Wgmma | None = None

    @property
    def tensor_core(self) -> str | None:
        """The tensor-core mnemonic the kernel uses, or None."""
        return next((t for t in TENSOR_CORE if any(op.startswith(t) for op in self.mix)), None)

    def wide_loads(self) -> int:
        """128-bit loads in the product loop (async copies count)."""
        return sum(n for op, n in self.loop.items() if _is_load(op) and _width(op) == 128)

    def tensor_core_instructions(self) -> int:
        """Tensor-core instructions in the kernel."""
        return sum(n for op, n in self.mix.items() if op.startswith(TENSOR_CORE))

    def loads_128(self) -> int:
        """128-bit loads from global memory in the kernel (async copies count)."""
        return sum(n for op, n in self.mix.items() if _is_load(op) and _width(op) == 128)

    def stores_128(self) -> int:
        """128-bit stores to global memory in the kernel."""
        return sum(n for op, n in self.mix.items() if op.startswith(_STORES) and _width(op) == 128)

    def narrow_loads(self) -> int:
        """Loads from global memory in the product loop that are less than 128 bits wide."""
        return sum(n for op, n in self.loop.items() if _is_load(op) and _width(op) < 128)

    def waiting_loads(self) -> int:
        """Loads from global memory in NVIDIA's product loop that are no asynchronous copies."""
        return sum(n for op, n in self.loop.items() if op.startswith("LDG") and not op.startswith(("LDGSTS", "LDGDEP")))


class StubDriver:
    """Enough of a driver for Triton to specialise a launch; it never launches."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def gpu_target(target: targets.Target) -> GPUTarget:
    """Triton's description of a target."""
    return GPUTarget("cuda" if target.is_nvidia else "hip", target.arch, target.warp_size)


@contextlib.contextmanager
def intercepting(target_name: str | targets.Target, launch: Callable[..., None]) -> Iterator[targets.Target]:
    """Within the block ``launch(kernel, args, kwargs, grid)`` is called for each ``kernel[grid](...)``, nothing runs,
    and choosers, asked anew, and Triton believe in the target."""
    jit, fake = cast(Any, JITFunction), cast(Any, FakeTensor)
    original_run = jit.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch(self, args, kwargs, grid)

    jit.run = run
    fake.data_ptr = lambda self: 0  # aligned, as what an allocator returns; torch warns that there is none
    had_driver = triton.runtime.driver._active
    with targets.pretend(target_name) as target:
        plan.forget()
        triton.runtime.driver.set_active(StubDriver(gpu_target(target)))
        try:
            yield target
        finally:
            plan.forget()
            jit.run = original_run
            del fake.data_ptr
            triton.runtime.driver._active = had_driver


@contextlib.contextmanager
def recording(target_name: str) -> Iterator[list[Launch]]:
    """Within the block torch makes fake CUDA tensors and each ``kernel[grid](...)`` is recorded, not made."""
    recorded: list[Launch] = []
    fake = cast(Any, FakeTensor)
    original_contiguous = fake.contiguous

    def contiguous(self: FakeTensor, memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
        # the C++ binding takes a CUDA device guard, which a machine without CUDA has not
        if self.is_contiguous(memory_format=memory_format):
            return self
        return self.clone(memory_format=memory_format)

    def launch(*made: Any) -> None:
        recorded.append(record(*made))

    fake.contiguous = contiguous
    try:
        # autograd on fake CUDA tensors needs a CUDA runtime, launch functions do not
        with intercepting(target_name, launch), torch.no_grad(), FakeTensorMode():
            yield recorded
    finally:
        fake.contiguous = original_contiguous


class _Pointer(MockTensor):
    """A tensor as the compiler sees it: its dtype, and how its first element is aligned in memory that itself is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor.dtype)
        self._offset = int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        return self._offset


def record(
    kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Any, device: str = "cuda:0"
) -> Launch:
    """A launch, its tensors reduced to what the compiler sees. Raises ValueError for one that no GPU would make."""
    bound = dict(zip(kernel.arg_names, args))
    bound.update({k: v for k, v in kwargs.items() if k in kernel.arg_names})
    tensors = {name: value for name, value in bound.items() if isinstance(value, torch.Tensor)}
    devices = {str(t.device) for t in tensors.values()}
    if devices != {device}:
        raise ValueError(f"{kernel.__name__}: tensor arguments are on {sorted(devices)}, not all on {device}")
    blocks = [int(i) for i in (grid(bound) if callable(grid) else grid)]
    full = [*blocks, 1, 1, 1][:3]
    for size, limit in zip(full, _MAX_GRID):
        if not 0 < size <= limit:
            raise ValueError(f"{kernel.__name__}: grid {full} is outside {_MAX_GRID}")

    def mock(value: Any) -> Any:
        return _Pointer(value) if isinstance(value, torch.Tensor) else value

    return Launch(
        kernel,
        tuple(mock(a) for a in args),
        {k: mock(v) for k, v in kwargs.items()},
        (full[0], full[1], full[2]),
        {name: span(t) for name, t in tensors.items()},
    )


def span(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's distinct elements: an expanded axis counts once."""
    elements = math.prod(size for size, stride in zip(tensor.shape, tensor.stride()) if stride != 0)
    return elements * tensor.element_size()


def specialisation(launch: Launch, target_name: str) -> str:
    """The key under which Triton would compile this launch: equal keys share one compiled kernel."""
    backend = make_backend(gpu_target(targets.TARGETS[target_name]))
    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    _, spec, options = binder(*launch.args, **launch.kwargs)
    return f"{target_name} {launch.kernel.__module__}.{launch.kernel.__name__} {spec} {options}"


def compiled(launch: Launch, target_name: str) -> Any:
    """One recorded launch as Triton compiles it for a target. Raises what the compiler raises."""
    target = gpu_target(targets.TARGETS[target_name])
    backend = make_backend(target)
    kernel = launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, spec, options = binder(*launch.args, **launch.kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(backend, launch.kwargs, bound, spec, options)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    return triton.compile(source, target=target, options=options.__dict__)


def compile_launch(launch: Launch, target_name: str) -> Facts:
    """Compile one recorded launch for a target and read its facts. Raises what the compiler raises."""
    made = compiled(launch, target_name)
    wgmma = None
    if targets.TARGETS[target_name].is_nvidia:
        (registers, spill_bytes), code = _usage(made), listing(made)
        mix, loop = collections.Counter(each.name for each in code), _product_loop(_names(sass.loops(code)))
        if target_name == "sm_90":
            wgmma = hopper.inspect(made.asm["ptx"], code)
    else:
        registers, spill_bytes, mix, loop = _read_amd(made)
    return Facts(
        launch.kernel.__name__,
        target_name,
        launch.grid,
        made.metadata.num_warps,
        registers,
        spill_bytes,
        made.metadata.shared,
        "tt.dot" in made.asm["ttir"],
        mix,
        loop,
        made.asm["ttir"],
        wgmma,
    )


_compiled: dict[str, Facts] = {}  # by specialisation: cases share many launches


def inspect(
    fn: Callable[[], object], target_name: str, wanted: Callable[[Launch], bool] = lambda launch: True
) -> list[tuple[Launch, Facts]]:
    """Every launch ``fn`` makes on ``target_name`` ('sm_90', 'gfx942', ...) that is ``wanted``, and its facts; of
    launches that differ in the grid alone the first."""
    with recording(target_name) as launches:
        fn()
    distinct: dict[str, Launch] = {}
    for launch in filter(wanted, launches):
        distinct.setdefault(specialisation(launch, target_name), launch)
    for key, launch in distinct.items():
        if key not in _compiled:
            _compiled[key] = compile_launch(launch, target_name)
    return [(launch, dataclasses.replace(_compiled[key], grid=launch.grid)) for key, launch in distinct.items()]


def _dump(made: Any, flag: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as f:
            f.write(made.asm["cubin"])
        command = [os.path.join(_TOOLS, "cuobjdump"), flag, path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _usage(made: Any) -> tuple[int, int]:
    """Registers and spilled bytes of what was compiled for NVIDIA."""
    usage = _dump(made, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]!r}")
    # STACK is where spills show; LOCAL stays 0
    return int(found[1]), int(found[2])


def listing(made: Any) -> list[sass.Instruction]:
    """The machine code of what was compiled for NVIDIA."""
    return sass.parse(_dump(made, "-sass"))


def _names(loops: Iterable[list[sass.Instruction]]) -> list[list[str]]:
    return [[each.name for each in loop] for loop in loops]


def _read_amd(compiled: Any) -> tuple[int, int, collections.Counter[str], collections.Counter[str]]:
    listing = compiled.asm["amdgcn"]

    def fact(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", listing)
        if found is None:
            raise RuntimeError(f"the listing has no .{name}")
        return int(found[1])

    labels: dict[str, int] = {}
    ops: list[str] = []
    loops = []
    for text in listing.splitlines():
        label = re.match(r"(\.LBB\w+):", text)
        if label:
            labels[label[1]] = len(ops)
            continue
        op = re.match(r"\s+([a-z]\w+)\s*(.*)", text)
        if not op:
            continue
        ops.append(op[1])
        goal = op[2].strip().split()[0] if op[2].strip() else ""
        if op[1].startswith(("s_cbranch", "s_branch")) and goal in labels:
            loops.append(ops[labels[goal] :])
    # scalar registers spill to lanes of vector registers, which are no memory: scratch is
    spills = max(4 * fact("vgpr_spill_count"), fact("private_segment_fixed_size"))
    return fact("vgpr_count"), spills, collections.Counter(ops), _product_loop(loops)


def _product_loop(loops: list[list[str]]) -> collections.Counter[str]:
    products = [loop for loop in sorted(loops, key=len) if any(op.startswith(TENSOR_CORE) for op in loop)]
    return collections.Counter(products[0] if products else [])


def _is_load(op: str) -> bool:
    # LDGDEPBAR only closes a group of asynchronous copies
    return op.startswith(("LDG", "UTMALDG", "global_load", "buffer_load")) and not op.startswith("LDGDEPBAR")


def _width(op: str) -> int:
    """Bits a load instruction moves a thread."""
    if op.startswith(("UTMALDG", "UTMASTG")) or ".128" in op or op.endswith(("dwordx4", "b128")):
        return 128
    if ".64" in op or op.endswith(("dwordx2", "b64")):
        return 64
    return 32
