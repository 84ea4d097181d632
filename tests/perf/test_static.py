"""The compiler's report: operations read off the listing, estimates by formula, and the command."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch

from perf.static import aot, rules, ttir
from perf.static import report as static
from perf.static.cases import attention, conv, linear
from tests.perf.command import refused, run
from tkernels.core.targets import TARGETS
from tkernels.ops.attention import config as tuning

pytestmark = pytest.mark.gate("aot")


def _operations(case: aot.Case, kernel: str) -> float:
    with aot.recording("sm_80") as launches:
        case.run()
    (launch,) = (made for made in launches if made.kernel.__name__ == kernel)
    facts = aot.compile_launch(launch, "sm_80")
    return sum(ttir.products(facts.ttir, launch.arguments, launch.grid).values())


def _case(cases: list[aot.Case], name: str) -> aot.Case:
    return next(case for case in cases if case.name == name)


@pytest.mark.parametrize(
    "case, kernel, expected",
    (
        ("conv forward 64-64@16 bf16", "conv_forward_kernel", 2 * 256 * 16 * 16 * 64 * 64 * 9),
        ("conv dgrad stride 2 64-64@16 bf16", "conv_dgrad_kernel", 2 * 256 * 8 * 8 * 64 * 64 * 9),
        # split over programs: the last share is smaller
        ("conv wgrad 64-64@16 bf16", "conv_wgrad_kernel", 2 * 256 * 16 * 16 * 64 * 64 * 9),
        ("forward 2048->256 relu bf16", "linear_forward_kernel", 2 * 256 * 2048 * 256),
    ),
)
def test_operations_are_read_off_the_listing(case: str, kernel: str, expected: int) -> None:
    cases = conv.cases() if case.startswith("conv") else linear.cases()
    assert _operations(_case(cases, case), kernel) == pytest.approx(expected, rel=0.1)


def test_choosers_are_asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan of the call before is run again, and nobody asks a fake tensor where it lies."""
    run = functools.partial(attention.call, "forward", (2, 4, 4, 64, 64, 32), "causal", torch.bfloat16)
    warps, chosen = [], tuning.forward
    for n in (4, 8):
        monkeypatch.setattr(tuning, "forward", lambda *args, n=n: dataclasses.replace(chosen(*args), num_warps=n))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with aot.recording("sm_80") as launches:
                run()
        warps.append(launches[-1].kwargs["num_warps"])
    assert warps == [4, 8]


def test_estimates_by_formula() -> None:
    target = TARGETS["sm_90"]
    # 64 registers a thread of 128 threads: 8,192 of 65,536
    assert rules.occupancy(64, 0, 4, target) == 8 * 4 / 64
    assert rules.occupancy(32, 100 * 1024, 4, target) == 2 * 4 / 64
    assert rules.occupancy(16, 0, 1, target) == 32 / 64
    assert static.estimate(3_350_000, {}, target) == (pytest.approx(1.0), "bytes")
    assert static.estimate(1, {"16-bit": 989e6}, target) == (pytest.approx(1.0), "flops")
    assert static.estimate(1, {"tf32": 989e6 / 2, "ieee": 66.9e6}, target) == (pytest.approx(2.0), "flops")


def test_the_command_reports_every_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.csv"
    chosen = ["--op", "linear", "--target", "sm_80", "gfx942", "--case", "forward 256->128 relu bf16"]
    assert run("static", *chosen, "--csv", path) == 0
    frame = pd.read_csv(path)
    assert tuple(frame.columns) == static.Compiled.names()
    assert set(frame.target) == {"sm_80", "gfx942"}
    assert set(frame.status) == {"ok"}
    assert (frame.spill_bytes == 0).all()
    assert (frame.shared_bytes <= frame.shared_limit).all()
    products = frame[frame.tensor_core.notna()]
    assert set(products.tensor_core) == {"HMMA", "v_mfma"}
    assert (products.flops > 0).all()
    assert (products.estimate_us > 0).all()
    assert frame.occupancy_estimate.between(0.01, 1).all()
    assert "0 failed, 0 with complaints" in capsys.readouterr().out


def test_hopper_has_columns_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    chosen = ["--op", "linear", "--target", "sm_80", "sm_90", "--case", "dgrad 256->128 relu bf16"]
    assert run("static", *chosen, "--csv", path) == 0
    frame = pd.read_csv(path).set_index("target")
    columns = ["wgmma_from_registers", "wgmma_in_flight", "wgmma_overwrites"]
    assert frame.loc["sm_80", columns].isna().all()
    assert frame.loc["sm_90", "tensor_core"] == "HGMMA"
    # the gradient is computed on the way to the product, of which it is the right operand
    assert frame.loc["sm_90", columns].tolist() == [0, 0, 0]
    assert frame.wgmma_serialised.isna().all()


@pytest.mark.parametrize(
    "arguments, message",
    (
        (["--op", "softmax"], "unknown operator 'softmax', allowed: attention"),
        (["--target", "sm_70"], "unknown target 'sm_70', allowed: sm_80"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--csv", "."], "is a directory"),
        (["--op", "linear", "--target", "sm_80", "--case", "no such case"], "no case of linear has a name with"),
    ),
)
def test_bad_input_is_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in refused(capsys, "static", *arguments)
