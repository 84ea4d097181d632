"""Record the launches a piece of code makes, and compile them for GPUs that are not there.

Code runs on fake CUDA tensors (real shapes, no memory, no values); each launch is recorded instead of made, compiled
for one target, and its registers, spills, shared memory and instruction mix are read with the disassembler that
triton ships. What such a report cannot see: values, timing, occupancy beyond a formula.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, cast
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, MockTensor, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from perf.static import facts
from perf.static.facts import Facts
from tkernels.core import plan, targets
from tkernels.core.targets import TARGETS, Target

# Its default changes between releases of Triton; the facts must not.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

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

    @property
    def arguments(self) -> dict[str, Any]:
        """By name, launch options among them."""
        return {**dict(zip(self.kernel.arg_names, self.args)), **self.kwargs}


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


def gpu_target(target: Target) -> GPUTarget:
    """Triton's description of a target."""
    return GPUTarget("cuda" if target.is_nvidia else "hip", target.arch, target.warp_size)


@contextlib.contextmanager
def stub_driver(target_name: str | Target) -> Iterator[StubDriver]:
    """Within the block choosers, asked anew, and Triton believe in the target, whose driver is a stub."""
    with targets.pretend(target_name) as target:
        driver = StubDriver(gpu_target(target))
        with mock.patch.object(triton.runtime.driver, "_active", driver):
            plan.forget()
            try:
                yield driver
            finally:
                plan.forget()


def said_to_be_cuda() -> contextlib.AbstractContextManager[object]:
    """Within the block tensors on the CPU say is_cuda."""
    return mock.patch.object(torch.Tensor, "is_cuda", property(lambda self: True))


@contextlib.contextmanager
def intercepting(target_name: str | Target, launch: Callable[..., None]) -> Iterator[None]:
    """Within the block ``launch(kernel, args, kwargs, grid)`` is called for each ``kernel[grid](...)``, nothing runs,
    and choosers, asked anew, and Triton believe in the target."""

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch(self, args, kwargs, grid)

    def data_ptr(self: FakeTensor) -> int:
        return 0  # aligned, as what an allocator returns; torch warns that there is none

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(FakeTensor, "data_ptr", data_ptr),
        stub_driver(target_name),
    ):
        yield


@contextlib.contextmanager
def recording(target_name: str) -> Iterator[list[Launch]]:
    """Within the block torch makes fake CUDA tensors and each ``kernel[grid](...)`` is recorded, not made."""
    recorded: list[Launch] = []

    def contiguous(self: FakeTensor, memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
        # the C++ binding takes a CUDA device guard, which a machine without CUDA has not
        if self.is_contiguous(memory_format=memory_format):
            return self
        return self.clone(memory_format=memory_format)

    with (
        mock.patch.object(FakeTensor, "contiguous", contiguous),
        intercepting(target_name, lambda *made: recorded.append(record(*made))),
        torch.no_grad(),  # autograd on fake CUDA tensors needs a CUDA runtime, launch functions do not
        FakeTensorMode(),
    ):
        yield recorded


class _Pointer(MockTensor):
    """A tensor as the compiler sees it: its dtype, and how its first element is aligned in memory that itself is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor.dtype)
        self._offset = int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        return self._offset


def record(
    kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], grid: tuple[int, ...], device: str = "cuda:0"
) -> Launch:
    """A launch, its tensors reduced to what the compiler sees. Raises ValueError for one that no GPU would make."""
    made = Launch(kernel, args, kwargs, cast(Any, (*grid, 1, 1, 1)[:3]), {})
    given = {name: value.base if _is_descriptor(value) else value for name, value in made.arguments.items()}
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    devices = {str(t.device) for t in tensors.values()}
    if devices != {device}:
        raise ValueError(f"{kernel.__name__}: tensor arguments are on {sorted(devices)}, not all on {device}")
    if not all(0 < size <= limit for size, limit in zip(made.grid, _MAX_GRID)):
        raise ValueError(f"{kernel.__name__}: grid {made.grid} is outside {_MAX_GRID}")

    def reduced(value: Any) -> Any:
        if _is_descriptor(value):
            return dataclasses.replace(value, base=reduced(value.base))
        return _Pointer(value) if isinstance(value, torch.Tensor) else value

    return dataclasses.replace(
        made,
        args=tuple(map(reduced, args)),
        kwargs={name: reduced(value) for name, value in kwargs.items()},
        bytes={name: span(t) for name, t in tensors.items()},
    )


def _is_descriptor(value: object) -> bool:
    return isinstance(value, TensorDescriptor)


def span(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's distinct elements: an expanded axis counts once."""
    elements = math.prod(size for size, stride in zip(tensor.shape, tensor.stride()) if stride != 0)
    return elements * tensor.element_size()


def _bound(launch: Launch, target_name: str) -> tuple[Any, Any, Any, Any]:
    """Triton's backend; the arguments by name, what of them a kernel is specialised for, the launch options."""
    backend = make_backend(gpu_target(TARGETS[target_name]))
    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    return (backend, *binder(*launch.args, **launch.kwargs))


def specialisation(launch: Launch, target_name: str) -> str:
    """The key under which Triton would compile this launch: equal keys share one compiled kernel."""
    _, _, spec, options = _bound(launch, target_name)
    return f"{target_name} {launch.kernel.__module__}.{launch.kernel.__name__} {spec} {options}"


def compiled(launch: Launch, target_name: str) -> Any:
    """One recorded launch as Triton compiles it for a target. Raises what the compiler raises."""
    backend, bound, spec, options = _bound(launch, target_name)
    options, signature, constexprs, attrs = launch.kernel._pack_args(backend, launch.kwargs, bound, spec, options)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    return triton.compile(source, target=gpu_target(TARGETS[target_name]), options=options.__dict__)


_known: dict[str, Facts] = {}  # by specialisation: cases share many launches


def compile_launch(launch: Launch, target_name: str) -> Facts:
    """Compile one recorded launch for a target and read its facts. Raises what the compiler raises."""
    key = specialisation(launch, target_name)
    if key not in _known:
        _known[key] = facts.read(launch.kernel.__name__, compiled(launch, target_name), TARGETS[target_name])
    return _known[key]


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
    return [(launch, compile_launch(launch, target_name)) for launch in distinct.values()]
