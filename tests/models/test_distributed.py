"""Several Gloo processes: gradients, statistics and accuracy of one, a single writer; and processes that die."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tkernels.nn as tnn
from models import checkpoint, data, distributed, train
from models.cifar_cnn import CNNClassifier, FusedCNNClassifier
from models.history import History
from tests.models import processes

pytestmark = [pytest.mark.gate("torch"), pytest.mark.usefixtures("no_pictures")]

ROOT = Path(__file__).parents[2]
BATCH = 6
SMALL: dict[str, Any] = {"num_classes": 5, "width": 4, "image_size": 8, "dropout2d": 0.0, "dropout": 0.0}


@pytest.fixture(scope="module", autouse=True)
def _inherited() -> None:
    """Children inherit what is imported."""
    data.load("digits", Path(), 0)


def _stepped(network: type[nn.Module], model_of: Any, rank: int, size: int) -> dict[str, Tensor]:
    """Gradients and buffers after two batches of float64, this process having its share of each."""
    torch.manual_seed(0)
    model = network(**SMALL).double()
    wrapped = model_of(model)
    for i in range(2):
        random = torch.Generator().manual_seed(i)
        images = torch.randn(BATCH, 3, 8, 8, generator=random, dtype=torch.float64)[rank::size]
        target = torch.randint(5, (BATCH,), generator=random)[rank::size]
        model.zero_grad()
        nn.functional.cross_entropy(wrapped(images), target).backward()
    found = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return {name: t.detach().clone() for name, t in (found | dict(model.named_buffers())).items() if t is not None}


def _synchronised(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(tnn.SyncBatchNorm.convert_sync_batchnorm(model))


@pytest.mark.parametrize("size", [2, 3])
def test_processes_do_what_one_does(size: int, tmp_path: Path) -> None:
    def body(rank: int) -> Any:
        return [_stepped(network, _synchronised, rank, size) for network in (FusedCNNClassifier, CNNClassifier)]

    found = processes.run_job(size, body, tmp_path / "job")
    expected = _stepped(CNNClassifier, lambda model: model, 0, 1)
    for rank in found:
        for result in rank:
            assert result.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(
                    result[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
                )


ARGUMENTS = shlex.split("--device cpu --data digits --width 8 --image-size 8 --batch-size 32 --lr 0.003")


def _trained(size: int, out: Path, directory: Path, *arguments: str) -> str:
    """Trains in ``size`` forked processes; gives what they printed."""
    directory.mkdir()

    def body(rank: int) -> int:
        return train.main([*ARGUMENTS, "--out", str(out), *arguments])

    statuses = [processes.wait(pid) for pid in processes.start_job(size, body, directory)]
    printed = "".join((directory / f"rank{rank}.out").read_text() for rank in range(size))
    assert statuses == [0] * size, printed
    return printed


def test_two_processes_train_and_one_goes_on(tmp_path: Path) -> None:
    """One writes and prints; the job is resumed by another number of processes, and learns as one process does."""
    out = tmp_path / "out"
    printed = _trained(2, out, tmp_path / "two", "--epochs", "2")
    assert printed.count("epoch 2/2  ") == 1
    assert "(PyTorch, 2 processes)" in printed
    assert sorted(os.listdir(out)) == ["checkpoint.previous.pt", "checkpoint.pt", "history.csv"]
    state = checkpoint.load(out / "checkpoint.pt")
    assert len(state["processes"]) == 2
    assert not torch.equal(*(p["rng"]["cpu"] for p in state["processes"])), "each draws its own numbers"
    assert train.main([*ARGUMENTS, "--out", str(out), "--resume", "--epochs", "3"]) == 0
    assert len((out / "history.csv").read_text().splitlines()) == 4
    printed = _trained(3, out, tmp_path / "three", "--batch-size", "33", "--epochs", "4", "--resume")
    assert printed.count("goes on after epoch 3") == 1
    assert checkpoint.load(out / "checkpoint.pt")["epoch"] == 4


def test_without_synchronisation_processes_differ(tmp_path: Path) -> None:
    states = []
    for i, option in enumerate(["--sync-bn", "--no-sync-bn"]):
        _trained(
            2, tmp_path / f"out{i}", tmp_path / f"job{i}", "--epochs", "1", "--data", "digits", "--width", "2", option
        )
        states.append(checkpoint.load(tmp_path / f"out{i}" / "checkpoint.pt")["model_state_dict"])
    assert not torch.equal(*(s["stage1.bn1.running_var"] for s in states))


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_ends(signum: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed: the others say so and end. Told to stop, one of them is enough: all do, at the same step."""
    out, directory = tmp_path / "out", tmp_path / "job"
    directory.mkdir()
    original = History.add

    def add(self: History, row: Any) -> None:
        original(self, row)
        if row.epoch == 2 and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(History, "add", add)

    def body(rank: int) -> int:
        return train.main([*ARGUMENTS, "--out", str(out), "--epochs", "5", "--width", "4"])

    statuses = [processes.wait(pid) for pid in processes.start_job(2, body, directory)]
    printed = (directory / "rank0.out").read_text()
    epoch = checkpoint.load(out / "checkpoint.pt")["epoch"]
    if signum == signal.SIGKILL:
        assert statuses == [1, -signal.SIGKILL], printed
        assert "error: [process 0] another process of the job died or does not answer; --resume goes on from" in printed
        assert epoch in (1, 2)
    else:
        assert statuses == [128 + signal.SIGTERM] * 2, printed
        assert "stopped by SIGTERM after epoch 2" in printed
        assert epoch == 2
    monkeypatch.undo()
    monkeypatch.setattr(train, "_report", lambda *args: None)
    assert train.main([*ARGUMENTS, "--out", str(out), "--epochs", "3", "--width", "4", "--resume"]) == 0


