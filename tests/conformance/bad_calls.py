"""The table of bad calls. It holds the calls and what a message must name; torch itself says which class to raise."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Maker:
    """Makes the tensors of a call on one device, and remembers them."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.made: list[tuple[Tensor, Tensor]] = []  # each with a copy made at once

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32, high: int = 2, value: float = 0.0) -> Tensor:
        """A tensor of ``shape``: floating numbers, or integers below ``high``; ``value`` is added."""
        generator = torch.Generator().manual_seed(len(self.made))
        if dtype.is_floating_point or dtype.is_complex:
            t = torch.randn(shape, generator=generator) + value
        else:
            t = torch.randint(high, shape, generator=generator) + int(value)
        t = t.to(device=self.device, dtype=dtype)
        self.made.append((t, t.clone()))
        return t


@dataclasses.dataclass(frozen=True)
class Bad:
    """A bad call. ``call`` gets torch's namespace or ours, and a Maker; ``says`` must all stand in our message."""

    name: str
    call: Callable[[Any, Maker], Any]
    says: tuple[str, ...]
    # a target's values are not waited for on a GPU, so the error is the CPU's alone
    cpu_only: bool = False
    # what our kernels raise where the torch at hand takes the call, and why; what PyTorch runs takes it too
    stricter: tuple[type[Exception], str] | None = None


def _matmul(functions: Any) -> Callable[..., Tensor]:
    """matmul of ours or, where ``functions`` is torch.nn.functional, of torch."""
    return getattr(functions, "matmul", torch.matmul)


QKV = (1, 2, 4, 8)
TWO_MASKS = RuntimeError, "torch's documentation says that it is an error; 2.14 raises it, 2.11 not on every device"


def _attention(functions: Any, maker: Maker, tensors: list[tuple[int, ...]], options: dict[str, Any]) -> Tensor:
    """Attention on tensors of these shapes; the mask among the options is its shape."""
    options = dict(options)
    dtype = options.pop("mask_dtype", torch.float32)
    given = [maker(*shape) for shape in tensors]
    if "attn_mask" in options:
        options["attn_mask"] = maker(*options["attn_mask"], dtype=dtype)
    return functions.scaled_dot_product_attention(*given, **options)


LONG, INT, BOOL = torch.int64, torch.int32, torch.bool
HALF, DOUBLE = torch.bfloat16, torch.float64

