"""Our error and torch's against float64, on the same inputs: ``python -m tests.numerics [--csv OUT] [--gate]``.

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

import argparse
import contextlib
import csv
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tkernels
from tests.conformance.calls import Call, run
from tests.conformance.compare import normal_cotangent, ours, torchs

NORM_BOUND, MAX_BOUND = 1.25, 2.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DRAWS, ENOUGH = {"torch": 3, "ttsem": 2, "cuda": 3}, 200_000  # so many draws, or fewer once so many numbers were drawn
BODIES = {"torch": "PyTorch", "ttsem": "Triton (ttsem)", "cuda": "Triton (GPU)"}


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs for one operator. ``make`` draws the float64 arguments; ``fixed`` are those that are no tensors."""

    operator: str
    conditioning: str
    make: Callable[[], dict[str, Tensor]]
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def __str__(self) -> str:
        return f"{self.operator}: {self.conditioning}"


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


def linear(conditioning: str, rows: int, features: int, outputs: int, shift: float = 0.0, **fixed: Any) -> Case:
    def make() -> dict[str, Tensor]:
        x = torch.randn(rows, features, dtype=torch.float64) + shift
        weight = torch.randn(outputs, features, dtype=torch.float64) / features**0.5
        return {"input": x, "weight": weight, "bias": torch.randn(outputs, dtype=torch.float64)}

    return Case("linear", conditioning, make, fixed)


def matmul(conditioning: str, a: tuple[int, ...], b: tuple[int, ...], shift: float = 0.0) -> Case:
    def make() -> dict[str, Tensor]:
        scale = a[-1] ** 0.5
        return {
            "a": torch.randn(a, dtype=torch.float64) + shift,
            "b": torch.randn(b, dtype=torch.float64) / scale,
        }

    return Case("matmul", conditioning, make)


def attention(conditioning: str, q: tuple[int, ...], keys: int, scale: float = 1.0, **fixed: Any) -> Case:
    """``scale``: of the queries; at 10 the weights of a row are nearly one key's."""

    def make() -> dict[str, Tensor]:
        other = (*q[:-2], keys, q[-1])
        shapes = {"query": q, "key": other, "value": other}
        made = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
        made["query"] *= scale
        return made

    return Case("scaled_dot_product_attention", conditioning, make, fixed)


def conv2d(conditioning: str, image: tuple[int, ...], outputs: int, kernel: int, **fixed: Any) -> Case:
    def make() -> dict[str, Tensor]:
        inputs = image[1] // fixed.get("groups", 1)
        weight = torch.randn(outputs, inputs, kernel, kernel, dtype=torch.float64) / (inputs**0.5 * kernel)
        x = torch.randn(image, dtype=torch.float64)
        return {"input": x, "weight": weight, "bias": torch.randn(outputs, dtype=torch.float64)}

    return Case("conv2d", conditioning, make, fixed)


def batch_norm(conditioning: str, shape: tuple[int, ...], mean: float = 1.0, **fixed: Any) -> Case:
    """``mean``: of every channel, whose standard deviation is 1."""

    def make() -> dict[str, Tensor]:
        channels = shape[1]
        x = torch.randn(shape, dtype=torch.float64) + mean
        vectors = torch.rand(4, channels, dtype=torch.float64) + 0.5
        statistics = {"running_mean": mean * vectors[0], "running_var": vectors[1]}
        return {"input": x, **statistics, "weight": vectors[2], "bias": vectors[3]}

    return Case("batch_norm", conditioning, make, {"training": True, **fixed})


def cross_entropy(
    conditioning: str, shape: tuple[int, ...], shift: float = 0.0, probabilities: bool = False, **fixed: Any
) -> Case:
    def make() -> dict[str, Tensor]:
        logits = 3 * torch.randn(shape, dtype=torch.float64) + shift
        if probabilities:
            target = torch.randn(shape, dtype=torch.float64).softmax(1)
        else:
            target = torch.randint(shape[1], (shape[0], *shape[2:]))
        return {"input": logits, "target": target}

    return Case("cross_entropy", conditioning, make, fixed)


