"""What became of a model's layers, in words."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class FusionReport:
    """What the graphs of a model came to; printed, a line each.

    A model that was compiled for several kinds of calls (training and evaluation, other sizes) has its chains once for
    each.

    Attributes:
        fused: (module, chain of layers); the module's name is empty for the model itself
        left: (layer, why it stays PyTorch's)
        hints: what would make it faster, and is not fuse's to do
        breaks: what Dynamo ended a graph at
        graphs: how many it compiled
        seconds: how long the calls took that did so

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 10), torch.nn.ReLU())
        >>> report = tkernels.explain(model, torch.randn(8, 20))
        >>> report.graphs, report.fused, [layers for layers, why in report.left]  # so few values stay PyTorch's
        (1, [], ['0 -> 1'])
    """

    fused: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    left: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    hints: list[str] = dataclasses.field(default_factory=list)
    breaks: list[str] = dataclasses.field(default_factory=list)
    graphs: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        chains, graphs = ("s" if count != 1 else "" for count in (len(self.fused), self.graphs))
        lines = [
            f"fused: {len(self.fused)} chain{chains} in {self.graphs} graph{graphs}, first calls {self.seconds:.1f} s"
        ]
        lines += [f"  {name or '(model)'}: {what}" for name, what in self.fused]
        lines.append(f"left as it was: {len(self.left)}")
        lines += [f"  {name or '(model)'}: {why}" for name, why in self.left]
        if self.hints:
            lines.append(f"yours to do: {len(self.hints)}")
            lines += [f"  {hint}" for hint in self.hints]
        if self.breaks:
            lines.append(f"Dynamo ended a graph at: {len(self.breaks)} (TORCH_LOGS=graph_breaks shows the lines)")
            lines += [f"  {why}" for why in self.breaks]
        return "\n".join(lines)
