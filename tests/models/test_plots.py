"""Pictures of a run, whatever people call their classes and files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from models import plots
from models.history import Row

pytestmark = pytest.mark.gate("torch")

NAMES = ["cost_$10^$", "$x$", r"\\$5\\$", "$\\frac{a}{b$", "a_b^c", "two\nlines", "x" * 1000, "\x1b[0m\0", "\ud800"]


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All that is written in the pictures saved."""
    found: list[Any] = []
    save = Figure.savefig

    def saved(self: Figure, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        for axes in self.axes:
            found.extend([*axes.get_xticklabels(), *axes.get_yticklabels()])
        found.append(self._suptitle)  # type: ignore[attr-defined]

    monkeypatch.setattr(Figure, "savefig", saved)
    return found


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_is_drawn_as_it_stands(tmp_path: Path, texts: list[Any], name: str) -> None:
    """No formula is read into it, and a long one leaves room for the picture."""
    path, title = tmp_path / "x.png", f"fused MLP on csv:{name}.csv"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.draw_confusion(torch.eye(2, dtype=torch.int64), [name, "other"], path, title)
        plots.draw_curves([Row(1, 1.0, 1.0, 0.5, 0.5)], path, title)
        plots.draw_gradients({name: (0.1, 0.2)}, path, title)
    assert Image.open(path).size[0] > 0
    plain = [text for text in texts if not text.get_parse_math()]
    shown = [text.get_text() for text in plain]
    assert len(shown) == 4 + 1 + 1 + 1 + 1  # names of classes twice, a layer's, three titles
    if len(name) < 30 and name.isprintable():
        assert shown.count(name) == 3
        assert shown.count(title) == 3
    assert all(len(text) <= 120 and text.isprintable() for text in shown)
