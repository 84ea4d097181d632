"""Fuse a model of torchvision or timm, and measure whether that pays on this machine.

python -m models.examples.fuse_torchvision resnet18
python -m models.examples.fuse_torchvision timm:efficientnet_b0 --size 224 --amp bf16
"""

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import tkernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(name: str) -> nn.Module:
    """A classifier with random weights: torchvision's of that name, or timm's behind 'timm:'."""
    if name.startswith("timm:"):
        import timm

        return timm.create_model(name.removeprefix("timm:"))
    import torchvision

    return torchvision.models.get_model(name, weights=None)


def machine() -> str:
    """The name to say beside every time."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def inference(model: nn.Module, images: Tensor, autocast: torch.autocast) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad(), autocast:
            return model(images)

    model.eval()
    return call


def training(model: nn.Module, images: Tensor, autocast: torch.autocast) -> Callable[[], object]:
    labels = torch.zeros(len(images), dtype=torch.int64, device=DEVICE)

    def call() -> None:
        with autocast:
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        model.zero_grad()

    model.train()
    return call


def in_turns(calls: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Milliseconds of each call in each round. All take their turn in a round, so that what the machine does meanwhile
    meets all of them; the first calls, which compile, are no part of it."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(-2, rounds):
        for call, its_times in zip(calls, times):
            start = time.perf_counter()
            call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if number >= 0:
                its_times.append((time.perf_counter() - start) * 1e3)
    return times


def shown(times: list[float]) -> str:
    low, median, high = statistics.quantiles(times, n=4)
    return f"{median:.1f} ms ({low:.1f} to {high:.1f})"


def main(arguments: list[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="resnet18", help="torchvision's name of it, or timm:NAME")
    parser.add_argument("--batch", type=int, default=8, help="images a call (default: 8)")
    parser.add_argument("--size", type=int, default=64, help="their height and width (default: 64)")
    parser.add_argument("--amp", choices=["bf16"], help="autocast to bfloat16 (default: float32)")
    parser.add_argument("--rounds", type=int, default=11, help="rounds of turns, 2 at least (default: 11)")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=options.amp == "bf16")
    # channels_last: the layout in which convolutions are fast, and in which chains are fused
    eager = build(options.model).to(DEVICE).to(memory_format=torch.channels_last)
    fused = tkernels.fuse(copy.deepcopy(eager))
    images = torch.randn(options.batch, 3, options.size, options.size, device=DEVICE)
    images = images.to(memory_format=torch.channels_last)

    for name, prepare in (("inference", inference), ("training step", training)):
        calls = [prepare(model, images, autocast) for model in (eager, fused)]
        calls[1]()  # captures, fuses and compiles
        if prepare is inference:
            print(tkernels.explain(fused))
            print(f"\n{options.model}, {tuple(images.shape)}, {options.amp or 'fp32'}, on {machine()}")
        times = in_turns(calls, options.rounds)
        low, gain, high = statistics.quantiles([before / after for before, after in zip(*times)], n=4)
        verdict = "fusing pays" if low > 1 else "fusing does not pay" if high < 1 else "no difference beyond the noise"
        print(f"{name}: eager {shown(times[0])}, fused {shown(times[1])}")
        print(f"  {gain:.2f} times as fast, median of the rounds (quartiles {low:.2f} to {high:.2f}): {verdict}")
    return fused


if __name__ == "__main__":
    main()
