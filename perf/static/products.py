"""The products of whole networks, a row a layer and pass: what the compiler made of them, how long they take by
estimate (perf/static/model.py), how long a vendor's library would, and whose the backend 'auto' takes. Or the products
that a run of perf gpu timed, estimated beside measured.

Weights are packed once a step, whoever multiplies: that is left out. Kernels that finish a split product count.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from perf import operators, schema
from perf.options import Refused
from perf.schema import Sizes, number, text
from perf.shapes import NAMED, Shape, conv
from perf.shapes import linear as linear_shape
from perf.static import aot, model, ttir
from perf.static.aot import Launch
from perf.static.cases import BATCH, attention, conv_stage, linear, matmul
from perf.static.cases import conv as conv2d
from perf.static.cases.networks import geometry
from perf.static.facts import Facts
from perf.static.model import Estimate
from tkernels.core import mode, targets
from tkernels.core.targets import Target
from tkernels.ops.conv import routing
from tkernels.ops.conv_stage import config as stage_tuning
from tkernels.ops.linear import routing as matrix_routing

DTYPE = torch.bfloat16
PASSES = ("fwd", "dgrad", "wgrad")
# Operators that a run of perf gpu times and that are a product each.
TIMED = ("conv2d", "linear", "linear_relu", "matmul", "attention")
# Milliseconds from which launches no longer decide.
SHORT_MS = 0.05


class Layer(NamedTuple):
    """A layer, how often a network has it, and its passes. ``operator``: conv_stage, whose layer it is, else a name of
    perf/operators.py. ``inside``: it follows another layer of its stage, through whose batch norm its input's gradient
    goes on, and which it may normalise as it loads it."""

    operator: str
    shape: Shape
    times: int = 1
    passes: tuple[str, ...] = PASSES
    inside: bool = False
    activation: str | None = None
    dropout: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product(Sizes):
    """A pass of a layer on a target: of several kernels the product's own says tile to waves."""

    network: str = text("whose layer it is; empty for one that a run of perf gpu timed")
    operator: str = text("conv_stage (a layer of one), or the operator it is alone")
    mode: str = text("fwd, dgrad: the input's gradient, wgrad: the weight's, bwd: all gradients")
    times: int | None = number("how often the network has the layer")
    target: str = text("the GPU compiled for")
    kernel: str = text("the product's kernel")
    tile: str = text("rows x columns of the product's tile")
    num_warps: int | None = number("warps of a program")
    registers: int | None = number("a thread")
    resident: int | None = number("programs that a multiprocessor holds at once, by registers and shared memory")
    fit: int | None = number("programs that the target holds at once")
    programs: int | None = number("size of the grid")
    waves: float | None = number("programs over those that fit")
    l2_bytes_clock: float | None = number("bytes a clock of a multiprocessor that operands need of L2 at the peak rate")
    estimated_ms: float | None = number("milliseconds of ours by perf/static/model.py, all kernels; once, not times")
    vendor_ms: float | None = number("a vendor's library: 60% of the peak rate or 90% of the bandwidth, the longer")
    computed_by: str = text("ours or vendor: whose product the backend 'auto' takes")
    measured_ms: float | None = number("ours in the run compared with")
    vendor_measured_ms: float | None = number("PyTorch's in the run compared with")
    status: str = text("ok, or what the compiler said")


def networks() -> dict[str, list[Layer]]:
    """The layers with products of the networks known, batch 256: FusedCNNClassifier's, and fuse(resnet50)'s."""
    cnn, features = NAMED["cnn"]["conv2d"], NAMED["cnn"]["linear"]
    found = [Layer("conv_stage", shape, inside=i in (1, 3)) for i, shape in enumerate(cnn)]
    found += [Layer("linear", shape, activation="relu", dropout=0.5) for shape in features[:-1]]
    found.append(Layer("linear", features[-1]))
    residual = [Layer("conv_stage", shape, times, inside=inside) for (shape, inside), times in resnet50(BATCH)]
    residual.append(Layer("linear", linear_shape(BATCH, 2048, 1000)))
    return {name: [_first(layers[0]), *layers[1:]] for name, layers in (("cnn", found), ("resnet50", residual))}


def _first(layer: Layer) -> Layer:
    """Nobody asks for the image's gradient."""
    return layer._replace(passes=("fwd", "wgrad"))


