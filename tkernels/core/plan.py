"""Plans: what a pass of an operator allocates and launches, decided once for a kind of call and run on every call.

A pass (an operator's forward or backward, a launch function) is written as a function of tensors. At the first call of
a kind it runs once on :class:`Slot`s, which have a tensor's shape, strides and dtype but no memory: each allocation,
launch and call of torch becomes a step of a :class:`Plan`. The plan then runs on the tensors of that call and of every
later one of its kind, watched or not. Plans lie in one bounded cache.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import marshal
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from tkernels.core import _torch, launch, mode, targets

Tensors = tuple[Tensor | None, ...]
# index, size, stride, dtype
Buffer = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]

MOST_PLANS = 4096


class Cache:
    """A dictionary that forgets its oldest entries."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.values: dict[Hashable, Any] = {}
        _caches.append(self)

    def get(self, key: Hashable | None) -> Any:
        """None for what is not there. (Not looked up for a trace, which has no keys, and would guard the cache.)"""
        return None if key is None else self.values.get(key)

    def add(self, key: Hashable, value: Any) -> Any:
        """Returns the value."""
        while len(self.values) >= self._most:
            with contextlib.suppress(RuntimeError, StopIteration):  # another thread adds or drops just now
                self.values.pop(next(iter(self.values)), None)
        self.values[key] = value
        return value

    def clear(self) -> None:
        self.values.clear()

    def __len__(self) -> int:
        return len(self.values)


class KnownCall:
    """What was decided of all calls of one call_key, and whether autograd records them. The object is a cache key
    itself, cheap to look up, that stands for the long one."""

    __slots__ = ("decision", "differentiates")

    def __init__(self, decision: Any, differentiates: bool) -> None:
        self.decision, self.differentiates = decision, differentiates


_caches: list[Cache] = []
_plans = Cache(MOST_PLANS)


def forget() -> None:
    """Drop all plans, and what operators remember of calls."""
    for cache in _caches:
        cache.clear()


def tensors_key(tensors: Sequence[Tensor | None]) -> tuple[Hashable, ...]:
    """What of these tensors, the first of which is one, a plan may depend on."""
    first: Any = tensors[0]
    precision = mode.float32_products() if first.dtype is torch.float32 else None
    return (targets.identity(), precision, *[
        t if t is None else (t.__class__, t.dtype, t.shape, t.stride(), t.data_ptr() & 15, t.get_device(), t.is_neg())
        for t in tensors
    ])  # fmt: skip


def call_key(tensors: Sequence[Tensor | None], arguments: tuple[Any, ...]) -> Hashable | None:
    """The cache key of an operator's call, backend, autocast and who wants gradients included: where one call passed
    the checks and went to Triton, others of its key do. None for what has no key: a trace, a transform, arguments that
    are not what they should be, or more than numbers and names (a tensor's value may change)."""
    if mode.traced() or mode.transformed_eager_call():
        return None
    first: Any = tensors[0]
    try:
        recorded = torch.is_grad_enabled() and tuple([t.requires_grad for t in tensors if t is not None])
        cast = mode.autocast_dtype(first)
        precision = mode.float32_products() if cast is torch.float32 else None
        # (as bytes 1, 1.0 and True differ, and NaN is NaN)
        switches = mode.get_backend(), _torch.cudnn_is_enabled()
        return tensors_key(tensors), marshal.dumps(arguments, 2), recorded, cast, precision, switches
    except (AttributeError, TypeError, RuntimeError, ValueError):
        return None


class Planned:
    """Decorator of a pass ``body(tensors, *static)``, which returns a tuple of tensors and Nones.

    The first tensor is not None; ``static`` is hashable. What the body does may depend on it, on the tensors' dtypes,
    shapes, strides, device and alignment to 16 bytes, on the target and on torch's float32 switches, never on values
    or on anything else; it draws no random numbers. In a trace the body runs as it is written.
    """

    def __init__(self, body: Callable[..., Tensors]) -> None:
        self.body = body
        functools.update_wrapper(self, body)

    def __call__(self, tensors: Tensors, *static: Any) -> Tensors:
        return self.of_call(None, tensors, *static)

    def of_call(self, call: KnownCall | None, tensors: Tensors, *static: Any) -> Tensors:
        """The same where the tensors are those of a call that may be known (None: is not)."""
        if call is None and mode.traced():
            return self.body(tensors, *static)
        if mode.several_gpus():
            with mode.device_guard(tensors[0]):  # type: ignore[arg-type]
                return self._run(call, tensors, static)
        return self._run(call, tensors, static)

    def _run(self, call: KnownCall | None, tensors: Tensors, static: tuple[Any, ...]) -> Tensors:
        whole = self, static, call or tensors_key(tensors)
        plan = _plans.values.get(whole)
        if plan is None:
            plan = make(self.body, tensors, static)
            _plans.add(whole, plan)
        result: Tensors = plan.run(tensors)
        return result


