"""A run of training: network, optimizer and where it stands; what it saves, and how it goes on from there."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tkernels
import tkernels.nn as tnn
from models import checkpoint, contents, distributed, engine, networks, recipes
from models.cuda_graph import GraphedStep
from models.data import Data
from models.distributed import log
from models.history import History, Row
from models.interrupt import Stopped, StopRequest
from models.loader import TrainLoader, ValLoader
from models.networks import Network
from models.options import Options
from tkernels.core import hardware

# in a checkpoint's settings: which rows of a table it was trained on
FINGERPRINT = "data fingerprint"
Gradients = dict[str, tuple[float, float]]


class TrainingError(Exception):
    """Training that cannot go on; the message says why in one line."""


class Loaders(NamedTuple):
    train: TrainLoader
    val: ValLoader


class Trainer:
    """Trains as the options say and writes history and checkpoints to ``chosen.out``.

    In a job of several processes each has one; the first alone writes and prints.
    """

    def __init__(self, chosen: Options, data: Data, loaders: Loaders) -> None:
        self.chosen, self.loaders = chosen, loaders
        self.fingerprint = chosen.fingerprint()
        self.network = Network.of_data(data, chosen.model, chosen.width, chosen.image_size, chosen.resize)
        sizes = [loaders.train.size(i) for i in range(len(loaders.train))]
        if self.network.arch:
            self.network.check(min(sizes) * (distributed.size() if chosen.sync_bn else 1))
        torch.manual_seed(chosen.seed)
        fused = chosen.fuse
        model = self.network.build(fused)
        if chosen.pretrained and not chosen.resume:
            with distributed.main_first():  # it downloads
                new = networks.load_pretrained(model, self.network.arch)
            log(f"pretrained: torchvision's weights of {self.network.arch}; new: {', '.join(new) or 'none'}")
        if chosen.sync_bn and distributed.size() > 1:
            model = tnn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model.to(chosen.device)
        self.criterion = networks.build_criterion(fused, chosen.label_smoothing)
        if chosen.compile:
            hardware.find_cuda()
            self.model.compile()  # in place: the names in its state_dict stay
        lr: float | Tensor = torch.tensor(chosen.lr, device=chosen.device) if chosen.cuda_graph else chosen.lr
        self.optimizer = recipes.build_optimizer(
            chosen.optimizer, self.model, lr, chosen.momentum, chosen.weight_decay, chosen.cuda_graph
        )
        self.scaler = torch.amp.GradScaler(chosen.device.type) if chosen.amp == torch.float16 else None
        self.steps = engine.steps(sizes, chosen.accumulate)
        total = chosen.epochs * sum(step.last for step in self.steps)
        self.schedule = recipes.Schedule(
            self.optimizer, chosen.lr, chosen.schedule, round(chosen.warmup * total), total
        )
        self.preprocessing = data.preprocessing
        self.history = History(chosen.out / "history.csv", write=distributed.is_main())
        self.epoch, self.batch = 0, 0  # epochs finished; batches done of the one under way
        self.totals = engine.Totals(chosen.device)
        self.val_acc = 0.0
        self.gradients: Gradients = {}
        self.said = False  # what of torchvision's network is fused
        classes = len(data.classes)
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64, device=chosen.device)
        # from here on every process draws its own random numbers; that of one process is not moved
        if distributed.rank() > 0:
            torch.manual_seed(chosen.seed + 1_000_003 * distributed.rank())

    @property
    def path(self) -> Path:
        return self.chosen.out / checkpoint.NAME

    def fit(self, board: Any = None) -> engine.EpochResult:
        """Train to the last epoch, with history and checkpoint after each; returns the last validation.

        ``board``: TensorBoard's writer. Raises TrainingError when the loss is no longer finite (the checkpoint of the
        last good epoch stays), Stopped on SIGTERM and SIGINT, after a checkpoint.
        """
        validation = None
        if self.epoch == 0 and self.batch == 0:
            self.history.start()
        train = self._training_step()
        with StopRequest() as request:
            for epoch in range(self.epoch + 1, self.chosen.epochs + 1):
                validation = self._one_epoch(epoch, train, request)
                if board is not None:
                    self.history.rows[-1].show(board)
                if epoch < self.chosen.epochs:
                    self._stop_if_requested(request)
            if validation is None:  # nothing left to train
                validation = self.validate("validation")
                self.val_acc = validation.accuracy
                if self.epoch == 0:
                    self.save()
        return validation

    def validate(self, label: str) -> engine.EpochResult:
        bar = engine.progress_bar(label, len(self.loaders.val))
        return engine.validate(
            self.model, self.loaders.val, self.criterion, self.chosen.device, amp=self.chosen.amp,
            confusion=self.confusion.zero_(), bar=bar,
        )  # fmt: skip

    def _one_epoch(
        self, epoch: int, train: engine.TrainingStep | GraphedStep, request: StopRequest
    ) -> engine.EpochResult:
        label = f"epoch {epoch:{len(str(self.chosen.epochs))}}/{self.chosen.epochs}"
        before, start = self.totals.images, time.perf_counter()
        batches = self.loaders.train.epoch(epoch, self.batch)
        bar = engine.progress_bar(label, len(self.steps), self.batch)
        for step in bar(engine.train_epoch(self.model, batches, train, self.totals, self.steps[self.batch :])):
            if self.chosen.fuse and self.network.arch and not self.said:
                self._say_what_is_fused()
            self.batch = step.index + 1
            if step.last:
                self.schedule.advance()
                self._stop_if_requested(request)
        training = self.totals.result()
        seconds = time.perf_counter() - start
        if self.chosen.plot_gradients:
            self.gradients = _gradient_flow(self.model)
        rate = (training.images - before * distributed.size()) / seconds
        validation = self.validate(f"{label} validation")
        self.history.add(Row(epoch, training.loss, validation.loss, training.accuracy, validation.accuracy))
        if not (math.isfinite(training.loss) and math.isfinite(validation.loss)):
            raise TrainingError(
                f"the loss is no longer finite after epoch {epoch}: try a --lr below {self.chosen.lr:g}"
            )
        self.epoch, self.batch, self.val_acc = epoch, 0, validation.accuracy
        self.totals = engine.Totals(self.chosen.device)
        self.save()
        log(
            f"{label}  train loss {training.loss:.4f}, accuracy {training.accuracy:6.2%}"
            f"  validation loss {validation.loss:.4f}, accuracy {validation.accuracy:6.2%}"
            f"  {rate:,.0f} examples/s"
        )
        return validation

    def _say_what_is_fused(self) -> None:
        report = tkernels.explain(self.model)
        self.said = True
        left = "layer is" if len(report.left) == 1 else "layers are"
        log(f"fuse: {len(report.fused)} chains of layers, {len(report.left)} {left} left to PyTorch")
        for hint in report.hints:
            if not hint.startswith("dtype"):  # which is known from --amp
                log(f"note: {hint}")

    def _stop_if_requested(self, request: StopRequest) -> None:
        signum = request.requested()
        if signum:
            self.save()
            raise Stopped(signum, f"{self.position()}; {self.path} is written, --resume goes on from there")

    def position(self) -> str:
        """Where the run stands, in words."""
        if self.batch == 0:
            return f"after epoch {self.epoch}"
        return f"in epoch {self.epoch + 1}, after batch {self.batch} of {len(self.steps)}"

    def _training_step(self) -> engine.TrainingStep | GraphedStep:
        model: nn.Module = self.model
        if distributed.size() > 1:
            on_gpu = self.chosen.device.type == "cuda"
            model = nn.parallel.DistributedDataParallel(model, device_ids=[self.chosen.device] if on_gpu else None)
        step = engine.TrainingStep(
            model, self.criterion, self.optimizer, amp=self.chosen.amp, scaler=self.scaler, clip=self.chosen.clip
        )
        return GraphedStep(step, log, step.abandon) if self.chosen.cuda_graph else step

    def save(self) -> None:
        """Write the checkpoint; every process must call it. Raises TrainingError where nobody could go on from it."""
        name = contents.not_finite(self.model.state_dict())
        if distributed.largest(bool(name)):
            raise TrainingError(
                f"weights are no longer finite {self.position()} ({name or 'in another process'}), which is not "
                f"written: try a --lr below {self.chosen.lr:g}"
            )
        processes = distributed.gathered({"rng": _random_state(self.chosen.device), **self.totals.state_dict()})
        if processes is None:
            return
        state = {
            "epoch": self.epoch,
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": _portable(self.optimizer.state_dict()),
            "val_acc": self.val_acc,
            "network": self.network.to_dict(),
            "preprocessing": self.preprocessing,
            "schedule_state_dict": self.schedule.state_dict(),
            "scaler_state_dict": None if self.scaler is None else self.scaler.state_dict(),
            "batch": self.batch,
            "processes": processes,
            "history": [list(row) for row in self.history.rows],
            "settings": {**self.chosen.settings(), FINGERPRINT: self.fingerprint},
        }
        checkpoint.save(self.path, state)

    def resume(self) -> None:
        """Go on from the newest usable checkpoint in ``chosen.out``. Raises CheckpointError where there is none."""
        state = checkpoint.newest(self.chosen.out, self._take, lambda line: log(f"note: {line}"))
        for name, saved, wanted in self.chosen.changed(state["settings"]):
            log(f"note: {name} was {saved} so far and is {wanted} from here on")
        self.history.start([Row(*row) for row in state["history"]])
        log(f"goes on {self.position()}")

    def _take(self, state: checkpoint.State) -> None:
        """Stand where a checkpoint stood. Raises CheckpointError where that cannot be, perhaps half way."""
        self._check(state)
        self.model.load_state_dict(state["model_state_dict"])
        # of the groups their hyperparameters count as they are given now
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({**state["optimizer_state_dict"], "param_groups": groups})
        self.schedule.load_state_dict(state["schedule_state_dict"])
        if self.scaler is not None and state["scaler_state_dict"] is not None:
            self.scaler.load_state_dict(state["scaler_state_dict"])
        self.epoch, self.batch, self.val_acc = state["epoch"], state["batch"], state["val_acc"]
        self._resume_processes(state["processes"])

    def _resume_processes(self, processes: list[dict[str, Any]]) -> None:
        """What each process had of its own; where their number changed, the first takes the sums and all draw anew."""
        if len(processes) == distributed.size():
            own = processes[distributed.rank()]
            self.totals.load_state_dict(own)
            _set_random_state(own["rng"], self.chosen.device)
            return
        if distributed.is_main():
            together = {key: sum(p[key] for p in processes) for key in ("loss", "correct", "images")}
            self.totals.load_state_dict(together)
        torch.manual_seed(self.chosen.seed + 1_000_003 * (distributed.rank() + 1) + self.epoch * 7919 + self.batch)

    def _check(self, state: checkpoint.State) -> None:
        needed = ("schedule_state_dict", "scaler_state_dict", "batch", "processes", "history", "settings")
        contents.need(state, needed, "cannot be gone on from")
        contents.check_run(state)
        differences = Network.from_dict(state["network"]).differences(self.network)
        saved, wanted = state["settings"].get("optimizer"), self.chosen.optimizer
        if saved != wanted:
            differences.append(f"--optimizer {saved} instead of {wanted}")
        if state["batch"] > len(self.steps):
            differences.append(f"{state['batch']} batches of an epoch done, there are {len(self.steps)} now")
        then = state["settings"].get(FINGERPRINT, "")
        if then and self.fingerprint and then != self.fingerprint:
            what = "rows" if self.network.takes_rows else "files"
            differences.append(f"the {what} of {self.chosen.data} were {then} and are {self.fingerprint} now")
        if differences:
            raise checkpoint.CheckpointError(f"is of another run: {', '.join(differences)}")
        contents.check_weights(state["model_state_dict"], self.model.state_dict())
        contents.check_optimizer(state["optimizer_state_dict"], self.optimizer)


def _portable(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state without the marks of a CUDA graph: a learning rate in a tensor, and what takes it."""
    groups = []
    for group in state["param_groups"]:
        changed: dict[str, Any] = {}
        if isinstance(group["lr"], Tensor):
            unmarked = {"lr": group["lr"].item(), "capturable": False, "fused": None}
            changed = {key: value for key, value in unmarked.items() if key in group}
        groups.append({**group, **changed})
    return {**state, "param_groups": groups}


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _gradient_flow(model: nn.Module) -> Gradients:
    """(mean, largest) magnitude of the gradients the last step left, of every weight."""
    return {
        name.removesuffix(".weight"): (p.grad.abs().mean().item(), p.grad.abs().max().item())
        for name, p in model.named_parameters()
        if p.grad is not None and name.endswith("weight")
    }
