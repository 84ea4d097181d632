"""Counting launches by kernel name.

Where tests watch an executor of their own (ttsem, the interpreter), launches are counted in JITFunction.run. On a GPU
that would hide what users run: a patched JITFunction.run turns the fast launch and the replay's direct call off. There
the C function is counted that Triton's launcher of each compiled kernel holds, which all three ways end in.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

# Triton's launchers, by vendor
_LAUNCHERS = {"nvidia": "CudaLauncher", "amd": "HIPLauncher"}
# Inductor's own kernels are none of ours
_OTHERS = "torch."


def count_runs(names: list[str]) -> None:
    """For the life of the process each launch through JITFunction.run or the interpreter adds its kernel's name."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    run, interpret = JITFunction.run, GridExecutor.__call__

    def counted_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("warmup"):
            names.append(self.__name__)
        return run(self, *args, **kwargs)

    def counted_interpret(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return interpret(self, *args, **kwargs)

    JITFunction.run, GridExecutor.__call__ = counted_run, counted_interpret


@contextlib.contextmanager
def counting_driver_calls(names: list[str]) -> Iterator[None]:
    """Within the block each launch of a kernel whose launcher was made in it adds the kernel's name as it is handed to
    the driver; what an earlier launcher launches is not seen. CUDA graphs' replays launch nothing of their own."""
    with contextlib.ExitStack() as stack:
        for vendor, name in _LAUNCHERS.items():
            module = f"triton.backends.{vendor}.driver"
            if importlib.util.find_spec(f"triton.backends.{vendor}") is not None:
                launcher = getattr(importlib.import_module(module), name)
                stack.callback(setattr, launcher, "__init__", launcher.__init__)
                launcher.__init__ = _counting(launcher.__init__, names)
        yield


def _counting(make: Callable[..., None], names: list[str]) -> Callable[..., None]:
    """A launcher's __init__ that leaves the launcher's C function behind a count."""

    @functools.wraps(make)
    def made(self: Any, source: Any, *args: Any, **kwargs: Any) -> None:
        make(self, source, *args, **kwargs)
        kernel, call = source.fn.fn, self.launch

        def counted(*given: Any) -> Any:
            names.append(kernel.__name__)
            return call(*given)

        if not kernel.__module__.startswith(_OTHERS):
            self.launch = counted

    return made
