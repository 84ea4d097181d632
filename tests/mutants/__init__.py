"""Faults that the tests must see, one at a time: ``python -m tests.mutants`` (``make mutants``)."""

from __future__ import annotations

from tests.mutants import conditions, kernels, paths

MUTANTS = [*paths.MUTANTS, *conditions.MUTANTS, *kernels.MUTANTS]
