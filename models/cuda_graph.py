"""A training step captured as a CUDA graph: one launch from the host instead of some eighty."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# (images, target) -> (loss, logits): forward, loss, backward and the optimizer's step
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# steps before the capture: kernels are compiled, the optimizer makes its state, workspaces are allocated
WARM_UP = 3


class GraphedStep:
    """Calls like the step it wraps; from the fourth batch of the first batch's shape on a CUDA graph is replayed.

    Batches of another shape, as the last of an epoch, run eagerly. Where the capture fails training goes on eagerly,
    and ``tell`` is called with one line that says why. The step must keep to its tensors (an optimizer that is
    capturable, a learning rate that is a tensor); what it returns is overwritten by the next batch.
    """

    def __init__(self, step: Step, tell: Callable[[str], None] = print) -> None:
        self._step, self._tell = step, tell
        self._batches = 0
        self._layout: tuple[object, ...] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given: tuple[Tensor, Tensor] | None = None
        self._results: tuple[Tensor, Tensor] | None = None
        self._failed = False

    def __call__(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        layout = (images.shape, images.stride(), images.dtype, target.shape, target.dtype)
        if self._layout is None:
            self._layout = layout
        if self._failed or layout != self._layout:
            return self._step(images, target)
        if self._batches < WARM_UP:
            self._batches += 1
            return self._beside(images, target)
        if self._graph is None:
            self._capture(images, target)
        if self._graph is None or self._given is None or self._results is None:
            return self._step(images, target)
        for static, new in zip(self._given, (images, target)):
            static.copy_(new)
        self._graph.replay()
        return self._results

    def _beside(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """An eager step on a stream of its own, as torch asks for before a capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results = self._step(images, target)
        torch.cuda.current_stream().wait_stream(stream)
        return results

    def _capture(self, images: Tensor, target: Tensor) -> None:
        """Record the step; nothing of it is executed."""
        given = (images.clone(), target.clone())
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._results = self._step(*given)
        except RuntimeError as error:
            self._failed = True
            reason = " ".join(str(error).split())[:200]
            self._tell(f"note: the step could not be captured as a CUDA graph, training goes on without: {reason}")
        else:
            self._graph, self._given = graph, given
