"""Opt-in measurement of launch configurations (TKERNELS_AUTOTUNE=1): the closed form's choice and its neighbours are
timed on the tensors at hand, once a shape; what won is kept in a file and found again by every later process.

The file lies in TKERNELS_CACHE_DIR (default: ~/.cache/tkernels); its name says the GPU, Triton's version and a digest
of this package's source, so that none of them goes with another's choices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from tkernels.core import mode, settings
from tkernels.core.config import Config, next_power_of_two
from tkernels.core.records import Route

# A choice of the closed form stays unless another is faster by this: timings of the same kernel differ by as much.
MARGIN = 0.03
PYTORCH = "PyTorch"
KERNEL = "kernel"

enabled = settings.AUTOTUNE.is_on()
# milliseconds a call
Clock = Callable[[Callable[[], object]], float]


def pick(
    name: str,
    batch: int,
    shape: Hashable,
    first: Config,
    run: Callable[[Config], object],
    x: Any,
    rows: str = "BLOCK_M",
    least: int = 16,
) -> Config:
    """The configuration to launch with: ``first``, the closed form's, unless autotuning is on and found a faster one.

    ``batch``: rows or images, of which the choice sees the power of two; ``shape``: what else it depends on; ``run``:
    makes the launch and has no other effect; ``x``: a tensor or slot it takes; ``rows``: the block whose size
    may vary, none where every block is part of how a sum is formed; ``least``: its smallest size.
    """
    if not enabled:
        return first
    candidates = {_text(config): config for config in neighbours(first, rows, least)}
    calls: dict[str, Callable[[], object]] = {}
    for text, config in candidates.items():
        call = functools.partial(run, config)
        calls[text] = x.planner.sample(call) if hasattr(x, "planner") else call
    won = tuner().best(_key(name, batch, shape), calls)
    return candidates[won]


def torch_is_faster(
    name: str, batch: int, shape: Hashable, ours: Callable[[], object], theirs: Callable[[], object]
) -> bool:
    """Whether PyTorch's own kernels take less time than ours, measured; for where autotuning is on."""
    return tuner().best(_key(name, batch, shape), {KERNEL: ours, PYTORCH: theirs}) == PYTORCH


# of each pass (ours, PyTorch's)
Bodies = Sequence[tuple[Callable[[], object], Callable[[], object]]]


def measured_route(name: str, batch: int, shape: Hashable, passes: Bodies) -> Route:
    """Whose product each pass of an operator takes, measured."""
    return Route(*[
        torch_is_faster(f"{name} {step}", batch, shape, *both) for step, both in zip(Route._fields, passes)
    ])  # fmt: skip


def _key(name: str, batch: int, shape: Hashable) -> str:
    return f"{name}, up to {next_power_of_two(batch)}, {shape}"


