"""What is measured: shapes, inputs, bytes and operations, and what must be refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from perf import operators, plan, providers, shapes
from perf.options import Refused
from perf.shapes import NAMED
from tests.perf.command import refused

pytestmark = pytest.mark.gate("torch")


@pytest.mark.parametrize("name", NAMED)
def test_named_shapes_are_complete(name: str) -> None:
    found = 0
    for operator in operators.OPERATORS.values():
        for shape in operator.of_named(NAMED[name]):
            full = operator.complete(shape)
            assert set(full) == set(operator.required + operator.optional)
            assert operator.quick(full)["N"] <= operators.QUICK_ROWS
            found += 1
    assert found


def test_resnets_have_their_layers() -> None:
    # 3x3 and 1x1 convolutions and the 7x7 stem, counted from the architecture
    assert len(NAMED["resnet18"]["conv2d"]) == 11
    assert len(NAMED["resnet50"]["conv2d"]) == 23
    assert NAMED["resnet50"]["linear"] == [{"N": 64, "C": 2048, "K": 1000}]


def test_work_of_a_convolution() -> None:
    conv = operators.get("conv2d")
    shape = conv.complete({"N": 2, "C": 4, "H": 9, "W": 7, "K": 6, "stride": 2, "groups": 2})
    outputs, window = 2 * 6 * 5 * 4, 2 * 9
    x, w = 2 * 4 * 9 * 7, 6 * window
    assert conv.work(shape, "fwd", 2) == ((x + w + 6 + outputs) * 2, 2 * outputs * window)
    assert conv.work(shape, "bwd", 2) == ((outputs + 2 * x + 2 * w + 6) * 2, 4 * outputs * window)
    both = [conv.work(shape, mode, 2) for mode in ("fwd", "bwd")]
    assert conv.work(shape, "full", 2) == tuple(map(sum, zip(*both)))


def test_work_of_the_network_is_that_of_its_layers() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from models.cifar_cnn import CNNClassifier

    model, loss = CNNClassifier(), torch.nn.CrossEntropyLoss()
    with FlopCounterMode(display=False) as counter:
        loss(model(torch.zeros(2, 3, 32, 32)), torch.zeros(2, dtype=torch.int64)).backward()
    cnn = operators.get("cnn")
    assert cnn.work({"N": 2}, "full", 4)[1] == counter.get_total_flops()


@pytest.mark.parametrize("name", operators.OPERATORS)
@pytest.mark.parametrize("layout", operators.LAYOUTS)
def test_inputs_are_the_same_for_all_and_lie_as_asked(name: str, layout: str) -> None:
    operator = operators.get(name)
    shape = operator.complete(operator.of_named(NAMED["tiny"])[0])
    one, two = (operator.tensors(shape, operators.Sources(torch.bfloat16, layout, "cpu")) for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    image = one.get("images", one.get("input"))
    if image is not None and image.dim() == 4:
        nhwc = layout == "nhwc"
        assert image.is_contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)


def test_every_operator_has_a_function_of_pytorch_and_of_tkernels() -> None:
    for name in (providers.BASELINE, "tkernels"):
        assert set(providers.load(name).functions) >= set(operators.OPERATORS)


def test_shapes_of_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("operator,N,C,K,H,W\nlinear,8,16,4,,\n,8,32,,,\nconv2d,2,4,8,5,5\n")
    (given,) = shapes.parse([str(path)])
    assert operators.get("linear").of_named(given) == [{"N": 8, "C": 16, "K": 4}]  # type: ignore[arg-type]
    assert operators.get("cross_entropy").of_named(given) == [{"N": 8, "C": 32}]  # type: ignore[arg-type]
    assert operators.get("batch_norm").of_named(given) == []  # type: ignore[arg-type]


def _tasks(names: list[str], *given: str) -> list[plan.Task]:
    modes, both = ["fwd", "full"], ["torch", "tkernels"]
    return plan.tasks(plan.Wanted(names, modes, ["fp32"], ["nhwc", "nchw"], shapes.parse(given), both, ["wall"]))


def test_a_plan_has_a_task_for_each_row() -> None:
    tasks = _tasks(["linear", "conv2d"], "tiny", "N=2 C=3 H=8 W=8 K=4")
    # two modes and two providers; a convolution in two layouts at two shapes, the second of which is none for linear
    assert len(tasks) == len({task.key() for task in tasks}) == 2 * 2 + 2 * 2 * 2 * 2
    # what shares a check stands together
    problems = [task.problem for task in tasks]
    assert all(problems.index(p) + problems.count(p) > i for i, p in enumerate(problems))


@pytest.mark.parametrize(
    "names, given, message",
    (
        (["linear"], "N=2 C=3", "lacks K; it takes N, C, K"),
        (["linear"], "N=2 C=3 K=4 H=5", "has H; it takes N, C, K"),
        (["linear"], "N=0 C=3 K=4", "N=0, at least 1"),
        (["conv2d"], "N=1 C=3 H=8 W=8 K=4 groups=2", "not multiples"),
        (["conv2d"], "N=1 C=3 H=2 W=2 K=4 R=7 padding=0", "larger than its padded image"),
        (["linear"], "N=2 C=x", "'C=x' is not NAME=NUMBER"),
        (["linear"], "N=2 Q=3", "'Q=3' is not NAME=NUMBER"),
        (["linear"], "imagenet", "unknown shapes 'imagenet', allowed: cnn, resnet18"),
        (["linear"], "no.csv", "no.csv does not exist"),
        (["cnn"], "vocab", "none of the shapes given is for operator 'cnn'"),
    ),
)
def test_bad_shapes_are_refused(names: list[str], given: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        _tasks(names, given)


@pytest.mark.parametrize(
    "arguments, message",
    (
        (["--op", "lineer"], "unknown operator 'lineer', allowed: linear"),
        (["--op", "linear", "--mode", "forward"], "unknown mode 'forward', allowed: fwd, bwd, full"),
        (["--op", "linear", "--dtype", "fp64"], "unknown dtype 'fp64', allowed: bf16, fp16, fp32"),
        (["--op", "linear", "--layout", "hwcn"], "unknown layout 'hwcn', allowed: nhwc, nchw"),
        (["--op", "linear", "--provider", "cudnn"], "unknown provider 'cudnn', allowed: tkernels, torch"),
        (["--op", "linear", "--provider", "module:no_such"], "is not installed"),
        (["--op", "linear", "--device", "tpu"], "unknown device 'tpu', allowed: cpu, cuda"),
        (["--op", "linear", "--device", "cuda:99"], "torch sees"),
        (["--op", "linear", "--resume"], "--resume needs the --csv"),
        (["--op", "linear", "--limit", "0"], "--limit must be above 0"),
        (["--op", "linear", "--csv", "."], "is a directory"),
        (["--op", "linear", "--csv", "/proc/nowhere/a.csv"], "cannot be"),
        (["--op", "linear", "--shapes", "resnet18", "N=4"], "a shape for linear lacks C, K"),
        (["--op", "linear", "--shapes", "none.csv"], "none.csv does not exist"),
        (["--op", "linear", "--shapes", "/"], "unknown shapes '/', allowed: cnn, resnet18"),
        (["--op", "linear", "--colour", "red"], "unrecognized arguments"),
        ([], "--op"),
    ),
)
def test_bad_sweeps_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    out = [] if "--csv" in arguments or "--resume" in arguments else ["--csv", "out/rows.csv"]
    assert message in refused(capsys, "sweep", *arguments, *out)
    assert not list(tmp_path.iterdir()), "a refused command writes nothing"


def test_what_is_there_is_not_overwritten(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("a,b\n1,2\nunfinished")
    sweep = ["sweep", "--op", "linear", "--shapes", "tiny", "--device", "cpu", "--csv", path]
    assert "exists: --resume goes on with it" in refused(capsys, *sweep)
    assert "does not begin with the header" in refused(capsys, *sweep, "--resume")
    assert path.read_text() == "a,b\n1,2\nunfinished"


def test_unknown_commands_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid choice: 'swoop'" in refused(capsys, "swoop")
    assert "COMMAND" in refused(capsys)
