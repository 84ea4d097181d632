"""The meter of a training step: what it counts, and that the fused network gets no worse."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from perf import schema
from perf.static import meter, traffic
from perf.static.model_traffic import ModelTraffic
from tests.perf.command import refused, run

pytestmark = pytest.mark.gate("torch")

TARGET = "sm_90"


@pytest.fixture(scope="module")
def steps() -> dict[str, meter.Step]:
    return {"torch": traffic.step(traffic.plain, 256, TARGET), "tkernels": traffic.step(traffic.fused, 256, TARGET)}


def test_bytes_of_a_small_network_counted_by_hand() -> None:
    class Pooled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3))

    def build() -> tuple[nn.Module, nn.Module]:
        return nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(), Pooled()), nn.CrossEntropyLoss()

    counted = traffic.step(build, 4, TARGET)
    image, output = 4 * 3 * 32 * 32 * 2, 4 * 8 * 32 * 32 * 2
    found = {(call.layer, call.phase, call.name): call.bytes for call in counted.calls}
    assert found["0", "forward", "convolution"] == image + 3 * 8 * 2 + output
    assert found["1", "forward", "relu"] == 2 * output
    assert found["1", "backward", "threshold_backward"] == 3 * output
    assert found["0", "backward", "convolution_backward"] == output + image + 3 * 8 * 2
    # the image and the ReLU's output; the weight is a parameter
    assert (counted.saved["0"], counted.saved["1"]) == (image, output)
    assert not counted.launches


def test_the_fused_network_takes_triton_and_moves_less(steps: dict[str, meter.Step]) -> None:
    plain, fused = steps["torch"], steps["tkernels"]
    assert not plain.launches
    assert fused.launches
    assert all(call.workspace == 0 for call in plain.calls)
    # 4,734 KB an image for plain PyTorch
    assert 4.6e6 < plain.total() / 256 < 4.9e6
    # bounds of what was reached: a change that moves more, launches more or saves more must say so here
    assert fused.total() <= 0.43 * plain.total()
    assert sum(call.workspace for call in fused.calls) <= 0.045 * plain.total()
    assert sum(fused.saved.values()) <= 0.62 * sum(plain.saved.values())
    assert len(fused.launches) <= 55
    assert fused.alive <= 25e6
    assert len(traffic.specialisations(fused, TARGET)) <= 45


def test_calls_of_several_kernels_count_each() -> None:
    """PyTorch's batch norm reads its map for the statistics and to normalise it; each gradient is a product."""

    def build() -> tuple[nn.Module, nn.Module]:
        layers = nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        return nn.Sequential(nn.Conv2d(3, 8, 1), *layers[:1], *layers[1:], nn.Flatten()), nn.CrossEntropyLoss()

    counted = traffic.step(build, 4, TARGET)
    pixels = 4 * 32 * 32 * 2
    small, wide, vector = 8 * pixels, 16 * pixels, 16 * 4
    found = {(call.layer, call.phase, call.name): call.bytes for call in counted.calls}
    assert found["2", "backward", "convolution_backward"] == 2 * (wide + small + 8 * 16 * 2)
    for phase, name, maps in (("forward", "native_batch_norm", 3), ("backward", "native_batch_norm_backward", 5)):
        # (and vectors of the channels)
        assert 0 <= found["3", phase, name] - maps * wide <= 8 * vector


def test_a_smaller_last_batch_compiles_nothing(steps: dict[str, meter.Step]) -> None:
    last = traffic.step(traffic.fused, 17, TARGET)
    assert not traffic.added_specialisations(steps["tkernels"], last, TARGET)


def test_forward_and_backward_go_to_their_layers(steps: dict[str, meter.Step]) -> None:
    for counted in steps.values():
        for phase in ("forward", "backward"):
            layers = {call.layer for call in counted.calls if call.phase == phase}
            assert {"loss", "classifier.fc1"} <= layers
            assert any(layer.startswith("stage1") for layer in layers)
        stray = sum(call.bytes for call in counted.calls if call.layer == meter.OTHER)
        assert stray < 0.01 * counted.total()


