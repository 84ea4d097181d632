"""Which backend a call takes, device guard, float32 precision, autocast, seeds."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
from typing import Any, Literal

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from tkernels.core import _torch, settings, targets

BACKENDS = settings.BACKEND.allowed
HAS_TRITON = importlib.util.find_spec("triton") is not None
# float64 has no tensor cores worth the name and is what people check against: PyTorch on any device.
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Op = Literal["conv", "matmul"]
# ends the error under backend 'triton'
ADVICE = "; `python -m tkernels` says what is missing here and what each operator takes"


# A wrong one raises where it is used: a command can say so in a line, where a failed import is a traceback
_backend = settings.BACKEND.choice()


class backend:
    """Choose how operators run, for the whole process: for good, or as a context manager until its block ends.

    Args:
        name: ``'auto'`` takes Triton where every tensor is on a supported GPU, and PyTorch elsewhere. ``'triton'``
            raises RuntimeError where Triton cannot run (float64 goes to PyTorch even so, and what an operator's page
            leaves to it). ``'torch'`` takes PyTorch, on a CPU with the compiled passes, which TKERNELS_COMPILE=0 leaves
            out. The environment variable TKERNELS_BACKEND sets the start value.

    Raises:
        ValueError: For another name.

    Examples:
        >>> with tkernels.backend("torch"):
        ...     tkernels.get_backend()
        'torch'
    """

    def __init__(self, name: str) -> None:
        global _backend
        self._previous = _backend
        _backend = settings.BACKEND.checked(name, "backend")

    def __enter__(self) -> backend:
        return self

    def __exit__(self, *exc: object) -> None:
        global _backend
        _backend = self._previous


def get_backend() -> str:
    """The backend in force: ``'auto'``, ``'triton'`` or ``'torch'``.

    Raises:
        ValueError: Where the environment variable TKERNELS_BACKEND names another.

    Examples:
        >>> with tkernels.backend("triton"):
        ...     tkernels.get_backend()
        'triton'
    """
    return settings.BACKEND.checked(_backend)


# triton itself asks once, as it defines a kernel
_INTERPRETING = HAS_TRITON and settings.INTERPRET.is_on()


def interpreting() -> bool:
    """Whether Triton's interpreter is on (TRITON_INTERPRET=1), which runs kernels on CPU tensors."""
    return _INTERPRETING


def asks_choosers(cudnn: bool = False) -> bool:
    """Whether products may be PyTorch's where that is faster: under 'auto' and, whoever runs the interpreter wants to
    see kernels, not in it. ``cudnn``: they would be cuDNN's, unless that is turned off; PyTorch's own are slower."""
    return get_backend() == "auto" and not _INTERPRETING and (not cudnn or torch.backends.cudnn.enabled)


def why_not_triton(*tensors: Tensor | None) -> str | None:
    """The reason why these tensors cannot go through Triton, or None where they can."""
    if not HAS_TRITON:
        return "triton is not installed"
    if jit_traced():
        return "torch.jit.trace and the ONNX exporter record PyTorch's operators, and a kernel's launch is none"
    if transformed():
        return "kernels are not defined under torch.func transforms (grad, vmap, jvp, ...) and forward-mode AD"
    for t in tensors:
        if t is not None and t.is_floating_point() and t.dtype not in TRITON_DTYPES:
            return f"{t.dtype} is left to PyTorch"
        if t is not None and _wraps_others(t):
            return f"a {type(t).__name__} has no storage of its own"
        if t is not None and t.is_neg():
            return "a view of a conjugate's imaginary part is stored with the opposite sign"
    for t in tensors:
        if t is not None and not t.is_cuda and (t.is_meta or not interpreting()):
            return f"a tensor is on {t.device}, not on a GPU"
    if not (interpreting() or targets.supported()):
        return "the GPU is older than compute capability 8.0"
    return None


def is_torch_call(first: Any) -> bool:
    """Whether a call whose first argument is ``first``, a tensor or not, is PyTorch's whatever the others are.

    The everyday answer on a CPU, in a tenth of use_triton's time: a small layer takes 10 us there.
    """
    if _backend == "auto":
        return not (_INTERPRETING or getattr(first, "is_cuda", False))
    return _backend == "torch"


def use_triton(*tensors: Tensor | None) -> bool:
    """The one decision between Triton and PyTorch. ``None`` entries are skipped.

    Raises RuntimeError under backend 'triton' where Triton cannot run, ValueError for the environment's wrong name.
    """
    if settings.BACKEND.checked(_backend) == "torch":
        return False
    if _can_run(tensors):
        return True
    if _backend == "triton" and not any(t is not None and t.dtype == torch.float64 for t in tensors):
        found = "" if _INTERPRETING or torch.cuda.is_available() else " (torch finds no GPU here)"
        raise RuntimeError(f"backend 'triton' was asked for, but {why_not_triton(*tensors)}{found}{ADVICE}")
    return False