FUNCTIONS = (
    # linear
    Bad("linear: in_features differ", lambda f, t: f.linear(t(2, 3), t(4, 5)), ("input", "[2, 3]", "weight", "[4, 5]")),
    Bad("linear: 1-D input of another length", lambda f, t: f.linear(t(3), t(4, 5)), ("[3]", "[4, 5]")),
    Bad("linear: 3-D input", lambda f, t: f.linear(t(2, 2, 3), t(4, 5), t(4)), ("[2, 2, 3]", "[4, 5]")),
    Bad("linear: scalar input", lambda f, t: f.linear(t(), t(4, 5)), ("input", "[]")),
    Bad("linear: 3-D weight", lambda f, t: f.linear(t(2, 3), t(2, 4, 3)), ("weight", "[2, 4, 3]")),
    Bad("linear: bias length", lambda f, t: f.linear(t(2, 3), t(4, 3), t(5)), ("bias", "[5]", "[4, 3]")),
    Bad("linear: bias rank", lambda f, t: f.linear(t(2, 3), t(4, 3), t(4, 3)), ("bias", "[4, 3]")),
    Bad("linear: input is a list", lambda f, t: f.linear([[1.0, 2.0]], t(4, 2)), ("input", "list")),
    Bad("linear: weight is None", lambda f, t: f.linear(t(2, 3), None), ("weight", "NoneType")),
    Bad("linear: bias is a number", lambda f, t: f.linear(t(2, 3), t(4, 3), 1.0), ("bias", "float")),
    Bad("linear: dtypes differ", lambda f, t: f.linear(t(2, 3), t(4, 3, dtype=HALF)), ("float32", "bfloat16")),
    Bad("linear: bias dtype differs", lambda f, t: f.linear(t(2, 3), t(4, 3), t(4, dtype=DOUBLE)), ("bias", "float64")),
    Bad("linear: integer weight", lambda f, t: f.linear(t(2, 3), t(4, 3, dtype=LONG)), ("weight", "int64")),
    Bad("linear: boolean input", lambda f, t: f.linear(t(2, 3, dtype=BOOL), t(4, 3)), ("input", "bool")),
    Bad("linear: missing weight", lambda f, t: f.linear(t(2, 3)), ("weight",)),
    Bad("linear: unknown keyword", lambda f, t: f.linear(t(2, 3), t(4, 3), slope=1), ("slope",)),
    # matmul, of torch itself
    Bad("matmul: scalar", lambda f, t: _matmul(f)(t(), t(4, 5)), ("a", "[]")),
    Bad("matmul: inner sizes differ", lambda f, t: _matmul(f)(t(2, 3), t(4, 5)), ("a", "[2, 3]", "b", "[4, 5]")),
    Bad("matmul: vectors of other lengths", lambda f, t: _matmul(f)(t(3), t(4)), ("[3]", "[4]")),
    Bad("matmul: vector of another length", lambda f, t: _matmul(f)(t(2, 2, 3), t(4)), ("[2, 2, 3]", "[4]")),
    Bad("matmul: batches differ", lambda f, t: _matmul(f)(t(2, 3, 4), t(3, 4, 5)), ("[2, 3, 4]", "[3, 4, 5]")),
    Bad("matmul: dtypes differ", lambda f, t: _matmul(f)(t(2, 3), t(3, 4, dtype=HALF)), ("float32", "bfloat16")),
    Bad("matmul: integers and numbers", lambda f, t: _matmul(f)(t(2, 3), t(3, 4, dtype=LONG)), ("int64",)),
    Bad("matmul: a list", lambda f, t: _matmul(f)([[1.0, 2.0]], t(2, 4)), ("a", "list")),
    Bad("matmul: None", lambda f, t: _matmul(f)(t(2, 3), None), ("b", "NoneType")),
    # scaled_dot_product_attention
    *(
        Bad(
            f"attention: {what}",
            functools.partial(_attention, tensors=tensors, options=options),
            says,
            stricter=TWO_MASKS if "is_causal" in options else None,
        )
        for what, tensors, options, says in (
            ("vectors", [(8,), (5, 8), (5, 8)], {}, ("query", "[8]")),
            ("heads of two sizes", [(1, 2, 4, 8), (1, 2, 5, 9), (1, 2, 5, 8)], {}, ("query", "key", "[1, 2, 5, 9]")),
            ("batches differ", [(3, 2, 4, 8), (2, 2, 4, 8), (2, 2, 4, 8)], {}, ("[3, 2, 4, 8]", "[2, 2, 4, 8]")),
            ("heads that do not divide", [(1, 4, 4, 8), (1, 3, 4, 8), (1, 3, 4, 8)], {"enable_gqa": True}, ("heads",)),
            ("mask of another size", [QKV, QKV, QKV], {"attn_mask": (3, 4)}, ("attn_mask", "[3, 4]")),
            ("mask of one dimension", [QKV, QKV, QKV], {"attn_mask": (4,)}, ("attn_mask", "[4]")),
            ("mask of integers", [QKV, QKV, QKV], {"attn_mask": (4, 4), "mask_dtype": LONG}, ("attn_mask", "int64")),
            ("mask of bfloat16", [QKV, QKV, QKV], {"attn_mask": (4, 4), "mask_dtype": HALF}, ("attn_mask", "bfloat16")),
            ("mask beside is_causal", [QKV, QKV, QKV], {"attn_mask": (4, 4), "is_causal": True}, ("is_causal",)),
            ("dropout_p 2", [QKV, QKV, QKV], {"dropout_p": 2.0}, ("dropout_p", "2.0")),
            ("dropout_p -1", [QKV, QKV, QKV], {"dropout_p": -1.0}, ("dropout_p", "-1.0")),
            ("scale a word", [QKV, QKV, QKV], {"scale": "big"}, ("scale", "str")),
        )
    ),
    Bad(
        "attention: dtypes differ",
        lambda f, t: f.scaled_dot_product_attention(t(*QKV), t(*QKV, dtype=HALF), t(*QKV)),
        ("query", "bfloat16"),
    ),
    Bad("attention: query a list", lambda f, t: f.scaled_dot_product_attention([1.0], t(*QKV), t(*QKV)), ("query",)),
    # conv2d
    Bad("conv2d: 2-D input", lambda f, t: f.conv2d(t(3, 4), t(2, 3, 3, 3)), ("input", "[3, 4]")),
    Bad("conv2d: 5-D input", lambda f, t: f.conv2d(t(1, 1, 3, 4, 4), t(2, 3, 3, 3)), ("input", "[1, 1, 3, 4, 4]")),
    Bad("conv2d: 3-D weight", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3)), ("weight", "[2, 3, 3]")),
    Bad(
        "conv2d: channels differ",
        lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 4, 3, 3)),
        ("input", "[1, 3, 4, 4]", "weight", "[2, 4, 3, 3]"),
    ),
    Bad("conv2d: unbatched channels", lambda f, t: f.conv2d(t(3, 4, 4), t(2, 4, 3, 3)), ("[3, 4, 4]", "[2, 4, 3, 3]")),
    Bad("conv2d: channels of groups", lambda f, t: f.conv2d(t(1, 4, 4, 4), t(2, 4, 3, 3), groups=2), ("groups",)),
    Bad("conv2d: outputs of groups", lambda f, t: f.conv2d(t(1, 4, 4, 4), t(3, 2, 3, 3), groups=2), ("groups", "3")),
    Bad("conv2d: fewer outputs", lambda f, t: f.conv2d(t(1, 6, 4, 4), t(2, 2, 3, 3), groups=3), ("groups",)),
    Bad("conv2d: groups 0", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3), groups=0), ("groups", "0")),
    Bad("conv2d: groups -1", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3), groups=-1), ("groups", "-1")),
    Bad("conv2d: groups 1.0", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3), groups=1.0), ("groups", "float")),
    Bad("conv2d: stride 0", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3), stride=0), ("stride", "0")),
    Bad("conv2d: stride -1", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3), stride=(1, -1)), ("stride", "-1")),
    Bad("conv2d: stride of 3", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3), stride=(1, 1, 1)), ("stride",)),
    Bad("conv2d: stride 1.5", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3), stride=1.5), ("stride",)),
    Bad("conv2d: stride 'two'", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3), stride="two"), ("stride",)),
    Bad("conv2d: stride of 71 bits", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3), stride=2**70), ()),
    Bad("conv2d: stride (True, 1)", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3), stride=(True, 1)), ("stride",)),
    Bad("conv2d: stride None", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3), stride=None), ("stride",)),
    Bad("conv2d: padding -1", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3), padding=-1), ("padding", "-1")),
    Bad("conv2d: padding of 3", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3), padding=(1, 1, 1)), ("padding",)),
    Bad("conv2d: padding 'full'", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3), padding="full"), ("full",)),
    Bad("conv2d: padding 0.5", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3), padding=0.5), ("padding",)),
    Bad(
        "conv2d: 'same' with a stride",
        lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3), padding="same", stride=2),
        ("same", "stride"),
    ),
    Bad("conv2d: dilation 0", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3), dilation=0), ("dilation", "0")),
    Bad("conv2d: dilation -2", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3), dilation=(1, -2)), ("dilation",)),
    Bad(
        "conv2d: dilation of 3", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3), dilation=(1, 1, 1)), ("dilation",)
    ),
    Bad("conv2d: kernel too large", lambda f, t: f.conv2d(t(1, 3, 2, 4), t(2, 3, 3, 3)), ("input",)),
    Bad("conv2d: dilated too large", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3), dilation=2), ("input",)),
    Bad("conv2d: empty image", lambda f, t: f.conv2d(t(1, 3, 0, 4), t(2, 3, 1, 1)), ("[1, 3, 0, 4]",)),
    Bad("conv2d: bias length", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3), t(3)), ("bias", "[3]")),
    Bad("conv2d: bias rank", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3), t(2, 1)), ("bias", "[2, 1]")),
    Bad("conv2d: weight dtype", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3, dtype=HALF)), ("bfloat16",)),
    Bad("conv2d: bias dtype", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3), t(2, dtype=HALF)), ("bfloat16",)),
    Bad("conv2d: integer input", lambda f, t: f.conv2d(t(1, 3, 4, 4, dtype=LONG), t(2, 3, 3, 3)), ("int64",)),
    Bad("conv2d: weight is a list", lambda f, t: f.conv2d(t(1, 3, 4, 4), [1.0]), ("weight",)),
    Bad("conv2d: input is None", lambda f, t: f.conv2d(None, t(2, 3, 3, 3)), ("input",)),
    # batch_norm
    Bad(
        "batch_norm: one value a channel",
        lambda f, t: f.batch_norm(t(1, 3), t(3), t(3), training=True),
        ("more than 1 value", "[1, 3]"),
    ),
    Bad(
        "batch_norm: one pixel", lambda f, t: f.batch_norm(t(1, 3, 1, 1), None, None, training=True), ("[1, 3, 1, 1]",)
    ),
    Bad("batch_norm: no statistics", lambda f, t: f.batch_norm(t(2, 3), None, None), ("running_mean",)),
    Bad("batch_norm: no variance", lambda f, t: f.batch_norm(t(2, 3), t(3), None), ("running_var",)),
    Bad("batch_norm: no mean", lambda f, t: f.batch_norm(t(2, 3), None, t(3)), ("running_mean",)),
    Bad("batch_norm: mean length", lambda f, t: f.batch_norm(t(2, 3), t(4), t(3)), ("running_mean", "[4]", "3")),
    Bad("batch_norm: variance length", lambda f, t: f.batch_norm(t(2, 3), t(3), t(2)), ("running_var", "[2]", "3")),
    Bad("batch_norm: mean length in training", lambda f, t: f.batch_norm(t(2, 3), t(4), t(3), training=True), ("[4]",)),
    Bad("batch_norm: weight length", lambda f, t: f.batch_norm(t(2, 3), t(3), t(3), t(4)), ("weight", "[4]", "3")),
    Bad("batch_norm: bias length", lambda f, t: f.batch_norm(t(2, 3), t(3), t(3), t(3), t(1)), ("bias", "[1]", "3")),
    Bad("batch_norm: 1-D input", lambda f, t: f.batch_norm(t(3), t(3), t(3)), ("input", "[3]")),
    Bad("batch_norm: scalar input", lambda f, t: f.batch_norm(t(), t(1), t(1)), ("input", "[]")),
    Bad("batch_norm: eps 0", lambda f, t: f.batch_norm(t(2, 3), t(3), t(3), training=True, eps=0.0), ("eps",)),
    Bad("batch_norm: eps negative", lambda f, t: f.batch_norm(t(2, 3), t(3), t(3), eps=-1.0), ("eps", "-1.0")),
    Bad("batch_norm: eps before rank", lambda f, t: f.batch_norm(t(), t(1), t(1), eps=-1.0), ("eps", "-1.0")),
    Bad("batch_norm: eps first", lambda f, t: f.batch_norm(t(4), t(4), t(4), training=True, eps=-1.0), ("eps",)),
    Bad("batch_norm: eps 'small'", lambda f, t: f.batch_norm(t(2, 3), t(3), t(3), eps="small"), ("eps",)),
    Bad("batch_norm: momentum None", lambda f, t: f.batch_norm(t(2, 3), t(3), t(3), momentum=None), ("momentum",)),
    Bad("batch_norm: momentum 'x'", lambda f, t: f.batch_norm(t(2, 3), t(3), t(3), momentum="x"), ("momentum",)),
    Bad("batch_norm: training 1", lambda f, t: f.batch_norm(t(2, 3), t(3), t(3), training=1), ("training", "int")),
    Bad("batch_norm: training None", lambda f, t: f.batch_norm(t(2, 3), None, None, training=None), ("training",)),
    Bad("batch_norm: momentum of one", lambda f, t: f.batch_norm(t(2, 3), t(3), t(3), momentum=t(1)), ("momentum",)),
    Bad("batch_norm: integer input", lambda f, t: f.batch_norm(t(2, 3, dtype=LONG), t(3), t(3)), ("int64",)),
    Bad("batch_norm: input is a list", lambda f, t: f.batch_norm([[1.0]], t(1), t(1)), ("input", "list")),
    Bad("batch_norm: mean is a list", lambda f, t: f.batch_norm(t(2, 3), [0.0] * 3, t(3)), ("running_mean", "list")),
    Bad("batch_norm: weight a number", lambda f, t: f.batch_norm(t(2, 3), t(3), t(3), 1.0), ("weight", "float")),
    Bad("batch_norm: half weight", lambda f, t: f.batch_norm(t(2, 3), t(3), t(3), t(3, dtype=HALF)), ("bfloat16",)),
    Bad("batch_norm: double statistics", lambda f, t: f.batch_norm(t(2, 3), t(3, dtype=DOUBLE), t(3)), ("float64",)),
    # cross_entropy
    Bad("cross_entropy: batches differ", lambda f, t: f.cross_entropy(t(3, 5), t(2, dtype=LONG)), ("[3, 5]", "[2]")),
    Bad("cross_entropy: extra dimension", lambda f, t: f.cross_entropy(t(3, 5), t(3, 1, dtype=LONG)), ("[3, 1]",)),
    Bad(
        "cross_entropy: image sizes differ",
        lambda f, t: f.cross_entropy(t(2, 5, 4, 4), t(2, 4, 3, dtype=LONG)),
        ("[2, 5, 4, 4]", "[2, 4, 3]"),
    ),
    Bad("cross_entropy: rank 1, batched target", lambda f, t: f.cross_entropy(t(5), t(2, dtype=LONG)), ("[5]", "[2]")),
    Bad("cross_entropy: scalar input", lambda f, t: f.cross_entropy(t(), t(dtype=LONG)), ("[]",)),
    Bad(
        "cross_entropy: target out of range", lambda f, t: f.cross_entropy(t(3, 5), t(3, dtype=LONG, value=5)), (), True
    ),
    Bad("cross_entropy: target negative", lambda f, t: f.cross_entropy(t(3, 5), t(3, dtype=LONG, value=-3)), (), True),
    Bad("cross_entropy: int32 target", lambda f, t: f.cross_entropy(t(3, 5), t(3, dtype=INT)), ("target", "int32")),
    Bad("cross_entropy: boolean target", lambda f, t: f.cross_entropy(t(3, 5), t(3, dtype=BOOL)), ("target", "bool")),
    Bad(
        "cross_entropy: uint8 target of pixels",
        lambda f, t: f.cross_entropy(t(2, 5, 3), t(2, 3, dtype=torch.uint8)),
        ("target", "uint8", "[2, 5, 3]"),
    ),
    Bad("cross_entropy: floating indices", lambda f, t: f.cross_entropy(t(3, 5), t(3)), ("target",)),
    Bad(
        "cross_entropy: integer probabilities",
        lambda f, t: f.cross_entropy(t(3, 5), t(3, 5, dtype=LONG)),
        ("target", "int64"),
    ),
    Bad("cross_entropy: probabilities' shape", lambda f, t: f.cross_entropy(t(3, 5), t(3, 4)), ("[3, 5]", "[3, 4]")),
    Bad(
        "cross_entropy: ignore_index with probabilities",
        lambda f, t: f.cross_entropy(t(3, 5), t(3, 5), ignore_index=1),
        ("ignore_index",),
    ),
    Bad("cross_entropy: integer logits", lambda f, t: f.cross_entropy(t(3, 5, dtype=LONG), t(3, dtype=LONG)), ()),
    Bad(
        "cross_entropy: weight length",
        lambda f, t: f.cross_entropy(t(3, 5), t(3, dtype=LONG), t(4)),
        ("weight", "[4]", "5"),
    ),
    Bad(
        "cross_entropy: weight length, probabilities",
        lambda f, t: f.cross_entropy(t(3, 5), t(3, 5), t(4)),
        ("weight", "[4]", "5"),
    ),
    Bad("cross_entropy: weight rank", lambda f, t: f.cross_entropy(t(3, 5), t(3, dtype=LONG), t(5, 1)), ("weight",)),
    Bad(
        "cross_entropy: weight dtype",
        lambda f, t: f.cross_entropy(t(3, 5), t(3, dtype=LONG), t(5, dtype=DOUBLE)),
        ("float64",),
    ),
    Bad(
        "cross_entropy: reduction 'avg'",
        lambda f, t: f.cross_entropy(t(3, 5), t(3, dtype=LONG), reduction="avg"),
        ("reduction", "avg"),
    ),
    Bad(
        "cross_entropy: reduction None",
        lambda f, t: f.cross_entropy(t(3, 5), t(3, dtype=LONG), reduction=None),
        ("reduction", "None"),
    ),
    Bad(
        "cross_entropy: smoothing 1.5",
        lambda f, t: f.cross_entropy(t(3, 5), t(3, dtype=LONG), label_smoothing=1.5),
        ("label_smoothing", "1.5"),
    ),
    Bad(
        "cross_entropy: smoothing 'a'",
        lambda f, t: f.cross_entropy(t(3, 5), t(3, dtype=LONG), label_smoothing="a"),
        ("label_smoothing",),
    ),
    Bad(
        "cross_entropy: ignore_index 0.5",
        lambda f, t: f.cross_entropy(t(3, 5), t(3, dtype=LONG), ignore_index=0.5),
        ("ignore_index",),
    ),
    Bad(
        "cross_entropy: ignore_index True",
        lambda f, t: f.cross_entropy(t(3, 5), t(3, dtype=LONG), ignore_index=True),
        ("ignore_index", "bool"),
    ),
    Bad(
        "cross_entropy: ignore_index of 71 bits",
        lambda f, t: f.cross_entropy(t(3, 5), t(3, dtype=LONG), ignore_index=2**70),
        (),
    ),
    Bad(
        "cross_entropy: smoothing None",
        lambda f, t: f.cross_entropy(t(3, 5), t(3, dtype=LONG), label_smoothing=None),
        ("label_smoothing",),
    ),
    Bad(
        "cross_entropy: smoothing of logits without a batch beside a target with one",
        lambda f, t: f.cross_entropy(t(5), t(1, dtype=LONG), label_smoothing=0.1),
        ("target", "[1]", "label_smoothing"),
    ),
    Bad(
        "cross_entropy: the mean of weighed and smoothed bytes",
        lambda f, t: f.cross_entropy(t(3, 5), t(3, dtype=torch.uint8), t(5), label_smoothing=0.1),
        ("target", "uint8"),
    ),
    Bad(
        "cross_entropy: smoothing 1j",
        lambda f, t: f.cross_entropy(t(3, 5), t(3, dtype=LONG), label_smoothing=1j),
        ("label_smoothing",),
    ),
    Bad("cross_entropy: target is a list", lambda f, t: f.cross_entropy(t(2, 3), [0, 1]), ("target", "list")),
    Bad("cross_entropy: input is None", lambda f, t: f.cross_entropy(None, t(2, dtype=LONG)), ("input",)),
    Bad(
        "cross_entropy: weight a list", lambda f, t: f.cross_entropy(t(2, 3), t(2, dtype=LONG), [1.0] * 3), ("weight",)
    ),
    Bad("cross_entropy: no target", lambda f, t: f.cross_entropy(t(2, 3)), ("target",)),
)

