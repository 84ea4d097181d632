"""The example that people copy: it learns, by fused calls, and README shows it as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models import example
from tests.cpu import profiles
from tests.watch import AtenWatch


@pytest.mark.gate("torch")
def test_a_step_is_fused() -> None:
    """One batch: the compiled passes of both stages on a CPU."""
    images, _, digits, _ = example.load()
    model = example.build()
    ran = profiles.events(lambda: example.train(model, images[:256], digits[:256], epochs=1, batch_size=256), ())
    assert ran.count("tkernels: statistics") == 3, ran
    assert ran.count("tkernels: end 2x2") == ran.count("tkernels: end gradient 2x2") == 2


@pytest.mark.gate("ttsem", "cuda")
def test_kernels_do_all_of_it(device: str, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "DEVICE", device)
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)  # which asks no driver that is not there
    images, val_images, digits, val_digits = example.load()
    model = example.build()
    with AtenWatch() as watch:
        example.train(model, images[:3], digits[:3], epochs=1)
        example.accuracy(model, val_images[:2], val_digits[:2])
    assert not watch.replaced(), watch.replaced()
    # of each convolution, forward, weight gradient and batch norm both ways; of each linear layer three products
    assert len(launches) >= 3 * 4 + 2 * 3 + 2


@pytest.mark.gate("torch")
@pytest.mark.extended("torch")
def test_it_learns(capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main() >= 0.97
    assert "validation accuracy 9" in capsys.readouterr().out


@pytest.mark.gate("torch")
def test_readme_shows_it() -> None:
    path = Path(example.__file__)
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    readme = (path.parents[1] / "README.md").read_text()
    assert f"```python\n{text}```\n" in readme