def make(body: Callable[..., Tensors], tensors: Tensors, static: tuple[Any, ...]) -> Plan:
    """The plan of a pass for tensors of this kind."""
    planner = Planner(tensors)
    slots: Any = planner.inputs
    with _torch.with_torch_function():
        results: Any = body(slots, *static)
    return planner.plan(results)


def call(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """``function(*args)``, or, where there are slots among them, that as a step of their plan. Of meta tensors, which
    stand for slots, the function has to give what it gives of others, laid out alike."""
    slot = next((a for a in args if isinstance(a, Slot)), None)
    result: Tensor = function(*args) if slot is None else slot.planner.call(function, *args)
    return result


def value(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, which is no tensor; where there are slots among them, a slot for it, to be launched with:
    each run of the plan makes it anew, of that run's tensors."""
    slot = next((a for a in args if isinstance(a, Slot)), None)
    return function(*args) if slot is None else slot.planner.value(function, *args)


def starts_at(t: Any, multiple: int) -> bool:
    """Whether a tensor, or what a slot stands for, is known to start at a multiple of so many bytes, 16 at the most:
    a call's tensors are part of a plan's key with their address modulo 16, and buffers start at multiples of more."""
    if isinstance(t, Slot):
        return t.planner.aligned and int(t.meta.storage_offset()) * t.meta.element_size() % multiple == 0
    return bool(t.data_ptr() % multiple == 0)


def increment_version(written: Sequence[Any]) -> None:
    """Kernels write behind autograd's back: a graph that saved the old values must notice."""
    if not written:
        return
    slots = [t for t in written if isinstance(t, Slot)]
    if slots:
        slots[0].planner.record(lambda *written: torch.autograd.graph.increment_version(written), *written)
    else:
        torch.autograd.graph.increment_version(written)


class Slot:
    """Stands for a tensor while a plan is made. Torch's functions and methods take it and add a step to the plan."""

    __slots__ = ("index", "meta", "planner")

    def __init__(self, planner: Planner, index: int, meta: Tensor | Any) -> None:
        self.planner, self.index, self.meta = planner, index, meta

    @property
    def shape(self) -> torch.Size:
        return self.meta.shape

    @property
    def device(self) -> torch.device:
        return self.planner.device

    @property
    def dtype(self) -> torch.dtype:
        return self.meta.dtype

    @property
    def ndim(self) -> int:
        return self.meta.ndim

    def __getattr__(self, name: str) -> Any:
        if name == "data_ptr" or not callable(getattr(Tensor, name)):
            raise AttributeError(f"a plan may not depend on {name}")
        return functools.partial(self.planner.call, getattr(Tensor, name), self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        slot = next(a for a in args if isinstance(a, Slot))
        return slot.planner.call(func, *args, **(kwargs or {}))


_ALLOCATIONS = (Tensor.new_empty, Tensor.new_empty_strided, torch.empty_like)


class Planner:
    """Makes one plan."""

    def __init__(self, tensors: Tensors) -> None:
        first: Any = tensors[0]
        # (a stand-in for a GPU may say it is one, and has no memory there)
        self.device = first.device if first.get_device() >= 0 else torch.device("cpu")
        self._count = len(tensors)
        # whether every tensor of the call starts at a multiple of 16 bytes
        self.aligned = all(t is None or t.data_ptr() & 15 == 0 for t in tensors)
        self._steps: list[_Step] = []
        # buffers that the next step is the first to need: index, size, stride, dtype
        self._buffers: list[Buffer] = []
        self._values: list[Any] = list(tensors)  # None where a step has yet to put a value
        self._constants: dict[Hashable, int] = {}
        self._metas: dict[int, Tensor] = {}
        self.inputs = tuple(t if t is None else self._slot(i, _meta(t)) for i, t in enumerate(tensors))

    def call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """What ``func`` gives for slots, which are positional arguments: a slot, or, where it tells of shapes and
        strides alone, that."""
        result = func(*[a.meta if isinstance(a, Slot) else a for a in args], **kwargs)
        if isinstance(result, (tuple, list)) and any(isinstance(t, Tensor) for t in result):
            raise TypeError(f"a plan has no place for several results of {func.__name__}")
        if not isinstance(result, Tensor):
            return result
        for slot in args:  # in place, or nothing to do, as contiguous() often has
            if isinstance(slot, Slot) and slot.meta is result:
                if func.__name__.endswith("_"):
                    self.record(func, *args, **kwargs)
                return slot
        made = self._slot(self._place(None), result)
        if func in _ALLOCATIONS:
            self._buffers.append((made.index, tuple(result.shape), result.stride(), result.dtype))
        else:
            self.record(func, *args, **kwargs)
            self._steps[-1].result = made.index
        return made

    def value(self, func: Any, *args: Any) -> Slot:
        """A slot, without shape or dtype, for what ``func`` gives, which is no tensor."""
        made = Slot(self, self._place(None), None)
        self.record(func, *args)
        self._steps[-1].result = made.index
        return made

    def record(self, func: Any, *args: Any, **kwargs: Any) -> None:
        """A call of torch for its effect."""
        self._add(_Step(functools.partial(func, **kwargs) if kwargs else func, self._indices(args)))

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        given = dict(zip(kernel.arg_names, args)) | options
        bound = [given.pop(name, default) for name, default in _parameters(kernel)]
        self._add(_Launch(kernel, grid, self._indices(bound), given))

    def sample(self, body: Callable[[], object]) -> Callable[[], None]:
        """What ``body`` plans as a call of its own, on the call's tensors and fresh buffers, for a clock."""
        before, self._steps, self._buffers = (self._steps, self._buffers), [], []
        body()
        steps = self._steps
        self._steps, self._buffers = before
        values = list(self._values)
        for i, meta in self._metas.items():
            if i >= self._count:
                values[i] = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device=self.device)
        plan = Plan(steps, values, (), self.device)
        return lambda: plan.run_on(values)

    def plan(self, results: Sequence[Slot | None]) -> Plan:
        indices = self._indices(results)
        if self._buffers:  # nothing is launched: empty results
            self._add(_Step(tuple, ()))
        steps = _needed(self._steps, set(indices))
        _drop_dead(steps, set(indices))
        return Plan(steps, self._values[self._count :], indices, self.device)

    def _add(self, step: _Step) -> None:
        step.buffers, self._buffers = tuple(self._buffers), []
        self._steps.append(step)

    def _slot(self, index: int, meta: Tensor) -> Slot:
        self._metas[index] = meta
        return Slot(self, index, meta)

    def _place(self, value: Any) -> int:
        self._values.append(value)
        return len(self._values) - 1

    def _indices(self, arguments: Sequence[Any]) -> tuple[int, ...]:
        """Where a step finds its arguments: slots, and constants, which lie among the values too."""
        return tuple([a.index if isinstance(a, Slot) else self._constant(a) for a in arguments])

    def _constant(self, value: Any) -> int:
        key = value.__class__, value
        if key not in self._constants:
            self._constants[key] = self._place(value)
        return self._constants[key]


class _Step:
    """A call of torch: a function of the values at ``indices``, and where its result goes (None: nowhere)."""

    def __init__(self, function: Any, indices: tuple[int, ...]) -> None:
        self.function, self.indices = function, indices
        self.arguments = _getter(indices)
        self.result: int | None = None
        self.buffers: tuple[Buffer, ...] = ()
        # buffers that no later step takes: their memory is free from here on
        self.dead: tuple[int, ...] = ()

    def run(self, values: list[Any]) -> None:
        result = self.function(*self.arguments(values))
        if self.result is not None:
            values[self.result] = result


class _Launch(_Step):
    """A kernel's launch."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], indices: tuple[int, ...], options: dict[str, Any]) -> None:
        super().__init__(kernel, indices)
        self.grid, self.options = grid, options
        # what Triton compiled it to, once it has
        self.compiled: Any = None

    def run(self, values: list[Any]) -> None:
        """By Triton's own Python, which compiles the kernel where that is yet to be done."""
        with launch.named(self.function):
            compiled = self.function[self.grid](*self.arguments(values), **self.options)
        if launch.is_compiled(compiled):
            self.compiled = compiled

    def direct(self) -> tuple[Any, ...]:
        """The launcher of the compiled kernel, and what it takes beside stream and arguments."""
        function, between, in_a_tuple = launch.driver_call(self.compiled)
        return function, (*self.grid, 1, 1)[:3], between, in_a_tuple


class Plan:
    """Steps on a list of values: the call's tensors, then ``rest``: constants, and a place for each buffer."""

    def __init__(self, steps: Sequence[_Step], rest: list[Any], results: tuple[int, ...], device: torch.device) -> None:
        self._steps, self._rest, self._results = steps, rest, _getter(results)
        self._device = device.index or 0
        self._empty = _torch.QUICK_ALLOCATORS.get(device.type)
        # what run_on goes through, once all kernels are compiled
        self._direct: list[tuple[Any, ...]] | None = None

    def run(self, tensors: Tensors) -> Tensors:
        values = [*tensors, *self._rest]
        self.run_on(values)
        return self._results(values)

    def run_on(self, values: list[Any]) -> None:
        empty = self._empty
        # fresh memory is to be filled, as torch's deterministic mode wants it, or a dispatch mode watches
        if empty is None or torch.are_deterministic_algorithms_enabled() or _torch.count_dispatch_modes() > 0:
            empty = _allocator_like(values[0])
        if self._direct is None or launch.is_watched():
            self._run_step_by_step(values, empty)
            return
        stream = launch.current_stream(self._device)
        # all in this one loop: a function a step would cost as much as it does
        for buffers, launched, step, arguments, dead in self._direct:
            for i, size, stride, dtype in buffers:
                values[i] = empty(size, stride, dtype)
            if launched is None:
                step.run(values)
            else:
                function, (x, y, z), between, in_a_tuple = launched
                if in_a_tuple:
                    function(x, y, z, stream, *between, arguments(values))
                else:
                    function(x, y, z, stream, *between, *arguments(values))
            for i in dead:
                values[i] = None

    def _run_step_by_step(self, values: list[Any], empty: Callable[..., Tensor]) -> None:
        """The same, each launch by Triton and under its name in a profiler's trace."""
        for step in self._steps:
            for i, size, stride, dtype in step.buffers:
                values[i] = empty(size, stride, dtype)
            step.run(values)
            for i in step.dead:
                values[i] = None
        launches = [step for step in self._steps if isinstance(step, _Launch)]
        if self._direct is None and launches and all(step.compiled is not None for step in launches):
            self._direct = [
                (s.buffers, s.direct() if isinstance(s, _Launch) else None, s, s.arguments, s.dead) for s in self._steps
            ]


def _needed(steps: Sequence[_Step], results: set[int]) -> list[_Step]:
    """The steps without calls whose result nobody takes, such as views that were asked for their strides."""
    used = set(results)
    needed: list[_Step] = []
    for step in reversed(steps):
        # (the last step stays with the buffers it was given: nobody behind it could take them)
        if step.result is None or step.result in used or (step.buffers and not needed):
            used.update(step.indices)
            needed.append(step)
        elif step.buffers:
            needed[-1].buffers = (*step.buffers, *needed[-1].buffers)
    return needed[::-1]


def _drop_dead(steps: Sequence[_Step], results: set[int]) -> None:
    """Say of each step which of the plan's buffers it is the last to take."""
    made = {buffer[0] for step in steps for buffer in step.buffers} | {step.result for step in steps}
    last: dict[int, _Step] = {}
    for step in steps:
        for i in (*[buffer[0] for buffer in step.buffers], *step.indices, step.result):
            if i is not None and i in made and i not in results:
                last[i] = step
    for i, step in last.items():
        step.dead = (*step.dead, i)


def _getter(indices: tuple[int, ...]) -> Callable[[list[Any]], tuple[Any, ...]]:
    """The values at these places, as a tuple."""
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda values: tuple([values[i] for i in indices])


@functools.cache
def _parameters(kernel: Any) -> list[tuple[str, Any]]:
    """A kernel's arguments and their defaults."""
    return [(p.name, p.default) for p in inspect.signature(kernel.fn).parameters.values()]


def _meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _allocator_like(t: Tensor) -> Callable[..., Tensor]:
    """empty_strided(size, stride, dtype) by torch, on the device of ``t``."""
    return lambda size, stride, dtype: t.new_empty_strided(size, stride, dtype=dtype)