MODULES = (
    Bad("Linear: negative in_features", lambda n, t: n.Linear(-1, 3), ()),
    Bad("Linear: fractional in_features", lambda n, t: n.Linear(2.5, 3), ()),
    Bad("Linear: no out_features", lambda n, t: n.Linear(3), ("out_features",)),
    Bad("Linear: integer parameters", lambda n, t: n.Linear(3, 2, dtype=LONG), ()),
    Bad("Linear: input of other features", lambda n, t: n.Linear(3, 2)(t(4, 5)), ("[4, 5]", "[2, 3]")),
    Bad("Conv2d: in_channels and groups", lambda n, t: n.Conv2d(4, 6, 3, groups=3), ("in_channels", "groups")),
    Bad("Conv2d: out_channels and groups", lambda n, t: n.Conv2d(4, 3, 3, groups=2), ("out_channels", "groups")),
    Bad("Conv2d: groups 0", lambda n, t: n.Conv2d(4, 4, 3, groups=0), ("groups",)),
    Bad("Conv2d: groups -2", lambda n, t: n.Conv2d(4, 4, 3, groups=-2), ("groups",)),
    Bad("Conv2d: padding 'full'", lambda n, t: n.Conv2d(4, 4, 3, padding="full"), ("padding", "full")),
    Bad("Conv2d: 'same' with a stride", lambda n, t: n.Conv2d(4, 4, 3, padding="same", stride=2), ("same",)),
    Bad("Conv2d: padding_mode 'mirror'", lambda n, t: n.Conv2d(4, 4, 3, padding_mode="mirror"), ("padding_mode",)),
    Bad("Conv2d: negative channels", lambda n, t: n.Conv2d(-4, 4, 3), ()),
    Bad("Conv2d: no kernel_size", lambda n, t: n.Conv2d(4, 4), ("kernel_size",)),
    Bad("Conv2d: stride 0", lambda n, t: n.Conv2d(4, 4, 3, stride=0)(t(1, 4, 5, 5)), ("stride",)),
    Bad("Conv2d: stride of 3", lambda n, t: n.Conv2d(4, 4, 3, stride=(1, 1, 1))(t(1, 4, 5, 5)), ("stride",)),
    Bad("Conv2d: padding -1", lambda n, t: n.Conv2d(4, 4, 3, padding=-1)(t(1, 4, 5, 5)), ("padding",)),
    Bad("Conv2d: input channels", lambda n, t: n.Conv2d(4, 4, 3)(t(1, 3, 5, 5)), ("[1, 3, 5, 5]", "[4, 4, 3, 3]")),
    Bad("Conv2d: input rank", lambda n, t: n.Conv2d(4, 4, 3)(t(4, 5)), ("[4, 5]",)),
    Bad("BatchNorm1d: 4-D input", lambda n, t: n.BatchNorm1d(3)(t(2, 3, 4, 4)), ("2D or 3D", "4D")),
    Bad("BatchNorm2d: 3-D input", lambda n, t: n.BatchNorm2d(3)(t(2, 3, 4)), ("4D", "3D")),
    Bad("BatchNorm3d: 4-D input", lambda n, t: n.BatchNorm3d(3)(t(2, 3, 4, 4)), ("5D", "4D")),
    Bad("BatchNorm2d: other channels", lambda n, t: n.BatchNorm2d(3)(t(2, 4, 5, 5)), ("4",)),
    Bad("BatchNorm2d: one value a channel", lambda n, t: n.BatchNorm2d(3)(t(1, 3, 1, 1)), ("more than 1 value",)),
    Bad("BatchNorm1d: one value a channel", lambda n, t: n.BatchNorm1d(3)(t(1, 3)), ("more than 1 value",)),
    Bad("BatchNorm2d: eps 0", lambda n, t: n.BatchNorm2d(3, eps=0.0)(t(2, 3, 4, 4)), ("eps",)),
    Bad("BatchNorm2d: negative features", lambda n, t: n.BatchNorm2d(-3), ()),
    Bad("BatchNorm2d: fractional features", lambda n, t: n.BatchNorm2d(3.5), ()),
    Bad("BatchNorm2d: no features", lambda n, t: n.BatchNorm2d(), ("num_features",)),
    Bad(
        "CrossEntropyLoss: reduction 'avg'",
        lambda n, t: n.CrossEntropyLoss(reduction="avg")(t(2, 3), t(2, dtype=LONG)),
        ("avg",),
    ),
    Bad(
        "CrossEntropyLoss: smoothing 2",
        lambda n, t: n.CrossEntropyLoss(label_smoothing=2.0)(t(2, 3), t(2, dtype=LONG)),
        ("label_smoothing",),
    ),
    Bad(
        "CrossEntropyLoss: weight length",
        lambda n, t: n.CrossEntropyLoss(weight=t(4))(t(2, 3), t(2, dtype=LONG)),
        ("weight", "[4]"),
    ),
    Bad("CrossEntropyLoss: weight a list", lambda n, t: n.CrossEntropyLoss(weight=[1.0, 2.0]), ("weight",)),
    Bad("CrossEntropyLoss: unknown keyword", lambda n, t: n.CrossEntropyLoss(smoothing=0.1), ("smoothing",)),
    Bad(
        "CrossEntropyLoss: target out of range",
        lambda n, t: n.CrossEntropyLoss()(t(2, 3), t(2, dtype=LONG, value=7)),
        (),
        cpu_only=True,
    ),
)

