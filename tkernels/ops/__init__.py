"""Operators, a folder each: op.py (checks, autograd, PyTorch body), kernels*.py (device code, launches), config.py.

``cpu``: tkernels.cpu, which they ask first for a call on a CPU; None where that folder is not there.
"""

try:
    import tkernels.cpu as cpu
except ModuleNotFoundError as error:
    if error.name != f"{__name__.rpartition('.')[0]}.cpu":
        raise
    cpu = None  # type: ignore[assignment]
