"""Train a classifier: ``python -m models.train --help``.

Writes to the output directory history.csv (a line an epoch, as it happens), checkpoint.pt (after every epoch and when
it is told to stop; the one before it stays as checkpoint.previous.pt), and at the end curves.png and confusion.png.
Exit status: 0 trained; 1 the loss diverged, results could not be written, another process died or the GPU was lost to a
failed capture; 2 a bad option, data that cannot be had, no checkpoint to resume from or another run in the same
directory; 130 and 143 stopped by SIGINT and SIGTERM.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import tkernels
from models import augment, checkpoint, data, distributed, folder, lock, networks, options, plots, tabular
from models.checkpoint import CheckpointError
from models.cuda_graph import CaptureError
from models.data import Data, DataError
from models.engine import EpochResult
from models.interrupt import Stopped
from models.loader import Feed, TrainLoader, ValLoader
from models.trainer import Loaders, Trainer, TrainingError
from tkernels.core import hardware, mode


def main(argv: Sequence[str] | None = None) -> int:
    """The command: parse, train, report. Returns the exit status; bad options raise SystemExit(2)."""
    chosen = options.parse(argv)
    try:
        chosen.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _fail(error, 2)
    with tkernels.backend(chosen.backend), contextlib.ExitStack() as job:
        try:
            job.enter_context(distributed.joined(chosen.device))
        except RuntimeError as error:  # the processes of a job do not find each other
            return _fail(f"the processes of the job cannot talk to each other: {error}", 1)
        return _run_reporting(chosen)


def _run_reporting(chosen: options.Options) -> int:
    """Run; what goes wrong becomes one line and an exit status."""
    try:
        with _alone(chosen.out):
            run(chosen)
    except lock.Busy as error:
        return _fail(error, 2) if distributed.is_main() else 2
    except (DataError, CheckpointError) as error:
        return _fail(error, 2)
    except (TrainingError, OSError) as error:
        return _fail(error, 1)
    except CaptureError as error:
        return _fail(f"{error}; --no-cuda-graph does without", 1)
    except Stopped as stopped:
        return _fail(f"stopped by {signal.Signals(stopped.signum).name} {stopped}", 128 + stopped.signum)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except RuntimeError as error:
        if not distributed.is_loss_of_a_process(error):
            raise
        path = chosen.out / checkpoint.NAME
        how = f"--resume goes on from {path}" if path.exists() else "there is no checkpoint yet"
        return _fail(f"another process of the job died or does not answer; {how} ({error})", 1)
    return 0


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Within it ``out`` is this job's alone; its first process holds it for all.

    Raises Busy, in the first process CheckpointError or OSError where its files cannot be written.
    """
    failed: Exception | None = None
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            try:
                if stack.enter_context(lock.held(out / ".lock", f"to {out}", distributed.log)):
                    checkpoint.prepare(out)
                _check_files(out)
            except (lock.Busy, CheckpointError, OSError) as error:
                failed = error
        if distributed.largest(failed is not None):
            raise failed or lock.Busy("the first process says why")
        yield


def _check_files(out: Path) -> None:
    """Raise OSError where a result would go into what is no file: a FIFO would be waited for, hours later."""
    for name in ("history.csv", "curves.png", "confusion.png", "gradients.png"):
        path = out / name
        if path.exists() and not path.is_file():
            raise OSError(f"{path} is no regular file, results are to be written there")


def run(chosen: options.Options) -> EpochResult:
    """Train as the options say and write the results; returns the last validation."""
    parts = load(chosen)
    trainer = Trainer(chosen, parts, loaders(chosen, parts))
    distributed.log(_headline(chosen, trainer, parts))
    slow = hardware.why_slow(chosen.amp, chosen.device) if chosen.amp is not None else None
    if slow is not None:
        distributed.log(f"note: --amp: {slow}")
    if chosen.resume or (distributed.restarts() and trainer.path.exists()):
        trainer.resume()
    board: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if chosen.tensorboard and distributed.is_main():
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(chosen.out / "tensorboard"))
    with board as writer:
        validation = trainer.fit(writer)
    if distributed.is_main():
        _report(chosen, trainer, validation, parts)
    return validation


def load(chosen: options.Options) -> Data:
    """The data, with what the options say of classes and colours. Raises DataError."""
    found = _load(chosen)
    if chosen.classes is not None:
        spare = chosen.classes - len(found.classes)
        if spare < 0:
            raise DataError(f"--classes {chosen.classes} is less than the {len(found.classes)} classes of the data")
        found = found._replace(classes=(*found.classes, *(f"(none {i})" for i in range(1, spare + 1))))
    if chosen.pretrained:
        mean, std = networks.colours_of_pretrained(chosen.model)
        found = found._replace(mean=mean, std=std)
    return found