def _torchrun(out: Path, *options: str, training: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    command += [
        "-m",
        "models.train",
        *ARGUMENTS,
        "--out",
        str(out),
        *training,
    ]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def _workers(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _kill_a_worker_after_the_first_epoch(job: subprocess.Popen[str], out: Path) -> None:
    end = time.monotonic() + 100
    while not (out / checkpoint.NAME).exists():
        assert time.monotonic() < end
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    os.kill(_workers(job.pid)[1], signal.SIGKILL)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds torchrun's workers in /proc")
@pytest.mark.extended("torch")
def test_torchrun_starts_a_dead_job_again(tmp_path: Path) -> None:
    """A worker is killed: with --max-restarts the job goes on from its checkpoint and ends with the same bits."""
    training = ("--epochs", "6")
    usual = _torchrun(tmp_path / "usual", training=training)
    printed = usual.communicate(timeout=200)[0]
    assert usual.returncode == 0, printed
    job = _torchrun(tmp_path / "out", "--max-restarts", "1", training=training)
    _kill_a_worker_after_the_first_epoch(job, tmp_path / "out")
    printed = job.communicate(timeout=200)[0]
    assert job.returncode == 0, printed
    assert "goes on after epoch" in printed
    states = [checkpoint.load(tmp_path / name / checkpoint.NAME)["model_state_dict"] for name in ("usual", "out")]
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())
    # and without restarts: it ends, says why, and can be resumed
    job = _torchrun(tmp_path / "dead", training=training)
    _kill_a_worker_after_the_first_epoch(job, tmp_path / "dead")
    printed = job.communicate(timeout=200)[0]
    assert job.returncode != 0
    assert checkpoint.load(tmp_path / "dead" / checkpoint.NAME)["epoch"] >= 1


@pytest.mark.extended("torch")
def test_two_processes_learn_as_much_as_one(tmp_path: Path) -> None:
    options = ("--epochs", "8", "--image-size", "16")
    _trained(2, tmp_path / "two", tmp_path / "job", *options)
    assert train.main([*ARGUMENTS, "--out", str(tmp_path / "one"), *options]) == 0
    two, one = (checkpoint.load(tmp_path / name / checkpoint.NAME)["val_acc"] for name in ("two", "one"))
    assert min(two, one) > 0.85
    assert abs(two - one) < 0.03


JOB = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("RANK", "x", "must be a whole number, from 0 to 0, got 'x'"),
        ("RANK", "1", "must be a whole number, from 0 to 0, got '1'"),
        ("RANK", "-1", "must be a whole number, from 0 to 0, got '-1'"),
        ("WORLD_SIZE", "two", "must be a whole number, 1 or more, got 'two'"),
        ("WORLD_SIZE", "0", "must be a whole number, 1 or more, got '0'"),
        ("WORLD_SIZE", "1_0", "must be a whole number, 1 or more, got '1_0'"),
        ("LOCAL_RANK", "1.5", "must be a whole number, 0 or more, got '1.5'"),
        ("TORCHELASTIC_RESTART_COUNT", "often", "must be a whole number, 0 or more, got 'often'"),
        ("MASTER_PORT", "http", "must be a whole number, from 0 to 65535, got 'http'"),
        ("MASTER_PORT", "65536", "must be a whole number, from 0 to 65535, got '65536'"),
        ("MASTER_PORT", "", "must be a whole number, from 0 to 65535, got nothing"),
        ("MASTER_ADDR", "", "must be the address of the first process, it is not set"),
    ],
)
def test_what_no_launcher_sets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str, message: str
) -> None:
    for variable, given in {**JOB, name: value}.items():
        monkeypatch.setenv(variable, given)
    with contextlib.suppress(SystemExit):
        assert train.main([*ARGUMENTS, "--epochs", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"python -m models.train: error: environment variable {name} {message}"


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"])
def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for variable in JOB:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "")
    distributed.check_environment()
    assert not distributed.launched()
    assert (distributed.wanted(), distributed.restarts(), distributed.local_rank()) == (1, 0, 0)
