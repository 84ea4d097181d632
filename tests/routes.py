"""What tests of routed products share: PyTorch's products beside ours."""

from __future__ import annotations

from typing import Any

import pytest

from tkernels.core import autotune, mode


def measured_passes(patch: pytest.MonkeyPatch, to_pytorch: str) -> list[str]:
    """Autotuning is on, with a clock that runs both bodies of a pass once and gives PyTorch the pass of this name.
    Returns the names of what it is asked for, as they come."""
    asked: list[str] = []

    def measure(name: str, batch: int, shape: Any, ours: Any, theirs: Any) -> bool:
        asked.append(name)
        ours()
        theirs()
        return name.endswith(to_pytorch)

    patch.setattr(autotune, "enabled", True)
    patch.setattr(autotune, "pick", lambda name, batch, shape, first, *_, **__: first)
    patch.setattr(autotune, "torch_is_faster", measure)
    patch.setattr(mode, "dot_precision", lambda *_: "tf32")
    return asked
