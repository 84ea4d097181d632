"""What a training step costs the host, without a GPU: everything is run but the driver's launch call.

The step (forward, loss, backward) of the fused CIFAR network on CPU tensors that say they are on a GPU: checks,
choosers, allocations, autograd and Triton's own Python run as on a GPU; what is compiled and launched is a stand-in.
Beside it PyTorch's own step on the CPU at the smallest size, an estimate of what its calls cost a host. Microseconds
differ from machine to machine: a bare JITFunction.run, made once after each step, is the yardstick.

The one call that would compute is torch.flatten's copy of the last feature map; like the launches it is stubbed: by a
permute and a view, forward and backward.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pandas as pd
import torch
import triton
from torch import Tensor, nn
from triton.backends.nvidia import driver as nvidia
from triton.compiler.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

import tkernels
from models.cifar_cnn import CNNClassifier
from perf.options import Refused
from perf.static import aot, meter, traffic
from tkernels.core import launch, plan
from tkernels.ops.conv_stage import kernels as conv_stage

# the first steps compile and record
WARM_UP = 5
# what the C launcher was given, in Triton 3.8's order: grid, stream, function, two flags, metadata, hooks, scratch
# memory, ..., a tuple of the kernel's arguments
Made = tuple[Any, ...]


class _Compiled(CompiledKernel):
    """A kernel that was not compiled; its launcher is Triton's."""

    def __init__(self, source: Any, target: Any, options: dict[str, Any]) -> None:
        self.src, self.name, self.module = source, source.fn.__name__, None
        # equal for equal specialisations, so that two runs can be compared
        self.function = self.hash = f"{self.name} {source.signature} {source.constants} {source.attrs} {options}"
        self.packed_metadata = (options["num_warps"], options["num_ctas"], 0)
        self.metadata = cast(Any, SimpleNamespace(
            num_ctas=1, cluster_dims=(1, 1, 1), global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0,
            profile_scratch_align=1, launch_cooperative_grid=False, launch_pdl=False,
            tensordesc_meta=[None for kind in source.signature.values() if str(kind).startswith("tensordesc")],
        ))  # fmt: skip
        self._run = nvidia.CudaLauncher(source, self.metadata)

    def _init_handles(self) -> None:
        """Nothing to load."""


@contextlib.contextmanager
def stubbed_driver(made: Callable[..., None], target_name: str = "sm_90") -> Iterator[None]:
    """Within the block CPU tensors say is_cuda, operators take Triton, and each launch ends in ``made(...)`` with what
    the driver's launch call would have been given."""

    def compiled_launcher(*args: Any, **kwargs: Any) -> SimpleNamespace:
        # takes the scratch memory before the metadata and the kernel's arguments one by one
        return SimpleNamespace(launch=lambda *given: made(*given[:7], *given[9:13], *given[7:9], given[13:]))

    # in place of the driver's library, which isn't there; the first two are Triton 3.5's and 3.6's, the others newer
    stubs: dict[str, Any] = {
        "compile_module_from_src": compiled_launcher, "library_dirs": list,
        "PyKernelArg": SimpleNamespace, "ARG_CONSTEXPR": 0, "ARG_KERNEL": 1, "ARG_TUPLE": 2,
    }  # fmt: skip
    _forget_compiled()
    try:
        with (
            aot.stub_driver(target_name) as driver,
            tkernels.backend("triton"),
            mock.patch.multiple(nvidia, create=True, **stubs),
            mock.patch.object(triton.compiler, "compile", _Compiled),
            aot.said_to_be_cuda(),
        ):
            cast(Any, driver).utils = SimpleNamespace(launch=made, build_signature_metadata=lambda signature: b"")
            cast(Any, driver).launcher_cls = nvidia.CudaLauncher
            yield
    finally:
        _forget_compiled()


