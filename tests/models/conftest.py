"""What tests of training share."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from torch.utils.data import Subset

from models import data, plots


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends draws nothing, which takes longer than it does."""
    for name in ("draw_curves", "draw_confusion"):
        monkeypatch.setattr(plots, name, lambda *args: None)


@functools.cache
def _few(data_dir: Path, seed: int, val_fraction: float | None) -> data.Data:
    images = data.digits(data_dir, seed)
    return images._replace(train=Subset(images.train, range(40)), val=Subset(images.val, range(16)))


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits data set has 40 images to train on and 16 to validate."""
    monkeypatch.setitem(data._LOADERS, "digits", _few)
