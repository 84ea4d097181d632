"""Compiles the passes of tkernels/cpu/passes.py with Inductor: once for any sizes, kept on disk (cache.py).

A pass is traced with symbolic sizes and handed to Inductor directly. torch.compile would guard every call, compile
again for other sizes, grad modes and autocast states, and count against the user's recompile limit.

TKERNELS_COMPILE=0 turns it off; so does, with one warning, a machine without a C++ compiler. Operators then run as
plain calls of PyTorch. A pass that alone does not compile, or that meets tensors it cannot take, runs as the function
that it is; the log says so once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tkernels.core import _torch, hardware, settings
from tkernels.cpu import cache
from tkernels.cpu.guard import is_plain

log = logging.getLogger("tkernels")
# Inductor vectorises by the sizes that it sees: a first call of few channels would make slow code for all after it.
CHANNELS = 256
NOT_COMPILED = "passes are not compiled here: TKERNELS_COMPILE=0, or no C++ compiler"
NOTICE = (
    "tkernels compiles its passes for this CPU with Inductor: half a minute to a minute, once, for they are kept in "
    "%s. logging.getLogger('tkernels').setLevel('ERROR') hides this line, TKERNELS_COMPILE=0 leaves all to PyTorch."
)
NEEDED = "they need a C++ compiler that works (g++, or what CXX names); TKERNELS_COMPILE=0 does without"
_compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
_wanted = settings.COMPILE.is_on()
_broken = False
_announced = False
# whether this process was forked while another thread compiled: what that thread locked stays locked here
_stuck = False


def enabled() -> bool:
    """Whether passes are compiled here: not turned off, and there is a compiler that works."""
    return _wanted and not _broken


def why_not() -> str | None:
    """Why passes are not compiled here, found by compiling the least that there is; None where they are."""
    if not _wanted:
        return f"{settings.COMPILE.name} is off"
    with _compiling() as able:
        return _failure() if able else "this process was forked while another thread compiled"


class Pass:
    """A function of tensors that Inductor compiles at its first call for their dtypes.

    Its results are what the function returns; it may write to arguments (``out.copy_(...)``). Sizes may differ from
    call to call, strides may not: give it dense tensors. Every argument must be a tensor with no empty axis.
    ``channels``: whether the last axis of every argument is the channels'.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None, channels: bool = True) -> None:
        self.function, self.channels = function, channels
        self.name = name or function.__name__.lstrip("_")
        self._reported = False

    def __call__(self, *tensors: Tensor) -> Any:
        key = (self.name, torch.get_num_threads(), *[t.dtype for t in tensors])
        run = _compiled.get(key) or self._compile(key, tensors)
        try:
            if _torch.is_profiled():
                with torch.profiler.record_function(f"tkernels: {self.name}"):
                    return run(*tensors)
            return run(*tensors)
        except Exception as error:
            # (where a plain call fails it may have written something: that is not to be done twice)
            if run == self._function or (all(is_plain(t) for t in tensors) and not isinstance(error, AssertionError)):
                raise
            self._report(f"takes no such tensors: {_line(error)}")
            return self._function(*tensors)

    def _function(self, *tensors: Tensor) -> Any:
        """As a compiled pass, which autograd does not see."""
        with torch.no_grad():
            return self.function(*tensors)

    def _report(self, what: str) -> None:
        if not self._reported:
            self._reported = True
            log.warning("the CPU's pass %r %s; PyTorch runs it", self.name, what)

    def _compile(self, key: tuple[Any, ...], tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        """The pass for such tensors: compiled; as it is where that fails, this time or for good."""
        global _broken
        if _broken or not all(is_plain(t) for t in tensors):
            return self._function
        with _compiling() as able:
            if key in _compiled:  # by another thread meanwhile
                return _compiled[key]
            if not able:
                self._report("cannot be compiled in a process forked while another thread compiled")
                return self._function
            start = time.perf_counter()
            try:
                _compiled[key] = _by_inductor(self.function, tensors, self.channels)
                log.info("%s was compiled, or read, in %.1f s", self.name, time.perf_counter() - start)
            except Exception as error:
                # whatever a compiler, a linker or a full disk says: training goes on without
                if not _broken and _failure() is not None:
                    _broken = True
                    reason = f"tkernels runs without compiled passes on this CPU: {_line(error)}; {NEEDED}"
                    warnings.warn(reason, RuntimeWarning, stacklevel=3)
                else:
                    self._report(f"does not compile: {_line(error)}")
                _compiled[key] = self._function
            return _compiled[key]


def _announce(folder: Path) -> None:
    """Say, once, why the next call takes so long: a warning, which Python shows to whoever has set up no logging."""
    global _announced
    if not _announced:
        _announced = True
        if not cache.announced(folder):
            log.warning(NOTICE, settings.tilde(str(folder.parent)))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _failure() -> str | None:
    """Why nothing compiles, not even the least that there is; None where it does."""
    try:
        _by_inductor(lambda x: (x + 1,), (torch.ones(8, dtype=torch.float32, device="cpu"),), False)
    except Exception as error:
        return _line(error)
    return None


@contextlib.contextmanager
def _compiling() -> Iterator[bool]:
    """By Dynamo's lock alone among the threads, whoever compiles in them, and as if nothing had been set in this one;
    False where that can never be."""
    if _stuck:
        yield False
        return
    plain = torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False)
    with _torch.compile_lock, _no_function_modes(), plain[0], plain[1], plain[2]:
        yield True


