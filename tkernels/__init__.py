"""Fused Triton kernels for training convolutional networks, with a PyTorch body where there is no GPU."""

__version__ = "0.2.0"

import contextlib
import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from tkernels import functional, nn
from tkernels.core.mode import backend, get_backend

if TYPE_CHECKING:
    from tkernels.fusion import explain, fuse, unfuse

__all__ = ["__version__", "backend", "explain", "functional", "fuse", "get_backend", "nn", "unfuse"]


def __getattr__(name: str) -> Any:
    # Fusion rests on Dynamo, whose import takes as long as torch's own and needs a folder for temporary files: whoever
    # asks for it pays
    if name in ("explain", "fuse", "fusion", "unfuse"):
        fusion = importlib.import_module("tkernels.fusion")
        return fusion if name == "fusion" else getattr(fusion, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Installed, the package has an entry point by which torch.compile finds the backend "tkernels". Run from its sources it
# has not: the name is known once fusion is imported.
if not entry_points(group="torch_dynamo_backends", name="tkernels"):
    with contextlib.suppress(FileNotFoundError):
        importlib.import_module("tkernels.fusion")