def _load(chosen: options.Options) -> Data:
    """The data; in a job of several processes the first one downloads."""
    with distributed.main_first():
        if ":" not in chosen.data:
            return data.load(chosen.data, chosen.data_dir, chosen.seed, chosen.val_fraction)
    path = Path(chosen.data.partition(":")[2])
    if chosen.data.startswith("csv:"):
        return tabular.load(path, chosen.target, chosen.categorical, chosen.seed, chosen.val_fraction)
    room = {"auto": folder.SHARE * folder.free_memory(chosen.device), "device": math.inf, "workers": 0.0}[chosen.loader]
    reading = folder.Reading(
        chosen.image_size, chosen.resize, chosen.workers, chosen.strict, 0.0 if options.one_by_one(chosen) else room,
        chosen.random_crop > 0, distributed.log,
    )  # fmt: skip
    return folder.load(path, reading, chosen.seed, chosen.val_fraction)


def loaders(chosen: options.Options, parts: Data) -> Loaders:
    """Batches to train on and to validate with."""
    on_disk = not data.in_memory(parts.train)
    streams = on_disk or chosen.loader == "workers" or options.one_by_one(chosen)
    feed = Feed(chosen.device, chosen.workers if streams else None, chosen.pin_memory, chosen.drop_last)
    train, val = parts.train, parts.val
    if on_disk or options.one_by_one(chosen):
        each = augment.each_image(chosen.image_size, chosen.resize, chosen.random_crop, chosen.augment)
        train = augment.Mapped(train, each, chosen.seed)
    if on_disk:
        val = augment.Mapped(val, augment.each_image(chosen.image_size, chosen.resize))
    training = validation = None
    if parts.mean is not None and parts.std is not None:
        size, colours = chosen.image_size, (parts.mean, parts.std)
        training, _ = augment.image_transforms(
            size, *colours, resize=_resize(chosen, train), flip=chosen.flip, rotation=chosen.rotate
        )
        _, validation = augment.image_transforms(size, *colours, resize=_resize(chosen, val))
    mix = augment.mix_labels(chosen.mixup, chosen.cutmix, len(parts.classes))
    found = Loaders(
        TrainLoader(train, chosen.batch_size, chosen.seed, feed, training, mix),
        ValLoader(val, chosen.batch_size, feed, validation),
    )
    if len(found.train) == 0:
        raise DataError(f"no full batch of {chosen.batch_size}: give a smaller --batch-size or --no-drop-last")
    return found


def _resize(chosen: options.Options, dataset: Any) -> int:
    """What is left to be done on the device: nothing for images that have their size from when they were read."""
    return 0 if chosen.data.startswith("folder:") or isinstance(dataset, augment.Mapped) else chosen.resize


def _report(chosen: options.Options, trainer: Trainer, validation: EpochResult, parts: Data) -> None:
    """Draw the pictures and say how it went."""
    rows, out = trainer.history.rows, chosen.out
    name = f"{_named(chosen, trainer)} on {chosen.data}"
    accuracy = f"{validation.accuracy:.2%} validation accuracy"
    written = [checkpoint.NAME, "confusion.png"]
    plots.draw_confusion(trainer.confusion.cpu(), parts.classes, out / "confusion.png", f"{name}: {accuracy}")
    if rows:
        plots.draw_curves(rows, out / "curves.png", f"{name}: {accuracy}")
        written += ["curves.png", "history.csv"]
    if trainer.gradients:
        plots.draw_gradients(trainer.gradients, out / "gradients.png", f"{name}: gradients of the last step")
        written.append("gradients.png")
    correct = round(validation.accuracy * validation.images)
    print(f"validation accuracy {validation.accuracy:.2%} ({correct} of {validation.images} examples)")
    print(_peak_memory(chosen.device))
    print(f"wrote {', '.join(sorted(written))} to {out}")


def _peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"peak memory {torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB on {device}"
    import resource

    # bytes on macOS, KiB elsewhere
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:,.0f} MiB of the process"


def _headline(chosen: options.Options, trainer: Trainer, parts: Data) -> str:
    parameters = sum(p.numel() for p in trainer.model.parameters())
    if not chosen.fuse:
        how = "torch.nn"
    else:
        how = "Triton kernels" if mode.use_triton(next(trainer.model.parameters())) else "PyTorch"
    if chosen.amp is not None:
        how += f", {str(chosen.amp).removeprefix('torch.')}"
    if distributed.size() > 1:
        how += f", {distributed.size()} processes"
    what = "rows" if trainer.network.takes_rows else "images"
    return (
        f"{_named(chosen, trainer)} of {parameters:,} parameters on {chosen.device} ({how}); "
        f"{chosen.data}: {len(parts.train):,} {what} to train on, {len(parts.val):,} to validate"  # type: ignore[arg-type]
    )


def _named(chosen: options.Options, trainer: Trainer) -> str:
    how = chosen.model if chosen.model in networks.OURS else "fused" if chosen.fuse else "plain"
    return f"{how} {trainer.network.name}"


def _fail(error: Exception | str, status: int) -> int:
    who = f" [process {distributed.rank()}]" if distributed.size() > 1 else ""
    print(f"{options.PROGRAM}: error:{who} {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
