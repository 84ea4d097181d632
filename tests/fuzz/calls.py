"""Random calls of each operator: good ones, and now and then one that torch refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.fuzz.cases import Case
from tests.fuzz.draws import STRANGE, Draw
from tests.fuzz.recipes import T
from tkernels.functional import MaxPool


def linear(d: Draw) -> Case:
    if d.big:
        m, k, n = d.one([(2048, 64, 520), (70001, 8, 16), (1031, 131, 1021), (257, 512, 4100), (65537, 3, 17)])
        lead: tuple[int, ...] = (m,)
    else:
        lead = tuple(d.size() for _ in range(d.one((0, 1, 1, 1, 2, 3))))
        k, n = d.size(), d.size()
    if d.kernels and len(lead) > 1:
        lead = tuple(min(n, 5) for n in lead)
    dtype = d.dtype()
    others = [d.other(dtype) if d.wrong(0.05) else dtype for _ in range(2)]
    if d.wrong(0.03):
        dtype = d.one(STRANGE)
        others = [dtype, dtype]
    weight = d.one([(k,), (n, k + 1), (n,), (1, n, k), ()]) if d.wrong(0.07) else (n, k)
    tensors = {"input": d.tensor((*lead, k), dtype), "weight": d.tensor(weight, others[0])}
    if d.some(0.7):
        bias = d.one([(), (1,), (*lead, n), (n + 1,), (1, n)]) if d.wrong(0.13) else (n,)
        tensors["bias"] = d.tensor(bias, others[1])
    if d.some(0.1):
        return Case("linear", d.body, tensors, {"relu": True})
    options: dict[str, Any] = {"activation": d.activation()}
    if d.some(0.3):
        options.update(dropout_p=d.one((0.0, 0.5, 0.25, 1.0)), training=d.some(0.7))
    return Case("linear", d.body, tensors, options)


def _pair(d: Draw, low: int, high: int) -> int | tuple[int, int] | list[int]:
    first, second = d.rng.randint(low, high), d.rng.randint(low, high)
    if d.some(0.5):
        return first
    return (first, second) if d.some(0.85) else [first, second]


def _even(stride: Any, kernel: tuple[int, int]) -> Any:
    """One stride for both axes of a 1 x 1 window: torch's own weight gradient of bfloat16 images that lie channels_last
    writes past the end of its memory for two (2.11, 2.14)."""
    return stride[0] if kernel == (1, 1) and isinstance(stride, (tuple, list)) and len(stride) == 2 else stride


def conv2d(d: Draw) -> Case:
    dtype, groups = d.dtype(), d.one((1, 1, 1, 2, 3, 4))
    if d.big:
        n, c, h, w, k = d.one([(4, 16, 64, 64, 64), (1, 8, 131, 127, 64), (28, 16, 33, 35, 32), (4, 32, 64, 48, 96)])
        groups = d.one((1, 1, 2, 4, 8))
    else:
        n, h, w = (d.one((0, 1, 1, 2, 3, 5)) if d.kernels else d.size()), d.size(), d.size()
        if d.kernels:
            h, w = min(h, 11), min(w, 11)
        c, k = (groups * d.rng.randint(0 if d.some(0.04) else 1, 4) for _ in range(2))
        if d.some(0.1):
            groups, k = c or 1, (c or 1) * d.rng.randint(1, 2)
    kernel = d.one((1, 1, 2, 3, 3, 5)), d.one((1, 1, 2, 3, 3, 5))
    other = d.other(dtype) if d.wrong(0.05) else dtype
    if d.wrong(0.02):
        dtype = other = d.one(STRANGE)
    if w == 1 and (not d.kernels or dtype == "bfloat16"):
        # torch's own weight gradients read what nobody wrote, and some of these calls crash (2.11, 2.14)
        w = 2
    image = d.one([(c, h, w), (h, w), (n, c, h, w, 1), (n, c + 1, h, w)]) if d.wrong(0.1) else (n, c, h, w)
    inside = c // groups
    weight = (k, inside, *kernel)
    if d.wrong(0.03):
        weight = d.one([(k, inside, kernel[0]), (k, inside + 1, *kernel), (k, inside, 0, kernel[1])])
    tensors = {
        "input": d.tensor(image, dtype, images=True),
        "weight": d.tensor(weight, other, images=True),
    }
    if d.some(0.6):
        tensors["bias"] = d.tensor((k + 1 if d.wrong(0.04) else k,), d.other(other) if d.wrong(0.03) else other)
    options: dict[str, Any] = {
        "stride": d.one([0, -1, (1, 2, 3), 1.5, None]) if d.wrong(0.04) else _pair(d, 1, 3),
        "padding": d.one(
            (0, 1, _pair(d, 0, 3), "valid", (kernel[0] // 2, kernel[1] // 2), (kernel[0] // 2, kernel[1] // 2))
        ),
        "dilation": d.one([0, -1, 100]) if d.wrong(0.03) else d.one((1, 1, _pair(d, 1, 3))),
        "groups": groups,
        "activation": d.activation(),
    }
    options["stride"] = _even(options["stride"], kernel)
    if options["stride"] in (1, (1, 1)) and d.some(0.3):
        options["padding"] = "same"
    elif d.wrong(0.04):
        options["padding"] = d.one([-1, "full", (1,), 40, "same"])
    return Case("conv2d", d.body, tensors, options)


def batch_norm(d: Draw) -> Case:
    d.huge = not d.kernels
    dtype = d.dtype()
    if d.big:
        shape = d.one([(65600, 16), (70400, 24), (64, 32, 32, 32), (128, 16, 31, 32), (8, 64, 56, 48)])
    else:
        rank, c = d.one((2, 2, 3, 4, 4, 4, 5, 1)), d.one((0, 1, 2, 3, 8, 16, 33))
        rest = [d.one((1, 2, 3, 4) if d.kernels else (1, 2, 3, 4, 8)) for _ in range(rank - 2)]
        shape = tuple([d.size(), c, *rest][:rank])
        if rank > 1 and d.some(0.4) and not d.kernels:
            shape = (d.one((8, 16, 64)), *shape[1:])
    c = shape[1] if len(shape) > 1 else 3
    wide = dtype if dtype not in ("bfloat16", "float16") or (d.some(0.3) and not d.everyday) else "float32"
    if d.wrong(0.03):
        wide = d.other(dtype)
    if d.wrong(0.015):
        dtype = d.one(STRANGE)
    training = d.some(0.75)
    n = c + 1 if d.wrong(0.02) else c
    tensors = {"input": d.tensor(shape, dtype, images=True)}
    for name in ("weight", "bias"):
        if d.some(0.75):
            other = d.other(wide) if d.wrong(0.02) else wide
            # (x times an infinite weight less the mean times it: torch on a GPU subtracts first, on a CPU last)
            tensors[name] = d.tensor((n,), other, plain=True, special=0.0 if d.kernels else 0.1)
    if d.some(0.7) or not training:
        tensors["running_mean"] = _statistic(d, n, wide, "normal", training)
        tensors["running_var"] = _statistic(d, n, wide, "positive", training)
        if d.wrong(0.04):
            del tensors["running_var"]
    options: dict[str, Any] = {
        "training": training,
        "momentum": d.one((0.1, 0.1, 0.9, 0.0, 1.0, 1)) if not d.everyday else 0.1,
        "eps": d.one((0.0, -1.0, 1)) if d.wrong(0.03) else d.one((1e-5, 1e-5, 1e-3, 1e-12)),
        "activation": d.activation(),
    }
    if d.some(0.2):
        tensors["residual"] = d.tensor(shape, dtype, images=True)
    return Case("batch_norm", d.body, tensors, options)


def _statistic(d: Draw, n: int, dtype: str, values: str, training: bool) -> T:
    """Running statistics; those that training moves are no repeated ones, which torch refuses to write to."""
    kind = values if dtype in ("float32", "bfloat16", "float16", "float64") else None
    t = d.tensor((n,), dtype, grad=0.0, values=kind, special=0.04 if not training else 0.0, plain=True)
    return T(t.shape, t.dtype, t.values, "contiguous", t.seed) if t.layout.startswith("repeated") and training else t


def cross_entropy(d: Draw) -> Case:
    dtype = d.dtype()
    extra: tuple[int, ...] = ()
    if d.big:
        n, c = d.one([(70001, 10), (65537, 7), (4099, 1100), (40000, 15), (33000, 1), (2100, 2053)])
    else:
        n, c = d.size(), d.one((1, 2, 3, 5, 7, 10, 15, 16, 17, 100) * 3 + (0,))
        extra = tuple(d.one((1, 2, 3, 5)) for _ in range(d.one((0, 0, 0, 0, 1, 2))))
    ignore = d.one((-100, -100, 0, 1, 5, -1, 255))
    smoothing: Any = d.one((-0.1, 1.5, 0, 1, float("nan"))) if d.wrong(0.03) else d.one((0.0, 0.0, 0.1, 1.0, 0.5))
    options: dict[str, Any] = {
        "reduction": "avg" if d.wrong(0.02) else d.one(("mean", "mean", "sum", "none")),
        "label_smoothing": smoothing,
    }
    one_row = d.some(0.07) and not d.big
    shape = (c,) if one_row else (n, c, *extra)
    tensors = {"input": d.tensor(shape, dtype, grad=0.75)}
    if d.some(0.2):
        values = f"softmax {0 if one_row else 1}" if d.some(0.7) and c else "normal"
        tensors["target"] = d.tensor(shape, d.dtype() if d.wrong(0.15) else dtype, grad=0.3, values=values)
    else:
        tensors["target"] = _target(d, () if one_row else (n, *extra), c, ignore)
    if ignore != -100 and (not tensors["target"].values.startswith(("softmax", "normal")) or d.some(0.1)):
        options["ignore_index"] = ignore
    if d.some(0.2):
        length = c + 1 if d.wrong(0.05) else c
        values = "positive" if d.some(0.7) else "normal"
        tensors["weight"] = d.tensor((length,), d.dtype() if d.wrong(0.08) else dtype, grad=0.05, values=values)
    return Case("cross_entropy", d.body, tensors, options)


def _target(d: Draw, shape: tuple[int, ...], classes: int, ignore: int) -> T:
    share = d.one((0, 0, 0.2, 0.2, 1.0))
    dtype = d.one(("int32", "uint8", "int16", "float32")) if d.wrong(0.06) else "int64"
    if ignore not in (range(256) if dtype == "uint8" else range(-128, 128)) and dtype != "int64":
        share = 0
    special: tuple[tuple[int, float], ...] = ()
    if not d.kernels and dtype == "int64" and d.wrong(0.03):
        # (a GPU's loss is NaN for it, and the executor's torch raises)
        special = ((d.rng.randrange(1 << 16), d.one((classes, classes + 5, -2, -100, 2**31, -(2**62)))),)
    layout = d.one(("contiguous", "contiguous", "stepped", "turned", "offset"))
    return T(shape, dtype, f"index {classes} {ignore} {share}", layout, d.seed(), special)


def conv_stage(d: Draw) -> Case:
    d.huge = not d.kernels
    dtype = d.choice({"float32": 5, "bfloat16": 3, "float16": 1, "float64": 0.2 if d.kernels else 1})
    if d.big:
        n, c, h, w = d.one([(16, 8, 32, 32), (64, 3, 32, 32), (3, 5, 64, 48), (257, 3, 16, 16), (2, 3, 224, 112)])
    else:
        n, c = d.one((1, 1, 2, 3) if d.kernels else (1, 1, 2, 3, 8, 33, 0)), d.one((1, 2, 3, 8))
        h, w = (d.one((1, 2, 4, 6, 7, 8) if d.kernels else (1, 2, 4, 6, 8, 9, 12, 16)) for _ in range(2))
    w = max(w, 2)  # torch's own convolution of one column crashes by some strides and dilations (2.11, 2.14)
    tensors = {"input": d.tensor((n, c, h, w), dtype, images=True, values=d.uneven())}
    wide = dtype if d.some(0.87) or n == 0 else "float32"
    layers: list[dict[str, Any]] = []
    for i in range(d.one((1, 1, 2, 2, 3))):
        c = _layer(d, tensors, layers, i, c, wide)
    options: dict[str, Any] = {"layers": layers, "training": d.some(0.6)}
    if d.some(0.6):
        options["pool"] = d.one((2, 2, 2, (2, 1), 3, 4, MaxPool(3, 2, 1), MaxPool(2, 1), MaxPool(2, 3), 1, (1, 4)))
    if d.some(0.5):
        options["dropout_p"] = d.one((0.5, 0.25, 1.0))
    return Case("conv_stage", d.body, tensors, options)


def _layer(d: Draw, tensors: dict[str, T], layers: list[dict[str, Any]], i: int, c: int, dtype: str) -> int:
    """Adds a layer's tensors and arguments. Returns its channels."""
    groups = d.one((1, 1, 1, 1, 2)) if c % 2 == 0 else 1
    groups = c if d.some(0.1) else groups
    k = groups * d.one((4, 8, 16) if d.big else (1, 2, 4, 5, 8))
    kernel = d.one((1, 3, 3, 3, 2, 5)), d.one((1, 3, 3, 3, 2))
    tensors[f"w{i}"] = d.tensor((k, c // groups, *kernel), dtype, grad=0.7, special=0.02, values=d.uneven())
    vectors = dtype if dtype == "float64" or d.some(0.2) else "float32"
    for letter, kind, share, values in zip("bgh", (dtype, vectors, vectors), (0.4, 0.8, 0.8), (None, None, None)):
        if d.some(share):
            special = 0.0 if d.kernels else 0.02  # as batch norm's
            tensors[f"{letter}{i}"] = d.tensor((k,), kind, special=special, values=values, plain=True)
    if d.some(0.8):
        tensors[f"m{i}"] = _statistic(d, k, vectors, "normal", True)
        tensors[f"v{i}"] = _statistic(d, k, vectors, "positive", True)
    if d.some(0.5):
        tensors[f"n{i}"] = T((), "int64", f"number {d.one((0, 3))}")
    arguments = {
        "stride": _even(d.one((1, 1, 1, 1, 1, 2, (1, 2), (2, 1))), kernel),
        "padding": d.one([(kernel[0] // 2, kernel[1] // 2)] * 5 + [0, 1, "same", 2, "valid"]),  # type: ignore[list-item]
        "dilation": d.one((1, 1, 1, 1, 1, 2, (1, 2))),
        "groups": groups,
        "momentum": d.one((0.1, 0.1, 0.9, None)),
        "eps": d.one((1e-5, 1e-5, 1e-3)),
        "training": d.one((None,) * 6 + (True, False)),
        "activation": "relu" if d.some(0.8) else d.activation(),
    }
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "momentum": 0.1, "eps": 1e-5, "training": None,
                "activation": "relu"}  # fmt: skip
    layers.append({name: value for name, value in arguments.items() if value != defaults[name]})
    return k


def matmul(d: Draw) -> Case:
    dtype = d.dtype()
    other = d.other(dtype) if d.wrong(0.04) else dtype
    if d.wrong(0.04):
        dtype = other = d.one(STRANGE)
    if d.big:
        m, k, n = d.one([(70001, 8, 3), (512, 1031, 257), (1, 65537, 5)])
        a, b = (m, k), (k, n)
    else:
        m, k, n = d.size(), d.size(), d.size()
        batch = tuple(d.one((1, 2, 3, 0)) if d.some(0.3) else 2 for _ in range(d.one((0, 0, 1, 2))))
        a = d.one([(k,), (m, k), (*batch, m, k), (1, m, k)])
        b = d.one([(k,), (k, n), (*batch, k, n), (k, n)])
        if d.wrong(0.05):
            b = d.one([(), (k + 1, n), (3, 5, k, n)])
    return Case("matmul", d.body, {"a": d.tensor(a, dtype), "b": d.tensor(b, other)})


def attention(d: Draw) -> Case:
    dtype = d.dtype()
    batch, heads = d.one((1, 2)), d.one((1, 2, 4))
    rows, keys = (257, 131) if d.big else (d.size(), d.size())
    e = d.one((1, 3, 8, 16, 64))
    v = e if d.some(0.7) else d.one((1, 4, 8, 16))
    lead = d.one([(batch, heads), (batch, heads), (heads,), ()])
    key_lead = d.one([(1, heads), (heads,), (3, heads)]) if d.wrong(0.1) else lead
    options: dict[str, Any] = {}
    if d.some(0.12):
        options["enable_gqa"] = True
        key_lead = (*lead[:-1], 1) if len(lead) > 1 else key_lead
    if d.some(0.3):
        options["is_causal"] = True
    if d.some(0.4):
        options["scale"] = d.one((1.0, 0.3, 0.0, -0.5))
    if d.some(0.2):
        options["dropout_p"] = 1.5 if d.wrong(0.05) else d.one((0.5, 1.0))
    tensors = {
        "query": d.tensor((*lead, rows, e), dtype),
        "key": d.tensor((*key_lead, keys, e), d.other(dtype) if d.wrong(0.03) else dtype),
        "value": d.tensor((*key_lead, keys, v), dtype),
    }
    if d.some(0.4):
        tensors["attn_mask"] = _mask(
            d, d.one([(rows, keys), (1, keys), (*lead, rows, keys), (keys,) if rows and keys else (rows, keys)]), dtype
        )
        if not d.wrong(0.05):
            options.pop("is_causal", None)
    return Case("attention", d.body, tensors, options)


LOWEST = {"float32": -3.4028234663852886e38, "bfloat16": -3.3895313892515355e38, "float16": -65504.0,
          "float64": -1.7976931348623157e308}  # fmt: skip


def _mask(d: Draw, shape: tuple[int, ...], dtype: str) -> T:
    """Booleans, or additive numbers: finfo.min, -1e9 or -inf where nothing is to be seen, whole rows of it too."""
    kind = d.one(("bool", dtype, "float32"))
    whole = d.one((0, 0, 0.3))
    layout = d.one(("contiguous", "contiguous", "turned", "sliced", "repeated 0"))
    if kind == "bool":
        return T(shape, kind, f"mask 0.7 0 {whole}", layout, d.seed())
    off = d.one((float("-inf"), LOWEST[kind], -1e9 if kind != "float16" else -6e4))
    grad = d.some(0.1)
    return T(shape, kind, f"{d.one(('additive', 'mask'))} 0.7 {off} {whole}", layout, d.seed(), (), grad)


CALLS: dict[str, Callable[[Draw], Case]] = {
    "linear": linear,
    "conv2d": conv2d,
    "batch_norm": batch_norm,
    "cross_entropy": cross_entropy,
    "conv_stage": conv_stage,
    "matmul": matmul,
    "attention": attention,
}
