"""The magnitudes that roundings are relative to, where a result itself may cancel to nothing.

A sum of products is rounded relative to the sum of their absolute values, a batch-norm gradient relative to the terms
it subtracts, a loss relative to its logits. Each function takes a float64 call, the incoming gradient and the
float64 outcome, and returns a magnitude for "output", for each gradient by the argument's name, and for statistics.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conformance.calls import Call, of_torch

Scales = dict[str, float]


def of(call: Call, incoming: Tensor | None, output: Tensor) -> Scales:
    """The scales of a float64 ``call`` whose result was ``output``, with ``incoming`` its gradient."""
    arguments = call.named()
    if call.operator == "batch_norm":
        return _batch_norm(arguments, incoming)
    if call.operator == "cross_entropy":
        return _cross_entropy(arguments, incoming, output)
    if call.operator == "scaled_dot_product_attention":
        return _attention(arguments, incoming)
    return _product(call.operator, arguments, incoming)


def _largest(t: Tensor | None) -> float:
    if t is None:
        return 0.0
    finite = t.detach()[torch.isfinite(t)].abs()
    return finite.max().item() if finite.numel() else 0.0


def _product(operator: str, arguments: dict[str, Any], incoming: Tensor | None) -> Scales:
    """linear, conv2d and matmul are sums of products: the same operator on absolute values bounds every partial sum."""
    plain = {k: v for k, v in arguments.items() if k not in ("activation", "dropout_p", "training")}
    absolute = {k: v.detach().abs().nan_to_num(0, 0) if isinstance(v, Tensor) else v for k, v in plain.items()}
    leaves = {k: v.requires_grad_() for k, v in absolute.items() if isinstance(v, Tensor)}
    output = of_torch(operator)(**absolute)
    scales = {"output": _largest(output)}
    if incoming is not None:
        gradients = torch.autograd.grad(output, list(leaves.values()), incoming.abs())
        scales.update({name: _largest(g) for name, g in zip(leaves, gradients)})
    return scales


def _attention(arguments: dict[str, Any], incoming: Tensor | None) -> Scales:
    """Weights of a row sum to 1, so that the output is no larger than the values, nor a gradient of the weights than
    the products of values and incoming gradients."""
    q, k, v = (arguments[name].detach() for name in ("query", "key", "value"))
    scales = {"output": _largest(v)}
    if incoming is None or not incoming.numel():
        return scales
    factor = arguments.get("scale")
    factor = q.shape[-1] ** -0.5 if factor is None else abs(factor)
    slope = 2 * factor * _largest(incoming) * _largest(v) * v.shape[-1] ** 0.5
    rows = q.shape[-2] ** 0.5
    scales["query"], scales["key"] = slope * _largest(k), slope * _largest(q) * rows
    scales["value"], scales["attn_mask"] = _largest(incoming) * rows, slope
    return scales


def _batch_norm(arguments: dict[str, Any], incoming: Tensor | None) -> Scales:
    x = arguments["input"].detach()
    dims = [d for d in range(x.dim()) if d != 1]
    per_channel = [1, -1, *[1] * (x.dim() - 2)]
    eps = arguments.get("eps", 1e-5)
    mean, var = x.mean(dims), x.var(dims, correction=0)
    if not arguments.get("training", False):
        mean, var = arguments["running_mean"].detach(), arguments["running_var"].detach()
    inverse = (var + eps).rsqrt()
    weight = arguments.get("weight")
    gain = inverse if weight is None else weight.detach().abs() * inverse
    # x * gain and mean * gain may cancel, and so do errors of the mean in x-hat
    conditioning = 1 + _largest(mean * inverse)
    shifted = (x.abs() + mean.abs().view(per_channel)) * gain.view(per_channel)
    scales = {
        "output": _largest(shifted) + _largest(arguments.get("bias")) + _largest(arguments.get("residual")),
        "running_mean": _largest(x),
        "running_var": _largest(var) + _largest(x),
    }
    if incoming is None:
        return scales
    g = incoming.abs()
    x_hat = (x - mean.view(per_channel)).abs() * inverse.view(per_channel)
    sums = g.sum(dims)
    scales["input"] = _largest(gain) * _largest(g) * (1 + _largest(x_hat) ** 2) * conditioning
    scales["weight"] = max(_largest(sums), _largest((g * x_hat).sum(dims))) * conditioning
    scales["bias"] = _largest(sums)
    scales["residual"] = _largest(g)
    return scales


def _cross_entropy(arguments: dict[str, Any], incoming: Tensor | None, output: Tensor) -> Scales:
    logits, target = arguments["input"].detach(), arguments["target"].detach()
    classes = logits.shape[0 if logits.dim() == 1 else 1] if logits.dim() else 1
    weight = _largest(arguments["weight"]) if arguments.get("weight") is not None else 1.0
    mass = _largest(target.abs().sum(0 if target.dim() == 1 else 1)) if target.is_floating_point() else 1.0
    term = (2 * _largest(logits) + math.log(max(classes, 1))) * weight
    rows = logits.numel() // max(classes, 1)
    reduction = arguments.get("reduction", "mean")
    # what a row's loss is multiplied by on its way to the output
    share = 1.0
    if reduction == "mean":
        plain = {k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        total = F.cross_entropy(**{**plain, "reduction": "sum"}).item()
        share = abs(output.item() / total) if math.isfinite(total) and total else 1.0
        share = share if math.isfinite(share) else 1.0
    factor = share * (_largest(incoming) if incoming is not None else 0.0)
    summed = rows if reduction != "none" else 1
    return {
        "output": term * mass * summed * share,
        "input": factor * weight * max(mass, 1.0),
        "target": factor * term,
    }
