"""What an operator allocates and launches, recorded once for each kind of call and replayed.

Between two launches an operator looks at shapes, chooses configurations and allocates, and for tensors of the same
kind it always comes to the same. The third call of a kind runs as straight-line code made of what the second one did:
``empty_strided`` for each buffer and each kernel's ``run``, or, where launches are fast, the compiled kernel's
launcher itself. TKERNELS_REPLAY=0 turns it off; who watches (a dispatch mode, a profiler), autotuning and Triton's
interpreter see the operator as it is written.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tkernels.core import autotune, launch, settings, targets
from tkernels.core import mode as runtime

Tensors = tuple[Tensor | None, ...]
Body = Callable[..., Tensors]

# kinds of calls a function keeps: whoever has more has shapes that never come back
_MOST_KINDS = 1024
_on = settings.REPLAY.is_on()
_SEEN, _NEVER = object(), object()
_aten = torch.ops.aten
_ALLOCATIONS = frozenset((
    _aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default,
    _aten.new_empty_strided.default,
))  # fmt: skip
# buffers and views of a program
_NAME = re.compile(r"\b[av]\d+\b")


@contextlib.contextmanager
def enabled(on: bool) -> Iterator[None]:
    """Within the block calls are replayed, or are not, whatever the environment says."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


def forget() -> None:
    """Drop all recordings."""
    for function in _functions:
        function.kinds.clear()
    for found in _checked:
        found.clear()


def replayed(body: Body) -> Replayed:
    """Decorator of ``body(tensors, *static)``, which returns a tuple of tensors and Nones.

    The first tensor is not None; ``static`` is hashable. What ``body`` does may depend on it, on the tensors' dtypes,
    shapes, strides, device and alignment to 16 bytes, on the target and on torch's float32 switches, never on values
    or on anything else; it draws no random numbers.
    """
    return Replayed(body)


class Replayed:
    """A function that replays its body."""

    def __init__(self, body: Body) -> None:
        self.body = body
        self.kinds: dict[Hashable, Any] = {}
        functools.update_wrapper(self, body)
        _functions.append(self)

    def __call__(self, tensors: Tensors, *static: Any) -> Tensors:
        if not as_usual():
            return self.body(tensors, *static)
        return self._known(kind(tensors), tensors, static)

    def of_kind(self, known: Hashable | None, tensors: Tensors, *static: Any) -> Tensors:
        """The same where the caller has already looked at the tensors: ``known`` is equal for tensors of a kind, None
        where that is not known."""
        if known is None:
            return self(tensors, *static)
        return self._known(known, tensors, static)

    def _known(self, known: Hashable, tensors: Tensors, static: tuple[Any, ...]) -> Tensors:
        key = known, static
        found = self.kinds.get(key)
        if found.__class__ is Program:
            if found.direct is not None and launch.is_fast(found.kernels):
                return found.direct(*tensors)
            return found.run(*tensors)
        if found is _SEEN:
            return self._record(key, tensors, static)
        if found is None:
            if len(self.kinds) >= _MOST_KINDS:
                self.kinds.clear()
            self.kinds[key] = _SEEN
        return self.body(tensors, *static)

    def _record(self, key: Hashable, tensors: Tensors, static: tuple[Any, ...]) -> Tensors:
        first: Any = tensors[0]
        if runtime.several_gpus() and first.get_device() != targets.identity():
            return self.body(tensors, *static)  # which launches on the tensors' device
        storages = [t.untyped_storage()._cdata for t in tensors if t is not None]
        if len(set(storages)) < len(storages):
            # which of two names for the same memory is meant cannot be seen
            return self.body(tensors, *static)
        recorder = Recorder(tensors)
        with recorder, launch.made_by(recorder.launch):
            results = self.body(tensors, *static)
        self.kinds[key] = recorder.program(results) or _NEVER
        return results


_functions: list[Replayed] = []


def kind(tensors: Tensors) -> tuple[Hashable, ...]:
    """What of these tensors, the first of which is one, an operator's decisions may depend on."""
    first: Any = tensors[0]
    precision = runtime.float32_products() if first.dtype is torch.float32 else None
    return (targets.identity(), precision, *[
        t if t is None else (t.__class__, t.dtype, t.shape, t.stride(), t.data_ptr() & 15, t.get_device(), t.is_neg())
        for t in tensors
    ])  # fmt: skip


def call_kind(tensors: Tensors, *arguments: Any) -> Hashable | None:
    """What all decisions of an operator's call depend on, backend and autocast included: where one call passed the
    checks and went to Triton, others of its kind do. None where that cannot be said."""
    if not as_usual():
        return None
    first: Any = tensors[0]
    try:
        found = (
            kind(tensors), arguments, runtime.autocast_dtype(first), runtime.get_backend(), runtime.transformed(),
        )  # fmt: skip
        hash(found)
    except (AttributeError, TypeError, RuntimeError):  # lists, not what they should be, or without strides
        return None
    return found


