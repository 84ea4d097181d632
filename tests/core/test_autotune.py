"""The opt-in tuner, with a clock that says what each candidate takes; and what goes to PyTorch under 'auto'."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tkernels
from perf.static import host
from perf.static.cases import window
from perf.static.cases.conv import LAYERS
from perf.static.cases.networks import geometry, layers
from tkernels.core import autotune, mode, targets
from tkernels.core.autotune import Tuner
from tkernels.core.config import Config
from tkernels.core.records import OURS, Route
from tkernels.ops.conv import op as conv_ops
from tkernels.ops.conv import routing

pytestmark = pytest.mark.gate("torch")

FIRST = Config.of(num_warps=4, num_stages=3, BLOCK_M=64, BLOCK_N=32, BLOCK_K=32)


class Clock:
    """Milliseconds by candidate; an exception is raised. Counts what it timed."""

    def __init__(self, times: dict[str, float | Exception]) -> None:
        self.times, self.asked = times, list[str]()

    def candidate(self, name: str) -> Callable[[], object]:
        return lambda: name

    def __call__(self, call: Callable[[], object]) -> float:
        name = str(call())
        self.asked.append(name)
        found = self.times[name]
        if isinstance(found, Exception):
            raise found
        return found

    def candidates(self) -> dict[str, Callable[[], object]]:
        return {name: self.candidate(name) for name in self.times}


BEST = {
    "the fastest": ({"a": 1.0, "b": 0.8, "c": 0.9}, "b"),
    "the first wins a tie": ({"a": 1.0, "b": 1.0}, "a"),
    "noise is no reason to leave the closed form": ({"a": 1.0, "b": 0.98}, "a"),
    "what does not compile is left out": ({"a": 1.0, "b": RuntimeError("out of resources"), "c": 0.5}, "c"),
    "the closed form's own failure": ({"a": RuntimeError("no"), "b": 2.0}, "b"),
    "nothing runs": ({"a": RuntimeError("no"), "b": RuntimeError("no")}, "a"),
    "PyTorch": ({autotune.KERNEL: 1.0, autotune.PYTORCH: 0.5}, autotune.PYTORCH),
}


@pytest.mark.parametrize("name", BEST)
def test_what_is_chosen(name: str, tmp_path: Path) -> None:
    times, best = BEST[name]
    clock = Clock(dict(times))
    assert Tuner(tmp_path / "cache.json", clock).best("key", clock.candidates()) == best
    assert clock.asked == list(times)


def test_a_choice_is_measured_once_and_found_by_the_next_process(tmp_path: Path) -> None:
    clock = Clock({"a": 1.0, "b": 0.5})
    path = tmp_path / "not" / "there" / "cache.json"
    first = Tuner(path, clock)
    assert [first.best("key", clock.candidates()) for _ in range(3)] == ["b"] * 3
    assert Tuner(path, clock).best("key", clock.candidates()) == "b"
    assert clock.asked == ["a", "b"]
    first.best("another shape", clock.candidates())
    assert clock.asked == ["a", "b"] * 2
    assert json.loads(path.read_text())["key"] == {"best": "b", "ms": {"a": 1.0, "b": 0.5}}
    assert [file.name for file in path.parent.iterdir()] == ["cache.json"]


def test_two_processes_lose_nothing_of_each_other(tmp_path: Path) -> None:
    clock, path = Clock({"a": 1.0, "b": 0.5}), tmp_path / "cache.json"
    one, other = Tuner(path, clock), Tuner(path, clock)
    one.best("one", clock.candidates())
    other.best("other", clock.candidates())
    assert set(json.loads(path.read_text())) == {"one", "other"}


# what parses, and holds nothing of use
STRANGE = (
    "{}", '{"key": 3}', '{"key": {"best": 7}}', '{"key": {"best": "gone"}}', '{"key": {"best": "gone", "ms": 7}}',
    '{"key": {"best": "gone", "ms": ' + '{"x": ' * 400 + "1" + "}" * 402,
)  # fmt: skip
# what does not: nested too deep, too many digits for a number, no text
UNREADABLE = ("", "{", "[1]", "[" * 100_000, '{"a":' * 100_000, '{"key": ' + "1" * 5000 + "}", "\0", "\xff\xfe")


@pytest.mark.parametrize("content", [*STRANGE, *UNREADABLE], ids=lambda text: repr(text[:40]))
def test_a_file_that_is_none_or_old_is_measured_again(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, path = Clock({"a": 1.0, "b": 0.5}), tmp_path / "cache.json"
    path.write_bytes(content.encode("latin-1"))
    with caplog.at_level(logging.INFO, "tkernels"):
        assert Tuner(path, clock).best("key", clock.candidates()) == "b"
    assert json.loads(path.read_text())["key"]["best"] == "b"
    lines = [line for line in caplog.messages if "is no cache of choices" in line]
    assert len(lines) == (content in UNREADABLE), lines


@pytest.mark.parametrize("kind", ["fifo", "directory", "name too long"])
def test_what_is_no_file_is_neither_waited_for_nor_kept(kind: str, tmp_path: Path) -> None:
    clock, path = Clock({"a": 1.0, "b": 0.5}), tmp_path / ("x" * 300 if kind == "name too long" else "cache.json")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    assert Tuner(path, clock).best("key", clock.candidates()) == "b"
    assert not list(tmp_path.glob("*.tmp"))


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    clock = Clock({"a": 1.0, "b": 0.5})
    assert Tuner(tmp_path / "cache.json", clock).best("key", clock.candidates()) == "b"
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_is_not_kept(tmp_path: Path) -> None:
    clock = Clock({"a": 1.0, "b": 0.5})
    (tmp_path / "file").touch()
    assert Tuner(tmp_path / "file" / "cache.json", clock).best("key", clock.candidates()) == "b"


def test_a_user_without_a_home_measures_in_each_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a container that runs under a number that its system does not know."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("TKERNELS_CACHE_DIR", raising=False)
    with caplog.at_level(logging.INFO, "tkernels"):
        mode.log_once.cache_clear()
        assert [autotune.folder_of_choices(), autotune.folder_of_choices()] == [None, None]
    assert [record.getMessage() for record in caplog.records] == [
        "measured choices are not kept: Could not determine home directory."
    ]
    clock = Clock({"a": 1.0, "b": 0.5})
    tuner = Tuner(None, clock)
    assert [tuner.best("key", clock.candidates()) for _ in range(2)] == ["b", "b"]
    assert clock.asked == ["a", "b"]
    monkeypatch.setenv("TKERNELS_CACHE_DIR", str(tmp_path))
    assert autotune.folder_of_choices() == tmp_path


def test_nothing_is_timed_while_a_graph_is_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    clock = Clock({"a": 1.0, "b": 0.5})
    tuner = Tuner(tmp_path / "cache.json", clock)
    assert tuner.best("key", clock.candidates()) == "a"
    assert not clock.asked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tuner.best("key", clock.candidates()) == "b"


def test_neighbours_keep_how_sums_are_formed() -> None:
    found = autotune.neighbours(FIRST)
    assert found[0] == FIRST
    assert len(set(found)) == len(found) == 7
    for config in found:
        assert (config["BLOCK_N"], config["BLOCK_K"]) == (32, 32)
        changed = [config.num_warps != 4, config.num_stages != 3, config["BLOCK_M"] != 64]
        assert sum(changed) == (config != FIRST)
    assert all(config["BLOCK_M"] == 64 for config in autotune.neighbours(FIRST, rows=""))


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Autotuning on, on a stubbed driver; half as many warps are fastest. Gives the keys that were asked for."""
    keys: list[str] = []

    class Spy(Tuner):
        def best(self, key: str, candidates: dict[str, Callable[[], object]]) -> str:
            keys.append(key)
            for call in candidates.values():
                call()
            return next((name for name in candidates if "warps=2 " in name), next(iter(candidates)))

    monkeypatch.setattr(autotune, "enabled", True)
    monkeypatch.setattr(autotune, "tuner", lambda: Spy(tmp_path / "cache.json", lambda call: 1.0))
    return keys