# Arguments torch does not have, with what torch raises for the like elsewhere: Dropout for p, getattr-like names
# for activation, an addition for the residual.
OWN = (
    (
        Bad("linear: activation", lambda f, t: f.linear(t(2, 3), t(4, 3), activation="tanh"), ("tanh", "relu")),
        ValueError,
    ),
    (Bad("linear: dropout_p 1.5", lambda f, t: f.linear(t(2, 3), t(4, 3), dropout_p=1.5), ("dropout_p",)), ValueError),
    (Bad("linear: dropout_p -1", lambda f, t: f.linear(t(2, 3), t(4, 3), dropout_p=-1), ("dropout_p",)), ValueError),
    (
        Bad("conv2d: activation", lambda f, t: f.conv2d(t(1, 3, 4, 4), t(2, 3, 3, 3), activation=1), ("activation",)),
        ValueError,
    ),
    (
        Bad("batch_norm: activation", lambda f, t: f.batch_norm(t(2, 3), t(3), t(3), activation="x"), ("activation",)),
        ValueError,
    ),
    (
        Bad(
            "batch_norm: residual shape",
            lambda f, t: f.batch_norm(t(2, 3), t(3), t(3), residual=t(2, 4)),
            ("residual", "[2, 3]", "[2, 4]"),
        ),
        RuntimeError,
    ),
    (
        Bad(
            "batch_norm: residual a number",
            lambda f, t: f.batch_norm(t(2, 3), t(3), t(3), residual="a"),
            ("residual", "str"),
        ),
        TypeError,
    ),
)
