"""Products of networks: the model of their times on cases computed by hand, and a row a layer and pass."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from perf import schema, shapes
from perf.schema import Measurement
from perf.static import aot, model, products, rules
from perf.static.cases import linear
from perf.static.facts import Facts
from perf.static.products import Layer, Product
from tests.perf.command import refused, run
from tkernels.core.records import OURS, Route
from tkernels.core.targets import TARGETS
from tkernels.ops.conv import routing

pytestmark = pytest.mark.gate("aot")

H100 = TARGETS["sm_90"]
# a 128x128 tile in steps of 64, with a second map beside the right operand, and loads outside of the loop
TTIR = """
  tt.func public @product(%a: !tt.ptr<bf16> loc("a"(#loc))) attributes {noinline = false} {
    %bias = tt.load %b_ptrs : tensor<128x!tt.ptr<f32>> loc(#loc1)
    %acc = scf.for %step = %c0 to %steps step %c1 iter_args(%sum = %zero) -> (tensor<128x128xf32>)  : i32 {
      %x = tt.load %x_ptrs, %x_mask, %none : tensor<128x64x!tt.ptr<bf16>> loc(#loc2)
      %y = tt.load %y_ptrs evictionPolicy = evict_last : tensor<64x128x!tt.ptr<bf16>> loc(#loc3)
      %saved = scf.if %has_saved -> (tensor<64x128xbf16>) {
        %loaded = tt.load %saved_ptrs : tensor<64x128x!tt.ptr<bf16>> loc(#loc4)
        scf.yield %loaded : tensor<64x128xbf16> loc(#loc4)
      } else {
        scf.yield %y : tensor<64x128xbf16> loc(#loc4)
      } loc(#loc4)
      %next = tt.dot %x, %z, %sum : tensor<128x64xbf16> * tensor<64x128xbf16> -> tensor<128x128xf32> loc(#loc5)
      scf.yield %next : tensor<128x128xf32> loc(#loc5)
    } loc(#loc5)
    %others = scf.for %i = %c0 to %n step %c1 iter_args(%s = %acc) -> (tensor<128x128xf32>)  : i32 {
      %more = tt.load %more_ptrs : tensor<128x128x!tt.ptr<f32>> loc(#loc6)
      scf.yield %more : tensor<128x128xf32> loc(#loc6)
    } loc(#loc6)
    tt.return loc(#loc7)
  } loc(#loc7)
"""
STEP_BYTES, STEP_OPERATIONS = 3 * 128 * 64 * 2, 2 * 128 * 128 * 64


def _facts(**given: Any) -> Facts:
    """Of a kernel of 8 warps and 100 registers, two of whose programs a multiprocessor holds."""
    base = Facts("product", "sm_90", 8, 100, 0, 0, "HGMMA", 8, 12, 0, 8, 0, 0, None, TTIR)
    return dataclasses.replace(base, **given)


def _launch(programs: int, moved: int = 0) -> aot.Launch:
    return aot.Launch(linear.kernels.linear_forward_kernel, (), {}, (programs, 1, 1), {"x": moved})


def test_operands_are_what_the_loop_of_the_product_loads() -> None:
    assert model.loops(TTIR) == (STEP_BYTES, STEP_OPERATIONS, 1)


def test_second_maps_are_loaded_too() -> None:
    """A ReLU's gradient reads its output beside the gradient: 64 rows more, of 64 columns, on the product's right."""
    seen = []
    for activation in (None, "relu"):
        with aot.recording("sm_90") as launches:
            linear.dgrad(4096, 4096, activation, 0.0, torch.bfloat16, batch=4096)
        (launch,) = launches
        blocks = [launch.arguments[f"BLOCK_{axis}"] for axis in "MKN"]
        seen.append((model.loops(aot.compile_launch(launch, "sm_90").ttir), *blocks))
    (plain, m, k, n), (masked, m2, k2, n2) = seen
    assert plain == ((m + k) * n * 2, 2 * m * k * n, 1)
    assert masked == ((2 * m2 + k2) * n2 * 2, 2 * m2 * k2 * n2, 1)


def test_programs_that_fit() -> None:
    # of 65,536 registers 8 warps with 104 each take 26,624; 96 KiB and one more go twice into 228
    assert rules.resident(100, 0, 8, H100) == 2
    assert rules.resident(32, 96 * 1024, 8, H100) == 2
    assert rules.resident(182, 96 * 1024, 8, H100) == 1


@pytest.mark.parametrize("programs, at_once", ((1, 1), (132, 1), (133, 2), (264, 2), (265, 3), (396, 3), (528, 4)))
def test_waves(programs: int, at_once: int) -> None:
    """Two a multiprocessor run at the same time, each at half the speed; the busiest decides."""
    clocks = model.busy(programs, 2, 132, programs * 5.0, 0, 0)
    assert clocks == pytest.approx(at_once * 5)


def test_a_time_by_hand() -> None:
    """264 programs of 64 steps, all at once: 64 * 49,152 bytes each at 30 a clock, two a multiprocessor."""
    operations = 264 * 64 * STEP_OPERATIONS
    found = model.estimate(_launch(264), _facts(), {"16-bit": operations}, H100)
    assert found[:3] == (2, 264, 1.0)
    # 49,152 bytes a step, in which the tensor cores do 2,097,152 operations: 512 clocks
    assert found.l2_bytes_clock == pytest.approx(96)
    clock = 989e12 / 132 / 4096
    program = 64 * 49152 / 30 / clock
    assert found.milliseconds == pytest.approx((2 * program + 2e-6 + 1e-6) * 1e3)
    # a last program waits for a wave of its own
    more = model.estimate(_launch(265), _facts(), {"16-bit": operations / 264 * 265}, H100)
    assert more.milliseconds == pytest.approx((3 * program + 2e-6 + 2e-6) * 1e3)


def test_what_takes_longest_decides() -> None:
    work = {"16-bit": 264.0 * STEP_OPERATIONS}
    clock = 989e12 / 132 / 4096

    def milliseconds(moved: int = 0, kind: str = "16-bit", **facts: Any) -> float:
        found = model.estimate(_launch(264, moved), _facts(**facts), {kind: work["16-bit"]}, H100).milliseconds
        assert found is not None
        return found - 3e-3

    assert milliseconds() == pytest.approx(2 * 49152 / 30 / clock * 1e3)
    # 3 GB at 90% of 3.35 TB/s
    assert milliseconds(moved=3_000_000_000) == pytest.approx(3000 / 3015)
    # 16 elements a thread of 256, at 1.2 a clock
    assert milliseconds(loop_narrow_loads=16) == pytest.approx(2 * 16 * 256 / 1.2 / clock * 1e3)
    # without tensor cores: 66.9e12 operations a second
    assert milliseconds(kind="ieee") == pytest.approx(264 * STEP_OPERATIONS / 66.9e12 * 1e3)


def test_other_targets_have_no_time() -> None:
    found = model.estimate(_launch(264), _facts(), {"16-bit": 1e9}, TARGETS["sm_80"])
    assert (found.l2_bytes_clock, found.milliseconds) == (None, None)
    assert found.fit == found.resident * 108


def test_the_vendor_is_at_60_percent_or_bound_by_memory() -> None:
    assert model.vendor(989e9, 0, H100) == pytest.approx(1 / 0.6)
    assert model.vendor(989e6, 3_350_000_000, H100) == pytest.approx(1 / 0.9)


def _torchvision_resnet50() -> collections.Counter[tuple[int, ...]]:
    torchvision = pytest.importorskip("torchvision", reason="install the train extra")
    found: collections.Counter[tuple[int, ...]] = collections.Counter()
    with torch.device("meta"):
        network = torchvision.models.resnet50()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(
                lambda layer, inputs, output: found.update(
                    [(layer.in_channels, inputs[0].shape[2], layer.out_channels, layer.kernel_size[0], layer.stride[0])]
                )
            )
    network(torch.empty(1, 3, 224, 224, device="meta"))
    return found


def test_resnet50_has_its_layers() -> None:
    layers = products.resnet50(64)
    in_table = shapes.NAMED["resnet50"]["conv2d"]
    assert {tuple(shape.items()) for (shape, _), _ in layers} == {tuple(shape.items()) for shape in in_table}
    assert sum(times for _, times in layers) == 53
    # the second and third of 16 blocks
    assert sum(times for (_, inside), times in layers if inside) == 32
    listed: collections.Counter[tuple[int, ...]] = collections.Counter()
    for (shape, _), times in layers:
        listed[tuple(shape[name] for name in ("C", "H", "K", "R", "stride"))] += times
    assert listed == _torchvision_resnet50()


@pytest.mark.parametrize("network", products.networks())
def test_every_product_has_an_estimate_and_a_chooser(network: str) -> None:
    rows = products.of_network(network, "sm_90")
    assert len(rows) == {"cnn": 23, "resnet50": 74}[network]
    for row in rows:
        assert row.status == "ok"
        assert row.computed_by in ("ours", "vendor")
        for value in (row.estimated_ms, row.vendor_ms, row.registers, row.fit, row.waves, row.l2_bytes_clock):
            assert value is not None
            assert 0 < value < math.inf
        assert row.tile


def test_the_chooser_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(route: Route) -> Callable[..., Route]:
        return lambda g, images, *_: route if (g.out_channels, images) == (32, 256) else OURS

    monkeypatch.setattr(routing, "of_conv", answers(Route(forward=True)))
    monkeypatch.setattr(routing, "of_stage", answers(Route(dgrad=True)))
    shape = shapes.conv(256, 64, 56, 32)

    def of(operator: str, shape: shapes.Shape = shape) -> list[str]:
        return [products.chosen(Layer(operator, shape), step, H100) for step in products.PASSES]

    assert of("conv2d") == ["vendor", "ours", "ours"]
    assert of("conv_stage") == ["ours", "vendor", "ours"]
    assert of("conv_stage", shapes.conv(64, 64, 56, 32)) == ["ours"] * 3
    assert of("linear", shapes.linear(256, 64, 32)) == ["ours"] * 3


def test_totals_by_hand() -> None:
    def row(mode: str, times: int, ours: float, vendor: float, by: str) -> Product:
        return Product(mode=mode, times=times, estimated_ms=ours, vendor_ms=vendor, computed_by=by)

    rows = [row("fwd", 3, 0.5, 0.25, "vendor"), row("fwd", 1, 0.125, 0.25, "ours"), row("wgrad", 2, 1.0, 0.5, "ours")]
    found = products.totals(schema.frame_of(Product, rows))
    assert found.loc["fwd"].tolist() == [1.625, 1.0, 0.875, 4, 1]
    assert found.loc["wgrad"].tolist() == [2.0, 1.0, 2.0, 2, 2]
    assert found.loc["all"].tolist() == [3.625, 2.0, 2.875, 6, 3]


def test_a_geometric_mean_and_its_spread() -> None:
    assert products.geometric([0.5, 2.0]) == (pytest.approx(1.0), pytest.approx(2.0))
    assert all(map(math.isnan, products.geometric([])))


def test_the_command_lists_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.csv"
    assert run("static", "--network", "cnn", "--target", "sm_90", "--csv", path) == 0
    frame = pd.read_csv(path)
    assert tuple(frame.columns) == Product.names()
    printed = capsys.readouterr().out
    assert "256x64x16x16→64 3x3" in printed
    total = (frame.estimated_ms * frame.times).sum().round(3)
    assert f"\nall {total:8}" in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_the_command_compares_with_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def timed(provider: str, milliseconds: float, **given: Any) -> Measurement:
        shape = {"N": 256, "C": 2048, "K": 256}
        row = Measurement(operator="linear", mode="dgrad", dtype="bf16", provider=provider, timing="cudagraph",
                          ms_p50=milliseconds, status="ok", **shape)  # fmt: skip
        return row.having(**given)

    path, csv = tmp_path / "timings.csv", tmp_path / "p.csv"
    rows = [timed("tkernels", 0.008), timed("torch", 0.1), timed("tkernels", 9.0, dtype="fp32")]
    schema.write(schema.frame_of(Measurement, rows), path)
    assert run("static", "--measured", path, "--csv", csv) == 0
    (row,) = pd.read_csv(csv).itertuples()
    assert (row.measured_ms, row.vendor_measured_ms) == (0.008, 0.1)
    assert row.estimated_ms == pytest.approx(products.product(
        Layer("linear", shapes.linear(256, 2048, 256)), "dgrad", H100).estimated_ms + 0.004)  # fmt: skip
    assert "all but attention" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    (
        (["--network", "lenet"], "unknown network 'lenet', allowed: cnn, resnet50"),
        (["--network", "cnn", "--op", "conv"], "--op and --case choose among kernels"),
        (["--measured", "t.csv", "--network", "cnn"], "--network and --measured choose different products"),
        (["--measured", "t.csv", "--target", "sm_80"], "unknown target of the model 'sm_80', allowed: sm_90"),
        (["--measured", "there-is-none.csv"], "there-is-none.csv does not exist"),
    ),
)
def test_bad_input_is_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in refused(capsys, "static", *arguments)
