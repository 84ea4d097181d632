"""A training step captured as a CUDA graph: one launch from the host instead of some eighty."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from models.arguments import one_line
from models.engine import WHOLE, Step

# (images, target) -> (loss, logits): forward, loss, backward and the optimizer's step
Call = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# steps before the capture: kernels are compiled, the optimizer makes its state, workspaces are allocated
WARM_UP = 3
# what torch says of a call that waits for the device, and once of the mode that makes it say so
_WAITS = "called a synchronizing CUDA operation"
_PROTOTYPE = "Synchronization debug mode is a prototype"
# torch 2.11's allocator of pinned memory keeps a pointer to a graph whose capture failed: such a graph must not die
_failed_graphs: list[torch.cuda.CUDAGraph] = []


class CaptureError(Exception):
    """A capture failed and the device cannot be shown to be as it was before; the message says why in one line."""


class GraphedStep:
    """Calls like the step it wraps; from the fourth full batch on a CUDA graph is replayed.

    Full are batches of the largest shape seen before the capture; others, as the last of an epoch, run eagerly. The
    step must keep to its tensors (an optimizer that is capturable, a learning rate that is a tensor); what it returns
    is overwritten by the next batch. Every batch is trained on exactly once, whatever fails:

    - The last eager step before the capture runs under torch's sync debug mode. Where it waits for the device nothing
      is captured and training goes on eagerly; the step itself is whole, for the mode only warns.
    - Nothing of a capture is executed: after a failed one parameters, buffers, optimizer state and random numbers are
      those of the batch before. Stream, generator and allocator are put back, ``abandon`` lets go of what the broken
      step left in Python, and the batch runs eagerly if then random numbers can be drawn, the device answers, and no
      tensor is alive that the capture made (it was never computed). Else CaptureError.

    ``log`` is called with one line where training goes on without a graph.
    """

    def __init__(
        self, step: Call, log: Callable[[str], None] = print, abandon: Callable[[], None] = lambda: None
    ) -> None:
        self._step, self._log, self._abandon = step, log, abandon
        self._batches = 0
        self._layout: tuple[torch.Size, object] | None = None
        # warm-up and capture share a stream, so that the capture finds the libraries' workspaces of that stream
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given: tuple[Tensor, Tensor] | None = None
        self._results: tuple[Tensor, Tensor] | None = None
        self._eager = False

    def __call__(self, images: Tensor, target: Tensor, step: Step = WHOLE) -> tuple[Tensor, Tensor]:
        """``step`` is a whole one always: there is no graph where batches are accumulated."""
        with torch.cuda.device_of(images):  # streams and graphs are the current device's
            if self._eager or not self._is_full(images, target):
                return self._step(images, target)
            if self._batches < WARM_UP:
                return self._warm_up(images, target)
            if self._graph is None:
                self._capture(images, target)
            if self._graph is None or self._given is None or self._results is None:
                return self._step(images, target)
            for static, new in zip(self._given, (images, target)):
                static.copy_(new)
            self._graph.replay()
            return self._results

    def _is_full(self, images: Tensor, target: Tensor) -> bool:
        layout = (images.shape, (images.stride(), images.dtype, target.shape, target.dtype))
        # a run that is resumed may begin with the last batch of an epoch
        if self._graph is None and (self._layout is None or images.shape[0] > self._layout[0][0]):
            self._layout, self._batches = layout, 0
        return layout == self._layout

    def _warm_up(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        self._batches += 1
        if self._batches < WARM_UP:
            return self._beside(images, target)
        with _watched() as waits:
            results = self._beside(images, target)
        if waits:
            self._go_on_eagerly(f"it waits for the device ({', '.join(waits[:3])})")
        return results

    def _beside(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """An eager step on a stream of its own, as torch asks for before a capture."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            results = self._step(images, target)
        torch.cuda.current_stream().wait_stream(self._stream)
        return results

    def _capture(self, images: Tensor, target: Tensor) -> None:
        """Record the step; nothing of it is executed."""
        given = (images.clone(), target.clone())
        capture = _Capture()
        reason = self._record(capture, given)
        if not reason:
            self._graph, self._given = capture.graph, given
            return
        try:
            self._abandon()
            capture.undo()
        except Exception as error:  # whatever it is, the state is not proven
            raise CaptureError(
                f"the step could not be captured as a CUDA graph ({reason}), and then the device was not as before "
                f"({one_line(error)[:200]})"
            ) from None
        self._go_on_eagerly(reason)

    def _record(self, capture: _Capture, given: tuple[Tensor, Tensor]) -> str:
        """Why the capture failed, empty if it did not. No exception is left that would keep the step's tensors."""
        reason, before = "", torch.cuda.current_stream()
        try:
            # thread_local: under "global" what a DataLoader's thread does to pin memory ends the capture
            with torch.cuda.graph(
                capture.graph, pool=capture.pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                try:
                    self._results = self._step(*given)
                except Exception as error:  # leaving the capture raises another, which says less
                    reason = one_line(error)[:200]
                    raise
        except Exception as error:
            self._results = None
            return reason or one_line(error)[:200]
        finally:
            torch.cuda.set_stream(before)  # torch leaves its own where the capture cannot be ended
        return ""

    def _go_on_eagerly(self, reason: str) -> None:
        self._eager = True
        self._log(f"note: the step could not be captured as a CUDA graph, training goes on without: {reason}")


class _Capture:
    """A graph to be, with what it takes to be back where its capture began."""

    def __init__(self) -> None:
        self.graph, self.pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        self._device = torch.cuda.current_device()
        self._generator = torch.cuda.default_generators[self._device]
        self._numbers, self._twin = self._generator.get_state(), self._generator.clone_state()

    def undo(self) -> None:
        """After a failed capture, and with its exception gone: raises where things are not as they were before it.

        Where the driver has invalidated a capture torch 2.11 cannot end it: the generator goes on capturing, the
        allocator goes on serving the graph's pool. Later versions clear up more of that.
        """
        _failed_graphs.append(self.graph)
        self.graph.reset()
        self._leave_pool()
        gc.collect()
        if self._alive():
            raise RuntimeError("a tensor is kept that the capture made and did not compute")
        self._mend_generator()
        torch.cuda.synchronize()

    def _alive(self) -> bool:
        """Whether a tensor in the graph's memory is in use."""
        return any(
            block["state"] == "active_allocated"
            for segment in torch.cuda.memory_snapshot()
            if tuple(segment["segment_pool_id"]) == tuple(self.pool)
            for block in segment["blocks"]
        )

    def _leave_pool(self) -> None:
        try:
            torch._C._cuda_endAllocateToPool(self._device, self.pool)
        except RuntimeError:  # torch has ended it itself
            return
        torch._C._cuda_releasePool(self._device, self.pool)

    def _mend_generator(self) -> None:
        try:
            self._draw()
        except RuntimeError:  # it is still capturing: its twin takes its place
            self._generator.graphsafe_set_state(self._twin)
            self._draw()
        self._generator.set_state(self._numbers)

    def _draw(self) -> None:
        torch.rand(1, device=self._generator.device)


@contextlib.contextmanager
def _watched() -> Iterator[list[str]]:
    """Collects where what is within waits for the device, as file:line; complete when it is left.

    In the mode "error" the first wait would break off the step half done.
    """
    waits: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in seen:
        text = str(warning.message)
        if _WAITS in text:
            waits.append(f"{Path(warning.filename).name}:{warning.lineno}")
        elif _PROTOTYPE not in text:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