class Checked:
    """What an operator found out about kinds of calls that passed its checks."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] = {}
        _checked.append(self._found)

    def get(self, call: Hashable | None) -> Any:
        """What was found out, None where nothing was."""
        return None if call is None else self._found.get(call)  # (a trace, which knows no kinds, stays out of it)

    def add(self, call: Hashable | None, value: Any = True) -> None:
        """Remember; None is not remembered."""
        if call is not None:
            if len(self._found) >= _MOST_KINDS:
                self._found.clear()
            self._found[call] = value


_checked: list[dict[Hashable, Any]] = []


def as_usual() -> bool:
    """Whether nobody watches the calls in between and nothing decides anew from call to call."""
    if torch.compiler.is_compiling() or not _on:  # first of all, lest a trace learns of the rest
        return False
    if torch._C._len_torch_dispatch_stack() or torch.autograd._profiler_enabled():
        return False
    return not (autotune.enabled or runtime.interpreting())


class Program:
    """A recording as two functions of the tensors. ``run``: through each kernel's run; ``direct``: past it, None where
    what was launched is not Triton's compiled kernel."""

    def __init__(
        self, run: Callable[..., Tensors], direct: Callable[..., Tensors] | None, kernels: frozenset[Any]
    ) -> None:
        self.run, self.direct, self.kernels = run, direct, kernels


