"""Random modules and small models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.fuzz.cases import Case
from tests.fuzz.draws import Draw
from tests.fuzz.recipes import T
from tkernels.functional import MaxPool


def module(d: Draw) -> Case:
    name = d.one(list(MODULES))
    case = MODULES[name](d, name)
    options = {"seed": d.seed(), "training": d.some(0.65), **case.options, "module": name}
    dtype = case.tensors[next(iter(case.tensors))].dtype
    if dtype != "float32":
        options["dtype"] = dtype
    if d.some(0.4):
        options["channels_last"] = True
    return case.changed(options=options)


def _dtype(d: Draw) -> str:
    return str(d.choice({"float32": 6, "bfloat16": 2, "float16": 0.5, "float64": 0.3 if d.kernels else 1}))


def _given(d: Draw, **arguments: Any) -> dict[str, Any]:
    """``arguments`` and, now and then, an activation of ours."""
    activation = d.activation()
    return arguments if activation is None else {**arguments, "activation": activation}


def _linear(d: Draw, name: str) -> Case:
    k, n = d.one((1, 3, 8, 17, 64)), d.one((1, 5, 16, 33))
    arguments: dict[str, Any] = {"in_features": k, "out_features": n, "bias": d.some(0.7)}
    arguments = arguments if name == "LinearReLU" else _given(d, **arguments)
    if d.some(0.2):
        arguments["dropout"] = d.one((0.5, 1.0))
    lead = tuple(d.one((1, 2, 7, 0, 33)) for _ in range(d.one((0, 1, 1, 2))))
    return Case("module", d.body, {"input": d.tensor((*lead, k), _dtype(d))}, {"arguments": arguments})


def _window(d: Draw) -> dict[str, Any]:
    kernel = d.one((1, 2, 3, 3, (1, 3)))
    found: dict[str, Any] = {"kernel_size": kernel}
    # (torch's own weight gradient of a 1 x 1 window and two strides: calls._even)
    strides = (2,) if kernel == 1 else (2, (1, 2))
    for key, values, share in (("stride", strides, 0.3), ("padding", (1, 2, (0, 1)), 0.6), ("dilation", (2,), 0.1)):
        if d.some(share):
            found[key] = d.one(values)
    return found


def _conv2d(d: Draw, name: str) -> Case:
    groups = d.one((1, 1, 2, 4))
    c, k = groups * d.one((1, 2, 4)), groups * d.one((1, 3, 4))
    arguments = {"in_channels": c, "out_channels": k, "groups": groups, "bias": d.some(0.6), **_window(d)}
    if name == "Conv2d":
        if d.some(0.15):
            arguments["padding_mode"] = d.one(("reflect", "replicate", "circular"))
        arguments = _given(d, **arguments)
    elif d.some(0.2):
        arguments["momentum"] = d.one((None, 0.5))
    return Case("module", d.body, {"input": _image(d, c)}, {"arguments": arguments})


def _image(d: Draw, c: int, n: int | None = None) -> T:
    h, w = d.one((3, 5, 6, 8, 11)), d.one((3, 4, 6, 9))
    return d.tensor((d.one((1, 2, 3, 5)) if n is None else n, c, h, w), _dtype(d), images=True, values=d.uneven())


def _stage(d: Draw, name: str) -> Case:
    channels = tuple(d.one((1, 3, 4, 8, 16)) for _ in range(d.one((2, 2, 3, 3, 4))))
    arguments = {"channels": channels, "kernel_size": d.one((1, 3, 3)), "padding": 1, "bias": d.some(0.6)}
    if d.some(0.2):
        arguments["momentum"] = d.one((None, 0.5))
    if d.some(0.6):
        arguments["pool"] = d.one((2, 2, 2, (1, 2), 3, MaxPool(3, 2, 1)))
    if d.some(0.3):
        arguments["dropout"] = d.one((0.5, 0.25))
    return Case("module", d.body, {"input": _image(d, channels[0])}, {"arguments": arguments})


def _batch_norm(d: Draw, name: str) -> Case:
    c = d.one((1, 2, 3, 8, 16))
    rank = {"BatchNorm1d": d.one((2, 3)), "BatchNorm2d": 4, "BatchNorm3d": 5, "SyncBatchNorm": 4}[name]
    shape = (d.one((2, 3, 8)), c, *(d.one((1, 2, 3, 5)) for _ in range(rank - 2)))
    arguments = _given(d, num_features=c)
    for key, values, share in (("momentum", (None, 1.0), 0.3), ("affine", (False,), 0.2), ("eps", (1e-3,), 0.2),
                               ("track_running_stats", (False,), 0.2)):  # fmt: skip
        if d.some(share):
            arguments[key] = d.one(values)
    d.huge = not d.kernels
    tensors = {"input": d.tensor(shape, _dtype(d), images=True)}
    if d.some(0.25):
        tensors["residual"] = d.tensor(shape, tensors["input"].dtype, images=True)
    return Case("module", d.body, tensors, {"arguments": arguments})


def _loss(d: Draw, name: str) -> Case:
    n, c = d.one((1, 2, 7, 33)), d.one((1, 2, 5, 10, 100))
    arguments: dict[str, Any] = {"label_smoothing": d.one((0.0, 0.0, 0.1)), "ignore_index": d.one((-100, 0))}
    if d.some(0.4):
        arguments["reduction"] = d.one(("sum", "none"))
    share = d.one((0, 0.3, 1.0))
    target = T((n,), "int64", f"index {c} {arguments['ignore_index']} {share}", "contiguous", d.seed())
    return Case(
        "module", d.body, {"input": d.tensor((n, c), _dtype(d), grad=0.8), "target": target}, {"arguments": arguments}
    )


def _heads(d: Draw, name: str) -> Case:
    heads = d.one((1, 2, 4))
    e, rows, keys, n = heads * d.one((4, 8)), d.one((1, 3, 9)), d.one((1, 5, 17)), d.one((1, 2))
    arguments: dict[str, Any] = {"embed_dim": e, "num_heads": heads, "bias": d.some(0.8)}
    for key, share in (("batch_first", 0.5), ("add_bias_kv", 0.15), ("add_zero_attn", 0.15)):
        if d.some(share):
            arguments[key] = True
    if d.some(0.15):
        arguments["dropout"] = 0.5
    call: dict[str, Any] = {"need_weights": d.some(0.4)}
    first = arguments.get("batch_first", False)
    shapes = [((n, length, e) if first else (length, n, e)) for length in (rows, keys, keys)]
    dtype = _dtype(d)
    tensors = {key: d.tensor(s, dtype, special=0.04) for key, s in zip(("query", "key", "value"), shapes)}
    if d.some(0.3):
        tensors["key_padding_mask"] = T((n, keys), "bool", "mask 0.3 0", seed=d.seed())
    if d.some(0.3):
        kind = d.one(("bool", dtype))
        values = "mask 0.3 0" if kind == "bool" else "normal"
        tensors["attn_mask"] = T((rows, keys), kind, values, seed=d.seed())
    return Case("module", d.body, tensors, {"arguments": arguments, "call": call})


MODULES: dict[str, Callable[[Draw, str], Case]] = {
    "Linear": _linear,
    "LinearReLU": _linear,
    "Conv2d": _conv2d,
    "BatchNorm1d": _batch_norm,
    "BatchNorm2d": _batch_norm,
    "BatchNorm3d": _batch_norm,
    "SyncBatchNorm": _batch_norm,
    "ConvStage": _stage,
    "ConvBNReLU2d": _conv2d,
    "CrossEntropyLoss": _loss,
    "MultiheadAttention": _heads,
}


def fused(d: Draw) -> Case:
    """A few blocks, some of them residual, and a head or none."""
    c = start = d.one((3, 4, 8))
    blocks = []
    for _ in range(d.one((1, 2, 2, 3))):
        block, c = _block(d, c)
        blocks.append(block)
    options: dict[str, Any] = {"blocks": blocks, "training": d.some(0.6), "seed": d.seed()}
    if d.some(0.4):
        options["head"] = [_hidden(d, c, 10) if i else _hidden(d, c, c) for i in range(d.one((1, 2)))]
    if d.some(0.7):
        options["channels_last"] = True
    if not d.kernels and d.some(0.2):
        options["how"] = "compile"
    n = d.one((2, 2, 3, 5))
    shape = (n, start, *d.one(((7, 6), (8, 8), (12, 9))))
    dtype = d.one(("bfloat16", "float64") if not d.kernels else ("bfloat16",)) if d.some(0.25) else "float32"
    images = d.tensor(shape, dtype, images=True, special=0.06, kinds=False, values=d.uneven())
    tensors = {"input": images}
    if "head" in options and not d.kernels and d.some(0.3):
        tensors["target"] = T((n,), "int64", f"index {options['head'][-1]['linear']['out_features']}", seed=d.seed())
    if dtype != "float32":
        options["dtype"] = dtype
    return Case("fused", d.body, tensors, options)


def _block(d: Draw, c: int) -> tuple[dict[str, Any], int]:
    """A block for ``c`` channels, and its own."""
    block: dict[str, Any] = {}
    same = d.some(0.4)
    k = c if same else d.one((4, 8, 16))
    if d.some(0.9):
        groups = c if d.some(0.15) and k % c == 0 else 1
        kernel = d.one((1, 3, 3, 3, 5))
        block["conv"] = {"in_channels": c, "out_channels": k, "kernel_size": kernel, "groups": groups,
                         "padding": kernel // 2, "bias": d.some(0.5)}  # fmt: skip
        if not same and d.some(0.3):
            block["conv"]["stride"] = 2
    else:
        k = c
    if d.some(0.8):
        block["norm"] = {"num_features": k}
        if d.some(0.2):
            # (a cumulative average ends a graph)
            average = {"momentum": 0.5 if d.kernels else None}
            block["norm"].update(d.one((average, {"eps": 1e-3}, {"affine": False},
                                        {"track_running_stats": False})))  # fmt: skip
    if same and block and d.some(0.6):
        block["residual"] = d.one(("add", "add", "iadd"))
    activation = d.activation()
    if activation is not None:
        block.update(activation=activation, inplace=d.some(0.5))
    if d.some(0.2):
        block["pool"] = d.one(((2,), (3, 2, 1), (2, 1)))
    if d.some(0.1):
        block["dropout"] = 0.5
    return block, k


def _hidden(d: Draw, features: int, out: int) -> dict[str, Any]:
    found: dict[str, Any] = {"linear": {"in_features": features, "out_features": out, "bias": d.some(0.8)}}
    activation = d.activation()
    if activation is not None:
        found.update(activation=activation, inplace=d.some(0.5))
    if d.some(0.2):
        found["dropout"] = 0.5
    return found
