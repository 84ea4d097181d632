"""Memory for activations that is used again instead of being mapped anew at every step.

A fresh allocation of some megabytes costs a page fault for every 4 KB of it, about as much as a pass over it. The pool
keeps each storage it lent; one that nobody else refers to is free. So a buffer is never in two hands, however many
graphs, views, threads or exceptions there were, and nobody has to give one back.

There is no lock, which a forked process could inherit held and a signal handler wait for in vain. Whoever finds a
storage free takes hold of it and only then looks whether somebody else did so as well; if so, it lets go again.

Where the allocator's own memory comes without faults (FRESH), a convolution's result is better left to it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tkernels.core import _torch

# smaller ones come from the allocator's heap without faults
SMALLEST = 1 << 20
# Requests after which the pool forgets a storage that none of them took: at least, and at most.
SHORTEST, LONGEST = 32, 4096
# At most where more is held than GENEROUS times what was in use at once: as by batches of many sizes, not by a step.
WASTEFUL, GENEROUS = 512, 3
# how often, at least, it is seen how much is in use: at several moments of a step of more than WASTEFUL requests
LOOK = 128
# so many storages forgotten tell whether that was too early
JUDGED = 16


class Buffer:
    """A storage, its address, and the number of the request that took it last."""

    __slots__ = ("address", "last", "storage")

    def __init__(self, nbytes: int) -> None:
        # (torch.empty rather than UntypedStorage, so that what fills fresh memory for tests fills this)
        self.storage = torch.empty(nbytes, dtype=torch.uint8, device="cpu").untyped_storage()
        self.address, self.last = _torch.storage_address(self.storage), 0


def _new(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device="cpu")


class Scale:
    """What the counts of a storage are while one tensor holds it and nobody else: those of a storage where that is so.

    Variables are counted each time anew, by the same line as a buffer's: how many references asking adds depends on the
    version of Python. The fewest ever seen count, should somebody have looked at this storage meanwhile.
    """

    def __init__(self) -> None:
        self.buffer = Buffer(0)
        self.nobody = _torch.count_storage_uses(self.buffer.address)
        self._tensor = _new(torch.uint8).set_(self.buffer.storage, 0, (0,), (1,))
        self.one = _torch.count_storage_uses(self.buffer.address)
        self.fewest = self.variables(self.buffer)

    @staticmethod
    def variables(buffer: Buffer) -> int:
        # (no local variable of the storage: a tracer that reads a frame's would hold it too)
        return sys.getrefcount(buffer.storage)

    def alone(self, buffer: Buffer) -> bool:
        """Whether nobody but the asker's tensor holds the buffer, which no tensor held a moment ago.

        Tensors come first, a moment ago, and last: a storage that is turned from a variable to a tensor or back between
        two counts would have to be turned twice within three of them.
        """
        self.fewest = min(self.fewest, self.variables(self.buffer))
        return self.variables(buffer) <= self.fewest and _torch.count_storage_uses(buffer.address) == self.one


_SCALE = Scale()


class _Round:
    """What was forgotten within a round: how much of each size, of all, and how much was asked for again; and the most
    bytes that were in use at once."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.forgotten = self.regretted = self.used = 0

    def early(self) -> bool:
        return 2 * self.regretted >= self.forgotten


