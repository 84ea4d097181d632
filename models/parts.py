"""What the parts of a checkpoint must be. A file can be whole and its contents wrong all the same: written by another
program, changed by hand, or of a run whose weights had become NaN."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

KINDS = ("mlp", "cnn", "attention")


class CheckpointError(Exception):
    """A file that is no usable checkpoint; the message says in one line what is wrong with it."""


def need(state: dict[str, Any], keys: Iterable[str], why: str = "is no checkpoint of this program") -> None:
    """Raise CheckpointError unless the keys are there."""
    missing = [key for key in keys if key not in state]
    if missing:
        raise CheckpointError(f"{why}: it lacks {', '.join(missing)}")


def check_model(state: dict[str, Any]) -> None:
    """Raise CheckpointError unless what everybody reads is what it should be: epoch, accuracy, network and weights."""
    _whole(state["epoch"], "epoch")
    accuracy = state["val_acc"]
    _must(_is_number(accuracy) and 0 <= accuracy <= 1, "val_acc", "a number from 0 to 1", accuracy)
    network = _mapping(state["network"], "network")
    _must(network.get("kind") in KINDS, "network: kind", f"one of {', '.join(KINDS)}", network.get("kind"))
    weights = _mapping(state["model_state_dict"], "model_state_dict")
    for name, value in weights.items():
        _must(isinstance(value, Tensor), f"model_state_dict: {name}", "a tensor", value)
    name = not_finite(weights)
    if name:
        raise CheckpointError(f"has weights that are not finite ({name}): the run had diverged")


def not_finite(weights: dict[str, Tensor]) -> str:
    """The first of the weights that holds NaN or infinity; empty if none does."""
    return next((name for name, t in weights.items() if t.is_floating_point() and not t.isfinite().all()), "")


def check_run(state: dict[str, Any]) -> None:
    """Raise CheckpointError unless what a run goes on from is what it should be, but for what only the run can tell."""
    _whole(state["batch"], "batch")
    _whole(_mapping(state["schedule_state_dict"], "schedule_state_dict").get("step"), "schedule_state_dict: step")
    if state["scaler_state_dict"] is not None:
        for name, value in _mapping(state["scaler_state_dict"], "scaler_state_dict").items():
            _must(_is_number(value) and value >= 0, f"scaler_state_dict: {name}", "a number", value)
    for name, value in _mapping(state["settings"], "settings").items():
        _must(isinstance(value, str), f"settings: {name}", "a text", value)
    _check_history(state["history"], state["epoch"])
    processes = state["processes"]
    _must(isinstance(processes, list) and len(processes) > 0, "processes", "a list, one for each process", processes)
    for i, process in enumerate(processes):
        _check_process(process, f"processes[{i}]")


def _check_history(rows: Any, epoch: int) -> None:
    """One row for each epoch done: its number, two losses, two accuracies."""
    _must(isinstance(rows, list), "history", "a list of rows", rows)
    _must(len(rows) == epoch, "history", f"as many rows as epochs were done, {epoch}", len(rows))
    for i, row in enumerate(rows):
        good = isinstance(row, (list, tuple)) and len(row) == 5 and all(map(_is_number, row)) and row[0] == i + 1
        _must(good, f"history[{i}]", f"epoch {i + 1} and four numbers", row)


def _check_process(process: Any, where: str) -> None:
    own = _mapping(process, where)
    for name in ("loss", "correct"):
        value = own.get(name)
        _must(isinstance(value, Tensor) and value.dim() == 0, f"{where}: {name}", "a tensor of one number", value)
    _whole(own.get("images"), f"{where}: images")
    random = _mapping(own.get("rng"), f"{where}: rng")
    try:
        torch.Generator().set_state(random["cpu"])
    except (KeyError, TypeError, RuntimeError):
        raise CheckpointError(f"is damaged: {where}: rng: cpu must be a state of torch's generator") from None


def check_weights(saved: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless the weights are those of the network, by name and shape."""
    lacking, strange = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    if lacking:
        raise CheckpointError(f"is damaged: model_state_dict lacks {', '.join(lacking)}")
    if strange:
        raise CheckpointError(f"is damaged: model_state_dict has what the network has not: {', '.join(strange)}")
    for name, value in wanted.items():
        shape = tuple(value.shape)
        _must(saved[name].shape == value.shape, f"model_state_dict: {name}", f"of shape {shape}", saved[name])


def check_optimizer(saved: Any, optimizer: torch.optim.Optimizer) -> None:
    """Raise CheckpointError unless the state is one of this optimizer's parameters: of each, or of some or none, as
    what never had a gradient has no state."""
    where = "optimizer_state_dict: state"
    states = _mapping(_mapping(saved, "optimizer_state_dict").get("state"), where)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    strange = set(states) - set(range(len(parameters)))
    _must(not strange, where, f"of the optimizer's {len(parameters)} parameters", sorted(strange, key=str))
    names = {frozenset(_mapping(values, f"{where}[{i}]")) for i, values in states.items()}
    _must(len(names) <= 1, where, "of one kind for all parameters", sorted(map(sorted, names)))
    for i, values in states.items():
        for name, value in values.items():
            fits = value is None or (isinstance(value, Tensor) and value.shape in (parameters[i].shape, ()))
            shape = tuple(parameters[i].shape)
            _must(fits, f"{where}[{i}]: {name}", f"a tensor of one number or of shape {shape}", value)


def _must(good: bool, where: str, what: str, value: Any) -> None:
    if not good:
        raise CheckpointError(f"is damaged: {where} must be {what}, got {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}..."


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    _must(isinstance(value, dict), where, "a dictionary", value)
    return value


def _whole(value: Any, where: str) -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    _must(good, where, "a whole number, 0 or more", value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
