"""The interpreter gate: Triton's own interpreter on CPU tensors, a second opinion on values.

Two of its faults (Triton 3.5 to 3.9) are mended here: a bf16 ``tl.dot`` multiplies raw bits, and masked-off lanes
of a load without ``other=`` read as 0. It ignores ``input_precision`` and cannot see out-of-bounds loads or races.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def patch() -> None:
    """Mend the interpreter for this process. TRITON_INTERPRET=1 must have been set before triton was imported."""
    _multiply_bf16_as_float32()
    _poison_masked_lanes()


def _multiply_bf16_as_float32() -> None:
    import triton.language as tl
    import triton.runtime.interpreter as it

    original = it.InterpreterBuilder.create_dot

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        data = it._convert_float(operand.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return it.TensorHandle(data, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return original(self, widened(a), widened(b), d, *rest)

    it.InterpreterBuilder.create_dot = create_dot


def _poison_masked_lanes() -> None:
    import triton.runtime.interpreter as it

    original = it.InterpreterBuilder.create_masked_load

    def create_masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **kwargs: Any) -> Any:
        if other is None:
            dtype = ptrs.get_element_ty()
            as_numpy = np.dtype(it._get_np_dtype(dtype))
            raw = np.full((*ptrs.data.shape, as_numpy.itemsize), 0xFF, np.uint8).view(as_numpy)
            other = it.TensorHandle(raw.reshape(ptrs.data.shape), dtype)
        return original(self, ptrs, mask, other, *rest, **kwargs)

    it.InterpreterBuilder.create_masked_load = create_masked_load
