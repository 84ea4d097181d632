"""From (shape, dtype, target) to a launch configuration. One file an operator, closed forms only.

Block sizes never depend on the batch: batches 256, 17 and 1 share one compiled kernel.
"""

from __future__ import annotations

import dataclasses
import functools


@dataclasses.dataclass(frozen=True)
class Config:
    """One launch configuration: block sizes (constexpr names to powers of two) and Triton's launch options.

    ``maxnreg`` caps registers a thread on NVIDIA and is None on AMD, which has no such option (Target.registers).
    """

    blocks: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None

    @classmethod
    def of(cls, num_warps: int = 4, num_stages: int = 2, maxnreg: int | None = None, **blocks: int) -> Config:
        return cls(tuple(blocks.items()), num_warps, num_stages, maxnreg)

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
        return dict(self.blocks)

    @functools.cached_property
    def _options(self) -> dict[str, int]:
        found = {**self._sizes, "num_warps": self.num_warps, "num_stages": self.num_stages}
        return found if self.maxnreg is None else {**found, "maxnreg": self.maxnreg}

    def __getitem__(self, name: str) -> int:
        return self._sizes[name]

    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch, not to be changed: blocks, num_warps, num_stages and, if given, maxnreg."""
        return self._options


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n (1 for n < 1)."""
    return 1 << max(n - 1, 0).bit_length()


def block(n: int, lowest: int, highest: int) -> int:
    """A power-of-two block that covers n, kept within [lowest, highest]."""
    return min(max(next_power_of_two(n), lowest), highest)
