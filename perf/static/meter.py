"""Count the bytes of one training step on tensors that are not there.

Fake CPU tensors that say they are on a GPU: autograd runs (on fake CUDA tensors it would need a CUDA runtime), and
the operators take their Triton path, whose launches are recorded instead of made. Each launch and each ATen call
counts its tensor arguments, read once and written once. Views and allocations count nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tkernels.nn as tnn
from perf.static import aot
from tkernels.core.targets import Target

OTHER = "(other)"
_ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"}
# in-place operators that do not read what they overwrite
_OVERWRITES = {"zero_", "fill_", "copy_", "bernoulli_", "uniform_", "normal_", "random_"}

# makes a network and its loss
Build = Callable[[], tuple[nn.Module, Callable[..., Tensor]]]


@dataclasses.dataclass
class Call:
    """One launch ('triton') or one ATen call ('aten') within a pass ('forward', 'backward') of a layer. ``workspace``:
    bytes of operands that were float32, made by this pass of the layer and dropped at its end."""

    layer: str
    phase: str
    kind: str
    name: str
    bytes: int
    workspace: int = 0


@dataclasses.dataclass
class Step:
    """What one training step did. ``saved``: bytes kept for backward by layer, parameters not counted;
    ``alive``: most bytes of workspace in one pass of a layer."""

    calls: list[Call] = dataclasses.field(default_factory=list)
    saved: dict[str, int] = dataclasses.field(default_factory=dict)
    launches: list[aot.Launch] = dataclasses.field(default_factory=list)
    alive: int = 0

    def total(self) -> int:
        """Bytes, workspaces not counted."""
        return sum(call.bytes for call in self.calls)


def counts(calls: Iterable[Call], saved: int) -> dict[str, int]:
    """What calls come to, by the names of the tables' columns."""
    calls = list(calls)
    launches = sum(call.kind == "triton" for call in calls)
    return {
        "bytes": sum(call.bytes for call in calls),
        "workspace_bytes": sum(call.workspace for call in calls),
        "launches": launches,
        "aten_calls": len(calls) - launches,
        "saved_bytes": saved,
    }


def training_step(build: Build, batch: int, target_name: str, image_size: int = 32) -> Step:
    """Forward, loss and backward of a classifier of RGB images in bf16 NHWC. ``build`` returns it and its loss."""
    network, loss = build()
    model = in_bf16(network)
    meter = _Meter()
    with pretended_gpu(target_name, meter.launch) as mode:
        make_fake(model, mode)
        images, target = batch_of(batch, image_size)
        layers, kept = _Layers(meter), {_storage(t) for t in (*model.parameters(), *model.buffers())}
        with meter, layers.of(model), meter.saving(kept):
            logits = model(images)
            meter.enter("loss")
            value = loss(logits, target)
            meter.enter(OTHER)
            layers.claim(value, "loss")
            meter.phase = "backward"
            value.backward()
            meter.end_of_pass()
    return meter.step


def one_call(make: Callable[[], tuple[Callable[[], Tensor], Sequence[Tensor]]], target_name: str) -> Step:
    """Forward and backward of one call. ``make`` returns it and the tensors whose gradients are asked for."""
    meter = _Meter()
    with pretended_gpu(target_name, meter.launch):
        call, leaves = make()
        with meter, meter.saving(set()):
            value = call()
            incoming = torch.empty_like(value)
            meter.end_of_pass()
            meter.phase = "backward"
            gradients = torch.autograd.grad(value, leaves, incoming)
            meter.end_of_pass()
            del gradients  # no workspace: held up to here
    return meter.step


def in_bf16(model: nn.Module) -> nn.Module:
    """A network in bf16 NHWC."""
    return model.to(torch.bfloat16).to(memory_format=torch.channels_last)


def batch_of(batch: int, image_size: int = 32) -> tuple[Tensor, Tensor]:
    """RGB images in bf16 NHWC and their classes, all zero."""
    images = torch.zeros(batch, 3, image_size, image_size, dtype=torch.bfloat16)
    return images.contiguous(memory_format=torch.channels_last), torch.zeros(batch, dtype=torch.int64)


@contextlib.contextmanager
def pretended_gpu(target: str | Target, launch: Callable[..., None]) -> Iterator[FakeTensorMode]:
    """Fake tensors on the CPU that say is_cuda; each launch becomes ``launch(kernel, args, kwargs, grid)``."""
    fused = torch.nn.functional.dropout

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        # on a GPU torch takes this one; its C++ does not ask the Python attribute is_cuda
        return torch.native_dropout(input, p, True)[0] if training and 0 < p < 1 else fused(input, p, training, inplace)

    # filling fresh memory, which deterministic mode may do, would count as calls
    switch: Any = torch.utils.deterministic
    fill, switch.fill_uninitialized_memory = switch.fill_uninitialized_memory, False
    try:
        with (
            mock.patch.object(torch.nn.functional, "dropout", dropout),
            aot.said_to_be_cuda(),
            aot.intercepting(target, launch),
            FakeTensorMode() as mode,
        ):
            yield mode
    finally:
        switch.fill_uninitialized_memory = fill


def make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace a real model's parameters and buffers by fake ones."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            made: Any = {name: t if t is None else mode.from_tensor(t) for name, t in tensors.items()}
            tensors.update(made)


