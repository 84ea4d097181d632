"""Compares both sides of a case in all that a caller sees. What printed tests call."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import warnings
from math import inf, nan
from typing import Any

import torch
from torch import Tensor

from tests.conformance import magnitudes
from tests.conformance.calls import Call
from tests.conformance.compare import same_bits
from tests.fuzz import bodies, numbers
from tests.fuzz.cases import Case
from tests.fuzz.deliberate import meant
from tests.fuzz.mistakes import torch_refuses_too
from tests.fuzz.modules import OPERATORS, dropping_as
from tests.fuzz.operators import Side
from tests.fuzz.recipes import T
from tests.fuzz.running import Outcome, cotangent, run
from tkernels.functional import MaxPool

__all__ = ["Case", "MaxPool", "T", "check", "differences", "inf", "nan"]

Difference = tuple[str, str]
CANCELLING = (
    ("scaled_dot_product_attention", "query"), ("scaled_dot_product_attention", "key"), ("cross_entropy", "input"),
)  # fmt: skip
# texts of numbers.far that say how large an error is
ERRORS = ("error ", "largest error ")
# draws of other values by which it is found out whether an error is over the bound by chance
OTHER_DRAWS = 60
KINKED = ("relu", "leaky_relu", "relu6", "hardswish")


@dataclasses.dataclass
class Told:
    """What a comparison found: differences (kind, text), and events that are counted. ``errors``: of each result, where
    it ``measures`` them."""

    differences: list[Difference] = dataclasses.field(default_factory=list)
    errors: dict[str, list[Any]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    measures: bool = False
    events: list[str] = dataclasses.field(default_factory=list)

    def add(self, case: Case, kind: str, text: str) -> None:
        reason = meant(case, kind, text)
        if reason is None:
            self.differences.append((kind, text))
        else:
            self.events.append("meant")


def check(case: Case) -> None:
    """Raise AssertionError where the sides of a case differ. Opens the executor for a case of the kernels."""
    with contextlib.ExitStack() as stack:
        if case.body == "kernels" and not torch.empty(0).is_cuda:
            stack.enter_context(bodies.opened("kernels"))
        found = differences(case).differences
    assert not found, "\n".join(f"{kind}: {text}" for kind, text in found)


def differences(case: Case) -> Told:
    """Runs the case as often as it says, and the other case in between; looks at all results once more at the end."""
    told, held = Told(), []  # type: ignore[var-annotated]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = OPERATORS[case.operator].ours(case.options), OPERATORS[case.operator].theirs
        torchs = theirs(case.options, None)
        for again in range(case.times):
            _once(case, again, ours, torchs, told, held)
            if told.differences:
                return _without_chance(case, told)
            if again == 0 and case.between is not None:
                between = OPERATORS[case.between.operator]
                options = case.between.options
                _once(case.between, 0, between.ours(options), between.theirs(options, None), told, held)
    if bodies.left_on():
        told.add(case, "left on", "autocast")
    for name, tensor, copy_ in held:
        if not same_bits(tensor, copy_):
            told.add(case, "held", f"{name} changed in later calls")
    return told


def _without_chance(case: Case, told: Told) -> Told:
    """``told`` without errors that are over the bound by chance: those of other values are distributed as torch's."""
    inexact = {kind for kind, text in told.differences if text.startswith(ERRORS)}
    if not inexact:
        return told
    plain, measured = case.changed(mutate=None, times=1, between=None), Told(measures=True)
    ours, torchs = OPERATORS[case.operator].ours(case.options), OPERATORS[case.operator].theirs(case.options, None)
    for again in range(OTHER_DRAWS):
        _once(plain, 1000 + again, ours, torchs, measured, [])
    chance = {kind for kind in inexact if numbers.by_chance(measured.errors[kind])}
    told.differences = [(kind, text) for kind, text in told.differences if kind not in chance]
    told.events += ["by chance"] * len(chance)
    return told


def _once(case: Case, again: int, ours: Side, torchs: Side, told: Told, held: list[Any]) -> None:
    before = copy.deepcopy(torchs.module) if torchs.module is not None else None
    mine = run(case, ours, again)
    side = torchs
    p = _probability(case)
    draws = case.body == "kernels" and 0 < p < 1
    factors = _factors(case, mine, again) if draws else None
    if factors is not None:
        side = OPERATORS[case.operator].theirs(case.options, factors)
    theirs = run(case, side, again)
    told.events.append("calls")
    if _errors(case, mine, theirs, told, side, again) or not mine.outputs:
        return
    if mine.gradients:
        told.events.append("with gradients")
    Comparison(case, again, mine, theirs, side, before, told, values=not draws or factors is not None).all()
    results = [(f"output {i}", t) for i, t in enumerate(mine.outputs)]
    results += [(f"gradient of {n}", g) for n, g in mine.gradients.items() if g is not None]
    held += [(name, t, t.detach().clone()) for name, t in results]


