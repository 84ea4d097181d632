"""Memory for activations that is used again instead of being mapped anew at every step.

A fresh allocation of some megabytes costs a page fault for every 4 KB of it, about as much as a pass over it. The pool
keeps a reference to each storage it lent; one that nothing else refers to is free. So a buffer is never in two hands,
however many graphs, views, threads or exceptions there were, and nobody has to give one back.

Where the allocator's own memory comes without faults (FRESH), a convolution's result is better left to it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# smaller ones come from the allocator's heap without faults
SMALLEST = 1 << 20
# a buffer that so many requests passed by is given back to the system
PATIENCE = 512


class Pool:
    """Flat tensors of bytes by their size, each with the number of the request that took it last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lent: dict[int, list[tuple[Tensor, int]]] = {}
        self._requests = 0

    def take(self, nbytes: int) -> Tensor:
        """``nbytes`` bytes that nobody else holds, uint8 [nbytes]; their contents are anything.

        What was moved to shared memory is not used again: another process may hold it.
        """
        with self._lock:
            self._requests += 1
            if self._requests % PATIENCE == 0:
                self._give_back()
            lent = self._lent.setdefault(nbytes, [])
            for i, (kept, _) in enumerate(lent):
                storage = kept.untyped_storage()
                if not _in_use(storage) and storage.nbytes() == nbytes and not storage.is_shared():
                    lent[i] = kept, self._requests
                    return kept.detach()
            # no tensor of inference mode, which backward could not keep later
            with torch.inference_mode(False):
                kept = torch.empty(nbytes, dtype=torch.uint8)
            lent.append((kept, self._requests))
            return kept.detach()

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
            kept = [(t, last) for t, last in lent if self._requests - last < PATIENCE or _in_use(t.untyped_storage())]
            self._lent[nbytes] = kept
            if not kept:
                del self._lent[nbytes]


def _in_use(storage: torch.UntypedStorage) -> bool:
    """Whether anything refers to the storage but the pool's own tensor and the object that is asked."""
    return torch._C._storage_Use_Count(storage._cdata) > 2


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
    return _whole(nbytes, like.dtype, like.shape, like.stride())


def dense(dtype: torch.dtype, *shape: int) -> Tensor:
    """The same, contiguous."""
    size = torch.Size(shape)
    nbytes = dtype.itemsize * size.numel()
    if nbytes < SMALLEST:
        return torch.empty(size, dtype=dtype)
    strides = [size[i + 1 :].numel() for i in range(len(size))]
    return _whole(nbytes, dtype, size, strides)


def _whole(nbytes: int, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    fresh = torch.empty(0, dtype=dtype)
    # held until the result holds the storage: between the two another thread would find it free
    lent = POOL.take(nbytes)
    return fresh.set_(lent.untyped_storage(), 0, shape, strides)
