"""A fused model's graph on its own, for tensors that Dynamo does not take: fake ones that say they are on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import tkernels
from tkernels.core import targets
from tkernels.core.targets import Target
from tkernels.fusion import FusionReport
from tkernels.fusion.backend import Backend
from tkernels.fusion.in_place import entry


class _Captured(Exception):
    """The graph is there and need not run."""


class Rewritten(nn.Module):
    """``model`` as fuse() runs it where kernels are: the rewritten graph of a call with CPU tensor ``x``, called with
    the parameters and buffers that the model has by then. ``target``: the GPU whose convolutions may be PyTorch's, None
    where none are. ``report``: what was fused; ``graph``: what runs.

    Raises torch._dynamo.exc.Unsupported for a model that Dynamo has no single graph for.
    """

    report: FusionReport
    graph: torch.fx.Graph

    def __init__(self, model: nn.Module, x: Tensor, target: Target | None = None) -> None:
        super().__init__()
        self.model = model
        given: list[Any] = []

        def capture(gm: torch.fx.GraphModule, inputs: Any) -> Any:
            backend = Backend()
            self._run = backend(gm, inputs)
            self.report, self.graph = backend.report, gm.graph

            def stop(*args: Any) -> None:
                given.extend(args)
                raise _Captured

            return stop

        try:
            with _kernels_for_cpu_tensors(target):
                torch.compile(entry(model), backend=capture, fullgraph=True)(x)
        except _Captured:
            pass
        names = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
        # the name of a tensor of the model's; the image and numbers as they are
        self._given = [names.get(id(t), t) for t in given]
        self._x = x

    def forward(self, x: Tensor) -> Tensor:
        own = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        given = (x if a is self._x else own[a] if isinstance(a, str) else a for a in self._given)
        y: Tensor = self._run(*given)[0]
        return y


@contextlib.contextmanager
def _kernels_for_cpu_tensors(target: Target | None) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(tkernels.backend("triton" if target is None else "auto"))
        if target is not None:
            stack.enter_context(targets.pretend(target))
        yield
