"""How kernels are launched: as steps of a plan, by the compiled kernel; where nobody plans, as Triton does it."""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any

import torch

from tkernels.core import _torch, mode

if mode.HAS_TRITON:
    from triton import __version__ as _version
    from triton import knobs
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    # Triton 3.5 and 3.6 take a kernel's arguments one by one, 3.7 and 3.8 in a tuple, after what tells them apart
    _ONE_BY_ONE = _version.startswith(("3.5.", "3.6."))
    # whose C function driver_call knows; builds for AMD alone have none
    _LAUNCHER: Any = None
    _KNOWN = _ONE_BY_ONE or _version.startswith(("3.7.", "3.8."))
    if _KNOWN and importlib.util.find_spec("triton.backends.nvidia") is not None:
        _LAUNCHER = importlib.import_module("triton.backends.nvidia.driver").CudaLauncher


def cache_folder() -> str:
    """Where Triton keeps what it compiled."""
    return str(knobs.cache.dir)


def is_compiled(kernel: Any) -> bool:
    """Whether it is what Triton compiles a kernel to, with a launcher of its own."""
    return isinstance(kernel, CompiledKernel)


def driver_call(compiled: Any) -> tuple[Any, tuple[Any, ...], bool]:
    """What launches a compiled kernel, what it takes between stream and the kernel's arguments, and whether it takes
    those in a tuple: the C function of Triton's launcher, before which descriptors are taken apart, or, where the
    launcher has more to do than to call it (scratch memory) or is not known, the launcher itself."""
    run = compiled.run
    hooks = None, None, None
    if type(run) is not _LAUNCHER or getattr(run, "gsan_enabled", False):
        return run, (compiled.function, compiled.packed_metadata, *hooks), False
    if run.global_scratch_size or run.profile_scratch_size:
        return run, (compiled.function, compiled.packed_metadata, *hooks), False
    scratch = None, None
    first = compiled.function, run.launch_cooperative_grid, run.launch_pdl
    if _ONE_BY_ONE:
        return run.launch, (*first, *scratch, compiled.packed_metadata, *hooks), False
    last = run.arg_annotations, run.kernel_signature
    return run.launch, (*first, compiled.packed_metadata, *hooks, *scratch, *last), True


def current_stream(device: int) -> Any:
    """The stream that kernels are launched on, as the driver knows it."""
    return driver.active.get_current_stream(device)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)``: a step of the plan that the first argument, a tensor or a slot, is of, or at
    once on the tensor's device."""
    planner = getattr(args[0], "planner", None)
    if planner is not None:
        planner.launch(kernel, grid, args, options)
    else:
        first = getattr(args[0], "base", args[0])  # a descriptor's tensor
        guard = mode.device_guard(first) if mode.several_gpus() else contextlib.nullcontext()
        with guard, named(kernel):
            kernel[grid](*args, **options)


def is_watched() -> bool:
    """Whether a profiler, torch's or one of Triton's hooks, wants to see each launch, or Triton is to debug kernels."""
    if _torch.is_profiled():
        return True
    options = knobs.runtime
    enter, leave = options.launch_enter_hook, options.launch_exit_hook
    return bool((enter is not None and enter.calls) or (leave is not None and leave.calls) or options.debug)


def named(kernel: Any) -> contextlib.AbstractContextManager[Any]:
    """Within the block a trace of torch's profiler shows the kernel's name."""
    if not _torch.is_profiled():
        return contextlib.nullcontext()
    return torch.profiler.record_function(label(kernel))


def label(kernel: Any) -> str:
    """What a trace calls a launch: the operator, which is the folder's name, and the kernel."""
    operator = kernel.fn.__module__.split(".")[-2:][0]
    return f"tkernels::{operator}.{kernel.fn.__name__}"
