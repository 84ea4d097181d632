"""The examples that people copy: each runs, small, by fused calls, and says what it did."""

from __future__ import annotations

import collections
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import tkernels
from models.examples import export, fuse_torchvision, modules
from tests.cpu import profiles
from tests.fusion.pairs import ran
from tests.watch import AtenWatch

pytestmark = pytest.mark.gate("torch")


def test_a_step_of_modules_is_fused() -> None:
    """One batch: the compiled passes of both stages on a CPU."""
    images, _, digits, _ = modules.load()
    model = modules.build()
    ran = profiles.events(lambda: modules.train(model, images[:256], digits[:256], epochs=1, batch_size=256), ())
    assert ran.count("tkernels: statistics") == 3, ran
    assert ran.count("tkernels: end 2x2") == ran.count("tkernels: end gradient 2x2") == 2


@pytest.mark.gate("ttsem", "cuda")
def test_kernels_do_all_of_modules(device: str, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "DEVICE", device)
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)  # which asks no driver that is not there
    images, val_images, digits, val_digits = modules.load()
    model = modules.build()
    with AtenWatch() as watch:
        modules.train(model, images[:3], digits[:3], epochs=1)
        modules.accuracy(model, val_images[:2], val_digits[:2])
    assert not watch.replaced(), watch.replaced()
    # of each convolution, forward, weight gradient and batch norm both ways; of each linear layer three products
    assert len(launches) >= 3 * 4 + 2 * 3 + 2


@pytest.mark.extended("torch")
def test_modules_learn(capsys: pytest.CaptureFixture[str]) -> None:
    assert modules.main() >= 0.97
    assert "validation accuracy 9" in capsys.readouterr().out


def _passes(call: Callable[[], Any]) -> collections.Counter[str]:
    """How often each of our compiled passes ran."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    return collections.Counter(event.name for event in found.events() or () if event.name.startswith("tkernels: "))


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated")
def test_lightning_trains_by_fused_modules(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from models.examples import lightning

    monkeypatch.setattr(lightning, "quiet", lambda: None)  # the process is not this example's alone
    images = modules.load()[0]
    counted = _passes(lambda: lightning.main(epochs=1))
    # the first stage's, of whole batches: smaller maps are left to PyTorch on a CPU
    whole = len(images) // 128
    assert counted["tkernels: statistics"] == 2 * whole
    assert counted["tkernels: end gradient 2x2"] == whole
    trained, loaded = re.findall(r"validation accuracy ([\d.]+)%", capsys.readouterr().out)
    assert trained == loaded
    assert float(loaded) > 40


@pytest.mark.parametrize("name, amp, chains", [("resnet18", (), 20), ("timm:test_resnet", ("--amp", "bf16"), 15)])
def test_a_library_s_model_is_fused_and_measured(
    name: str, amp: tuple[str, ...], chains: int, capsys: pytest.CaptureFixture[str]
) -> None:
    fused = fuse_torchvision.main([name, *amp, "--batch", "2", "--size", "32", "--rounds", "2"])
    calls = 2 * (1 + 2 + 2)  # in evaluation and in training: the first, warm-up, rounds
    assert ran(fused) == calls * chains
    said = capsys.readouterr().out
    assert f"fused: {chains} chains in 1 graph" in said
    assert f"{name}, (2, 3, 32, 32), {'bf16' if amp else 'fp32'}, on {fuse_torchvision.machine()}" in said
    for kind in ("inference", "training step"):
        times = r"[\d.]+ ms \([\d.]+ to [\d.]+\)"
        assert re.search(rf"^{kind}: eager {times}, fused {times}$", said, re.MULTILINE)
    assert len(re.findall("fusing pays|fusing does not pay|no difference beyond the noise", said)) == 2


@pytest.mark.filterwarnings("ignore:tkernels.fuse. a call of .* ran no fused operator")
@pytest.mark.parametrize("times, verdict", [
    ([4.0, 2.0], "2.00 times as fast, median of the rounds (quartiles 2.00 to 2.00): fusing pays"),
    ([2.0, 4.0], "0.50 times as fast, median of the rounds (quartiles 0.50 to 0.50): fusing does not pay"),
    ([2.0, 2.0], "1.00 times as fast, median of the rounds (quartiles 1.00 to 1.00): no difference beyond the noise"),
])  # fmt: skip
def test_it_says_whether_fusing_pays(
    times: list[float], verdict: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuse_torchvision, "build", lambda name: torch.nn.Sequential(torch.nn.Flatten()))
    monkeypatch.setattr(fuse_torchvision, "in_turns", lambda calls, rounds: [[time] * 3 for time in times])
    monkeypatch.setattr(fuse_torchvision, "training", fuse_torchvision.inference)
    fuse_torchvision.main(["nothing", "--size", "4"])
    assert verdict in capsys.readouterr().out


def test_what_is_exported_is_served_without_tkernels(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tracing: None
) -> None:
    pytest.importorskip("onnxscript", reason="install the ecosystem group")
    fused: list[torch.nn.Module] = []
    fuse = tkernels.fuse
    monkeypatch.setattr(tkernels, "fuse", lambda model: fused.append(fuse(model)) or fused[-1])
    differences = export.main(epochs=1)
    images = modules.load()[0]
    # training steps, the accuracy's call, that whose outputs are compared: two chains of convolutions
    assert ran(fused[0]) == 2 * (-(-len(images) // 128) + 2)
    assert differences.keys() == {"weights.pt", "model.pt2", "model.onnx"}
    assert max(differences.values()) < 1e-4
    assert "a process without tkernels (0 of its modules loaded) answers by weights.pt" in capfd.readouterr().out


def test_the_serving_process_cannot_import_tkernels(tmp_path: Path) -> None:
    """Its first words, then what a server that needed the package would do."""
    text = Path(export.__file__).read_text()
    assert "        serve(Path(sys.argv[2]))" in text
    text = text.replace("        serve(Path(sys.argv[2]))", "        import tkernels")
    (tmp_path / "server.py").write_text(text)
    ran = subprocess.run([sys.executable, "-I", tmp_path / "server.py", "serve", "."], capture_output=True, text=True)
    assert ran.returncode == 1
    assert "ModuleNotFoundError: import of tkernels halted" in ran.stderr


def test_each_is_short_and_in_the_table() -> None:
    folder = Path(export.__file__).parent
    table = (folder.parent / "README.md").read_text()
    for path in folder.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 130
        assert path.stem == "__init__" or f"`python -m models.examples.{path.stem}" in table
