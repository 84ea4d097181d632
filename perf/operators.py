"""What can be measured: each operator's inputs, how a function is called on them, and the least work it has to do.

A new operator is a subclass of :class:`Operator` and a line in OPERATORS; its shapes go to perf/shapes.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

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


class Operator:
    """One operator. ``required``: sizes its shapes must have; ``optional``: sizes with their defaults."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    # whether inputs are images, which have a layout
    images = False
    # names of the tensors backward is asked for
    differentiable: tuple[str, ...] = ()
    # the function of torch.nn.functional that providers must stand in for
    function: str
    # whose float32 switch of torch governs its products
    precision: mode.Op = "matmul"

    @property
    def family(self) -> str:
        """The key of its shapes in the named lists."""
        return self.function

    def complete(self, shape: Shape) -> Shape:
        """The shape with its defaults. Raises Refused where a size is missing, unknown or absurd."""
        allowed = self.required + self.optional
        missing = [name for name in self.required if name not in shape]
        unknown = [name for name in shape if name not in allowed]
        if missing or unknown:
            what = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)}"
            raise Refused(f"a shape for {self.name} {what}; it takes {', '.join(allowed)}")
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
        loose = [s for s in named.get("", []) if self.fits(s)]
        return own + loose

    def fits(self, shape: Shape) -> bool:
        """Whether it takes the sizes a shape has."""
        return set(self.required) <= set(shape) <= set(self.required + self.optional)

    def tensors(self, shape: Shape, source: Sources) -> Tensors:
        raise NotImplementedError

    def bind(self, function: Callable[..., Any], tensors: Tensors, shape: Shape, exact: bool) -> Callable[[], Tensor]:
        """A call of ``function`` on the tensors. ``exact``: leave out randomness, so that results can be compared."""
        raise NotImplementedError

    def work(self, shape: Shape, mode: str, itemsize: int) -> tuple[int, int]:
        """Bytes and floating-point operations of a mode (schema.MODES, schema.GRADIENTS): each operand read once, each
        result written once."""
        forward, backward = self._forward(shape, itemsize), self._backward(shape, itemsize)
        if mode == "full":
            return forward[0] + backward[0], forward[1] + backward[1]
        # one gradient of a product alone has the operands and the multiply-adds of its forward
        return backward if mode == "bwd" else forward

    def _forward(self, shape: Shape, itemsize: int) -> tuple[int, int]:
        raise NotImplementedError

    def _backward(self, shape: Shape, itemsize: int) -> tuple[int, int]:
        raise NotImplementedError


class Linear(Operator):
    required = ("N", "C", "K")
    differentiable = ("input", "weight", "bias")

    def __init__(self, function: str = "linear") -> None:
        self.name = self.function = function

    @property
    def family(self) -> str:
        return "linear"

    def tensors(self, shape: Shape, source: Sources) -> Tensors:
        n, c, k = shape["N"], shape["C"], shape["K"]
        return {
            "input": source.normal(n, c),
            "weight": source.normal(k, c, scale=c**-0.5),
            "bias": source.normal(k),
        }

    def bind(self, function: Callable[..., Any], tensors: Tensors, shape: Shape, exact: bool) -> Callable[[], Tensor]:
        return functools.partial(function, tensors["input"], tensors["weight"], tensors["bias"])

    def _forward(self, shape: Shape, itemsize: int) -> tuple[int, int]:
        n, c, k = shape["N"], shape["C"], shape["K"]
        return (n * c + k * c + k + n * k) * itemsize, 2 * n * c * k

    def _backward(self, shape: Shape, itemsize: int) -> tuple[int, int]:
        n, c, k = shape["N"], shape["C"], shape["K"]
        return (n * k + 2 * (n * c + k * c) + k) * itemsize, 4 * n * c * k