def neighbours(config: Config, rows: str = "BLOCK_M", least: int = 16) -> list[Config]:
    """The configuration, then those one step away: pipeline stages one up or down, warps or rows of the tile twice or
    half as many. Columns and the reduction's steps stay: precision was proven with them."""
    stages = [s for s in (config.num_stages + 1, config.num_stages - 1) if 1 <= s <= 5]
    warps = [w for w in (2 * config.num_warps, config.num_warps // 2) if 1 <= w <= 16]
    sizes = dict(config.blocks)
    heights = [h for h in (2 * sizes[rows], sizes[rows] // 2) if least <= h <= 256] if rows in sizes else []
    return [
        config,
        *(dataclasses.replace(config, num_stages=s) for s in stages),
        *(dataclasses.replace(config, num_warps=w) for w in warps),
        *(dataclasses.replace(config, blocks=tuple({**sizes, rows: h}.items())) for h in heights),
        # registers were capped for the closed form's tile
        *([dataclasses.replace(config, maxnreg=None)] if config.maxnreg else []),
    ]


class Tuner:
    """Choices by key, in memory and in a file, if there is a path to one. ``clock``: times a call."""

    def __init__(self, path: Path | None, clock: Clock) -> None:
        self._path, self._clock = path, clock
        self._lock = threading.RLock()
        self._known = _read(path) if path else {}

    def best(self, key: str, candidates: dict[str, Callable[[], object]]) -> str:
        """The name of the fastest candidate, measured where it is not known. The first wins ties, and what cannot run.

        While a CUDA graph is captured nothing can be timed: then the first, unless it is known.
        """
        with self._lock:
            first = next(iter(candidates))
            known = self._known.get(key)
            if known is not None and known["best"] in candidates:
                return str(known["best"])
            if len(candidates) == 1 or capturing():
                return first
            times = {name: ms for name, call in candidates.items() if (ms := self._time(call)) is not None}
            best = min(times, key=lambda name: times[name] * (1 - MARGIN if name == first else 1), default=first)
            self._known[key] = {"best": best, "ms": times}
            self._write()
            return best

    def _time(self, call: Callable[[], object]) -> float | None:
        """Milliseconds, or None for what does not compile or asks for more than the device has."""
        try:
            return self._clock(call)
        except Exception:  # compilers and drivers raise what they like; the closed form remains
            return None

    def _write(self) -> None:
        """Replace the file at once, with what other processes found meanwhile. One that cannot be written is left as
        it is: choices are then measured anew by the next process."""
        if self._path is None:
            return
        self._known = {**_read(self._path), **self._known}
        text = json.dumps(self._known, indent=1)
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._path.parent, suffix=".tmp")
            try:
                with os.fdopen(handle, "w") as file:
                    file.write(text)
                os.replace(temporary, self._path)
            except BaseException:
                os.unlink(temporary)
                raise


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The choices in a file; none where there is none, or something else lies there, which is logged."""
    try:
        if path.exists() and not path.is_file():  # a FIFO would be waited for
            raise ValueError("no regular file")
        entries = json.loads(path.read_text())
        if not isinstance(entries, dict):
            raise ValueError(f"a {type(entries).__name__} instead of a dictionary")
    except FileNotFoundError:
        return {}
    except Exception as error:  # a parser's limits too: nesting, digits, memory
        mode.log_once(f"{path} is no cache of choices, they are measured again: {type(error).__name__}: {error}")
        return {}
    return {
        key: {"best": value["best"], "ms": _times(value.get("ms"))}
        for key, value in entries.items()
        if isinstance(value, dict) and isinstance(value.get("best"), str)
    }


def _times(times: Any) -> dict[str, float]:
    if not isinstance(times, dict):
        return {}
    return {name: ms for name, ms in times.items() if isinstance(ms, (int, float))}


def _text(config: Config) -> str:
    blocks = " ".join(f"{name}={value}" for name, value in config.blocks)
    return f"{blocks} warps={config.num_warps} stages={config.num_stages} maxnreg={config.maxnreg}"


def capturing() -> bool:
    """Whether a CUDA graph is captured, in which nothing can be timed."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@functools.cache
def _tuner_of(device: int) -> Tuner:
    from triton import __version__ as triton_version
    from triton import testing

    folder = folder_of_choices()
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower())

    def clock(call: Callable[[], object]) -> float:
        return float(testing.do_bench(call, warmup=5, rep=20, return_mode="median"))

    name = f"autotune-{gpu}-triton-{triton_version}-{_source_digest()}.json"
    return Tuner(folder / name if folder else None, clock)


def folder_of_choices() -> Path | None:
    """Where the file lies; None, which is logged, where the user has no home and chose no folder."""
    chosen = settings.CACHE_DIR.text()
    try:
        return Path(chosen) if chosen else Path.home() / ".cache" / "tkernels"
    except RuntimeError as error:  # no HOME, and a user whom the system does not know
        mode.log_once(f"measured choices are not kept: {error}")
        return None


def tuner() -> Tuner:
    """The current device's."""
    return _tuner_of(torch.cuda.current_device())


@functools.cache
def _source_digest() -> str:
    """Of the kernels and choosers."""
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _sources() -> Iterable[Path]:
    package = Path(__file__).parents[1]
    names = ("kernels*", "config", "aten", "rout*")
    return sorted([*(p for name in names for p in package.glob(f"ops/*/{name}.py")), *package.glob("core/*.py")])