def resnet50(images: int) -> list[tuple[tuple[Shape, bool], int]]:
    """Its distinct convolutions at 224x224, whether they follow another of their residual block, and how often each
    stands in it. A block is a stage, its shortcut too."""
    found, channels, before = [(conv(images, 3, 224, 64, 7, 2), False)], 64, 56
    for width, size, blocks in ((64, 56, 3), (128, 28, 4), (256, 14, 6), (512, 7, 3)):
        for block in range(blocks):
            stride = before // size
            found += [(conv(images, channels, before, width, 1), False),
                      (conv(images, width, before, width, 3, stride), True),
                      (conv(images, width, size, 4 * width, 1), True)]  # fmt: skip
            if block == 0:
                found.append((conv(images, channels, before, 4 * width, 1, stride), False))
            channels, before = 4 * width, size
    return [(layer, found.count(layer)) for i, layer in enumerate(found) if layer not in found[:i]]


def chosen(layer: Layer, step: str, target: Target) -> str:
    """Whose product a layer's pass takes under backend 'auto', 'ours' or 'vendor'. Only here choosers are asked;
    attention has none."""
    if layer.operator == "attention":
        return "ours"
    if layer.operator not in ("conv2d", "conv_stage"):
        return _chosen_of_matrices(layer, step, target)
    asked = geometry(layer.shape), layer.shape["N"], DTYPE, mode.dot_precision(DTYPE, "conv")
    if layer.operator == "conv2d":
        # a bias and no activation, as it is timed
        route = routing.of_conv(*asked, False, True, step != "fwd", target)
    else:
        route = routing.of_stage(*asked, True, target)
    theirs = dict(zip(PASSES, route))
    return "vendor" if theirs[step] else "ours"


def _chosen_of_matrices(layer: Layer, step: str, target: Target) -> str:
    sizes = layer.shape["N"], layer.shape["K"], layer.shape["C"]
    asked = DTYPE, mode.dot_precision(DTYPE, "matmul")
    if layer.operator == "matmul":
        return "vendor" if matrix_routing.of_matmul(*sizes, *asked, target) else "ours"
    fused = layer.activation is not None or layer.dropout > 0
    route = matrix_routing.of_linear(*sizes, *asked, fused, target)
    theirs = dict(zip(PASSES, route)) | {"bwd": route.dgrad and route.wgrad}
    return "vendor" if theirs[step] else "ours"


def make(layer: Layer, step: str) -> None:
    """The launches of a layer's pass."""
    shape = layer.shape
    if layer.operator == "attention":
        sizes = (shape["N"], shape["K"], shape["K"], shape["H"], shape["W"], shape["C"])
        for name in ("forward",) if step == "fwd" else ("delta", "dq", "dkv"):
            attention.call(name, sizes, "", DTYPE)
    elif layer.operator == "matmul":
        n, c, k = shape["N"], shape["C"], shape["K"]
        # forward's operands, and of each gradient
        for a, b, transposed in (
            [((n, c), (c, k), "")] if step == "fwd" else [((n, k), (k, c), "b"), ((c, n), (n, k), "a")]
        ):
            matmul.product(a, b, transposed, DTYPE)
    elif layer.operator.startswith("linear"):
        gradients = [linear.dgrad] * (step != "wgrad") + [linear.wgrad] * (step != "dgrad")
        for run in [linear.forward] if step == "fwd" else gradients:
            run(shape["C"], shape["K"], layer.activation, layer.dropout, DTYPE, batch=shape["N"])
    else:
        _convolve(layer, step)


def _convolve(layer: Layer, step: str) -> None:
    g, normed = geometry(layer.shape), layer.operator == "conv_stage"
    target, precision = targets.current(), mode.dot_precision(DTYPE, "conv")
    if step == "dgrad":
        (conv_stage if layer.inside else conv2d).dgrad(g, DTYPE)
    elif layer.inside and stage_tuning.applies_in_prologue(g, DTYPE, target):
        (conv_stage.pointwise_forward if step == "fwd" else conv_stage.pointwise_wgrad)(g, DTYPE)
    elif step == "fwd":
        if normed:
            conv_stage.forward(g, DTYPE, True)
        else:
            conv2d.forward(g, DTYPE, None)
    elif normed and "dgrad" not in layer.passes and stage_tuning.normalizes_in_wgrad(g, DTYPE, precision, target):
        conv_stage.wgrad(g, DTYPE)
    else:
        conv2d.wgrad(g, DTYPE, bias=False)