class Matmul(Operator):
    """``groups`` products of (N, C) and (C, K)."""

    name = function = "matmul"
    required = ("N", "C", "K")
    optional = ("groups",)
    differentiable = ("a", "b")

    def _with_defaults(self, shape: Shape) -> Shape:
        return {"groups": 1, **shape}

    def tensors(self, shape: Shape, source: Sources) -> Tensors:
        n, c, k, batch = (shape[name] for name in ("N", "C", "K", "groups"))
        lead = (batch,) if batch > 1 else ()
        return {"a": source.normal(*lead, n, c), "b": source.normal(*lead, c, k, scale=c**-0.5)}

    def bind(self, function: Callable[..., Any], tensors: Tensors, shape: Shape, exact: bool) -> Callable[[], Tensor]:
        return functools.partial(function, tensors["a"], tensors["b"])

    def _forward(self, shape: Shape, itemsize: int) -> tuple[int, int]:
        n, c, k, batch = (shape[name] for name in ("N", "C", "K", "groups"))
        return batch * (n * c + c * k + n * k) * itemsize, 2 * batch * n * c * k

    def _backward(self, shape: Shape, itemsize: int) -> tuple[int, int]:
        n, c, k, batch = (shape[name] for name in ("N", "C", "K", "groups"))
        return batch * (n * k + 2 * (n * c + c * k)) * itemsize, 4 * batch * n * c * k


class Attention(Operator):
    """Scaled dot-product attention without a mask: N sequences, K heads of C features, H queries and W keys."""

    name = "attention"
    function = "scaled_dot_product_attention"
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

    def bind(self, function: Callable[..., Any], tensors: Tensors, shape: Shape, exact: bool) -> Callable[[], Tensor]:
        return functools.partial(function, tensors["query"], tensors["key"], tensors["value"])

    def _sizes(self, shape: Shape) -> tuple[int, int, int]:
        """Elements of query (and output), of key (and value), and of the scores that are not stored."""
        rows = shape["N"] * shape["K"]
        return rows * shape["H"] * shape["C"], rows * shape["W"] * shape["C"], rows * shape["H"] * shape["W"]

    def _forward(self, shape: Shape, itemsize: int) -> tuple[int, int]:
        queries, keys, scores = self._sizes(shape)
        return 2 * (queries + keys) * itemsize, 4 * scores * shape["C"]

    def _backward(self, shape: Shape, itemsize: int) -> tuple[int, int]:
        queries, keys, scores = self._sizes(shape)
        # five products: the scores once more, and each gradient's
        return (4 * queries + 4 * keys) * itemsize, 10 * scores * shape["C"]


class Conv2d(Operator):
    precision = "conv"
    required = ("N", "C", "H", "W", "K")
    optional = ("R", "S", "stride", "padding", "groups")
    images = True
    differentiable = ("input", "weight", "bias")

    def __init__(self, function: str = "conv2d") -> None:
        self.name = self.function = function

    @property
    def family(self) -> str:
        return "conv2d"

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
        return {
            "input": source.image(shape["N"], shape["C"], shape["H"], shape["W"]),
            "weight": weight,
            "bias": source.normal(shape["K"]),
        }

    def bind(self, function: Callable[..., Any], tensors: Tensors, shape: Shape, exact: bool) -> Callable[[], Tensor]:
        x, w, b = (tensors[name] for name in ("input", "weight", "bias"))
        return functools.partial(function, x, w, b, shape["stride"], shape["padding"], 1, shape["groups"])

    def _sizes(self, shape: Shape) -> tuple[int, int, int, int]:
        """Elements of input, weight and output, and multiply-adds."""
        p, q = _out_size(shape)
        inputs = shape["N"] * shape["C"] * shape["H"] * shape["W"]
        window = shape["C"] // shape["groups"] * shape["R"] * shape["S"]
        outputs = shape["N"] * shape["K"] * p * q
        return inputs, shape["K"] * window, outputs, outputs * window

    def _forward(self, shape: Shape, itemsize: int) -> tuple[int, int]:
        inputs, weights, outputs, products = self._sizes(shape)
        return (inputs + weights + shape["K"] + outputs) * itemsize, 2 * products

    def _backward(self, shape: Shape, itemsize: int) -> tuple[int, int]:
        inputs, weights, outputs, products = self._sizes(shape)
        return (outputs + 2 * (inputs + weights) + shape["K"]) * itemsize, 4 * products


