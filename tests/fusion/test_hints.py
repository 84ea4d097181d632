"""What fuse() says is its user's to do: each hint where it is true and not where it is not, at no cost later on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import tkernels
from tests.fusion.cases import cnn
from tkernels.core import _torch, hardware, mode, targets
from tkernels.fusion import hints
from tkernels.fusion.hints import Hints

pytestmark = [pytest.mark.gate("torch"), pytest.mark.filterwarnings("ignore:tkernels.fuse. a call of")]

LAST = torch.channels_last
X86 = {"avx512_bf16": True, "amx_tile": True}


@pytest.fixture
def features(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bool]]:
    """What the CPU has, which a test may change before it fuses; none of it at first."""
    found: dict[str, bool] = {}
    monkeypatch.setattr(_torch, "cpu_features", lambda: found)
    hardware.cpu_instructions.cache_clear()
    mode.log_once.cache_clear()
    yield found
    hardware.cpu_instructions.cache_clear()


def kinds(model: nn.Module, x: Tensor) -> list[str]:
    """Which hints a first call gives."""
    with torch.no_grad():
        return [hint.split(":")[0] for hint in tkernels.explain(model.eval(), x).hints]


def large(model: nn.Module) -> tuple[nn.Module, Tensor]:
    """A model of images and a batch whose maps are worth a pass."""
    return model, torch.randn(32, 3, 96, 96)


@pytest.mark.usefixtures("features")
def test_layout() -> None:
    model, x = large(cnn())
    assert kinds(model, x) == ["layout"]
    assert kinds(model, x.to(memory_format=LAST)) == [], "convolutions take the input's layout"
    assert kinds(model.to(memory_format=LAST), x) == [], "or the weights'"
    ambiguous = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Conv2d(1, 8, 3), nn.ReLU())
    assert kinds(ambiguous, x) == ["layout"], "a map of one channel is in both layouts"
    (said,) = tkernels.explain(cnn().eval(), x).hints
    assert "convolutions (2)" in said
    assert "model.to(memory_format=torch.channels_last), and its input" in said


@pytest.mark.usefixtures("features")
@pytest.mark.parametrize(
    ("model", "shape"),
    (
        (nn.Sequential(nn.Linear(64, 64), nn.ReLU()), (512, 64)),
        (nn.Sequential(nn.Conv1d(4, 64, 3), nn.BatchNorm1d(64), nn.ReLU()), (64, 4, 512)),
        (nn.Sequential(nn.Conv2d(3, 64, 8), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8)), (64, 3, 8, 8)),
        (nn.Sequential(nn.Conv2d(3, 1, 3), nn.ReLU()), (64, 3, 128, 128)),
    ),
    ids=("no convolutions", "of signals", "maps of a pixel", "maps of a channel"),
)
def test_layouts_that_are_none(model: nn.Module, shape: tuple[int, ...]) -> None:
    assert "layout" not in kinds(model, torch.randn(shape))


def test_precision(features: dict[str, bool]) -> None:
    model, x = large(cnn().to(memory_format=LAST))
    assert kinds(model, x) == [], "a CPU without the instructions"
    for name in X86:
        features.clear()
        features[name] = True
        hardware.cpu_instructions.cache_clear()
        assert kinds(model, x) == ["precision"]
    with torch.autocast("cpu", torch.bfloat16):
        assert kinds(model, x) == [], "it is on"
    assert kinds(model.bfloat16(), x.bfloat16()) == []
    assert kinds(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.randn(512, 64)) == [], "too few operations"
    assert kinds(nn.Sequential(nn.Linear(512, 512), nn.ReLU()), torch.randn(512, 512)) == ["precision"]
    assert kinds(nn.Sequential(nn.Linear(512, 512), nn.ReLU()).double(), torch.randn(512, 512).double()) == []


def test_a_dtype_without_instructions(features: dict[str, bool], caplog: pytest.LogCaptureFixture) -> None:
    """The log says it too, once for the process."""
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.randn(512, 64)
    said_by_log = lambda: [record for record in caplog.records if record.name == "tkernels"]  # noqa: E731
    assert kinds(model, x) == []
    assert not said_by_log()
    features["avx512_bf16"] = True
    hardware.cpu_instructions.cache_clear()
    for _ in range(2):
        with torch.autocast("cpu", torch.float16):
            (said,) = tkernels.explain(model, x).hints
    assert said.startswith("dtype: this CPU has no float16 instructions (AVX512-FP16, AMX-FP16, Arm's FP16)")
    assert said.endswith("take bfloat16, for which it has some")
    (record,) = said_by_log()
    assert (record.levelno, f"dtype: {record.getMessage()}") == (logging.WARNING, said)
    features["avx512_fp16"] = True
    hardware.cpu_instructions.cache_clear()
    with torch.autocast("cpu", torch.float16):
        assert kinds(model, x) == []


@pytest.mark.usefixtures("features")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_why_slow(dtype: torch.dtype, features: dict[str, bool]) -> None:
    assert "take float32" in str(hardware.why_slow(dtype, "cpu"))
    for plain in (torch.float32, torch.float64, torch.int64):
        assert hardware.why_slow(plain, "cpu") is None
    assert hardware.why_slow(dtype, "meta") is None
    first = {torch.bfloat16: 80, torch.float16: 70}[dtype]
    for arch, slow in ((first - 5, True), (first, False), ("gfx942", False)):
        with targets.pretend(targets.of_arch(arch)):
            assert (hardware.why_slow(dtype, torch.device("cuda:0")) is not None) == slow
    with targets.pretend(targets.of_arch(75)):
        assert str(hardware.why_slow(torch.bfloat16, "cuda")).endswith("take float32 or float16")


@pytest.mark.usefixtures("features")
def test_size() -> None:
    model, x = large(cnn().to(memory_format=LAST))
    assert kinds(model, x) == []
    (said,) = tkernels.explain(model, x[:1]).hints
    assert said.startswith("size: its largest map has 0.28 MB, and on a CPU fused passes pay from about 2 MB on")
    assert kinds(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.randn(2, 64)) == [], "no maps"


def _graph(
    device: str, dtype: torch.dtype, x: Sequence[int], weight: Sequence[int], function: object
) -> fx.GraphModule:
    """What Dynamo makes of one product, on a device that need not be there."""
    graph = fx.Graph()
    with FakeTensorMode():
        values = [torch.empty(tuple(shape), dtype=dtype, device=device) for shape in (x, weight)]
        nodes = [graph.placeholder(name) for name in ("x", "weight")]
        product = graph.call_function(function, tuple(nodes))  # type: ignore[arg-type]
        values.append(function(*values))  # type: ignore[operator]
    for node, value in zip((*nodes, product), values):
        node.meta["example_value"] = value
    graph.output(product)
    return fx.GraphModule({}, graph)


@pytest.mark.parametrize(
    ("arch", "width", "dtype", "want"),
    (
        (90, 256, torch.float32, ["size"]),
        (90, 4096, torch.float32, ["precision"]),
        (90, 4096, torch.bfloat16, []),
        (75, 4096, torch.float32, []),
        (75, 4096, torch.bfloat16, ["dtype"]),
        ("gfx942", 4096, torch.float32, ["precision"]),
    ),
)
def test_on_a_gpu(arch: int | str, width: int, dtype: torch.dtype, want: list[str]) -> None:
    gpu = targets.of_arch(arch)
    with targets.pretend(gpu):
        seen = Hints()
        seen.look(_graph("cuda", dtype, (4096, width), (width, width), torch.nn.functional.linear))
        lines = seen.lines()
    assert [line.split(":")[0] for line in lines] == want
    if want == ["size"]:
        seconds = 2 * 4096 * width * width / (gpu.tflops_fp32 * 1e12)
        assert f"an estimated {1e3 * seconds:.2g} ms of this GPU" in lines[0]


def test_another_device_has_no_hints() -> None:
    seen = Hints()
    seen.look(_graph("meta", torch.float32, (512, 512), (512, 512), torch.nn.functional.linear))
    assert seen.lines() == []


@pytest.mark.usefixtures("features")
def test_what_one_graph_of_several_does_not_bear_out() -> None:
    """A call of one image, in the layout that is slow, behind one of a batch that is as it should be."""
    model, x = large(cnn().eval())
    tkernels.fuse(model)
    with torch.no_grad():
        model(x[:1])
        assert [hint.split(":")[0] for hint in tkernels.explain(model).hints] == ["layout", "size"]
        model(x.to(memory_format=LAST))
        assert tkernels.explain(model).hints == []


@pytest.mark.usefixtures("features")
def test_later_calls_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    for name in ("look", "lines"):
        given = getattr(Hints, name)
        monkeypatch.setattr(Hints, name, lambda *args, name=name, given=given: counted.append(name) or given(*args))
    asked = hardware.why_slow
    monkeypatch.setattr(hints.hardware, "why_slow", lambda *args: counted.append("why_slow") or asked(*args))
    model, x = tkernels.fuse(cnn().eval()), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model(x)
        assert counted[:1] == ["look"]
        assert counted.count("look") == counted.count("lines") == 1
        first = list(counted)
        for _ in range(5):
            model(x)
        assert counted == first
        model(x.double().float()[:, :, :4])  # compiled once more, and looked at
    assert counted.count("look") == 2


@pytest.mark.usefixtures("features")
def test_the_report_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    model = tkernels.fuse(cnn().eval(), report=True)
    with torch.no_grad():
        model(torch.randn(2, 3, 8, 8))
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("yours to do: 2")
    assert lines[at + 1].startswith("  layout: ")
    assert lines[at + 2].startswith("  size: ")
    assert any(line.startswith("left as it was") for line in lines[:at])
    report = tkernels.explain(model)
    report.hints = []
    assert "yours" not in str(report)


def test_sizes_that_follow_from_values() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.layer(x[x[:, 0] > 0]))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        model = tkernels.fuse(Masked())
        x = torch.randn(16, 8)
        torch.testing.assert_close(model(x), torch.relu(model.layer(x[x[:, 0] > 0])))


@pytest.mark.usefixtures("features")
def test_sizes_of_maps_alone() -> None:
    """fuse() takes no convolutions over sequences or volumes: their sizes are no reason."""
    for conv, shape in ((nn.Conv1d, (2, 3, 16)), (nn.Conv3d, (2, 3, 4, 4, 4))):
        assert "size" not in kinds(nn.Sequential(conv(3, 8, 3), nn.ReLU()), torch.randn(shape))
    assert kinds(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.randn(2, 3, 8, 8).to(memory_format=LAST)) == [
        "size"
    ]
