"""What the contents of a checkpoint must be.

A file can be whole and its contents wrong all the same: written by another program, changed by hand, or of a run whose
weights had become NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class CheckpointError(Exception):
    """A file that is no usable checkpoint; the message says in one line what is wrong with it."""


def must(good: bool, where: str, what: str, value: Any) -> None:
    """Raise CheckpointError, with what is there and what should be, unless it is ``good``."""
    if good:
        return
    shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else " ".join(repr(value).split())
    raise CheckpointError(
        f"is damaged: {where} must be {what}, got {shown if len(shown) <= 60 else f'{shown[:60]}...'}"
    )


def mapping(value: Any, where: str) -> dict[Any, Any]:
    must(isinstance(value, dict), where, "a dictionary", value)
    return value


def need(state: dict[str, Any], keys: Iterable[str], why: str = "is no checkpoint of this program") -> None:
    """Raise CheckpointError unless the keys are there."""
    missing = [key for key in keys if key not in state]
    if missing:
        raise CheckpointError(f"{why}: it lacks {', '.join(missing)}")


def check_result(state: dict[str, Any]) -> None:
    """Raise CheckpointError unless epoch and accuracy are what they should be."""
    _check_whole(state["epoch"], "epoch")
    accuracy = state["val_acc"]
    must(_is_number(accuracy) and 0 <= accuracy <= 1, "val_acc", "a number from 0 to 1", accuracy)


def check_weights(weights: Any, wanted: dict[str, Tensor] | None = None) -> None:
    """Raise CheckpointError unless it is a state_dict of finite weights, those ``wanted`` by name and shape."""
    where = "model_state_dict"
    for name, value in mapping(weights, where).items():
        must(isinstance(value, Tensor), f"{where}: {name}", "a tensor", value)
    name = not_finite(weights)
    if name:
        raise CheckpointError(f"has weights that are not finite ({name}): the run had diverged")
    if wanted is None:
        return
    lacking, strange = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if lacking:
        raise CheckpointError(f"is damaged: {where} lacks {', '.join(lacking)}")
    if strange:
        raise CheckpointError(f"is damaged: {where} has what the network has not: {', '.join(strange)}")
    for name, value in wanted.items():
        must(weights[name].shape == value.shape, f"{where}: {name}", f"of shape {tuple(value.shape)}", weights[name])


def not_finite(weights: dict[str, Tensor]) -> str:
    """The first of the weights that holds NaN or infinity; empty if none does."""
    return next((name for name, t in weights.items() if t.is_floating_point() and not t.isfinite().all()), "")


def check_run(state: dict[str, Any]) -> None:
    """Raise CheckpointError unless what a run goes on from is what it should be, but for what only the run can tell."""
    _check_whole(state["batch"], "batch")
    _check_whole(mapping(state["schedule_state_dict"], "schedule_state_dict").get("step"), "schedule_state_dict: step")
    if state["scaler_state_dict"] is not None:
        for name, value in mapping(state["scaler_state_dict"], "scaler_state_dict").items():
            must(_is_number(value) and value >= 0, f"scaler_state_dict: {name}", "a number", value)
    for name, value in mapping(state["settings"], "settings").items():
        must(isinstance(value, str), f"settings: {name}", "a text", value)
    rows, processes = state["history"], state["processes"]
    must(isinstance(rows, list), "history", "a list of rows", rows)
    must(len(rows) == state["epoch"], "history", f"as many rows as epochs were done, {state['epoch']}", len(rows))
    for i, row in enumerate(rows, start=1):
        good = isinstance(row, (list, tuple)) and len(row) == 5 and all(map(_is_number, row)) and row[0] == i
        must(good, f"history[{i - 1}]", f"epoch {i} and four numbers", row)
    must(isinstance(processes, list) and len(processes) > 0, "processes", "a list, one for each process", processes)
    for i, process in enumerate(processes):
        _check_process(process, f"processes[{i}]")


def _check_process(process: Any, where: str) -> None:
    own = mapping(process, where)
    for name in ("loss", "correct"):
        value = own.get(name)
        must(isinstance(value, Tensor) and value.dim() == 0, f"{where}: {name}", "a tensor of one number", value)
    _check_whole(own.get("images"), f"{where}: images")
    random = mapping(own.get("rng"), f"{where}: rng")
    try:
        torch.Generator().set_state(random["cpu"])
    except (KeyError, TypeError, RuntimeError):
        raise CheckpointError(f"is damaged: {where}: rng: cpu must be a state of torch's generator") from None


def check_optimizer(saved: Any, optimizer: torch.optim.Optimizer) -> None:
    """Raise CheckpointError unless the state is one of this optimizer's parameters: of each, or of some or none, as
    what never had a gradient has no state."""
    where = "optimizer_state_dict: state"
    states = mapping(mapping(saved, "optimizer_state_dict").get("state"), where)
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    strange = set(states) - set(range(len(shapes)))
    must(not strange, where, f"of the optimizer's {len(shapes)} parameters", sorted(strange, key=str))
    names = {frozenset(mapping(values, f"{where}[{i}]")) for i, values in states.items()}
    must(len(names) <= 1, where, "of one kind for all parameters", sorted(map(sorted, names)))
    for i, values in states.items():
        for name, value in values.items():
            fits = value is None or (isinstance(value, Tensor) and value.shape in (shapes[i], ()))
            must(fits, f"{where}[{i}]: {name}", f"a tensor of one number or of shape {tuple(shapes[i])}", value)


def _check_whole(value: Any, where: str) -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    must(good, where, "a whole number, 0 or more", value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
