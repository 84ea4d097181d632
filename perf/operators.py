"""What can be measured: each operator's inputs, how a function is called on them, and the least work it has to do.

A new operator is a subclass of :class:`Operator` and a line in OPERATORS; its shapes go to perf/shapes.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from perf import shapes
from perf.options import Refused, one_of
from perf.shapes import Shape, Shapes
from tkernels.core import mode

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = ("nhwc", "nchw")
# of batches under --quick
QUICK_IMAGES, QUICK_ROWS = 8, 64

Tensors = dict[str, Tensor]


class Sources:
    """Draws the tensors of a measurement: the same values for every provider, rounded to the dtype measured."""

    def __init__(self, dtype: torch.dtype, layout: str, device: str, seed: int = 0) -> None:
        self.dtype, self.layout, self.device = dtype, layout, torch.device(device)
        self._generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(size, generator=self._generator, device=self.device)
        return (values * scale).to(dtype or self.dtype)

    def image(self, *size: int) -> Tensor:
        nhwc = self.layout == "nhwc"
        return self.normal(*size).contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)

    def classes(self, n: int, count: int) -> Tensor:
        return torch.randint(count, (n,), generator=self._generator, device=self.device)


class Sizes(NamedTuple):
    """How much an operator handles: elements of the operands, to whose gradients backward writes, and of the results;
    multiply-adds; elements of vectors that either pass touches once; bytes of integers that either reads."""

    operands: int
    results: int
    products: int = 0
    vectors: int = 0
    integer_bytes: int = 0


class Operator:
    """One operator. ``required``: sizes its shapes must have; ``optional``: sizes that have defaults; ``arguments``:
    names of the tensors a function of it takes, those of ``differentiable``, whose gradients backward is asked for,
    unless told otherwise."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    # whether inputs are images, which have a layout
    images = False
    differentiable: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    # whose float32 switch of torch governs its products
    precision: mode.Op = "matmul"

    def __init__(self, name: str | None = None) -> None:
        self.name = name or type(self).name

    @property
    def family(self) -> str:
        """The key of its shapes in the named lists."""
        return type(self).name

    def complete(self, shape: Shape) -> Shape:
        """The shape with its defaults. Raises Refused where a size is missing, unknown or absurd."""
        missing = [name for name in self.required if name not in shape]
        unknown = [name for name in shape if name not in self.required + self.optional]
        if missing or unknown:
            what = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)}"
            raise Refused(f"a shape for {self.name} {what}; it takes {', '.join(self.required + self.optional)}")
        full = self._with_defaults(dict(shape))
        for name, value in full.items():
            if value < (0 if name == "padding" else 1):
                raise Refused(f"a shape for {self.name} has {name}={value}, at least 1 is needed")
        self._check(full)
        return full

    def _with_defaults(self, shape: Shape) -> Shape:
        return shape

    def _check(self, shape: Shape) -> None:
        """Raise Refused for sizes that do not go together."""

    def quick(self, shape: Shape) -> Shape:
        """The shape with a small batch."""
        return {**shape, "N": min(shape["N"], QUICK_IMAGES if self.images else QUICK_ROWS)}

    def of_named(self, named: Shapes) -> list[Shape]:
        """Its shapes in a named list or a file; a file's rows without an operator go to every operator they fit."""
        own = named.get(self.name) or named.get(self.family, [])
        return own + [shape for shape in named.get("", []) if self.fits(shape)]

    def fits(self, shape: Shape) -> bool:
        """Whether it takes the sizes a shape has."""
        return set(self.required) <= set(shape) <= set(self.required + self.optional)

    def tensors(self, shape: Shape, source: Sources) -> Tensors:
        raise NotImplementedError

    def bind(self, function: Callable[..., Any], tensors: Tensors, shape: Shape, exact: bool) -> Callable[[], Tensor]:
        """A call of ``function`` on the tensors. ``exact``: leave out randomness, so that results can be compared."""
        given = (tensors[name] for name in self.arguments or self.differentiable)
        return functools.partial(function, *given, *self._options(shape))

    def _options(self, shape: Shape) -> tuple[Any, ...]:
        """What a function of it takes after the tensors."""
        return ()

    def work(self, shape: Shape, mode: str, itemsize: int) -> tuple[int, int]:
        """Bytes and floating-point operations of a mode (schema.MODES, schema.GRADIENTS): each operand read once, each
        result written once."""
        forward, backward = self._forward(shape, itemsize), self._backward(shape, itemsize)
        if mode == "full":
            return forward[0] + backward[0], forward[1] + backward[1]
        # one gradient of a product alone has the operands and the multiply-adds of its forward
        return backward if mode == "bwd" else forward

    def _sizes(self, shape: Shape) -> Sizes:
        raise NotImplementedError

    def _forward(self, shape: Shape, itemsize: int) -> tuple[int, int]:
        operands, results, products, vectors, integers = self._sizes(shape)
        return (operands + vectors + results) * itemsize + integers, 2 * products

    def _backward(self, shape: Shape, itemsize: int) -> tuple[int, int]:
        operands, results, products, vectors, integers = self._sizes(shape)
        return (2 * operands + vectors + results) * itemsize + integers, 4 * products