class Patience:
    """For how many requests a storage is kept that none of them takes: twice as many once most of what was forgotten is
    asked for again, half as many once most is not. A round has as many requests as that may become."""

    def __init__(self) -> None:
        self.requests, self.most = SHORTEST, LONGEST
        self._start, self._last, self._this = 0, _Round(), _Round()

    def _begin(self, now: int) -> None:
        used = max(self._last.used, self._this.used)
        self._start, self._last, self._this = now, _Round(), _Round()
        self._last.used = used

    def saw(self, used: int, held: int) -> None:
        """Bytes in use at a moment, and those of all storages."""
        self._this.used = max(self._this.used, used)
        self.most = LONGEST if held <= GENEROUS * max(self._last.used, self._this.used) else WASTEFUL
        self.requests = min(self.requests, self.most)

    def forgot(self, nbytes: int, count: int) -> None:
        """So many free storages of that size."""
        this = self._this
        this.sizes[nbytes] = this.sizes.get(nbytes, 0) + count
        this.forgotten += count

    def missed(self, nbytes: int, now: int) -> None:
        """A storage of that size had to be made at request ``now``."""
        for judged in (self._last, self._this):
            count = judged.sizes.get(nbytes, 0)
            if count:
                judged.sizes[nbytes] = count - 1
                judged.regretted += 1
                if judged.regretted >= JUDGED and judged.early():
                    self.requests = min(2 * self.requests, self.most)
                    self._begin(now)
                return

    def look_back(self, now: int) -> None:
        """At request ``now``, on what had a whole round to be asked for again."""
        if now - self._start >= self.most:
            if self._last.forgotten >= JUDGED and not self._last.early():
                self.requests = max(self.requests // 2, SHORTEST)
            self._start, self._last, self._this = now, self._this, _Round()


class Pool:
    """Storages by their size, those that the last requests took: what a step of training takes, or two kinds of steps
    in turn, and little more than a step where sizes never come back."""

    def __init__(self) -> None:
        self._lent: dict[int, list[Buffer]] = {}
        self._requests = 0
        self.patience = Patience()

    def take(self, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int], nbytes: int) -> Tensor:
        """A tensor over ``nbytes`` that nobody else holds, a view of nothing; its contents are anything.

        What was moved to shared memory is not used again: another process may hold it.
        """
        self._requests += 1
        if self._requests % min(self.patience.requests, LOOK) == 0:
            self._look()
        tensor = _new(dtype)
        for buffer in self._lent.get(nbytes, ()):
            if (
                _torch.count_storage_uses(buffer.address) == _SCALE.nobody
                and buffer.storage.nbytes() == nbytes
                and not buffer.storage.is_shared()
            ):
                tensor.set_(buffer.storage, 0, shape, strides)
                if _SCALE.alone(buffer):
                    buffer.last = self._requests
                    return tensor
                tensor = _new(dtype)
        self.patience.missed(nbytes, self._requests)
        buffer = Buffer(nbytes)
        buffer.last = self._requests
        tensor.set_(buffer.storage, 0, shape, strides)
        self._lent.setdefault(nbytes, []).append(buffer)  # which others see once it is held
        return tensor

    def held(self) -> int:
        """Bytes of all buffers, lent or free."""
        return sum(nbytes * len(lent) for nbytes, lent in list(self._lent.items()))

    def clear(self) -> None:
        """Forget every buffer; those in use live on with whoever uses them."""
        self._lent.clear()

    def _look(self) -> None:
        """See how much is in use, which one moment of a step does not tell, and forget what it is time for."""
        used = held = 0
        for nbytes, lent in list(self._lent.items()):
            held += nbytes * len(lent)
            used += nbytes * sum(_torch.count_storage_uses(b.address) != _SCALE.nobody for b in lent)
        self.patience.saw(used, held)
        if self._requests % self.patience.requests == 0:
            self._forget()

    def _forget(self) -> None:
        """Free storages that the last requests did not take; those that somebody has held for very long, too, which go
        back to the system from there."""
        self.patience.look_back(self._requests)
        patience = self.patience.requests
        young, oldest = self._requests - patience, self._requests - max(WASTEFUL, 2 * patience)
        for nbytes, lent in list(self._lent.items()):
            free = [b for b in lent if b.last <= young and _torch.count_storage_uses(b.address) == _SCALE.nobody]
            kept = [b for b in lent if b.last > oldest and b not in free]
            self.patience.forgot(nbytes, len(free))
            if kept:
                self._lent[nbytes] = kept
            else:
                self._lent.pop(nbytes, None)


POOL = Pool()

try:
    import resource
except ImportError:  # Windows
    _PAGE = 0
else:
    _PAGE = resource.getpagesize()
# for how many calls memory of a size is not tried afresh once it faulted, doubled each time it faults again
FIRST_REST, LONGEST_REST = 4, 1024
MOST_SIZES = 4096


class Fresh:
    """Whether new memory costs page faults, seen by trying: the allocator may keep what it got back, or the user has
    told it to (glibc: MALLOC_MMAP_MAX_=0, a large MALLOC_TRIM_THRESHOLD_)."""

    def __init__(self) -> None:
        self._rest: dict[int, int] = {}
        self._next: dict[int, int] = {}

    def faulted(self, nbytes: int) -> bool:
        """Whether memory of this size was seen to fault of late, so that memory used again is better."""
        rest = self._rest.get(nbytes, 0)
        if rest:
            self._rest[nbytes] = rest - 1
        return _PAGE == 0 or rest > 0

    def watch(self, nbytes: int, make: Callable[[], Tensor]) -> Tensor:
        """``make()``, which allocates that much and writes to all of it."""
        before = _faults()
        result = make()
        if _faults() - before > nbytes // _PAGE // 2:
            self._rest[nbytes] = self._next.get(nbytes, FIRST_REST)
            self._next[nbytes] = min(2 * self._rest[nbytes], LONGEST_REST)
            if len(self._next) > MOST_SIZES:  # of a program whose sizes never come back
                self._rest.clear()
                self._next.clear()
        else:
            self._next.pop(nbytes, None)
        return result


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


FRESH = Fresh()


def _strided(dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    nbytes = dtype.itemsize * math.prod(shape)
    if nbytes < SMALLEST:
        return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")
    return POOL.take(dtype, shape, strides, nbytes)


def empty(like: Tensor) -> Tensor:
    """A fresh tensor with the shape, dtype and strides of dense ``like``, for results: it is a view of nothing, so that
    whoever gets it may write to it."""
    return _strided(like.dtype, like.shape, like.stride())


def dense(dtype: torch.dtype, *shape: int) -> Tensor:
    """The same, contiguous."""
    strides = [1]
    for size in shape[:0:-1]:
        strides.append(strides[-1] * size)
    return _strided(dtype, shape, strides[::-1])


def channels_last(dtype: torch.dtype, n: int, c: int, h: int, w: int) -> Tensor:
    """The same, in torch.channels_last."""
    return _strided(dtype, (n, c, h, w), (h * w * c, 1, w * c, c))
