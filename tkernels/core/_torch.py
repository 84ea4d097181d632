"""Every name of PyTorch, functorch, Dynamo, Inductor and Triton that is not public, under a plain name.

No other file of tkernels/ may say one (tests/test_architecture.py), so what a new release renames is repaired here. All
of them are in torch 2.9, the oldest release supported, and in 2.11 and 2.14; a line says where that is not so.

Functions are re-exported as they are: a wrapper would be one more Python call in every operator.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.overrides
import torch.utils._python_dispatch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack as without_transforms

__all__ = ["without_transforms"]  # a context: no functorch transform sees the calls made in it

_C: Any = torch._C
_functorch: Any = torch._C._functorch

# --- Who is watching: traces, modes, transforms, the profiler
# Whether torch.jit.trace, or the ONNX exporter without Dynamo, records.
is_jit_tracing: Callable[[], bool] = _C._is_tracing
# How many dispatch modes (fake tensors, make_fx, counters of FLOPs) see each ATen call of this thread.
count_dispatch_modes: Callable[[], int] = _C._len_torch_dispatch_stack
# The mode of a kind that torch itself defines, or None; DispatchModeKey names the kinds: FAKE, PROXY, FUNCTIONAL.
dispatch_mode_of: Callable[[Any], Any] = _C._get_dispatch_mode
DispatchModeKey: Any = _C._TorchDispatchModeKey
# All of them, the outermost first.
dispatch_modes: Callable[[], list[Any]] = torch.utils._python_dispatch._get_current_dispatch_mode_stack
# The class of the mode by which torch.utils.flop_counter counts.
FLOP_COUNTER_MODE = "_FlopCounterMode"
# The same of modes that see each call of a torch function, a default device among them.
count_function_modes: Callable[[], int] = _C._len_torch_function_stack
pop_function_mode: Callable[[], Any] = torch.overrides._pop_mode
push_function_mode: Callable[[Any], None] = torch.overrides._push_mode
# Whether a torch.func transform (grad, vmap, jvp, ...) is at work.
is_transformed: Callable[[], bool] = _C._are_functorch_transforms_active
# The innermost transform, functionalization included, or None.
innermost_transform: Callable[[], Any] = _functorch.peek_interpreter_stack
# The level of forward-mode AD, -1 outside of it. The variable is read at each call, without a Python frame.
forward_ad_level: Callable[[], int] = functools.partial(getattr, torch.autograd.forward_ad, "_current_level")
# Whether torch.profiler, or the older torch.autograd.profiler, is on.
is_profiled: Callable[[], bool] = torch.autograd._profiler_enabled
# torch.backends.cudnn.enabled, in a tenth of the time that this takes.
cudnn_is_enabled: Callable[[], bool] = _C._get_cudnn_enabled

# --- Tensors that stand for others
# Whether a torch.func transform wraps a tensor: batched, tracking gradients or functional.
is_wrapped: Callable[[Tensor], bool] = _functorch.is_functorch_wrapped_tensor
# A context in which functions of a user's tensor class (__torch_function__) are not called.
without_torch_function: Any = _C.DisableTorchFunctionSubclass
# One in which __torch_function__ is called: a tensor class whose method runs backward has it off until that ends.
with_torch_function: Any = _C._EnableTorchFunction
# Whether a tensor is a batch of torch.vmap's.
is_batched: Callable[[Tensor], bool] = _functorch.is_batchedtensor
# The level of its transform, -1 without one; the tensor of a level with the axis of its batch; the way back.
level_of: Callable[[Tensor], int] = _functorch.maybe_get_level
unwrap_batch: Callable[[Tensor, int], tuple[Tensor, int]] = _functorch._unwrap_batched
wrap_batch: Callable[[Tensor, int, int], Tensor] = _functorch._add_batch_dim
# The same of the batches that is_grads_batched=True makes, which are none of torch.vmap's.
is_legacy_batched: Callable[[Tensor], bool] = _functorch.is_legacy_batchedtensor
unwrap_legacy_batch: Callable[[Tensor, int, int, int], Tensor] = torch._remove_batch_dim
wrap_legacy_batch: Callable[[Tensor, int, int], Tensor] = torch._add_batch_dim


def legacy_batch_level() -> int:
    """The level of the innermost batch that is_grads_batched=True made."""
    level: int = _C._vmapmode_increment_nesting() - 1
    _C._vmapmode_decrement_nesting()
    return level


# --- Autograd and memory
# DelayedError(message, count): a node that passes tensors on and raises where they are differentiated.
DelayedError: Any = _C._functions.DelayedError
# The innermost saved_tensors_hooks, or None; the argument says whether to look past those that are switched off.
hooks_on_saved: Callable[[bool], Any] = _C._autograd._top_saved_tensors_default_hooks
# By kind of device: empty_strided(size, stride, dtype) as Inductor's own code calls it, at half the price of
# torch.empty_strided; it fills nothing.
QUICK_ALLOCATORS: dict[str, Callable[..., Tensor]] = {
    kind: getattr(_C._dynamo.guards, f"_empty_strided_{kind}")
    for kind in ("cpu", "cuda")
    if hasattr(_C._dynamo.guards, f"_empty_strided_{kind}")
}
# How many tensors and variables hold the storage of an address.
count_storage_uses: Callable[[int], int] = _C._storage_Use_Count


def storage_address(storage: torch.UntypedStorage) -> int:
    """What tells a storage from others, fake ones included; what count_storage_uses takes."""
    return storage._cdata


# --- Operators
# A view that autograd takes for a tensor of its own, which may be written to.
unsafe_view: Any = torch.ops.aten._unsafe_view
# Adds a number to each tensor of a list, in place and in one launch.
foreach_add_: Any = torch._foreach_add_
# What torch.nn.functional calls, in C: linear, leaky_relu, gelu, silu, cross_entropy_loss.
nn_functions: Any = _C._nn
# A loss's reduction by the deprecated size_average and reduce, and as ATen's number, with the warning for an old name.
reduction_of_old_arguments: Callable[..., str] = nn._reduction.legacy_get_string
reduction_number: Callable[[str], int] = nn._reduction.get_enum
# oneDNN's, by name; None in a torch without oneDNN (packed.enabled). conv_into writes to the tensor that it adds to.
_mkldnn = torch.ops.mkldnn
onednn_conv: Any = getattr(_mkldnn, "_convolution_pointwise", None)
onednn_conv_into: Any = getattr(getattr(_mkldnn, "_convolution_pointwise_", None), "binary", None)
onednn_pack_conv_weight: Any = getattr(_mkldnn, "_reorder_convolution_weight", None)
onednn_linear: Any = getattr(_mkldnn, "_linear_pointwise", None)
onednn_has_bfloat16: Any = getattr(_mkldnn, "_is_mkldnn_bf16_supported", None)


def when_operator_is_missing(namespace: str, define: Callable[[str], None]) -> None:
    """Have ``define`` called where torch.ops.``namespace`` is asked for an operator of a name that it does not have."""
    operators = getattr(torch.ops, namespace)

    class Late(type(operators)):  # type: ignore[misc]
        # an operator's is made of it, and Inductor's cache finds operators by that
        __module__ = type(operators).__module__

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name.startswith("__"):
                    raise
            define(name)
            return super().__getattr__(name)

    operators.__class__ = Late


def tell_flop_counters(operator: Any) -> None:
    """Of a formula that was registered just now: those that are counting have copied the table before."""
    for mode in dispatch_modes():
        if type(mode).__name__ == FLOP_COUNTER_MODE:
            mode.counter.flop_registry[operator] = torch.utils.flop_counter.flop_registry[operator]


# --- Modules
# Attributes of torch.nn.Module (the last one: of batch norms) that any file may read where they are.
MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
MODULE_ATTRIBUTES = (
    *MODULE_HOOKS, "_parameters", "_buffers", "_modules", "_call_impl", "_compiled_call_impl", "_check_input_dim",
)  # fmt: skip
# The base class of BatchNorm1d, 2d, 3d and SyncBatchNorm.
AnyBatchNorm = torch.nn.modules.batchnorm._BatchNorm
# Whether a hook is registered for all modules.
has_global_hook: Callable[[], bool] = torch.nn.modules.module._has_any_global_hook


def global_hooks() -> dict[str, Any]:
    """The hooks of all modules, by the names of MODULE_HOOKS."""
    return {name: getattr(torch.nn.modules.module, f"_global{name}") for name in MODULE_HOOKS}


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that torch.compile has wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


# --- Dynamo's graphs
OpOverload = torch._ops.OpOverload
HigherOrderOperator = torch._ops.HigherOrderOperator
# Modules of torch whose functions run graphs or code of the user: their names do not tell what they write.
MODULES_OF_OTHERS_CODE = ("torch._higher_order_ops", "torch._library")
# The call that each module's constructor makes and that computes nothing, by name.
LOGS_API_USAGE = "_log_api_usage_once"


# Parts of a module's path, as Dynamo writes it, that are no names of the user's.
PATH_NOISE = ("_modules", "__self__", "_orig_mod")
# Where a checkpointed graph's meta keeps what selective checkpointing decides by.
CHECKPOINT_CONTEXT = "_checkpoint_context_fn"


def is_mutable(operator: Any) -> bool:
    """Whether an OpOverload writes to an argument."""
    return bool(operator._schema.is_mutable)


def constant_in_traces(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: Dynamo takes the result for a constant. torch.compiler.assume_constant_result would import Dynamo."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# --- Dynamo and Inductor: imported when a name is first asked for. Dynamo cannot be where there is no folder for
# temporary files, and Inductor takes a second.
_LATE = {
    # what Dynamo raises where tracing an operator fails
    "TorchRuntimeError": "torch._dynamo.exc:TorchRuntimeError",
    # Dynamo's counters, by topic: "graph_break" counts reasons
    "dynamo_counters": "torch._dynamo.utils:counters",
    # the backend of a name
    "lookup_backend": "torch._dynamo:lookup_backend",
    # the table that torch.compile looks names up in
    "_backend_registry": "torch._dynamo.backends:registry",
    # held by whoever compiles in this process
    "compile_lock": "torch._dynamo.convert_frame:compile_lock",
    # a graph module that writes its code when it first runs, unless force_recompile was called
    "LazyGraphModule": "torch.fx._lazy_graph_module:_LazyGraphModule",
    "FakeTensorMode": "torch._subclasses.fake_tensor:FakeTensorMode",
    "functorch_config": "torch._functorch:config",
    "inductor_config": "torch._inductor:config",
    # a graph of ATen calls to compiled code: with autograd around it, and alone
    "compile_fx": "torch._inductor.compile_fx:compile_fx",
    "compile_fx_inner": "torch._inductor.compile_fx:compile_fx_inner",
    "_codecache": "torch._inductor:codecache",
    # the best instruction set of this CPU, by running the C++ compiler
    "pick_vec_isa": "torch._inductor.cpu_vec_isa:pick_vec_isa",
    # the C++ compiler that Inductor takes, by its command; raises where none is found
    "cpp_compiler": "torch._inductor.cpp_builder:get_cpp_compiler",
    # where Inductor keeps what it made unless told otherwise
    "inductor_cache_dir": "torch._inductor.runtime.cache_dir_utils:default_cache_dir",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LATE[name].split(":")
    owner = importlib.import_module(module)
    # (a submodule need not have been imported yet)
    return getattr(owner, attribute) if hasattr(owner, attribute) else importlib.import_module(f"{module}.{attribute}")


def register_backend(name: str, entry_point: EntryPoint) -> None:
    """Let torch.compile find a backend by a name, unless it knows that name already."""
    __getattr__("_backend_registry")._BACKENDS.setdefault(name, entry_point)


def compile_lock_if_imported() -> Any:
    """compile_lock where Dynamo is imported, else None."""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    return None if frames is None else frames.compile_lock


@functools.cache
def header_settings(folder: Path) -> dict[str, Any]:
    """What Inductor keeps its compiled headers by, which lie elsewhere also for those who chose a folder; with values
    for ``folder``, to be patched in inductor_codecache().

    Nothing where this version of Inductor has other names for it.
    """
    codecache = inductor_codecache()
    names = ("_HEADER_DIR", "_HEADER_LOCK_DIR", "_precompile_header")
    make = getattr(getattr(codecache, names[-1], None), "__wrapped__", None)
    if make is None or not all(hasattr(codecache, name) for name in names):
        return {}
    return dict(zip(names, (str(folder), str(folder / "locks"), functools.cache(make))))


@contextlib.contextmanager
def telling_of_compilation(tell: Callable[[], None]) -> Iterator[None]:
    """In this block ``tell`` is called before Inductor compiles a graph, and not where its cache has it already; at the
    block's start where this version of Inductor has another name for that."""
    module, name = importlib.import_module("torch._inductor.compile_fx"), "fx_codegen_and_compile"
    compile_graph = getattr(module, name, None)
    if compile_graph is None:
        tell()
        yield
        return

    def told(*args: Any, **kwargs: Any) -> Any:
        tell()
        return compile_graph(*args, **kwargs)

    with mock.patch.object(module, name, told):
        yield


def cpu_features() -> Mapping[str, Any]:
    """What this CPU has, by the names of torch.cpu.get_capabilities; of torch 2.9 what it tells of."""
    if hasattr(torch.cpu, "get_capabilities"):
        found: Mapping[str, Any] = torch.cpu.get_capabilities()
        return found
    names = ("avx512_bf16", "amx_tile", "amx_fp16")
    return {name: getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in names}


def inductor_codecache() -> Any:
    """The module by which Inductor writes and compiles C++."""
    return __getattr__("_codecache")