class BatchNorm(Operator):
    required = ("N", "C", "H", "W")
    images = True
    differentiable = ("input", "weight", "bias")

    def __init__(self, function: str = "batch_norm") -> None:
        self.name = self.function = function

    @property
    def family(self) -> str:
        return "batch_norm"

    def tensors(self, shape: Shape, source: Sources) -> Tensors:
        c = shape["C"]
        return {
            "input": source.image(shape["N"], c, shape["H"], shape["W"]),
            "weight": source.normal(c, dtype=torch.float32) + 1.0,
            "bias": source.normal(c, dtype=torch.float32),
            "running_mean": torch.zeros(c, device=source.device),
            "running_var": torch.ones(c, device=source.device),
        }

    def bind(self, function: Callable[..., Any], tensors: Tensors, shape: Shape, exact: bool) -> Callable[[], Tensor]:
        names = ("input", "running_mean", "running_var", "weight", "bias")
        return functools.partial(function, *(tensors[name] for name in names), True)

    def _forward(self, shape: Shape, itemsize: int) -> tuple[int, int]:
        return 2 * shape["N"] * shape["C"] * shape["H"] * shape["W"] * itemsize, 0

    def _backward(self, shape: Shape, itemsize: int) -> tuple[int, int]:
        return 3 * shape["N"] * shape["C"] * shape["H"] * shape["W"] * itemsize, 0


class CrossEntropy(Operator):
    name = function = "cross_entropy"
    required = ("N", "C")
    differentiable = ("input",)

    def tensors(self, shape: Shape, source: Sources) -> Tensors:
        return {
            "input": source.normal(shape["N"], shape["C"]),
            "target": source.classes(shape["N"], shape["C"]),
        }

    def bind(self, function: Callable[..., Any], tensors: Tensors, shape: Shape, exact: bool) -> Callable[[], Tensor]:
        return functools.partial(function, tensors["input"], tensors["target"])

    def _forward(self, shape: Shape, itemsize: int) -> tuple[int, int]:
        return shape["N"] * shape["C"] * itemsize + 8 * shape["N"], 0

    def _backward(self, shape: Shape, itemsize: int) -> tuple[int, int]:
        return 2 * shape["N"] * shape["C"] * itemsize + 8 * shape["N"], 0


class ConvStage(Operator):
    """Two 3x3 convolutions, each with batch norm (training) and ReLU, then 2x2 max pooling: a stage of the network.

    Providers' functions take (input, layers, pool), a layer being (weight, bn_weight, bn_bias, running_mean,
    running_var).
    """

    name = function = "conv_stage"
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

    def _outer(self, shape: Shape, itemsize: int) -> tuple[int, int, int]:
        """Bytes of the input, of the pooled output and of the weights."""
        n, size = shape["N"], shape["H"] * shape["W"]
        weights = 9 * (shape["C"] + shape["K"]) * shape["K"]
        pooled = n * shape["K"] * (shape["H"] // 2) * (shape["W"] // 2)
        return n * shape["C"] * size * itemsize, pooled * itemsize, weights * itemsize

    def _forward(self, shape: Shape, itemsize: int) -> tuple[int, int]:
        flops = sum(OPERATORS["conv2d"].work(layer, "fwd", itemsize)[1] for layer in self._convolutions(shape))
        return sum(self._outer(shape, itemsize)), flops

    def _backward(self, shape: Shape, itemsize: int) -> tuple[int, int]:
        images, pooled, weights = self._outer(shape, itemsize)
        flops = sum(OPERATORS["conv2d"].work(layer, "bwd", itemsize)[1] for layer in self._convolutions(shape))
        return pooled + 2 * (images + weights), flops


class Cnn(Operator):
    """The CIFAR classifier in training mode with its loss: 'full' is a training step without the optimizer."""

    name = function = "cnn"
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
        work = [part.work(s, "fwd", itemsize) for part, s in self._parts(shape)]
        return sum(b for b, _ in work), sum(f for _, f in work)

    def _backward(self, shape: Shape, itemsize: int) -> tuple[int, int]:
        work = [part.work(s, "bwd", itemsize) for part, s in self._parts(shape)]
        # the image's gradient is not asked for
        first = shapes.NAMED["cnn"]["conv2d"][0]
        image_bytes, image_flops = shape["N"] * first["C"] * first["H"] * first["W"] * itemsize, work[0][1] // 2
        return sum(b for b, _ in work) - image_bytes, sum(f for _, f in work) - image_flops


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