SMALL = (
    linear("well", 37, 200, 24),
    linear("mean/std 100", 37, 200, 24, shift=100.0),
    linear("relu", 37, 200, 24, activation="relu"),
    linear("gelu", 37, 200, 24, activation="gelu"),
    matmul("well", (37, 200), (200, 24)),
    matmul("batches, mean/std 100", (3, 20, 72), (3, 72, 19), shift=100.0),
    matmul("vector", (1, 700), (700, 40)),
    attention("well", (1, 2, 40, 32), 70),
    attention("causal, scores of 10", (1, 2, 40, 20), 40, 10.0, is_causal=True),
    attention("many keys", (1, 1, 16, 16), 2000),
    attention("many queries", (1, 1, 2000, 16), 16),
    conv2d("3x3", (2, 20, 7, 6), 18, 3, padding=1),
    conv2d("stem 3x3", (2, 3, 9, 9), 18, 3, padding=1),
    conv2d("stride 2", (2, 20, 9, 7), 18, 3, padding=1, stride=2),
    conv2d("depthwise", (2, 20, 7, 6), 20, 3, padding=1, groups=20),
    conv2d("many channels", (1, 512, 4, 4), 32, 3, padding=1),
    conv2d("many channels out", (1, 32, 4, 4), 512, 3, padding=1),
    conv2d("many pixels", (2, 16, 64, 64), 8, 1),
    batch_norm("mean/std 1", (4, 6, 8, 7)),
    batch_norm("mean/std 1e2", (4, 6, 8, 7), 1e2),
    batch_norm("mean/std 1e4", (4, 6, 8, 7), 1e4),
    batch_norm("mean/std 1e2, relu", (4, 6, 8, 7), 1e2, activation="relu"),
    batch_norm("evaluation, mean/std 1e2", (4, 6, 8, 7), 1e2, training=False),
    batch_norm("(N, C), mean/std 1e2", (250, 12), 1e2),
    cross_entropy("well", (60, 10)),
    cross_entropy("logits + 1e3", (60, 10), 1e3),
    cross_entropy("logits + 1e3, rows", (60, 10), 1e3, reduction="none"),
    cross_entropy("smoothing 0.1", (60, 10), label_smoothing=0.1),
    cross_entropy("probabilities", (60, 10), probabilities=True),
    cross_entropy("many classes", (3, 5000)),
    cross_entropy("pixels", (3, 7, 5, 6)),
)
FULL = (
    linear("well", 128, 1024, 96),
    linear("mean/std 100", 128, 1024, 96, shift=100.0),
    linear("relu", 128, 1024, 96, activation="relu"),
    linear("gelu", 256, 512, 256, activation="gelu"),
    linear("features 1e6", 3, 1_000_000, 2),
    linear("rows 1e6", 1_000_000, 3, 2),
    matmul("well", (128, 1024), (1024, 96)),
    matmul("batches, mean/std 100", (8, 64, 200), (8, 200, 48), shift=100.0),
    matmul("vector", (1, 100_000), (100_000, 40)),
    attention("well", (4, 8, 256, 64), 256),
    attention("causal, scores of 10", (4, 8, 256, 64), 256, 10.0, is_causal=True),
    attention("many keys", (1, 2, 64, 64), 8192),
    attention("many queries", (1, 2, 8192, 64), 64),
    conv2d("3x3", (8, 64, 16, 16), 64, 3, padding=1),
    conv2d("stem 3x3", (16, 3, 32, 32), 32, 3, padding=1),
    conv2d("stride 2", (8, 32, 17, 17), 48, 3, padding=1, stride=2),
    conv2d("depthwise", (8, 48, 16, 16), 48, 3, padding=1, groups=48),
    conv2d("many channels", (2, 512, 14, 14), 512, 3, padding=1),
    conv2d("pixels 1e6", (1, 2, 1000, 1000), 2, 3, padding=1),
    batch_norm("mean/std 1", (16, 32, 16, 16)),
    batch_norm("mean/std 1e2", (16, 32, 16, 16), 1e2),
    batch_norm("mean/std 1e4", (16, 32, 16, 16), 1e4),
    batch_norm("mean/std 1e2, relu", (16, 32, 16, 16), 1e2, activation="relu"),
    batch_norm("evaluation, mean/std 1e2", (16, 32, 16, 16), 1e2, training=False),
    batch_norm("(N, C), mean/std 1e2", (512, 96), 1e2),
    batch_norm("values 1e6, mean/std 1e2", (1, 2, 1000, 1000), 1e2),
    cross_entropy("well", (256, 10)),
    cross_entropy("logits + 1e3", (256, 10), 1e3),
    cross_entropy("logits + 1e3, rows", (256, 10), 1e3, reduction="none"),
    cross_entropy("smoothing 0.1", (256, 10), label_smoothing=0.1),
    cross_entropy("probabilities", (256, 10), probabilities=True),
    cross_entropy("many classes", (8, 100_000)),
    cross_entropy("pixels", (8, 21, 32, 32)),
    # float16 cannot count to a million: torch's loss on the CPU is NaN
    dataclasses.replace(cross_entropy("rows 1e6", (1_000_000, 3)), dtypes=(torch.float32, torch.bfloat16)),
)


def gate() -> str:
    """Which body this process measures."""
    name = os.environ.get("TK_GATE", "cuda" if torch.cuda.is_available() else "torch")
    if name not in BODIES:
        raise ValueError(f"TK_GATE must be one of {', '.join(BODIES)} here, got {name!r}")
    return name


def cases(gate: str) -> tuple[Case, ...]:
    """What a gate measures. Under ttsem every dtype is compiled anew, so bfloat16 stands for both of 16 bits."""
    if gate != "ttsem":
        return FULL
    return tuple(dataclasses.replace(case, dtypes=(torch.float32, torch.bfloat16)) for case in SMALL)


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


def table(gate: str) -> Iterator[Row]:
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.numerics", description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, metavar="OUT", help="also write the table to this file")
    parser.add_argument("--gate", action="store_true", help="exit with status 1 if a ratio is over its bound")
    options = parser.parse_args(arguments)
    name = gate()
    print(f"{BODIES[name]}; relative errors against float64, ratios at most {NORM_BOUND} (norm) and {MAX_BOUND} (max)")
    if name == "torch":
        print(
            "The Triton path is not measured here: TK_GATE=ttsem executes it on the CPU at small sizes, a GPU at full."
        )
    print(HEADER)
    rows = []
    with measuring(name):
        for row in table(name):
            rows.append(row)
            print(row, flush=True)
    over = [row for row in rows if not row.holds]
    worst = max(rows, key=lambda row: row.norm_ratio), max(rows, key=lambda row: row.max_ratio)
    print(f"{len(rows)} rows, {len(over)} over the bound; worst norm ratio {worst[0].norm_ratio:.2f}"
          f" ({worst[0].operator} {worst[0].result}), worst max ratio {worst[1].max_ratio:.2f}"
          f" ({worst[1].operator} {worst[1].result})")  # fmt: skip
    if options.csv is not None:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
            writer.writeheader()
            writer.writerows(dataclasses.asdict(row) for row in rows)
    return 1 if options.gate and over else 0


if __name__ == "__main__":
    sys.exit(main())