class _Meter(TorchDispatchMode):
    """Counts launches and ATen calls into ``step``, in the name of the layer and the phase at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.step = Step()
        self.layer, self.phase = OTHER, "forward"
        # (call, storage, bytes) of launches' float32 operands that were born in the pass at hand
        self._pending: list[tuple[Call, int, int]] = []
        self._born: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        given = _tensors((args, kwargs))
        if any(t.is_meta for t in (*given, *_tensors(result))):  # a plan is being made
            return result
        storages = {_storage(t) for t in given}
        fresh = [t for t in _tensors(result) if _storage(t) not in storages]
        self._born |= {_storage(t): StorageWeakRef(t.untyped_storage()) for t in fresh}
        written = _written(func, args)
        if name in _KERNELS:
            self._count("aten", name, [t for kernel in _KERNELS[name](args, result) for t in _distinct(kernel)])
        elif name not in _ALLOCATIONS and (fresh or written):
            read = [t for t in given if not (name in _OVERWRITES and t is args[0])]
            self._count("aten", name, [*_distinct(read), *_distinct([*fresh, *written])])
        return result

    def launch(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Any) -> None:
        """Count a Triton launch: each tensor argument once."""
        self.step.launches.append(aot.record(kernel, args, kwargs, grid, device="cpu"))
        operands = _distinct(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        call = self._count("triton", kernel.__name__, operands)
        born = [t for t in operands if t.dtype == torch.float32 and _storage(t) in self._born]
        self._pending += [(call, _storage(t), aot.span(t)) for t in born]

    def _count(self, kind: str, name: str, operands: Iterable[Tensor]) -> Call:
        call = Call(self.layer, self.phase, kind, name, sum(map(aot.span, operands)))
        self.step.calls.append(call)
        return call

    def enter(self, layer: str) -> None:
        """What follows is this layer's."""
        if layer != self.layer:
            self.end_of_pass()
        self.layer = layer

    def end_of_pass(self) -> None:
        """Tell workspaces from results: what a pass made and nobody holds any more was its workspace."""
        gone = {key for key, reference in self._born.items() if reference.expired()}
        workspaces = [each for each in self._pending if each[1] in gone]
        for call, _, size in workspaces:
            call.bytes -= size
            call.workspace += size
        self.step.alive = max(self.step.alive, sum({storage: size for _, storage, size in workspaces}.values()))
        self._pending, self._born = [], {}

    def saving(self, kept: set[int]) -> contextlib.AbstractContextManager[object]:
        """Within the block storages that autograd keeps are counted, each once, those in ``kept`` not."""
        seen, saved = set(kept), self.step.saved

        def pack(t: Tensor) -> Tensor:
            if _storage(t) not in seen:
                seen.add(_storage(t))
                saved[self.layer] = saved.get(self.layer, 0) + t.untyped_storage().nbytes()
            return t.detach()

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)


class _Layers:
    """Tells a meter whose calls are being made: those of the innermost module, in forward and in backward."""

    def __init__(self, meter: _Meter) -> None:
        self._meter = meter
        self._outer: list[str] = []
        self._claimed: set[Any] = set()

    @contextlib.contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Within the block the meter is told of the model's modules."""
        fused = [module for module in model.modules() if isinstance(module, (tnn.ConvStage, tnn.ConvBNReLU2d))]
        # never called, unless they have hooks: then the stage would not be one call
        inside = {child for module in fused for child in module.children()}
        with contextlib.ExitStack() as hooks:
            for name, module in model.named_modules():
                if module not in inside:
                    self._watch(hooks, name or OTHER, module)
            yield

    def _watch(self, hooks: contextlib.ExitStack, name: str, module: nn.Module) -> None:
        def before(module: nn.Module, inputs: Any) -> None:
            for t in inputs:
                self.claim(t, self._meter.layer)
            self._outer.append(self._meter.layer)
            self._meter.enter(name)

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            for t in _tensors(output):
                self.claim(t, name)
            self._meter.enter(self._outer.pop())

        hooks.callback(module.register_forward_pre_hook(before).remove)
        hooks.callback(module.register_forward_hook(after).remove)

    def claim(self, output: Tensor, name: str) -> None:
        """The nodes of the graph behind ``output`` that nobody claimed yet run in this layer's name."""
        nodes = [output.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in self._claimed:
                continue
            self._claimed.add(node)
            node.register_prehook(lambda gradients: self._meter.enter(name))
            nodes += [following for following, _ in node.next_functions]


def _convolution_gradients(args: Any, results: Any) -> list[list[Tensor]]:
    """Each gradient that is asked for is a product of its own."""
    dy, x, weight = args[:3]
    dx, dw, db = results
    return [_tensors(kernel) for kernel in ((dy, weight, dx), (dy, x, dw), (dy, db)) if kernel[-1] is not None]


def _batch_norm(args: Any, results: Any) -> list[list[Tensor]]:
    """In training one kernel finds the statistics and another normalises."""
    x, training = args[0], args[5]
    return [[x]] * bool(training) + [_tensors((args, results))]


def _batch_norm_gradients(args: Any, results: Any) -> list[list[Tensor]]:
    """In training one kernel sums and another forms the input's gradient."""
    dy, x, training = args[0], args[1], args[7]
    return [[dy, x]] * bool(training) + [_tensors((args, results))]


# ATen's calls of several kernels on a GPU: what each of these reads and writes. (NHWC in 16 bits; the kernels' names
# are in perf/results/h200-2026-11-27/profile-resnet50.csv.)
_KERNELS: dict[str, Callable[[Any, Any], list[list[Tensor]]]] = {
    "convolution_backward": _convolution_gradients,
    "native_batch_norm": _batch_norm,
    "native_batch_norm_backward": _batch_norm_gradients,
}


def _written(func: Any, args: Any) -> list[Tensor]:
    """The arguments an ATen operator writes to."""
    infos = [argument.alias_info for argument in func._schema.arguments]
    return [t for info, t in zip(infos, args) if info is not None and info.is_write and isinstance(t, Tensor)]


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Of views of the same elements one."""
    found = {(_storage(t), t.storage_offset(), tuple(t.shape), tuple(t.stride())): t for t in tensors}
    return list(found.values())
