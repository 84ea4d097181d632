"""The meter of a training step: what it counts, and that the fused network gets no worse."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from perf.static import meter, traffic
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
    assert found["0", "backward", "convolution_backward"] == output + image + 2 * 3 * 8 * 2
    # the image and the ReLU's output; the weight is a parameter
    assert (counted.saved["0"], counted.saved["1"]) == (image, output)
    assert not counted.launches


def test_the_fused_network_takes_triton_and_moves_less(steps: dict[str, meter.Step]) -> None:
    plain, fused = steps["torch"], steps["tkernels"]
    assert not plain.launches
    assert fused.launches
    assert all(call.workspace == 0 for call in plain.calls)
    # 3,735 KB an image for plain PyTorch
    assert 3.6e6 < plain.total() / 256 < 3.9e6
    # bounds of what was reached: a change that moves more, launches more or saves more must say so here
    assert fused.total() <= 0.55 * plain.total()
    assert sum(call.workspace for call in fused.calls) <= 0.06 * plain.total()
    assert sum(fused.saved.values()) <= 0.62 * sum(plain.saved.values())
    assert len(fused.launches) <= 60
    assert fused.alive <= 25e6
    assert len(traffic.specialisations(fused, TARGET)) <= 45


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


@pytest.mark.parametrize(
    "arguments, message",
    (
        (["--batch", "1"], "--batch must be at least 2"),
        (["--last-batch", "0"], "--last-batch must be at least 2"),
        (["--target", "sm_70"], "unknown target 'sm_70', allowed: sm_80"),
        (["--csv", "."], "is a directory"),
    ),
)
def test_bad_input_is_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in refused(capsys, "traffic", *arguments)
