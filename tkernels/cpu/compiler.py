"""Compiles the passes of tkernels/cpu/passes.py with Inductor: once for any sizes, kept on disk by Inductor's cache.

A pass is traced with symbolic sizes and handed to Inductor directly. torch.compile would guard every call, compile
again for other sizes, grad modes and autocast states, and count against the user's recompile limit.

TKERNELS_COMPILE=0 turns it off; so does, with one warning, a machine without a C++ compiler. Operators then run as
plain calls of PyTorch.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("tkernels")
# Inductor vectorises by the sizes that it sees: a first call of few channels would make slow code for all after it.
CHANNELS = 256
_lock = threading.RLock()
_compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
_wanted = os.environ.get("TKERNELS_COMPILE", "1").lower() not in ("0", "false", "off", "no")
_broken = False
_announced = False


def enabled() -> bool:
    """Whether passes are compiled here: not turned off, and nothing has failed to compile."""
    return _wanted and not _broken


def plain_eager() -> bool:
    """Whether calls run as they are: no tracing, no transforms, no modes that want to see each ATen call.

    Ask torch.compiler.is_compiling() first of all, lest a trace learns of sizes and modes it has no business with.
    """
    return not (
        torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


class Pass:
    """A function of tensors that Inductor compiles at its first call for their dtypes.

    Its results are what the function returns; it may write to arguments (``out.copy_(...)``). Sizes may differ from
    call to call, strides may not: give it dense tensors. Every argument must be a tensor with no empty axis.
    ``channels``: whether the last axis of every argument is the channels'.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None, channels: bool = True) -> None:
        self.function, self.channels = function, channels
        self.name = name or function.__name__.lstrip("_")

    def __call__(self, *tensors: Tensor) -> Any:
        key = (self.name, torch.get_num_threads(), *[t.dtype for t in tensors])
        run = _compiled.get(key)
        if run is None:
            with _lock:
                run = _compiled.get(key)
                if run is None:
                    run = _compiled[key] = self._compile(tensors)
        if torch.autograd._profiler_enabled():
            with torch.profiler.record_function(f"tkernels: {self.name}"):
                return run(*tensors)
        return run(*tensors)

    def _compile(self, tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        global _announced, _broken
        if not _announced:
            _announced = True
            log.warning("compiling the CPU's passes with Inductor: some seconds, once; TKERNELS_COMPILE=0 turns it off")
        start = time.perf_counter()
        try:
            with torch.inference_mode(False):
                run = _by_inductor(self.function, tensors, self.channels)
        except Exception as error:
            # whatever a compiler, a linker or a full disk says: training goes on without
            _broken = True
            reason = " ".join(str(error).split())[:200]
            warnings.warn(f"tkernels runs without compiled passes on this CPU: {reason}", RuntimeWarning, stacklevel=2)
            return self.function
        log.info("compiled %s in %.1f s", self.name, time.perf_counter() - start)
        return run


def _by_inductor(function: Callable[..., Any], tensors: tuple[Tensor, ...], channels: bool) -> Callable[..., Any]:
    from torch._functorch import config as functorch_config
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    # sizes that happen to be equal now are different symbols all the same
    shape_env = ShapeEnv(duck_shape=False, specialize_zero_one=False)
    mode = FakeTensorMode(shape_env=shape_env)
    fakes = []
    for t in tensors:
        # a size of 1 would be taken for one that never changes
        sizes = [n if n > 1 else 8 for n in t.shape]
        if channels and sizes:
            sizes[-1] = max(sizes[-1], CHANNELS)
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * t.dim())
        symbols = mode.from_tensor(torch.empty(sizes, device="meta"), symbolic_context=context).shape
        with mode:
            fakes.append(torch.empty(symbols, dtype=t.dtype))
    with torch.no_grad(), mode:
        # (a bound method would count its object as an argument)
        graph = make_fx(lambda *args: function(*args), tracing_mode="real")(*fakes)
    thresholds = config.patch(fx_graph_cache=True, realize_reads_threshold=16, realize_opcount_threshold=200)
    inner: list[Any] = []

    def compile_inner(*args: Any, **kwargs: Any) -> Any:
        inner.append(compile_fx_inner(*args, **kwargs))
        return inner[-1]

    # the cache of whole autograd graphs cannot read a graph that did not come from Dynamo
    with torch.no_grad(), thresholds, functorch_config.patch(enable_autograd_cache=False):
        run: Any = compile_fx(graph, fakes, inner_compile=compile_inner)
    # what stands around it serves autograd, and is as much Python again between two passes
    call = getattr(inner[0], "current_callable", None) if len(inner) == 1 else None
    return run if call is None else lambda *tensors: call(list(tensors))