class Recorder(TorchDispatchMode):
    """Writes down the calls that make or change memory, and the launches.

    A tensor is known by the storage it lies in: views need no record, they are made where something takes them.
    """

    def __init__(self, inputs: Tensors) -> None:
        super().__init__()
        self._inputs = inputs
        self._sound = True
        self._count = itertools.count()
        # keeps storages from being used again while the recording lasts
        self._alive: list[Any] = []
        self._owners: dict[int, tuple[str, Tensor]] = {}
        self._views: dict[tuple[Any, ...], str] = {}
        self._lines: list[Line] = []
        self._kernels: set[Any] = set()
        # the lines of allocations
        self._buffers: dict[str, int] = {}
        self._space: dict[str, Any] = {"streams": launch.current_stream}
        for i, t in enumerate(inputs):
            if t is not None:
                self._own(f"t{i}", t)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        found = result if isinstance(result, (tuple, list)) else (result,)
        made = [t for t in found if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self._owners]
        if func in _ALLOCATIONS:
            self._allocated(result)
        elif made or func._schema.is_mutable:
            self._computed(func, args, kwargs, result)
        elif not all(isinstance(t, Tensor) for t in found):
            self._sound = False  # a value came to the host
        return result

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Make a launch and write it down."""
        with _disable_current_modes():  # what launches is none of the operator's calls
            compiled = kernel[grid](*args, **options)
        texts = [self._text(a) for a in args]
        number = next(self._count)
        self._kernels.add(kernel)
        self._space[f"k{number}"], self._space[f"g{number}"] = kernel, grid
        self._space[f"o{number}"] = options
        run = f"k{number}.run({', '.join([*texts, f'grid=g{number}, warmup=False'])}, **o{number})"
        direct = None
        if launch.is_compiled(compiled):
            given = dict(zip(kernel.arg_names, texts)) | {name: self._text(value) for name, value in options.items()}
            bound = [given[p.name] if p.name in given else self._text(p.default) for p in kernel.params]
            size = ", ".join(str(n) for n in (*grid, 1, 1)[:3])
            direct = self._direct(compiled, size, ", ".join(bound))
        self._lines.append(Line(run, direct))

    def _direct(self, compiled: Any, grid: str, bound: str) -> str:
        call = launch.driver_call(compiled)
        if call is not None:
            function, between, in_a_tuple = call
            last = f"({bound},)" if in_a_tuple else bound
            return f"{self._constant(function)}({grid}, stream, {', '.join(map(self._constant, between))}, {last})"
        options = f"{self._constant(compiled.function)}, {self._constant(compiled.packed_metadata)}"
        return f"{self._constant(compiled.run)}({grid}, stream, {options}, None, None, None, {bound})"

    def program(self, results: Tensors) -> Program | None:
        """The recording as a program, None where it cannot be one."""
        texts = [self._text(t) for t in results]
        if not self._sound:
            return None
        names = ", ".join(f"t{i}" for i in range(len(self._inputs)))
        end = f"return ({''.join(f'{text}, ' for text in texts)})"
        run = self._compile(names, [line.run for line in self._lines], end)
        direct = [line.direct for line in self._lines if line.direct is not None]
        if len(direct) < len(self._lines):
            return Program(run, None, frozenset())
        device = next(t.device for t in self._inputs if t is not None)
        self._space["device"] = device.index or 0
        return Program(run, self._compile(names, ["stream = streams(device)", *direct], end), frozenset(self._kernels))

    def _compile(self, names: str, lines: Sequence[str], end: str) -> Callable[..., Tensors]:
        text = "\n    ".join([f"def replay({names}):", *_with_ends(lines, end), end])
        space = dict(self._space)
        exec(text, space)
        function: Callable[..., Tensors] = space["replay"]
        return function

    def _own(self, name: str, t: Tensor) -> str:
        self._alive.append(t)
        self._owners[t.untyped_storage()._cdata] = name, t
        self._views[_region(t)] = name
        return name

    def _mentioned(self, name: str) -> bool:
        """Whether a line takes this buffer."""
        used = re.compile(rf"\b{name}\b(?! =)")
        return any(used.search(line.run) for line in self._lines)

    def _allocated(self, t: Tensor) -> None:
        name = self._own(f"a{next(self._count)}", t)
        self._buffers[name] = len(self._lines)
        self._lines.append(Line.same(self._allocation(name, t)))

    def _allocation(self, name: str, t: Tensor) -> str:
        return f"{name} = {self._constant(_allocator(t))}({tuple(t.shape)}, {t.stride()}, {self._text(t.dtype)})"

    def _computed(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        text = ", ".join([*map(self._text, args), *(f"{k}={self._text(v)}" for k, v in kwargs.items())])
        call = f"{self._constant(func)}({text})"
        if isinstance(result, Tensor) and result.untyped_storage()._cdata not in self._owners:
            call = f"{self._own(f'a{next(self._count)}', result)} = {call}"
        elif not isinstance(result, Tensor):
            self._sound = False
        self._lines.append(Line.same(call))

    def _text(self, value: Any) -> str:
        """An argument as the program names it."""
        if isinstance(value, Tensor):
            return self._named(value)
        if isinstance(value, (list, tuple)):
            inner = "".join(f"{self._text(v)}, " for v in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner})"
        if value is None or value is True or value is False or type(value) is int:
            return repr(value)
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        name = f"c{next(self._count)}"
        self._space[name] = value
        return name

    def _named(self, t: Tensor) -> str:
        self._alive.append(t)
        name = self._views.get(_region(t))
        if name is not None:
            return name
        owner = self._owners.get(t.untyped_storage()._cdata)
        if owner is None or owner[1].dtype != t.dtype:
            self._sound = False  # memory that the call was not given
            return "None"
        base, whole = owner
        buffer = self._buffers.pop(base, None)
        if buffer is not None and _covers(t, whole) and not self._mentioned(base):
            # nobody has seen the buffer in another form: it is made in this one
            del self._views[_region(whole)]
            self._lines[buffer] = Line.same(self._allocation(base, t))
            self._owners[t.untyped_storage()._cdata] = base, t
            self._views[_region(t)] = base
            return base
        offset = t.storage_offset() - whole.storage_offset()
        place = f", {base}.storage_offset() + {offset}" if offset else ""
        name = self._views[_region(t)] = f"v{next(self._count)}"
        self._lines.append(Line.same(f"{name} = {base}.as_strided({tuple(t.shape)}, {t.stride()}{place})"))
        return name


class Line:
    """A line of a program, in both of its forms."""

    def __init__(self, run: str, direct: str | None) -> None:
        self.run, self.direct = run, direct

    @classmethod
    def same(cls, text: str) -> Line:
        return cls(text, text)


def _allocator(t: Tensor) -> Callable[..., Tensor]:
    """empty_strided(size, stride, dtype) on the device of ``t``."""
    kind, device = "cpu" if t.get_device() < 0 else t.device.type, t.device
    # the call that Inductor's own code makes, at half the price of torch.empty_strided's; it fills nothing
    quick = getattr(torch._C._dynamo.guards, f"_empty_strided_{kind}", None)
    if quick is not None and not torch.are_deterministic_algorithms_enabled():
        return quick
    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device)


def _region(t: Tensor) -> tuple[Any, ...]:
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype


def _covers(t: Tensor, whole: Tensor) -> bool:
    """Whether a view is the whole buffer in another order."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return bool(t.numel() == whole.numel() == reach and t.storage_offset() == whole.storage_offset())


def _with_ends(lines: Sequence[str], end: str) -> list[str]:
    """The lines, with each buffer and view dropped after its last use, as the operator's own frames would drop it."""
    last: dict[str, int] = {}
    for i, line in enumerate([*lines, end]):
        for name in _NAME.findall(line):
            last[name] = i
    dropped: dict[int, list[str]] = {}
    for name, i in last.items():
        dropped.setdefault(i, []).append(name)
    found = []
    for i, line in enumerate(lines):
        found.append(line)
        if i in dropped:
            found.append(f"del {', '.join(dropped[i])}")
    return found