def _errors(case: Case, mine: Outcome, theirs: Outcome, told: Told, side: Side, again: int) -> bool:
    """Whether there is nothing more to compare, since a side raised."""
    a, t = mine.error, theirs.error
    if a is not None and type(a).__module__.startswith(("ttsem", "triton")):
        told.add(case, f"fault in {mine.at}", f"{type(a).__name__}: {a}")
        return True
    if a is None and t is None:
        return False
    if a is not None and mine.at == "forward" and type(a) is not type(t) and torch_refuses_too(case, a):
        told.events.append("meant")
        return True
    if a is not None and t is not None:
        told.events.append("both raised")
        if type(a) is not type(t) and mine.at == theirs.at:
            told.add(case, f"class of error in {mine.at}", f"ours {said(a)}; torch {said(t)}")
        elif mine.at != theirs.at:
            told.add(case, "one side raises", f"ours in {mine.at} {said(a)}; torch in {theirs.at} {said(t)}")
        return True
    if a is not None:
        told.add(case, f"ours raises in {mine.at}", f"{said(a)}\n{mine.trace}")
        return True
    if case.mutate is not None and theirs.at != "forward":
        # torch refused; what ours gives must be what it gave before the tensor was written to
        _unmutated(case, mine, side, told, again)
        return True
    told.add(case, f"torch raises in {theirs.at}", said(t))
    return True


def _unmutated(case: Case, mine: Outcome, side: Side, told: Told, again: int) -> None:
    untouched = case.changed(mutate=None)
    theirs = run(untouched, side, again)
    if theirs.error is None and side.module is None:
        Comparison(untouched, again, mine, theirs, side, None, told, values=True).gradients("after a write")


def said(error: Exception | None) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _probability(case: Case) -> float:
    found = OPERATORS[case.operator].dropout(case.options)
    return float(found) if isinstance(found, (int, float)) else 0.0


def _factors(case: Case, mine: Outcome, again: int) -> Tensor | None:
    """What kernels' dropout multiplied by, read off a result; None where it cannot be."""
    kind = OPERATORS[case.operator].factors_are
    if kind is None or not mine.before:
        return None
    undropped = {**case.options, "dropout_p": 0.0}
    plain = run(case.changed(backward="none"), OPERATORS[case.operator].theirs(undropped, None), again)
    if plain.error is not None or plain.outputs[0].shape != mine.before[0].shape:
        return None
    y, z, p = mine.before[0].double(), plain.outputs[0].detach().double(), _probability(case)
    if kind == "channels":
        y, z = y.abs().flatten(2).amax(2)[:, :, None, None], z.abs().flatten(2).amax(2)[:, :, None, None]
    if not (y.isfinite().all() and z.isfinite().all()):
        return None
    return torch.where((y == 0) & (z != 0), 0.0, 1 / (1 - p))