def _forget_compiled() -> None:
    """Kernels remember what they were compiled to by device number."""
    for name, module in list(sys.modules.items()):
        if name.startswith("tkernels.ops."):
            for kernel in vars(module).values():
                if isinstance(kernel, JITFunction):
                    kernel.device_caches.clear()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--batch", type=int, default=256, metavar="N", help="images a step (default: 256)")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="timed steps of each (default: 200)")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    if args.batch < 2 or args.steps < 1:
        raise Refused(f"--batch must be at least 2 and --steps at least 1, got {args.batch} and {args.steps}")
    frame = measure(args.batch, args.steps)
    print(f"host time of a training step, batch {args.batch}, 1 thread, medians of {args.steps} steps in turns")
    print(frame.round(1).to_string())
    return 0


def measure(batch: int, steps: int) -> pd.DataFrame:
    """Microseconds a step and a call: ours, PyTorch's, and of a bare launch."""
    torch_step, torch_calls = _torch_step()
    x, launches = torch.zeros(256), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _keep_freed_memory()
    try:
        with stubbed_driver(lambda *made: launches.append(1)), flattened_for_nothing():
            bodies = {
                "tkernels": step(*traffic.fused(), batch),
                "bare launch by a plan": lambda: _planned_fold((x,)),
                "bare JITFunction.run": lambda: fold(x),
            }
            times = _in_turns(bodies, steps)
            launches.clear()
            bodies["tkernels"]()
        times |= _in_turns({"torch.nn, smallest CPU tensors": torch_step}, steps)
    finally:
        torch.set_num_threads(threads)
    calls = (len(launches), 1, 1, torch_calls)
    frame = pd.DataFrame({"us a step": times, "calls": dict(zip(times, calls))})
    return frame.assign(**{"us a call": frame["us a step"] / frame.calls})


def step(model: nn.Module, loss: Callable[..., Tensor], batch: int) -> Callable[[], None]:
    """Forward, loss and backward in bf16 NHWC."""
    model, (images, target) = meter.in_bf16(model), meter.batch_of(batch)
    return _step(model, loss, images, target)


def _step(model: nn.Module, loss: Callable[..., Tensor], images: Tensor, target: Tensor) -> Callable[[], None]:
    parameters = list(model.parameters())

    def body() -> None:
        for parameter in parameters:
            parameter.grad = None
        loss(model(images), target).backward()

    return body


def _torch_step() -> tuple[Callable[[], None], int]:
    """PyTorch's step on images of 8 x 8, and how many ATen calls that compute it makes at any size."""
    model, loss = CNNClassifier(width=1, image_size=8), nn.CrossEntropyLoss()
    body = _step(model, loss, torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))
    return body, len(traffic.step(traffic.plain, 2, "sm_90").calls)


@contextlib.contextmanager
def flattened_for_nothing() -> Iterator[None]:
    """Within the block torch.flatten of channels_last maps copies nothing; the features are in another order."""

    def flatten(x: Tensor, _: int) -> Tensor:
        return x.permute(0, 2, 3, 1).view(x.shape[0], -1)

    with mock.patch.object(torch, "flatten", flatten):
        yield


def fold(x: Tensor) -> None:
    """One launch of a small kernel."""
    launch.launch(conv_stage.fold_sums_kernel, (1, 1), x, x, 2, 32, BLOCK_R=32, BLOCK_C=32, num_warps=4)


@plan.Planned
def _planned_fold(tensors: tuple[Any, ...]) -> tuple[()]:
    """A plan of one launch."""
    fold(*tensors)
    return ()


def _in_turns(bodies: Mapping[str, Callable[[], object]], steps: int) -> dict[str, float]:
    """Medians in microseconds; the bodies take turns so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in bodies}
    for turn in range(steps + WARM_UP):
        for name, body in bodies.items():
            start = time.perf_counter()
            body()
            if turn >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    return {name: 1e6 * statistics.median(found) for name, found in times.items()}


def _keep_freed_memory() -> None:
    """A GPU's caching allocator asks no system for memory in each step; let glibc do likewise."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