def _wraps_others(t: Tensor) -> bool:
    """Whether ``t`` is made of other tensors (a DTensor, a quantised weight): PyTorch's operators know what to do."""
    return type(t) not in (Tensor, torch.nn.Parameter) and hasattr(t, "__tensor_flatten__")


def transformed() -> bool:
    """Whether a torch.func transform, forward-mode AD or torch.jit.trace is at work: they see PyTorch's operators only,
    and a kernel's output would have no tangent, or be a constant of the trace, silently."""
    return not torch.compiler.is_compiling() and transformed_eager_call()


def transformed_eager_call() -> bool:
    """The same of a call that nobody compiles."""
    return _torch.is_transformed() or _torch.forward_ad_level() >= 0 or _torch.is_jit_tracing()


def plain_eager() -> bool:
    """Whether calls run as they are: no tracing, no transforms, no modes that want to see each ATen call.

    Ask torch.compiler.is_compiling() first of all, or a trace is guarded by sizes and modes that it need not know.
    """
    return not (
        _torch.is_jit_tracing()
        or _torch.count_dispatch_modes() > 0
        or _torch.innermost_transform() is not None
        or _torch.forward_ad_level() >= 0
    )


def _can_run(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether why_not_triton has no reason; every call asks this, so nothing is put into words."""
    if not HAS_TRITON or transformed():
        return False
    anywhere, eager = interpreting(), not torch.compiler.is_compiling()
    for t in tensors:
        if t is not None:
            if not (t.is_cuda or (anywhere and not t.is_meta)):
                return False
            if t.dtype not in TRITON_DTYPES and t.is_floating_point():
                return False
            # stored negated, as z.conj().imag is (in a trace, operators get what is resolved)
            if _wraps_others(t) or (eager and t.is_neg()):
                return False
    return anywhere or targets.supported()


def traced() -> bool:
    """Whether torch records this call rather than runs it (compile, export, fake tensors, make_fx) or counts its FLOPs:
    then launches go through the operators registered for them, torch.ops.tkernels.*, and nothing is planned."""
    if torch.compiler.is_compiling():
        return True
    return _torch.count_dispatch_modes() > 0 and _recorded()


def jit_traced() -> bool:
    """Whether torch.jit.trace records this call, as the ONNX exporter without Dynamo does: sizes are tensors then."""
    return not is_dynamo_compiling() and _torch.is_jit_tracing()


def _recorded() -> bool:
    """Whether one of the dispatch modes that are on records or counts operators. Launches on a pretended GPU are
    intercepted, fake tensors or not."""
    modes = _torch.DispatchModeKey
    for key in (modes.FAKE, modes.PROXY, modes.FUNCTIONAL):
        if _torch.dispatch_mode_of(key) is not None:
            return not targets.pretending()
    return any(type(mode).__name__ == _torch.FLOP_COUNTER_MODE for mode in _torch.dispatch_modes())


@functools.cache
def log_once(message: str, level: int = logging.INFO) -> None:
    """Say it to the logger 'tkernels', the first time."""
    logging.getLogger("tkernels").log(level, message)


def device_guard(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; make that the device of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache  # torch asks the driver each time where there is none
def several_gpus() -> bool:
    """Whether the current device may be another than a tensor's."""
    return torch.cuda.device_count() > 1


def dot_precision(dtype: torch.dtype, op: Op) -> str:
    """``input_precision`` for ``tl.dot``: torch's own float32 switches decide, 16-bit operands need none.

    ``op`` 'conv' reads torch.backends.cudnn.conv (tf32 by default), 'matmul' reads torch.backends.cuda.matmul
    (IEEE by default).
    """
    if dtype != torch.float32:
        return "ieee"
    switch: Any = getattr(torch.backends.cudnn, "conv") if op == "conv" else torch.backends.cuda.matmul  # noqa: B009
    wants_tf32 = switch.fp32_precision == "tf32"
    return "tf32" if wants_tf32 and targets.current().has_tf32 else "ieee"


def float32_products() -> tuple[str, str]:
    """How float32 products are formed, by linear and matmul and by convolutions."""
    return dot_precision(torch.float32, "matmul"), dot_precision(torch.float32, "conv")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype torch.autocast asks for on the device of ``x``, or None where autocast is off."""
    device_type = "cuda" if x.is_cuda else x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def cast_for_autocast(dtype: torch.dtype | None, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast floating tensors (float64 excepted, as torch.autocast does) to ``dtype``; None means no autocast."""
    if dtype is None:
        return tensors
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def dropout_seed(x: Tensor) -> Tensor:
    """A fresh int64 seed, shape (), on the device of ``x``, drawn from that device's generator.

    torch.manual_seed governs it, a CUDA graph replay advances it, and nothing waits for the device.
    """
    if torch.compiler.is_compiling():  # Inductor's own generator overflows on the full range
        return torch.randint(0, 2**62, (), dtype=torch.int64, device=x.device)
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=x.device)
