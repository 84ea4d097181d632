"""What happens to images: to each as it is loaded, to a batch of them on the device, to a batch and its labels.

torchvision.transforms.v2 draws once a call, so on a batch its random transforms would treat all images alike: they run
image by image where a DataLoader loads (``each_image``), and the two for batches here draw for each image.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

Transform = Callable[[Tensor], Tensor]
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
POLICIES = {"none": None, "trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment, "auto": v2.AutoAugment}


def flip_each(images: Tensor) -> Tensor:
    """Images (N, C, H, W), each mirrored left to right or not, by a throw of a coin."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(chosen, v2.functional.horizontal_flip(images), images)


def rotate_each(images: Tensor, degrees: float) -> Tensor:
    """Images (N, C, H, W) of floats, each turned about its centre by an angle drawn from [-degrees, degrees].

    Bilinear; what comes from outside the image is 0.
    """
    return rotate(images, torch.empty(len(images), device=images.device).uniform_(-degrees, degrees))


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Images (N, C, H, W) turned counter-clockwise by ``degrees`` (N), as v2.functional.rotate turns one of them."""
    height, width = images.shape[-2:]
    radians = degrees * (math.pi / 180)
    cos, sin, zero = torch.cos(radians), torch.sin(radians), torch.zeros_like(radians)
    # where each pixel comes from, in the coordinates of affine_grid: -1 to 1 along each side
    rows = (cos, -sin * (height / width), zero, sin * (width / height), cos, zero)
    grid = torch.nn.functional.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid.to(images.dtype), padding_mode="zeros", align_corners=False)


def fit(size: int, resize: int) -> list[Transform]:
    """Images become size x size: stretched or, where ``resize`` is not 0, their shorter side has first so many pixels
    and then the middle is cut out."""
    if resize == 0:
        return [v2.Resize((size, size), antialias=True)]
    return [trim, v2.Resize(resize, antialias=True), v2.CenterCrop(size)]


def trim(images: Tensor) -> Tensor:
    """The middle of images longer than four times their other side: a strip of 1 x 5000 pixels would have 250 million
    once its shorter side has 224, of which a square is used."""
    height, width = images.shape[-2:]
    most = 4 * min(height, width)
    if max(height, width) <= most:
        return images
    return v2.functional.center_crop(images, [min(height, most), min(width, most)])


def image_transforms(
    size: int, mean: Sequence[float], std: Sequence[float], *, resize: int = 0, flip: bool = False,
    rotation: float = 0.0,
) -> tuple[Transform, Transform]:  # fmt: skip
    """(for training, for validation): batches of uint8 or [0, 1] images to normalised float32 ones, size x size."""
    first = [v2.ToDtype(torch.float32, scale=True), *fit(size, resize)]
    random: list[Transform] = [flip_each] if flip else []
    if rotation > 0:
        random.append(functools.partial(rotate_each, degrees=rotation))
    last = [v2.Normalize(list(mean), list(std))]
    return v2.Compose([*first, *random, *last]), v2.Compose([*first, *last])


def each_image(size: int, resize: int, crop: float = 0.0, policy: str = "none") -> Transform:
    """An image (3, H, W) of any size to one of uint8, size x size, by :func:`fit` or, where ``crop`` is not 0, a part
    of at least that share at random, and then by one of ``POLICIES``."""
    steps: list[Transform] = [v2.ToDtype(torch.uint8, scale=True)]
    steps += [v2.RandomResizedCrop(size, (crop, 1.0), antialias=True)] if crop else fit(size, resize)
    chosen = POLICIES[policy]
    return v2.Compose(steps if chosen is None else [*steps, chosen()])


def mix_labels(mixup: float, cutmix: float, classes: int) -> Mix | None:
    """MixUp or CutMix of a batch, by the parameters of their Beta distributions, 0 for neither; of both one a batch."""
    chosen = [kind(alpha=a, num_classes=classes) for kind, a in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if a > 0]
    return v2.RandomChoice(chosen) if chosen else None


class Mapped(Dataset[Any]):
    """A data set of (image, class) whose images go through ``transform``, in whichever process they are loaded.

    What is drawn there depends on the seed, the epoch and the example alone: ``[epoch * len + index]``, so that a
    run that goes on, or loads by another number of workers, sees the same images.
    """

    def __init__(self, dataset: Dataset[Any], transform: Transform, seed: int = 0) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, number: int) -> tuple[Tensor, Any]:
        image, label = self.dataset[number % len(self)]
        with torch.random.fork_rng(devices=()):
            # of the CPU alone: torch.manual_seed would move a GPU's numbers too
            torch.default_generator.manual_seed(self.seed * 1_000_000_007 + number)
            return self.transform(image), label
