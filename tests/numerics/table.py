"""Our error and torch's against float64, on the same inputs.

A row is one result (forward, or one gradient) of one operator at one dtype and conditioning. Errors are relative: the
norm of the error to the norm of the reference, and its maximum to the largest reference. Their ratio, ours to torch's,
stays within 1.25 for the norm and 2 for the maximum.

Floor: both errors count as at least one eps of the result's dtype before they are divided. Whoever rounds a result
once to its dtype is off by up to half an eps in every element, and whoever rounds twice by up to one; below that a
ratio compares the luck of two roundings. Errors of several draws are pooled for the same reason.

TK_GATE says which body is measured, as it does for the tests: torch (the default without a GPU), ttsem (the Triton
kernels executed on the CPU, at small sizes), cuda. torch runs on the same device. float32 products are IEEE.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import tkernels
from tests.conformance.calls import Call, run
from tests.conformance.compare import normal_cotangent, ours, torchs
from tests.numerics.cases import Case, cases

NORM_BOUND, MAX_BOUND = 1.25, 2.0
DRAWS, ENOUGH = {"torch": 3, "ttsem": 2, "cuda": 3}, 200_000  # so many draws, or fewer once so many numbers were drawn
BODIES = {"torch": "PyTorch", "ttsem": "Triton (ttsem)", "cuda": "Triton (GPU)"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; the first four fields say what was measured, the others are the figures."""

    body: str
    operator: str
    result: str
    dtype: str
    conditioning: str
    shape: str
    our_norm: float
    torch_norm: float
    norm_ratio: float
    our_max: float
    torch_max: float
    max_ratio: float

    @property
    def holds(self) -> bool:
        return self.norm_ratio <= NORM_BOUND and self.max_ratio <= MAX_BOUND

    def __str__(self) -> str:
        verdict = "" if self.holds else "  OVER THE BOUND"
        return (
            f"{self.operator:13} {self.result:9} {self.dtype:8} {self.conditioning:26} {self.shape:20}"
            f" {self.our_norm:8.1e} {self.torch_norm:8.1e} {self.norm_ratio:5.2f}"
            f" {self.our_max:8.1e} {self.torch_max:8.1e} {self.max_ratio:5.2f}{verdict}"
        )


HEADER = (
    f"{'operator':13} {'result':9} {'dtype':8} {'conditioning':26} {'shape':20}"
    f" {'ours':>8} {'torch':>8} ratio {'max ours':>8} {'torch':>8} ratio"
)


def gate() -> str:
    """Which body this process measures."""
    name = os.environ.get("TK_GATE", "cuda" if torch.cuda.is_available() else "torch")
    if name not in BODIES:
        raise ValueError(f"TK_GATE must be one of {', '.join(BODIES)} here, got {name!r}")
    return name


def _call(case: Case, tensors: dict[str, Tensor], dtype: torch.dtype) -> Call:
    """The call in ``dtype``; what batch norm keeps per channel is float32 at least, as mixed-precision training has."""
    arguments: dict[str, Any] = {}
    for name, t in tensors.items():
        vector = case.operator == "batch_norm" and name != "input"
        rounded = t.to(torch.float32 if vector else dtype) if t.is_floating_point() else t
        arguments[name] = rounded.requires_grad_(t.is_floating_point() and not name.startswith("running_"))
    return Call(case.operator, kwargs={**arguments, **case.fixed})


def _results(function: Callable[..., Tensor], call: Call, cotangent: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    outcome = run(function, call, cotangent)
    if outcome.error is not None:
        raise outcome.error
    assert outcome.output is not None
    results = {"forward": outcome.output, **{f"d {n}": g for n, g in outcome.gradients.items() if g is not None}}
    moved = {n: t for n, t in call.tensors().items() if n.startswith("running_") and call.named()["training"]}
    return {**results, **moved}


@dataclasses.dataclass
class _Errors:
    """Errors of one result, pooled over draws."""

    squares: float = 0.0
    reference_squares: float = 0.0
    largest: float = 0.0

    def add(self, value: Tensor, exact: Tensor) -> None:
        exact = exact.detach().cpu().double()
        error = value.detach().cpu().double() - exact
        self.squares += error.square().sum().item()
        self.reference_squares += exact.square().sum().item()
        self.largest = max(self.largest, error.abs().max().item() / max(exact.abs().max().item(), 1e-300))

    @property
    def norm(self) -> float:
        return (self.squares / max(self.reference_squares, 1e-300)) ** 0.5


def _ratio(our: float, torchs: float, eps: float) -> float:
    return max(our, eps) / max(torchs, eps)


def measure(case: Case, dtype: torch.dtype, gate: str) -> list[Row]:
    """The rows of one case in one dtype."""
    device = "cpu" if gate == "torch" else "cuda"
    pooled: dict[str, tuple[_Errors, _Errors]] = {}
    dtypes: dict[str, torch.dtype] = {}
    torch.manual_seed(2)
    tensors = case.make()
    for _ in range(min(DRAWS[gate], max(1, ENOUGH // next(iter(tensors.values())).numel()))):
        call = _call(case, tensors, dtype)
        theirs = _results(torchs(case.operator), call.on(device), normal_cotangent)
        incoming = normal_cotangent(theirs["forward"].detach()).cpu().double()
        exact = _results(torchs(case.operator), call.on("cpu", torch.float64), lambda _, g=incoming: g)
        mine = _results(ours(case.operator), call.on(device), normal_cotangent)
        for name, reference in exact.items():
            errors = pooled.setdefault(name, (_Errors(), _Errors()))
            errors[0].add(mine[name], reference)
            errors[1].add(theirs[name], reference)
            dtypes[name] = theirs[name].dtype
        tensors = case.make()
    shape = "x".join(map(str, next(iter(tensors.values())).shape))
    if case.operator != "batch_norm" and "weight" in tensors:
        shape += f" -> {tensors['weight'].shape[0]}"
    rows = []
    for name, (our, torch_) in pooled.items():
        eps = torch.finfo(dtypes[name]).eps
        ratios = _ratio(our.norm, torch_.norm, eps), _ratio(our.largest, torch_.largest, eps)
        rows.append(
            Row(BODIES[gate], case.operator, name, str(dtype).removeprefix("torch."), case.conditioning, shape,
                our.norm, torch_.norm, ratios[0], our.largest, torch_.largest, ratios[1])
        )  # fmt: skip
    return rows


def rows(gate: str) -> Iterator[Row]:
    """Every row this gate can measure."""
    for case in cases(gate):
        for dtype in case.dtypes:
            yield from measure(case, dtype, gate)


@contextlib.contextmanager
def measuring(gate: str) -> Iterator[None]:
    """IEEE products, and Triton or nothing where the gate is Triton's."""
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    with contextlib.ExitStack() as stack:
        if gate == "ttsem":
            from tests.gates import ttsem

            ttsem.open_session(stack)
        stack.enter_context(tkernels.backend("torch" if gate == "torch" else "triton"))
        yield