def product(layer: Layer, step: str, target: Target, network: str = "") -> Product:
    """The row of a layer's pass."""
    name = "conv2d" if layer.operator.startswith("conv_") else layer.operator
    shape = operators.get(name).complete(layer.shape)
    moved, operations = operators.get(name).work(shape, step, DTYPE.itemsize)
    row = Product(
        network=network, operator=layer.operator, mode=step, times=layer.times, target=target.name,
        vendor_ms=round(model.vendor(operations, moved, target), 5), computed_by=chosen(layer, step, target),
    ).having(**shape)  # fmt: skip
    try:
        with aot.recording(target.name) as launches:
            make(layer, step)
        made = [inspected(launch, target) for launch in launches if "pack" not in launch.kernel.__name__]
    except Exception as error:  # a row of the report
        return row.having(status=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    launch, facts, estimate = max(made, key=lambda each: each[2].operations)
    times = [each.milliseconds for _, _, each in made if each.milliseconds is not None]
    return row.having(
        kernel=facts.kernel, num_warps=facts.num_warps, registers=facts.registers, **columns(facts, estimate),
        estimated_ms=round(sum(times), 5) if times else None, programs=math.prod(launch.grid), status="ok",
    )  # fmt: skip


def inspected(launch: Launch, target: Target) -> tuple[Launch, Facts, Estimate]:
    """A launch compiled and estimated. Raises what the compiler raises."""
    facts = aot.compile_launch(launch, target.name)
    work = ttir.products(facts.ttir, launch.arguments, launch.grid)
    return launch, facts, model.estimate(launch, facts, work, target)


def columns(facts: Facts, estimate: Estimate) -> dict[str, Any]:
    """What rows of launches and of products share."""
    l2 = estimate.l2_bytes_clock
    return {
        "tile": "x".join(map(str, ttir.tile(facts.ttir))) if facts.has_dot else "",
        "resident": estimate.resident,
        "fit": estimate.fit,
        "waves": round(estimate.waves, 3),
        "l2_bytes_clock": None if l2 is None else round(l2, 1),
    }


def of_network(name: str, target_name: str) -> list[Product]:
    """Rows of a network on a target."""
    target = targets.TARGETS[target_name]
    return [product(layer, step, target, name) for layer in networks()[name] for step in layer.passes]


def of_run(path: Path, target: Target) -> list[Product]:
    """Rows of what a run of perf gpu timed: bf16 products, images in batches of 256, replayed from a CUDA graph with
    the cache cleared. Raises Refused where there is none."""
    frame = schema.read(path)
    frame = frame[(frame.timing == "cudagraph") & (frame.status == "ok") & (frame.dtype == "bf16")]
    frame = frame[frame.operator.isin(TIMED) & frame.layout.isin(("", "nhwc"))]
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for timed in schema.records(frame):
        if timed["operator"] != "conv2d" or timed["N"] == BATCH:
            key = schema.key(timed, ("operator", "mode", *schema.SHAPE_COLUMNS))
            found.setdefault(key, timed).update({timed["provider"]: timed["ms_p50"]})
    rows = [_timed(timed, target) for timed in found.values() if "tkernels" in timed and "torch" in timed]
    if not rows:
        raise Refused(f"{path} has no product that was timed in a CUDA graph, ours and PyTorch's")
    return rows


def _timed(timed: dict[str, Any], target: Target) -> Product:
    operator = timed["operator"]
    shape = {name: int(timed[name]) for name in schema.SHAPE_COLUMNS if not schema.is_empty(timed[name])}
    layer = Layer(operator, shape, activation="relu" if operator == "linear_relu" else None)
    row = product(layer, timed["mode"], target).having(
        times=None, measured_ms=timed["tkernels"], vendor_measured_ms=timed["torch"]
    )
    if row.estimated_ms is None:
        return row
    return row.having(estimated_ms=round(row.estimated_ms + model.REPLAY_US / 1e3, 5))


# Columns that are printed, and how they are headed.
SHOWN = {
    "operator": "operator", "layer": "layer", "mode": "pass", "times": "times", "tile": "tile", "num_warps": "warps",
    "registers": "regs", "resident": "fit/SM", "fit": "fit", "programs": "grid", "waves": "waves",
    "l2_bytes_clock": "L2 B/clk", "estimated_ms": "ours~", "vendor_ms": "vendor~", "computed_by": "auto",
}  # fmt: skip
# The same where there are measurements; a ratio is estimated over measured.
COMPARED = {
    "operator": "operator", "layer": "layer", "mode": "pass", "tile": "tile", "waves": "waves", "estimated_ms": "ours~",
    "measured_ms": "measured", "ours": "ratio", "vendor_ms": "vendor~", "vendor_measured_ms": "measured",
    "vendor": "ratio",
}  # fmt: skip


def print_networks(rows: Sequence[Product]) -> None:
    """A table a network and target, and its totals."""
    frame = _labelled(rows)
    for (target, network), part in frame.groupby(["target", "network"], sort=False):
        shown = part[list(SHOWN)].rename(columns=SHOWN)
        if target not in model.MODELLED:
            shown = shown.drop(columns=["L2 B/clk", "ours~"])
        print(f"\n{network}: products of a training step on {target}, {BATCH} images, bf16 NHWC; ms   (~ estimated)")
        print(schema.as_text(shown.round(4).round({"waves": 2}), index=False))
        print(f"\n{network}: estimated ms a step on {target}, products alone\n{schema.as_text(totals(part))}")
    _print_failed(rows)


def totals(frame: pd.DataFrame) -> pd.DataFrame:
    """Milliseconds of all products of a step by pass: ours, the vendor's, and of each what 'auto' takes."""
    ours, vendor = frame.estimated_ms * frame.times, frame.vendor_ms * frame.times
    summed = pd.DataFrame({"ours": ours, "vendor": vendor, "auto": ours.where(frame.computed_by == "ours", vendor)})
    by_pass = summed.groupby(frame["mode"]).sum(min_count=1).reindex(PASSES)
    by_pass.loc["all"] = by_pass.sum(min_count=1)
    products = frame.times.groupby(frame["mode"]).sum()
    by_pass["products"] = [*products.reindex(PASSES), products.sum()]
    of_ours = frame.times[frame.computed_by == "ours"].groupby(frame["mode"]).sum().reindex(PASSES, fill_value=0)
    by_pass["ours under auto"] = [*of_ours, of_ours.sum()]
    return by_pass.round(3).rename_axis("pass")


def print_run(rows: Sequence[Product], path: Path) -> None:
    """Estimates beside measurements, and how far they are apart."""
    frame = _labelled(rows)
    frame["ours"] = (frame.estimated_ms / frame.measured_ms).round(2)
    frame["vendor"] = (frame.vendor_ms / frame.vendor_measured_ms).round(2)
    print(f"{path}: ms estimated (~) of the kernels as they are now, measured then, and one over the other")
    print(schema.as_text(frame[list(COMPARED)].round(4).round({"waves": 2}).rename(columns=COMPARED), index=False))
    print(
        "\nproducts, and of their ratios the geometric mean and the spread (standard deviation, a factor); the vendor's"
    )
    print(f"where it took at least {SHORT_MS * 1e3:.0f} us\n{schema.as_text(spread(frame))}")
    _print_failed(rows)


def spread(frame: pd.DataFrame) -> pd.DataFrame:
    """Of ratios, by operator; the vendor's only where it took SHORT_MS or longer: launches are not in its estimate."""
    groups = {
        **dict(list(frame.groupby("operator", sort=False))),
        "all but attention": frame[frame.operator != "attention"],
    }
    found: dict[str, dict[str, Any]] = {}
    for name, part in groups.items():
        long = part[part.vendor_measured_ms >= SHORT_MS]
        found[str(name)] = {
            column: value for who, ratios in (("ours", part.ours), ("vendor", long.vendor))
            for column, value in zip((who, f"{who} mean", f"{who} spread"), (len(ratios), *geometric(ratios)))
        }  # fmt: skip
    return pd.DataFrame(found).T.astype({"ours": int, "vendor": int}).round(2)


def geometric(ratios: Iterable[float]) -> tuple[float, float]:
    """Geometric mean, and standard deviation as a factor."""
    logs = [math.log(ratio) for ratio in ratios]
    if not logs:
        return math.nan, math.nan
    return math.exp(statistics.fmean(logs)), math.exp(statistics.pstdev(logs))


def _labelled(rows: Sequence[Product]) -> pd.DataFrame:
    frame = schema.frame_of(Product, rows)
    return frame.assign(layer=[schema.shape_label(row) for row in schema.records(frame)])


def _print_failed(rows: Sequence[Product]) -> None:
    for row in rows:
        if row.status != "ok":
            print(f"{row.operator}, {schema.shape_label(vars(row))}, {row.mode}, {row.target}: {row.status}")