class Comparison:
    """Of two outcomes that raised nothing."""

    def __init__(
        self, case: Case, again: int, mine: Outcome, theirs: Outcome, side: Side, before: Any, told: Told, values: bool
    ) -> None:
        self.case, self.again, self.mine, self.theirs = case, again, mine, theirs
        self.side, self.module, self.told, self.values = side, before, told, values
        self._truth: tuple[Outcome, Outcome] | None = None
        self._others: list[Outcome] | None = None
        self.coarse = _coarsest(case, theirs)
        self.kinks = _kinks(case)

    def add(self, kind: str, text: str) -> None:
        self.told.add(self.case, kind, text)

    def truth(self) -> tuple[Outcome, Outcome]:
        """The float64 outcome, and that of inputs changed by a rounding."""
        if self._truth is None:
            eps = torch.finfo(self.coarse).eps / 2
            self._truth = self._exact(0.0), self._exact(eps)
        return self._truth

    def _exact(self, noise: float) -> Outcome:
        side = self._rebuilt(double=True)
        case = self.case.changed(backward="once" if self.case.backward == "twice" else self.case.backward)
        if (factors := self._draws()) is not None:
            side = OPERATORS[case.operator].theirs(case.options, factors)
        with dropping_as(self.coarse) if self._draws_again() else contextlib.nullcontext():
            return run(case, side, self.again, torch.float64, noise, plain=True)

    def _rebuilt(self, double: bool = False) -> Side:
        """torch's side as it was before the call."""
        if self.side.rebuilt is None:
            return self.side
        module = copy.deepcopy(self.module)
        found: Side = self.side.rebuilt(module.double() if double else module)
        return found

    def _draws_again(self) -> bool:
        """Whether float64 can draw what torch's modules dropped: by their own calls, and in one dtype."""
        case = self.case
        modules = case.operator == "fused" or case.options.get("module") in ("Linear", "LinearReLU", "ConvStage")
        return case.body == "cpu" and modules and "autocast" not in case.mode

    def _draws(self) -> Tensor | None:
        """What torch's dropout multiplied by on the CPU, drawn again in the dtype that it was drawn in."""
        p, y = _probability(self.case), self.theirs.outputs[0]
        kind = OPERATORS[self.case.operator].factors_are
        if not 0 < p < 1 or kind is None or self.case.body == "kernels":
            return None
        torch.manual_seed(self.case.seed)
        if kind == "channels":
            drawn = torch.empty((*y.shape[:2], 1, 1), dtype=y.dtype).bernoulli_(1 - p)
        else:
            drawn = torch.empty_like(y.detach()).bernoulli_(1 - p)
        return drawn.double() / (1 - p)

    def all(self) -> None:
        for i, (a, t) in enumerate(zip(self.mine.outputs, self.theirs.outputs)):
            name = "output" if i == 0 else f"output {i}"
            self.facts(name, a, t)
            if self.mine.views[i] != self.theirs.views[i]:
                self.add("is_view", f"{self.mine.views[i]}, torch's {self.theirs.views[i]}")
            self.close(name, self.mine.before[i], self.theirs.before[i], lambda o, i=i: o.before[i])
            if same_bits(t, self.theirs.before[i]) and not same_bits(a, self.mine.before[i]):
                self.add("result changed by backward", name)
        self.arguments()
        self.gradients("")

    def facts(self, name: str, a: Tensor, t: Tensor) -> None:
        for what in ("dtype", "shape", "requires_grad", "is_inference", "class"):
            x, y = (_fact(v, what) for v in (a, t))
            if x != y:
                self.add(f"{what} of {name}", f"{x}, torch's {y}")
        sizes = zip(a.stride(), t.stride(), a.shape)
        if a.shape == t.shape and a.numel() and any(x != y and n > 1 for x, y, n in sizes):
            self.add(f"strides of {name}", f"{a.stride()}, torch's {t.stride()}, of {tuple(a.shape)}")

    def close(self, name: str, a: Tensor, t: Tensor, get: Any, flips: float = 0.0) -> None:
        def exact() -> tuple[Tensor, Tensor] | None:
            # (what kernels drop is read off their result: self.side drops it too)
            drops = self.case.body == "cpu" and 0 < _probability(self.case) < 1
            if drops and not (self._draws_again() or self._draws() is not None):
                return None  # float64 draws something else
            try:
                found = [get(o) for o in self.truth()]
            except (KeyError, IndexError):
                return None
            return None if any(x is None for x in found) else tuple(found)

        if self.values and self.told.measures:
            found = numbers.errors(a, t, exact, self._ways(name, get))
            self.told.errors[name] += [] if found is None else [found]
        elif self.values:
            wrong = numbers.far(a, t, exact, self.coarse, flips, self._terms(name), self._ways(name, get))
            if wrong is not None and self._torch_stands_by(t, get):
                self.add(name, wrong)
            elif wrong is not None:
                self.told.events.append("torch differs from itself")

    def _ways(self, name: str, get: Any) -> numbers.Ways:
        def others() -> list[Tensor]:
            found = [get(o) for o in self.others() if o.error is None]
            return [t for t in found if t is not None and t.shape == get(self.theirs).shape]

        def sizes() -> Tensor | None:
            return self.sizes() if name == "output" else None

        return numbers.Ways(others, sizes)

    def others(self) -> list[Outcome]:
        """By torch's other ways, where nothing is dropped."""
        if self._others is None:
            sides = [] if _probability(self.case) else OPERATORS[self.case.operator].others(self.case.options)
            self._others = [run(self.case, side, self.again) for side in sides]
        return self._others

    def sizes(self) -> Tensor | None:
        """What the magnitudes of the terms of each element come to."""
        if not OPERATORS[self.case.operator].sums:
            return None
        options = {n: v for n, v in self.case.options.items() if n not in ("activation", "relu", "dropout_p")}
        side = OPERATORS[self.case.operator].theirs(options, None)
        found = run(
            self.case.changed(backward="none"),
            Side(lambda tensors: side.call({n: t.detach().abs() for n, t in tensors.items()})),
            self.again, torch.float64, plain=True,
        )  # fmt: skip
        return found.outputs[0].detach() if found.error is None else None

    def _terms(self, name: str) -> float:
        """Attention's gradients of query and key and the loss's of logits are differences of what may be equal: the
        size of its terms."""
        if self.case.options.get("module") in ("MultiheadAttention", "CrossEntropyLoss"):
            if not name.startswith("gradient"):
                return 0.0
            # their draws are about 1, but for a few values
            return max([1.0, *(abs(value) for t in self.case.tensors.values() for _, value in t.special)])
        if name.endswith(" afterwards"):
            return self._spread(name.removesuffix(" afterwards"))
        operator = {"attention": "scaled_dot_product_attention"}.get(self.case.operator, self.case.operator)
        of = name.removeprefix("gradient of ").split()[0]
        if (operator, of) not in CANCELLING or not name.startswith("gradient"):
            return 0.0
        y = self.theirs.outputs[0]
        # (made anew: one of theirs may have been written to)
        tensors = {n: t.make(self.again, torch.float64).detach() for n, t in self.case.tensors.items()}
        incoming = cotangent(self.case, y, self.again).double()
        call = Call(operator, kwargs={**self.case.options, **tensors})
        return magnitudes.of(call, incoming, y.detach().double()).get(of, 0.0)

    def _spread(self, mean: str) -> float:
        """The standard deviation of what a running mean is the mean of: means far below it cancel."""
        head, _, last = mean.rpartition(".")
        names = {"running_mean": "running_var", **{f"m{i}": f"v{i}" for i in range(9)}}
        var = self.theirs.arguments.get(".".join((*head.split(".") * bool(head), names.get(last, ""))))
        return 0.0 if var is None or var.numel() == 0 else var.double().nan_to_num(0, 0, 0).abs().max().item() ** 0.5

    def _torch_stands_by(self, t: Tensor, get: Any) -> bool:
        """Whether torch gives the same once more: some of its own calls read what nobody wrote."""
        once_more = get(run(self.case, self._rebuilt(), self.again))
        return once_more is None or numbers.far(once_more, t, lambda: None, self.coarse, 1e-2) is None

    def arguments(self) -> None:
        for name, t in self.theirs.arguments.items():
            a = self.mine.arguments[name]
            if name == self.case.mutate or same_bits(a, t):
                continue
            original = self.case.tensors.get(name)
            if original is not None and same_bits(t, original.make(self.again)):
                self.add(f"{name} afterwards", "written to")
            else:  # a running statistic
                self.close(f"{name} afterwards", a, t, lambda o, n=name: o.arguments[n])
        if self.mine.moved != self.theirs.moved:
            self.add("versions", f"moved {self.mine.moved}, torch {self.theirs.moved}")

    def gradients(self, when: str) -> None:
        flips = self.kinks
        for name, t in self.theirs.gradients.items():
            a, what = self.mine.gradients.get(name), f"gradient of {name}{' ' * bool(when)}{when}"
            if (a is None) != (t is None):
                self.add(f"{what} None", f"ours {a is None}, torch {t is None}")
            if a is None or t is None:
                continue
            self.facts(what, a, t)
            self.close(what, a, t, lambda o, n=name: o.gradients[n], flips)
            b = self.mine.again.get(name)
            if b is not None and not same_bits(a, b):
                other = self.theirs.again[name]
                if other is not None and same_bits(t, other):
                    self.add(f"{what} twice", "a second backward through one graph gives other bits")
        if self.theirs.second is not None or self.mine.second is not None:
            self._second()

    def _second(self) -> None:
        mine, theirs = self.mine.second, self.theirs.second
        if mine is None or theirs is None:
            self.add("second gradients None", f"ours {mine is None}, torch {theirs is None}")
            return
        self.told.events.append("double backward")
        for name, t in theirs.items():
            a = mine[name]
            if a is None or t is None:
                known = a if a is not None else t
                if known is not None and bool((known != 0).any()):
                    self.add(f"second gradient of {name} None", f"ours {a is None}, torch {t is None}")
                continue
            self.close(f"second gradient of {name}", a, t, lambda o, n=name: (o.second or {})[n], 3 * self.kinks)


def _fact(t: Tensor, what: str) -> Any:
    if what == "class":
        return type(t).__name__
    if what == "is_inference":
        return t.is_inference()
    return tuple(t.shape) if what == "shape" else getattr(t, what)


def _coarsest(case: Case, theirs: Outcome) -> torch.dtype:
    """The coarsest dtype that a value of the call was rounded to."""
    found = [t.dtype for t in (*theirs.arguments.values(), *theirs.outputs) if t.is_floating_point()]
    words = case.mode.split()
    found += [getattr(torch, w) for w in words if w in ("bfloat16", "float16")]
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _kinks(case: Case) -> float:
    """What a few values on the other side of a kink may come to in a gradient, of its norm."""
    long = case.operator in ("conv_stage", "fused", "module")
    if not long and case.options.get("activation") not in KINKED and not case.options.get("relu"):
        return 0.0
    dtypes = {t.dtype for t in case.tensors.values()} | set(case.mode.split())
    if dtypes & {"bfloat16", "float16"}:
        return 0.3 if long else 0.05
    return 0.0 if "float64" in dtypes else (0.03 if long else 0.003)