class Linear(Operator):
    name = "linear"
    required = ("N", "C", "K")
    differentiable = ("input", "weight", "bias")

    def tensors(self, shape: Shape, source: Sources) -> Tensors:
        n, c, k = shape["N"], shape["C"], shape["K"]
        return {"input": source.normal(n, c), "weight": source.normal(k, c, scale=c**-0.5), "bias": source.normal(k)}

    def _sizes(self, shape: Shape) -> Sizes:
        n, c, k = shape["N"], shape["C"], shape["K"]
        return Sizes(n * c + k * c, n * k, n * c * k, vectors=k)


class Matmul(Operator):
    """``groups`` products of (N, C) and (C, K)."""

    name = "matmul"
    required = ("N", "C", "K")
    optional = ("groups",)
    differentiable = ("a", "b")

    def _with_defaults(self, shape: Shape) -> Shape:
        return {"groups": 1, **shape}

    def tensors(self, shape: Shape, source: Sources) -> Tensors:
        n, c, k, batch = (shape[name] for name in ("N", "C", "K", "groups"))
        lead = (batch,) if batch > 1 else ()
        return {"a": source.normal(*lead, n, c), "b": source.normal(*lead, c, k, scale=c**-0.5)}

    def _sizes(self, shape: Shape) -> Sizes:
        n, c, k, batch = (shape[name] for name in ("N", "C", "K", "groups"))
        return Sizes(batch * (n * c + c * k), batch * n * k, batch * n * c * k)


class Attention(Operator):
    """Scaled dot-product attention without a mask: N sequences, K heads of C features, H queries and W keys."""

    name = "attention"
    required = ("N", "K", "H", "W", "C")
    differentiable = ("query", "key", "value")

    def quick(self, shape: Shape) -> Shape:
        lengths = {name: min(shape[name], QUICK_ROWS) for name in ("H", "W")}
        return {**shape, "N": min(shape["N"], QUICK_IMAGES), **lengths}

    def tensors(self, shape: Shape, source: Sources) -> Tensors:
        n, heads, head = (shape[name] for name in ("N", "K", "C"))
        lengths = {"query": shape["H"], "key": shape["W"], "value": shape["W"]}
        # as a projection gives them: the heads of one position side by side
        return {name: source.normal(n, length, heads, head).transpose(1, 2) for name, length in lengths.items()}

    def _sizes(self, shape: Shape) -> Sizes:
        features = shape["N"] * shape["K"] * shape["C"]
        queries, keys = features * shape["H"], features * shape["W"]
        return Sizes(queries + 2 * keys, queries, 2 * queries * shape["W"])

    def _backward(self, shape: Shape, itemsize: int) -> tuple[int, int]:
        operands, output, products, *_ = self._sizes(shape)
        # the output is read too; five products: the scores once more, and each gradient's
        return 2 * (operands + output) * itemsize, 5 * products


