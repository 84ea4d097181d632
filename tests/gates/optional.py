"""Packages that a machine may lack: without one, its tests are skipped with a reason and nothing else stops."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

# import name: where it comes from
PACKAGES = {
    "accelerate": "the ecosystem group",
    "expecttest": "the test group, for torch.testing's lists of operators and modules",
    "hypothesis": "the test group",
    "lightning": "the ecosystem group",
    "matplotlib": "the train group",
    "mkdocs": "the docs group",
    "onnx": "the ecosystem group",
    "onnxscript": "the ecosystem group",
    "pandas": "the perf group",
    "sklearn": "the train group",
    "tensorboard": "pip install tensorboard",
    "timm": "the ecosystem group",
    "torchvision": "the train group",
    "tqdm": "the train group",
}


def reason(error: BaseException | None) -> str | None:
    """Why tests are skipped that ended in this error or in one raised from it, None where no package is missing."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            package = error.name.partition(".")[0]
            if package in PACKAGES:
                return f"{package} is not installed ({PACKAGES[package]})"
        error = error.__cause__
    return None


@contextlib.contextmanager
def skipping() -> Iterator[None]:
    """Skip the test that imports one of the packages in this block, with the reason."""
    try:
        yield
    except ModuleNotFoundError as error:
        why = reason(error)
        if why is None:
            raise
        pytest.skip(why)
