"""Memory for activations that is used again instead of being mapped anew at every step.

A fresh allocation of some megabytes costs a page fault for every 4 KB of it, about as much as a pass over it. The pool
keeps each storage it lent; one that nobody else refers to is free. So a buffer is never in two hands, however many
graphs, views, threads or exceptions there were, and nobody has to give one back.

Where the allocator's own memory comes without faults (FRESH), a convolution's result is better left to it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# smaller ones come from the allocator's heap without faults
SMALLEST = 1 << 20
# a buffer that so many requests passed by is given back to the system
PATIENCE = 512


class Buffer:
    """A storage, and the number of the request that took it last."""

    __slots__ = ("last", "storage")

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage, self.last = storage, 0

    def holders(self) -> tuple[int, int]:
        """How many tensors hold the storage, and how many variables; more of each than there are, by what asking adds
        in this version of Python and torch."""
        storage = self.storage
        return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)


# the holders of a storage that only its Buffer has
_NOBODY = Buffer(torch.UntypedStorage(0)).holders()


class Pool:
    """Storages by their size."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lent: dict[int, list[Buffer]] = {}
        self._requests = 0

    def take(self, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int], nbytes: int) -> Tensor:
        """A tensor over ``nbytes`` that nobody else holds, a view of nothing; its contents are anything.

        What was moved to shared memory is not used again: another process may hold it.
        """
        tensor = torch.empty(0, dtype=dtype)
        with self._lock:  # until the tensor holds the storage: between the two another thread would find it free
            self._requests += 1
            if self._requests % PATIENCE == 0:
                self._give_back()
            lent = self._lent.get(nbytes)
            if lent is None:
                lent = self._lent[nbytes] = []
            for buffer in lent:
                if buffer.holders() == _NOBODY:
                    storage = buffer.storage
                    if storage.nbytes() == nbytes and not storage.is_shared():
                        break
            else:
                buffer = Buffer(torch.empty(nbytes, dtype=torch.uint8).untyped_storage())
                lent.append(buffer)
            buffer.last = self._requests
            return tensor.set_(buffer.storage, 0, shape, strides)

    def held(self) -> int:
        """Bytes of all buffers, lent or free."""
        with self._lock:
            return sum(nbytes * len(lent) for nbytes, lent in self._lent.items())

    def clear(self) -> None:
        """Forget every buffer; those in use live on with whoever uses them."""
        with self._lock:
            self._lent.clear()

    def _give_back(self) -> None:
        for nbytes, lent in list(self._lent.items()):
            self._lent[nbytes] = [b for b in lent if self._requests - b.last < PATIENCE or b.holders() != _NOBODY]
            if not self._lent[nbytes]:
                del self._lent[nbytes]


POOL = Pool()

try:
    import resource
except ImportError:  # Windows
    _PAGE = 0
else:
    _PAGE = resource.getpagesize()
# for how many calls memory of a size is not tried afresh once it faulted, doubled each time it faults again
FIRST_REST, LONGEST_REST = 4, 1024


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
        else:
            self._next.pop(nbytes, None)
        return result


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


FRESH = Fresh()


def empty(like: Tensor) -> Tensor:
    """A fresh tensor with the shape, dtype and strides of dense ``like``, for results: it is a view of nothing, so that
    whoever gets it may write to it."""
    nbytes = like.element_size() * like.numel()
    if nbytes < SMALLEST:
        return torch.empty_like(like)
    return POOL.take(like.dtype, like.shape, like.stride(), nbytes)


def dense(dtype: torch.dtype, *shape: int) -> Tensor:
    """The same, contiguous."""
    strides, count = [], 1
    for size in reversed(shape):
        strides.append(count)
        count *= size
    nbytes = dtype.itemsize * count
    if nbytes < SMALLEST:
        return torch.empty(shape, dtype=dtype)
    return POOL.take(dtype, shape, strides[::-1], nbytes)


def channels_last(dtype: torch.dtype, n: int, c: int, h: int, w: int) -> Tensor:
    """The same, in torch.channels_last."""
    nbytes = dtype.itemsize * n * c * h * w
    if nbytes < SMALLEST:
        return torch.empty((n, c, h, w), dtype=dtype, memory_format=torch.channels_last)
    return POOL.take(dtype, (n, c, h, w), (h * w * c, 1, w * c, c), nbytes)
