"""How kernels are launched, on the device of their tensors, past most of Triton's Python.

Each kernel that Triton compiled is kept under what it is specialised for and handed to the driver at once, which leaves
out most of JITFunction.run (a training step of the CIFAR CNN as called: 4.5 ms for 6.9 on an H100). It is on by default
on NVIDIA's GPUs in the releases of Triton whose launcher is known; TKERNELS_FAST_LAUNCH=0 turns it off.
"""

from __future__ import annotations

import contextlib
import importlib.util
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from tkernels.core import mode as runtime
from tkernels.core import settings

if runtime.HAS_TRITON:
    from triton import __version__ as _version
    from triton import knobs
    from triton.compiler import CompiledKernel
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    _RUN = JITFunction.run
    # Triton 3.5 and 3.6 take a kernel's arguments one by one, 3.7 and 3.8 in a tuple, after what tells them apart
    _ONE_BY_ONE = _version.startswith(("3.5.", "3.6."))
    # whose C function driver_call knows; builds for AMD alone have none
    _LAUNCHER: Any = None
    _KNOWN = _ONE_BY_ONE or _version.startswith(("3.7.", "3.8."))
    if _KNOWN and importlib.util.find_spec("triton.backends.nvidia") is not None:
        _LAUNCHER = importlib.import_module("triton.backends.nvidia.driver").CudaLauncher

# whoever sees this many specialisations of a kernel has shapes that never come back
_MOST_ENTRIES = 4096
_fast = settings.FAST_LAUNCH.is_on("1" if runtime.HAS_TRITON and _LAUNCHER is not None else "0")


@contextlib.contextmanager
def fast(on: bool) -> Iterator[None]:
    """Within the block launches take the shortcut, or do not, whatever the environment says."""
    global _fast
    before, _fast = _fast, on
    try:
        yield
    finally:
        _fast = before


def is_fast(kernels: Iterable[Any]) -> bool:
    """Whether launches of these kernels may take the shortcut."""
    if not _fast or JITFunction.run is not _RUN or _watched_all():
        return False
    return all(not kernel.pre_run_hooks for kernel in kernels)


def is_compiled(kernel: Any) -> bool:
    """Whether it is what Triton compiles a kernel to, with a launcher of its own."""
    return isinstance(kernel, CompiledKernel)


def driver_call(compiled: Any) -> tuple[Any, tuple[Any, ...], bool] | None:
    """The C function that launches a compiled kernel, what it takes between grid and stream and the kernel's
    arguments, and whether it takes those in a tuple. None where Triton's own Python has more to do than to call it
    (scratch memory), or in releases whose call is another."""
    run = compiled.run
    if type(run) is not _LAUNCHER or getattr(run, "gsan_enabled", False):
        return None
    if run.global_scratch_size or run.profile_scratch_size:
        return None
    scratch, hooks = (None, None), (None, None, None)
    first = compiled.function, run.launch_cooperative_grid, run.launch_pdl
    if _ONE_BY_ONE:
        return run.launch, (*first, *scratch, compiled.packed_metadata, *hooks), False
    last = run.arg_annotations, run.kernel_signature
    return run.launch, (*first, compiled.packed_metadata, *hooks, *scratch, *last), True


def current_stream(device: int) -> Any:
    """The stream that kernels are launched on, as the driver knows it."""
    return driver.active.get_current_stream(device)


def forget() -> None:
    """Drop what the shortcut keeps: Triton is asked again."""
    _shortcuts.clear()


class _Here(threading.local):
    maker: Callable[..., None] | None = None


_here = _Here()


@contextlib.contextmanager
def made_by(maker: Callable[..., None]) -> Iterator[None]:
    """Within the block, in this thread, ``maker(kernel, grid, args, options)`` makes each launch."""
    before, _here.maker = _here.maker, maker
    try:
        yield
    finally:
        _here.maker = before


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)`` on the device of the first argument, a tensor; named in a profiler's trace."""
    if _here.maker is not None:
        _here.maker(kernel, grid, args, options)
    elif torch.autograd._profiler_enabled():
        with torch.profiler.record_function(_label(kernel)):
            _on_device(kernel, grid, args, options)
    else:
        _on_device(kernel, grid, args, options)