def test_operators_launch_what_was_chosen(tuned: list[str]) -> None:
    """Every candidate is launched, then the one that was chosen, and nothing is counted or drawn on the way."""
    made: list[host.Made] = []
    with host.stubbed_driver(lambda *given: made.append(given)):
        x = torch.zeros(8, 32, 16, 16).contiguous(memory_format=torch.channels_last).bfloat16().requires_grad_()
        weight = torch.zeros(32, 32, 3, 3, dtype=torch.bfloat16, requires_grad=True)
        tkernels.functional.conv2d(x, weight, padding=1).sum().backward()
    names = [key.split(",")[0] for key in tuned]
    assert names == ["conv2d forward", "conv2d dgrad", "conv2d wgrad"]
    assert "up to 8," in tuned[0]
    warps = [call[7][0] for call in made if "conv_forward_kernel" in str(call[4])]
    assert len(set(warps)) > 1
    assert warps[-1] == 2


def test_without_the_switch_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "tuner", lambda: pytest.fail("asked the tuner"))
    assert not autotune.enabled, "TKERNELS_AUTOTUNE is set"
    assert autotune.pick("op", 8, (), FIRST, lambda config: pytest.fail("launched"), None) is FIRST


PYTORCHS = Route(True, True, True)
HOPPER, BF16 = targets.TARGETS["sm_90"], (torch.bfloat16, "ieee")


