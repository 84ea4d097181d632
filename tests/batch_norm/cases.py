"""Calls of batch_norm to test with, and what they give: ours, and torch's own in float64."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tkernels.core import activation as activations
from tkernels.functional import batch_norm

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
FORWARD = ["statistics_kernel", "finalize_statistics_kernel", "normalize_kernel"]
BACKWARD = ["gradient_sums_kernel", "finalize_gradients_kernel", "input_gradient_kernel"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of batch_norm and its backward. ``layout`` and ``dy`` name the strides (see arrange)."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    dtype: torch.dtype = F32
    training: bool = True
    weight: bool = True
    bias: bool = True
    running: bool = True
    half_parameters: bool = False
    activation: str | None = None
    residual: str | None = None
    dy: str = "contiguous"
    frozen: tuple[str, ...] = ()
    ratio: float = 1.0

    def __str__(self) -> str:
        default = {f.name: f.default for f in dataclasses.fields(self)}
        told = [f"{k}={v}".replace("torch.", "") for k, v in vars(self).items() if k == "shape" or v != default[k]]
        return " ".join(told)


def arrange(t: Tensor, layout: str) -> Tensor:
    """The same values in other strides."""
    if layout == "contiguous":
        return t.contiguous()
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last if t.ndim == 4 else torch.channels_last_3d)
    if layout == "sliced":
        return torch.stack([t, torch.full_like(t, 1e4)], -1)[..., 0]
    if layout == "sliced channels_last":
        wide = torch.cat([t, torch.full_like(t, 1e4)], 1)
        return wide.contiguous(memory_format=torch.channels_last)[:, : t.shape[1]]
    if layout == "transposed":
        return t.transpose(1, -1).contiguous().transpose(1, -1)
    if layout == "offset":
        return torch.cat([torch.full_like(t, 1e4)[:1], t])[1:]
    if layout == "expanded":
        return t[:1].expand(t.shape)
    raise ValueError(layout)


@dataclasses.dataclass
class Operands:
    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    residual: Tensor | None
    dy: Tensor

    def like(self, dtype: torch.dtype | None, device: str) -> Operands:
        """The same values, detached; ``dtype`` None keeps each tensor's own dtype and strides."""
        return Operands(**{k: _moved(v, dtype, device) for k, v in vars(self).items()})


def _moved(t: Tensor | None, dtype: torch.dtype | None, device: str) -> Tensor | None:
    if t is None:
        return None
    return t.detach().to(device, dtype or t.dtype, copy=True)


def operands(case: Case) -> Operands:
    channels = case.shape[1]
    parameter = case.dtype if case.half_parameters or case.dtype == F64 else F32
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=F64)

    return Operands(
        arrange((draw(*case.shape) + case.ratio).to(case.dtype), case.layout),
        (draw(channels).abs() + 0.5).to(parameter) if case.weight else None,
        draw(channels).to(parameter) if case.bias else None,
        (draw(channels) + case.ratio).to(parameter) if case.running else None,
        (draw(channels).abs() + 0.5).to(parameter) if case.running else None,
        arrange(draw(*case.shape).to(case.dtype), case.residual) if case.residual else None,
        arrange(draw(*case.shape).to(case.dtype), case.dy),
    )


def evaluate(case: Case, o: Operands, reference: bool) -> dict[str, Tensor]:
    """Output, gradients and running statistics of one call: ours, or the composition of torch's own functions."""
    leaves = {
        k: t.requires_grad_()
        for k in ("input", "weight", "bias", "residual")
        if (t := getattr(o, k)) is not None and k not in case.frozen
    }
    arguments = (o.input, o.running_mean, o.running_var, o.weight, o.bias, case.training, 0.3, 1e-3)
    if reference:
        z = torch.nn.functional.batch_norm(*arguments)
        y = activations.apply(z if o.residual is None else z + o.residual, case.activation)
    else:
        y = batch_norm(*arguments, case.activation, o.residual)
    gradients = torch.autograd.grad(y, list(leaves.values()), o.dy)
    found = {"output": y.detach(), **{f"d{k}": g for k, g in zip(leaves, gradients)}}
    return found | {k: getattr(o, k) for k in ("running_mean", "running_var") if getattr(o, k) is not None}
