"""What users call by name."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import tkernels
from tkernels import functional, fusion, nn


def public_names() -> Iterator[tuple[str, Any]]:
    """Functions and classes by the first of their public names."""
    seen = []
    for module in (tkernels, functional, nn, fusion):
        for name in module.__all__:
            value = getattr(module, name)
            if not isinstance(value, types.ModuleType | str) and value not in seen:
                seen.append(value)
                yield f"{module.__name__}.{name}", value
