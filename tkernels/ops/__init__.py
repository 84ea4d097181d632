"""Operators, a folder each: op.py (checks, autograd, PyTorch body), kernels*.py (device code, launches), config.py."""
