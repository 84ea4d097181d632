"""What draws are made of: dtypes, sizes, layouts, values, and the state of the process around a call."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, TypeVar

from tests.fuzz.cases import DEFAULTS, GRADIENTS, HOOKS, Case
from tests.fuzz.recipes import T
from tkernels.core import activation as activations

Value = TypeVar("Value")
FLOATS = ("float32", "bfloat16", "float16", "float64")
STRANGE = ("int64", "int32", "uint8", "bool", "complex64")
SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 11, 13, 16, 17, 31, 32, 33, 64)
# squares of the largest overflow in float32, in which batch norm sums on a GPU, torch's too
SPECIALS = (float("nan"), float("inf"), -float("inf"), 1e-40, -1e-42, 1e-7, 0.0, -0.0, 65504.0, 1e4)
HUGE = (1e30, -1e30, 3.4e38)
ACTIVATIONS = (None, "relu", "relu", "relu", *activations.ACTIVATIONS)


class Draw:
    """The source of one draw, and what all operators draw alike. ``big``: sizes from which natural thresholds are
    passed. ``everyday``: dense tensors of the common dtypes with ReLU, which the fast ways are for."""

    def __init__(self, rng: Random, body: str, patched: bool, big: bool) -> None:
        self.rng, self.body, self.patched, self.big = rng, body, patched, big
        self.kernels = body == "kernels"
        self.huge = True
        self.mistaken = False
        self.everyday = rng.random() < 0.45

    def some(self, share: float) -> bool:
        return self.rng.random() < share

    def wrong(self, share: float) -> bool:
        """Whether to make a mistake here: one in a call at most, for which of two is named first is a matter of
        taste."""
        made = self.some(share) and not self.mistaken
        self.mistaken |= made
        return made

    def one(self, values: Sequence[Value]) -> Value:
        return self.rng.choice(values)

    def size(self) -> int:
        return self.one(SIZES[:14] if self.kernels else SIZES)

    def seed(self) -> int:
        return self.rng.randrange(1 << 20)

    def dtype(self) -> str:
        shares: Sequence[float] = (6, 4, 2, 0.3) if self.kernels else (6, 4, 1.5, 1.5)
        shares = (6, 4, 0, 0) if self.everyday and not self.kernels else shares
        return self.rng.choices(FLOATS, shares)[0]

    def other(self, dtype: str) -> str:
        return self.one([d for d in (*FLOATS, *STRANGE) if d != dtype])

    def activation(self) -> str | None:
        return "relu" if self.everyday and self.some(0.7) else self.one(ACTIVATIONS)

    def layout(self, rank: int, images: bool = False) -> str:
        rng = self.rng
        if self.everyday and self.some(0.95):
            return "channels_last" if rank >= 4 and images and self.some(0.85) else "contiguous"
        names = ["contiguous"] * 6 + ["permuted", "every", "offset", "sliced", "stepped", "repeated", "overlapping",
                                      "negated", "turned", "transposed"]  # fmt: skip
        if self.kernels:
            names.remove("negated")
        if rank >= 4:
            names += ["channels_last"] * (7 if images else 2)
        name = rng.choice(names)
        if name == "permuted":
            return "permuted " + " ".join(map(str, rng.sample(range(rank), rank)))
        if name == "every":
            return "every " + " ".join(str(rng.choice((1, 1, 2, 3))) for _ in range(max(rank, 1)))
        if name == "repeated":
            axes = [i for i in range(rank) if rng.random() < 0.4] or [rng.randrange(max(rank, 1))]
            return "repeated " + " ".join(map(str, axes))
        return name

    def values(self) -> str:
        k = self.rng.random()
        if k < 0.05:
            return f"normal 0.001 {self.one((0, 1, 100))}"
        if k < 0.09:
            return "zeros"
        return f"normal {self.one((100, 10000))}" if k < 0.13 else "normal"

    def uneven(self) -> str:
        """Values that have a variance: of a constant map rounding alone decides what batch norm makes."""
        values = self.values()
        return "normal" if values == "zeros" else values

    def special(self, share: float = 0.1) -> tuple[tuple[int, float], ...]:
        if not self.some(share):
            return ()
        found = [(self.rng.randrange(1 << 16), self.one(SPECIALS)) for _ in range(self.rng.randint(1, 3))]
        if self.huge and self.some(0.3):
            found = [(self.rng.randrange(1 << 16), self.one(HUGE))]
        return tuple(found)

    def tensor(
        self, shape: Sequence[int], dtype: str, *, grad: float = 0.6, images: bool = False, special: float = 0.1,
        values: str | None = None, plain: bool = False, kinds: bool = True,
    ) -> T:  # fmt: skip
        """A random tensor; ``grad``: the share that asks for gradients; ``plain``: dense vectors mostly."""
        floating = dtype in FLOATS
        if values is None:
            values = "complex" if dtype == "complex64" else self.values() if floating else "integers"
        dense = plain and self.some(0.75)
        return T(
            tuple(shape), dtype, values, "contiguous" if dense else self.layout(len(shape), images), self.seed(),
            self.special(special) if floating else (), floating and self.some(grad),
            self.rng.choices(("Tensor", "Parameter", "Subclass"), (14, 1, 0 if self.everyday else 1))[0]
            if kinds else "Tensor",
        )  # fmt: skip

    def mode(self) -> str:
        return self.rng.choices(
            ("grad", "no_grad", "inference", "autocast bfloat16", "autocast float16", "autocast bfloat16 off",
             "autocast bfloat16 float16", "no_grad autocast bfloat16", "inference autocast bfloat16"),
            (48, 15, 8, 10, 5, 3, 2, 5, 2),
        )[0]  # fmt: skip

    def around(self, case: Case) -> Case:
        """The case with a state of the process and a use of its result."""
        rng = self.rng
        names = [name for name, t in case.tensors.items() if t.grad]
        case = case.changed(
            mode=self.mode(), gradient="contiguous" if self.some(0.4) else self.one(GRADIENTS), seed=self.seed(),
            deterministic=self.some(0.7), patched=self.patched, threads=1 if self.kernels or self.some(0.03) else 2,
            backward=rng.choices(("once", "twice", "double", "batched"), (70, 12, 10, 8))[0],
        )  # fmt: skip
        if len(names) > 1 and self.some(0.25):
            case = case.changed(wanted=tuple(rng.sample(names, rng.randint(1, len(names) - 1))))
        if self.some(0.07):
            case = case.changed(mutate=self.one(["output", *case.tensors]), backward="once")
        elif self.some(0.08):
            case = case.changed(hooks=self.one(HOOKS))
        if self.some(0.04):
            # under the executor each tensor says that it is on a GPU, so that there is no other device to be
            case = case.changed(default=self.one(DEFAULTS[1:] if self.kernels else DEFAULTS))
        if not self.kernels and self.patched and self.some(0.7):
            case = case.changed(fresh=self.some(0.5))
        if self.some(0.15):
            case = case.changed(times=4 if self.kernels else rng.randint(2, 4))
        return case

    def choice(self, values: dict[Any, float]) -> Any:
        return self.rng.choices(list(values), list(values.values()))[0]