def _label(kernel: Any) -> str:
    """What a trace calls a launch: the operator, which is the folder's name, and the kernel."""
    operator = kernel.fn.__module__.split(".")[-2:][0]
    return f"tkernels::{operator}.{kernel.fn.__name__}"


def _on_device(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    if runtime.several_gpus():
        with runtime.device_guard(args[0]):
            _launch(kernel, grid, args, options)
    else:
        _launch(kernel, grid, args, options)


def _launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    if (
        _fast
        and type(kernel) is JITFunction
        and JITFunction.run is _RUN
        and not (kernel.pre_run_hooks or _watched_all())
    ):
        shortcut = _shortcuts.get(kernel.__name__)
        if shortcut is None or shortcut.kernel is not kernel:
            shortcut = _shortcuts[kernel.__name__] = Shortcut(kernel)
        shortcut.launch(grid, args, options)
    else:
        kernel[grid](*args, **options)


def _watched_all() -> bool:
    """Whether a profiler wants to see each launch, or an option changes how kernels are compiled."""
    options = knobs.runtime
    enter, leave = options.launch_enter_hook, options.launch_exit_hook
    return bool((enter is not None and enter.calls) or (leave is not None and leave.calls) or options.debug)


class Shortcut:
    """A kernel's compiled forms by what Triton specialises for: dtypes, alignment, widths and values of integers."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._bind = _binder(kernel)
        self._compiled: dict[tuple[Any, ...], tuple[Any, Any, Any]] = {}

    def launch(self, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        key, bound = self._bind(*args, **options)
        active = driver.active
        device = active.get_current_device()
        found = self._compiled.get((device, key))
        if found is None:
            self._first(grid, args, options, (device, key))
            return
        run, function, metadata = found
        height = grid[1] if len(grid) > 1 else 1
        depth = grid[2] if len(grid) > 2 else 1
        stream = active.get_current_stream(device)
        run(grid[0], height, depth, stream, function, metadata, None, None, None, *bound)

    def _first(
        self, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any], key: tuple[Any, ...]
    ) -> None:
        """Let Triton compile and launch it, and keep what it compiled."""
        compiled = self.kernel[grid](*args, **options)
        if len(self._compiled) >= _MOST_ENTRIES:
            self._compiled.clear()
        self._compiled[key] = (compiled.run, compiled.function, compiled.packed_metadata)


_shortcuts: dict[str, Shortcut] = {}


def _binder(kernel: Any) -> Callable[..., tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """A function of the kernel's arguments and launch options that gives the key of their specialisation and the
    arguments in the order of the signature. Generated, as Triton's own binder is: a loop would cost as much as it
    saves. Finer than Triton's key, never coarser: equal keys mean the same compiled kernel."""
    names = [p.name for p in kernel.params]
    head = ", ".join(f"{p.name}=_default_{p.name}" if p.has_default else p.name for p in kernel.params)
    key = ", ".join(_key_of(p) for p in kernel.params)
    text = f"def bind({head}, **options):\n    return ({key}, *options.items()), ({', '.join(names)},)\n"
    space: dict[str, Any] = {f"_default_{p.name}": p.default for p in kernel.params if p.has_default}
    exec(text, space)
    bind: Callable[..., Any] = space["bind"]
    return bind


def _key_of(p: Any) -> str:
    """The part of a key that stands for one parameter. Pointers' names end in ``_ptr``."""
    name = p.name
    if p.is_constexpr:
        return name
    if name.endswith("_ptr"):
        return f"{name} if {name} is None else {name}.dtype, 0 if {name} is None else {name}.data_ptr() & 15"
    if p.do_not_specialize:
        # only the type counts: float, or the integer that holds it
        return f"{name}.__class__, -2147483648 <= {name} < 2147483648"
    return f"{name} if {name}.__class__ is int else {name}.__class__"