def test_a_convolution_alone() -> None:
    """As measured on an H100: PyTorch's forward pays for a bias and an activation with passes of their own."""
    for layer in LAYERS:
        assert routing.of_conv(window(*layer), 256, *BF16, True, True, True, HOPPER) == OURS, layer
    large = [g for g in map(geometry, layers("conv2d")) if g.taps == 9 and g.in_channels >= 256 and g.height >= 14]
    assert large
    for g in large:
        assert routing.of_conv(g, 256, *BF16, False, False, True, HOPPER) == PYTORCHS, g
        assert routing.of_conv(g, 256, *BF16, False, False, False, HOPPER) == Route(True), "no gradient is asked for"
        assert routing.of_conv(g, 256, torch.float32, "ieee", False, False, True, HOPPER) == OURS, g
        assert routing.of_conv(g, 64, *BF16, False, False, True, targets.TARGETS["gfx942"]) == OURS, g
    wide = next(
        g for g in map(geometry, layers("conv2d")) if g.taps == 1 and (g.in_channels, g.out_channels) == (64, 256)
    )
    assert routing.of_conv(wide, 256, *BF16, False, True, True, HOPPER) == Route(False, True, True)
    assert routing.of_conv(wide, 256, *BF16, False, False, True, HOPPER) == PYTORCHS


def test_a_layer_of_a_stage() -> None:
    large, small = window(128, 128, 28), window(32, 32, 32)
    assert routing.of_stage(large, 64, *BF16, True, HOPPER) == PYTORCHS
    assert routing.of_stage(large, 64, *BF16, False, HOPPER) == PYTORCHS
    assert routing.of_stage(small, 256, *BF16, True, HOPPER) == OURS
    assert routing.of_stage(large, 64, torch.float32, "ieee", True, HOPPER) == OURS
    wide = next(g for g in map(geometry, layers("conv2d")) if g.taps == 1 and g.in_channels == 64)
    assert routing.of_stage(wide, 256, *BF16, True, HOPPER) == PYTORCHS
    assert not routing.of_stage(wide, 256, *BF16, False, HOPPER).forward, "a pass over the result is left out"
    assert routing.of_stage(large, 64, *BF16, True, targets.TARGETS["gfx942"]) == OURS
    stem = window(3, 64, 224, 7, 2)
    assert routing.of_stage(stem, 256, *BF16, True, HOPPER) == Route(False, True, True)
    even = large._replace(kernel_h=2, kernel_w=2)  # padded more on one side, as 'same' does
    assert not even.symmetric
    assert routing.of_stage(even, 64, *BF16, True, HOPPER) == OURS


def test_each_target_says_where_its_figures_are_from() -> None:
    for target in targets.TARGETS.values():
        speeds = routing.speeds(target)
        assert speeds.source == "estimated" or speeds.source.startswith("measured: perf/results/")
        for table in (speeds.own, speeds.own_stage, speeds.pytorch):
            assert set(table) == set(routing.PASSES)
            assert all(0 < share <= 1 for shares in table.values() for share in shares)


def test_under_triton_no_convolution_goes_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    went: list[str] = []
    monkeypatch.setattr(routing, "of_conv", lambda *_: PYTORCHS)
    monkeypatch.setattr(conv_ops._operator, "reference", lambda *_: went.append("torch"))
    monkeypatch.setattr(conv_ops._operator, "run", lambda *_: went.append("triton"))
    monkeypatch.setattr(mode, "_can_run", lambda tensors: True)
    x, weight = torch.zeros(2, 8, 4, 4), torch.zeros(8, 8, 3, 3)
    for backend in ("auto", "triton", "torch"):
        with tkernels.backend(backend):
            tkernels.functional.conv2d(x, weight)
    assert went == ["torch", "triton", "torch"]