class Conv2d(Operator):
    name = "conv2d"
    precision = "conv"
    required = ("N", "C", "H", "W", "K")
    optional = ("R", "S", "stride", "padding", "groups")
    images = True
    differentiable = ("input", "weight", "bias")

    def _with_defaults(self, shape: Shape) -> Shape:
        window = shape.setdefault("R", 3)
        shape.setdefault("S", window)
        shape.setdefault("padding", window // 2)
        return {"stride": 1, "groups": 1, **shape}

    def _check(self, shape: Shape) -> None:
        if shape["C"] % shape["groups"] or shape["K"] % shape["groups"]:
            raise Refused(f"a shape for conv2d has C={shape['C']} and K={shape['K']}, not multiples of its groups")
        if min(_out_size(shape)) < 1:
            raise Refused(f"a shape for conv2d has a window of {shape['R']}x{shape['S']}, larger than its padded image")

    def tensors(self, shape: Shape, source: Sources) -> Tensors:
        group_in = shape["C"] // shape["groups"]
        scale = (group_in * shape["R"] * shape["S"]) ** -0.5
        weight = source.normal(shape["K"], group_in, shape["R"], shape["S"], scale=scale)
        if source.layout == "nhwc":
            weight = weight.contiguous(memory_format=torch.channels_last)
        image = source.image(shape["N"], shape["C"], shape["H"], shape["W"])
        return {"input": image, "weight": weight, "bias": source.normal(shape["K"])}

    def _options(self, shape: Shape) -> tuple[Any, ...]:
        return shape["stride"], shape["padding"], 1, shape["groups"]

    def _sizes(self, shape: Shape) -> Sizes:
        p, q = _out_size(shape)
        inputs = shape["N"] * shape["C"] * shape["H"] * shape["W"]
        window = shape["C"] // shape["groups"] * shape["R"] * shape["S"]
        outputs = shape["N"] * shape["K"] * p * q
        return Sizes(inputs + shape["K"] * window, outputs, outputs * window, vectors=shape["K"])


class BatchNorm(Operator):
    name = "batch_norm"
    required = ("N", "C", "H", "W")
    images = True
    differentiable = ("input", "weight", "bias")
    arguments = ("input", "running_mean", "running_var", "weight", "bias")

    def tensors(self, shape: Shape, source: Sources) -> Tensors:
        c = shape["C"]
        return {
            "input": source.image(shape["N"], c, shape["H"], shape["W"]),
            "weight": source.normal(c, dtype=torch.float32) + 1.0,
            "bias": source.normal(c, dtype=torch.float32),
            "running_mean": torch.zeros(c, device=source.device),
            "running_var": torch.ones(c, device=source.device),
        }

    def _options(self, shape: Shape) -> tuple[Any, ...]:
        return (True,)  # in training

    def _sizes(self, shape: Shape) -> Sizes:
        elements = shape["N"] * shape["C"] * shape["H"] * shape["W"]
        return Sizes(elements, elements)


class CrossEntropy(Operator):
    name = "cross_entropy"
    required = ("N", "C")
    differentiable = ("input",)
    arguments = ("input", "target")

    def tensors(self, shape: Shape, source: Sources) -> Tensors:
        n, c = shape["N"], shape["C"]
        return {"input": source.normal(n, c), "target": source.classes(n, c)}

    def _sizes(self, shape: Shape) -> Sizes:
        return Sizes(shape["N"] * shape["C"], 0, integer_bytes=8 * shape["N"])


class ConvStage(Operator):
    """Two 3x3 convolutions, each with batch norm (training) and ReLU, then 2x2 max pooling: a stage of the network.

    Providers' functions take (input, layers, pool), a layer being (weight, bn_weight, bn_bias, running_mean,
    running_var).
    """

    name = "conv_stage"
    precision = "conv"
    required = ("N", "C", "H", "W", "K")
    images = True
    differentiable = ("input", *(f"{name}{i}" for i in (1, 2) for name in ("weight", "bn_weight", "bn_bias")))

    def _convolutions(self, shape: Shape) -> list[Shape]:
        second = {**shape, "C": shape["K"]}
        return [OPERATORS["conv2d"].complete(each) for each in (shape, second)]

    def tensors(self, shape: Shape, source: Sources) -> Tensors:
        found = {"input": source.image(shape["N"], shape["C"], shape["H"], shape["W"])}
        for i, layer in enumerate(self._convolutions(shape), 1):
            k = shape["K"]
            vectors = OPERATORS["batch_norm"].tensors({**shape, "N": 1, "C": k, "H": 1, "W": 1}, source)
            found[f"weight{i}"] = OPERATORS["conv2d"].tensors({**layer, "N": 1}, source)["weight"]
            found[f"bn_weight{i}"], found[f"bn_bias{i}"] = vectors["weight"], vectors["bias"]
            found[f"running_mean{i}"], found[f"running_var{i}"] = vectors["running_mean"], vectors["running_var"]
        return found

    def bind(self, function: Callable[..., Any], tensors: Tensors, shape: Shape, exact: bool) -> Callable[[], Tensor]:
        names = ("weight", "bn_weight", "bn_bias", "running_mean", "running_var")
        layers = [tuple(tensors[f"{name}{i}"] for name in names) for i in (1, 2)]
        return functools.partial(function, tensors["input"], layers, 2)

    def _sizes(self, shape: Shape) -> Sizes:
        n, c, k = shape["N"], shape["C"], shape["K"]
        operands = n * c * shape["H"] * shape["W"] + 9 * (c + k) * k
        pooled = n * k * (shape["H"] // 2) * (shape["W"] // 2)
        products = sum(OPERATORS["conv2d"].work(layer, "fwd", 0)[1] for layer in self._convolutions(shape)) // 2
        return Sizes(operands, pooled, products)


class Cnn(Operator):
    """The CIFAR classifier in training mode with its loss: 'full' is a training step without the optimizer."""

    name = "cnn"
    precision = "conv"
    required = ("N",)
    images = True

    def tensors(self, shape: Shape, source: Sources) -> Tensors:
        from models.cifar_cnn import CNNClassifier

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = CNNClassifier().to(source.device, source.dtype)
        model = model.to(memory_format=torch.channels_last if source.layout == "nhwc" else torch.contiguous_format)
        images = {"images": source.image(shape["N"], 3, 32, 32), "target": source.classes(shape["N"], 10)}
        return {**images, **model.state_dict()}

    @property
    def differentiable(self) -> tuple[str, ...]:  # type: ignore[override]
        from models.cifar_cnn import CNNClassifier

        # a bias before batch norm has a zero gradient: what is computed of it is rounding noise
        return tuple(
            name for name, _ in CNNClassifier().named_parameters() if ".conv" not in name or name.endswith("weight")
        )

    def bind(self, function: Callable[..., Any], tensors: Tensors, shape: Shape, exact: bool) -> Callable[[], Tensor]:
        images, target = tensors["images"], tensors["target"]
        dropout: dict[str, Any] = {"dropout": 0.0, "dropout2d": 0.0} if exact else {}
        model, loss = function(dropout)
        assign_state(model, {name: t for name, t in tensors.items() if name not in ("images", "target")})
        return lambda: loss(model(images), target)

    def _parts(self, shape: Shape) -> list[tuple[Operator, Shape]]:
        n = shape["N"]
        listed = shapes.NAMED["cnn"]
        parts: list[tuple[Operator, Shape]] = []
        for family in ("conv2d", "linear", "cross_entropy"):
            parts += [(OPERATORS[family], {**s, "N": n}) for s in listed[family]]
        # a batch norm behind each convolution
        parts += [(OPERATORS["batch_norm"], shapes.image(n, s["K"], s["H"])) for s in listed["conv2d"]]
        return parts

    def _forward(self, shape: Shape, itemsize: int) -> tuple[int, int]:
        return self._sum(shape, "fwd", itemsize)

    def _backward(self, shape: Shape, itemsize: int) -> tuple[int, int]:
        moved, flops = self._sum(shape, "bwd", itemsize)
        # the image's gradient is not asked for
        first = {**shapes.NAMED["cnn"]["conv2d"][0], "N": shape["N"]}
        image = shape["N"] * first["C"] * first["H"] * first["W"] * itemsize
        return moved - image, flops - OPERATORS["conv2d"].work(first, "fwd", itemsize)[1]

    def _sum(self, shape: Shape, mode: str, itemsize: int) -> tuple[int, int]:
        moved, flops = zip(*(part.work(s, mode, itemsize) for part, s in self._parts(shape)))
        return sum(moved), sum(flops)


def assign_state(model: nn.Module, state: Tensors) -> None:
    """Let a model use these very tensors, gradients and all."""
    model.to("meta")
    for name, tensor in state.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._parameters:
            del module._parameters[leaf]
        # a plain attribute: whether it wants a gradient is the tensor's own business
        module._buffers[leaf] = tensor


def _out_size(shape: Shape) -> tuple[int, int]:
    def out(size: int, window: int) -> int:
        return (size + 2 * shape["padding"] - window) // shape["stride"] + 1

    return out(shape["H"], shape["R"]), out(shape["W"], shape["S"])


OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        Linear(),
        Linear("linear_relu"),
        Matmul(),
        Attention(),
        Conv2d(),
        Conv2d("conv2d_relu"),
        BatchNorm(),
        BatchNorm("batch_norm_relu"),
        CrossEntropy(),
        ConvStage(),
        Cnn(),
    )
}


def get(name: str) -> Operator:
    """The operator of that name. Raises Refused."""
    return OPERATORS[one_of("operator", name, OPERATORS)]
