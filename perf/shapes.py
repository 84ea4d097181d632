"""Shapes to measure: named lists from real networks, CSV files, and single shapes as 'N=256 C=32 ...'."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from perf import schema
from perf.options import Refused

Shape = dict[str, int]
# family of operators -> shapes
Shapes = dict[str, list[Shape]]


def conv(n: int, c: int, size: int, k: int, window: int = 3, stride: int = 1) -> Shape:
    """A square convolution padded to keep the image's size at stride 1."""
    return {"N": n, "C": c, "H": size, "W": size, "K": k, "R": window, "S": window, "stride": stride,
            "padding": window // 2, "groups": 1}  # fmt: skip


def image(n: int, c: int, size: int) -> Shape:
    return {"N": n, "C": c, "H": size, "W": size}


def linear(n: int, c: int, k: int) -> Shape:
    return {"N": n, "C": c, "K": k}


def rows(n: int, c: int) -> Shape:
    return {"N": n, "C": c}


def _cnn(n: int) -> Shapes:
    layers = ((3, 32, 32), (32, 32, 32), (32, 16, 64), (64, 16, 64), (64, 8, 128))
    maps = ((32, 32), (64, 16), (128, 8))
    features = ((2048, 256), (256, 128), (128, 10))
    stages = ((3, 32, 32), (32, 16, 64))
    return {
        "conv2d": [conv(n, c, size, k) for c, size, k in layers],
        "batch_norm": [image(n, c, size) for c, size in maps],
        "linear": [linear(n, c, k) for c, k in features],
        "matmul": [linear(n, c, k) for c, k in features],
        # of AttentionCNN
        "attention": [heads(n, 4, 16, 16, 32)],
        "cross_entropy": [rows(n, 10)],
        "conv_stage": [{**image(n, c, size), "K": k} for c, size, k in stages],
        "cnn": [{"N": n}],
    }


def _resnet(n: int, bottleneck: bool) -> Shapes:
    """The distinct layers of ResNet-18 or, with bottlenecks, ResNet-50, at 224x224."""
    convs, maps = [conv(n, 3, 224, 64, 7, 2)], [(64, 112)]
    channels = 64
    for stage, (width, size) in enumerate(((64, 56), (128, 28), (256, 14), (512, 7))):
        stride, before = (1, size) if stage == 0 else (2, 2 * size)
        out = 4 * width if bottleneck else width
        if bottleneck:
            convs += [conv(n, channels, before, width, 1), conv(n, width, before, width, 3, stride),
                      conv(n, width, size, out, 1), conv(n, out, size, width, 1)]  # fmt: skip
            maps += [(width, before), (width, size), (out, size)]
        else:
            convs.append(conv(n, channels, before, width, 3, stride))
            maps.append((width, size))
        convs.append(conv(n, width, size, width))
        if channels != out:
            convs.append(conv(n, channels, before, out, 1, stride))
        channels = out
    return {
        "conv2d": distinct(convs),
        "batch_norm": distinct([image(n, c, size) for c, size in maps]),
        "linear": [linear(n, channels, 1000)],
        "cross_entropy": [rows(n, 1000)],
        "conv_stage": [{**image(n, 64, 56), "K": 64}],
    }


def _vgg(n: int) -> Shapes:
    layers = ((3, 224, 64), (64, 224, 64), (64, 112, 128), (128, 112, 128), (128, 56, 256), (256, 56, 256),
              (256, 28, 512), (512, 28, 512), (512, 14, 512))  # fmt: skip
    return {
        "conv2d": [conv(n, c, size, k) for c, size, k in layers],
        "batch_norm": distinct([image(n, k, size) for _, size, k in layers]),
        "linear": [linear(n, c, k) for c, k in ((25088, 4096), (4096, 4096), (4096, 1000))],
        "cross_entropy": [rows(n, 1000)],
        "conv_stage": [{**image(n, c, size), "K": k} for c, size, k in ((3, 224, 64), (64, 112, 128))],
    }


def _mobilenet(n: int) -> Shapes:
    """Layers of MobileNetV2 at 224x224 whose channels fit no tile: 24 and 40 wide, depthwise ones among them."""
    pointwise = ((24, 56, 144), (144, 56, 24), (40, 28, 240), (240, 28, 40))
    return {
        "conv2d": [conv(n, 3, 224, 32, 3, 2), *(conv(n, c, size, k, 1) for c, size, k in pointwise),
                   *({**conv(n, c, size, c, 3, stride), "groups": c}
                     for c, size, stride in ((144, 56, 1), (144, 56, 2), (240, 28, 1)))],
        "batch_norm": [image(n, c, size) for c, size in ((24, 56), (144, 56), (40, 28), (240, 28))],
        "linear": [linear(n, 1280, 1000)],
        "cross_entropy": [rows(n, 1000)],
        "conv_stage": [{**image(n, 24, 56), "K": 40}],
    }  # fmt: skip


def heads(n: int, count: int, queries: int, keys: int, head: int) -> Shape:
    """Attention's sizes."""
    return {"N": n, "K": count, "H": queries, "W": keys, "C": head}


def _transformer() -> Shapes:
    """GPT-2's and a ViT-B's layers, a decoding step, and the CNN's last map under attention."""
    return {
        "matmul": [*(linear(n, c, k) for n in (1, 4096) for c, k in ((768, 2304), (768, 3072), (3072, 768))),
                   {**linear(1024, 64, 1024), "groups": 96}, linear(64, 65536, 64)],
        "attention": [heads(8, 12, 1024, 1024, 64), heads(64, 12, 197, 197, 64), heads(2, 32, 2048, 2048, 128),
                      heads(64, 12, 1, 1024, 64), heads(256, 4, 16, 16, 32)],
        "linear": [linear(4096, c, k) for c, k in ((768, 2304), (768, 3072), (3072, 768))],
    }  # fmt: skip


def _spread() -> Shapes:
    """From calls of microseconds, where Python counts, to tens of milliseconds, where memory does."""
    grouped = {**conv(64, 144, 28, 144), "groups": 144}
    return {
        "linear": [linear(8, 32, 16), linear(64, 784, 128), linear(256, 128, 10), linear(256, 256, 128),
                   linear(256, 2048, 256), linear(1024, 768, 3072), linear(4096, 256, 1024), linear(65536, 32, 64),
                   linear(65536, 64, 256)],
        "batch_norm": [image(2, 8, 9), image(32, 16, 8), image(256, 256, 1), image(8, 64, 28), image(256, 128, 8),
                       image(64, 256, 14), image(256, 32, 32), image(64, 64, 56)],
        "conv2d": [conv(2, 8, 9, 16), conv(1, 64, 56, 64), conv(256, 3, 32, 32), conv(256, 32, 32, 32),
                   conv(256, 64, 8, 128), conv(64, 64, 56, 64, 1), conv(32, 64, 28, 128, 3, 2), grouped],
        "cross_entropy": [rows(8, 10), rows(256, 10), rows(256, 1000), rows(8192, 10), rows(1024, 1000),
                          rows(4096, 1000), rows(512, 32000), rows(1024, 50257)],
    }  # fmt: skip


def distinct(shapes: Iterable[Shape]) -> list[Shape]:
    """The shapes without repetitions, in order."""
    return list({tuple(sorted(shape.items())): shape for shape in shapes}.values())


NAMED: dict[str, Shapes] = {
    "cnn": _cnn(256),
    "resnet18": _resnet(64, bottleneck=False),
    "resnet50": _resnet(64, bottleneck=True),
    "mobilenet": _mobilenet(64),
    "vgg": _vgg(32),
    "mlp": {"linear": [linear(n, c, k) for n in (256, 4096) for c, k in ((4096, 4096), (4096, 16384), (16384, 4096))]},
    "transformer": _transformer(),
    "vocab": {"cross_entropy": [rows(4096, c) for c in (32000, 50257, 128256, 256000)]},
    "spread": _spread(),
    # for trying things out: a moment on any CPU
    "tiny": {
        "conv2d": [conv(2, 8, 9, 16)],
        "batch_norm": [image(2, 8, 9)],
        "linear": [linear(8, 32, 16)],
        "cross_entropy": [rows(8, 10)],
        "matmul": [linear(8, 32, 16)],
        "attention": [heads(2, 2, 9, 11, 16)],
        "conv_stage": [{**image(2, 4, 8), "K": 8}],
        "cnn": [{"N": 4}],
    },
}


def parse(texts: Iterable[str]) -> list[Shapes | Shape]:
    """What --shapes was given: named lists, CSV files, 'N=256 C=32 ...'. Raises Refused for anything else."""
    found: list[Shapes | Shape] = []
    for text in texts:
        if text in NAMED:
            found.append(NAMED[text])
        elif "=" in text:
            found.append(_single(text))
        elif text.endswith(".csv"):
            found.append(_from_csv(Path(text)))
        else:
            raise Refused(
                f"unknown shapes {text!r}, allowed: {', '.join(NAMED)}, a FILE.csv, or sizes such as 'N=256 C=32 K=64'"
            )
    return found


def _single(text: str) -> Shape:
    shape: Shape = {}
    for part in text.split():
        name, equals, value = part.partition("=")
        if not equals or name not in schema.SHAPE_COLUMNS or not value.isdigit():
            raise Refused(
                f"shape {text!r}: {part!r} is not NAME=NUMBER with NAME one of {', '.join(schema.SHAPE_COLUMNS)}"
            )
        shape[name] = int(value)
    return shape


def _from_csv(path: Path) -> Shapes:
    """Shapes by operator; the key '' holds those of rows that name none."""
    frame = schema.table(path)
    columns = tuple(column for column in schema.SHAPE if column.name in frame.columns)
    if not columns:
        raise Refused(f"{path} has none of the columns {', '.join(schema.SHAPE_COLUMNS)}")
    frame = schema.typed(frame, columns, path)
    found: Shapes = {}
    for record in schema.records(frame):
        shape = {c.name: int(record[c.name]) for c in columns if pd.notna(record[c.name])}
        found.setdefault(str(record.get("operator", "")), []).append(shape)
    return found