@contextlib.contextmanager
def _no_function_modes() -> Iterator[None]:
    """Without the modes that see each call of torch in this thread, a default device among them."""
    modes = []
    try:
        while _torch.count_function_modes():
            modes.append(_torch.pop_function_mode())
        yield
    finally:
        for mode in reversed(modes):
            _torch.push_function_mode(mode)


def _forked() -> None:
    global _stuck
    lock = _torch.compile_lock_if_imported()
    if lock is not None and not _stuck:
        _stuck = not lock.acquire(blocking=False)
        if not _stuck:
            lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _by_inductor(function: Callable[..., Any], tensors: tuple[Tensor, ...], channels: bool) -> Callable[..., Any]:
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    folder = cache.folder()
    if cache.is_empty(folder):  # importing Inductor and finding out what the C++ compiler can takes ten seconds
        _announce(folder)
    hardware.find_cuda()
    # sizes that happen to be equal now are different symbols all the same
    shape_env = ShapeEnv(duck_shape=False, specialize_zero_one=False)
    mode = _torch.FakeTensorMode(shape_env=shape_env)
    fakes = []
    for t in tensors:
        # a size of 1 would be taken for one that never changes
        sizes = [n if n > 1 else 8 for n in t.shape]
        if channels and sizes:
            sizes[-1] = max(sizes[-1], CHANNELS)
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * t.dim())
        symbols = mode.from_tensor(torch.empty(sizes, device="meta"), symbolic_context=context).shape
        with mode:
            fakes.append(torch.empty(symbols, dtype=t.dtype, device="cpu"))
    with mode:
        # (a bound method would count its object as an argument)
        graph = make_fx(lambda *args: function(*args), tracing_mode="real")(*fakes)
    # (a cache on another machine says no more of instruction sets than one on a disk)
    options = _torch.inductor_config.patch(
        fx_graph_cache=True, fx_graph_remote_cache=False, realize_reads_threshold=16, realize_opcount_threshold=200
    )
    inner: list[Any] = []

    def compile_inner(*args: Any, **kwargs: Any) -> Any:
        inner.append(_torch.compile_fx_inner(*args, **kwargs))
        return inner[-1]

    # the cache of whole autograd graphs cannot read a graph that did not come from Dynamo
    apart = _torch.functorch_config.patch(enable_autograd_cache=False)
    with cache.used(), options, apart, _torch.telling_of_compilation(lambda: _announce(folder)):
        run: Any = _torch.compile_fx(graph, fakes, inner_compile=compile_inner)
    # what stands around it serves autograd, and is as much Python again between two passes
    call = getattr(inner[0], "current_callable", None) if len(inner) == 1 else None
    return run if call is None else lambda *tensors: call(list(tensors))