def test_nothing_of_the_pretence_stays() -> None:
    before = torch.nn.functional.dropout
    traffic.step(traffic.fused, 4, TARGET)
    assert torch.nn.functional.dropout is before
    assert not torch.zeros(1).is_cuda


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.csv"
    assert run("traffic", "--batch", "4", "--last-batch", "3", "--no-inductor", "--csv", path) == 0
    frame = pd.read_csv(path)
    assert tuple(frame.columns) == traffic.Traffic.names()
    for provider, rows in frame.groupby("provider"):
        whole = rows[rows.layer == traffic.STEP].iloc[0]
        parts = rows[rows.layer != traffic.STEP]
        assert whole.bytes == parts.bytes.sum(), provider
        assert whole.saved_bytes == parts.saved_bytes.sum()
    printed = capsys.readouterr().out
    assert "specialisations" in printed
    # what is printed by layer adds up to the step
    table = traffic.by_layer(frame[frame.layer != traffic.STEP], 4)
    whole = frame[frame.layer == traffic.STEP].set_index("provider")
    for provider in ("torch", "tkernels"):
        moved = table[provider][["forward KB/image", "backward KB/image"]].sum().sum()
        assert moved == pytest.approx(whole.bytes[provider] / 4e3, rel=1e-3)
        assert table[provider, "calls"].sum() == whole.launches[provider] + whole.aten_calls[provider]
    # a fused stage stands right behind the layers that it replaces
    assert list(table.index).index("stage1") + 1 == list(table.index).index("stage2.conv1")


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """What the command counts of it at batch 256."""
    pytest.importorskip("torchvision", reason="install the train extra")
    path = tmp_path_factory.mktemp("traffic") / "t.csv"
    assert run("traffic", "--model", "resnet50", "--csv", path) == 0
    return pd.read_csv(path)


def test_fused_resnet50_moves_less_than_anybody(resnet50: pd.DataFrame) -> None:
    """Its convolutions are PyTorch's, at their size; what is around them is ours."""
    assert tuple(resnet50.columns) == ModelTraffic.names()
    steps = resnet50[resnet50.call == schema.STEP].set_index("provider")
    eager, ours, compiled = steps.bytes["torch"], steps.bytes["tkernels"], steps.bytes["torch.compile"]
    assert ours <= 0.7 * eager
    assert ours <= 0.88 * compiled
    for provider, rows in resnet50.groupby("provider"):
        if provider != "torch.compile":
            assert rows[rows.call != schema.STEP].bytes.sum() == steps.bytes[provider]
    calls = resnet50[resnet50.provider == "tkernels"].groupby("call").calls.sum()
    assert calls["convolution"] == 52
    assert calls["convolution_backward"] == 105, "but the image's gradient"
    assert calls["conv_stage_kernel"] == 1, "the stem's forward"
    # 53 batch norms, 4 of them behind a shortcut, one before the pool
    assert calls["normalize_kernel"] == 48
    assert calls["add"] == 1, "of the stem's two readers alone: where blocks meet, gradients are added as they are read"


@pytest.mark.parametrize(
    "arguments, message",
    (
        (["--model", "resnet5o"], "torchvision has no model 'resnet5o', allowed are such as resnet50"),
        (["--model", "resnet50", "--op", "linear"], "--op does not go with --model"),
        (["--model", "resnet50", "--image-size", "0"], "--image-size 1, got 256 and 0"),
        (["--batch", "1"], "--batch must be at least 2"),
        (["--last-batch", "0"], "--last-batch must be at least 2"),
        (["--target", "sm_70"], "unknown target 'sm_70', allowed: sm_80"),
        (["--csv", "."], "is a directory"),
    ),
)
def test_bad_input_is_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in refused(capsys, "traffic", *arguments)
