"""Count the bytes of one training step on tensors that are not there.

Fake CPU tensors that say they are on a GPU: autograd runs (on fake CUDA tensors it would need a CUDA runtime), and
the operators take their Triton path, whose launches are recorded instead of made. Each launch and each ATen call
counts its tensor arguments, read once and written once. Views and allocations count nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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


@dataclasses.dataclass(frozen=True)
class Call:
    """One launch ('triton') or one ATen call ('aten') within a pass ('forward', 'backward') of a layer. ``workspace``:
    bytes of operands that were float32, made by this pass of the layer and dropped at its end."""

    layer: str
    phase: str
    kind: str
    name: str
    bytes: int
    workspace: int


@dataclasses.dataclass
class Step:
    """What one training step did. ``saved``: bytes kept for backward by layer, parameters not counted;
    ``alive``: most bytes of workspace in one pass of a layer."""

    calls: list[Call]
    saved: dict[str, int]
    launches: list[aot.Launch]
    alive: int

    def total(self) -> int:
        """Bytes, workspaces not counted."""
        return sum(call.bytes for call in self.calls)


def training_step(
    build: Callable[[], tuple[nn.Module, Callable[..., Tensor]]], batch: int, target_name: str, image_size: int = 32
) -> Step:
    """Forward, loss and backward of a classifier of RGB images in bf16 NHWC. ``build`` returns it and its loss."""
    meter = _Meter()
    network, loss = build()
    model = network.to(torch.bfloat16).to(memory_format=torch.channels_last)
    with pretended_gpu(target_name, meter.launch) as mode:
        make_fake(model, mode)
        kept = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        images = torch.empty(batch, 3, image_size, image_size, dtype=torch.bfloat16)
        images = images.contiguous(memory_format=torch.channels_last)
        target = torch.zeros(batch, dtype=torch.int64)
        with meter, meter.layers(model), torch.autograd.graph.saved_tensors_hooks(meter.saving(kept), lambda t: t):
            logits = model(images)
            with meter.layer("loss"):
                value = loss(logits, target)
            meter.claim(value, "loss")
            meter.phase = "backward"
            value.backward()
            meter.end_of_pass()
    return Step(meter.calls, meter.saved, meter.launches, meter.alive)


def one_call(make: Callable[[], tuple[Callable[[], Tensor], Sequence[Tensor]]], target_name: str) -> Step:
    """Forward and backward of one call. ``make`` returns it and the tensors whose gradients are asked for."""
    meter = _Meter()
    with pretended_gpu(target_name, meter.launch):
        call, leaves = make()
        with meter, torch.autograd.graph.saved_tensors_hooks(meter.saving(set()), lambda t: t):
            value = call()
            incoming = torch.empty_like(value)
            meter.end_of_pass()
            meter.phase = "backward"
            gradients = torch.autograd.grad(value, leaves, incoming)
            meter.end_of_pass()
            del gradients  # no workspace: held up to here
    return Step(meter.calls, meter.saved, meter.launches, meter.alive)


@contextlib.contextmanager
def pretended_gpu(target: str | Target, launch: Callable[..., None]) -> Iterator[FakeTensorMode]:
    """Fake tensors on the CPU that say is_cuda; each launch becomes ``launch(kernel, args, kwargs, grid)``."""
    fused = torch.nn.functional.dropout
    tensor: Any = torch.Tensor
    switch: Any = torch.utils.deterministic

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        # on a GPU torch takes this one; its C++ does not ask the Python attribute is_cuda
        return torch.native_dropout(input, p, True)[0] if training and 0 < p < 1 else fused(input, p, training, inplace)

    # filling fresh memory, which deterministic mode may do, would count as calls
    fill = switch.fill_uninitialized_memory
    switch.fill_uninitialized_memory = False
    torch.nn.functional.dropout = dropout
    tensor.is_cuda = property(lambda self: True)
    try:
        with aot.intercepting(target, launch), FakeTensorMode() as mode:
            yield mode
    finally:
        del tensor.is_cuda
        torch.nn.functional.dropout = fused
        switch.fill_uninitialized_memory = fill


def make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace a real model's parameters and buffers by fake ones."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = mode.from_tensor(parameter)  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)


class _Meter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.saved: dict[str, int] = {}
        self.launches: list[aot.Launch] = []
        self.alive = 0
        self.phase = "forward"
        self._layer = OTHER
        # (index of the call, operand, bytes) of float32 operands born in the pass at hand
        self._pending: list[tuple[int, int, int]] = []
        self._born: dict[int, StorageWeakRef] = {}
        self._owners: dict[Any, str] = {}
        self._saved_storages: set[int] = set()

    # what counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        storages = {t.untyped_storage()._cdata for t in given}
        fresh = [t for t in outputs if t.untyped_storage()._cdata not in storages]
        self._remember(fresh)
        written = _written(func, args)
        if name in _ALLOCATIONS or not (fresh or written):
            return result
        read = {_identity(t): t for t in given if not (name in _OVERWRITES and t is args[0])}
        operands = [*read.values(), *{_identity(t): t for t in [*fresh, *written]}.values()]
        self._count("aten", name, operands)
        return result

    def launch(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Any) -> None:
        """Count a Triton launch: each tensor argument once."""
        self.launches.append(aot.record(kernel, args, kwargs, grid, device="cpu"))
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        self._count("triton", kernel.__name__, list({_identity(t): t for t in tensors}.values()))

    def _count(self, kind: str, name: str, operands: list[Tensor]) -> None:
        for t in operands:
            storage = t.untyped_storage()._cdata
            if kind == "triton" and t.dtype == torch.float32 and storage in self._born:
                self._pending.append((len(self.calls), storage, aot.span(t)))
        self.calls.append(Call(self._layer, self.phase, kind, name, sum(aot.span(t) for t in operands), 0))

    def _remember(self, fresh: list[Tensor]) -> None:
        for t in fresh:
            storage = t.untyped_storage()
            self._born[storage._cdata] = StorageWeakRef(storage)

    def end_of_pass(self) -> None:
        """Tell workspaces from results: what a pass made and nobody holds any more was its workspace."""
        gone = {key for key, reference in self._born.items() if reference.expired()}
        sizes = {storage: size for _, storage, size in self._pending if storage in gone}
        self.alive = max(self.alive, sum(sizes.values()))
        for index, storage, size in self._pending:
            if storage in gone:
                call = self.calls[index]
                self.calls[index] = dataclasses.replace(call, bytes=call.bytes - size, workspace=call.workspace + size)
        self._pending, self._born = [], {}

    def saving(self, kept: set[int]) -> Callable[[Tensor], Tensor]:
        """A hook that counts the storages autograd keeps, each once, those in ``kept`` not."""

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage._cdata not in self._saved_storages | kept:
                self._saved_storages.add(storage._cdata)
                self.saved[self._layer] = self.saved.get(self._layer, 0) + storage.nbytes()
            return t.detach()

        return pack

    # whose it is

    @contextlib.contextmanager
    def layer(self, name: str) -> Iterator[None]:
        self._enter(name)
        yield
        self._enter(OTHER)

    def _enter(self, name: str) -> None:
        if name != self._layer:
            self.end_of_pass()
        self._layer = name

    @contextlib.contextmanager
    def layers(self, model: nn.Module) -> Iterator[None]:
        """Attribute calls to the innermost module that makes them, in forward and in backward."""
        hooks = []
        outer: list[str] = []
        fused = [module for module in model.modules() if isinstance(module, (tnn.ConvStage, tnn.ConvBNReLU2d))]
        inside = {child for module in fused for child in module.children()}
        for name, module in model.named_modules():
            if module in inside:
                continue  # never called, unless it has hooks: then the stage would not be one call

            def before(module: nn.Module, inputs: Any, name: str = name or OTHER) -> None:
                for t in inputs:
                    self.claim(t, self._layer)
                outer.append(self._layer)
                self._enter(name)

            def after(module: nn.Module, inputs: Any, output: Any, name: str = name or OTHER) -> None:
                for t in tree_leaves(output):
                    if isinstance(t, Tensor):
                        self.claim(t, name)
                self._enter(outer.pop())

            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        yield
        for hook in hooks:
            hook.remove()

    def claim(self, output: Tensor, name: str) -> None:
        """The nodes of the graph behind ``output`` that nobody claimed yet run in this layer's name."""
        nodes = [output.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in self._owners:
                continue
            self._owners[node] = name
            node.register_prehook(lambda gradients, name=name: self._enter(name))
            nodes += [following for following, _ in node.next_functions]


def _written(func: Any, args: Any) -> list[Tensor]:
    """The arguments an ATen operator writes to."""
    arguments = zip(func._schema.arguments, args)
    return [
        value
        for argument, value in arguments
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor)
    ]


def _identity(t: Tensor) -> tuple[Any, ...]:
    """Equal for two views of the same elements."""
    return t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape), tuple(t.stride())
