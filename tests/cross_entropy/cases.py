"""Calls of cross_entropy to test with, the same in torch's own in float64, and a comparison with it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from tests import tolerance
from tkernels.core.records import LossOptions
from tkernels.functional import cross_entropy

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
FORWARD, TOTAL, BACKWARD = "cross_entropy_forward", "cross_entropy_total", "cross_entropy_backward"
TARGET_BACKWARD = "cross_entropy_target_backward"


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of cross_entropy and its backward. ``layout`` and ``grad`` name the strides (see arrange)."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    dtype: torch.dtype = F32
    probabilities: torch.dtype | None = None
    uint8: bool = False
    weighted: bool = False
    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    grad: str = "contiguous"
    target_layout: str = ""

    def __str__(self) -> str:
        default = {f.name: f.default for f in dataclasses.fields(self)}
        told = [f"{k}={v}".replace("torch.", "") for k, v in vars(self).items() if k == "shape" or v != default[k]]
        return " ".join(told)

    @property
    def class_dim(self) -> int:
        return 0 if len(self.shape) == 1 else 1

    @property
    def options(self) -> dict[str, Any]:
        return {
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
        }


def arrange(t: Tensor, layout: str) -> Tensor:
    """The same values in other strides; what surrounds them would show."""
    if layout == "contiguous":
        return t.contiguous()
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return torch.stack([t, torch.full_like(t, 99.0)], -1)[..., 0]
    if layout == "padded classes":
        return torch.cat([t, torch.full_like(t, 99.0)], 1)[:, : t.shape[1]]
    if layout == "transposed":
        return t.transpose(1, -1).contiguous().transpose(1, -1) if t.dim() > 2 else t.t().contiguous().t()
    if layout == "offset":
        return torch.cat([torch.full_like(t, 99.0)[:1], t])[1:]
    if layout == "cut picture":
        return torch.nn.functional.pad(t, (1, 1, 1, 1), value=99.0)[:, :, 1:-1, 1:-1]
    if layout == "expanded":
        return t[:1].expand(t.shape)
    raise ValueError(layout)


def target_of(case: Case) -> Tensor:
    if case.probabilities is not None:
        p = torch.randn(case.shape).softmax(case.class_dim).to(case.probabilities)
        return arrange(p, case.target_layout or case.layout)
    rows = case.shape[:1] + case.shape[2:] if len(case.shape) > 1 else ()
    target = torch.randint(case.shape[case.class_dim], rows)
    if target.dim():
        target[..., ::3] = case.ignore_index if case.ignore_index >= 0 or not case.uint8 else 0
    return target.to(torch.uint8) if case.uint8 else target


def incoming(loss: Tensor, layout: str) -> Tensor:
    if layout == "expanded":
        return torch.full((), 0.7, dtype=loss.dtype, device=loss.device).expand(loss.shape)
    grad = torch.randn(loss.shape).to(loss.dtype)
    return arrange(grad, layout).to(loss.device) if loss.dim() else grad.to(loss.device)


def reference(
    x: Tensor, target: Tensor, weight: Tensor | None, grad: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """PyTorch in float64: the loss, the gradient of the logits, that of the probabilities."""
    x = x.detach().cpu().double().requires_grad_()
    target = target.detach().cpu()
    if target.is_floating_point():
        target = target.double().requires_grad_()
    weight = None if weight is None else weight.detach().cpu().double()
    loss = torch.nn.functional.cross_entropy(x, target, weight, **options)
    leaves = [x, target] if target.is_floating_point() else [x]
    grads = torch.autograd.grad(loss, leaves, grad.detach().cpu().double())
    return loss.detach(), grads[0], grads[1] if len(grads) == 2 else None


def check(case: Case, device: str) -> None:
    n_classes = case.shape[case.class_dim]
    x = arrange(torch.randn(case.shape) * 3, case.layout).to(case.dtype).to(device)
    target = target_of(case).to(device)
    weight = (torch.rand(n_classes) + 0.1).to(case.dtype).to(device) if case.weighted else None
    before = x.clone()
    x.requires_grad_()
    if case.probabilities is not None:
        target.requires_grad_()
    loss = cross_entropy(x, target, weight, **case.options)
    grad = incoming(loss, case.grad)
    expected, expected_dx, expected_dp = reference(x, target, weight, grad, **case.options)
    leaves = [x, target] if case.probabilities is not None else [x]
    dx, *rest = torch.autograd.grad(loss, leaves, grad)
    terms = n_classes * max(1, x.numel() // n_classes)
    # PyTorch rounds log softmax to the dtype of the logits on its way to a float32 loss
    tolerance.assert_close(loss, expected, terms, dtype=case.dtype if device == "cpu" else None, name="loss")
    # of one class it is zero, and what rounding leaves is small beside the terms it cancelled from
    tolerance.assert_close(dx, expected_dx, n_classes, dtype=case.dtype, scale=1 / terms, name="gradient")
    assert dx.dtype == case.dtype
    if expected_dp is not None:
        tolerance.assert_close(rest[0], expected_dp, n_classes, dtype=case.dtype, name="target gradient")
    assert torch.equal(x.detach(), before), "the logits were written"


def by_hand(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    grad: Tensor,
    reduction: str,
    label_smoothing: float,
    splits: int,
    rows: int = 4,
    classes: int = 16,
) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of the logits by kernels launched in tiles so small that there are many."""
    from tkernels.core.config import Config
    from tkernels.ops.cross_entropy import kernels

    config = Config.of(num_warps=1, num_stages=1, BLOCK_ROWS=rows, BLOCK_C=classes)
    options = LossOptions(-100, reduction, label_smoothing)
    saved = kernels.launch_forward(x, target, weight, options, x.dtype, config=config, splits=splits)
    loss, stats, count = saved
    return loss, kernels.launch_backward(grad, x, target, weight, stats, count, options, config=config)
