"""What single operators move: attention no matrix of queries by keys, forward, backward or saved."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

import tkernels
from models.cifar_cnn import AttentionCNN
from perf import plan
from perf.static import meter, operator_traffic, traffic
from tests.perf.command import refused, run
from tkernels.functional import scaled_dot_product_attention

pytestmark = pytest.mark.gate("torch")

TARGET = "sm_90"
N, HEADS, HEAD, BYTES = 2, 4, 64, 2


def count(length: int, provider: str = "tkernels") -> meter.Step:
    shape = {"N": N, "K": HEADS, "H": length, "W": length, "C": HEAD}
    return operator_traffic.count(
        plan.Task("attention", "full", "bf16", "", tuple(shape.items()), provider, "wall"), TARGET
    )


def moved(step: meter.Step, phase: str) -> int:
    return sum(call.bytes + call.workspace for call in step.calls if call.phase == phase)


@pytest.mark.parametrize("length", (256, 1024))
def test_attention_moves_what_it_is_given_and_gives(length: int) -> None:
    """To the byte: no tensor is larger than an operand, and no operand is read by more than three launches."""
    counted = count(length)
    assert all(call.kind == "triton" for call in counted.calls)
    operand = N * HEADS * length * HEAD * BYTES
    vector = N * HEADS * length * 4  # a float32 number a query: LSE, delta
    assert moved(counted, "forward") == 4 * operand + vector
    # delta: o, do; dq: q, k, v, do, dq; dk and dv: q, k, v, do, dk, dv; each of the latter two LSE and delta
    assert moved(counted, "backward") == 13 * operand + 5 * vector
    assert sum(counted.saved.values()) == 4 * operand + vector
    assert moved(counted, "backward") < 1.7 * 8 * operand


@pytest.mark.parametrize("options", ({}, {"is_causal": True}, {"dropout_p": 0.1}, {"attn_mask": True}), ids=str)
def test_twice_the_length_is_twice_the_bytes(options: dict[str, object]) -> None:
    """With a mask too, which is one for all heads and broadcast over the queries."""

    def count(length: int) -> meter.Step:
        def make() -> tuple[object, list[Tensor]]:
            q, k, v = (torch.empty(N, HEADS, length, HEAD, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
            mask = {"attn_mask": torch.ones(1, length, dtype=torch.bool)} if "attn_mask" in options else {}
            return lambda: scaled_dot_product_attention(q, k, v, **{**options, **mask}), [q, k, v]

        with tkernels.backend("triton"):
            return meter.one_call(make, TARGET)

    short, long = count(256), count(512)
    assert len(short.launches) == len(long.launches) == 4
    for phase in ("forward", "backward"):
        assert moved(long, phase) == pytest.approx(2 * moved(short, phase), rel=1e-3)
    assert sum(long.saved.values()) == pytest.approx(2 * sum(short.saved.values()), rel=1e-3)


def test_the_meter_sees_a_matrix_of_scores() -> None:
    """Attention spelled out moves and saves four times the bytes at twice the length, nearly."""

    def count(length: int) -> meter.Step:
        def make() -> tuple[object, list[Tensor]]:
            q, k, v = (torch.empty(N, HEADS, length, HEAD, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
            return lambda: torch.softmax(q @ k.mT, -1) @ v, [q, k, v]

        return meter.one_call(make, TARGET)

    short, long = count(512), count(1024)
    for phase in ("forward", "backward"):
        assert moved(long, phase) > 3 * moved(short, phase)
    assert sum(long.saved.values()) > 3 * sum(short.saved.values())


def test_grouped_heads_are_not_repeated() -> None:
    def make() -> tuple[object, list[Tensor]]:
        shapes = ((N, 8, 256, HEAD), (N, 2, 256, HEAD), (N, 2, 256, HEAD))
        q, k, v = (torch.empty(shape, dtype=torch.bfloat16).requires_grad_() for shape in shapes)
        return lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True), [q, k, v]

    with tkernels.backend("triton"):
        counted = meter.one_call(make, TARGET)
    heads = N * 256 * HEAD * BYTES
    assert moved(counted, "forward") == (2 * 8 + 2 * 2) * heads + N * 8 * 256 * 4


def test_the_network_with_attention() -> None:
    """Its attention has a row of its own, forward and backward; a smaller last batch compiles nothing."""

    def build() -> tuple[torch.nn.Module, torch.nn.Module]:
        return AttentionCNN(), tkernels.nn.CrossEntropyLoss()

    full, last = (traffic.step(build, batch, TARGET) for batch in (16, 5))
    for phase in ("forward", "backward"):
        names = [c.name for c in full.calls if (c.layer, c.phase, c.kind) == ("attention", phase, "triton")]
        kernel = "attention_forward_kernel" if phase == "forward" else "attention_dq_kernel"
        assert names.count(kernel) == 1
        assert "linear_forward_kernel" in names or phase == "backward"
    assert not traffic.added_specialisations(full, last, TARGET)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.csv"
    shapes = "N=4 K=2 H=64 W=96 C=32", "N=64 C=32 K=16"
    assert run("traffic", "--op", "attention", "matmul", "--shapes", *shapes, "--dtype", "fp32", "--csv", path) == 0
    frame = pd.read_csv(path)
    assert tuple(frame.columns) == operator_traffic.OperatorTraffic.names()
    assert set(frame.operator) == {"attention", "matmul"}
    assert len(frame) == 8
    ours = frame[frame.provider == "tkernels"]
    assert (ours.launches > 0).all()
    assert (frame[frame.provider == "torch"].launches == 0).all()
    # eager attention and both products move no less than the least; ours reads what float32's dk and dv both need once
    # for each of them
    assert (frame.bytes >= frame.least_bytes).all()
    assert (ours.bytes < 2.2 * ours.least_bytes).all()
    printed = capsys.readouterr().out
    assert "of least backward" in printed
    assert "tkernels" in printed


@pytest.mark.parametrize(
    "arguments, message",
    (
        (["--op", "cnn"], "unknown operator 'cnn', allowed: linear"),
        (["--op", "attention", "--dtype", "fp8"], "unknown dtype 'fp8', allowed: bf16"),
        (["--op", "attention", "--shapes", "N=4 C=2 K=3"], "lacks H, W"),
        (["--shapes", "cnn"], "--shapes goes with --op"),
        (["--dtype", "bf16"], "--dtype goes with --op"),
    ),
)
def test_bad_input_is_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in refused(capsys, "traffic", *arguments)
