"""What tests of training share."""

from __future__ import annotations

import pytest

from models import plots


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends draws nothing, which takes longer than it does."""
    for name in ("draw_curves", "draw_confusion"):
        monkeypatch.setattr(plots, name, lambda *args: None)
