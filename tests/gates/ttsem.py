"""The ttsem gate: every launch is compiled to TTIR and executed on the CPU, with bounds, race and poison checks.

ttsem 0.1.0 leaves four gaps, closed here: masked-off lanes of a load without ``other=`` read as 0 (on a GPU they
hold anything), bounds are those of the storage instead of the view, what a kernel stores through a host
TensorDescriptor is lost, and a load that drops a descriptor's leading axes of 1 keeps them.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import numpy as np
import pytest
import torch
import triton

OLDEST_TRITON = (3, 7)


def open_session(stack: contextlib.ExitStack, compute_capability: int = 90) -> Any:
    """Enter a ttsem session for the life of ``stack``; returns its state (launches, races_unchecked)."""
    sanitize = _sanitizer()
    _poison_masked_lanes()
    _bound_by_view()
    _drop_leading_axes()
    _compile_once()
    _fused_multiply_add_at_once()
    _never_print_tensors()
    return stack.enter_context(sanitize.session(compute_capability, "<pytest>"))


def _sanitizer() -> Any:
    """Raises pytest.UsageError, which ends the run with this one line, where the gate cannot run."""
    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if release < OLDEST_TRITON:
        raise pytest.UsageError(f"TK_GATE=ttsem wants triton 3.7 or newer: ttsem cannot read the IR of "
                                f"{triton.__version__}")  # fmt: skip
    try:
        from ttsem import sanitize
    except ModuleNotFoundError as error:
        raise pytest.UsageError(f"TK_GATE=ttsem wants ttsem (make test installs it): {error}") from error
    return sanitize


def _poison_masked_lanes() -> None:
    from ttsem.memory import Memory

    original = Memory.load

    def load(self: Any, addrs: Any, mask: Any, other: Any, dtype: Any) -> Any:
        if other is None and mask is not None:
            dtype = np.dtype(dtype)
            ones = np.full(dtype.itemsize, 0xFF, np.uint8)
            other = True if dtype == np.bool_ else ones.view(dtype)[0]
        return original(self, addrs, mask, other, dtype)

    Memory.load = load


def _never_print_tensors() -> None:
    """``tensor.to`` asks each argument for its text to see if it names a GPU, the tensor itself too: slow, and
    under autocast printing raises for some dtypes."""
    from ttsem import sanitize

    original = sanitize._is_cuda
    sanitize._is_cuda = lambda device: not isinstance(device, torch.Tensor) and original(device)


def _span(tensor: Any) -> torch.Tensor:
    """The elements from a tensor's first to its last as one flat view."""
    from ttsem import harness

    t = harness._unwrap(tensor)
    length = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride())) if t.numel() else 0
    # .data has a version counter of its own: kernels write behind autograd's back, on a GPU too
    return t.data.as_strided((length,), (1,), t.storage_offset())


def _bound_by_view() -> None:
    from ttsem import harness, sanitize

    def storage_copy(tensor: Any) -> tuple[int, np.ndarray]:
        view = _span(tensor)
        return int(view.data_ptr()), harness._to_numpy(view)

    def write_back(record: Any, execution: Any) -> None:
        for name, value in record.bound.items():
            for leaf, v in harness._flat_args(name, value):
                v = v.base if harness._is_descriptor(v) else v
                if leaf not in record.ptrs or not harness._is_tensor_like(v):
                    continue
                got = execution.buffer(record, leaf)
                if got is None:
                    continue
                flat = _span(v)
                raw = torch.from_numpy(np.ascontiguousarray(got).reshape(-1).view(np.uint8).copy())
                flat.view(torch.uint8).copy_(raw[: flat.numel() * flat.element_size()])

    harness.storage_copy = storage_copy
    sanitize._write_back = write_back


def _drop_leading_axes() -> None:
    """Triton makes one load of ``desc.load(...).reshape(...)`` where that leaves out axes of 1."""
    from ttsem import ops

    whole = ops.OPS["tt.descriptor_load"]

    def load(interp: Any, op: Any, args: Any) -> Any:
        return [np.reshape(block, ops._rty(op).shape) for block in whole(interp, op, args)]

    ops.OPS["tt.descriptor_load"] = load


def _compile_once() -> None:
    """Stop at TTIR (no ptxas), compile and parse each specialisation once a process: that dominates otherwise."""
    from ttsem import harness, mlir

    memo: dict[tuple[Any, ...], str] = {}

    def ir_for_launch(record: Any, stage: str, target: Any, *args: Any, **kwargs: Any) -> str:
        options, signature, constexprs, attrs = harness._specialize(record.fn, record.args, record.kwargs, target)
        key = (record.fn.cache_key, id(record.fn), repr(signature), repr(constexprs), repr(attrs), repr(options), stage)
        if key not in memo:
            mlir.enable_generic_printing()
            memo[key] = mlir.to_generic(harness._stage_text(record, "ttir", target), None)
        return memo[key]

    harness.ir_for_launch = ir_for_launch
    mlir.parse = functools.lru_cache(maxsize=None)(mlir.parse)


def _fused_multiply_add_at_once() -> None:
    """``tl.fma`` in float32 for whole tiles; ttsem computes it element by element in rationals, 500 times as slow.

    The product of two float32 is exact in float64; the sum is rounded to odd there (its error is known exactly from
    Knuth's two-sum), after which rounding to float32 gives the one correct rounding (Boldo and Melquiond, 2008).
    """
    from ttsem import ops

    one_by_one = ops.OPS["math.fma"]

    def fma(interp: Any, op: Any, args: Any) -> Any:
        result = ops._rty(op)
        if result.scalar.name != "f32":
            return one_by_one(interp, op, args)
        a, b, c = (ops.to_float(x, op.operand_types[i]).astype(np.float64) for i, x in enumerate(args[:3]))
        return [ops.from_float(multiply_add(a, b, c), result)]

    ops.OPS["math.fma"] = fma


@np.errstate(all="ignore")
def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c for float32 values held in float64, rounded to odd in float64."""
    product = a * b
    total = product + c
    from_c = total - product
    error = (product - (total - from_c)) + (c - from_c)
    even = (np.ascontiguousarray(total).view(np.int64) & 1) == 0
    inexact = np.isfinite(total) & (error != 0) & even
    return np.where(inexact, np.nextafter(total, np.copysign(np.inf, error)), total)
